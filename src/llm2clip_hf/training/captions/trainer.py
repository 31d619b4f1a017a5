# SPDX-License-Identifier: Apache-2.0
"""The trainer of stage 1: captions of one image come close, captions of other images do not."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import prepare_data_loader
from sentence_transformers import SentenceTransformerTrainer
from torch import nn

from ...hub.card_facts import run_options
from ..base_trainer import BaseTrainer, EpochCallback
from ..run_checks import (
    UNUSED_ARGUMENTS,
    check_float32_weights,
    check_one_device,
    check_whole_weights,
    describe_divergence,
    refuse_arguments,
)
from ..streams import loader_options
from .arguments import CaptionContrastiveTrainingArguments
from .encoder import CaptionEncoder
from .loss import CaptionContrastiveLoss
from .sources import (
    INSTRUCTION,
    LABEL,
    CaptionCollator,
    EvaluationBatchSampler,
    SingleSourceBatchSampler,
    StreamRows,
    evaluation_set,
    is_map_style,
    open_training_set,
)


logger = logging.getLogger(__name__)
# Options of the base classes that say how batches are drawn, with what this trainer does.
_BATCH_OPTIONS = {
    "batch_sampler": "batch_sampler",
    "multi_dataset_batch_sampler": "proportional",
    "train_sampling_strategy": "random",
}
_NO_METRICS = "The evaluation gives the loss. Give an `evaluator` for metrics"
_UNUSED_ARGUMENTS = {**UNUSED_ARGUMENTS, "compute_metrics": _NO_METRICS, "preprocess_logits_for_metrics": _NO_METRICS}


class CaptionContrastiveTrainer(BaseTrainer, SentenceTransformerTrainer):
    r"""
    Trains a caption encoder so that captions of the same image are close and captions of other images are not.

    The loss is [`CaptionContrastiveLoss`]: each anchor picks its positive among the
    positives and hard negatives of all devices, with captions that are known to be right as well left out.

    The training set is one of

    - a map-style source: `__len__`, `__getitem__(row)` and maybe `set_epoch(epoch)`, such as
      `data.CaptionPairDataset`, which draws two captions of each image anew in every epoch, or a `datasets.Dataset`;
    - a mapping from names to such sources: every batch, over all devices, then comes from one of them (released
      stage-1 code; paper section 4.1 mixes captions and text pairs);
    - a stream (anything else that is iterable, such as `datasets.IterableDataset`): read again and again until
      `max_steps`; every process reads all of it and tokenises its own rows.

    Rows are dicts of texts `anchor`, `positive`, optionally `negative` (or `negative_1`, `negative_2`, ...), and
    optionally a whole number `label`, equal for rows of the same image. A source's attribute `instruction` is put
    before its anchors; it is read and not pooled. The order of rows and batches depends on `seed` and epoch only, so
    a run that was killed goes on where it was.

    Checkpoints hold the adapters (under `adapter/`) and the state of the run, and appear whole or not at all;
    `save_model(path)` writes the finished encoder with LoRA merged, see [`CaptionEncoder`].

    Args:
        model ([`CaptionEncoder`]): From [`build_caption_encoder`].
        args ([`CaptionContrastiveTrainingArguments`]): The recipe.
        train_dataset: See above.
        eval_dataset: A map-style source or a mapping of them, for the loss; read once, as of epoch 0. All rows count,
            in batches of about equal size.
        evaluator: A `SentenceEvaluator` or a list of them, e.g. `evaluation.CaptionRetrievalEvaluator`.
        kwargs: Further arguments of `SentenceTransformerTrainer`.

    Raises:
        ValueError: if the model is not a `CaptionEncoder`; if a data set has missing or unknown columns, or less than
            one batch; if a stream comes without `max_steps`; if weights to train are in half precision, or FSDP
            spreads them; if an option of sentence-transformers is set that has no effect here.
        FloatingPointError: in training and evaluation, if the loss is not finite; names the step and the rows.
    """

    training_args_class = CaptionContrastiveTrainingArguments
    data_collator_class = CaptionCollator
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
        refuse_arguments(kwargs, _UNUSED_ARGUMENTS)
        given = kwargs.get("processing_class")
        if given is not None and given is not model.tokenizer:
            raise ValueError(
                "`processing_class` has no effect: the encoder has a tokenizer of its own. Leave it out, or build the "
                "encoder from a folder with that tokenizer."
            )
        self._rows, self._stream = open_training_set(train_dataset)
        self._sampler: SingleSourceBatchSampler | None = None
        self._evaluation_loaders: dict[str, torch.utils.data.DataLoader] = {}
        super().__init__(model=model, args=args, eval_dataset=evaluation_set(eval_dataset), **kwargs)
        self.train_dataset = self._rows if self._stream is None else self._stream
        check_one_device(self.args)
        check_whole_weights(self)
        sources = [self._stream] if self._rows is None else self._rows.sources
        _check_instructions(self.args, sources, self.data_collator)
        if train_dataset is not None:
            _check_batches(self.args, is_stream=self._stream is not None)
            remedy = "Build the encoder with `dtype=torch.float32`, or train LoRA"
            check_float32_weights(model, self.args.learning_rate, remedy)
        if isinstance(self.data_collator, CaptionCollator) and isinstance(self.loss, CaptionContrastiveLoss):
            self.data_collator.with_text_ids = self.loss.mask_false_negatives
        if self._rows is not None:
            self.add_callback(EpochCallback(self))
            sets: list[Any] = [{"name": n, "size": size} for n, size in zip(self._rows.names, self._rows.sizes)]
            model.model_card_data.train_datasets = sets

    def get_default_loss(self, model: Any) -> nn.Module:
        """In-batch InfoNCE over all devices, see [`CaptionContrastiveLoss`]."""
        return CaptionContrastiveLoss(
            model,
            scale=self.args.scale,
            symmetric=self.args.symmetric,
            mask_false_negatives=self.args.mask_false_negatives,
            mini_batch_size=self.args.mini_batch_size,
            mini_batch_tokens=self.args.mini_batch_tokens,
        )

    # ----------------------------------------------------------------------------------------------------- the data

    def set_epoch(self, epoch: int) -> None:
        """Makes sources draw anew and shuffles batches; called at the start of each epoch, with its number from 0."""
        if self._rows is not None:
            self._rows.set_epoch(epoch)
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """The loader of the training set; refuses one that yields no batch."""
        options = loader_options(self.args, self.data_collator)
        # Not that of the arguments, which `auto_find_batch_size` leaves as it is.
        processes, size = self.accelerator.num_processes, self._train_batch_size
        if self._stream is not None:
            # It shares out its rows itself: accelerate would let one process read and tokenise for all of them.
            rows = StreamRows(self._stream, size, processes, self.accelerator.process_index)
            return torch.utils.data.DataLoader(rows, batch_size=size, **options)
        if self._rows is None:
            raise ValueError("Training needs a `train_dataset`.")
        self._sampler = SingleSourceBatchSampler(
            self._rows.sizes,
            size,
            # With `split_batches`, accelerate takes one batch per step apart, instead of giving one to each process.
            1 if self.accelerator.split_batches else processes,
            seed=_data_seed(self.args),
            drop_last=self.args.dataloader_drop_last,
        )
        self._sampler.check_sources(self._rows.names)
        self.accelerator.even_batches = False
        loader = torch.utils.data.DataLoader(self._rows, batch_sampler=self._sampler, **options)
        self._train_dataloader = self.accelerator.prepare(loader)
        return self._train_dataloader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """The loader of an evaluation set (or the name of one), all of whose rows are shared out to the processes."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = cast(Any, self.eval_dataset)[dataset]
        if dataset is None or isinstance(dataset, Mapping) or not is_map_style(dataset):
            return super().get_eval_dataloader(eval_dataset)
        name = eval_dataset if isinstance(eval_dataset, str) else ""
        if (eval_dataset is None or name) and name in self._evaluation_loaders:
            return self._evaluation_loaders[name]
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        sampler = EvaluationBatchSampler(
            len(dataset), self.args.eval_batch_size, processes, process, _data_seed(self.args)
        )
        options = loader_options(self.args, self.data_collator)
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, **options)
        # Told that it is alone: the sampler has dealt with the other processes, without repeating or leaving out rows.
        loader = prepare_data_loader(loader, num_processes=1, process_index=0)
        if self.args.dataloader_persistent_workers and (eval_dataset is None or name):
            self._evaluation_loaders[name] = loader
        return loader

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss of `eval_dataset` (a set or the name of one) and the metrics of the evaluators, by name."""
        if not isinstance(eval_dataset, str):
            eval_dataset = evaluation_set(eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    # -------------------------------------------------------------------------------------------------------- training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as `SentenceTransformerTrainer` does, and notes the options of the run for the encoder's card."""
        output = super().train(*args, **kwargs)
        self._encoder().training_options = run_options(self.args, self.state.global_step)
        return output

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

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch; an error about a loss that is not finite names the step."""
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        except FloatingPointError as error:
            where = f"Step {self.state.global_step + 1}" if model.training else "Evaluation"
            raise FloatingPointError(f"{where}: {error} {self.nonfinite_advice()}") from error

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
        """The features of each column of a batch, and its labels; entries that belong to no column are refused."""
        features, labels = super().collect_features(inputs)
        used = {id(value) for column in features for value in column.values()}
        extra = [name for name in inputs if name not in (LABEL, "return_loss") and id(inputs[name]) not in used]
        if extra:
            raise ValueError(
                f"The batch has {extra}, which belong to no column of tokens (`<column>_input_ids`). Leave them out "
                "in the data collator."
            )
        return features, labels

    def nonfinite_advice(self) -> str:
        """See `BaseTrainer`."""
        advice = "checkpoints are intact. Lower `learning_rate`, or check the captions of this batch."
        return (
            f"The weights are those of step {self.state.global_step}; {describe_divergence(self._encoder()) or advice}"
        )

    # ------------------------------------------------------------------------------------------------ saving, resuming

    @property
    def adapted_llm(self) -> Any:
        """See `BaseTrainer`."""
        return self._encoder().llm

    def prepare_push(self, message: str, token: str | None, revision: str | None, **kwargs: Any) -> Any:
        """What pushes the encoder, LoRA merged, with its code and card, in one commit."""
        if not self.is_world_process_zero():
            return None
        options = {"commit_message": message, "token": token, "revision": revision, "exist_ok": True, **kwargs}
        return partial(self._encoder().push_to_hub, str(self.hub_model_id), **options)

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Pushes nothing: a checkpoint holds adapters, which do not load by themselves."""

    def _encoder(self) -> CaptionEncoder:
        return self.accelerator.unwrap_model(self.model)


