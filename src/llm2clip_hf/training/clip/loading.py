# SPDX-License-Identifier: Apache-2.0
"""What stage 2 reads: whole contrastive batches in training, every row in evaluation, streams that can be resumed."""

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler
from transformers import Trainer
from transformers.trainer_utils import has_length

from ...files import write_json_atomically
from ..streams import resume_stream, shards_itself, stream_loader, stream_state
from .arguments import LLM2CLIPTrainingArguments
from .checks import check_contrastive_batch


STREAM_FILE = "stream_state.json"


class FirstRows(Sampler[int]):
    """The first rows of another sampler."""

    def __init__(self, sampler: Any, count: int) -> None:
        self.sampler, self.count = sampler, count

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(iter(self.sampler), self.count)

    def __len__(self) -> int:
        return self.count


class ClipLoadingTrainer(Trainer):
    """A `Trainer` that loads data as the module says."""

    args: LLM2CLIPTrainingArguments

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """The loader of the training set; refuses one that yields no batch."""
        check_contrastive_batch(self.args, self._train_batch_size)
        if shards_itself(self.train_dataset):
            loader = stream_loader(self.train_dataset, self.data_collator, self.args, self._train_batch_size)
        else:
            loader = super().get_train_dataloader()
        if has_length(loader) and len(loader) == 0:
            raise ValueError(
                f"The training set holds less than one batch of {self._train_batch_size} rows per device. Lower "
                "`per_device_train_batch_size`."
            )
        self._check_last_batch()
        return loader

    def _check_last_batch(self) -> None:
        """Where the last batch is kept, refuses one that is no contrastive batch of its own rows."""
        if self.args.dataloader_drop_last or not has_length(self.train_dataset) or shards_itself(self.train_dataset):
            return
        count, per_batch = len(self.train_dataset), self._train_batch_size * self.args.world_size
        per_step = per_batch * self.args.gradient_accumulation_steps
        if 0 < self.args.max_steps < math.ceil(count / per_step):
            return  # the run ends before
        if self.args.world_size > 1 and count % per_batch:
            raise ValueError(
                f"`dataloader_drop_last=False` with {count} rows: the last batch of {self.args.world_size} processes "
                f"would be filled up to {per_batch} with rows of the first, which would be negatives of their own "
                "copies. Set it to True, or give a multiple of that many rows."
            )
        if count % (per_step if self.args.accumulate_negatives else per_batch) == 1:
            raise ValueError(
                f"`dataloader_drop_last=False` with {count} rows leaves one row for the last batch, which has no "
                "negatives. Set it to True, or change `per_device_train_batch_size`."
            )

    def _whole_steps(self, count: int, per_step: int) -> int:
        """Of `count` rows or batches, those of whole optimizer steps; all where there is no such step."""
        if not (self.args.dataloader_drop_last and self.args.accumulate_negatives):
            return count
        return count // per_step * per_step or count

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Where the last, smaller batch is left out and micro-batches make one, so is the last, smaller group."""
        sampler: Any = super()._get_train_sampler(train_dataset)
        count = len(sampler) if has_length(sampler) else 0
        rows_per_step = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        whole = self._whole_steps(count, rows_per_step)
        if whole == count:
            return sampler
        if isinstance(sampler, RandomSampler):
            return RandomSampler(sampler.data_source, num_samples=whole)
        return FirstRows(sampler, whole)

    def set_initial_training_values(self, args: Any, dataloader: Any, *others: Any) -> Any:
        """Numbers of steps, for a stream those of whole ones; see `Trainer`."""
        counted: Any = dataloader
        if shards_itself(self.train_dataset) and has_length(dataloader):
            counted = _CountedLoader(
                self.train_dataset, self._whole_steps(len(dataloader), args.gradient_accumulation_steps)
            )
        return super().set_initial_training_values(args, counted, *others)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save and shards_itself(self.train_dataset):
            state = stream_state(self.train_dataset, self.args, self._train_batch_size)
            write_json_atomically(Path(output_dir) / STREAM_FILE, state)

    def _init_training_state(
        self, max_steps: int, num_update_steps: int, num_epochs: int, resume_from_checkpoint: Any, *others: Any
    ) -> tuple[int, int]:
        """Where a resumed run goes on; a stream is told, and refuses what would change its order."""
        position: tuple[int, int] = super()._init_training_state(
            max_steps, num_update_steps, num_epochs, resume_from_checkpoint, *others
        )
        if resume_from_checkpoint is not None and shards_itself(self.train_dataset) and not self.args.ignore_data_skip:
            file = Path(str(resume_from_checkpoint)) / STREAM_FILE
            saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
            state = stream_state(self.train_dataset, self.args, self._train_batch_size)
            resume_stream(self.train_dataset, saved, state, position)
        return position

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


class _CountedLoader:
    """Stands for a loader where steps are counted, of which some batches are left out at the end of each epoch."""

    def __init__(self, dataset: Any, batches: int) -> None:
        self.dataset, self.batches = dataset, batches

    def __len__(self) -> int:
        return self.batches
