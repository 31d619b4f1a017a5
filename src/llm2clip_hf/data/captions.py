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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .columns import describe_kinds, resolve_caption_columns
from .reports import BadRows, LoadReport, Places, describe_place, text_problem
from .sources import _clean, good_blocks, open_text_source


if TYPE_CHECKING:
    from .columns import TextColumn
    from .sources import Block, TextSource


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


def load_captions(
    source: Any,
    *,
    columns: str | Sequence[str] | Mapping[str, str] | None = None,
    image_column: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    default_split: str = "train",
    on_bad_row: str = "error",
    min_captions: int = 1,
) -> CaptionTable:
    """
    Captions per image from a file, a folder, a Hub data set or a table.

    The same rows give the same table, with the same `sha256`, whatever form they come in.

    Args:
        source:
            Path of a `.jsonl`, `.json`, `.csv`, `.tsv` (each also with `.gz` or `.zst`) or `.parquet` file; a folder
            of files of one of these kinds, or one written by `save_to_disk`; a pattern such as `data/part-*.jsonl`;
            the name of a Hub data set; a `datasets.Dataset` or `DatasetDict`; a mapping from column to values; a
            sequence of rows (mappings, or the captions themselves). A `Dataset` stays memory-mapped; files are held in
            memory as Arrow.
        columns (*optional*):
            Caption columns, each of strings or of lists of strings; every column is a caption source of its own.
            A mapping names the sources: `{"dense": "longSV_captions"}`. By default all columns called `caption(s)`,
            `*_caption(s)`, `raw`, `short` or `long`, in any row or file; without one, `text`, `texts` or `sentences`.
            Columns that their name calls wrong captions, such as `negative_caption`, are only read if named here.
        image_column (`str`, *optional*):
            Column with the id of the image, for tables with several rows per image, such as one row per caption. Rows
            of equal id become one image, at the place of the first. In COCO's annotation files, `image_id`.
        split (`str`, *optional*): split of a Hub data set, a `DatasetDict`, or a folder, which has the splits that
            `datasets` tells by the names of its files; without it `default_split`, or the only one.
        subset (`str`, *optional*): configuration of a Hub data set.
        default_split (`str`, defaults to `"train"`): split to take where `split` names none; `"test"` for test data.
        on_bad_row (`str`, defaults to `"error"`):
            `"error"` raises at the first row that cannot be read, the first caption that is null, empty or no valid
            text, and the first image with too few captions. `"skip"` leaves these captions, rows and images out,
            counts them, and logs one warning.
        min_captions (`int`, defaults to 1): distinct captions that an image needs; 2 for `CaptionPairDataset`.

    Returns:
        `CaptionTable`, whose `report` (`LoadReport`) holds the counts, among them the captions shared by several
        images.

    Raises:
        ValueError: if no caption column is found (the message lists the columns), no image is left, or, with
            `on_bad_row="error"`, a row is bad (the message names file and row).

    Example:
    >>> table = load_captions([{"raw_caption": "a cat", "longSV_captions": "a grey cat"}, {"raw_caption": " "}],
    ...     on_bad_row="skip", min_captions=2)
    >>> table[0], table.source_names, table.report.bad_texts, table.report.too_few_texts
    (['a cat', 'a grey cat'], ('raw_caption', 'longSV_captions'), 2, 1)
    """
    if min_captions < 1:
        raise ValueError(f"`min_captions` must be positive, got {min_captions}.")
    bad = BadRows(on_bad_row)
    # Step (1)
    sources = open_text_source(source, split, subset, default_split)
    kinds = kinds_of(sources)
    chosen = resolve_caption_columns(columns, kinds, sources[0].name)
    image_column = image_column or sources[0].image_column
    if image_column is not None and image_column not in kinds:
        raise ValueError(f"There is no image column `{image_column}`; the table has {describe_kinds(kinds)}.")

    # Steps (2) and (3)
    texts, places, groups = _read(sources, list(chosen.values()), image_column, bad)
    first_rows = np.arange(len(places))
    if image_column is not None:
        texts, first_rows = _group(texts, groups)

    # Step (4)
    keep = sum((column.lengths() for column in texts), np.zeros(len(first_rows), dtype=np.int64)) > 0
    texts, first_rows = _keep(texts, first_rows, keep, places, min_captions, bad)
    table = CaptionTable(dict(zip(chosen, texts)))
    keep = table.distinct_counts >= min_captions
    if not keep.all():
        texts, _ = _keep(texts, first_rows, keep, places, min_captions, bad)
        table = CaptionTable(dict(zip(chosen, texts)))
    _finish_report(table, bad, _name_of(source))
    return table


