# SPDX-License-Identifier: Apache-2.0
"""Sources of images with captions: which table or data set holds them, and the folder that paths are below."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Image

from .columns import to_python
from .images import IMAGE_ENDINGS, METADATA_FILES, PATH_COLUMNS
from .source_splits import SplitFiles, choose_split, is_data_file, metadata_files, open_named, open_parquet
from .sources import Block, TextSource, open_files, open_source


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
        return _with_images(opened, open_source(opened, None, None), image_column, root)
    folder = Path(source) if Path(source).is_dir() else Path(os.path.commonpath([file.parent for file in opened]))
    root = folder if image_root is None else root
    if Path(source).is_dir() and (metadata := metadata_files(folder, opened)):
        return _open_image_folder(folder, opened, metadata, root)
    parquet = [file for file in opened if file.suffix.lower() == ".parquet"]
    if parquet:
        dataset = open_parquet(parquet)
        if image_columns(dataset):
            return _with_images(dataset, open_source(dataset, None, None), image_column, root)
    elif Path(source).is_dir() and not any(is_data_file(file) and file.suffix != ".tar" for file in opened):
        tar = " Its tar files are shards: give them as `shards`." if any(f.suffix == ".tar" for f in opened) else ""
        raise ValueError(
            f"The folder `{folder}` has none of {list(METADATA_FILES)} with the captions, and no other table.{tar}"
        )
    tables = open_files(source, opened)
    return OpenedImages(tables, [""] * len(tables), root)


def _with_images(dataset: Dataset, sources: list[TextSource], image_column: str | None, root: Path) -> OpenedImages:
    columns = [image_column] if image_column else image_columns(dataset)
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
            names = [name for _, name in values_of(block, column)]
            joined = [os.path.join(prefix, name) if isinstance(name, str) and name else name for name in names]
            yield replace(block, columns=block.columns | {column: joined})

    return replace(source, blocks=blocks)


def image_features(dataset: Dataset) -> list[str]:
    return [name for name, feature in dataset.features.items() if isinstance(feature, Image)]


def image_columns(dataset: Dataset) -> list[str]:
    """Image features, and what is one in a parquet file without the features of `datasets`: bytes with a path."""
    plain = [name for name, feature in dataset.features.items() if _holds_bytes(feature)]
    return [*image_features(dataset), *plain]


def _holds_bytes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary", "binary_view")


def values_of(block: Block, column: str) -> Iterator[tuple[int, Any]]:
    """Number and value of every row."""
    values = block.columns[column]
    return zip(block.numbers, values if isinstance(values, list) else to_python(values))
