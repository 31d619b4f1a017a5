# SPDX-License-Identifier: Apache-2.0
"""
Captions of images in one form, whatever they come from, and what two tables of them share.

The captions of an image come from one or several named sources (in the paper: the real caption and a dense one written
by a multimodal LLM). `CaptionTable` numbers them in one flat order, image by image and source by source, which the
embedding store and the image-text dataset share.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .reports import LoadReport, text_problem


logger = logging.getLogger(__name__)
CaptionsOfImage = str | Sequence[str]
Captions = Sequence[CaptionsOfImage] | Mapping[str, Sequence[CaptionsOfImage]]
"""Per image a caption or a list of captions; or a mapping from source name to such a sequence."""
DEFAULT_SOURCE = "caption"
_IMAGES_AT_ONCE = 8192
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93], dtype=np.uint64)


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
        sha256 (`str`): digest of all captions, their sources and their grouping; made when it is first asked for.
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
        counts = np.stack([_counts(column, name) for name, column in sources.items()], axis=1)
        self.offsets = np.concatenate([[0], np.cumsum(counts.sum(1))])
        if (empty := np.flatnonzero(np.diff(self.offsets) == 0)).size:
            raise ValueError(f"Image {empty[0]} has no caption. Give every image at least one, or drop the row.")
        numbers = np.arange(len(sources), dtype=np.int16)
        self.source_ids = np.repeat(np.broadcast_to(numbers, counts.shape).reshape(-1), counts.reshape(-1))

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

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        """
        SHA-256 of the captions of the images `start` to `stop` and of their grouping, whatever their sources are.

        It covers the number of captions of each image, the bytes of each caption and the captions in UTF-8, each in
        flat order. That of a part of a table is that of a table of the part.
        """
        counts, lengths, texts = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        for first, last in self._blocks(start, self._num_images if stop is None else stop):
            counts.update(np.diff(self.offsets[first : last + 1]).astype("<i8").tobytes())
            sizes, content = self._encoded(first, last)
            lengths.update(sizes.astype("<i8").tobytes())
            texts.update(content)
        return hashlib.sha256(counts.digest() + lengths.digest() + texts.digest()).hexdigest()

    @cached_property
    def sha256(self) -> str:  # noqa: D102 (described with the class)
        return self.sha256_as(self.source_names, self.source_ids)

    def sha256_as(self, source_names: Sequence[str], source_ids: Sequence[int] | np.ndarray) -> str:
        """The `sha256` of a table of the same captions whose sources have other names, or are merged."""
        digest = hashlib.sha256("\0".join(source_names).encode())
        numbers = np.asarray(source_ids).tolist()
        for first, last in self._blocks(0, self._num_images):
            rows = range(int(self.offsets[first]), int(self.offsets[last]))
            images = np.repeat(np.arange(first, last), np.diff(self.offsets[first : last + 1])).tolist()
            # The length prefix keeps ["ab", "c"] apart from ["a", "bc"].
            parts = [
                b"%d,%d,%d:%b" % (image, numbers[row], len(text), text)
                for row, image, text in zip(rows, images, self._texts_of(first, last))
            ]
            digest.update(b"".join(parts))
        return digest.hexdigest()

    @cached_property
    def distinct_counts(self) -> np.ndarray:  # noqa: D102 (described with the class)
        counts = np.diff(self.offsets).astype(np.int32)
        several = np.flatnonzero(counts > 1)
        rows = np.flatnonzero(np.repeat(counts > 1, counts))
        images = np.repeat(np.arange(len(several)), counts[several])
        hashes = self._hashes[rows]
        order = np.lexsort((hashes, images))
        hashes, images = hashes[order], images[order]
        is_repeated = (hashes[1:] == hashes[:-1]) & (images[1:] == images[:-1])
        counts[several] -= np.bincount(images[1:][is_repeated], minlength=len(several)).astype(np.int32)
        return counts

    @cached_property
    def num_shared_captions(self) -> int:  # noqa: D102 (described with the class)
        return _count_shared(self._hashes, np.diff(self.offsets))

    @cached_property
    def _hashes(self) -> np.ndarray:
        """64-bit hashes of all captions in flat order, which all but never collide."""
        blocks = list(self._blocks(0, self._num_images))
        hashes = np.concatenate([_sampled_hashes(*self._encoded(first, last)) for first, last in blocks])
        # Texts that differ in the sample differ; of the others, which are few, all bytes are looked at.
        order = np.argsort(hashes)
        is_repeated = hashes[order[1:]] == hashes[order[:-1]]
        rows = np.unique(np.concatenate([order[1:][is_repeated], order[:-1][is_repeated]]))
        for first, last in blocks:
            begin, end = int(self.offsets[first]), int(self.offsets[last])
            own = rows[np.searchsorted(rows, begin) : np.searchsorted(rows, end)]
            if own.size:
                texts = list(self._texts_of(first, last))
                hashes[own] = [hash(texts[row - begin]) for row in own.tolist()]
        return hashes

    def _blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        return ((first, min(first + _IMAGES_AT_ONCE, stop)) for first in range(start, stop, _IMAGES_AT_ONCE))

    def _texts_of(self, start: int, stop: int) -> Iterator[bytes]:
        """The captions of some images in UTF-8, in flat order."""
        sizes, content = self._encoded(start, stop)
        ends = np.cumsum(sizes).tolist()
        return (bytes(content[end - size : end]) for size, end in zip(sizes.tolist(), ends))

    def _encoded(self, start: int, stop: int) -> tuple[np.ndarray, Any]:
        """Bytes of each caption of some images, and the captions in UTF-8, one after the other, in flat order."""
        sizes, contents = zip(*(_encoded_rows(column, start, stop) for column in self._columns))
        if len(contents) == 1:
            return sizes[0], contents[0]
        ends = [np.cumsum(each).tolist() for each in sizes]
        texts = [
            [content[end - size : end] for size, end in zip(each.tolist(), column_ends)]
            for each, column_ends, content in zip(sizes, ends, contents)
        ]
        rows = slice(int(self.offsets[start]), int(self.offsets[stop]))
        next_text = [iter(column) for column in texts]
        flat = [next(next_text[source]) for source in self.source_ids[rows].tolist()]
        return np.array([len(text) for text in flat], dtype=np.int64), b"".join(flat)


class _Selection(Sequence[CaptionsOfImage]):
    """Some entries of a column."""

    def __init__(self, column: Sequence[CaptionsOfImage], rows: Sequence[int]) -> None:
        self._column, self._rows = column, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._column[self._rows[index]]


def _counts(column: Sequence[CaptionsOfImage], source: str) -> np.ndarray:
    """Number of captions of each entry, int64; texts that no loader has looked at are checked."""
    if hasattr(column, "encoded"):
        checked: np.ndarray = column.lengths()  # type: ignore[attr-defined]
        return checked
    counts = np.zeros(len(column), dtype=np.int64)
    for image, entry in enumerate(column):
        texts = _as_list(entry)
        counts[image] = len(texts)
        for text in texts:
            _check_caption(text, image, source)
    return counts


def _encoded_rows(column: Any, start: int, stop: int) -> tuple[np.ndarray, Any]:
    """Bytes of each text of some entries, and the texts in UTF-8, one after the other."""
    if hasattr(column, "encoded"):
        found: tuple[np.ndarray, Any] = column.encoded(start, stop)
        return found
    entries = column[start:stop] if isinstance(column, (list, tuple)) else (column[row] for row in range(start, stop))
    texts = [text.encode() for entry in entries for text in _as_list(entry)]
    return np.array([len(text) for text in texts], dtype=np.int64), b"".join(texts)


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


def _sampled_hashes(sizes: np.ndarray, content: Any) -> np.ndarray:
    """A hash of the size and of eight bytes each at the beginning, in the middle and at the end of every text."""
    values, starts = np.frombuffer(content, dtype=np.uint8), np.cumsum(sizes) - sizes
    mixed = sizes.astype(np.uint64) * _FACTORS[0]
    for first, factor in zip((np.zeros_like(sizes), sizes // 2, np.maximum(sizes - 8, 0)), _FACTORS[1:]):
        places = np.minimum(first[:, None] + np.arange(8), sizes[:, None] - 1)
        mixed = (mixed ^ values[starts[:, None] + places].view(np.uint64)[:, 0]) * factor
        mixed ^= mixed >> np.uint64(29)
    return mixed.view(np.int64)


def _count_shared(hashes: np.ndarray, counts: np.ndarray) -> int:
    """Captions whose text more than one image has."""
    images = np.repeat(np.arange(len(counts)), counts)
    # Stable, so that the images ascend within a text: its first and last caption tell whether there are several.
    order = np.argsort(hashes, kind="stable")
    hashes, images = hashes[order], images[order]
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
    ends = np.concatenate([starts[1:], [len(hashes)]])
    return int((ends - starts)[images[starts] != images[ends - 1]].sum())


TURNS = (("from", "value"), ("role", "content"))  # of LLaVA and ShareGPT4V; of chat templates
_NOT_THE_MODEL = ("human", "user", "system", "tool")


def root_column(columns: Iterable[str], name: str) -> str:
    """The column that holds `name`, which is a column or an entry such as `json.a.b`."""
    known, parts = set(columns), name.split(".")
    found = [root for k in range(len(parts), 0, -1) if (root := ".".join(parts[:k])) in known]
    return found[0] if found else name


def entry_of(record: Any, name: str) -> Any:
    """The value of `name` in a mapping, or of the entry of an inner mapping that it names; None if it is absent."""
    if not isinstance(record, Mapping):
        return None
    root = root_column(record, name)
    return record.get(root) if root == name else entry_of(record[root], name[len(root) + 1 :])


def with_entries(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row with the texts inside mappings as further columns (`json.a.b`), and conversations as lists of texts."""
    if not any(isinstance(value, (list, Mapping)) for value in record.values()):
        return record
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat[name] = as_texts(value)
        if isinstance(value, Mapping):
            flat |= {f"{name}.{entry}": inner for entry, inner in with_entries(value).items()}
    return flat


