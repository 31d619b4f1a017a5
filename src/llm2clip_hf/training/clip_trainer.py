# SPDX-License-Identifier: Apache-2.0
"""Stage 2 of LLM2CLIP: CLIP training with the LLM as text encoder (arXiv 2411.04997, sections 3.2 and 4.1)."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import EvalPrediction, Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from ..data import ImageTextCollator
from ..evaluation.metrics import retrieval_metrics
from ..losses import ContrastiveLoss
from .callbacks import EpochCallback
from .chunking import chunked_forward, has_batch_statistics, split_rows
from .clip_training_args import LLM2CLIPTrainingArguments
from .optimizer_groups import build_optimizer_groups


logger = logging.getLogger(__name__)

DEFAULT_MAX_LOGIT_SCALE = 100.0  # CLIP's, for models whose config names none


class LLM2CLIPTrainer(Trainer):
    r"""
    Trains the vision tower, the projections, the text adaptor and the logit scale; the LLM stays frozen.

    Equal, on one device, to AdamW on

        scale = model.logit_scale.exp()
        loss = ContrastiveLoss(loss_type)(outputs.image_embeds, outputs.text_embeds, scale, model.logit_bias)

    with the logit scale clamped to `[1, config.max_logit_scale]` after each step. On several devices the loss is that
    of the batches of all devices together.

    A batch is a dict with `pixel_values`, with `llm_embeds` (stored LLM embeddings) or `input_ids` and
    `attention_mask`, and optionally `index` (row numbers, named in errors). Checkpoints leave the frozen LLM out.

    Args:
        model: [`LLM2CLIPModel`], or any model whose `forward` returns L2-normalised `image_embeds` and `text_embeds`
            and which has a `logit_scale` (in logarithm) and maybe a `logit_bias`, such as `CLIPModel`.
        args ([`LLM2CLIPTrainingArguments`]): The recipe.
        data_collator (*optional*): Makes the batch; `ImageTextCollator(processing_class)` by default.
        train_dataset (*optional*): E.g. `ImageTextDataset`; its `set_epoch` is called at the start of every epoch.
        eval_dataset (*optional*): Rows of one image and one caption; retrieval among all rows is reported.
        processing_class (*optional*): The processor, saved with every checkpoint.
        compute_metrics (*optional*):
            From an `EvalPrediction` whose predictions are `(image_embeds, text_embeds)`; retrieval by default.
        kwargs: Further arguments of `Trainer`.

    Raises:
        ValueError: for a model, arguments or a device setting that cannot be trained as described.

    Example:
    >>> trainer = LLM2CLIPTrainer(model, LLM2CLIPTrainingArguments("out"), train_dataset=dataset)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    # The loss is a mean over the micro-batch: Trainer divides it by the number of accumulated micro-batches.
    loss_is_scaled_for_ga = False
    args: LLM2CLIPTrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: LLM2CLIPTrainingArguments,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, LLM2CLIPTrainingArguments):
            raise ValueError(f"`args` must be LLM2CLIPTrainingArguments, got {type(args).__name__}.")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which would split the batch and its negatives. Start "
                "with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one of them."
            )
        if _has_llm(model):
            model.freeze_text_model()  # type: ignore[operator]
        check_trainable(model, args)
        self.contrastive_loss = ContrastiveLoss(loss_type=resolve_loss_type(model, args.loss_type))
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or ImageTextCollator(processing_class),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics or retrieval_of_pairs,
            **kwargs,
        )
        # Kept from Trainer, which would write the tokenizer's special tokens into the config of the text tower: with
        # another end-of-text id, a reloaded `CLIPModel` pools another position than the trained one.
        self.processor = processing_class
        max_scale = getattr(getattr(model, "config", None), "max_logit_scale", None) or DEFAULT_MAX_LOGIT_SCALE
        self.add_callback(LogitScaleClamp(max_scale))
        if hasattr(train_dataset, "set_epoch"):
            self.add_callback(EpochCallback(train_dataset))

    # ------------------------------------------------------------------------------------------------------- the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """
        The contrastive loss of a batch.

        Args:
            model (`nn.Module`): The model as the Trainer wraps it.
            inputs (`dict`): The batch, see the class.
            return_outputs (`bool`, *optional*, defaults to `False`): Also return the embeddings.
            num_items_in_batch: Not used; the loss is a mean over the batch.

        Returns:
            `torch.Tensor` of shape `()`, or a tuple of it and a dict with `image_embeds` and `text_embeds` of shape
            `(batch, projection_dim)`.

        Raises:
            FloatingPointError: if the loss is NaN or infinite.
            ValueError: if the batch has no `pixel_values`.
        """
        features = {name: value for name, value in inputs.items() if name != "index"}
        image_embeds, text_embeds = self._embed(model, features)
        core = self.accelerator.unwrap_model(model)
        scale, bias = _whole(core.logit_scale).exp(), getattr(core, "logit_bias", None)
        loss = self.contrastive_loss(image_embeds, text_embeds, scale, None if bias is None else _whole(bias))
        if not torch.isfinite(loss):
            self._stop_at_nonfinite_loss(loss, image_embeds, text_embeds, inputs.get("index"))
        return (loss, {"image_embeds": image_embeds, "text_embeds": text_embeds}) if return_outputs else loss

    def _embed(self, model: nn.Module, features: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        if "pixel_values" not in features:
            raise ValueError(f"The batch has no `pixel_values`, only {sorted(features)}. Check the data collator.")
        core = self.accelerator.unwrap_model(model)
        rows, chunk_size = len(features["pixel_values"]), self.args.encoder_chunk_size
        if "input_ids" in features and _has_llm(core):
            features = self._with_llm_embeds(core, features, chunk_size or rows)
        if chunk_size is None or chunk_size >= rows:
            outputs = model(**features)
        else:
            with chunked_forward(core, chunk_size):
                outputs = model(**features)
        return outputs["image_embeds"], outputs["text_embeds"]

    @staticmethod
    def _with_llm_embeds(model: Any, features: dict[str, Any], chunk_size: int) -> dict[str, Any]:
        """Runs the frozen LLM once, outside the graph: in its own dtype, as for stored embeddings."""
        text = {name: value for name, value in features.items() if name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            chunks = [model.get_llm_embeds(**rows) for rows in split_rows(text, chunk_size)]
        return {name: value for name, value in features.items() if name not in text} | {
            "llm_embeds": torch.cat(chunks)
        }

    def _stop_at_nonfinite_loss(
        self, loss: torch.Tensor, image_embeds: torch.Tensor, text_embeds: torch.Tensor, index: torch.Tensor | None
    ) -> None:
        finite = image_embeds.isfinite().all(dim=1) & text_embeds.isfinite().all(dim=1)
        if index is None:
            index = torch.arange(len(finite), device=finite.device)
        culprits = index[~finite].tolist()
        cause = (
            f"The embeddings of rows {culprits} are not finite: check these images and captions."
            if culprits
            else f"All embeddings of its rows {index.tolist()} are finite: the logit scale or bias is not."
        )
        where = f"at step {self.state.global_step + 1}" if torch.is_grad_enabled() else "in evaluation"
        raise FloatingPointError(
            f"The loss is {loss.item()} {where} (epoch {self.state.epoch or 0:.2f}). {cause} The weights are those of "
            f"step {self.state.global_step}; checkpoints are intact."
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # In fp16 an overflow is part of the dynamic loss scaling, which skips the step.
        if not self.args.fp16 and not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"The gradient norm is {float(grad_norm)} at step {self.state.global_step + 1}. The weights are those "
                f"of step {self.state.global_step}; checkpoints are intact. Lower `learning_rate`."
            )
        return grad_norm

    # -------------------------------------------------------------------------------------------- optimizer and data

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """
        The optimizer, with the groups of [`~llm2clip_hf.training.optimizer_groups.build_optimizer_groups`].

        Raises:
            ValueError: for an optimizer of `args.optim` that makes groups of its own.
        """
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            optimizer_class, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, trained
            )
            if {"params", "model", "optimizer_dict"} & set(options):
                raise ValueError(
                    f"`optim={str(self.args.optim)!r}` makes parameter groups of its own. Use an AdamW-like optimizer."
                )
            groups = build_optimizer_groups(
                trained,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                vision_layer_decay=self.args.vision_layer_decay,
            )
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """The loader of the training set; refuses one that yields no batch."""
        loader = super().get_train_dataloader()
        if has_length(loader) and len(loader) == 0:
            raise ValueError(
                f"The training set holds less than one batch of {self.args.train_batch_size} rows per device. Lower "
                "`per_device_train_batch_size`."
            )
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """The loader of the evaluation set, of every row also where training leaves out the last batch."""
        with self._every_row():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> torch.utils.data.DataLoader:
        """The loader for `predict`, of every row."""
        with self._every_row():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _every_row(self) -> Iterator[None]:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    # ------------------------------------------------------------------------------------- evaluation, logs and saving

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Loss, `(image_embeds, text_embeds)` and row numbers of one evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        image_embeds, text_embeds = outputs["image_embeds"].float(), outputs["text_embeds"].float()
        rows = inputs.get("index", torch.arange(len(image_embeds), device=image_embeds.device))
        return loss, (image_embeds, text_embeds), rows

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with the logit scale beside the training loss."""
        if "loss" in logs:
            logs = logs | {"logit_scale": _whole(self.accelerator.unwrap_model(self.model).logit_scale).exp().item()}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with _llm_left_out(self.accelerator.unwrap_model(self.model)):
            super()._save(output_dir, state_dict)
        if self.processor is not None and self.args.should_save:
            self.processor.save_pretrained(output_dir or self.args.output_dir)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        model = self.accelerator.unwrap_model(self.model)
        missing = [key for key in load_result.missing_keys if not (_has_llm(model) and key.startswith("text_model."))]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint does not fit the model: missing {missing[:3]}, unexpected "
                f"{load_result.unexpected_keys[:3]}. Resume with the model and options that the run was started with."
            )


