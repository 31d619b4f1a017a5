# SPDX-License-Identifier: Apache-2.0
"""
Captions from files, Hub data sets and tables.

(1) Open the source and choose the caption columns. (2) Read it block by block; blocks that are clean stay as they are
in Arrow memory, the others are checked text by text. (3) Merge the rows of one image, if an image column is given.
(4) Check that every image has enough distinct captions, and report.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .caption_columns import describe_kinds, resolve_caption_columns
from .captions import CaptionTable
from .load_report import BadRows, Places, describe_place, text_problem


if TYPE_CHECKING:
    from .text_columns import TextColumn
    from .text_sources import Block, TextSource


__all__ = ["load_captions"]


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


def open_text_source(
    source: Any, split: str | None, subset: str | None, default_split: str = "train"
) -> "list[TextSource]":
    """`open_source`, with a readable message where `datasets` is not installed."""
    try:
        from .text_sources import open_source
    except ImportError as error:
        raise ImportError(
            "Loading texts needs `datasets`. Install it with `pip install llm2clip-hf[train]`."
        ) from error
    return open_source(source, split, subset, default_split)


def kinds_of(sources: "list[TextSource]") -> dict[str, str]:
    """The columns of all tables; of a column that differs, the kind in the first table where it holds texts."""
    kinds: dict[str, str] = {}
    for name, kind in [item for source in sources for item in source.kinds.items()]:
        if kinds.get(name, "other") == "other":
            kinds[name] = kind
    return kinds


def good_blocks(sources: "list[TextSource]", columns: Sequence[str], bad: BadRows) -> "Iterator[Block]":
    """The blocks of all tables, without their unreadable rows, which are counted."""
    for source in sources:
        if absent := [column for column in columns if column not in source.kinds]:
            raise ValueError(
                f"`{source.name}` has no column {absent}, which other files have or `columns` names; it has "
                f"{describe_kinds(source.kinds)}."
            )
        for block in source.blocks(columns):
            bad.report.rows_read += len(block.numbers) + len(block.broken)
            for number, problem in block.broken:
                bad.add("bad_rows", describe_place(block.file, block.unit, number), f"the row {problem}")
            yield block


def _read(
    sources: "list[TextSource]", columns: list[str], image_column: str | None, bad: BadRows
) -> "tuple[list[TextColumn], Places, np.ndarray]":
    from .text_columns import TextColumn

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


def _clean(block: "Block", columns: list[str], bad: BadRows) -> "list[TextColumn]":
    """The columns of a block without their bad captions; one entry per row, which may be empty."""
    import pyarrow as pa

    from .text_columns import TextColumn, is_surely_clean, texts_to_array, to_python

    arrays = [block.columns[column] for column in columns]
    if all(isinstance(array, pa.Array) and is_surely_clean(array) for array in arrays):
        return [TextColumn([array]) for array in arrays]
    cleaned = []
    for column, array in zip(columns, arrays):
        values = to_python(array) if isinstance(array, pa.Array) else array
        rows = []
        for number, value in zip(block.numbers, values):
            rows.append(value if _is_clean(value) else _clean_entry(value, column, block, number, bad))
        cleaned.append(TextColumn([texts_to_array(rows)]))
    return cleaned


def _is_clean(value: Any) -> bool:
    if isinstance(value, str):
        return text_problem(value) is None
    return isinstance(value, (list, tuple)) and all(text_problem(text) is None for text in value)


def _clean_entry(value: Any, column: str, block: "Block", number: int, bad: BadRows) -> list[str]:
    texts = value if isinstance(value, (list, tuple)) else [value]
    kept = []
    for text in texts:
        if problem := text_problem(text):
            where = describe_place(block.file, block.unit, number)
            bad.add("bad_texts", where, f"a caption in column `{column}` {problem}: {str(text)[:60]!r}")
        else:
            kept.append(text)
    return kept


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
