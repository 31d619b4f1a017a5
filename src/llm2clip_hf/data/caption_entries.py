# SPDX-License-Identifier: Apache-2.0
"""Captions that lie deeper than a column: entries of mappings (`json.a.b`), and conversations about an image."""

from collections.abc import Iterable, Mapping
from typing import Any


TURNS = (("from", "value"), ("role", "content"))  # of LLaVA and ShareGPT4V; of chat templates
_NOT_THE_MODEL = ("human", "user", "system", "tool")


def root_column(columns: Iterable[str], name: str) -> str:
    """The column that holds `name`, which is a column or an entry such as `json.a.b`."""
    known, parts = set(columns), name.split(".")
    found = [root for k in range(len(parts), 0, -1) if (root := ".".join(parts[:k])) in known]
    return found[0] if found else name


def entry_of(record: Any, name: str) -> Any:
    """The value of `name` in a mapping, or of the entry of an inner mapping that it names; None if it is absent."""
    if not isinstance(record, Mapping):
        return None
    root = root_column(record, name)
    return record.get(root) if root == name else entry_of(record[root], name[len(root) + 1 :])


def with_entries(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row with the texts inside mappings as further columns (`json.a.b`), and conversations as lists of texts."""
    if not any(isinstance(value, (list, Mapping)) for value in record.values()):
        return record
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat[name] = as_texts(value)
        if isinstance(value, Mapping):
            flat |= {f"{name}.{entry}": inner for entry, inner in with_entries(value).items()}
    return flat


def as_texts(value: Any) -> Any:
    """What the model says in a conversation, turn by turn, as LLaVA and ShareGPT4V write it; else the value."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, Mapping) for turn in value):
        return value
    for speaker, text in TURNS:
        if all(speaker in turn and text in turn for turn in value):
            said = [turn[text] for turn in value if turn[speaker] not in _NOT_THE_MODEL]
            return [_joined(parts) if isinstance(parts, list) else parts for parts in said]
    return value


def _joined(parts: list[Any]) -> str:
    return " ".join(part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str))
