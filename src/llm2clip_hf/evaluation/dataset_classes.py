# SPDX-License-Identifier: Apache-2.0
"""Zero-shot tasks: images with labels, names of the classes, and templates."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .dataset_parts import (
    ClassificationData,
    Location,
    check_counts,
    digest_of,
    digest_of_lines,
    head,
    image_keys,
    open_table,
)
from .prompts import SINGLE_TEMPLATE


__all__ = ["load_classification"]


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
    fingerprint = {
        "labels_sha256": digest_of(labels),
        "class_names_sha256": digest_of_lines(names),
        "templates_sha256": digest_of_lines(templates),
    }
    for key, expected in (
        ("class_names_sha256", task.class_names_sha256),
        ("templates_sha256", task.templates_sha256),
    ):
        if expected is not None and fingerprint[key] != expected:
            raise ValueError(
                f"The {key.removesuffix('_sha256').replace('_', ' ')} are not OpenAI's (sha256 {fingerprint[key]}, "
                f"expected {expected}), so the result would not compare. To use others, run the data as "
                "`zero-shot:PATH?class_names=FILE`."
            )
    images = table.images
    if max_images is not None:
        images, keys, labels = head(images, max_images), keys[:max_images], labels[:max_images]
        counts["images"] = len(labels)
    return ClassificationData(images, keys, labels, names, templates, counts, fingerprint, skipped)


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
