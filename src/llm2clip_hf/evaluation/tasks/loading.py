# SPDX-License-Identifier: Apache-2.0
"""
The data of a task, checked: opened from a local copy or the Hub, counted, and given a fingerprint.

A count that differs from the definition is an error, because the numbers would not compare with anybody's.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data import CaptionTable
from ...data.images import ImageSource
from ...data.store.fingerprint import digest_of, lines_digest
from ..zero_shot import SINGLE_TEMPLATE
from .composition import load_composition, load_pairs
from .data import (
    MAX_NAMED,
    CaptionData,
    ClassificationData,
    CrossLingualData,
    Location,
    RetrievalData,
    TaskData,
    check_counts,
    head,
    image_keys,
    locate,
    named_column,
    open_table,
    source_digest,
)
from .definitions import TASKS, TaskDefinition


if TYPE_CHECKING:
    from ...data.image_sources import ImageTable
    from ...data.reports import LoadReport


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
        "composition": load_composition,
        "winoground": load_pairs,
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


def _load_retrieval(location: Location, on_bad_row: str, max_images: int | None) -> RetrievalData:
    task = location.definition
    images, table, keys, skipped = _open_captioned(location, on_bad_row)
    captions = [list(table[row])[: task.first_captions] for row in range(len(table))]
    check_counts(task, _counts(captions), "images", "captions")
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
    kept = CaptionTable(captions)
    starts = table.offsets[: len(captions)].tolist()
    rows = np.array([start + place for start, texts in zip(starts, captions) for place in range(len(texts))])
    return RetrievalData(
        images=images,
        keys=keys,
        captions=kept,
        all_captions=table,
        rows=rows,
        counts=_counts(captions),
        fingerprint={"captions_sha256": kept.sha256, **source_digest(location)},
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
    return loaded.images, loaded.captions, keys, _skipped(loaded.report)


def _counts(captions: Sequence[Sequence[str]]) -> dict[str, int]:
    return {"images": len(captions), "captions": sum(map(len, captions))}


def _skipped(report: "LoadReport | None") -> dict[str, Any]:
    if report is None or not report.num_bad:
        return {}
    rows = report.bad_rows + report.too_few_texts
    return {"rows": rows, "texts": report.bad_texts, "examples": report.examples}


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
    check_counts(task, _counts(captions), "images", "captions")
    captions = captions[:max_images]
    fingerprint = {"captions_sha256": CaptionTable(captions).sha256, **source_digest(location)}
    skipped = _skipped(table.report)
    return CaptionData(captions=captions, counts=_counts(captions), fingerprint=fingerprint, skipped=skipped)


_LANGUAGE_COLUMNS = ("langs", "languages", "language", "lang", "locale")
_TEXT_COLUMNS = ("texts", "names", "captions", "caption", "text")
_Texts = dict[str, list[tuple[int, str]]]


class _Collected:
    """Texts by language, each with its image; a text that is none is an error, or counted."""

    def __init__(self, policy: str) -> None:
        self.policy, self.texts, self.count, self.examples = policy, _Texts(), 0, list[str]()

    def add(self, language: str, image: int, key: str, entry: Any) -> None:
        for text in entry if isinstance(entry, (list, tuple)) else [entry]:
            if isinstance(text, str) and text.strip():
                self.texts.setdefault(language, []).append((image, text))
                continue
            place = f"Image `{key}`, language `{language}`,"
            if self.policy == "error":
                raise ValueError(
                    f'{place} has the text {text!r}. Mend it, or pass `on_bad_row="skip"` to leave it out.'
                )
            self.count += 1
            self.examples = [*self.examples, f"{place}: {text!r}"][:MAX_NAMED]


def load_cross_lingual(location: Location, on_bad_row: str, max_images: int | None) -> CrossLingualData:
    """Parallel lists of languages and texts, one row per image and language, or one split per language on the Hub."""
    task = location.definition
    hub = TASKS[task.name].hub if location.revision is not None and task.name in TASKS else None
    found = _Collected(on_bad_row)
    if hub is not None and hub.language_splits:
        images, keys = _read_language_splits(location, found)
    else:
        table = open_table(location)
        column = task.language_column or next((name for name in _LANGUAGE_COLUMNS if name in table.columns), None)
        if column is None:
            raise ValueError(
                f"`{table.name}` has no column of languages, such as {list(_LANGUAGE_COLUMNS[:3])}; it has "
                f"{table.columns}. Name it as `language_column`."
            )
        languages = table.column(column)
        is_parallel = any(isinstance(value, (list, tuple)) for value in languages)
        images, keys = (_read_parallel_lists if is_parallel else _read_language_rows)(table, task, languages, found)
    texts, skipped = _choose_languages(task, found.texts)
    if found.count:
        skipped |= {"texts": found.count, "examples": found.examples}

    def count() -> dict[str, int]:
        return {"images": len(keys), "captions": sum(map(len, texts.values())), "languages": len(texts)}

    check_counts(task, count(), "images", "captions", "languages")
    if max_images is not None:
        texts = {name: [(image, text) for image, text in rows if image < max_images] for name, rows in texts.items()}
        texts = {name: rows for name, rows in texts.items() if rows}
        images, keys = head(images, max_images), keys[:max_images]
    digest = digest_of([[name, [[keys[image], text] for image, text in rows]] for name, rows in sorted(texts.items())])
    return CrossLingualData(
        images=images,
        keys=keys,
        texts=texts,
        counts=count(),
        fingerprint={"texts_sha256": digest, **source_digest(location)},
        skipped=skipped,
    )


def _read_parallel_lists(
    table: "ImageTable", task: TaskDefinition, languages: list[Any], found: _Collected
) -> tuple[ImageSource, list[str]]:
    column = _text_column(table, task)
    keys = image_keys(table, task)
    for row, (names, entries) in enumerate(zip(languages, table.column(column))):
        if names is None or entries is None or len(names) != len(entries):
            lengths = [None if value is None else len(value) for value in (names, entries)]
            raise ValueError(
                f"Image `{keys[row]}` has {lengths[0]} languages and {lengths[1]} texts in column `{column}`. The "
                "lists must be parallel."
            )
        for name, entry in zip(names, entries):
            found.add(str(name), row, keys[row], entry)
    return table.images, keys


def _read_language_rows(
    table: "ImageTable", task: TaskDefinition, languages: list[Any], found: _Collected
) -> tuple[ImageSource, list[str]]:
    keys = image_keys(table, task, unique=False)
    if keys[0] == "row 0":
        raise ValueError(
            f"`{table.name}` has one row per language, and no column `image_id` to tell which rows show the same "
            "image. Name one as `key_column`."
        )
    numbers: dict[str, int] = {}
    first_rows: list[int] = []
    seen: set[tuple[str, str]] = set()
    for row, (key, language, entry) in enumerate(zip(keys, languages, table.column(_text_column(table, task)))):
        if (key, str(language)) in seen:
            raise ValueError(
                f"The image `{key}` has two rows for the language `{language}`, the second is row {row}. Put its "
                "texts into a list."
            )
        seen.add((key, str(language)))
        if key not in numbers:
            numbers[key] = len(numbers)
            first_rows.append(row)
        found.add(str(language), numbers[key], key, entry)
    return table.select(first_rows).images, list(numbers)


def _read_language_splits(location: Location, found: _Collected) -> tuple[ImageSource, list[str]]:
    task = location.definition
    images: ImageSource = []
    numbers: dict[str, int] = {}
    for language in task.languages or ():
        table = open_table(location, split=language)
        keys = image_keys(table, task)
        if not numbers:
            images, numbers = table.images, {key: row for row, key in enumerate(keys)}
        for key, entry in zip(keys, table.column(_text_column(table, task))):
            if key not in numbers:
                raise ValueError(f"Image `{key}` of the language `{language}` is not among those of the first one.")
            found.add(language, numbers[key], key, entry)
    return images, list(numbers)


def _choose_languages(task: TaskDefinition, texts: _Texts) -> tuple[_Texts, dict[str, Any]]:
    if missing := [name for name in task.languages or () if name not in texts]:
        raise ValueError(f"The data have no texts in {missing}; they have {sorted(texts)}.")
    wanted = task.languages or sorted(texts)
    small = [name for name in wanted if len({image for image, _ in texts[name]}) < task.min_images]
    kept = {name: texts[name] for name in wanted if name not in small}
    if not kept:
        raise ValueError(f"No language has texts for {task.min_images} images. Lower `min_images`.")
    return kept, {"languages_with_too_few_images": small} if small else {}


def load_classification(location: Location, on_bad_row: str, max_images: int | None) -> ClassificationData:
    task = location.definition
    table = open_table(location)
    keys = image_keys(table, task)
    values = table.column(task.label_column)
    skipped: dict[str, Any] = {}
    unlabelled = [row for row, value in enumerate(values) if value is None or isinstance(value, float)]
    if unlabelled:
        first = (
            f"Image `{keys[unlabelled[0]]}` has the label {values[unlabelled[0]]!r} in column `{task.label_column}`"
        )
        if on_bad_row == "error":
            raise ValueError(f'{first} ({len(unlabelled)} such rows). Label it, or pass `on_bad_row="skip"`.')
        skipped = {"rows": len(unlabelled), "examples": [first]}
        kept = [row for row in range(len(values)) if row not in set(unlabelled)]
        table, keys, values = table.select(kept), [keys[row] for row in kept], [values[row] for row in kept]
    names = _lines(task.class_names, "class_names")
    if names is None:
        names = table.class_names(task.label_column)
    if names is None and all(isinstance(value, str) for value in values):
        names = sorted(set(values))
    if not names:
        raise ValueError(
            f"The classes have no names: column `{task.label_column}` of `{table.name}` holds numbers, and there is "
            "no list of names. Give `class_names`, a file with one name per line in the order of the labels."
        )
    labels = _as_numbers(values, names, keys, task.label_column)
    if task.path is None and task.class_names is None:  # benchmarks write `apple_pie`
        names = [name.replace("_", " ") for name in names]
    templates = _lines(task.templates, "templates") or list(SINGLE_TEMPLATE)
    counts = {"images": len(table), "classes": len(names), "templates": len(templates)}
    check_counts(task, counts, "images", "classes", "templates")
    named = {"class_names": names, "templates": templates}
    fingerprint = {
        "labels_sha256": digest_of(labels),
        **{f"{name}_sha256": lines_digest(lines) for name, lines in named.items()},
    }
    for name in named:
        expected, actual = getattr(task, f"{name}_sha256"), fingerprint[f"{name}_sha256"]
        if expected not in (None, actual):
            raise ValueError(
                f"The {name.replace('_', ' ')} are not OpenAI's (sha256 {actual}, expected {expected}), so the result "
                "would not compare. To use others, run the data as `zero-shot:PATH?class_names=FILE`."
            )
    images = table.images
    if max_images is not None:
        images, keys, labels = head(images, max_images), keys[:max_images], labels[:max_images]
        counts["images"] = len(labels)
    return ClassificationData(
        images=images,
        keys=keys,
        labels=labels,
        class_names=names,
        templates=templates,
        counts=counts,
        fingerprint=fingerprint,
        skipped=skipped,
    )


def _text_column(table: "ImageTable", task: TaskDefinition) -> str:
    return named_column(table, task.text_column, _TEXT_COLUMNS, "text_column")


def _as_numbers(values: list[Any], names: list[str], keys: list[str], column: str) -> list[int]:
    position = {name: number for number, name in enumerate(names)}
    labels = []
    for key, value in zip(keys, values):
        number = position.get(value, -1) if isinstance(value, str) else int(value)
        if not 0 <= number < len(names):
            raise ValueError(
                f"Image `{key}` has the label {value!r} in column `{column}`, not one of {len(names)} classes."
            )
        labels.append(number)
    return labels


def _lines(value: str | Sequence[str] | None, name: str) -> list[str] | None:
    """A list of strings as it is, or the lines (or the JSON list) of a file."""
    if value is None or not isinstance(value, str):
        return None if value is None else list(value)
    path = Path(value)
    if not path.is_file():
        raise ValueError(f"The file `{path}` of `{name}` does not exist. See the documentation on how to write it.")
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        lines = text.splitlines()
    else:
        try:
            lines = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"The file `{path}` of `{name}` is not JSON: {error}.") from error
    if not isinstance(lines, list) or not lines:
        raise ValueError(f"The file `{path}` of `{name}` is empty or no list. Write one entry per line.")
    for number, line in enumerate(lines, 1):
        if not isinstance(line, str) or not line.strip():
            raise ValueError(f"Entry {number} of `{path}` is {line!r}, not a non-empty string.")
    return lines


__all__ = ["load_task_data"]
