# SPDX-License-Identifier: Apache-2.0
"""Pushing of trained models: what loads elsewhere and a card that says how it was made, and no pickles."""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.trainer_utils import has_length

from ...data import ImageTextCollator
from ...hub.cards import LLM2CLIPModelCardData
from ...losses import ContrastiveLoss
from ...modeling.configuration_llm2clip import is_repository, pin_text_model
from ...modeling.loading_llm2clip import hub_errors
from ..base_trainer import (
    BaseTrainer,
    EpochCallback,
    check_data_parallel,
    describe_divergence,
    largest_weight,
    refuse_arguments,
)
from ..gradcache import CLIP_TEXT_NAMES, chunked_forward, split_rows
from ..streams import shards_itself
from . import clip_text
from .arguments import LLM2CLIPTrainingArguments
from .checkpoints import (
    ClipCheckpointTrainer,
    ready_for_fsdp2,
    register_feature_methods,
    saved_text_weights,
    whole_parameter,
)
from .checks import ROW_NAMES, check_batch, check_stores, prepare_training, resolve_loss_type
from .evaluation import held_back_announcement, retrieval_of_pairs, run_evaluators
from .loading import ClipLoadingTrainer
from .parameters import LogitScaleClamp, build_optimizer_groups, frozen_towers, has_llm