class LogitScaleClamp(TrainerCallback):
    """Keeps the logit scale in `[1, max_logit_scale]` after each optimizer step (CLIP, arXiv 2103.00020, 2.5)."""

    def __init__(self, max_logit_scale: float) -> None:
        self.max_log = math.log(max_logit_scale)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called right after the optimizer's step."""
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, self.max_log)


def retrieval_of_pairs(prediction: EvalPrediction) -> dict[str, float]:
    """Retrieval metrics of paired image and text embeddings, row `i` of one with row `i` of the other."""
    image_embeds, text_embeds = (torch.as_tensor(embeds) for embeds in prediction.predictions)
    return retrieval_metrics(image_embeds, text_embeds, torch.arange(len(text_embeds)))


def resolve_loss_type(model: nn.Module, loss_type: str | None) -> Literal["softmax", "sigmoid"]:
    """
    The loss to train with: the given one, or sigmoid for a model with a logit bias and softmax for one without.

    Raises:
        ValueError: for the sigmoid loss with a model that has no logit bias.
    """
    has_bias = getattr(model, "logit_bias", None) is not None
    if loss_type == "sigmoid" and not has_bias:
        raise ValueError(
            '`loss_type="sigmoid"` needs a logit bias, which the model has not. Build it with '
            "`logit_bias_init_value=-10.0`."
        )
    if loss_type is None:
        return "sigmoid" if has_bias else "softmax"
    return cast(Literal["softmax", "sigmoid"], loss_type)


