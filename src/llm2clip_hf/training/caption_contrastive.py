# SPDX-License-Identifier: Apache-2.0
"""Stage 1 of LLM2CLIP: caption-contrastive tuning of an LLM (arXiv 2411.04997, sections 3.1 and 4.1)."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import nn
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import has_length

from .callbacks import EpochCallback
from .caption_encoder import CaptionEncoder
from .precision import gpu_supports_bf16


logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"


@dataclass
class CaptionContrastiveTrainingArguments(SentenceTransformerTrainingArguments):
    r"""
    Arguments of [`CaptionContrastiveTrainer`]: `SentenceTransformerTrainingArguments` with the recipe of the paper.

    Sources: learning rate, warm-up, epoch, bf16 and recomputed activations from section 4.1; scale, batch per device
    and direction from the released stage-1 configuration. Runs of a few hundred steps want fewer `warmup_steps`, and
    benefit from `batch_sampler="no_duplicates"`, which keeps identical captions from being each other's negatives.

    Args:
        scale (`float`, *optional*, defaults to 50.0): Multiplier of the cosine similarities (inverse temperature).
        symmetric (`bool`, *optional*, defaults to `False`): Whether positives also retrieve their anchors.
        mini_batch_size (`int`, *optional*): Rows per forward pass, for batches larger than memory.

    Gradient accumulation adds no negatives: use a larger batch with `mini_batch_size` instead.
    """

    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate (paper section 4.1)."})
    warmup_steps: float = field(default=300, metadata={"help": "Steps of linear warm-up (paper section 4.1)."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs (paper section 4.1)."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Pairs per device (released recipe)."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bf16 autocast; by default where the device is a GPU that supports it."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations; on unless turned off here or by its newer name."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leave out the last, smaller batch, which would have fewer negatives."}
    )
    scale: float = field(
        default=50.0, metadata={"help": "Multiplier of the cosine similarities (inverse temperature)."}
    )
    symmetric: bool = field(default=False, metadata={"help": "Whether positives also retrieve their anchors."})
    mini_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per forward pass, for batches larger than memory."}
    )

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"`scale` must be positive, got {self.scale}. The paper's code uses 50.")
        if self.mini_batch_size is not None and self.mini_batch_size < 1:
            raise ValueError(f"`mini_batch_size` must be positive or None, got {self.mini_batch_size}.")
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and gpu_supports_bf16()
        self._recompute_activations_by_default()
        super().__post_init__()

    def _recompute_activations_by_default(self) -> None:
        # The option is called `activation_checkpointing` from transformers 5.22 on, which warns about the old name.
        names = [name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(self, name)]
        if all(getattr(self, name) is None for name in names):
            setattr(self, names[0], True)


class CaptionContrastiveTrainer(SentenceTransformerTrainer):
    r"""
    Trains a caption encoder so that captions of the same image are close and captions of other images are not.

    The loss of a batch of N pairs on one device, W devices, c = cosine: the mean over the device's anchors i of
    `-log(exp(scale * c(a_i, p_i)) / sum_j exp(scale * c(a_i, p_j)))`, where j runs over the positives (and the hard
    negatives, if the data have a third column) of all N * W pairs. With `symmetric=True` it is averaged with the same
    expression with the roles of anchors and positives exchanged. Gradients flow through the gather.

    Checkpoints hold the adapters (under `adapter/`) and the state of the run; `save_model(path)` writes the finished
    encoder with LoRA merged, see [`CaptionEncoder`].

    Args:
        model ([`CaptionEncoder`]): From [`build_caption_encoder`].
        args ([`CaptionContrastiveTrainingArguments`]): The recipe.
        train_dataset:
            A `datasets.Dataset` (or `DatasetDict` for single-source batches) with the columns anchor, positive and
            optionally negatives; or `data.CaptionPairDataset`, which draws two captions of each image anew in every
            epoch.
        eval_dataset: Like `train_dataset`, for the loss.
        evaluator: A `SentenceEvaluator` or a list of them, e.g. `evaluation.CaptionRetrievalEvaluator`.
        kwargs: Further arguments of `SentenceTransformerTrainer`.

    Raises:
        ValueError: if the model is not a `CaptionEncoder`, or the data hold less than one batch.
    """

    training_args_class = CaptionContrastiveTrainingArguments
    args: CaptionContrastiveTrainingArguments

    def __init__(
        self,
        model: CaptionEncoder,
        args: CaptionContrastiveTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, CaptionEncoder):
            raise ValueError(
                f"`model` must be a CaptionEncoder, got {type(model).__name__}. Make one with `build_caption_encoder`."
            )
        self._is_checkpoint = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=_as_dataset(train_dataset),
            eval_dataset=_as_dataset(eval_dataset),
            **kwargs,
        )
        if hasattr(train_dataset, "set_epoch"):
            self.add_callback(EpochCallback(train_dataset))

    def get_default_loss(self, model: Any) -> nn.Module:
        """In-batch InfoNCE over all devices; with cached gradients if `mini_batch_size` is set."""
        options: dict[str, Any] = {"scale": self.args.scale, "gather_across_devices": self.args.world_size > 1}
        if self.args.symmetric:
            options |= {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        if self.args.mini_batch_size is None:
            return MultipleNegativesRankingLoss(model, **options)
        return CachedMultipleNegativesRankingLoss(model, mini_batch_size=self.args.mini_batch_size, **options)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """The loader of the training set; refuses one that yields no batch."""
        loader = super().get_train_dataloader()
        if has_length(loader) and len(loader) == 0:
            raise ValueError(
                f"The training set holds less than one batch of {self.args.train_batch_size} pairs per device. Lower "
                "`per_device_train_batch_size`."
            )
        return loader

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning-rate schedule; says so when the warm-up takes the whole run."""
        if self.args.get_warmup_steps(num_training_steps) >= num_training_steps:
            logger.warning(
                "The warm-up of %s steps takes the whole run of %d steps, so the learning rate never reaches %g. "
                "Lower `warmup_steps`.",
                self.args.warmup_steps,
                num_training_steps,
                self.args.learning_rate,
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One step; stops the run at a loss that is not finite, before it reaches the weights."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}. The weights are those of step "
                f"{self.state.global_step}. Lower `learning_rate`, or check the captions of this batch."
            )
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the finished encoder: LoRA merged, one folder.

        Args:
            output_dir (`str`, *optional*): Folder to write, `args.output_dir` by default.
        """
        self._is_checkpoint = _internal_call
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._is_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        llm = self._encoder().llm
        if not self._is_checkpoint or not _has_adapters(llm):
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        # In a folder of its own: beside a `config.json`-less adapter, `SentenceTransformer` would load the causal LLM.
        llm.save_pretrained(folder / ADAPTER_FOLDER)
        self._encoder().tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        llm = self._encoder().llm
        adapter = Path(checkpoint_path) / ADAPTER_FOLDER / "adapter_model.safetensors"
        if _has_adapters(llm):
            if not adapter.is_file():
                raise ValueError(f"{checkpoint_path} holds no `{ADAPTER_FOLDER}/`. Give a checkpoint of a LoRA run.")
            result: Any = set_peft_model_state_dict(llm, load_file(adapter), llm.active_adapters()[0])
            wrong = list(result.unexpected_keys) + [key for key in result.missing_keys if "lora_" in key]
            if wrong:
                raise ValueError(f"The adapter in {checkpoint_path} does not fit the encoder; first: {wrong[:3]}.")
            return
        loaded = type(llm).from_pretrained(checkpoint_path, dtype=llm.dtype)
        llm.load_state_dict(loaded.state_dict(), strict=True)

    def _encoder(self) -> CaptionEncoder:
        return self.accelerator.unwrap_model(self.model)


def _has_adapters(llm: Any) -> bool:
    return bool(getattr(llm, "_hf_peft_config_loaded", False))


def _as_dataset(dataset: Any) -> Any:
    """A `datasets.Dataset` view of a dataset that draws anew each epoch; any other dataset passes through."""
    if not (hasattr(dataset, "to_dataset") and hasattr(dataset, "set_epoch")):
        return dataset
    drawn = dataset.to_dataset()
    columns = drawn.column_names

    def draw(batch: dict[str, list[int]]) -> dict[str, list[str]]:
        rows = [dataset[row] for row in batch["row"]]
        return {column: [row[column] for row in rows] for column in columns}

    return drawn.add_column("row", list(range(len(drawn)))).select_columns("row").with_transform(draw)
