# SPDX-License-Identifier: Apache-2.0
"""
Images with captions from folders, tables, parquet files, Hub data sets and `datasets.Dataset`, checked in advance.

(1) Open the source: rows with a path column, or a `datasets.Dataset` with an image column. (2) Read captions and paths
block by block; images are not decoded. (3) Check that every row has a caption and a file, and every file a row. (4)
Report, and keep the rows that are good.
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .captions import CaptionTable
from .columns import check_columns, describe_kinds, resolve_caption_columns
from .image_text import ImageTextDataset
from .images import ImageSource, ImageTransform, is_address, located
from .reports import BadRows, LoadReport, Places, describe_place, text_problem
from .sources import good_blocks


if TYPE_CHECKING:
    import datasets

    from .columns import TextColumn
    from .sources import Block, TextSource


_ROWS_PER_CHECK = 1024


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

    Example:
    >>> import tempfile
    >>> from PIL import Image
    >>> from llm2clip_hf.data import CenterCropTransform, load_image_text
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

    def __len__(self) -> int:
        return len(self.captions)

    def dataset(self, *, transform: ImageTransform, **options: Any) -> ImageTextDataset:
        """An `ImageTextDataset` of these rows; `options` are its further arguments, such as `store`."""
        return ImageTextDataset(self.images, self.captions, transform=transform, **options)


def load_image_text(
    source: Any,
    *,
    image_column: str | None = None,
    caption_columns: str | Sequence[str] | Mapping[str, str] | None = None,
    image_root: str | Path | None = None,
    key_column: str | None = None,
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
    try:
        from .image_sources import below, full_path, image_columns, open_images_with_texts, path_column
    except ImportError as error:
        raise ImportError("Loading needs `datasets`. Install it with `pip install llm2clip-hf[train]`.") from error
    bad = BadRows(on_bad_row)
    # Step (1)
    opened = open_images_with_texts(source, image_column, split, subset, image_root, default_split)
    dataset, sources, root = opened.dataset, opened.sources, opened.root
    kinds = sources[0].kinds
    column = image_column or (path_column(kinds) if dataset is None else image_columns(dataset)[0])
    if column not in kinds:
        raise ValueError(
            f"`{source}` has no column `{column}`; it has {describe_kinds(kinds)}. Name the column of images or of "
            "paths with `image_column`."
        )
    chosen = resolve_caption_columns(
        caption_columns, {name: kind for name, kind in kinds.items() if name != column}, sources[0].name
    )
    sources = [below(table, column, prefix) for table, prefix in zip(sources, opened.prefixes)]

    # Step (2)
    extra = ([column] if dataset is None else []) + ([key_column] if key_column else [])
    check_columns(extra, kinds, sources[0].name)
    places: Places | _PlacesOf
    texts, places = _read(sources, list(chosen.values()), extra, bad)
    if dataset is None:
        texts, places = _merge_rows(texts, len(chosen), places)
    if opened.other_images:
        of_split = np.array([full_path(root, name) not in opened.other_images for name in texts[len(chosen)]], bool)
        texts, places = [column.filter(of_split) for column in texts], _PlacesOf(places, np.flatnonzero(of_split))
    paths = list(texts[len(chosen)]) if dataset is None else None
    keys = list(texts[-1]) if key_column else paths

    # Step (3)
    keep = _has_caption(texts[: len(chosen)], places, bad)
    if paths is not None:
        keep &= _has_file(paths, root, places, bad)
        named = {full_path(root, name) for name in paths if name}
        for path in opened.images:
            if full_path(path) not in named:
                bad.add("bad_rows", f"`{path}`:", f"the image has no row in `{Path(sources[0].name).name}`")
    elif dataset is not None:
        keep &= _has_image(dataset, column, root, places, bad)
    if key_column is not None and keys is not None:
        keep &= _has_key(keys, places, bad)
    if not keep.any():
        raise ValueError(f"No row is left of {len(keep)} rows of `{source}`. First problems: {bad.report.examples}.")

    # Step (4)
    kept = np.flatnonzero(keep)
    images: Any
    if dataset is not None:
        images = _ImageColumn(dataset if keep.all() else dataset.select(kept), column, root)
    else:
        images = _PathColumn(root, texts[len(chosen)].filter(keep))
    table = CaptionTable({name: texts[k].filter(keep) for k, name in enumerate(chosen)})
    bad.report.rows_kept, bad.report.texts_kept = len(table), table.num_captions
    bad.report.log(f"`{source}`" if isinstance(source, (str, Path)) else "the image-text table")
    kept_keys = None if keys is None else [keys[row] for row in kept.tolist()]
    return ImageTextTable(images, table, kept_keys, bad.report, column, dict(chosen))


class _ImageColumn(Sequence[Any]):
    """The undecoded images of a `datasets.Dataset`; one row is read per access."""

    def __init__(self, dataset: "datasets.Dataset", column: str, root: Path) -> None:
        from datasets import Image

        from .image_sources import image_features

        rows = dataset.select_columns([column])
        self._rows = rows.cast_column(column, Image(decode=False)) if column in image_features(dataset) else rows
        self._column, self._root = column, root

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        return located(self._rows[row][self._column], self._root)

    def sizes(self) -> Iterator[int]:
        """Bytes of every image file; from Arrow, so that no bytes are copied. -1 where there is none."""
        for lengths, paths in _contents(self._rows, self._column):
            for length, path in zip(lengths, paths):
                yield _size_of(located(path, self._root)) if length is None else length


class _PathColumn(Sequence[Any]):
    """Paths below a folder, as compact as the column they come from."""

    def __init__(self, root: Path, names: "TextColumn") -> None:
        self._root, self._names = str(root), names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return _PathColumn(Path(self._root), self._names[row])
        return os.path.join(self._root, self._names[row])

    def sizes(self) -> Iterator[int]:
        """Bytes of every image file."""
        return (_size_of(os.path.join(self._root, name)) for name in self._names)


def _size_of(path: str | None) -> int:
    return os.path.getsize(path) if path is not None and os.path.isfile(path) else -1


# ------------------------------------------------------------------------------------------------------------ checks


def _read(
    sources: "list[TextSource]", caption_columns: list[str], name_columns: list[str], bad: BadRows
) -> "tuple[list[TextColumn], Places]":
    """Captions without the bad ones, `[]` where none is left; paths and keys, empty where one is bad."""
    from .columns import TextColumn, texts_to_array
    from .image_sources import values_of

    columns = caption_columns + name_columns
    chunks: list[list[Any]] = [[] for _ in columns]
    places = Places()
    for block in good_blocks(sources, columns, bad):
        for k, column in enumerate(columns):
            rows = [_clean(value, column, block, number, bad) for number, value in values_of(block, column)]
            if k >= len(caption_columns):
                rows = [value if isinstance(value, str) else "" for value in rows]
            chunks[k].append(texts_to_array(rows))
        places.append(block.file, block.unit, block.numbers)
    return [TextColumn(chunk) for chunk in chunks], places


class _PlacesOf:
    """Where the rows that others were merged into stood."""

    def __init__(self, places: "Places | _PlacesOf", rows: np.ndarray) -> None:
        self._places, self._rows = places, rows

    def __len__(self) -> int:
        return len(self._rows)

    def describe(self, row: int) -> str:
        return self._places.describe(int(self._rows[row]))


def _merge_rows(
    texts: "list[TextColumn]", num_captions: int, places: Places
) -> "tuple[list[TextColumn], Places | _PlacesOf]":
    """Rows of equal path as one; the path is the column after the captions."""
    numbers: dict[Any, int] = {}
    codes = [numbers.setdefault(path or row, len(numbers)) for row, path in enumerate(texts[num_captions])]
    if len(numbers) == len(codes):
        return texts, places
    order, sizes = np.argsort(codes, kind="stable"), np.bincount(codes)
    first_rows = order[np.concatenate([[0], np.cumsum(sizes)[:-1]])]
    is_first = np.zeros(len(codes), dtype=bool)
    is_first[first_rows] = True
    captions = [column.group(order, sizes) for column in texts[:num_captions]]
    return captions + [column.filter(is_first) for column in texts[num_captions:]], _PlacesOf(places, first_rows)


def _clean(value: Any, column: str, block: "Block", number: int, bad: BadRows) -> Any:
    texts = value if isinstance(value, (list, tuple)) else [value]
    problems = [text_problem(text) for text in texts]
    if not any(problems):
        return value
    where = describe_place(block.file, block.unit, number)
    for text, problem in zip(texts, problems):
        if problem:
            bad.add("bad_texts", where, f"a text in column `{column}` {problem}: {str(text)[:60]!r}")
    return [text for text, problem in zip(texts, problems) if not problem]


def _has_caption(texts: "Sequence[TextColumn]", places: Places | _PlacesOf, bad: BadRows) -> np.ndarray:
    keep = sum((column.lengths() for column in texts), np.zeros(len(places), dtype=np.int64)) > 0
    for row in np.flatnonzero(~keep).tolist():
        bad.add("too_few_texts", places.describe(row), "the image has no caption")
    return keep


def _has_file(paths: list[str], root: Path, places: Places | _PlacesOf, bad: BadRows) -> np.ndarray:
    keep = np.ones(len(paths), dtype=bool)
    for row, name in enumerate(paths):
        keep[row] = name != "" and os.path.isfile(os.path.join(root, name))
        if not keep[row]:
            problem = _problem_of(name if is_address(name) else os.path.join(root, name)) if name else None
            bad.add("bad_rows", places.describe(row), problem or "has no image path")
    return keep


def _problem_of(path: str) -> str:
    if is_address(path):
        return f"the image `{path}` is an address, and nothing is fetched: download it and give its path"
    return f"the image `{path}` does not exist"


def _has_image(
    dataset: "datasets.Dataset", column: str, root: Path, places: Places | _PlacesOf, bad: BadRows
) -> np.ndarray:
    """Whether each row has bytes or the path of a file."""
    keep = np.ones(len(dataset), dtype=bool)
    problems: dict[int, str] = {}
    rows = itertools.chain.from_iterable(itertools.starmap(zip, _contents(dataset.select_columns([column]), column)))
    for row, (length, path) in enumerate(rows):
        keep[row] = length is not None or (path is not None and os.path.isfile(located(path, root)))
        if not keep[row] and path:
            problems[row] = _problem_of(path)
    for row in np.flatnonzero(~keep).tolist():
        problem = f": {problems[row]}" if row in problems else ""
        bad.add("bad_rows", places.describe(row), f"there is no image in column `{column}`{problem}")
    return keep


def _contents(rows: "datasets.Dataset", column: str) -> Iterator[tuple[list[int | None], list[str | None]]]:
    """Block by block, the lengths of the bytes of each image, and the paths; no bytes are copied from Arrow."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = rows.with_format("arrow")
    for start in range(0, len(rows), _ROWS_PER_CHECK):
        values = table[start : start + _ROWS_PER_CHECK][column].combine_chunks()
        nothing: list[Any] = [None] * len(values)
        if not pa.types.is_struct(values.type):
            is_path = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
            yield (nothing, values.to_pylist()) if is_path else (_lengths(values), nothing)
            continue
        names = [field.name for field in values.type]
        parts = [pc.struct_field(values, name) if name in names else None for name in ("bytes", "path")]
        yield (
            nothing if parts[0] is None else _lengths(parts[0]),
            nothing if parts[1] is None else parts[1].to_pylist(),
        )


def _lengths(values: Any) -> list[int | None]:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.binary_length(values.cast(pa.large_binary())).to_pylist()  # of views, or of nulls alone


def _has_key(keys: list[str], places: Places | _PlacesOf, bad: BadRows) -> np.ndarray:
    keep, seen = np.ones(len(keys), dtype=bool), set[str]()
    for row, key in enumerate(keys):
        if not key:
            # Reported when it was read.
            keep[row] = False
        elif key in seen:
            bad.add("bad_rows", places.describe(row), f"the key {key!r} occurs before")
            keep[row] = False
        else:
            seen.add(key)
    return keep


__all__ = ["ImageTextTable", "load_image_text"]
