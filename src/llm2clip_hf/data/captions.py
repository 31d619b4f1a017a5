# SPDX-License-Identifier: Apache-2.0
"""
Captions of images in one form, whatever they come from, and what two tables of them share.

The captions of an image come from one or several named sources (in the paper: the real caption and a dense one written
by a multimodal LLM). `CaptionTable` numbers them in one flat order, image by image and source by source, which the
embedding store and the image-text dataset share.
"""

import hashlib
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .reports import LoadReport, text_problem


logger = logging.getLogger(__name__)
CaptionsOfImage = str | Sequence[str]
Captions = Sequence[CaptionsOfImage] | Mapping[str, Sequence[CaptionsOfImage]]
"""Per image a caption or a list of captions; or a mapping from source name to such a sequence."""
DEFAULT_SOURCE = "caption"
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
