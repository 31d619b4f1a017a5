# SPDX-License-Identifier: Apache-2.0
"""Which columns of a table hold captions: named by the user, or found by the names that public data sets use."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


logger = logging.getLogger(__name__)

# `caption(s)`, `raw_caption`, `shortIB_captions`, `dense_caption`, ... and DreamLIP's kinds without the ending.
_CAPTION_NAME = re.compile(r"(?:.+_)?captions?|raw|short|long", re.IGNORECASE)
_OTHER_NAMES = ("text", "texts", "sentences", "conversations", "messages")
# Captions that are wrong for their image on purpose: `negative_caption`, `hard_neg_captions`, `foil_caption`, ...
_NEGATIVE_WORD = re.compile(
    r"neg|negs|negatives?|hn|hard|hardneg\w*|distractors?|foils?|false|wrong|incorrect|mismatched|unmatched|corrupted|"
    r"contradict\w*|adversarial|counterfactual|irrelevant|unrelated|rejected",
    re.IGNORECASE,
)


def resolve_caption_columns(
    columns: str | Sequence[str] | Mapping[str, str] | None, kinds: Mapping[str, str], name: str
) -> dict[str, str]:
    """
    Caption columns by source name.

    Args:
        columns: column names; or a mapping from source name to column name; or None to find them, which leaves out
            those that their name calls negatives.
        kinds: `"string"`, `"list"` or `"other"` of every column.
        name: of the table, for messages.

    Raises:
        ValueError: if a column is absent or holds no text, or none is found; the message names the columns.
    """
    where = f"`{name}`" if name else "The table"
    if columns is None:
        found = [column for column, kind in kinds.items() if kind != "other" and _CAPTION_NAME.fullmatch(column)]
        if negatives := [column for column in found if _is_negative(column)]:
            found = [column for column in found if column not in negatives]
            logger.warning(
                "%s: the columns %s are not read, since their names say that they hold wrong captions. Name all "
                "caption columns to read them too.",
                where,
                negatives,
            )
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


def learn_kinds(rows: Iterable[Mapping[str, Any]], of_null: str = "other") -> dict[str, str]:
    """
    `"string"`, `"list"` (of strings) or `"other"` of every column of some rows; the first text in it decides.

    Args:
        rows: from column name to value; they may have different columns.
        of_null: kind of a column that is null in all of them.
    """
    kinds: dict[str, str | None] = {}
    for row in rows:
        for name, value in row.items():
            if kinds.get(name) in (None, "other"):
                kinds[name] = _kind_of(value) or kinds.get(name)
    return {name: kind or of_null for name, kind in kinds.items()}


def _kind_of(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        return "string"
    is_texts = isinstance(value, (list, tuple)) and all(isinstance(text, str) or text is None for text in value)
    return "list" if is_texts else "other"


def _is_negative(column: str) -> bool:
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", column)  # of `neg1_caption` and `hardNegative_caption` too
    return any(map(_NEGATIVE_WORD.fullmatch, words))


def describe_kinds(kinds: Mapping[str, str]) -> str:
    """The columns with what they hold, for messages."""
    names = {"string": "string", "list": "list of strings", "other": "no text"}
    return ", ".join(f"`{column}` ({names[kind]})" for column, kind in kinds.items()) or "no column"
