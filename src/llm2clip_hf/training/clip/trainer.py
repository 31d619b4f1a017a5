# SPDX-License-Identifier: Apache-2.0
"""The trainer of stage 2: contrastive learning of images against texts that an LLM embeds."""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import get_last_checkpoint, has_length

from ...data import ImageTextCollator
from ...files import write_json_atomically
from ...losses import ContrastiveLoss
from ...modeling.saving_llm2clip import hub_errors, pin_text_model
from ..base_trainer import BaseTrainer, EpochCallback, TrainBeginCallback
from ..run_checks import check_data_parallel, describe_divergence, refuse_arguments
from ..streams import resume_stream, shards_itself, stream_loader, stream_state
from . import clip_text
from .arguments import LLM2CLIPTrainingArguments
from .checkpoints import (
    load_checkpoint,
    register_feature_methods,
    save_card,
    save_model,
    saved_text_weights,
    whole_parameter,
)
from .checks import (
    NO_FEATURES,
    check_batch,
    check_contrastive_batch,
    check_stores,
    describe_rows,
    prepare_training,
    resolve_loss_type,
)
from .encoding import embed_batches
from .evaluation import evaluate_pairs, retrieval_of_pairs, run_evaluators
from .loading import STREAM_FILE, CountedLoader, check_batches, count_masked, every_row, known_of_pairs
from .parameters import LogitScaleClamp, build_optimizer_groups, frozen_towers, is_llm2clip


DEFAULT_MAX_LOGIT_SCALE = 100.0  # CLIP's, for models whose config names none
Evaluator = Callable[[Any, Any], Mapping[str, float]]


