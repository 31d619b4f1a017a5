# SPDX-License-Identifier: Apache-2.0
"""Which columns of a table hold captions: named by the user, or found by the names that public data sets use."""

import logging
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .captions import TURNS, as_texts, root_column


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
    """Caption columns by source name."""
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
    """`"string"`, `"list"` (of strings) or `"other"` of every column of some rows; the first text in it decides."""
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


_ROWS_PER_STEP = 8192
# A character that is surely no white space; a text without one is looked at in Python.
_VISIBLE = r"[!-~\pL\pN]"


class TextColumn(Sequence[Any]):
    """
    A column of texts or of lists of texts, from Arrow arrays that may differ in type (string, list of string, large).
    """

    def __init__(self, chunks: Sequence[pa.Array]) -> None:
        self._chunks = [chunk for chunk in chunks if len(chunk)]
        self._starts = [0]
        for chunk in self._chunks:
            self._starts.append(self._starts[-1] + len(chunk))

    @classmethod
    def concat(cls, columns: "Sequence[TextColumn]") -> "TextColumn":
        """The rows of several columns, one after the other, without a copy."""
        return cls([chunk for column in columns for chunk in column._chunks])

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, row: int) -> Any: ...

    @overload
    def __getitem__(self, row: slice) -> "TextColumn": ...

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            keep = np.zeros(len(self), dtype=bool)
            keep[row] = True
            if row.step is not None and row.step < 0:
                raise ValueError("A column of texts cannot be reversed by a slice. Use a positive step.")
            return self.filter(keep)
        if not 0 <= row < len(self):
            raise IndexError(f"Row {row} is out of range for {len(self)} rows.")
        chunk = bisect_right(self._starts, row) - 1
        return self._chunks[chunk][row - self._starts[chunk]].as_py()

    def __iter__(self) -> Iterator[Any]:
        for chunk in self._chunks:
            for start in range(0, len(chunk), _ROWS_PER_STEP):
                yield from chunk.slice(start, _ROWS_PER_STEP).to_pylist()

    def lengths(self) -> np.ndarray:
        """Number of texts of each row, int64."""
        if not self._chunks:
            return np.zeros(0, dtype=np.int64)
        return np.concatenate([_lengths(chunk) for chunk in self._chunks])

    def encoded(self, start: int, stop: int) -> tuple[np.ndarray, memoryview]:
        """Bytes of each text of some rows, int64, and their texts in UTF-8, one after the other."""
        parts = []
        for first, chunk in zip(self._starts, self._chunks):
            if first < stop and start < first + len(chunk):
                part = chunk.slice(max(start - first, 0), stop - max(start, first))
                parts.append((part.flatten() if _is_list(part.type) else part).cast(pa.large_string()))
        texts = pa.concat_arrays(parts) if len(parts) != 1 else parts[0]
        if not len(texts):
            return np.zeros(0, dtype=np.int64), memoryview(b"")
        _, offsets, content = texts.buffers()
        bounds = np.frombuffer(offsets, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
        return np.diff(bounds), memoryview(content)[bounds[0] : bounds[-1]]

    def filter(self, keep: np.ndarray) -> "TextColumn":
        """The rows where `keep` (bool, one per row) is set; chunks that stay whole are shared."""
        chunks = []
        for start, chunk in zip(self._starts, self._chunks):
            mask = keep[start : start + len(chunk)]
            chunks.append(chunk if mask.all() else chunk.filter(pa.array(mask)))
        return TextColumn(chunks)

    def group(self, order: np.ndarray, group_sizes: np.ndarray) -> "TextColumn":
        """Merge rows: the rows in the order `order`, cut into groups; each group becomes one list of texts."""
        # 64-bit offsets: the texts of all rows together may exceed 2 GiB.
        lists = pa.concat_arrays([_as_large_lists(chunk) for chunk in self._chunks]).take(pa.array(order))
        ends = np.concatenate([[0], np.cumsum(_lengths(lists))])
        borders = ends[np.concatenate([[0], np.cumsum(group_sizes)])]
        return TextColumn([pa.LargeListArray.from_arrays(pa.array(borders, pa.int64()), lists.flatten())])


def texts_to_array(rows: Sequence[str | Sequence[str]]) -> pa.Array:
    """Checked Python rows as one Arrow array: strings if every row is one, otherwise lists."""
    if all(isinstance(row, str) for row in rows):
        return pa.array(rows, pa.large_string())
    return pa.array([[row] if isinstance(row, str) else row for row in rows], pa.large_list(pa.large_string()))


def is_surely_clean(column: pa.Array) -> bool:
    """Whether every text is valid UTF-8 with a visible character; a `False` says that one may not be."""
    if column.null_count or not _is_texts(column.type):
        return False
    texts = column.flatten() if _is_list(column.type) else column
    if texts.null_count:
        return False
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return bool(pc.all(pc.match_substring_regex(texts, _VISIBLE), min_count=0).as_py())


def to_python(column: pa.Array) -> list[Any]:
    """The values of a column; texts that are not UTF-8 come as the `bytes` they are."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(column, row) for row in range(len(column))]


def column_kind(kind: pa.DataType) -> str:
    """`"string"`, `"list"` (of strings) or `"other"`."""
    if _is_list(kind):
        return "list" if _is_string(kind.value_type) else "other"
    return "string" if _is_string(kind) else "other"


def arrow_kinds(schema: pa.Schema) -> dict[str, str]:
    """`column_kind` of every column, of the texts inside structs (`json.a.b`) too; a conversation is a `"list"`."""
    kinds: dict[str, str] = {}

    def add(name: str, kind: pa.DataType, is_entry: bool) -> None:
        kind = _plain_type(kind)
        found = "list" if _is_conversation(kind) else column_kind(kind)
        if not is_entry or found != "other":
            kinds[name] = found
        if pa.types.is_struct(kind):
            for entry in kind:
                add(f"{name}.{entry.name}", entry.type, True)

    for column in schema:
        add(column.name, column.type, False)
    return kinds


def arrow_entry(columns: Mapping[str, pa.Array], name: str) -> pa.Array | list[Any]:
    """The column `name`, or the entry of a struct that it names, with texts of the usual types."""
    root = root_column(columns, name)
    values = columns[root]
    for part in name[len(root) + 1 :].split(".") if name != root else ():
        values = pc.struct_field(values, part)
    if _is_conversation(_plain_type(values.type)):
        return [as_texts(value) for value in to_python(values)]
    plain = _plain_type(values.type)
    return values if plain == values.type else values.cast(plain)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The type with strings and lists in place of views and dictionaries of them."""
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if _is_list(kind) and _plain_type(kind.value_type) != kind.value_type:
        return pa.large_list(_plain_type(kind.value_type))
    return kind


def _is_conversation(kind: pa.DataType) -> bool:
    if not _is_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    names = {field.name for field in kind.value_type}
    return any({speaker, text} <= names for speaker, text in TURNS)


def _value(column: pa.Array, row: int) -> Any:
    try:
        return column[row].as_py()
    except UnicodeDecodeError:
        binary = pa.large_list(pa.large_binary()) if _is_list(column.type) else pa.large_binary()
        return column.slice(row, 1).cast(binary)[0].as_py()


def _as_large_lists(chunk: pa.Array) -> pa.LargeListArray:
    if _is_list(chunk.type):
        return chunk.cast(pa.large_list(pa.large_string()))
    return pa.LargeListArray.from_arrays(
        pa.array(np.arange(len(chunk) + 1), pa.int64()), chunk.cast(pa.large_string())
    )


def _lengths(chunk: pa.Array) -> np.ndarray:
    if not _is_list(chunk.type):
        return np.ones(len(chunk), dtype=np.int64)
    return pc.list_value_length(chunk).to_numpy(zero_copy_only=False).astype(np.int64)


def _is_texts(kind: pa.DataType) -> bool:
    return column_kind(kind) != "other"


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def image_columns(schema: pa.Schema) -> list[str]:
    """The columns of bytes, or of structs with bytes, as those of `datasets.Image` are."""

    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return any(entry.name == "bytes" for entry in kind)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))

    return [column.name for column in schema if holds_bytes(column.type)]