def as_texts(value: Any) -> Any:
    """What the model says in a conversation, turn by turn, as LLaVA and ShareGPT4V write it; else the value."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, Mapping) for turn in value):
        return value
    for speaker, text in TURNS:
        if all(speaker in turn and text in turn for turn in value):
            said = [turn[text] for turn in value if turn[speaker] not in _NOT_THE_MODEL]
            return [_joined(parts) if isinstance(parts, list) else parts for parts in said]
    return value


def _joined(parts: list[Any]) -> str:
    return " ".join(part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str))


@dataclass
class Overlap:
    """
    Test data that are in the training data too.

    Args:
        captions, num_captions (`int`): test captions that are captions of training images, and all test captions.
        images, num_images (`int`): test images whose file is a training image, byte by byte, and all test images; 0
            of 0 where only captions were compared.
        examples (`list[str]`): the first of the captions.
    """

    captions: int = 0
    num_captions: int = 0
    images: int = 0
    num_images: int = 0
    examples: list[str] | None = None

    def __bool__(self) -> bool:
        return bool(self.captions or self.images)

    def describe(self) -> str:
        """One line, e.g. `12 of 500 captions and 0 of 100 images of the test data are in the training data too`."""
        counts = f"{self.captions} of {self.num_captions} captions"
        if self.num_images:
            counts += f" and {self.images} of {self.num_images} images"
        examples = f", e.g. {', '.join(repr(text[:60]) for text in self.examples)}" if self.examples else ""
        return f"{counts} of the test data are in the training data too{examples}"

    def warn(self) -> None:
        """Logs a warning if there is anything in common."""
        if self:
            logger.warning("%s. Results on these are no test: choose other rows, or another split.", self.describe())


def find_overlap(train: Any, test: Any) -> Overlap:
    """
    Captions and images that training and test data share.

    Images are compared where both are `ImageTextTable`, by the bytes of their files; only training images of the size
    of a test image are read.

    Args:
        train, test (`ImageTextTable` or `CaptionTable`, or captions as it takes them): the two tables.

    Returns:
        `Overlap`; false where there is nothing in common.

    Example:
    >>> find_overlap([["a cat"], ["a dog"]], [["a dog", "two dogs"]]).describe()
    "1 of 2 captions of the test data are in the training data too, e.g. 'a dog'"
    """
    texts = list(_captions(test).texts())
    known = set(texts)
    shared = {text for text in _captions(train).texts() if text in known}
    found = [text for text in texts if text in shared]
    overlap = Overlap(len(found), len(texts), examples=list(dict.fromkeys(found))[:3])
    if hasattr(train, "images") and hasattr(test, "images"):
        overlap.num_images = len(test)
        overlap.images = _shared_images(train.images, test.images)
    return overlap


def _captions(table: Any) -> CaptionTable:
    table = getattr(table, "captions", table)
    return table if isinstance(table, CaptionTable) else CaptionTable(table)


def _shared_images(train: Any, test: Any) -> int:
    sizes = set(test.sizes())
    digests = {_digest(train[row]) for row, size in enumerate(train.sizes()) if size in sizes and size >= 0}
    return sum(_digest(test[row]) in digests for row in range(len(test)))


def _digest(image: Any) -> bytes:
    content = image.get("bytes") if isinstance(image, dict) else image
    if content is None or isinstance(content, str):
        content = Path(content or image["path"]).read_bytes()
    return hashlib.sha256(content).digest()


__all__ = ["CaptionTable", "Captions", "Overlap", "find_overlap"]
