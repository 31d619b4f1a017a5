# SPDX-License-Identifier: Apache-2.0
"""
What a name stands for, and which split of it is read: one rule for every source, that of `datasets.load_dataset`.

A folder has the splits that the names of its files and folders tell, or the `configs` of its `README.md`; a saved
`DatasetDict` and a Hub data set have theirs; a file, or a pattern of files, is one table, whose only split is `train`.
"""

import logging
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk
from datasets.data_files import FILES_TO_IGNORE, _get_data_files_patterns
from datasets.exceptions import DatasetsError
from fsspec.utils import glob_translate

from .images import IMAGE_ENDINGS, METADATA_FILES


__all__ = ["SplitFiles", "choose_split", "is_data_file", "metadata_files", "open_named", "open_parquet"]

logger = logging.getLogger(__name__)

_TABLE = re.compile(r"\.(?:(?:jsonl|ndjson|json|csv|tsv|txt)(?:\.gz|\.zst)?|parquet|arrow|tar)$", re.IGNORECASE)
_CARDS = ("README.md", ".huggingface.yaml")


class SplitFiles(list[Path]):
    """The files of a split, in the order of their names; `others` are the other files of the folder."""

    others: list[Path] = []


class _NoSplit(ValueError):
    """The message says which splits there are."""


def is_data_file(file: Path) -> bool:
    """Whether a file holds rows, by its name; the statistics that img2dataset writes beside each shard do not."""
    return _TABLE.search(file.name) is not None and not file.name.endswith("_stats.json")


def choose_split(names: Iterable[Any], split: str | None, default: str, source: str) -> str:
    """The split to read."""
    found = [str(name) for name in names]
    if split is None and default not in found and len(found) == 1:
        return found[0]
    if (split or default) not in found:
        raise _NoSplit(f"There is no split {split or default!r} in {source}; it has {found}. Choose with `split`.")
    return split or default


def open_named(
    source: str | Path,
    split: str | None = None,
    subset: str | None = None,
    *,
    default: str = "train",
    revision: str | None = None,
) -> Dataset | SplitFiles:
    """Open a path, a pattern, or the name of a Hub data set."""
    path = Path(source)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(str(path))
        _refuse(subset, "subset", f"the saved data set `{source}`")
        if isinstance(saved, DatasetDict):
            return saved[choose_split(saved, split, default, f"`{source}`")]
        choose_split([saved.split or "train"], split, default, f"`{source}`")
        return saved
    if path.is_dir():
        splits, left = _folder_splits(path, subset)
        files = SplitFiles(splits[choose_split(splits, split, default, f"the folder `{source}`")])
        files.others = sorted(set(left).union(*splits.values()) - set(files))
        return files
    if path.is_file():
        files = SplitFiles([path])
    elif set(str(source)) & set("*?["):
        anchor = Path(path.anchor)
        found = sorted(file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file())
        files = SplitFiles(file for file in found if not file.name.endswith("_stats.json"))
        if not files:
            raise ValueError(f"No file matches the pattern `{source}`.")
    elif is_data_file(path) or path.is_absolute() or str(source).startswith(".") or str(source).count("/") > 1:
        raise ValueError(f"There is no file or folder `{source}`.")
    else:
        return _open_hub(str(source), split, subset, default, revision)
    _refuse(subset, "subset", f"`{source}`")
    choose_split(["train"], split, "train", f"`{source}`, which is one table")
    return files


def _folder_splits(folder: Path, subset: str | None) -> tuple[dict[str, list[Path]], list[Path]]:
    """The files of each split of a folder, and those of no split; hidden ones left out."""
    cards = [folder / name for name in _CARDS if (folder / name).is_file()]
    texts = [card.read_text("utf-8", errors="replace") for card in cards]
    if subset is not None or any(re.search(r"^configs:", text, re.MULTILINE) for text in texts):
        try:
            found = load_dataset_builder(str(folder.absolute()), subset).config.data_files or {}
        except (DatasetsError, OSError, ValueError) as error:
            raise ValueError(f"The `configs` of the folder `{folder}` cannot be used: {error}") from error
        return {str(split): sorted({Path(file) for file in files}) for split, files in found.items()}, []
    names = _visible_files(folder)
    if not names:
        return {"train": []}, []

    @cache
    def matching(pattern: str) -> list[str]:
        word = max(re.split(r"\[[^]]*\]|[*?/]+", pattern), key=len)  # saves most of the time of large folders
        return list(filter(re.compile(glob_translate(pattern)).match, (name for name in names if word in name)))

    splits = {
        str(split): sorted({folder / name for pattern in patterns for name in matching(pattern)})
        for split, patterns in _get_data_files_patterns(matching).items()
    }
    kept = set[Path]().union(*splits.values())
    left = [folder / name for name in names if folder / name not in kept]
    kinds = {path.suffix.lower() for path in kept if _holds_data(path)}
    if data := [path for path in left if _holds_data(path) and path.suffix.lower() in kinds]:
        logger.warning(
            "%d files of the folder `%s` belong to none of its splits %s, which `datasets` tells by names, and are "
            "not read; the first: `%s`.",
            len(data),
            folder,
            list(splits),
            data[0],
        )
    return splits, left


def metadata_files(folder: Path, files: list[Path]) -> list[Path]:
    """The metadata of an image folder, one file per sub-folder: that of the split, else that of all splits."""
    found = [file for file in files if file.name in METADATA_FILES] or [
        folder / name for name in METADATA_FILES if (folder / name).is_file()
    ]
    found.sort(key=lambda file: METADATA_FILES.index(file.name), reverse=True)
    return sorted({file.parent: file for file in found}.values())


def _holds_data(file: Path) -> bool:
    return file.name not in METADATA_FILES and (is_data_file(file) or file.suffix.lower() in IMAGE_ENDINGS)


def _visible_files(folder: Path) -> list[str]:
    names = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        below = Path(root).relative_to(folder)
        names += [(below / name).as_posix() for name in files if name[0] != "." and name not in FILES_TO_IGNORE]
    return sorted(names)


def _open_hub(source: str, split: str | None, subset: str | None, default: str, revision: str | None) -> Dataset:
    try:
        if split is None:
            builder = load_dataset_builder(source, subset, revision=revision)
            names = builder.config.data_files or builder.info.splits or {}
            split = choose_split(names, None, default, f"the data set `{source}`") if names else default
        loaded = load_dataset(source, subset, split=split, revision=revision)
    except _NoSplit:
        raise
    except (DatasetsError, OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ValueError(
            f"The data set `{source}`{at} cannot be loaded from the Hub: {error} There is no file or folder of that "
            "name either. Check name, `split`, `subset` and connection, or make a local copy."
        ) from error
    if not isinstance(loaded, Dataset):
        raise ValueError(f"The split {split!r} of `{source}` is no table.")
    return loaded


def _refuse(value: str | None, option: str, source: str) -> None:
    if value is not None:
        raise ValueError(f"`{option}` ({value}) is for Hub data sets, and {source} has none. Leave it out.")


def open_parquet(files: list[Path]) -> Dataset:
    """Parquet files as one memory-mapped table."""
    try:
        return Dataset.from_parquet([str(file) for file in files])
    except (DatasetsError, OSError, ValueError) as error:
        names = ", ".join(f"`{file}`" for file in files[:3])
        raise ValueError(f"{names} cannot be read: {error.__cause__ or error}") from error