class PublishingClipTrainer(BaseTrainer):
    """Pushing for stage 2: the LLM is named with its commit, and the card says how the model was trained."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository, before training starts, if what will be pushed can be loaded by others."""
        core: Any = self.accelerator.unwrap_model(self.model)
        if getattr(getattr(core, "config", None), "model_type", "") == "llm2clip":
            token = token if token is not None else self.args.hub_token
            with hub_errors(str(self.args.hub_model_id or self.args.output_dir), token):
                pin_text_model(core.config, core.text_model, self._saved_text_weights(core), token)
        super().init_hf_repo(token, private)

    @staticmethod
    def _saved_text_weights(core: Any) -> str:
        """Where the LLM will be: with the model if it was trained, else in its own repository."""
        if not has_llm(core):
            return str(core.config.text_weights)
        return saved_text_weights(core)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Writes the card of the model, and its facts, into `args.output_dir`.

        A card there that somebody wrote or edited keeps its text; missing metadata are added.
        """
        core: Any = self.accelerator.unwrap_model(self.model)
        if getattr(getattr(core, "config", None), "model_type", "") != "llm2clip":
            super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
            return
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        # As it was saved: it says where the LLM is.
        config = type(core.config).from_pretrained(folder)
        start = [finetuned_from, config.text_base_model] if finetuned_from else []
        fields: dict[str, Any] = {
            "name": model_name or self.hub_model_id or folder.absolute().name,
            "license": license,
            "language": language,
            "tags": [tags] if isinstance(tags, str) else tags,
            "base_model": [name for name in start if is_repository(name)],
            "datasets": dataset_tags,
        }
        named = [dataset] if isinstance(dataset, str) else dataset
        if named:
            fields["training_data"] = named
        LLM2CLIPModelCardData.from_trainer(self, config, **fields).save(folder)


logger = logging.getLogger(__name__)
DEFAULT_MAX_LOGIT_SCALE = 100.0  # CLIP's, for models whose config names none
MICRO_BATCHES = "micro_batches"  # entry of an input that holds all batches of one optimizer step
Evaluator = Callable[[Any, Any], Mapping[str, float]]


class LLM2CLIPTrainer(PublishingClipTrainer, ClipLoadingTrainer, ClipCheckpointTrainer):
    r"""
    Trains the vision tower, the projections, the text adaptor and the logit scale; the LLM stays frozen. What else can
    be trained, and what left out, is said by `train_vision` and `train_text` of the arguments.

    Equal, on one device, to AdamW on

        scale = model.logit_scale.exp()
        loss = ContrastiveLoss(loss_type)(outputs.image_embeds, outputs.text_embeds, scale, model.logit_bias)

    with the logit scale clamped to `[1, config.max_logit_scale]` after each step. On several devices, and under
    gradient accumulation, the loss is that of the batches of all devices and micro-batches together.

    A batch is a dict with `pixel_values`, with `llm_embeds` (stored LLM embeddings) or `input_ids` and
    `attention_mask`, and optionally `index` or `key` (numbers or names of the rows, used in errors). Checkpoints leave
    the frozen LLM out, hold LoRA merged, and appear whole or not at all. After LoRA training `save_model` writes the
    merged model; `merge_lora(model)` merges the one in memory.

    Args:
        model: [`LLM2CLIPModel`], or any model whose `forward` returns L2-normalised `image_embeds` and `text_embeds`
            and which has a `logit_scale` (in logarithm) and maybe a `logit_bias`, such as `CLIPModel`.
        args ([`LLM2CLIPTrainingArguments`]): The recipe.
        data_collator (*optional*): Makes the batch; `ImageTextCollator(processing_class)` by default.
        train_dataset (*optional*):
            E.g. `ImageTextDataset`; its `set_epoch` is called at the start of every epoch. Or an `IterableDataset`,
            with an attribute `shards_itself = True` if it gives each process and worker rows of its own, such as
            `ImageTextStream`.
        eval_dataset (*optional*): Rows of one image and one caption; retrieval among all rows is reported.
        processing_class (*optional*): The processor, saved with every checkpoint.
        compute_metrics (*optional*):
            From an `EvalPrediction` whose predictions are `(image_embeds, text_embeds)`, followed by those of CLIP's
            text encoder and of the concatenated head where there are such; retrieval by default.
        evaluators (mapping from `str` to callable, *optional*):
            Further evaluations, each called as `evaluator(model, processing_class)` with the model in evaluation mode
            and without gradients, on all processes at once, so that it may share its work among them, as
            `evaluate_retrieval` does. The numbers that `evaluators["flickr"]` returns, on the main process, are logged
            as `eval_flickr_<name>`, and can be `metric_for_best_model`.
        clip_text_model (`CLIPTextModelWithProjection`, *optional*):
            CLIP's own text encoder, for `integration` other than `"replace"`. It is trained, and saved beside the
            model as `clip_text_model/`, together with the head of `integration="concatenated"`.
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
        evaluators: Mapping[str, Evaluator] | None = None,
        clip_text_model: Any = None,
        **kwargs: Any,
    ) -> None:
        refuse_arguments(kwargs)
        if not isinstance(model, nn.Module):
            raise ValueError(f"`model` must be the model to train, got {type(model).__name__}. Build it and pass it.")
        if not isinstance(args, LLM2CLIPTrainingArguments):
            raise ValueError(f"`args` must be LLM2CLIPTrainingArguments, got {type(args).__name__}.")
        prepare_training(model, args, clip_text_model, compute_metrics)
        for dataset in (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])):
            check_stores(model, dataset, processing_class)
        loss_type = resolve_loss_type(model, args.loss_type)
        self.contrastive_loss = ContrastiveLoss(loss_type, label_smoothing=args.label_smoothing_factor)
        if self.contrastive_loss.loss_type == "softmax" and getattr(model, "logit_bias", None) is not None:
            cast(nn.Parameter, model.logit_bias).requires_grad_(False)  # has no part in the softmax loss
        self.evaluators = dict(evaluators or {})
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or ImageTextCollator(processing_class),
            train_dataset=train_dataset,
            # An empty dictionary is an evaluation of no data set, for runs that have evaluators only.
            eval_dataset={} if eval_dataset is None and self.evaluators else eval_dataset,
            compute_metrics=compute_metrics or retrieval_of_pairs,
            **kwargs,
        )
        check_data_parallel(self)
        # Kept from Trainer, which would write the tokenizer's special tokens into the config of the text tower: with
        # another end-of-text id, a reloaded `CLIPModel` pools another position than the trained one.
        self.processor = processing_class
        self._held_batches: list[dict[str, Any]] = []
        max_scale = getattr(getattr(model, "config", None), "max_logit_scale", None) or DEFAULT_MAX_LOGIT_SCALE
        self.add_callback(LogitScaleClamp(max_scale, deepspeed=self.is_deepspeed_enabled))
        if hasattr(train_dataset, "set_epoch") and (has_length(train_dataset) or not shards_itself(train_dataset)):
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
            FloatingPointError: if the loss is NaN or infinite; says whether weights or which rows are why.
            ValueError: if the batch has no `pixel_values`, entries that nothing takes, or, in training, one row.
        """
        batches = inputs.get(MICRO_BATCHES, [inputs])
        embeds = self._embed(model, batches)
        if torch.is_grad_enabled() and self._is_one_row(embeds):
            raise ValueError(
                "The contrastive batch is one row, which has no negatives. Set `dataloader_drop_last=True`, the "
                "default."
            )
        core = self.accelerator.unwrap_model(model)
        scale = whole_parameter(core.logit_scale).exp()
        bias = whole_parameter(core.logit_bias) if self.contrastive_loss.loss_type == "sigmoid" else None
        pairs = clip_text.loss_pairs(embeds, self.args.integration)
        loss = torch.stack([self.contrastive_loss(one, other, scale, bias) for one, other in pairs]).sum()
        if not torch.isfinite(loss):
            self._stop_at_nonfinite_loss(loss, embeds, batches)
        return (loss, embeds) if return_outputs else loss

    def _embed(self, model: nn.Module, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        core = self.accelerator.unwrap_model(model)
        for batch in batches:
            check_batch(core, batch, self.args)
        for tower in frozen_towers(core):
            tower.eval()  # after `model.train()`, which is called for every step
        chunks = []
        for batch in batches:
            features = {name: value for name, value in batch.items() if name not in ROW_NAMES}
            rows = len(features["pixel_values"])
            size = min(self.args.encoder_chunk_size or rows, rows)
            if "input_ids" in features and has_llm(core) and self.args.train_text != "lora":
                features = self._with_llm_embeds(core, features, size)
            chunks.extend(split_rows(features, size))
        if len(chunks) == 1 and self.args.torch_compile and not hasattr(core, clip_text.NAME):
            outputs = model(**chunks[0])  # the forward pass that was compiled
            return {name: outputs[name] for name in ("image_embeds", "text_embeds")}
        embed_clip_text = None
        if CLIP_TEXT_NAMES[0] in chunks[0]:

            def embed_clip_text(*inputs: Any) -> dict[str, torch.Tensor]:
                # Only the model's own `forward` was given autocast.
                with self.accelerator.autocast():
                    return clip_text.embed_clip_text(core, *inputs)

        with chunked_forward(core, embed_clip_text):
            outputs = model(chunks=chunks)
        return {name: value for name, value in outputs.items() if name.endswith("_embeds")}

    def _is_one_row(self, embeds: dict[str, torch.Tensor]) -> bool:
        return len(embeds["image_embeds"]) * self.args.world_size == 1

    @staticmethod
    def _with_llm_embeds(model: Any, features: dict[str, Any], chunk_size: int) -> dict[str, Any]:
        """Runs the frozen LLM once, outside the graph: in its own dtype, as for stored embeddings."""
        names = ("input_ids", "attention_mask", "position_ids")
        text = {name: value for name, value in features.items() if name in names}
        with torch.no_grad():
            chunks = [model.get_llm_embeds(**rows) for rows in split_rows(text, chunk_size)]
        return {name: value for name, value in features.items() if name not in text} | {
            "llm_embeds": torch.cat(chunks)
        }

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of the next optimizer step."""
        self._held_batches = []
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples and shards_itself(self.train_dataset):
            raise ValueError(
                f"The training stream gave process {self.args.process_index} no rows. It needs at least one shard per "
                "process and worker."
            )
        return samples, count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """
        Forward and backward pass of a micro-batch, or of all micro-batches of the step together when the last one
        arrives (`accumulate_negatives`).

        Returns:
            `torch.Tensor` of shape `()`: the loss, detached; 0 for micro-batches that wait for the last one.
        """
        if self.args.gradient_accumulation_steps == 1 or not self.args.accumulate_negatives:
            return super().training_step(model, inputs, num_items_in_batch)
        self._held_batches.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._held_batches = self._held_batches, []
        self.current_gradient_accumulation_steps = 1  # one loss, not a mean of several
        return super().training_step(model, {MICRO_BATCHES: batches}, num_items_in_batch)

    def _stop_at_nonfinite_loss(
        self, loss: torch.Tensor, embeds: dict[str, torch.Tensor], batches: list[dict[str, Any]]
    ) -> None:
        core = self.accelerator.unwrap_model(self.model)
        cause = describe_divergence(core) or self._describe_rows(core, embeds, batches)
        where = f"at step {self.state.global_step + 1}" if torch.is_grad_enabled() else "in evaluation"
        raise FloatingPointError(
            f"The loss is {loss.item()} {where} (epoch {self.state.epoch or 0:.2f}). {cause} The weights are those of "
            f"step {self.state.global_step}."
        )

    def _describe_rows(self, core: nn.Module, embeds: dict[str, torch.Tensor], batches: list[dict[str, Any]]) -> str:
        """Why the loss is not finite although all weights are: rows are named where their own features are why."""
        names = row_names(batches)
        broken = [name for name, is_finite in zip(names, finite_inputs(batches)) if not is_finite]
        if broken:
            return f"The images or stored embeddings of rows {broken} are not finite: repair or remove them."
        finite = torch.stack([value.isfinite().all(dim=1) for value in embeds.values()]).all(dim=0).tolist()
        broken = [name for name, is_finite in zip(names, finite) if not is_finite]
        if not broken:
            elsewhere = (
                "another process says more" if self.args.world_size > 1 else "the logit scale or bias overflows"
            )
            return f"All embeddings of its rows {names} are finite: {elsewhere}."
        if len(broken) < len(names):
            return (
                f"The embeddings of rows {broken} are not finite, though what they were made of is: look at these "
                "images and captions, or compute in a type of wider range than float16."
            )
        return (
            "No embedding is finite, though inputs and weights are: the weights have grown too large, up to "
            f"{largest_weight(core)}, so the run has diverged. Lower `learning_rate`."
        )

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

    # --------------------------------------------------------------------------------------------- evaluation and logs

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Retrieval on the evaluation set, and the evaluators where the trainer's own evaluation set is used. Callbacks
        hear of it once, with all metrics.

        Args:
            eval_dataset (*optional*): Another data set than the trainer's; the evaluators are left out then.
            ignore_keys (`list[str]`, *optional*): Not used.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): Prefix of the names of the metrics.

        Returns:
            `dict[str, float]`: The metrics.

        Raises:
            ValueError: for a stream that shards itself, or an evaluator that returns something else than numbers.
        """
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if shards_itself(chosen):
            raise ValueError("A stream that shards itself cannot be evaluated on. Use a map-style data set.")
        with held_back_announcement(self.callback_handler) as announce:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            if eval_dataset is None and self.evaluators:
                found = {
                    f"{metric_key_prefix}_{evaluator}_{name}": value
                    for evaluator, numbers in run_evaluators(self, self.evaluators).items()
                    for name, value in numbers.items()
                }
                self.log(dict(found))
                metrics = {**metrics, **found}
        # Once, with all metrics: early stopping counts these calls, and looks for the metric of an evaluator too.
        self.control = announce(self.args, self.state, self.control, metrics)
        return metrics

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Loss, `(image_embeds, text_embeds)` and row numbers of one evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, embeds = self.compute_loss(model, inputs, return_outputs=True)
        if self._is_one_row(embeds) and self.contrastive_loss.loss_type == "softmax":
            loss = None  # no negatives: 0, whatever the model, would lower the mean
        if prediction_loss_only:
            return loss, None, None
        rows = inputs.get("index", torch.arange(len(embeds["image_embeds"]), device=self.args.device))
        return loss, tuple(value.float() for value in embeds.values()), rows

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with the logit scale beside the training loss."""
        if "loss" in logs:
            logs = logs | {
                "logit_scale": whole_parameter(self.accelerator.unwrap_model(self.model).logit_scale).exp().item()
            }
        super().log(logs, start_time)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        with ready_for_fsdp2(self.model):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        register_feature_methods(self.model)
        return prepared


def finite_inputs(batches: list[dict[str, Any]]) -> list[bool]:
    """Whether the numbers that each row of some batches begins with, pixels or stored embeddings, are finite."""
    rows: list[bool] = []
    for batch in batches:
        numbers = [v for v in batch.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
        rows += torch.stack([value.isfinite().flatten(1).all(dim=1) for value in numbers]).all(dim=0).tolist()
    return rows


def row_names(batches: list[dict[str, Any]]) -> list[Any]:
    """Names of the rows of some batches: their `key` or `index`, else their position."""
    names: list[Any] = []
    for batch in batches:
        given: Any = next((batch[name] for name in ROW_NAMES if name in batch), None)
        if given is None:
            given = range(len(names), len(names) + len(batch["pixel_values"]))
        names.extend(given.tolist() if isinstance(given, torch.Tensor) else list(given))
    return names
