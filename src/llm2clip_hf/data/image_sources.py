# SPDX-License-Identifier: Apache-2.0
"""Sources of images: which table or data set holds them, undecoded, and the folder that paths are below."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets

from .columns import TextColumn, image_columns
from .images import IMAGE_ENDINGS, METADATA_FILES, PATH_COLUMNS, ImageSource, is_address, located, undecoded_rows
from .records import Block, TextSource
from .sources import SplitFiles, choose_split, is_data_file, open_dataset, open_files, open_named, open_source


_TABLE_ENDINGS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_ROWS_PER_CHECK = 1024


class ImageColumn(Sequence[Any]):
    """The undecoded images of a data set, whose paths may be below a folder; one row is read per access."""

    def __init__(self, dataset: Dataset, column: str, root: str | Path = "") -> None:
        self._rows = undecoded_rows(dataset.select_columns([column]), column)
        self._column, self._root = column, root

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        return located(self._rows[row][self._column], self._root)

    def sizes(self) -> Iterator[int]:
        """Bytes of every image file; from Arrow, so that no bytes are copied. -1 where there is none."""
        for length, path in image_contents(self._rows, self._column):
            yield _size_of(located(path, self._root)) if length is None else length


class PathColumn(Sequence[Any]):
    """Paths below a folder, as compact as the column they come from."""

    def __init__(self, root: str | Path, names: TextColumn) -> None:
        self._root, self._names = str(root), names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return PathColumn(self._root, self._names[row])
        return os.path.join(self._root, self._names[row])

    def sizes(self) -> Iterator[int]:
        """Bytes of every image file."""
        return (_size_of(os.path.join(self._root, name)) for name in self._names)


def _size_of(path: str | None) -> int:
    return os.path.getsize(path) if path is not None and os.path.isfile(path) else -1


def image_contents(rows: Dataset, column: str) -> Iterator[tuple[int | None, str | None]]:
    """Length of the bytes of each image, and path; no bytes are copied from Arrow."""
    table = rows.with_format("arrow")
    for start in range(0, len(rows), _ROWS_PER_CHECK):
        values = table[start : start + _ROWS_PER_CHECK][column].combine_chunks()
        parts = {"bytes": values}
        if pa.types.is_struct(values.type):
            parts = {field.name: pc.struct_field(values, field.name) for field in values.type}
        elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            parts = {"path": values}
        nothing: list[Any] = [None] * len(values)
        # The cast is for views, and for nulls alone.
        lengths = pc.binary_length(parts["bytes"].cast(pa.large_binary())).to_pylist() if "bytes" in parts else nothing
        yield from zip(lengths, parts["path"].to_pylist() if "path" in parts else nothing)


def image_columns_of(dataset: Dataset) -> list[str]:
    """Image features, and what is one in a parquet file without the features of `datasets`: bytes with a path."""
    found = image_columns(dataset.features.arrow_schema)
    return [name for name in found if isinstance(dataset.features[name], (Image, Value, dict))]


# ---------------------------------------------------------------------------------------------- images with captions


@dataclass
class OpenedImages:
    """A source: a data set with an image column, or tables with paths."""

    sources: list[TextSource]
    prefixes: list[str]
    root: Path
    dataset: Dataset | None = None
    images: Sequence[Path] = ()
    other_images: frozenset[str] = frozenset()


def open_images_with_texts(
    source: Any,
    image_column: str | None,
    split: str | None,
    subset: str | None,
    image_root: str | Path | None,
    default_split: str,
) -> OpenedImages:
    """Opens what `load_image_text` takes; its arguments."""
    if image_root is not None and not Path(image_root).is_dir():
        raise ValueError(
            f"`image_root` `{image_root}` is no folder. Give the folder that image paths are relative to."
        )
    root = Path(image_root or ".")
    if not isinstance(source, (str, Path)):
        if isinstance(source, DatasetDict):
            source, split = source[choose_split(source, split, default_split, "the data set")], None
        if not isinstance(source, Dataset):
            raise ValueError(
                f"`source` is a {type(source).__name__}. Pass a path, the name of a Hub data set, or a "
                "`datasets.Dataset`."
            )
        return _with_images(source, open_source(source, split, subset), image_column, root)
    opened = open_named(source, split, subset, default=default_split)
    if isinstance(opened, Dataset):
        return _with_images(opened, open_source(opened), image_column, root)
    folder = Path(source) if Path(source).is_dir() else Path(os.path.commonpath([file.parent for file in opened]))
    root = folder if image_root is None else root
    if Path(source).is_dir() and (metadata := _metadata_files(folder, opened)):
        return _open_image_folder(folder, opened, metadata, root)
    parquet = [file for file in opened if file.suffix.lower() == ".parquet"]
    if parquet:
        dataset = open_dataset(parquet)
        if image_columns_of(dataset):
            return _with_images(dataset, open_source(dataset), image_column, root)
    elif Path(source).is_dir() and not any(is_data_file(file) and file.suffix != ".tar" for file in opened):
        tar = " Its tar files are shards: give them as `shards`." if any(f.suffix == ".tar" for f in opened) else ""
        raise ValueError(
            f"The folder `{folder}` has none of {list(METADATA_FILES)} with the captions, and no other table.{tar}"
        )
    tables = open_files(source, opened)
    return OpenedImages(tables, [""] * len(tables), root)


def _metadata_files(folder: Path, files: list[Path]) -> list[Path]:
    """The metadata of an image folder, one file per sub-folder: that of the split, else that of all splits."""
    found = [file for file in files if file.name in METADATA_FILES] or [
        folder / name for name in METADATA_FILES if (folder / name).is_file()
    ]
    found.sort(key=lambda file: METADATA_FILES.index(file.name), reverse=True)
    return sorted({file.parent: file for file in found}.values())


def _with_images(dataset: Dataset, sources: list[TextSource], image_column: str | None, root: Path) -> OpenedImages:
    columns = [image_column] if image_column else image_columns_of(dataset)
    if len(columns) != 1:
        raise ValueError(
            f"The data set has {len(columns)} image columns {columns} among {dataset.column_names}. Name one with "
            "`image_column`."
        )
    return OpenedImages(sources, [""], root, dataset)


def _open_image_folder(folder: Path, files: SplitFiles, metadata: list[Path], root: Path) -> OpenedImages:
    sources = [table for file in metadata for table in open_files(file, [file])]
    prefixes = ["" if root != folder else os.path.relpath(file.parent, folder) for file in metadata]
    images = [file for file in files if file.suffix.lower() in IMAGE_ENDINGS]
    if root != folder:  # The images are elsewhere, where those of other splits may be as well.
        found = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGE_ENDINGS)
        images = [file for file in found if not (file.name.startswith(".") or files.others)]
    return OpenedImages(sources, prefixes, root, None, images, frozenset(map(full_path, files.others)))


def full_path(*parts: str | Path) -> str:
    return os.path.normpath(os.path.join(*parts))


def path_column(kinds: Mapping[str, str]) -> str:
    return next((name for name in PATH_COLUMNS if kinds.get(name) == "string"), PATH_COLUMNS[0])


def below(source: TextSource, column: str, prefix: str) -> TextSource:
    """The table, with the paths in `column` below the folder `prefix`."""
    if prefix in ("", "."):
        return source

    def blocks(columns: Sequence[str]) -> Iterator[Block]:
        for block in source.blocks(columns):
            names = block.values(column)
            joined = [os.path.join(prefix, name) if isinstance(name, str) and name else name for name in names]
            yield replace(block, columns=block.columns | {column: joined})

    return replace(source, blocks=blocks)


# -------------------------------------------------------------------------------------------- images with any columns


class ImageTable:
    """A table of undecoded images with any other columns, such as labels or texts in many languages."""

    def __init__(self, dataset: Dataset, image_column: str, name: str) -> None:
        self.dataset = undecoded_rows(dataset, image_column)
        self.image_column, self.name = image_column, name

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return list(self.dataset.column_names)

    @property
    def images(self) -> ImageSource:
        """The undecoded images, one row read per access."""
        return ImageColumn(self.dataset, self.image_column)

    def column(self, name: str) -> list[Any]:
        """Values of the column `name`; a `ValueError` lists the columns if there is none."""
        if name not in self.columns:
            raise ValueError(f"`{self.name}` has no column `{name}`; it has {self.columns}.")
        return self.dataset[name][:]

    def class_names(self, label_column: str) -> list[str] | None:
        """Names that the type of a label column holds, if it holds any."""
        return getattr(self.dataset.features.get(label_column), "names", None)

    def select(self, rows: Sequence[int]) -> "ImageTable":
        """The table of these rows."""
        return ImageTable(self.dataset.select(rows), self.image_column, self.name)


def holds_image_paths(source: str | Path) -> bool:
    """Whether `source` is a table whose rows name image files: not parquet, no saved data set, no Hub name."""
    path = Path(source)
    if path.is_dir():
        return any(found.is_file() for name in METADATA_FILES for found in (path / name, *path.glob(f"*/{name}")))
    return path.is_file() and path.suffix in _TABLE_ENDINGS and path.suffix != ".parquet"


def open_image_table(
    source: str | Path,
    *,
    image_column: str | None = None,
    image_root: str | Path | None = None,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    where: Mapping[str, str] | None = None,
) -> ImageTable:
    """Open a table of images."""
    path = Path(source)
    dataset = _open(source, split, subset, revision)
    column = image_column or _find_image_column(dataset, str(source))
    if column not in dataset.column_names:
        raise ValueError(f"`{source}` has no column `{column}`; it has {dataset.column_names}.")
    for key, value in (where or {}).items():
        if key not in dataset.column_names:
            raise ValueError(f"`{source}` has no column `{key}` to select by; it has {dataset.column_names}.")
        dataset = dataset.select([row for row, entry in enumerate(dataset[key][:]) if str(entry) == value])
    if not len(dataset):
        raise ValueError(f"`{source}` has no row{f' where {dict(where)}' if where else ''}. Check path and selection.")
    if getattr(dataset.features[column], "dtype", None) in ("string", "large_string"):
        dataset = _with_full_paths(dataset, column, Path(image_root or (path if path.is_dir() else path.parent)))
    return ImageTable(dataset, column, str(source))


def _open(source: str | Path, split: str | None, subset: str | None, revision: str | None) -> Dataset:
    opened = open_named(source, split, subset, default="test", revision=revision)
    if not isinstance(opened, list):
        return opened
    if not Path(source).is_dir():
        if wrong := [file for file in opened if file.suffix not in _TABLE_ENDINGS]:
            raise ValueError(f"`{wrong[0]}` has none of the known endings {list(_TABLE_ENDINGS)}.")
        return open_dataset(opened)
    if metadata := _metadata_files(Path(source), opened):
        return _read_image_folder(Path(source), opened, metadata)
    tables = [file for file in opened if file.suffix in _TABLE_ENDINGS and is_data_file(file)]
    if tables:
        return open_dataset([file for file in tables if file.suffix == ".parquet"] or tables)
    return _read_class_folders(Path(source), [file for file in opened if file.suffix.lower() in IMAGE_ENDINGS])


def _read_image_folder(folder: Path, files: Any, metadata: list[Path]) -> Dataset:
    others, parts = set(files.others), []
    for file in metadata:
        rows = open_dataset([file])
        column = next((name for name in PATH_COLUMNS if name in rows.column_names), None)
        if column is not None and (others or file.parent != folder):
            paths = [None if name is None else file.parent / name for name in rows[column][:]]
            names = [path and os.path.relpath(path, folder) for path in paths]
            rows = rows.remove_columns([column]).add_column(column, names)
            rows = rows.select([row for row, path in enumerate(paths) if path not in others])
        parts.append(rows)
    return concatenate_datasets(parts)


def _read_class_folders(folder: Path, images: list[Path]) -> Dataset:
    for below in (below for below in sorted(folder.iterdir()) if below.is_dir() and not below.name.startswith(".")):
        if not any(file.suffix.lower() in IMAGE_ENDINGS for file in below.rglob("*")):
            raise ValueError(f"The class folder `{below}` has no image. Fill it, or delete it.")
    classes = sorted({file.parent.name for file in images if file.parent != folder})
    if not classes:
        raise ValueError(
            f"The folder `{folder}` has neither tables, nor one of {list(METADATA_FILES)}, nor class folders."
        )
    images = [file for file in images if file.parent != folder]
    rows = {
        "image": [str(file.relative_to(folder)) for file in images],
        "label": [classes.index(file.parent.name) for file in images],
    }
    return Dataset.from_dict(rows, features=Features({"image": Value("string"), "label": ClassLabel(names=classes)}))


def _find_image_column(dataset: Dataset, name: str) -> str:
    found = image_columns_of(dataset)
    if not found:
        found = [column for column in PATH_COLUMNS if getattr(dataset.features.get(column), "dtype", None) == "string"]
    if "image" in found:
        return "image"
    if len(found) != 1:
        raise ValueError(
            f"`{name}` has {len(found)} image columns {found} among {dataset.column_names}. Name one as "
            "`image_column`."
        )
    return found[0]


def _with_full_paths(dataset: Dataset, column: str, root: Path) -> Dataset:
    names = dataset[column][:]
    if addresses := [row for row, name in enumerate(names) if is_address(name)]:
        raise ValueError(
            f"Row {addresses[0]} names the image `{names[addresses[0]]}`, which is an address ({len(addresses)} of "
            f"{len(names)} are), and nothing is fetched. Download the images and give their paths."
        )
    paths = [None if name is None else os.path.join(root, name) for name in names]
    missing = [row for row, path in enumerate(paths) if path is None or not os.path.isfile(path)]
    if missing:
        raise ValueError(
            f"Row {missing[0]} names the image `{paths[missing[0]]}`, which does not exist ({len(missing)} of "
            f"{len(paths)} images are missing). Complete the folder, or set `image_root`."
        )
    return dataset.remove_columns([column]).add_column(column, paths)
