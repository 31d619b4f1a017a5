# SPDX-License-Identifier: Apache-2.0
"""Arguments of stage 2: the recipe of the paper as the defaults of `TrainingArguments`."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..run_checks import gpu_supports_bf16, refuse_options


LOSS_TYPES = ("softmax", "sigmoid")
TRAIN_VISION = ("full", "lora", "projection", "frozen")
TRAIN_TEXT = ("adapter", "lora", "frozen")
INTEGRATIONS = ("replace", "both", "aligned", "concatenated")
LOSS_EXCHANGES = ("gather", "ring")
COMPUTE_DTYPES = ("auto", "float32", "float16", "bfloat16")
# Options of `TrainingArguments` that have no effect in stage 2, and why.
UNUSED_OPTIONS = {
    "label_names": "batches hold no labels",
    "use_liger_kernel": "its kernels are for the losses and layers of causal language models",
    "liger_kernel_config": "its kernels are for the losses and layers of causal language models",
    "use_cache": "nothing is generated",
    "include_num_input_tokens_seen": "what enters the model are images, and mostly no tokens",
    "length_column_name": "rows are not grouped by length",
    "optim_target_modules": "the optimizers that it is for make parameter groups of their own",
}


@dataclass
class LLM2CLIPTrainingArguments(TrainingArguments):
    r"""
    Arguments of [`LLM2CLIPTrainer`]: `TrainingArguments` with the recipe of the paper.

    Sources: learning rate, cosine schedule, 4 epochs and the global batch of 4096 (8 devices of 512) from section 4.1
    of arXiv 2411.04997; weight decay 0.05, no warm-up, clipping at 5.0, layer decay 0.85 and AdamW's betas
    (0.9, 0.999) and epsilon 1e-8 from the released configuration.

    Args:
        per_device_eval_batch_size (`int`, *optional*):
            Pairs per device in evaluation; by default as many as in training, so that `eval_loss`, which grows with
            the number of negatives, compares with the training loss.
        loss_type (`str`, *optional*): `"softmax"` or `"sigmoid"`; by default sigmoid for a model with a logit bias.
        mask_false_negatives (`bool`, *optional*):
            Leave out as negatives pairs of the same image file or caption; on unless `label_smoothing_factor` is set.
            Batches without such repetitions train the same either way; the log counts `false_negatives_masked`.
        loss_exchange (`str`, *optional*, defaults to `"gather"`):
            How the loss sees the texts of other devices: `"gather"`, or `"ring"`, in less memory.
        loss_compute_dtype (`str`, *optional*, defaults to `"auto"`):
            What the loss rounds embeddings to: `"float32"`, `"float16"`, `"bfloat16"`, or `"auto"`, float16 on a GPU
            with tensor cores for it. Autocast has no influence.
        vision_layer_decay (`float`, *optional*, defaults to 0.85):
            Factor of the learning rate per vision layer, from output to input; 1.0 turns it off.
        encoder_chunk_size (`int`, *optional*):
            Rows that pass through the encoders at a time, for batches larger than memory; the loss stays that of the
            whole batch.
        accumulate_negatives (`bool`, *optional*, defaults to `True`):
            Whether gradient accumulation makes one contrastive batch of its micro-batches: 4 steps of 16 rows then
            train exactly like 1 step of 64, at the price of a second forward pass. `False` averages the losses of the
            micro-batches, each with its own negatives only.
        train_vision (`str`, *optional*, defaults to `"full"`):
            What is trained of the vision side: `"full"` (tower and projection), `"lora"` (LoRA on the tower's queries,
            keys and values, and the projection), `"projection"` or `"frozen"`.
        train_text (`str`, *optional*, defaults to `"adapter"`):
            What is trained of the text side: `"adapter"` (the LLM stays frozen), `"lora"` (the adaptor, and LoRA on
            the LLM, which must be in the model) or `"frozen"`.
        vision_lora (`dict`, *optional*):
            Fields of `peft.LoraConfig` for `train_vision="lora"`, over rank 32, alpha 32, dropout 0.1.
        text_lora (`dict`, *optional*):
            Fields of `peft.LoraConfig` for `train_text="lora"`, over rank 16, alpha 32, dropout 0.05, all linear
            layers.
        integration (`str`, *optional*, defaults to `"replace"`):
            What becomes of CLIP's own text encoder (paper tables 9 and A8): `"replace"` (the LLM replaces it),
            `"both"` (a second loss between images and the trainer's `clip_text_model`), `"aligned"` (and a third
            between that and the LLM) or `"concatenated"` (and a fourth between images and a trained linear head over
            the concatenated embeddings of both; the paper names this head without saying what it is).

    `label_smoothing_factor` of `TrainingArguments` smooths the targets of the softmax loss. What has no effect, such
    as `label_names`, is refused.

    Locked-image tuning is `train_vision="projection"`: a frozen tower under a trained projection, text adaptor and
    logit scale. The logit scale is always trained, and so is the logit bias with the sigmoid loss; the softmax loss,
    which a bias common to all logits does not change, leaves it as it is.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate (paper section 4.1)."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule, to 0 (paper section 4.1)."})
    num_train_epochs: float = field(default=4.0, metadata={"help": "Epochs (paper section 4.1)."})
    per_device_train_batch_size: int = field(default=512, metadata={"help": "Pairs per device (released recipe)."})
    per_device_eval_batch_size: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Pairs per device in evaluation; by default as many as in training, so that `eval_loss`, which "
            "grows with the number of negatives, compares with the training loss."
        },
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Decay of weight matrices (released recipe)."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Clipping of the gradient norm (released recipe)."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bf16 autocast; by default where a GPU computes in it, not on T4 or V100."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator needs the columns that the model does not know."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leave out the last, smaller training batch; evaluation uses every row."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "No use: a loss that is not finite ends the run."}
    )
    loss_type: str | None = field(
        default=None,
        metadata={"help": '`"softmax"` or `"sigmoid"`; by default sigmoid for a model with a logit bias.'},
    )
    mask_false_negatives: bool | None = field(
        default=None,
        metadata={
            "help": "Leave out as negatives pairs of the same image file or caption; on unless "
            "`label_smoothing_factor` is set."
        },
    )
    loss_exchange: str = field(
        default="gather",
        metadata={"help": 'How the loss sees the texts of other devices: `"gather"`, or `"ring"`, in less memory.'},
    )
    loss_compute_dtype: str = field(
        default="auto",
        metadata={
            "help": 'What the loss rounds embeddings to: `"float32"`, `"float16"`, `"bfloat16"`, or `"auto"`, float16 '
            "on a GPU with tensor cores for it."
        },
    )
    vision_layer_decay: float = field(
        default=0.85,
        metadata={"help": "Factor of the learning rate per vision layer, from output to input; 1.0 turns it off."},
    )
    encoder_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows that pass through the encoders at a time, for batches larger than memory; the loss stays "
            "that of the whole batch."
        },
    )
    accumulate_negatives: bool = field(
        default=True,
        metadata={
            "help": "Whether gradient accumulation makes one contrastive batch of its micro-batches: 4 steps of 16 "
            "rows then train exactly like 1 step of 64, at the price of a second forward pass. `False` averages the "
            "losses of the micro-batches, each with its own negatives only."
        },
    )
    train_vision: str = field(
        default="full",
        metadata={
            "help": 'What is trained of the vision side: `"full"` (tower and projection), `"lora"` (LoRA on the '
            'tower\'s queries, keys and values, and the projection), `"projection"` or `"frozen"`.'
        },
    )
    train_text: str = field(
        default="adapter",
        metadata={
            "help": 'What is trained of the text side: `"adapter"` (the LLM stays frozen), `"lora"` (the adaptor, and '
            'LoRA on the LLM, which must be in the model) or `"frozen"`.'
        },
    )
    vision_lora: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Fields of `peft.LoraConfig` for `train_vision="lora"`, over rank 32, alpha 32, dropout 0.1.'
        },
    )
    text_lora: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Fields of `peft.LoraConfig` for `train_text="lora"`, over rank 16, alpha 32, dropout 0.05, all '
            "linear layers."
        },
    )
    integration: str = field(
        default="replace",
        metadata={
            "help": "What becomes of CLIP's own text encoder (paper tables 9 and A8): "
            '`"replace"` (the LLM replaces it), `"both"` (a second loss between images and the trainer\'s '
            '`clip_text_model`), `"aligned"` (and a third between that and the LLM) or `"concatenated"` (and a '
            "fourth between images and a trained linear head over the concatenated embeddings of both; the paper "
            "names this head without saying what it is)."
        },
    )

    # Parsed from JSON text, as it comes from a command line.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "vision_lora", "text_lora"]

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all devices and accumulated micro-batches."""
        return int(self.train_batch_size * self.world_size * self.gradient_accumulation_steps)

    @property
    def contrastive_batch_size(self) -> int:
        """Rows that are negatives of one another."""
        accumulated = self.gradient_accumulation_steps if self.accumulate_negatives else 1
        return int(self.train_batch_size * self.world_size * accumulated)

    def __post_init__(self) -> None:
        _check_choice("loss_type", self.loss_type, (*LOSS_TYPES, None))
        _check_choice("train_vision", self.train_vision, TRAIN_VISION)
        _check_choice("train_text", self.train_text, TRAIN_TEXT)
        _check_choice("integration", self.integration, INTEGRATIONS)
        _check_choice("loss_exchange", self.loss_exchange, LOSS_EXCHANGES)
        _check_choice("loss_compute_dtype", self.loss_compute_dtype, COMPUTE_DTYPES)
        for side in ("vision", "text"):
            if getattr(self, f"{side}_lora") is not None and getattr(self, f"train_{side}") != "lora":
                raise ValueError(
                    f"`{side}_lora` has no effect with `train_{side}={getattr(self, f'train_{side}')!r}`. Set "
                    f"`train_{side}='lora'`, or leave `{side}_lora` out."
                )
        if not 0.0 < self.vision_layer_decay <= 1.0:
            raise ValueError(f"`vision_layer_decay` must be in (0, 1], got {self.vision_layer_decay}.")
        if self.encoder_chunk_size is not None and self.encoder_chunk_size < 1:
            raise ValueError(f"`encoder_chunk_size` must be positive or None, got {self.encoder_chunk_size}.")
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns=True` would strip images and captions before the collator. Leave it `False`."
            )
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and gpu_supports_bf16()
        super().__post_init__()
        refuse_options(self, UNUSED_OPTIONS)
        if self.train_text != "lora":
            refuse_options(self, {"neftune_noise_alpha": "the LLM is not trained with `train_text` other than 'lora'"})
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"`train_sampling_strategy` must be 'random' or 'sequential', got {self.train_sampling_strategy!r}: "
                "images have no lengths to group or balance by."
            )
        if not 0.0 <= self.label_smoothing_factor <= 1.0:
            raise ValueError(f"`label_smoothing_factor` must lie in [0, 1], got {self.label_smoothing_factor}.")
        if self.mask_false_negatives is None:
            self.mask_false_negatives = not self.label_smoothing_factor
        elif self.mask_false_negatives and self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor={self.label_smoothing_factor}` gives every pair of a batch a share of the "
                "target, those that `mask_false_negatives=True` leaves out too. Set one of the two."
            )
        loading: Any = self.accelerator_config
        if loading.dispatch_batches is None:
            # Streams: each process reads its own shards. The default would decode everything on the first one.
            loading.dispatch_batches = False


def _check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        names = ", ".join(repr(choice) for choice in choices if choice is not None)
        raise ValueError(f"`{name}` must be one of {names}, got {value!r}.")
