# SPDX-License-Identifier: Apache-2.0
"""
Captions of images: one table type for every input form, and caption pairs for caption-contrastive tuning.

The captions of an image come from one or several named sources (in the paper: the real caption and a dense one written
by a multimodal LLM). `CaptionTable` numbers them in one flat order, image by image and source by source, which the
embedding store and the image-text dataset share.
"""

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .load_report import LoadReport, text_problem
from .pair_dataset import PairDataset
from .pair_draws import draw_pair, pair_bits, resolve_sides, side_pairs
from .sampling import random_bits


__all__ = ["CaptionPairDataset", "CaptionTable", "Captions"]

CaptionsOfImage = str | Sequence[str]
Captions = Sequence[CaptionsOfImage] | Mapping[str, Sequence[CaptionsOfImage]]
"""Per image a caption or a list of captions; or a mapping from source name to such a sequence."""

DEFAULT_SOURCE = "caption"

# Streams of `random_bits` for hard negatives: one per attempt, from this number on.
_NEGATIVE, _NEGATIVE_DRAWS = 100, 32
_PARTS_PER_UPDATE = 8192


class CaptionTable:
    """
    Captions per image, grouped by source and numbered in one flat order.

    Flat order: image 0 first; within an image the sources in the order of the mapping, within a source the given
    order. All captions are checked once, when the table is made.

    Args:
        captions:
            A sequence with one caption or one list of captions per image (its source is called `"caption"`), or a
            mapping from source name to such a sequence. All sources have one entry per image; an entry may be an
            empty list as long as the image has a caption in another source. Columns of a `datasets.Dataset` work.

    Attributes:
        source_names (`tuple[str, ...]`): names of the sources.
        offsets (`np.ndarray` of shape `(num_images + 1,)`, int64): captions of image `i` are the flat rows
            `offsets[i]` to `offsets[i + 1]`.
        source_ids (`np.ndarray` of shape `(num_captions,)`, int16): position in `source_names` of each flat row.
        distinct_counts (`np.ndarray` of shape `(num_images,)`, int32): distinct captions of each image.
        num_shared_captions (`int`): captions whose text another image has too; as negatives of each other they are
            false.
        sha256 (`str`): digest of all captions, their sources and their grouping.
        report (`LoadReport` or `None`): what `load_captions` read and left out, if it made the table.

    Raises:
        ValueError: if there is no image, sources differ in length, an image has no caption, or a caption is not a
            non-empty string.

    Example:
    >>> table = CaptionTable({"real": ["a cat", "a dog"], "dense": [["a grey cat asleep"], []]})
    >>> table[0], len(table), table.offsets.tolist()
    (['a cat', 'a grey cat asleep'], 2, [0, 2, 3])
    """

    def __init__(self, captions: Captions) -> None:
        sources = dict(captions) if isinstance(captions, Mapping) else {DEFAULT_SOURCE: captions}
        _check_sources(sources)
        self.source_names = tuple(sources)
        self._columns = tuple(sources.values())
        self._num_images = len(self._columns[0])
        self.report: LoadReport | None = None
        self._scan()

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> list[str]:
        """Captions of image `index` in flat order."""
        return [caption for column in self._columns for caption in _as_list(column[index])]

    @property
    def num_captions(self) -> int:
        """Captions of all images together."""
        return len(self.source_ids)

    def rows(self, start: int, stop: int) -> list[str]:
        """Captions of the flat rows `start` to `stop` (exclusive)."""
        if start >= stop:
            return []
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        last = int(np.searchsorted(self.offsets, stop, side="left"))
        texts = [text for image in range(first, last) for text in self[image]]
        begin = start - int(self.offsets[first])
        return texts[begin : begin + stop - start]

    def texts(self) -> Iterator[str]:
        """All captions, source by source: the fastest way through the table."""
        for column in self._columns:
            for entry in column:
                yield from _as_list(entry)

    def caption(self, row: int) -> str:
        """Caption of the flat row `row`."""
        image = self.image_of(row)
        return self[image][row - int(self.offsets[image])]

    def image_of(self, row: int) -> int:
        """Image of the flat row `row`."""
        return int(np.searchsorted(self.offsets, row, side="right")) - 1

    def select(self, images: Sequence[int]) -> "CaptionTable":
        """
        The table of some images, in the given order, e.g. to hold some out; the texts are not copied.

        Raises:
            IndexError: if an image is out of range.
        """
        for image in images:
            if not 0 <= image < len(self):
                raise IndexError(f"Image {image} is out of range for {len(self)} images.")
        return CaptionTable({name: _Selection(c, images) for name, c in zip(self.source_names, self._columns)})

    def sha256_as(self, source_names: Sequence[str], source_ids: Sequence[int] | np.ndarray) -> str:
        """
        The `sha256` of a table with the same captions in the same flat order, from sources of other names.

        Tells whether a digest is that of these captions where the sources were named differently, or merged.

        Args:
            source_names (sequence of `str`): names of the sources of that table.
            source_ids (`(num_captions,)` integers): position in `source_names` of each flat row.

        Example:
        >>> columns = CaptionTable({"real": ["a cat"], "dense": ["a grey cat"]})
        >>> merged = CaptionTable([["a cat", "a grey cat"]])
        >>> merged.sha256_as(columns.source_names, columns.source_ids) == columns.sha256
        True
        """
        digest = hashlib.sha256("\0".join(source_names).encode())
        sources = iter(np.asarray(source_ids).tolist())
        for image in range(len(self)):
            digest.update(b"".join(_digest_part(image, next(sources), text.encode()) for text in self[image]))
        return digest.hexdigest()

    def _scan(self) -> None:
        """One pass over all captions: checks, layout, digest, repeated texts."""
        counts = np.zeros(self._num_images, dtype=np.int64)
        self.distinct_counts = np.zeros(self._num_images, dtype=np.int32)
        source_ids, hashes = array("h"), array("q")
        digest = hashlib.sha256("\0".join(self.source_names).encode())
        parts: list[bytes] = []
        for image, entries in enumerate(zip(*self._columns)):
            own: list[str] = []
            for source, entry in enumerate(entries):
                texts = _as_list(entry)
                for text in texts:
                    _check_caption(text, image, self.source_names[source])
                    parts.append(_digest_part(image, source, text.encode()))
                    hashes.append(hash(text))
                source_ids.extend([source] * len(texts))
                own.extend(texts)
            if not own:
                raise ValueError(f"Image {image} has no caption. Give every image at least one, or drop the row.")
            counts[image] = len(own)
            self.distinct_counts[image] = len(set(own))
            if len(parts) > _PARTS_PER_UPDATE:
                digest.update(b"".join(parts))
                parts.clear()
        digest.update(b"".join(parts))
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        self.source_ids = np.array(source_ids, dtype=np.int16)
        self.sha256 = digest.hexdigest()
        self.num_shared_captions = _count_shared(np.array(hashes, dtype=np.int64), counts)


