# SPDX-License-Identifier: Apache-2.0
"""
Tables of images with any other columns, such as labels or texts in many languages; images stay undecoded.

`load_image_text` reads images with captions. What has other columns is opened here, and read column by column.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .images import IMAGE_ENDINGS, METADATA_FILES, PATH_COLUMNS, ImageSource, is_address


if TYPE_CHECKING:
    import datasets


__all__ = ["ImageTable", "holds_image_paths", "open_image_table"]

_TABLE_ENDINGS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")


class ImageTable:
    """
    A table with a column of undecoded images.

    Args:
        dataset (`datasets.Dataset`): the rows.
        image_column (`str`): the column of images; paths, or `{"bytes": ..., "path": ...}`.
        name (`str`): for messages.
    """

    def __init__(self, dataset: "datasets.Dataset", image_column: str, name: str) -> None:
        from datasets import Image

        if isinstance(dataset.features[image_column], Image):
            dataset = dataset.cast_column(image_column, Image(decode=False))
        self.dataset, self.image_column, self.name = dataset, image_column, name

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return list(self.dataset.column_names)

    @property
    def images(self) -> ImageSource:
        """The undecoded images, one row read per access."""
        return _Images(self.dataset.select_columns([self.image_column]), self.image_column)

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


class _Images(Sequence[Any]):
    def __init__(self, rows: "datasets.Dataset", column: str) -> None:
        self._rows, self._column = rows, column

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        return self._rows[row][self._column]


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
    """
    Open a table of images.

    Args:
        source (`str` or `Path`):
            A parquet file, a pattern or a folder of them, a folder written by `Dataset.save_to_disk`, a table
            (`.jsonl`, `.json`, `.csv`, `.tsv`) with a column of image paths, a folder with such a `metadata` table, a
            folder with one sub-folder of images per class (the column `label` holds the classes in the order of the
            names of the sub-folders), or the name of a Hub data set.
        image_column (`str`, *optional*): column of images or paths; found if there is only one.
        image_root (`str` or `Path`, *optional*): folder that paths are relative to; that of the table by default.
        split (`str`, *optional*): split of a Hub data set, a saved data set or a folder, which has the splits that
            `datasets` tells by the names of its files and folders; without it `test`, or the only one.
        subset (`str`, *optional*): configuration of a Hub data set.
        revision (`str`, *optional*): revision of a Hub data set.
        where (mapping, *optional*): keep the rows whose column (key), as text, equals the value.

    Returns:
        `ImageTable`.

    Raises:
        ValueError: if there is no such source, no image column, no row is left, or an image file is missing; the
            message names it.

    Example:
    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("boat", "dog"):
    ...     (folder / name).mkdir()
    ...     Image.new("RGB", (9, 7)).save(folder / name / "1.png")
    >>> table = open_image_table(folder)
    >>> table.class_names("label"), table.column("label")
    (['boat', 'dog'], [0, 1])
    """
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
        dataset = _with_full_paths(dataset, column, _root_of(source, image_root))
    return ImageTable(dataset, column, str(source))


def _open(source: str | Path, split: str | None, subset: str | None, revision: str | None) -> "datasets.Dataset":
    try:
        from .source_splits import is_data_file, metadata_files, open_named
    except ImportError as error:
        raise ImportError("Loading needs `datasets`. Install it with `pip install llm2clip-hf[eval]`.") from error
    opened = open_named(source, split, subset, default="test", revision=revision)
    if not isinstance(opened, list):
        return opened
    if not Path(source).is_dir():
        if wrong := [file for file in opened if file.suffix not in _TABLE_ENDINGS]:
            raise ValueError(f"`{wrong[0]}` has none of the known endings {list(_TABLE_ENDINGS)}.")
        return _read_files(opened)
    if metadata := metadata_files(Path(source), opened):
        return _read_image_folder(Path(source), opened, metadata)
    tables = [file for file in opened if file.suffix in _TABLE_ENDINGS and is_data_file(file)]
    if tables:
        return _read_files([file for file in tables if file.suffix == ".parquet"] or tables)
    return _read_class_folders(Path(source), [file for file in opened if file.suffix.lower() in IMAGE_ENDINGS])


def _read_image_folder(folder: Path, files: Any, metadata: list[Path]) -> "datasets.Dataset":
    from datasets import concatenate_datasets

    others, parts = set(files.others), []
    for file in metadata:
        rows = _read_files([file])
        column = next((name for name in PATH_COLUMNS if name in rows.column_names), None)
        if column is not None and (others or file.parent != folder):
            paths = [None if name is None else file.parent / name for name in rows[column][:]]
            names = [path and os.path.relpath(path, folder) for path in paths]
            rows = rows.remove_columns([column]).add_column(column, names)
            rows = rows.select([row for row, path in enumerate(paths) if path not in others])
        parts.append(rows)
    return concatenate_datasets(parts)


def _read_class_folders(folder: Path, images: list[Path]) -> "datasets.Dataset":
    from datasets import ClassLabel, Dataset, Features, Value

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


def _read_files(files: list[Path]) -> "datasets.Dataset":
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    from .source_splits import open_parquet

    names = [str(file) for file in files]
    try:
        if files[0].suffix == ".parquet":
            return open_parquet(files)
        if files[0].suffix in (".csv", ".tsv"):
            return Dataset.from_csv(names, **({"sep": "\t"} if files[0].suffix == ".tsv" else {}))
        return Dataset.from_json(names)
    except (DatasetGenerationError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{', '.join(f'`{name}`' for name in names)} cannot be read: {cause}") from error


def _find_image_column(dataset: "datasets.Dataset", name: str) -> str:
    from datasets import Image

    def holds_images(feature: Any) -> bool:
        if isinstance(feature, Image) or (isinstance(feature, dict) and "bytes" in feature):
            return True
        return getattr(feature, "dtype", None) in ("binary", "large_binary")

    found = [column for column, feature in dataset.features.items() if holds_images(feature)]
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


def _root_of(source: str | Path, image_root: str | Path | None) -> Path:
    if image_root is not None:
        return Path(image_root)
    return Path(source) if Path(source).is_dir() else Path(source).parent


def _with_full_paths(dataset: "datasets.Dataset", column: str, root: Path) -> "datasets.Dataset":
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
