# SPDX-License-Identifier: Apache-2.0
"""Training arguments of stage 1."""

from dataclasses import dataclass, field

from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import TrainingArguments

from ..run_checks import gpu_supports_bf16, refuse_options
from .loss import check_options


_NO_METRICS = "the evaluation gives the loss, and an `evaluator` everything else"
# Options of the base classes that have no effect, and why.
_UNUSED_IN_STAGE_1 = {
    "label_smoothing_factor": "the loss has no smoothed targets",
    "label_names": "labels are the column `label`",
    "use_liger_kernel": "its kernels are for the losses of causal language models",
    "liger_kernel_config": "its kernels are for the losses of causal language models",
    "use_cache": "nothing is generated",
    "neftune_noise_alpha": "it reaches a language model with its head only",
    "include_num_input_tokens_seen": "a batch has tokens in several columns",
    "length_column_name": "`mini_batch_tokens` groups rows by length",
    "router_mapping": "the encoder has no `Router`",
    "eval_do_concat_batches": _NO_METRICS,
    "batch_eval_metrics": _NO_METRICS,
    "include_for_metrics": _NO_METRICS,
}
_UNUSED_IN_MNTP = {
    "label_names": "the masked tokens are the labels",
    "use_cache": "nothing is generated",
    "length_column_name": "the texts have no columns",
    "remove_unused_columns": "the texts have no columns",
}


def _fill_defaults(args: TrainingArguments) -> None:
    """bf16 where a GPU computes in it, and recomputed activations, unless they are set."""
    if args.bf16 is None:
        args.bf16 = not args.fp16 and not args.use_cpu and gpu_supports_bf16()
    # The option is called `activation_checkpointing` from transformers 5.22 on, which warns about the old name.
    names = [name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(args, name)]
    if all(getattr(args, name) is None for name in names):
        setattr(args, names[0], True)


@dataclass
class CaptionContrastiveTrainingArguments(SentenceTransformerTrainingArguments):
    r"""
    Arguments of [`CaptionContrastiveTrainer`]: `SentenceTransformerTrainingArguments` with the recipe of the paper.

    Sources: learning rate, warm-up, epoch, bf16 and recomputed activations from section 4.1; scale, batch per device
    and direction from the released stage-1 configuration. Runs of a few hundred steps want fewer `warmup_steps`.

    Args:
        bf16 (`bool`, *optional*):
            Autocast to bfloat16. Defaults to `True` on a GPU whose hardware computes in it (NVIDIA from compute
            capability 8 on, AMD) unless `fp16` is set, else to `False`, as in `TrainingArguments`: a T4 or V100
            computes in the type of the weights, best float32, or with `fp16=True` in float16 with loss scaling.
        scale (`float`, *optional*, defaults to 50.0): Multiplier of the cosine similarities (inverse temperature).
        symmetric (`bool`, *optional*, defaults to `False`): Whether positives also retrieve their anchors.
        mask_false_negatives (`bool`, *optional*, defaults to `True`):
            Whether captions of the same image (equal `label`) and equal captions are kept from being each other's
            negatives. Batches without such repetitions train the same either way; `False` is the released code.
        mini_batch_size (`int`, *optional*): Rows per forward pass, for batches larger than memory.
        mini_batch_tokens (`int`, *optional*):
            Padded tokens per forward pass, likewise: rows of similar length go together, so little is padded.

    Gradient accumulation adds no negatives: use a larger batch with `mini_batch_tokens` instead. Mini-batches are
    recomputed in the backward pass; where one of them fits into memory with its activations,
    `gradient_checkpointing=False` saves a second recomputation.
    """

    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate (paper section 4.1)."})
    warmup_steps: float = field(default=300, metadata={"help": "Steps of linear warm-up (paper section 4.1)."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs (paper section 4.1)."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Pairs per device (released recipe)."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bf16 autocast; by default where a GPU computes in it, not on T4 or V100."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations; on unless turned off here or by its newer name."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leave out the last, smaller batch, which would have fewer negatives."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "No use: a loss that is not finite ends the run."}
    )
    scale: float = field(
        default=50.0, metadata={"help": "Multiplier of the cosine similarities (inverse temperature)."}
    )
    symmetric: bool = field(default=False, metadata={"help": "Whether positives also retrieve their anchors."})
    mask_false_negatives: bool = field(
        default=True, metadata={"help": "Keep captions of one image and equal captions from being negatives."}
    )
    mini_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per forward pass, for batches larger than memory."}
    )
    mini_batch_tokens: int | None = field(
        default=None, metadata={"help": "Padded tokens per forward pass, for batches larger than memory."}
    )

    def __post_init__(self) -> None:
        check_options(self.scale, self.mini_batch_size, self.mini_batch_tokens)
        _fill_defaults(self)
        super().__post_init__()
        refuse_options(self, _UNUSED_IN_STAGE_1)
        names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
        reentrant = any((getattr(self, name, None) or {}).get("use_reentrant") for name in names)
        if reentrant and (self.mini_batch_size or self.mini_batch_tokens):
            raise ValueError(
                "Recomputed mini-batches do not work with `use_reentrant=True` in `gradient_checkpointing_kwargs`. "
                "Leave it out: the default is `False`."
            )


@dataclass
class MNTPTrainingArguments(TrainingArguments):
    r"""
    Arguments of [`MNTPTrainer`]: `TrainingArguments` with the released MNTP recipe of LLM2CLIP.

    Args:
        bf16 (`bool`, *optional*):
            Autocast to bfloat16. Defaults to `True` on a GPU whose hardware computes in it (NVIDIA from compute
            capability 8 on, AMD) unless `fp16` is set, else to `False`, as in `TrainingArguments`: a T4 or V100
            computes in the type of the weights, best float32, or with `fp16=True` in float16 with loss scaling.
        mask_probability (`float`, *optional*, defaults to 0.2):
            Probability that a token is masked; of these 80 % become the mask token, 10 % a random one, 10 % stay.
        max_length (`int`, *optional*, defaults to 512):
            Longest text in tokens; lowered to the LLM's own limit.
        mask_token (`str`, *optional*):
            Token that stands for a masked one. Defaults to the tokenizer's mask token, or to `"_"` without one.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate (released recipe)."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs (released recipe)."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts per device (released recipe)."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bf16 autocast; by default where a GPU computes in it, not on T4 or V100."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations; on unless turned off here or by its newer name."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used: the texts have no columns."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation gives the loss alone."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "No use: a loss that is not finite ends the run."}
    )
    mask_probability: float = field(default=0.2, metadata={"help": "Probability that a token is masked."})
    max_length: int = field(default=512, metadata={"help": "Longest text in tokens; longer ones are cut."})
    mask_token: str | None = field(
        default=None, metadata={"help": "Token for a masked one; the tokenizer's mask token by default, else '_'."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.mask_probability < 1:
            raise ValueError(f"`mask_probability` must lie in (0, 1), got {self.mask_probability}.")
        if self.max_length < 2:
            raise ValueError(f"`max_length` must be 2 or more, got {self.max_length}.")
        _fill_defaults(self)
        super().__post_init__()
        refuse_options(self, _UNUSED_IN_MNTP)
        if not 0.0 <= self.label_smoothing_factor <= 1.0:
            raise ValueError(f"`label_smoothing_factor` must lie in [0, 1], got {self.label_smoothing_factor}.")
