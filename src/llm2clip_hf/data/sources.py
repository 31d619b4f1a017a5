# SPDX-License-Identifier: Apache-2.0
"""
The one opener of tables: what a name stands for, which split of it is read, and its rows, block by block.

A folder has the splits that the names of its files and folders tell, or the `configs` of its `README.md`; a saved
`DatasetDict` and a Hub data set have theirs; a file, or a pattern of files, is one table, whose only split is `train`.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk
from datasets.data_files import FILES_TO_IGNORE, _get_data_files_patterns
from datasets.exceptions import DatasetsError
from fsspec.utils import glob_translate

from .columns import TextColumn, describe_kinds, is_surely_clean, texts_to_array
from .images import IMAGE_ENDINGS, METADATA_FILES
from .records import (
    READERS,
    Block,
    TextSource,
    checked_rows,
    dataset_source,
    format_of,
    record_source,
    rows_of_columns,
)
from .reports import BadRows, describe_place, text_problem


logger = logging.getLogger(__name__)
_TABLE = re.compile(r"\.(?:(?:jsonl|ndjson|json|csv|tsv|txt)(?:\.gz|\.zst)?|parquet|arrow|tar)$", re.IGNORECASE)


class SplitFiles(list[Path]):
    """The files of a split, in the order of their names; `others` are the other files of the folder."""

    others: list[Path] = []


class _NoSplit(ValueError):
    """The message says which splits there are."""


# ------------------------------------------------------------------------------------------------ names and splits


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
        _refuse_subset(subset, f"the saved data set `{source}`")
        parts = saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
        return parts[choose_split(parts, split, default, f"`{source}`")]
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
    _refuse_subset(subset, f"`{source}`")
    choose_split(["train"], split, "train", f"`{source}`, which is one table")
    return files


def _folder_splits(folder: Path, subset: str | None) -> tuple[dict[str, list[Path]], list[Path]]:
    """The files of each split of a folder, and those of no split; hidden ones left out."""
    cards = [folder / name for name in ("README.md", ".huggingface.yaml") if (folder / name).is_file()]
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


def _refuse_subset(subset: str | None, source: str) -> None:
    if subset is not None:
        raise ValueError(f"`subset` ({subset}) is for Hub data sets, and {source} has none. Leave it out.")


def open_dataset(files: Sequence[Path]) -> Dataset:
    """Files of one kind as a memory-mapped table, by `datasets`, which finds out the types of all columns."""
    names, ending = [str(file) for file in files], files[0].suffix.lower()
    try:
        if ending == ".parquet":
            return Dataset.from_parquet(names)
        if ending in (".csv", ".tsv"):
            return Dataset.from_csv(names, sep="\t" if ending == ".tsv" else ",")
        return Dataset.from_json(names)
    except (DatasetsError, OSError, ValueError) as error:
        listed = ", ".join(f"`{name}`" for name in names[:3])
        raise ValueError(f"{listed} cannot be read: {error.__cause__ or error}") from error


# ----------------------------------------------------------------------------------------------------- rows of a table


def open_source(
    source: Any, split: str | None = None, subset: str | None = None, default_split: str = "train"
) -> list[TextSource]:
    """The tables behind a source; several if it is a folder or a pattern of several files."""
    if isinstance(source, (str, Path)):
        opened = open_named(source, split, subset, default=default_split)
        return [dataset_source(opened, str(source))] if isinstance(opened, Dataset) else open_files(source, opened)
    if isinstance(source, DatasetDict):
        source, split = source[choose_split(source, split, default_split, "the data set")], None
    if split is not None or subset is not None:
        raise ValueError(
            f"`split` ({split}) and `subset` ({subset}) choose a part of a data set; `source` is a "
            f"{type(source).__name__}, which is one table. Leave them out."
        )
    if isinstance(source, Dataset):
        return [dataset_source(source)]
    if isinstance(source, Mapping):
        return [record_source("", "row", rows_of_columns(source))]
    if isinstance(source, Sequence):
        return [record_source("", "row", lambda: enumerate(checked_rows(source)))]
    raise ValueError(
        f"`source` is a {type(source).__name__}. Pass a path, the name of a Hub data set, a `datasets.Dataset`, a "
        "mapping of columns, or a sequence of rows."
    )


def open_files(source: str | Path, files: list[Path]) -> list[TextSource]:
    """The tables in the files of `source`, all of one kind."""
    if Path(source).is_dir():
        tables = [file for file in files if is_data_file(file) and format_of(file)]
        # Text files that describe the data beside them are no data.
        files = [file for file in tables if format_of(file) != ".txt"] or tables
        if not files:
            raise ValueError(f"The folder `{source}` has no file that ends in one of {sorted(READERS)}.")
    formats = {format_of(file) for file in files}
    if "" in formats:
        raise ValueError(f"`{source}` has none of the known endings {sorted(READERS)} (or these with `.gz`, `.zst`).")
    if len(formats) > 1:
        raise ValueError(
            f"`{source}` mixes files of the kinds {sorted(formats)}: {[file.name for file in files[:5]]}. Pass one "
            "kind, for example by a pattern such as `folder/*.parquet`."
        )
    return [READERS[format_of(file)](file) for file in files]


def part_of_sources(sources: list[TextSource], start: int, stop: int) -> list[TextSource]:
    """The rows `start` to `stop` of tables that follow each other, each of which can be read in part."""
    parts, first = [], 0
    for source in sources:
        count = source.num_rows or 0
        low, high = max(start - first, 0), min(stop - first, count)
        if low < high and source.part is not None:
            parts.append(source.part(low, high))
        first += count
    return parts


def kinds_of(sources: list[TextSource]) -> dict[str, str]:
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


def clean_column(block: Block, column: str, bad: BadRows, what: str = "caption") -> TextColumn:
    """A column of a block without its bad texts; one entry per row, which may be empty."""
    if isinstance(values := block.columns[column], pa.Array) and is_surely_clean(values):
        return TextColumn([values])
    return TextColumn([texts_to_array(clean_values(block, column, bad, what))])


def clean_values(block: Block, column: str, bad: BadRows, what: str) -> list[Any]:
    """The same as Python values: texts and lists of texts as they are, where all in them is good."""
    return [
        value if _is_clean(value) else _clean_entry(value, column, block, number, bad, what)
        for number, value in zip(block.numbers, block.values(column))
    ]


def _is_clean(value: Any) -> bool:
    if isinstance(value, str):
        return text_problem(value) is None
    return isinstance(value, (list, tuple)) and all(text_problem(text) is None for text in value)


def _clean_entry(value: Any, column: str, block: Block, number: int, bad: BadRows, what: str) -> list[str]:
    kept = []
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if problem := text_problem(text):
            where = describe_place(block.file, block.unit, number)
            bad.add("bad_texts", where, f"a {what} in column `{column}` {problem}: {str(text)[:60]!r}")
        else:
            kept.append(text)
    return kept
