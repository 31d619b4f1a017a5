# SPDX-License-Identifier: Apache-2.0
"""Which columns of a table hold captions: named by the user, or found by the names that public data sets use."""

import re
from collections.abc import Iterable, Mapping, Sequence


# `caption(s)`, `raw_caption`, `shortIB_captions`, `dense_caption`, ... and DreamLIP's kinds without the ending.
_CAPTION_NAME = re.compile(r"(?:.+_)?captions?|raw|short|long", re.IGNORECASE)
_OTHER_NAMES = ("text", "texts", "sentences", "conversations", "messages")


def resolve_caption_columns(
    columns: str | Sequence[str] | Mapping[str, str] | None, kinds: Mapping[str, str], name: str
) -> dict[str, str]:
    """
    Caption columns by source name.

    Args:
        columns: column names; or a mapping from source name to column name; or None to find them.
        kinds: `"string"`, `"list"` or `"other"` of every column.
        name: of the table, for messages.

    Raises:
        ValueError: if a column is absent or holds no text, or none is found; the message names the columns.
    """
    where = f"`{name}`" if name else "The table"
    if columns is None:
        found = [column for column, kind in kinds.items() if kind != "other" and _CAPTION_NAME.fullmatch(column)]
        found = found or [column for column in _OTHER_NAMES if kinds.get(column, "other") != "other"][:1]
        if not found:
            raise ValueError(
                f"{where} has no column that is known to hold captions; it has {describe_kinds(kinds)}. Name the "
                "caption columns with `columns`."
            )
        return {column: column for column in found}
    if isinstance(columns, str):
        columns = [columns]
    chosen = dict(columns) if isinstance(columns, Mapping) else {column: column for column in columns}
    if not chosen:
        raise ValueError("`columns` is empty. Name at least one caption column, or pass None to find them.")
    check_columns(chosen.values(), kinds, name)
    return chosen


def check_columns(columns: Iterable[str], kinds: Mapping[str, str], name: str) -> None:
    """Raises unless every column exists and holds strings or lists of strings."""
    where = f"`{name}`" if name else "The table"
    for column in columns:
        if column not in kinds:
            raise ValueError(f"{where} has no column `{column}`; it has {describe_kinds(kinds)}.")
        if kinds[column] == "other":
            raise ValueError(
                f"Column `{column}` of {where} holds neither strings nor lists of strings; the table has "
                f"{describe_kinds(kinds)}."
            )


def describe_kinds(kinds: Mapping[str, str]) -> str:
    """The columns with what they hold, for messages."""
    names = {"string": "string", "list": "list of strings", "other": "no text"}
    return ", ".join(f"`{column}` ({names[kind]})" for column, kind in kinds.items()) or "no column"