class _Selection(Sequence[CaptionsOfImage]):
    """Some entries of a column."""

    def __init__(self, column: Sequence[CaptionsOfImage], rows: Sequence[int]) -> None:
        self._column, self._rows = column, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._column[self._rows[index]]


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


def _digest_part(image: int, source: int, text: bytes) -> bytes:
    # The length prefix keeps ["ab", "c"] apart from ["a", "bc"].
    return b"%d,%d,%d:%b" % (image, source, len(text), text)


def _as_list(entry: CaptionsOfImage) -> Sequence[str]:
    # A missing entry or a row of another kind becomes a caption that the check refuses with its row.
    return [entry] if isinstance(entry, (str, Mapping)) or entry is None else entry


def _check_sources(sources: Mapping[str, Sequence[CaptionsOfImage]]) -> None:
    if not sources:
        raise ValueError("`captions` has no source. Pass at least one sequence of captions.")
    for name, column in sources.items():
        if isinstance(column, str):
            raise ValueError(
                f"The captions of source `{name}` are one string. Pass one caption or one list of captions per image."
            )
    lengths = {name: len(column) for name, column in sources.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"All caption sources need one entry per image, got {lengths}. Use [] where one is missing.")
    if 0 in lengths.values():
        raise ValueError("`captions` is empty. Pass the captions of at least one image.")


def _check_caption(text: object, image: int, source: str) -> None:
    if (problem := text_problem(text)) is not None:
        raise ValueError(
            f"Caption {text!r} of image {image}, source `{source}`, is not a non-empty string: it {problem}. "
            "Drop the caption, or use [] where an image has none in this source."
        )


def _count_shared(hashes: np.ndarray, counts: np.ndarray) -> int:
    """Captions whose text more than one image has; texts by their 64-bit hashes, which all but never collide."""
    images = np.repeat(np.arange(len(counts)), counts)
    # Stable, so that the images ascend within a text: its first and last caption tell whether there are several.
    order = np.argsort(hashes, kind="stable")
    hashes, images = hashes[order], images[order]
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
    ends = np.concatenate([starts[1:], [len(hashes)]])
    return int((ends - starts)[images[starts] != images[ends - 1]].sum())
