# SPDX-License-Identifier: Apache-2.0
"""What a sample draws: its caption, a part of it, the crop, a substitute. A pure function of (seed, epoch, index)."""

from collections.abc import Mapping

import numpy as np
import torch

from .sampling import choose_caption, random_bits, random_uniform
from .sub_captions import choose_sub_caption


# Streams of `random_bits`; every kind of choice has its own number. Substitutes count upwards from theirs.
_SOURCE, _CAPTION, _TRANSFORM, _SUB_CAPTION, _SUBSTITUTE = 0, 1, 2, 3, 1000


class SampleDraws:
    """
    The random choices of a run, the same for map-style and streaming data sets.

    Args:
        seed (`int`): seed of the run.
        weights (`np.ndarray` of shape `(num_sources,)`): weight of each caption source.
        sub_captions (`float`): probability of a sub-caption, in `[0, 1]`.

    Raises:
        ValueError: if `sub_captions` is no probability.
    """

    def __init__(self, seed: int, weights: np.ndarray, sub_captions: float = 0.0) -> None:
        if not 0 <= sub_captions <= 1:
            raise ValueError(f"`sub_captions` must be a probability in [0, 1], got {sub_captions}. 0 switches it off.")
        self.seed, self.weights, self.sub_captions = seed, weights, sub_captions

    def caption(self, epoch: int, index: int, source_ids: np.ndarray) -> int:
        """Which of the captions of sample `index` is drawn, given the source of each."""
        rows = np.array([index])
        source_draw = float(random_uniform(self.seed, epoch, rows, _SOURCE)[0])
        caption_draw = float(random_uniform(self.seed, epoch, rows, _CAPTION)[0])
        return choose_caption(source_ids, self.weights, source_draw, caption_draw)

    def sub_caption(self, epoch: int, index: int, text: str) -> str:
        """A part of the drawn caption of sample `index`, or all of it."""
        if not self.sub_captions:
            return text
        rows = np.array([index])
        draws = [float(random_uniform(self.seed, epoch, rows, _SUB_CAPTION + k)[0]) for k in range(3)]
        return choose_sub_caption(text, self.sub_captions, draws)

    def generator(self, epoch: int, index: int) -> torch.Generator:
        """The source of randomness of the transform of sample `index`."""
        bits = random_bits(self.seed, epoch, np.array([index]), _TRANSFORM)
        return torch.Generator().manual_seed(int(bits[0]))

    def substitute(self, epoch: int, index: int, attempt: int, count: int) -> int:
        """A uniform number below `count`, for the sample that stands in for an unreadable one."""
        return int(random_bits(self.seed, epoch, np.array([index]), _SUBSTITUTE + attempt)[0] % np.uint64(count))


def checked_weights(caption_weights: Mapping[str, float] | None, source_names: tuple[str, ...]) -> np.ndarray:
    """
    Weights of the sources in their order; equal where none are given.

    Raises:
        ValueError: if they do not name all sources, or are negative, not finite, or all zero.
    """
    if caption_weights is None:
        return np.ones(len(source_names))
    if set(caption_weights) != set(source_names):
        raise ValueError(
            f"`caption_weights` names {sorted(caption_weights)}, the captions have the sources "
            f"{sorted(source_names)}. Give every source a weight; 0 leaves it out."
        )
    weights = np.array([float(caption_weights[name]) for name in source_names])
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(
            f"`caption_weights` must be finite and non-negative with a positive sum, got {dict(caption_weights)}."
        )
    return weights


def check_sub_captions(sub_captions: float, is_stored: bool) -> None:
    """ValueError for sub-captions of captions that are stored embeddings."""
    if is_stored and sub_captions:
        raise ValueError(
            f"`sub_captions` is {sub_captions}, but the captions are stored embeddings, which cannot be cut. Embed "
            "the sentences as a source of their own, see `split_sub_captions`, and give it a weight."
        )


def check_choice(name: str, value: str) -> None:
    """ValueError unless an option that says what to do with a bad sample is `"error"` or `"skip"`."""
    if value not in ("error", "skip"):
        raise ValueError(f'`{name}` must be "error" or "skip", got {value!r}.')
