# SPDX-License-Identifier: Apache-2.0
"""What the data of each kind of task are, and the loaders of classes and of texts in many languages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data import CaptionTable
from ...data.images import ImageSource
from ...data.store.fingerprint import digest_of, lines_digest
from ...files import sha256_of_file
from ..zero_shot import SINGLE_TEMPLATE
from .definitions import TASKS, TaskDefinition


if TYPE_CHECKING:
    from ...data.image_sources import ImageTable


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


_LANGUAGE_COLUMNS = ("langs", "languages", "language", "lang", "locale")
_TEXT_COLUMNS = ("texts", "names", "captions", "caption", "text")
_MAX_NAMED = 5
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
            self.examples = [*self.examples, f"{place}: {text!r}"][:_MAX_NAMED]


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


def _text_column(table: "ImageTable", task: TaskDefinition) -> str:
    column = task.text_column or next((name for name in _TEXT_COLUMNS if name in table.columns), None)
    if column is None:
        raise ValueError(f"`{table.name}` has no column of texts; it has {table.columns}. Name it as `text_column`.")
    return column


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


__all__ = ["load_classification", "load_cross_lingual"]
