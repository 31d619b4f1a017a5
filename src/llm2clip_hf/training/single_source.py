# SPDX-License-Identifier: Apache-2.0
"""
Which rows make a batch.

In training a batch comes from one source, the same one on all processes, in an order given by seed and epoch. In
evaluation every row is in one batch.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..data.sampling import random_bits


# Streams of `random_bits`; every kind of choice has its own number (`data.captions` has 10 and 11).
_ROW_ORDER, _BATCH_ORDER, _EVALUATION_ORDER = 100, 101, 102


class SingleSourceBatchSampler(torch.utils.data.Sampler[list[int]]):
    r"""
    Cuts several sources into batches of all processes together, and shuffles the batches.

    (1) The rows of each source are shuffled. (2) They are cut into global batches of `num_processes * batch_size`
    rows; the last, smaller one is dropped. (3) The global batches of all sources are shuffled. Each is then given out
    as `num_processes` batches in a row, one for each process: accelerate deals them out in this order, so all
    processes are at the same global batch in the same step. This is the sampling of the released stage-1 code.

    Everything is a pure function of `(seed, epoch)`, so that a resumed run sees the same batches.

    Args:
        sizes (sequence of `int`): Rows of each source; rows are numbered source after source.
        batch_size (`int`): Rows per process.
        num_processes (`int`, *optional*, defaults to 1): Processes that share a global batch.
        seed (`int`, *optional*, defaults to 0): Seed of both shuffles.
        drop_last (`bool`, *optional*, defaults to `True`):
            `False` keeps the last, smaller batch of each source; with one process only.

    Raises:
        ValueError: if a number is not positive, or `drop_last=False` comes with several processes.

    Example:
    >>> batches = list(SingleSourceBatchSampler([5, 4], batch_size=2, seed=1))
    >>> sorted(len({row // 5 for row in batch}) for batch in batches)
    [1, 1, 1, 1]
    """

    def __init__(
        self, sizes: Sequence[int], batch_size: int, num_processes: int = 1, seed: int = 0, drop_last: bool = True
    ) -> None:
        if min([*sizes, batch_size, num_processes], default=0) < 1 or not sizes:
            raise ValueError(
                f"Sizes of sources, rows and processes must be positive, got {list(sizes)}, {batch_size} and "
                f"{num_processes}."
            )
        if num_processes > 1 and not drop_last:
            raise ValueError(
                f"With {num_processes} processes the last, smaller batch of a source must be dropped: it would leave "
                "processes without rows. Set `dataloader_drop_last=True`."
            )
        self.sizes = list(sizes)
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for epoch `epoch` from the next pass on."""
        self.epoch = epoch

    def batches_of(self, source: int) -> int:
        """Global batches of a source."""
        rows, step = self.sizes[source], self.batch_size * self.num_processes
        return rows // step if self.drop_last else -(-rows // step)

    def check_not_empty(self) -> None:
        """Raises a `ValueError` if there is no batch."""
        if not len(self):
            devices = f"on each of {self.num_processes} devices" if self.num_processes > 1 else "per device"
            raise ValueError(
                f"The training set holds less than one batch of {self.batch_size} pairs {devices}: its sources have "
                f"{self.sizes} rows. Lower `per_device_train_batch_size`."
            )

    def __len__(self) -> int:
        return sum(self.batches_of(source) for source in range(len(self.sizes))) * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        epoch, step = self.epoch, self.batch_size * self.num_processes
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        rows, batches = [], []
        for source, (start, stop) in enumerate(zip(starts[:-1], starts[1:])):
            numbers = np.arange(start, stop)
            rows.append(numbers[random_bits(self.seed, epoch, numbers, _ROW_ORDER).argsort(kind="stable")])
            batches += [(source, number * step) for number in range(self.batches_of(source))]
        order = random_bits(self.seed, epoch, np.arange(len(batches)), _BATCH_ORDER).argsort(kind="stable")
        for number in order.tolist():
            source, begin = batches[number]
            batch = rows[source][begin : begin + step].tolist()
            for first in range(0, len(batch), self.batch_size):
                yield batch[first : first + self.batch_size]


def count_steps(args: Any, sizes: Sequence[int]) -> int:
    """
    Optimizer steps of a run of stage 1, as its trainer counts them.

    Args:
        args (`TrainingArguments`): Batch, processes, epochs and steps.
        sizes (sequence of `int`): Rows of each source.

    Returns:
        `int`: 1 or more.

    Raises:
        ValueError: if there is not one batch, or no step.
    """
    processes = 1 if args.accelerator_config.split_batches else args.world_size
    sampler = SingleSourceBatchSampler(sizes, args.train_batch_size, processes, drop_last=args.dataloader_drop_last)
    sampler.check_not_empty()
    steps: int = args.max_steps
    if steps < 1:
        steps = math.ceil(args.num_train_epochs * -(-(len(sampler) // processes) // args.gradient_accumulation_steps))
    if steps < 1:
        raise ValueError(
            f"`--num_train_epochs {args.num_train_epochs:g}` with `--max_steps {args.max_steps}` is no step of "
            "training. Raise one of them."
        )
    return steps


class EvaluationBatchSampler(torch.utils.data.Sampler[list[int]]):
    r"""
    The batches of one process that evaluates: every row is in one batch of one process.

    All processes have equally many batches, as the loss over all of them needs, and the sizes of all batches differ by
    one at most, so that no row meets far fewer negatives than the others. Rows are shuffled, always the same way.

    Args:
        rows (`int`): Rows of the evaluation set.
        batch_size (`int`): Most rows of a batch; exceeded by one where the rows would not reach all processes else.
        num_processes (`int`, *optional*, defaults to 1): Processes that share the set.
        process (`int`, *optional*, defaults to 0): Number of this process.
        seed (`int`, *optional*, defaults to 0): Seed of the shuffle.

    Raises:
        ValueError: if there are fewer rows than processes.

    Example:
    >>> [len(batch) for batch in EvaluationBatchSampler(17, batch_size=8)]
    [5, 6, 6]
    """

    def __init__(self, rows: int, batch_size: int, num_processes: int = 1, process: int = 0, seed: int = 0) -> None:
        if rows < num_processes:
            raise ValueError(
                f"The evaluation set has {rows} rows for {num_processes} processes, each of which needs one. Give it "
                "more rows."
            )
        self.rows = rows
        self.num_processes = num_processes
        self.process = process
        self.seed = seed
        self._batches = min(-(-rows // (batch_size * num_processes)), rows // num_processes)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        order = random_bits(self.seed, 0, np.arange(self.rows), _EVALUATION_ORDER).argsort(kind="stable").tolist()
        parts = self._batches * self.num_processes
        for part in range(self.process, parts, self.num_processes):
            yield order[self.rows * part // parts : self.rows * (part + 1) // parts]
