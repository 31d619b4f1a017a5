# SPDX-License-Identifier: Apache-2.0
"""Pure text for caption-contrastive tuning: pairs and triplets such as the E5 data, dropout pairs of plain text."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .caption_pairs import PairDataset
from .captions import kinds_of
from .columns import check_columns, describe_kinds
from .reports import BadRows, LoadReport, describe_place, text_problem
from .sampling import random_bits
from .sources import good_blocks, open_text_source


if TYPE_CHECKING:
    from .columns import TextColumn
    from .sources import Block, TextSource


__all__ = ["DropoutPairDataset", "TextPairDataset"]

# Streams of `random_bits`; every kind of choice has its own number.
_POSITIVE, _NEGATIVE = 40, 41

# Names that public data sets use: E5/echo, sentence-transformers, BGE.
_ROLE_NAMES = {
    "anchor": ("anchor", "query", "sentence1"),
    "positive": ("positive", "positives", "pos", "sentence2"),
    "negative": ("negative", "negatives", "neg", "hard_negative", "hard_negatives"),
}


class TextPairDataset(PairDataset):
    """
    Text pairs or triplets with an optional instruction: the pure-text part of the stage-1 data.

    Every row gives `{"anchor": str, "positive": str, ["negative": str,] "label": int}`. Of several positives or
    negatives one is drawn uniformly, as a pure function of `(seed, epoch, row)`. Rows with equal anchors have equal
    labels, so they are never each other's negatives. Source: paper section 4.1, 1.5 M text pairs of the E5 data, one
    file and one instruction per task.

    Args:
        source: as for `load_captions`; a row is for example `{"query": "...", "positive": "...", "negative": "..."}`.
        columns (mapping, *optional*):
            Column of each role: `"anchor"` and `"positive"`, and `"negative"` for triplets, of strings or lists of
            strings (the anchor: strings). By default the columns called `anchor`, `query` or `sentence1`;
            `positive(s)`, `pos` or `sentence2`; and, if there is one, `negative(s)`, `neg` or `hard_negative(s)`.
        instruction (`str`, *optional*): instruction of the anchor column; positives and negatives get none.
        seed (`int`, defaults to 0): seed of the draws.
        split (`str`, *optional*): as for `load_captions`.
        subset (`str`, *optional*): as for `load_captions`.
        on_bad_row (`str`, defaults to `"error"`):
            `"error"` raises at the first text that is null, empty, or equal to another one of its row where it must
            differ: a positive to the anchor, a negative to either. `"skip"` leaves these texts out, and rows without
            anchor, positive or negative then, counts them, and logs one warning.

    Attributes:
        report (`LoadReport`): what was read and left out.

    Raises:
        ValueError: if the columns cannot be found, no row is left, or, with `on_bad_row="error"`, a row is bad.

    Example:
    >>> rows = [{"query": "capital of France?", "pos": ["Paris is it."], "neg": ["Rome is in Italy.", "A cheese."]}]
    >>> pairs = TextPairDataset(rows, instruction="Given a question, retrieve passages that answer it.")
    >>> pairs[0]["positive"], pairs[0]["negative"] in rows[0]["neg"], pairs[0]["label"]
    ('Paris is it.', True, 0)
    """

    def __init__(
        self,
        source: Any,
        *,
        columns: Mapping[str, str] | None = None,
        instruction: str | None = None,
        seed: int = 0,
        split: str | None = None,
        subset: str | None = None,
        on_bad_row: str = "error",
    ) -> None:
        bad = BadRows(on_bad_row)
        sources = open_text_source(source, split, subset)
        roles = _resolve_roles(columns, kinds_of(sources), sources[0].name)
        self._columns, self._labels = _read_pairs(sources, roles, bad)
        super().__init__(len(self._labels), seed, instruction, has_negatives="negative" in roles)
        self.report = _finish_report(self._columns, bad, "the text pairs")

    def _draw(self, epoch: int, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        positives = random_bits(self._seed, epoch, rows, _POSITIVE).tolist()
        negatives = random_bits(self._seed, epoch, rows, _NEGATIVE).tolist()
        for row, positive, negative in zip(rows.tolist(), positives, negatives):
            drawn = {
                "anchor": self._columns["anchor"][row],
                "positive": _choose(self._columns["positive"][row], positive),
            }
            if "negative" in self._columns:
                drawn["negative"] = _choose(self._columns["negative"][row], negative)
            yield drawn | {"label": int(self._labels[row])}


class DropoutPairDataset(PairDataset):
    """
    Sentences paired with themselves: unsupervised SimCSE (https://huggingface.co/papers/2104.08821).

    Every line of running text gives `{"anchor": text, "positive": text, "label": int}`; dropout in the encoder makes
    the two embeddings differ. Equal lines have equal labels. Lines that are blank, headings as in wikitext
    (`= Title =`) or too short are left out and counted in `report.not_sentences`.

    Args:
        source: path of a text file with one text per line, a sequence of lines, or as for `load_captions` (for
            example the Hub data set `"Salesforce/wikitext"`).
        column (`str`, defaults to `"text"`): column with the lines, where the source has columns.
        min_characters (`int`, defaults to 20): shorter lines are left out.
        instruction (`str`, *optional*): instruction of the anchor column; positives get none.
        split (`str`, *optional*): as for `load_captions`.
        subset (`str`, *optional*): as for `load_captions`, for example `"wikitext-103-raw-v1"`.
        on_bad_row (`str`, defaults to `"error"`): what to do with lines that are null or not UTF-8: `"error"` raises,
            `"skip"` leaves them out, counts them, and logs one warning.

    Attributes:
        report (`LoadReport`): what was read and left out.

    Raises:
        ValueError: if no line is left or, with `on_bad_row="error"`, a line is bad.

    Example:
    >>> pairs = DropoutPairDataset([" = Cats = ", "", "Cats are small carnivorous mammals."])
    >>> pairs[0]["anchor"] == pairs[0]["positive"], len(pairs), pairs.report.not_sentences
    (True, 1, 2)
    """

    def __init__(
        self,
        source: Any,
        *,
        column: str = "text",
        min_characters: int = 20,
        instruction: str | None = None,
        split: str | None = None,
        subset: str | None = None,
        on_bad_row: str = "error",
    ) -> None:
        bad = BadRows(on_bad_row)
        if isinstance(source, Sequence) and not isinstance(source, str) and all(isinstance(x, str) for x in source):
            source = {column: source}
        sources = open_text_source(source, split, subset)
        check_columns([column], kinds_of(sources), sources[0].name)
        self._texts, self._labels = _read_sentences(sources, column, min_characters, bad)
        super().__init__(len(self._labels), 0, instruction, has_negatives=False)
        self.report = _finish_report({"anchor": self._texts}, bad, "the text lines")

    def _draw(self, epoch: int, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        for row in rows.tolist():
            text = self._texts[row]
            yield {"anchor": text, "positive": text, "label": int(self._labels[row])}


def _choose(texts: str | Sequence[str], bits: int) -> str:
    return texts if isinstance(texts, str) else texts[bits % len(texts)]


def _resolve_roles(columns: Mapping[str, str] | None, kinds: Mapping[str, str], name: str) -> dict[str, str]:
    where = f"`{name}`" if name else "The table"
    if columns is None:
        found = {role: [column for column in names if column in kinds] for role, names in _ROLE_NAMES.items()}
        if not found["anchor"] or not found["positive"]:
            raise ValueError(
                f"{where} has no columns that are known to hold text pairs, such as `query` and `positive`; it has "
                f"{describe_kinds(kinds)}. Name them: "
                '`columns={"anchor": ..., "positive": ..., "negative": ...}`.'
            )
        if several := [names for names in found.values() if len(names) > 1]:
            raise ValueError(f"{where} has several columns for one role: {several[0]}. Choose with `columns`.")
        columns = {role: names[0] for role, names in found.items() if names}
    if not {"anchor", "positive"} <= set(columns) <= set(_ROLE_NAMES):
        raise ValueError(
            f'`columns` names the roles {sorted(columns)}. Expected "anchor", "positive", and "negative" for triplets.'
        )
    check_columns(columns.values(), kinds, name)
    if kinds[columns["anchor"]] != "string":
        raise ValueError(f"The anchor column `{columns['anchor']}` of {where} holds lists. Anchors are strings.")
    return {role: columns[role] for role in _ROLE_NAMES if role in columns}


def _read_pairs(
    sources: "list[TextSource]", roles: Mapping[str, str], bad: BadRows
) -> "tuple[dict[str, TextColumn], np.ndarray]":
    from .columns import TextColumn, texts_to_array, to_python

    chunks: dict[str, list[Any]] = {role: [] for role in roles}
    hashes = array("q")
    for block in good_blocks(sources, list(roles.values()), bad):
        values = [block.columns[column] for column in roles.values()]
        rows = []
        lists = [value if isinstance(value, list) else to_python(value) for value in values]
        for number, *entry in zip(block.numbers, *lists):
            if (row := _clean_row(dict(zip(roles, entry)), block, number, bad)) is not None:
                rows.append(row)
                hashes.append(hash(row["anchor"]))
        for role, chunk in chunks.items():
            chunk.append(texts_to_array([row[role] for row in rows]))
    _refuse_nothing(len(hashes), bad)
    return {role: TextColumn(chunk) for role, chunk in chunks.items()}, _labels(hashes)


def _clean_row(entry: Mapping[str, Any], block: "Block", number: int, bad: BadRows) -> dict[str, Any] | None:
    """The usable texts of each role, or None if a role has none."""
    where = describe_place(block.file, block.unit, number)
    seen: set[str] = set()
    row: dict[str, Any] = {}
    for role, value in entry.items():
        kept: dict[str, None] = {}
        for text in value if isinstance(value, (list, tuple)) and role != "anchor" else [value]:
            problem = text_problem(text)
            if problem is None and text in seen:
                problem = f"equals {'the anchor' if role == 'positive' else 'the anchor or a positive'}"
            if problem is not None:
                bad.add("bad_texts", where, f"the {role} {problem}: {str(text)[:60]!r}")
            else:
                kept[text] = None
        if not kept:
            bad.add("too_few_texts", where, f"the row has no usable {role}")
            return None
        seen.update(kept)
        # A single text is kept as a string, which takes less room than a list.
        row[role] = next(iter(kept)) if len(kept) == 1 else list(kept)
    return row


def _read_sentences(
    sources: "list[TextSource]", column: str, min_characters: int, bad: BadRows
) -> "tuple[TextColumn, np.ndarray]":
    from .columns import TextColumn, texts_to_array, to_python

    chunks, hashes = [], array("q")
    for block in good_blocks(sources, [column], bad):
        values = block.columns[column]
        kept = []
        for number, line in zip(block.numbers, values if isinstance(values, list) else to_python(values)):
            text = line.strip() if isinstance(line, str) else line
            if isinstance(text, str) and (len(text) < min_characters or (text[:1] == "=" and text[-1:] == "=")):
                bad.report.not_sentences += 1
            elif problem := text_problem(text):
                bad.add("bad_texts", describe_place(block.file, block.unit, number), f"the line {problem}")
            else:
                kept.append(text)
                hashes.append(hash(text))
        chunks.append(texts_to_array(kept))
    _refuse_nothing(len(hashes), bad)
    return TextColumn(chunks), _labels(hashes)


def _labels(hashes: "array[int]") -> np.ndarray:
    """First row with the same text, for each row; texts by their 64-bit hashes, which all but never collide."""
    _, first, inverse = np.unique(np.array(hashes, dtype=np.int64), return_index=True, return_inverse=True)
    return first[inverse]


def _refuse_nothing(rows: int, bad: BadRows) -> None:
    if not rows:
        raise ValueError(
            f"No usable row among {bad.report.rows_read} rows ({bad.report.not_sentences} blank, short or heading "
            f"lines). First problems: {bad.report.examples or 'none'}."
        )


def _finish_report(columns: "Mapping[str, TextColumn]", bad: BadRows, name: str) -> LoadReport:
    bad.report.rows_kept = len(columns["anchor"])
    bad.report.texts_kept = sum(int(column.lengths().sum()) for column in columns.values())
    bad.report.log(name)
    return bad.report
