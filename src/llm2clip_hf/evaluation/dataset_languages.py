# SPDX-License-Identifier: Apache-2.0
"""Cross-lingual tasks: images with texts in many languages, as parallel lists, as rows, or as splits on the Hub."""

from typing import Any

from ..data.image_tables import ImageTable
from ..data.images import ImageSource
from .dataset_parts import (
    CrossLingualData,
    Location,
    check_counts,
    digest_of,
    head,
    image_keys,
    open_table,
    source_digest,
)
from .definitions import TASKS, TaskDefinition


__all__ = ["load_cross_lingual"]

_LANGUAGE_COLUMNS = ("langs", "languages", "language", "lang", "locale")
_TEXT_COLUMNS = ("texts", "names", "captions", "caption", "text")
_MAX_NAMED = 5

_Texts = dict[str, list[tuple[int, str]]]


def load_cross_lingual(location: Location, on_bad_row: str, max_images: int | None) -> CrossLingualData:
    task = location.definition
    hub = TASKS[task.name].hub if location.revision is not None and task.name in TASKS else None
    texts: _Texts = {}
    bad = _BadTexts(on_bad_row)
    if hub is not None and hub.language_splits:
        images, keys = _read_language_splits(location, texts, bad)
    else:
        table = open_table(location)
        column = task.language_column or next((name for name in _LANGUAGE_COLUMNS if name in table.columns), None)
        if column is None:
            raise ValueError(
                f"`{table.name}` has no column of languages, such as {list(_LANGUAGE_COLUMNS[:3])}; it has "
                f"{table.columns}. Name it as `language_column`."
            )
        languages = table.column(column)
        if any(isinstance(value, (list, tuple)) for value in languages):
            images, keys = _read_parallel_lists(table, task, languages, texts, bad)
        else:
            images, keys = _read_language_rows(table, task, languages, texts, bad)
    texts, skipped = _choose_languages(task, texts)
    skipped |= bad.record()
    counts = {"images": len(keys), "captions": sum(map(len, texts.values())), "languages": len(texts)}
    check_counts(task, counts, "images", "captions", "languages")
    if max_images is not None:
        texts = {name: [(image, text) for image, text in rows if image < max_images] for name, rows in texts.items()}
        texts = {name: rows for name, rows in texts.items() if rows}
        images, keys = head(images, max_images), keys[:max_images]
        counts = {"images": len(keys), "captions": sum(map(len, texts.values())), "languages": len(texts)}
    digest = digest_of([[name, [[keys[image], text] for image, text in rows]] for name, rows in sorted(texts.items())])
    return CrossLingualData(images, keys, texts, counts, {"texts_sha256": digest, **source_digest(location)}, skipped)


class _BadTexts:
    """Texts that are none: an error, or counted."""

    def __init__(self, policy: str) -> None:
        self.policy, self.count, self.examples = policy, 0, list[str]()

    def refuses(self, text: Any, place: str) -> bool:
        if isinstance(text, str) and text.strip():
            return False
        if self.policy == "error":
            raise ValueError(f'{place} has the text {text!r}. Mend it, or pass `on_bad_row="skip"` to leave it out.')
        self.count += 1
        self.examples = [*self.examples, f"{place}: {text!r}"][:_MAX_NAMED]
        return True

    def record(self) -> dict[str, Any]:
        return {"texts": self.count, "examples": self.examples} if self.count else {}


def _text_column(table: ImageTable, task: TaskDefinition) -> str:
    column = task.text_column or next((name for name in _TEXT_COLUMNS if name in table.columns), None)
    if column is None:
        raise ValueError(f"`{table.name}` has no column of texts; it has {table.columns}. Name it as `text_column`.")
    return column


def _add(texts: _Texts, language: str, image: int, entry: Any, place: str, bad: _BadTexts) -> None:
    for text in entry if isinstance(entry, (list, tuple)) else [entry]:
        if not bad.refuses(text, f"{place}, language `{language}`,"):
            texts.setdefault(language, []).append((image, text))


def _read_parallel_lists(
    table: ImageTable,
    task: TaskDefinition,
    languages: list[Any],
    texts: _Texts,
    bad: _BadTexts,
) -> tuple[ImageSource, list[str]]:
    column = _text_column(table, task)
    keys = image_keys(table, task)
    for row, (names, entries) in enumerate(zip(languages, table.column(column))):
        if names is None or entries is None or len(names) != len(entries):
            found = [None if value is None else len(value) for value in (names, entries)]
            raise ValueError(
                f"Image `{keys[row]}` has {found[0]} languages and {found[1]} texts in column `{column}`. The lists "
                "must be parallel."
            )
        for name, entry in zip(names, entries):
            _add(texts, str(name), row, entry, f"Image `{keys[row]}`", bad)
    return table.images, keys


def _read_language_rows(
    table: ImageTable,
    task: TaskDefinition,
    languages: list[Any],
    texts: _Texts,
    bad: _BadTexts,
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
        _add(texts, str(language), numbers[key], entry, f"Image `{key}`", bad)
    return table.select(first_rows).images, list(numbers)


def _read_language_splits(location: Location, texts: _Texts, bad: _BadTexts) -> tuple[ImageSource, list[str]]:
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
            _add(texts, language, numbers[key], entry, f"Image `{key}`", bad)
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