def _check_instructions(args: Any, sources: list[Any], collator: Any) -> None:
    if any(getattr(source, INSTRUCTION, None) for source in sources):
        if args.prompts:
            raise ValueError("Sources have instructions and `prompts` is set. Leave one of them out.")
        if not isinstance(collator, CaptionCollator):
            raise ValueError("Sources have instructions, which a `data_collator` of your own leaves out.")
    if args.prompts and not hasattr(collator, "prompts"):
        raise ValueError("`prompts` is set, which a `data_collator` of your own leaves out. Leave out one of them.")


def _check_batches(args: Any, *, is_stream: bool) -> None:
    if is_stream and args.max_steps < 1:
        raise ValueError(
            f"The training set is a stream, whose length is not known, and `max_steps` is {args.max_steps}. Set "
            "`max_steps` to the number of steps to train."
        )
    if is_stream and args.dataloader_num_workers > 1:
        raise ValueError(
            f"`dataloader_num_workers` is {args.dataloader_num_workers}, but a stream is read by one worker per "
            "process, in its order. Set it to 0 or 1."
        )
    for option, done in _BATCH_OPTIONS.items():
        value = getattr(args, option)
        if getattr(value, "value", value) != done:
            raise ValueError(
                f"`{option}` is {value!r}, but this trainer draws batches itself: each from one source, rows and "
                "batches shuffled, sources by their sizes. Leave it out: `mask_false_negatives` keeps equal captions "
                "from being each other's negatives, and `mini_batch_tokens` sorts rows by length."
            )


def _data_seed(args: Any) -> int:
    return args.seed if args.data_seed is None else args.data_seed
