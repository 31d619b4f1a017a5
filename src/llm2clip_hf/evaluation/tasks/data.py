# SPDX-License-Identifier: Apache-2.0
"""The data of tasks: what each kind has, where they are, and how their table is opened."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data import CaptionTable
from ...data.images import ImageSource
from ...files import sha256_of_file
from .definitions import TaskDefinition


if TYPE_CHECKING:
    from ...data.image_sources import ImageTable


_ENDINGS = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
MAX_NAMED = 5  # bad rows that a report names
_NAME_FILES = ("classes.txt", "classes.json", "templates.txt")


@dataclass(kw_only=True)
class TaskData:
    """What the data of all kinds of tasks have: how many there are, what they are known by, and what was left out."""

    counts: dict[str, int]
    fingerprint: dict[str, str]
    skipped: dict[str, Any] = field(default_factory=dict)


@dataclass
class ImageData(TaskData):
    """Images, with what messages call them."""

    images: ImageSource
    keys: list[str]


@dataclass
class RetrievalData(ImageData):
    """
    Images with captions, one `CaptionTable` row per image.

    `captions` are what the task measures. They are the rows `rows` of `all_captions`, all that the data hold.
    """

    captions: CaptionTable
    all_captions: CaptionTable
    rows: np.ndarray


@dataclass
class CrossLingualData(ImageData):
    """Images, and per language texts with the image each belongs to."""

    texts: dict[str, list[tuple[int, str]]]


@dataclass
class ClassificationData(ImageData):
    """Images with classes."""

    labels: list[int]
    class_names: list[str]
    templates: list[str]


@dataclass
class CaptionData(TaskData):
    """Captions of images, without the images."""

    captions: list[list[str]]


@dataclass(frozen=True)
class Location:
    """Where a task's data are: a path or a Hub name, with the definition's fields as they are in this copy."""

    source: str
    definition: TaskDefinition
    revision: str | None = None


def locate(task: TaskDefinition, data_root: str | Path | None = None) -> Location:
    """Where the data of a task are: its own path, the local copy below `data_root`, or the Hub."""
    if task.path is not None:
        return Location(task.path, task)
    name = task.data or task.name
    if data_root is not None:
        root = Path(data_root)
        if not root.is_dir():
            raise ValueError(f"`data_root` `{root}` is no folder. Give the folder that holds `{name}`.")
        for candidate in (root / name, *(root / f"{name}{ending}" for ending in _ENDINGS)):
            if _holds_data(candidate):
                return Location(str(candidate), _with_files_beside(task, candidate))
    if task.hub is None:
        where = "Give `data_root`, the folder with" if data_root is None else f"`{data_root}` does not hold"
        raise ValueError(
            f"Task `{task.name}` has no data. {where} a folder `{name}` or one of the files "
            f"{', '.join(f'`{name}{ending}`' for ending in _ENDINGS[:2])}; no copy on the Hub is known. "
            f"Source: {task.source}"
        )
    hub = task.hub
    definition = replace(task, split=hub.split, **dict(hub.columns))
    if data_root is not None:
        definition = _with_files_beside(definition, Path(data_root) / name)
    return Location(hub.repo, definition, hub.revision)


def _holds_data(place: Path) -> bool:
    """Whether a local copy is there; a folder with names of classes or templates alone is none."""
    return place.is_file() or (place.is_dir() and any(file.name not in _NAME_FILES for file in place.iterdir()))


def _with_files_beside(task: TaskDefinition, place: Path) -> TaskDefinition:
    """Class names and templates from the files beside a local copy, by their usual names."""
    folder = place if place.is_dir() else place.parent
    changes: dict[str, Any] = {}
    if task.kind == "zero-shot" and task.class_names is None:
        found = [file for file in (folder / "classes.txt", folder / "classes.json") if file.is_file()]
        changes["class_names"] = str(found[0]) if place.is_dir() and found else None
    if isinstance(task.templates, str):
        changes["templates"] = str(folder / task.templates)
    return replace(task, **changes)


def open_table(location: Location, split: str | None = None) -> "ImageTable":
    from ...data import open_image_table

    task = location.definition
    return open_image_table(
        location.source,
        image_column=task.image_column,
        image_root=task.image_root,
        split=split or task.split,
        subset=task.subset,
        revision=location.revision,
        where=task.where,
    )


def image_keys(table: "ImageTable", task: TaskDefinition, unique: bool = True) -> list[str]:
    """Names of the images for messages; an id that occurs twice is an error."""
    column = task.key_column or ("image_id" if "image_id" in table.columns else None)
    if column is None:
        return [f"row {row}" for row in range(len(table))]
    keys = [str(key) for key in table.column(column)]
    seen: dict[str, int] = {}
    for row, key in enumerate(keys if unique else ()):
        if key in seen:
            raise ValueError(
                f"The id {key!r} in column `{column}` occurs in rows {seen[key]} and {row}. An image must be one row; "
                "put its captions into a list."
            )
        seen[key] = row
    return keys


def named_column(table: "ImageTable", named: str | None, usual: Sequence[str], option: str) -> str:
    column = named or next((name for name in usual if name in table.columns), None)
    if column is None:
        remedy = f" Name it as `{option}`." if option else ""
        raise ValueError(f"`{table.name}` has none of the columns {list(usual)}; it has {table.columns}.{remedy}")
    return column


def head(images: ImageSource, count: int) -> ImageSource:
    return [images[row] for row in range(min(count, len(images)))]


def check_counts(task: TaskDefinition, counts: Mapping[str, int], *names: str) -> None:
    for name in names:
        expected = getattr(task, f"num_{name}")
        if expected is not None and counts[name] != expected:
            raise ValueError(
                f"the data have {counts[name]} {name}, the definition says {expected}, so the result would not "
                f"compare with published ones. Complete the data, or run them as `{task.kind}:PATH`."
            )


def source_digest(location: Location) -> dict[str, str]:
    """Digest of the annotation file, where there is one without images in it."""
    path = Path(location.source)
    if location.revision is not None:
        return {"revision": location.revision}
    files = [path, *(path / name for name in ("metadata.jsonl", "metadata.csv"))]
    found = next((file for file in files if file.is_file() and file.suffix != ".parquet"), None)
    return {} if found is None else {"annotation_sha256": sha256_of_file(found)}


__all__ = [
    "MAX_NAMED",
    "CaptionData",
    "ClassificationData",
    "CrossLingualData",
    "ImageData",
    "Location",
    "RetrievalData",
    "TaskData",
    "check_counts",
    "image_keys",
    "locate",
    "named_column",
    "open_table",
    "source_digest",
]
