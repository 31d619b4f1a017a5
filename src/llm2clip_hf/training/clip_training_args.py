# SPDX-License-Identifier: Apache-2.0
"""Arguments of stage 2: the recipe of the paper as the defaults of `TrainingArguments`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .precision import gpu_supports_bf16


LOSS_TYPES = ("softmax", "sigmoid")


@dataclass
class LLM2CLIPTrainingArguments(TrainingArguments):
    r"""
    Arguments of [`LLM2CLIPTrainer`]: `TrainingArguments` with the recipe of the paper.

    Sources: learning rate, cosine schedule, 4 epochs and the global batch of 4096 (8 devices of 512) from section 4.1
    of arXiv 2411.04997; weight decay 0.05, no warm-up, clipping at 5.0, layer decay 0.85 and AdamW's betas
    (0.9, 0.999) and epsilon 1e-8 from the released configuration.

    Args:
        loss_type (`str`, *optional*): `"softmax"` or `"sigmoid"`; by default sigmoid for a model with a logit bias.
        vision_layer_decay (`float`, *optional*, defaults to 0.85):
            Factor of the learning rate per vision layer, from output to input; 1.0 turns it off.
        encoder_chunk_size (`int`, *optional*):
            Rows that pass through the encoders at a time, for batches larger than memory; the loss stays that of the
            whole batch.

    Gradient accumulation averages the losses of its micro-batches and adds no negatives: for a larger contrastive
    batch raise `per_device_train_batch_size` and set `encoder_chunk_size`.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate (paper section 4.1)."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule, to 0 (paper section 4.1)."})
    num_train_epochs: float = field(default=4.0, metadata={"help": "Epochs (paper section 4.1)."})
    per_device_train_batch_size: int = field(default=512, metadata={"help": "Pairs per device (released recipe)."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decay of weight matrices (released recipe)."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Clipping of the gradient norm (released recipe)."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bf16 autocast; by default where the device is a GPU that supports it."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator needs the columns that the model does not know."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leave out the last, smaller training batch; evaluation uses every row."}
    )
    loss_type: str | None = field(
        default=None,
        metadata={"help": '`"softmax"` or `"sigmoid"`; by default sigmoid for a model with a logit bias.'},
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

    def __post_init__(self) -> None:
        if self.loss_type is not None and self.loss_type not in LOSS_TYPES:
            raise ValueError(f"`loss_type` must be one of {', '.join(map(repr, LOSS_TYPES))}, got {self.loss_type!r}.")
        if not 0.0 < self.vision_layer_decay <= 1.0:
            raise ValueError(f"`vision_layer_decay` must be in (0, 1], got {self.vision_layer_decay}.")
        if self.encoder_chunk_size is not None and self.encoder_chunk_size < 1:
            raise ValueError(f"`encoder_chunk_size` must be positive or None, got {self.encoder_chunk_size}.")
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns=True` would strip images and captions before the collator. Leave it `False`."
            )
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and gpu_supports_bf16()
        super().__post_init__()