def check_trainable(model: nn.Module, args: LLM2CLIPTrainingArguments) -> None:
    """
    Checks a model before training.

    Raises:
        ValueError: if there is no logit scale, trained weights are in half precision, or chunks would change the
            statistics of batch norms.
    """
    if not isinstance(getattr(model, "logit_scale", None), nn.Parameter):
        raise ValueError(f"`model` of type {type(model).__name__} has no parameter `logit_scale`.")
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if half:
        raise ValueError(
            f"{len(half)} trained parameters are not float32, first `{half[0]}`; at a learning rate of "
            f"{args.learning_rate:g} their updates would be rounded away. Load the model with `dtype=torch.float32`; "
            "`bf16=True` computes in bfloat16 all the same."
        )
    if args.encoder_chunk_size is None:
        return
    if has_batch_statistics(model):
        raise ValueError(
            "`encoder_chunk_size` cannot be used with trained batch norms, whose statistics are those of the whole "
            "batch. Leave it out, or freeze the batch norms."
        )
    if args.torch_compile:
        raise ValueError("`encoder_chunk_size` and `torch_compile` cannot be used together. Leave out one of them.")


def _has_llm(model: Any) -> bool:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return model_type == "llm2clip" and model.text_model is not None


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """The whole tensor of a parameter that FSDP2 shards."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter  # type: ignore[operator]


@contextmanager
def _llm_left_out(model: Any) -> Iterator[None]:
    """Makes `save_pretrained` name the frozen LLM instead of writing it."""
    if not _has_llm(model):
        yield
        return
    config = model.config
    text_weights, config.text_weights = config.text_weights, "external" if config.text_base_model else "none"
    try:
        yield
    finally:
        config.text_weights = text_weights