class LLM2CLIPTrainer(BaseTrainer):
    r"""
    Trains the vision tower, the projections, the text adaptor and the logit scale; the LLM stays frozen. What else can
    be trained, and what left out, is said by `train_vision` and `train_text` of the arguments.

    Equal, on one device, to AdamW on

        scale = model.logit_scale.exp()
        loss = ContrastiveLoss(loss_type)(outputs.image_embeds, outputs.text_embeds, scale, model.logit_bias)

    with the logit scale clamped to `[1, config.max_logit_scale]` after each step. On several devices, and under
    gradient accumulation, the loss is that of the batches of all devices and micro-batches together.

    A batch is a dict with `pixel_values`, with `llm_embeds` (stored LLM embeddings) or `input_ids` and
    `attention_mask`, and optionally `index` or `key` (numbers or names of the rows, used in errors), `image_id` and
    `text_id` (whole numbers, equal for equal images and captions, for `mask_false_negatives`), and `weight` (positive;
    the loss is the weighted mean of those of the pairs). All processes give the same entries. Checkpoints leave
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
        compute: Any = args.loss_compute_dtype
        self.contrastive_loss = ContrastiveLoss(
            loss_type,
            label_smoothing=args.label_smoothing_factor,
            ring=args.loss_exchange == "ring",
            compute_dtype=compute if compute == "auto" else getattr(torch, compute),
        )
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
        self._masked: torch.Tensor | None = None  # false negatives since the last log
        self.add_callback(TrainBeginCallback(self._begin_training))
        max_scale = getattr(getattr(model, "config", None), "max_logit_scale", None) or DEFAULT_MAX_LOGIT_SCALE
        self.add_callback(LogitScaleClamp(max_scale, deepspeed=self.is_deepspeed_enabled))
        if hasattr(train_dataset, "set_epoch") and (has_length(train_dataset) or not shards_itself(train_dataset)):
            self.add_callback(EpochCallback(train_dataset))

    # ------------------------------------------------------------------------------------------------------- the loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
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
        batches = [*self._held_batches, inputs] if torch.is_grad_enabled() else [inputs]
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
        known = known_of_pairs(batches, bool(self.args.mask_false_negatives))
        if sizes := self._known_sizes(embeds):
            known["sizes"] = sizes
        loss = torch.stack([self.contrastive_loss(one, other, scale, bias, **known) for one, other in pairs]).sum()
        if torch.is_grad_enabled() and "mask_ids" in known:
            masked = count_masked(known["mask_ids"][0], sizes)
            self._masked = masked if self._masked is None else self._masked + masked
        explain = partial(self._explain, {name: value.detach() for name, value in embeds.items()}, batches)
        if self._in_step:
            self._unchecked += ((loss.detach(), explain),)
        elif not torch.isfinite(loss):
            where = self.step_name() if torch.is_grad_enabled() else "in evaluation"
            raise FloatingPointError(f"The loss is {loss.item()} {where}. {explain()}")
        return (loss, embeds) if return_outputs else loss

    def _embed(self, model: nn.Module, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        core = self.accelerator.unwrap_model(model)
        for batch in batches:
            check_batch(core, batch, self.args)
        for tower in frozen_towers(core):
            tower.eval()  # after `model.train()`, which is called for every step
        features = [{name: value for name, value in batch.items() if name not in NO_FEATURES} for batch in batches]
        return embed_batches(model, core, features, self.args, self.accelerator.autocast)

    def _known_sizes(self, embeds: dict[str, torch.Tensor]) -> list[int] | None:
        """
        The rows of all processes, where batches are surely whole and nothing leaves rows out. Otherwise the loss asks,
        for which the host waits.
        """
        collator = getattr(self.data_collator, "collator", self.data_collator)
        whole = torch.is_grad_enabled() and self.args.dataloader_drop_last and type(collator) is ImageTextCollator
        return [len(embeds["image_embeds"])] * self.args.world_size if whole and self.args.world_size > 1 else None

    def _is_one_row(self, embeds: dict[str, torch.Tensor]) -> bool:
        return len(embeds["image_embeds"]) * self.args.world_size == 1

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
        if not self.accelerator.sync_gradients:
            self._held_batches.append(self._prepare_inputs(inputs))
            return torch.zeros((), device=self.args.device)
        self.current_gradient_accumulation_steps = 1  # one loss, not a mean of several
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._held_batches = []

    def _explain(self, embeds: dict[str, torch.Tensor], batches: list[dict[str, Any]]) -> str:
        """Why the loss of some batches is not finite."""
        core = self.accelerator.unwrap_model(self.model)
        cause = describe_divergence(core) or describe_rows(core, embeds, batches, self.args.world_size)
        return f"{cause} The weights are those of step {self.state.global_step}."

    # -------------------------------------------------------------------------------------------- optimizer and data

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """
        The optimizer, with the groups of [`~llm2clip_hf.training.clip.parameters.build_optimizer_groups`].

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
        check_contrastive_batch(self.args, self._train_batch_size)
        if shards_itself(self.train_dataset):
            loader = stream_loader(self.train_dataset, self.data_collator, self.args, self._train_batch_size)
        else:
            loader = super().get_train_dataloader()
        check_batches(loader, self.train_dataset, self.args, self._train_batch_size)
        return loader

    def set_initial_training_values(self, args: Any, dataloader: Any, *others: Any) -> Any:
        """Numbers of steps; where the last, smaller batch is left out, so is the last, smaller group of batches."""
        if has_length(dataloader) and args.dataloader_drop_last and args.accumulate_negatives:
            whole = len(dataloader) // args.gradient_accumulation_steps * args.gradient_accumulation_steps
            dataloader = CountedLoader(dataloader, whole or len(dataloader))
        values = super().set_initial_training_values(args, dataloader, *others)
        self._steps_per_epoch = values[1]
        return values

    def save_position(self, folder: Path) -> None:
        """See `BaseTrainer`."""
        if self.args.should_save and shards_itself(self.train_dataset):
            state = stream_state(self.train_dataset, self.args, self._train_batch_size)
            write_json_atomically(folder / STREAM_FILE, state)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as `Trainer` does; a resumed stream goes on where the checkpoint was written."""
        given = resume_from_checkpoint
        self._resumed_from = get_last_checkpoint(str(self.args.output_dir)) if given is True else given or None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _begin_training(self) -> None:
        """What has to wait until the model is wrapped and the step to begin at is known."""
        if self.is_fsdp_enabled:
            register_feature_methods(self.model)
        if self._resumed_from is None or not shards_itself(self.train_dataset) or self.args.ignore_data_skip:
            return
        file = Path(self._resumed_from) / STREAM_FILE
        saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        state = stream_state(self.train_dataset, self.args, self._train_batch_size)
        epoch, steps = divmod(self.state.global_step, self._steps_per_epoch)
        resume_stream(self.train_dataset, saved, state, (epoch, steps * self.args.gradient_accumulation_steps))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """The loader of the evaluation set, of every row also where training leaves out the last batch."""
        with every_row(self.args):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> torch.utils.data.DataLoader:
        """The loader for `predict`, of every row."""
        with every_row(self.args):
            return super().get_test_dataloader(test_dataset)

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
        named = chosen if isinstance(chosen, dict) else {"": chosen}
        if any(shards_itself(dataset) for dataset in named.values()):
            raise ValueError("A stream that shards itself cannot be evaluated on. Use a map-style data set.")
        metrics: dict[str, float] = {}
        for name, dataset in named.items():
            # A name, so that a loader with persistent workers is found again.
            given = dataset if eval_dataset is not None else name or None
            metrics |= evaluate_pairs(self, given, f"{metric_key_prefix}_{name}" if name else metric_key_prefix)
        if eval_dataset is None and self.evaluators:
            found = {
                f"{metric_key_prefix}_{evaluator}_{name}": value
                for evaluator, numbers in run_evaluators(self, self.evaluators).items()
                for name, value in numbers.items()
            }
            self.log(dict(found))
            metrics |= found
        # Once, with all metrics: early stopping counts these calls, and looks for the metric of an evaluator too.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
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
        """Logs, with the logit scale and the number of false negatives left out beside the training loss."""
        if "loss" in logs:
            core: Any = self.accelerator.unwrap_model(self.model)
            logs = logs | {"logit_scale": whole_parameter(core.logit_scale).exp().item()}
            if self._masked is not None:
                logs, self._masked = logs | {"false_negatives_masked": self._masked.item()}, None
        super().log(logs, start_time)

    # ---------------------------------------------------------------------------------------------- saving and pushing

    def write_model(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """See `BaseTrainer`."""
        core = self.accelerator.unwrap_model(self.model)
        if isinstance(core, PreTrainedModel):
            save_model(core, folder, state_dict)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
        else:
            super().write_model(folder, state_dict)
        processor = self.processor or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(folder)

    def read_model(self, checkpoint: str) -> None:
        """See `BaseTrainer`."""
        load_checkpoint(self.accelerator.unwrap_model(self.model), Path(checkpoint))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository, before training starts, if what will be pushed can be loaded by others."""
        core: Any = self.accelerator.unwrap_model(self.model)
        if is_llm2clip(core):
            token = token if token is not None else self.args.hub_token
            with hub_errors(str(self.args.hub_model_id or self.args.output_dir), token):
                pin_text_model(core.config, core.text_model, saved_text_weights(core), token)
        super().init_hf_repo(token, private)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """
        Writes the card of the model, and its facts, into `args.output_dir`; arguments as of `Trainer`.

        A card there that somebody wrote or edited keeps its text; missing metadata are added.
        """
        core: Any = self.accelerator.unwrap_model(self.model)
        if not is_llm2clip(core):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            given = inspect.signature(Trainer.create_model_card).bind(self, *args, **kwargs).arguments
            save_card(self, core.config, given)
