# SPDX-License-Identifier: Apache-2.0
"""
Which samples a worker of a rank reads from a set of shards, and in which order: arithmetic only, no file is opened.

(1) The shards are permuted by (seed, epoch) and thought of as one long row of samples. (2) Each rank takes a range of
`num_samples // world_size` of them; the few left over, fewer than ranks, differ from epoch to epoch. (3) The range is
cut among the workers in whole batches, so that the batches a `DataLoader` collects in turn from them are full. (4)
Within its range a worker shuffles through a buffer. Every order is a pure function of (seed, epoch, rank, worker), so
a resumed run computes the order again and begins in its middle.
"""

from typing import NamedTuple

import numpy as np


# Keeps the streams of shards and of buffers apart.
_SHARD_STREAM, _BUFFER_STREAM = 20, 21


class Layout(NamedTuple):
    """How many readers share the samples: `rank` of `world_size`, `worker` of `num_workers`, and the batch size."""

    rank: int
    world_size: int
    worker: int
    num_workers: int
    batch_size: int


class WorkerPlan(NamedTuple):
    """
    The samples of one worker.

    Attributes:
        epoch (`int`): the epoch it is for.
        order (`np.ndarray`, int64): positions in the row of permuted shards, in the order they are returned.
        shards (`np.ndarray`, int64): the permuted shards.
        starts (`np.ndarray`, int64): position at which each permuted shard begins, and the total at the end.
    """

    epoch: int
    order: np.ndarray
    shards: np.ndarray
    starts: np.ndarray


def plan_worker(counts: np.ndarray, layout: Layout, *, seed: int, epoch: int, buffer: int) -> WorkerPlan:
    """
    The samples of one worker in one epoch, in order.

    Args:
        counts (`np.ndarray` of shape `(num_shards,)`): samples per shard.
        layout (`Layout`): rank, worker and batch size.
        seed, epoch (`int`): what the order depends on.
        buffer (`int`): size of the shuffle buffer; 0 keeps the order of shards and samples.

    Returns:
        `WorkerPlan`.
    """
    shards = np.arange(len(counts))
    if buffer:
        shards = _generator(seed, epoch, _SHARD_STREAM).permutation(shards)
    starts = np.concatenate([[0], np.cumsum(counts[shards])]).astype(np.int64)
    per_rank = int(starts[-1]) // layout.world_size
    begin, end = worker_range(per_rank, layout)
    positions = np.arange(begin, end, dtype=np.int64) + layout.rank * per_rank
    if buffer:
        # One stream per range, whatever the layout that made it.
        random = _generator(seed, epoch, _BUFFER_STREAM, layout.rank, layout.worker)
        positions = positions[buffer_order(len(positions), buffer, random)]
    return WorkerPlan(epoch, positions, shards, starts)


def worker_range(per_rank: int, layout: Layout) -> tuple[int, int]:
    """
    The part of a rank's `per_rank` samples that a worker reads.

    A loader takes batch `i` from worker `i % num_workers`; the one batch that is not full is the last of all.
    """
    num_batches = -(-per_rank // layout.batch_size)
    ends = [0]
    for worker in range(layout.num_workers):
        batches = batches_of_worker(num_batches, worker, layout.num_workers)
        size = batches * layout.batch_size
        if num_batches and worker == (num_batches - 1) % layout.num_workers:
            size -= num_batches * layout.batch_size - per_rank
        ends.append(ends[-1] + size)
    return ends[layout.worker], ends[layout.worker + 1]


def batches_of_worker(num_batches: int, worker: int, num_workers: int) -> int:
    """How many of the first `num_batches` batches come from `worker`, when the workers take turns."""
    return max(0, -(-(num_batches - worker) // num_workers))


def buffer_order(count: int, buffer: int, random: np.random.Generator) -> np.ndarray:
    """
    The order in which a shuffle buffer returns the samples 0 to `count - 1` that flow through it.

    The buffer is filled; then, again and again, a random sample leaves it and the next one enters. Sample `k` never
    leaves before `k - buffer + 1` others have.
    """
    size = min(buffer, count)
    held = list(range(size))
    draws = random.random(count).tolist()
    order = np.empty(count, dtype=np.int64)
    for position in range(count):
        slot = int(draws[position] * len(held))
        order[position] = held[slot]
        incoming = position + size
        if incoming < count:
            held[slot] = incoming
        else:
            held[slot] = held[-1]
            held.pop()
    return order


def _generator(*coordinates: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([value & (2**64 - 1) for value in coordinates]))
