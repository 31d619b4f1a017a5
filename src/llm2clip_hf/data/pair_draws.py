# SPDX-License-Identifier: Apache-2.0
"""The draw of a caption pair, the same for map-style and streamed data: a pure function of (seed, epoch, row)."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np

from .sampling import random_bits


# Streams of `random_bits`; every kind of choice has its own number.
_FIRST_CAPTION, _SECOND_CAPTION, _DIRECTION = 10, 11, 12

Sides = tuple[frozenset[int], frozenset[int]]
"""The source numbers of the two sides of a pair."""


def resolve_sides(patterns: Sequence[str], source_names: Sequence[str]) -> Sides:
    """
    The sources that two name patterns stand for.

    Raises:
        ValueError: if there are not two patterns, one fits no source, or both fit the same one.
    """
    if isinstance(patterns, str) or len(patterns) != 2:
        raise ValueError(f'`pair_sources` must be two name patterns such as ("short*", "long*"), got {patterns!r}.')
    first, second = (
        frozenset(number for number, name in enumerate(source_names) if fnmatchcase(name, pattern))
        for pattern in patterns
    )
    for pattern, side in zip(patterns, (first, second)):
        if not side:
            raise ValueError(f"`pair_sources`: the pattern {pattern!r} fits none of the sources {list(source_names)}.")
    if first & second:
        both = [source_names[number] for number in sorted(first & second)]
        raise ValueError(f"`pair_sources`: both patterns {tuple(patterns)} fit {both}. Each source has one side.")
    return first, second


def pair_bits(seed: int, epoch: int, rows: np.ndarray) -> list[list[int]]:
    """The three random numbers per row that `draw_pair` takes."""
    streams = (_FIRST_CAPTION, _SECOND_CAPTION, _DIRECTION)
    return [random_bits(seed, epoch, rows, stream).tolist() for stream in streams]


def draw_pair(
    texts: Sequence[str], source_ids: Sequence[int], sides: Sides | None, first: int, second: int, direction: int
) -> tuple[str, str, int]:
    """
    Anchor, positive, and the source of the positive.

    Args:
        texts: captions of one image; at least two distinct ones, and a pair of distinct ones over `sides`.
        source_ids: source of each caption. A text that several sources have counts once, for the first of them.
        sides: the two sides of the pair; None draws any two distinct captions.
        first (`int`): 64 random bits, as are `second` and `direction`.
    """
    if sides is not None:
        pairs = side_pairs(texts, source_ids, sides)
        pair = pairs[first % len(pairs)]
        (anchor, _), (positive, source) = pair if direction >> 63 else pair[::-1]
        return anchor, positive, source
    distinct = _first_sources(texts, source_ids)
    names = list(distinct)
    anchor_position = first % len(names)
    # A step of 1 to n - 1 around the circle: uniform over the other captions.
    positive = names[(anchor_position + 1 + second % (len(names) - 1)) % len(names)]
    return names[anchor_position], positive, distinct[positive]


def side_pairs(
    texts: Sequence[str], source_ids: Sequence[int], sides: Sides
) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    """All pairs of distinct texts, one of each side, each text with its source."""
    one, two = (
        _first_sources(
            [text for text, source in zip(texts, source_ids) if source in side],
            [source for source in source_ids if source in side],
        )
        for side in sides
    )
    return [(left, right) for left in one.items() for right in two.items() if left[0] != right[0]]


def _first_sources(texts: Sequence[str], source_ids: Sequence[int]) -> dict[str, int]:
    first: dict[str, int] = {}
    for text, source in zip(texts, source_ids):
        first.setdefault(text, source)
    return first