def kinds_of(sources: "list[TextSource]") -> dict[str, str]:
    """The columns of all tables; of a column that differs, the kind in the first table where it holds texts."""
    kinds: dict[str, str] = {}
    for name, kind in [item for source in sources for item in source.kinds.items()]:
        if kinds.get(name, "other") == "other":
            kinds[name] = kind
    return kinds


def _read(
    sources: "list[TextSource]", columns: list[str], image_column: str | None, bad: BadRows
) -> "tuple[list[TextColumn], Places, np.ndarray]":
    from .columns import TextColumn

    chunks: list[list[TextColumn]] = [[] for _ in columns]
    places, groups = Places(), _Groups()
    for block in good_blocks(sources, [*columns, *([image_column] if image_column else [])], bad):
        arrays, numbers = _clean(block, columns, bad), np.asarray(block.numbers, dtype=np.int64)
        if image_column is not None:
            has_id = groups.add(block, image_column, bad)
            arrays = [column.filter(has_id) for column in arrays]
            numbers = numbers[has_id]
        for chunk, column in zip(chunks, arrays):
            chunk.append(column)
        places.append(block.file, block.unit, numbers)
    return [TextColumn.concat(chunk) for chunk in chunks], places, groups.codes()


class _Groups:
    """Numbers the image ids in the order of their first row."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._codes: list[np.ndarray] = []

    def add(self, block: "Block", column: str, bad: BadRows) -> np.ndarray:
        """Whether each row of the block has an id; a row without one is bad."""
        values = block.columns[column]
        ids = values if isinstance(values, list) else values.to_pylist()
        codes = np.full(len(ids), -1, dtype=np.int64)
        for row, image in enumerate(ids):
            if image is None or isinstance(image, (list, dict)) or image == "":
                where = describe_place(block.file, block.unit, block.numbers[row])
                bad.add("bad_rows", where, f"the image id in column `{column}` is {image!r}")
            else:
                codes[row] = self._numbers.setdefault(image, len(self._numbers))
        has_id = codes >= 0
        self._codes.append(codes[has_id])
        return has_id

    def codes(self) -> np.ndarray:
        """Number of the image of every row."""
        return np.concatenate(self._codes) if self._codes else np.zeros(0, dtype=np.int64)


def _group(texts: "list[TextColumn]", groups: np.ndarray) -> "tuple[list[TextColumn], np.ndarray]":
    """One row per image, and the first row of each image in the ungrouped table."""
    if not len(groups):
        return texts, groups
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    first_rows = order[np.concatenate([[0], np.cumsum(sizes)[:-1]])]
    return [column.group(order, sizes) for column in texts], first_rows


def _keep(
    texts: "list[TextColumn]", first_rows: np.ndarray, keep: np.ndarray, places: Places, needed: int, bad: BadRows
) -> "tuple[list[TextColumn], np.ndarray]":
    for row in first_rows[~keep].tolist():
        bad.add("too_few_texts", places.describe(row), f"the image has fewer than {needed} distinct captions")
    if not keep.any():
        raise ValueError(
            f"No image is left of {bad.report.rows_read} rows read. First problems: {bad.report.examples or 'none'}."
        )
    return ([column.filter(keep) for column in texts] if not keep.all() else texts), first_rows[keep]


def _finish_report(table: CaptionTable, bad: BadRows, name: str) -> None:
    bad.report.rows_kept = len(table)
    bad.report.texts_kept = table.num_captions
    bad.report.shared_texts = table.num_shared_captions
    table.report = bad.report
    bad.report.log(name)


def _name_of(source: Any) -> str:
    return f"`{source}`" if isinstance(source, (str, Path)) else "the caption table"


__all__ = ["CaptionTable", "Captions", "load_captions"]
