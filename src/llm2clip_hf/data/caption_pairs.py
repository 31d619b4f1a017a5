# SPDX-License-Identifier: Apache-2.0
"""What all map-style sources of text pairs share: the epoch, single and batched access, the Arrow copy."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .captions import Captions, CaptionTable
from .sampling import random_bits


if TYPE_CHECKING:
    import datasets


_ROWS_PER_STEP = 8192


class PairDataset(torch.utils.data.Dataset):
    """Rows `{"anchor": str, "positive": str, ["negative": str,] "label": int}`, drawn anew each epoch."""

    def __init__(self, num_rows: int, seed: int, instruction: str | None, has_negatives: bool) -> None:
        self._num_rows = num_rows
        self._seed = seed
        self.instruction = instruction
        self.column_names = ("anchor", "positive", *(["negative"] if has_negatives else []), "label")
        # In shared memory, so that the workers of a loader with `persistent_workers=True` see `set_epoch`.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self._num_rows

    def set_epoch(self, epoch: int) -> None:
        """Draw the pairs of epoch `epoch` from the next access on, in worker processes too."""
        self._epoch.fill_(epoch)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows at once, as the loaders of torch ask for a batch."""
        for row in rows:
            if not 0 <= row < len(self):
                raise IndexError(f"Row {row} is out of range for {len(self)} rows.")
        return list(self._draw(int(self._epoch), np.asarray(rows, dtype=np.int64)))

    def to_dataset(self) -> "datasets.Dataset":
        """The rows of the current epoch as a `datasets.Dataset`."""
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"`{type(self).__name__}.to_dataset` needs `datasets`. "
                "Install it with `pip install llm2clip-hf[train]`."
            ) from error
        kinds = {name: datasets.Value("int64" if name == "label" else "string") for name in self.column_names}
        parts = []
        # Step by step into Arrow: millions of rows never are Python objects at once.
        for start in range(0, len(self), _ROWS_PER_STEP):
            rows = list(self._draw(int(self._epoch), np.arange(start, min(start + _ROWS_PER_STEP, len(self)))))
            columns = {name: [row[name] for row in rows] for name in self.column_names}
            parts.append(datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)))
        return datasets.concatenate_datasets(parts)

    def _draw(self, epoch: int, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        raise NotImplementedError


# Streams of `random_bits`; every kind of choice has its own number.
_FIRST_CAPTION, _SECOND_CAPTION, _DIRECTION = 10, 11, 12
Sides = tuple[frozenset[int], frozenset[int]]
"""The source numbers of the two sides of a pair."""


def resolve_sides(patterns: Sequence[str], source_names: Sequence[str]) -> Sides:
    """The sources that two name patterns stand for."""
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
    """Anchor, positive, and the source of the positive."""
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


# Streams of `random_bits` for hard negatives: one per attempt, from this number on.
_NEGATIVE, _NEGATIVE_DRAWS = 100, 32


class CaptionPairDataset(PairDataset):
    """
    Two distinct captions per image, drawn anew each epoch: the positives of caption-contrastive tuning.

    Every image gives one row `{"anchor": str, "positive": str, "label": int}`, with `"negative": str` before the label
    if `hard_negatives` is set. The label is the number of the image: rows of equal label are never each other's
    negatives. By default the pair is drawn uniformly among the distinct captions of the image (over all its sources),
    without replacement. All draws are pure functions of `(seed, epoch, row)`. Source: paper section 3.1, any two
    captions of an image are positives.

    Args:
        captions: as for `CaptionTable`, or a `CaptionTable`; at least two distinct captions per image.
        seed (`int`, defaults to 0): seed of the draws.
        hard_negatives (`bool`, defaults to `False`):
            Add a random caption of another image, from the same source as the positive and different in text from all
            captions of the anchor's image. Source: released stage-1 data code.
        pair_sources (two name patterns, *optional*):
            Draw the two captions from two kinds of sources, for example `("short*", "long*")`: a coin per row decides
            which of the two is the anchor's. Patterns as in `fnmatch`. Source: released stage-1 data code.
        instruction (`str`, *optional*):
            Instruction of the anchor column; positives and negatives get none. For a trainer to read; the texts stay
            as they are. The paper's is "Given a caption, retrieve a similar relevant caption." (section 3.1).

    Attributes:
        table (`CaptionTable`): the captions.

    Raises:
        ValueError: if an image has fewer than two distinct captions (the message names the row), no caption in one of
            the `pair_sources`, or there is no caption to draw negatives from.

    Example:
    >>> pairs = CaptionPairDataset([["a cat", "a grey cat", "a cat asleep"]], seed=1)
    >>> pairs.set_epoch(3)
    >>> pairs[0]["anchor"] != pairs[0]["positive"], pairs[0]["label"]
    (True, 0)
    """

    def __init__(
        self,
        captions: "Captions | CaptionTable",
        seed: int = 0,
        *,
        hard_negatives: bool = False,
        pair_sources: tuple[str, str] | None = None,
        instruction: str | None = None,
    ) -> None:
        self.table = captions if isinstance(captions, CaptionTable) else CaptionTable(captions)
        super().__init__(len(self.table), seed, instruction, has_negatives=hard_negatives)
        self._sides = None if pair_sources is None else resolve_sides(pair_sources, self.table.source_names)
        self._check_pairs()
        self._captions_of_source: dict[int, np.ndarray] = {}
        if hard_negatives:
            self._captions_of_source = self._index_sources()

    def _check_pairs(self) -> None:
        few = np.flatnonzero(self.table.distinct_counts < 2)
        if few.size:
            row = int(few[0])
            raise ValueError(
                f"Row {row} has fewer than two distinct captions: {self.table[row]!r} ({few.size} such rows). "
                'Caption pairs need two per image; drop the rows (`load_captions(..., on_bad_row="skip", '
                "min_captions=2)`) or add captions."
            )
        if self._sides is None:
            return
        # A row can only lack a pair if a side is empty or texts repeat within the image.
        counts = np.diff(self.table.offsets)
        suspicious = self.table.distinct_counts < counts
        for side in self._sides:
            present = np.concatenate([[0], np.cumsum(np.isin(self.table.source_ids, list(side)))])
            suspicious |= np.diff(present[self.table.offsets]) == 0
        for row in np.flatnonzero(suspicious).tolist():
            if not side_pairs(self.table[row], self._source_ids(row), self._sides):
                raise ValueError(
                    f"Row {row} has no two distinct captions in the two `pair_sources`: {self.table[row]!r}. "
                    "Drop the row, or widen the patterns."
                )

    def _index_sources(self) -> dict[int, np.ndarray]:
        index = {}
        drawn = range(len(self.table.source_names)) if self._sides is None else set().union(*self._sides)
        for source in drawn:
            rows = np.flatnonzero(self.table.source_ids == source)
            if rows.size and self.table.image_of(rows[0]) == self.table.image_of(rows[-1]):
                raise ValueError(
                    f"Only one image has captions in the source `{self.table.source_names[source]}`, so there is no "
                    "caption of that kind to draw hard negatives from. Leave the source out, or add images."
                )
            index[source] = rows
        return index

    def _source_ids(self, row: int) -> list[int]:
        return self.table.source_ids[self.table.offsets[row] : self.table.offsets[row + 1]].tolist()

    def _draw(self, epoch: int, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        bits = pair_bits(self._seed, epoch, rows)
        negative_bits = random_bits(self._seed, epoch, rows, _NEGATIVE).tolist()
        for row, first_try, *row_bits in zip(rows.tolist(), negative_bits, *bits):
            texts, source_ids = self.table[row], self._source_ids(row)
            anchor, positive, source = draw_pair(texts, source_ids, self._sides, *row_bits)
            drawn: dict[str, Any] = {"anchor": anchor, "positive": positive}
            if self._captions_of_source:
                drawn["negative"] = self._negative(epoch, row, source, set(texts), first_try)
            yield drawn | {"label": row}

    def _negative(self, epoch: int, row: int, source: int, own: set[str], bits: int) -> str:
        candidates = self._captions_of_source[source]
        position = bits % len(candidates)
        for attempt in range(1, _NEGATIVE_DRAWS + 1):
            if (text := self.table.caption(int(candidates[position]))) not in own:
                return text
            bits = int(random_bits(self._seed, epoch, np.array([row]), _NEGATIVE + attempt)[0])
            position = bits % len(candidates)
        # Nearly all captions of the source are the image's own texts: look at every one of them.
        for flat_row in np.roll(candidates, -position).tolist():
            if (text := self.table.caption(flat_row)) not in own:
                return text
        raise ValueError(
            f"Row {row} has no hard negative: all captions in the source `{self.table.source_names[source]}` are "
            "equal to one of its own. Leave the source out, or set `hard_negatives=False`."
        )


__all__ = ["CaptionPairDataset"]
