# SPDX-License-Identifier: Apache-2.0
"""
The data of a task, checked: opened from a local copy or the Hub, counted, and given a fingerprint.

A count that differs from the definition is an error, because the numbers would not compare with anybody's.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...data import CaptionTable
from ...data.images import ImageSource
from .data import (
    CaptionData,
    Location,
    RetrievalData,
    TaskData,
    check_counts,
    head,
    image_keys,
    load_classification,
    load_cross_lingual,
    open_table,
    source_digest,
)
from .definitions import TaskDefinition


_ENDINGS = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
_NAME_FILES = ("classes.txt", "classes.json", "templates.txt")


def load_task_data(
    task: TaskDefinition,
    data_root: str | Path | None = None,
    *,
    on_bad_row: str = "error",
    max_images: int | None = None,
) -> TaskData:
    """Open and check the data of a task."""
    loaders: dict[str, Callable[[Location, str, int | None], TaskData]] = {
        "retrieval": _load_retrieval,
        "cross-lingual": load_cross_lingual,
        "zero-shot": load_classification,
        "cra": _load_caption_data,
    }
    if task.kind not in loaders:
        raise ValueError(f"Task `{task.name}` is of the kind {task.kind!r}. Choose from {sorted(loaders)}.")
    if max_images is not None and max_images < 2:
        raise ValueError(f"`max_images` must be at least 2, got {max_images}.")
    location = locate(task, data_root)
    try:
        return loaders[task.kind](location, on_bad_row, max_images)
    except ValueError as error:
        raise ValueError(f"Task `{task.name}`: {error}") from error


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


def _load_retrieval(location: Location, on_bad_row: str, max_images: int | None) -> RetrievalData:
    task = location.definition
    images, table, keys, skipped = _open_captioned(location, on_bad_row)
    captions = [list(table[row])[: task.first_captions] for row in range(len(table))]
    counts = {"images": len(captions), "captions": sum(map(len, captions))}
    check_counts(task, counts, "images", "captions")
    if task.captions_per_image is not None:
        for key, texts in zip(keys, captions):
            if len(texts) != task.captions_per_image:
                raise ValueError(
                    f"Image `{key}` has {len(texts)} captions, the definition says {task.captions_per_image}. "
                    "Complete the data."
                )
    if max_images is not None:
        captions = captions[:max_images]
        images, keys = head(images, max_images), keys[:max_images]
        counts = {"images": len(captions), "captions": sum(map(len, captions))}
    kept = CaptionTable(captions)
    fingerprint = {"captions_sha256": kept.sha256, **source_digest(location)}
    starts = table.offsets[: len(captions)].tolist()
    rows = np.array([start + place for start, texts in zip(starts, captions) for place in range(len(texts))])
    return RetrievalData(
        images=images,
        keys=keys,
        captions=kept,
        all_captions=table,
        rows=rows,
        counts=counts,
        fingerprint=fingerprint,
        skipped=skipped,
    )


def _open_captioned(
    location: Location, on_bad_row: str
) -> tuple[ImageSource, CaptionTable, list[str], dict[str, Any]]:
    from ...data import holds_image_paths, load_image_text

    task = location.definition
    options: dict[str, Any] = {"caption_columns": task.caption_columns, "on_bad_row": on_bad_row}
    if location.revision is None and holds_image_paths(location.source):
        if task.where:
            raise ValueError(
                "`where` needs a table with an image column, such as parquet. Select the rows beforehand."
            )
        loaded = load_image_text(
            location.source,
            image_column=task.image_column,
            image_root=task.image_root,
            split=task.split,
            subset=task.subset,
            default_split="test",
            **options,
        )
        keys = loaded.keys or [f"row {row}" for row in range(len(loaded))]
    else:
        table = open_table(location)
        loaded = load_image_text(table.dataset, image_column=table.image_column, **options)
        keys = image_keys(table, task)
        if len(loaded) != len(table):  # rows were skipped: which ones, the report says
            keys = [f"kept row {row}" for row in range(len(loaded))]
    report = loaded.report
    skipped = {"rows": report.bad_rows + report.too_few_texts, "texts": report.bad_texts, "examples": report.examples}
    return loaded.images, loaded.captions, keys, skipped if report.num_bad else {}


def _load_caption_data(location: Location, on_bad_row: str, max_images: int | None) -> CaptionData:
    from ...data import load_captions, open_source

    task = location.definition
    columns = None if task.caption_columns is None else list(task.caption_columns)
    source: Any = location.source
    for name in ("metadata.jsonl", "metadata.csv", "metadata.parquet"):
        if (Path(source) / name).is_file():
            source = str(Path(source) / name)
    key = task.key_column
    if key is None and Path(source).suffix in (".jsonl", ".json", ".csv", ".tsv"):
        # One row per caption is a form that tables of image paths may have.
        kinds = open_source(source, task.split, task.subset, "test")[0].kinds
        key = next((name for name in ("file_name", "image") if name in kinds), None)
    chosen: dict[str, Any] = {"split": task.split, "subset": task.subset, "default_split": "test"}
    if task.where:
        source, chosen = open_table(location).dataset, {}
    table = load_captions(source, columns=columns, image_column=key, on_bad_row=on_bad_row, **chosen)
    captions = [table[row] for row in range(len(table))]
    counts = {"images": len(captions), "captions": table.num_captions}
    check_counts(task, counts, "images", "captions")
    if max_images is not None:
        captions = captions[:max_images]
        counts = {"images": len(captions), "captions": sum(map(len, captions))}
    report = table.report
    skipped: dict[str, Any] = {}
    if report is not None and report.num_bad:
        skipped = {"rows": report.bad_rows, "texts": report.bad_texts, "examples": report.examples}
    fingerprint = {"captions_sha256": CaptionTable(captions).sha256, **source_digest(location)}
    return CaptionData(captions=captions, counts=counts, fingerprint=fingerprint, skipped=skipped)


__all__ = ["load_task_data", "locate"]
