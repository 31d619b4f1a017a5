# SPDX-License-Identifier: Apache-2.0
"""What the loaders of all kinds of tasks share: the types they return, opening, ids, counts and digests."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data import CaptionTable
from ..data.atomic import sha256_of_file
from ..data.image_tables import ImageTable, open_image_table
from ..data.images import ImageSource
from .definitions import TaskDefinition


@dataclass
class RetrievalData:
    """
    Images with captions, one `CaptionTable` row per image.

    `captions` are what the task measures. They are the rows `rows` of `all_captions`, all that the data hold.
    """

    images: ImageSource
    captions: CaptionTable
    keys: list[str]
    counts: dict[str, int]
    fingerprint: dict[str, str]
    all_captions: CaptionTable
    rows: np.ndarray
    skipped: dict[str, Any] = field(default_factory=dict)


@dataclass
class CrossLingualData:
    """Images, and per language texts with the image each belongs to."""

    images: ImageSource
    keys: list[str]
    texts: dict[str, list[tuple[int, str]]]
    counts: dict[str, int]
    fingerprint: dict[str, str]
    skipped: dict[str, Any] = field(default_factory=dict)


@dataclass
class ClassificationData:
    """Images with classes."""

    images: ImageSource
    keys: list[str]
    labels: list[int]
    class_names: list[str]
    templates: list[str]
    counts: dict[str, int]
    fingerprint: dict[str, str]
    skipped: dict[str, Any] = field(default_factory=dict)


@dataclass
class CaptionData:
    """Captions of images, without the images."""

    captions: list[list[str]]
    counts: dict[str, int]
    fingerprint: dict[str, str]
    skipped: dict[str, Any] = field(default_factory=dict)


TaskData = RetrievalData | CrossLingualData | ClassificationData | CaptionData


@dataclass(frozen=True)
class Location:
    """Where a task's data are: a path or a Hub name, with the definition's fields as they are in this copy."""

    source: str
    definition: TaskDefinition
    revision: str | None = None


def open_table(location: Location, split: str | None = None) -> ImageTable:
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


def image_keys(table: ImageTable, task: TaskDefinition, unique: bool = True) -> list[str]:
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


def digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def digest_of_lines(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def source_digest(location: Location) -> dict[str, str]:
    """Digest of the annotation file, where there is one without images in it."""
    path = Path(location.source)
    if location.revision is not None:
        return {"revision": location.revision}
    files = [path, *(path / name for name in ("metadata.jsonl", "metadata.csv"))]
    found = next((file for file in files if file.is_file() and file.suffix != ".parquet"), None)
    return {} if found is None else {"annotation_sha256": sha256_of_file(found)}
