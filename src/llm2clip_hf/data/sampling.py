# SPDX-License-Identifier: Apache-2.0
"""
Random choices that are a pure function of (seed, epoch, row).

A resumed run, another number of workers or another batch order must see the same captions and the same crops, so no
choice may depend on a random stream that others also consume. Each choice hashes its own coordinates instead, with the
finalizer of splitmix64 (Steele, Lea and Flood, 2014), vectorized over rows.
"""

import numpy as np


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def random_bits(seed: int, epoch: int, rows: np.ndarray, stream: int) -> np.ndarray:
    """
    64 random bits per row, a pure function of the arguments.

    Args:
        seed (`int`): seed of the run; any integer, taken modulo 2**64.
        epoch (`int`): epoch number.
        rows (`np.ndarray` of shape `(n,)`, integer): row numbers.
        stream (`int`): number of the choice, so that one row can draw several independent values.

    Returns:
        `np.ndarray` of shape `(n,)`, uint64.
    """
    with np.errstate(over="ignore"):
        state = np.array([seed & _MASK], dtype=np.uint64)
        for coordinate in (epoch, stream):
            state = _mix(state + _GOLDEN) ^ np.uint64(coordinate & _MASK)
        return _mix(_mix(state + _GOLDEN) ^ (np.asarray(rows).astype(np.uint64) * _GOLDEN))


def random_uniform(seed: int, epoch: int, rows: np.ndarray, stream: int) -> np.ndarray:
    """Float64 values in `[0, 1)` per row, from the upper 53 bits of `random_bits`."""
    return (random_bits(seed, epoch, rows, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choose_caption(source_ids: np.ndarray, weights: np.ndarray, source_draw: float, caption_draw: float) -> int:
    """
    Choose one caption of an image: first its source by weight, then uniformly among the captions of that source.

    Sources that the image lacks do not take part; the weights of the others are renormalized.

    Args:
        source_ids (`np.ndarray` of shape `(num_captions,)`, integer): source of each caption of the image.
        weights (`np.ndarray` of shape `(num_sources,)`, float64): non-negative weight of each source.
        source_draw (`float`): uniform value in `[0, 1)` that picks the source.
        caption_draw (`float`): uniform value in `[0, 1)` that picks the caption.

    Returns:
        `int`: position of the chosen caption within `source_ids`.
    """
    present = np.bincount(source_ids, minlength=len(weights)) > 0
    cumulative = np.cumsum(weights * present)
    # The right side never lands on a source of weight zero, whose interval is empty.
    source = int(np.searchsorted(cumulative, source_draw * cumulative[-1], side="right"))
    members = np.flatnonzero(source_ids == source)
    return int(members[int(caption_draw * len(members))])


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * _MULTIPLIER_1
    state = (state ^ (state >> np.uint64(27))) * _MULTIPLIER_2
    return state ^ (state >> np.uint64(31))
