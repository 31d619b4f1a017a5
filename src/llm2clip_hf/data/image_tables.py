# SPDX-License-Identifier: Apache-2.0
"""
Tables of images with any other columns, such as labels or texts in many languages; images stay undecoded.

`load_image_text` reads images with captions. What has other columns is opened here, and read column by column.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .images import ImageSource, is_address


if TYPE_CHECKING:
    import datasets


__all__ = ["ImageTable", "holds_image_paths", "open_image_table"]

_TABLE_ENDINGS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_PATH_COLUMNS = ("file_name", "image", "image_path", "path")
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")


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
        return any((path / name).is_file() for name in _METADATA)
    return path.is_file() and path.suffix in _TABLE_ENDINGS and path.suffix != ".parquet"


def open_image_table(
    source: str | Path,
    *,
    image_column: str | None = None,
    image_root: str | Path | None = None,
    split: str = "test",
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
        split (`str`, defaults to `"test"`): split of a Hub data set or saved data set, or of a folder of parquet
            files whose names begin with their split.
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


def _open(source: str | Path, split: str, subset: str | None, revision: str | None) -> "datasets.Dataset":
    try:
        from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    except ImportError as error:
        raise ImportError("Loading needs `datasets`. Install it with `pip install llm2clip-hf[eval]`.") from error
    path = Path(source)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        if isinstance(saved, DatasetDict) and split not in saved:
            raise ValueError(f"`{source}` has no split {split!r}; it has {sorted(saved)}.")
        return saved[split] if isinstance(saved, DatasetDict) else saved
    if path.is_dir():
        return _open_folder(path, split)
    if path.is_file():
        if path.suffix not in _TABLE_ENDINGS:
            raise ValueError(f"`{source}` has none of the known endings {list(_TABLE_ENDINGS)}.")
        return _read_files([path])
    if set(str(source)) & set("*?["):
        files = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        if not files:
            raise ValueError(f"No file matches the pattern `{source}`.")
        return _read_files(files)
    if (
        path.suffix in _TABLE_ENDINGS
        or path.is_absolute()
        or str(source).startswith(".")
        or str(source).count("/") != 1
    ):
        raise ValueError(f"There is no file or folder `{source}`.")
    try:
        loaded = load_dataset(str(source), subset, split=split, revision=revision)
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ValueError(
            f"The data set `{source}`{at} cannot be loaded from the Hub: {error}. Check name and connection, or make "
            "a local copy."
        ) from error
    if not isinstance(loaded, Dataset):
        raise ValueError(f"The split {split!r} of `{source}` is no table.")
    return loaded


def _open_folder(folder: Path, split: str) -> "datasets.Dataset":
    from datasets import ClassLabel, Dataset, Features, Value

    for name in _METADATA:
        if (folder / name).is_file():
            return _read_files([folder / name])
    if files := sorted(folder.rglob("*.parquet")):
        # Testing on the training rows of a folder must never happen by accident.
        splits = {file: next((s for s in _SPLITS if file.name.startswith(s)), None) for file in files}
        if any(splits.values()):
            files = [file for file in files if splits[file] is not None and file.name.startswith(split)]
            if not files:
                found = sorted({s for s in splits.values() if s})
                raise ValueError(f"The folder `{folder}` has files of the splits {found}, none of {split!r}.")
        return _read_files(files)
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    rows: dict[str, list[Any]] = {"image": [], "label": []}
    for label, name in enumerate(classes):
        images = [file for file in sorted((folder / name).rglob("*")) if file.suffix.lower() in _IMAGE_ENDINGS]
        if not images:
            raise ValueError(f"The class folder `{folder / name}` has no image. Fill it, or delete it.")
        rows["image"] += [str(file.relative_to(folder)) for file in images]
        rows["label"] += [label] * len(images)
    if not classes:
        raise ValueError(
            f"The folder `{folder}` has neither parquet files, nor one of {list(_METADATA)}, nor class folders."
        )
    return Dataset.from_dict(rows, features=Features({"image": Value("string"), "label": ClassLabel(names=classes)}))


def _read_files(files: list[Path]) -> "datasets.Dataset":
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    names = [str(file) for file in files]
    readers = {".parquet": Dataset.from_parquet, ".csv": Dataset.from_csv, ".tsv": Dataset.from_csv}
    kind = files[0].suffix
    try:
        if kind == ".tsv":
            return Dataset.from_csv(names, sep="\t")
        return readers.get(kind, Dataset.from_json)(names)
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
        found = [
            column for column in _PATH_COLUMNS if getattr(dataset.features.get(column), "dtype", None) == "string"
        ]
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
