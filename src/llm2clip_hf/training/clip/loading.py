# SPDX-License-Identifier: Apache-2.0
"""What stage 2 reads: whole contrastive batches in training, every row in evaluation, and what is known of pairs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.trainer_utils import has_length

from ... import distributed
from ...ops.inputs import count_equal, dense_ids
from ..streams import shards_itself
from .arguments import LLM2CLIPTrainingArguments
from .checks import PAIR_IDS


STREAM_FILE = "stream_state.json"


def check_batches(loader: Any, dataset: Any, args: LLM2CLIPTrainingArguments, batch_size: int) -> None:
    """Refuses a loader without a batch, and a last batch that is kept and no contrastive batch of its own rows."""
    if has_length(loader) and len(loader) == 0:
        raise ValueError(
            f"The training set holds less than one batch of {batch_size} rows per device. Lower "
            "`per_device_train_batch_size`."
        )
    if args.dataloader_drop_last or not has_length(dataset) or shards_itself(dataset):
        return
    count, per_batch = len(dataset), batch_size * args.world_size
    per_step = per_batch * args.gradient_accumulation_steps
    if 0 < args.max_steps < math.ceil(count / per_step):
        return  # the run ends before
    if args.world_size > 1 and count % per_batch:
        raise ValueError(
            f"`dataloader_drop_last=False` with {count} rows: the last batch of {args.world_size} processes "
            f"would be filled up to {per_batch} with rows of the first, which would be negatives of their own "
            "copies. Set it to True, or give a multiple of that many rows."
        )
    if count % (per_step if args.accumulate_negatives else per_batch) == 1:
        raise ValueError(
            f"`dataloader_drop_last=False` with {count} rows leaves one row for the last batch, which has no "
            "negatives. Set it to True, or change `per_device_train_batch_size`."
        )


@contextmanager
def every_row(args: LLM2CLIPTrainingArguments) -> Iterator[None]:
    """Keeps the last, smaller batch of loaders that are made meanwhile."""
    drop_last, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        yield
    finally:
        args.dataloader_drop_last = drop_last


class CountedLoader:
    """Stands for a loader where steps are counted, of which some batches are left out at the end of each epoch."""

    def __init__(self, loader: Any, batches: int) -> None:
        self.dataset, self.batches = loader.dataset, batches

    def __len__(self) -> int:
        return self.batches


def known_of_pairs(batches: list[dict[str, Any]], mask_false_negatives: bool) -> dict[str, Any]:
    """What some batches know of their pairs, as arguments of `ContrastiveLoss`."""
    known: dict[str, Any] = {}
    if "weight" in batches[0]:
        known["weights"] = torch.cat([batch["weight"] for batch in batches])
    names = [name for name in PAIR_IDS if name in batches[0]]
    if mask_false_negatives and names:
        ids = torch.stack([torch.cat([batch[name] for batch in batches]) for name in names], dim=1)
        known["mask_ids"] = (ids, ids)
    return known


def count_masked(ids: torch.Tensor, sizes: list[int] | None) -> torch.Tensor:
    """
    How many pairs of an image and another row's text the loss leaves out over all processes, without waiting for the
    device: those that agree in the first id, and in the second, less those that agree in both.
    """
    columns = [dense_ids(column).long() for column in distributed.all_gather(ids, sizes=sizes).unbind(1)]
    agreeing = [count_equal(column, column).sum() for column in columns]
    if len(columns) == 2:
        both = columns[0] * len(columns[0]) + columns[1]
        agreeing.append(-count_equal(both, both).sum())
    return torch.stack(agreeing).sum() - len(columns[0])
