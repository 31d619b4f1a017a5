# SPDX-License-Identifier: Apache-2.0
"""
Captions, and images with captions, from folders, tables, Hub data sets and `datasets.Dataset`, checked in advance.

(1) Open the source and find its columns. (2) Read captions, paths and ids block by block, without the bad texts; rows
of one image become one. (3) Check that every row has enough captions and an image, and every file of a folder a row.
(4) Report, and keep the rows that are good. Images are not decoded.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from .captions import CaptionTable
from .columns import TextColumn, check_columns, describe_kinds, resolve_caption_columns, texts_to_array
from .image_sources import (
    ImageColumn,
    OpenedImages,
    PathColumn,
    below,
    full_path,
    image_columns_of,
    image_contents,
    open_images_with_texts,
    path_column,
)
from .image_text import ImageTextDataset
from .images import ImageSource, ImageTransform, is_address, located
from .records import Block, TextSource
from .reports import BadRows, LoadReport, Places, describe_place, positive_number
from .sources import clean_column, clean_values, good_blocks, kinds_of, open_source


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
    # Step (1)
    sources = open_source(source, split, subset, default_split)
    name = f"`{source}`" if isinstance(source, (str, Path)) else "the caption table"
    return captions_of_sources(
        sources,
        name=name,
        columns=columns,
        image_column=image_column,
        on_bad_row=on_bad_row,
        min_captions=min_captions,
    )


def captions_of_sources(
    sources: list[TextSource],
    *,
    name: str,
    columns: str | Sequence[str] | Mapping[str, str] | None,
    image_column: str | None,
    on_bad_row: str,
    min_captions: int = 1,
) -> CaptionTable:
    """`load_captions` of opened tables."""
    bad = BadRows(on_bad_row)
    kinds = kinds_of(sources)
    chosen = resolve_caption_columns(columns, kinds, sources[0].name)
    image_column = image_column or sources[0].image_column
    if image_column is not None and image_column not in kinds:
        raise ValueError(f"There is no image column `{image_column}`; the table has {describe_kinds(kinds)}.")

    # Step (2)
    texts, places, images = _read_captions(sources, list(chosen.values()), image_column, bad)
    first_rows = np.arange(len(places))
    if image_column is not None and len(places):
        texts, first_rows = _merge(texts, images)

    # Steps (3) and (4)
    texts, first_rows = _keep(texts, first_rows, _num_texts(texts, len(first_rows)) > 0, places, min_captions, bad)
    table = CaptionTable(dict(zip(chosen, texts)))
    if min_captions > 1 and not (keep := table.distinct_counts >= min_captions).all():
        texts, _ = _keep(texts, first_rows, keep, places, min_captions, bad)
        table = CaptionTable(dict(zip(chosen, texts)))
    table.report = bad.finish(name, len(table), table.num_captions, table.num_shared_captions)
    return table


def _read_captions(
    sources: list[TextSource], columns: list[str], image_column: str | None, bad: BadRows
) -> tuple[list[TextColumn], Places, list[int]]:
    """Captions and places of all rows, and the number of the image of each where a column has its id."""
    chunks: list[list[TextColumn]] = [[] for _ in columns]
    places, numbers_of_ids, images = Places(), dict[Any, int](), list[int]()
    for block in good_blocks(sources, [*columns, *([image_column] if image_column else [])], bad):
        texts, numbers = [clean_column(block, column, bad) for column in columns], np.asarray(block.numbers)
        if image_column is not None:
            has_id = _has_id(block, image_column, bad)
            ids = [image for image, has in zip(block.values(image_column), has_id) if has]
            images += [numbers_of_ids.setdefault(image, len(numbers_of_ids)) for image in ids]
            texts, numbers = [column.filter(has_id) for column in texts], numbers[has_id]
        for chunk, column in zip(chunks, texts):
            chunk.append(column)
        places.append(block.file, block.unit, numbers)
    return [TextColumn.concat(chunk) for chunk in chunks], places, images


def _has_id(block: Block, column: str, bad: BadRows) -> np.ndarray:
    keep = np.ones(len(block.numbers), dtype=bool)
    for row, image in enumerate(block.values(column)):
        if image is None or isinstance(image, (list, dict)) or image == "":
            where = describe_place(block.file, block.unit, block.numbers[row])
            bad.add("bad_rows", where, f"the image id in column `{column}` is {image!r}")
            keep[row] = False
    return keep


def _merge(texts: list[TextColumn], images: Sequence[int]) -> tuple[list[TextColumn], np.ndarray]:
    """One row per image, numbered in the order of their first rows; and these rows."""
    order, sizes = np.argsort(images, kind="stable"), np.bincount(images)
    first_rows = order[np.concatenate([[0], np.cumsum(sizes)[:-1]])]
    return [column.group(order, sizes) for column in texts], first_rows


def _num_texts(texts: Sequence[TextColumn], rows: int) -> np.ndarray:
    return sum((column.lengths() for column in texts), np.zeros(rows, dtype=np.int64))


def _keep(
    texts: list[TextColumn], first_rows: np.ndarray, keep: np.ndarray, places: Places, needed: int, bad: BadRows
) -> tuple[list[TextColumn], np.ndarray]:
    for row in first_rows[~keep].tolist():
        bad.add("too_few_texts", places.describe(row), f"the image has fewer than {needed} distinct captions")
    if not keep.any():
        raise ValueError(
            f"No image is left of {bad.report.rows_read} rows read. First problems: {bad.report.examples or 'none'}."
        )
    return ([column.filter(keep) for column in texts] if not keep.all() else texts), first_rows[keep]


@dataclass
class ImageTextTable:
    """
    Images and captions of the same rows.

    Args:
        images: undecoded images, one per row: paths, or `{"bytes": ..., "path": ...}`.
        captions (`CaptionTable`): their captions.
        keys (`list[str]`, *optional*): one key per row, for `embed_captions`; the file names where there are files.
        report (`LoadReport`): rows and captions that were read and left out.
        image_column (`str`): the column that the images or their paths come from.
        caption_columns (`dict[str, str]`): the column of each caption source.
        weights (`np.ndarray` of shape `(num_images,)`, *optional*): the weight of each image, for `dataset`.

    Example:
    >>> import tempfile
    >>> from PIL import Image
    >>> from llm2clip_hf.data import CenterCropTransform
    >>> folder = Path(tempfile.mkdtemp())
    >>> Image.new("RGB", (9, 7)).save(folder / "a.png")
    >>> _ = (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "a cat"}')
    >>> table = load_image_text(folder)
    >>> table.keys, table.dataset(transform=CenterCropTransform(8))[0]["text"]
    (['a.png'], 'a cat')
    """

    images: ImageSource
    captions: CaptionTable
    keys: list[str] | None
    report: LoadReport
    image_column: str = ""
    caption_columns: dict[str, str] = field(default_factory=dict)
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def dataset(self, *, transform: ImageTransform, **options: Any) -> ImageTextDataset:
        """An `ImageTextDataset` of these rows; `options` are its further arguments, such as `store`."""
        return ImageTextDataset(self.images, self.captions, transform=transform, weights=self.weights, **options)


def load_image_text(
    source: Any,
    *,
    image_column: str | None = None,
    caption_columns: str | Sequence[str] | Mapping[str, str] | None = None,
    image_root: str | Path | None = None,
    key_column: str | None = None,
    weight_column: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    default_split: str = "train",
    on_bad_row: str = "error",
) -> ImageTextTable:
    """
    Images with captions; images stay undecoded and, in a `Dataset`, on disk.

    Args:
        source:
            A folder of images with a `metadata.jsonl`, `.csv` or `.parquet` (the image folder of `datasets`); a
            `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file with a column of image paths; parquet files, a folder
            or a pattern of them, with an image column; a folder written by `Dataset.save_to_disk`; a
            `datasets.Dataset` or `DatasetDict`; or the name of a Hub data set.
        image_column (`str`, *optional*):
            Column of images or of paths. By default the only column of images, or the first of `file_name`, `image`,
            `image_path` and `path`. Rows with the same path become one image with the captions of all of them, at the
            place of the first.
        caption_columns (*optional*): caption columns, found or named as by `columns` of `load_captions`.
        image_root (`str` or `Path`, *optional*): folder that paths are relative to; that of the table by default.
        key_column (`str`, *optional*): column of keys. Without it the keys of rows with paths are the paths.
        weight_column (`str`, *optional*):
            Column of positive numbers, the weight of each pair in the loss; of rows of one path, that of the first.
        split (`str`, *optional*): split of a Hub data set, a `DatasetDict` or a folder, which has the splits that
            `datasets` tells by the names of its files and folders; without it `default_split`, or the only one.
        subset (`str`, *optional*): configuration of a Hub data set.
        default_split (`str`, defaults to `"train"`): split to take where `split` names none; `"test"` for test data.
        on_bad_row (`str`, defaults to `"error"`):
            `"error"` raises at the first row that cannot be read, whose image is missing, which has no caption or a
            null or empty one, and at the first image in a folder that the metadata does not name. `"skip"` leaves them
            out, counts them, and logs one warning.

    Returns:
        `ImageTextTable`; its `dataset(transform=...)` makes the data set.

    Raises:
        ValueError: if the columns cannot be told, no row is left, or, with `on_bad_row="error"`, a row is bad; the
            message names row and file.
    """
    bad = BadRows(on_bad_row)
    # Step (1)
    opened = open_images_with_texts(source, image_column, split, subset, image_root, default_split)
    dataset, sources, root = opened.dataset, opened.sources, opened.root
    kinds = sources[0].kinds
    column = image_column or (path_column(kinds) if dataset is None else image_columns_of(dataset)[0])
    if column not in kinds:
        raise ValueError(
            f"`{source}` has no column `{column}`; it has {describe_kinds(kinds)}. Name the column of images or of "
            "paths with `image_column`."
        )
    chosen = resolve_caption_columns(
        caption_columns, {name: kind for name, kind in kinds.items() if name != column}, sources[0].name
    )
    names = ([column] if dataset is None else []) + ([key_column] if key_column else [])
    check_columns(names, kinds, sources[0].name)
    if weight_column is not None and weight_column not in kinds:
        raise ValueError(f"`{source}` has no column `{weight_column}`; it has {describe_kinds(kinds)}.")
    sources = [below(table, column, prefix) for table, prefix in zip(sources, opened.prefixes)]

    # Step (2)
    texts, strings, places, weights = _read_images(sources, list(chosen.values()), names, weight_column, bad)
    rows = np.arange(len(places))
    if dataset is None:
        texts, rows = _merge_paths(texts, strings[0])
        if opened.other_images:
            of_split = [full_path(root, strings[0][row]) not in opened.other_images for row in rows.tolist()]
            texts, rows = [column.filter(np.array(of_split, bool)) for column in texts], rows[np.array(of_split, bool)]
        strings = [column.filter(np.isin(np.arange(len(places)), rows)) for column in strings]
    paths = list(strings[0]) if dataset is None else None
    keys = list(strings[-1]) if key_column else paths

    # Step (3)
    if weight_column is not None:
        weights = [weights[row] for row in rows.tolist()]
    keep = _good_rows(opened, column, texts, rows, paths, keys if key_column else None, places, bad)
    if weight_column is not None:
        keep &= _has_weight(weights, weight_column, _refusal(rows, places, bad))
    if not keep.any():
        raise ValueError(f"No row is left of {len(keep)} rows of `{source}`. First problems: {bad.report.examples}.")

    # Step (4)
    kept = np.flatnonzero(keep)
    images: Any
    if dataset is not None:
        images = ImageColumn(dataset if keep.all() else dataset.select(kept), column, root)
    else:
        images = PathColumn(root, strings[0].filter(keep))
    table = CaptionTable({name: column.filter(keep) for name, column in zip(chosen, texts)})
    report = bad.finish(
        f"`{source}`" if isinstance(source, (str, Path)) else "the image-text table", len(table), table.num_captions
    )
    kept_keys = None if keys is None else [keys[row] for row in kept.tolist()]
    kept_weights = None if weight_column is None else np.array([float(weights[row]) for row in kept.tolist()])
    return ImageTextTable(images, table, kept_keys, report, column, dict(chosen), kept_weights)


def _refusal(rows: np.ndarray, places: Places, bad: BadRows) -> Callable[..., None]:
    """Reports an image, by the place of its first row."""

    def refuse(row: int, problem: str, counter: str = "bad_rows") -> None:
        bad.add(counter, places.describe(int(rows[row])), problem)

    return refuse


def _good_rows(
    opened: OpenedImages,
    column: str,
    texts: list[TextColumn],
    rows: np.ndarray,
    paths: list[str] | None,
    keys: list[str] | None,
    places: Places,
    bad: BadRows,
) -> np.ndarray:
    """Which images have a caption, a file or bytes, and a key of their own; the others are reported."""

    refuse = _refusal(rows, places, bad)
    keep = _num_texts(texts, len(rows)) > 0
    for row in np.flatnonzero(~keep).tolist():
        refuse(row, "the image has no caption", "too_few_texts")
    if paths is not None:
        keep &= _has_file(paths, opened.root, refuse)
        named = {full_path(opened.root, name) for name in paths if name}
        for path in opened.images:
            if full_path(path) not in named:
                table = Path(opened.sources[0].name).name
                bad.add("bad_rows", f"`{path}`:", f"the image has no row in `{table}`")
    elif opened.dataset is not None:
        keep &= _has_image(opened.dataset, column, opened.root, refuse)
    if keys is not None:
        keep &= _has_key(keys, refuse)
    return keep


def _read_images(
    sources: list[TextSource], caption_columns: list[str], name_columns: list[str], weight: str | None, bad: BadRows
) -> tuple[list[TextColumn], list[TextColumn], Places, list[Any]]:
    """Captions without the bad ones; paths and keys, empty where one is bad; where they stood; weights as they are."""
    captions: list[list[TextColumn]] = [[] for _ in caption_columns]
    names: list[list[TextColumn]] = [[] for _ in name_columns]
    places, weights = Places(), list[Any]()
    for block in good_blocks(sources, caption_columns + name_columns + ([weight] if weight else []), bad):
        for chunk, column in zip(captions, caption_columns):
            chunk.append(clean_column(block, column, bad, "text"))
        for chunk, column in zip(names, name_columns):
            values = clean_values(block, column, bad, "text")
            strings = [value if isinstance(value, str) else "" for value in values]
            chunk.append(TextColumn([texts_to_array(strings)]))
        weights += block.values(weight) if weight else []
        places.append(block.file, block.unit, block.numbers)
    columns = [[TextColumn.concat(chunk) for chunk in chunks] for chunks in (captions, names)]
    return columns[0], columns[1], places, weights


def _merge_paths(texts: list[TextColumn], paths: TextColumn) -> tuple[list[TextColumn], np.ndarray]:
    """Rows of equal path as one, and the first row of each."""
    numbers: dict[Any, int] = {}
    images = [numbers.setdefault(path or row, len(numbers)) for row, path in enumerate(paths)]
    return (texts, np.arange(len(paths))) if len(numbers) == len(images) else _merge(texts, images)


def _has_file(paths: list[str], root: Path, refuse: Callable[[int, str], None]) -> np.ndarray:
    keep = np.ones(len(paths), dtype=bool)
    for row, name in enumerate(paths):
        keep[row] = name != "" and os.path.isfile(os.path.join(root, name))
        if not keep[row]:
            path = name if is_address(name) else os.path.join(root, name)
            refuse(row, _problem_of(path) if name else "has no image path")
    return keep


def _has_image(dataset: Dataset, column: str, root: Path, refuse: Callable[[int, str], None]) -> np.ndarray:
    """Whether each row has bytes or the path of a file."""
    keep = np.ones(len(dataset), dtype=bool)
    for row, (length, path) in enumerate(image_contents(dataset.select_columns([column]), column)):
        if length is None and (path is None or not os.path.isfile(located(path, root))):
            keep[row] = False
            refuse(row, f"there is no image in column `{column}`{f': {_problem_of(path)}' if path else ''}")
    return keep


def _problem_of(path: str) -> str:
    if is_address(path):
        return f"the image `{path}` is an address, and nothing is fetched: download it and give its path"
    return f"the image `{path}` does not exist"


def _has_key(keys: list[str], refuse: Callable[[int, str], None]) -> np.ndarray:
    keep, seen = np.ones(len(keys), dtype=bool), set[str]()
    for row, key in enumerate(keys):
        keep[row] = bool(key) and key not in seen  # an empty one was reported when it was read
        if key in seen:
            refuse(row, f"the key {key!r} occurs before")
        elif key:
            seen.add(key)
    return keep


def _has_weight(weights: list[Any], column: str, refuse: Callable[[int, str], None]) -> np.ndarray:
    keep = np.array([positive_number(weight) > 0 for weight in weights], dtype=bool)
    for row in np.flatnonzero(~keep).tolist():
        refuse(row, f"the weight in column `{column}` is {weights[row]!r}, expected a positive number")
    return keep


__all__ = ["ImageTextTable", "captions_of_sources", "load_captions", "load_image_text"]
