# SPDX-License-Identifier: Apache-2.0
"""Map-style pairs for caption-contrastive tuning: of captions, of text data such as E5's, and of plain text."""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from .captions import Captions, CaptionTable
from .columns import TextColumn, check_columns, describe_kinds, texts_to_array
from .records import TextSource
from .reports import BadRows, LoadReport, describe_place, text_problem
from .sampling import draw_pair, pair_bits, random_bits, resolve_sides, side_pairs
from .sources import good_blocks, kinds_of, open_source


_ROWS_PER_STEP = 8192
# Streams of `random_bits`; every kind of choice has its own number, hard negatives one per attempt.
_POSITIVE, _NEGATIVE, _HARD_NEGATIVE = 40, 41, 100
_NEGATIVE_DRAWS = 32
# Names that public data sets use: E5/echo, sentence-transformers, BGE.
_ROLE_NAMES = {
    "anchor": ("anchor", "query", "sentence1"),
    "positive": ("positive", "positives", "pos", "sentence2"),
    "negative": ("negative", "negatives", "neg", "hard_negative", "hard_negatives"),
}


class PairDataset(torch.utils.data.Dataset):
    """Rows `{"anchor": str, "positive": str, ["negative": str,] "label": int}`, drawn anew each epoch."""

    def __init__(self, num_rows: int, seed: int, instruction: str | None, has_negatives: bool) -> None:
        self._num_rows = num_rows
        self._seed = seed
        self.instruction = instruction
        self.column_names = ("anchor", "positive", *(["negative"] if has_negatives else []), "label")
        # In shared memory, so that the workers of a loader with `persistent_workers=True` see `set_epoch`.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self._num_rows

    def set_epoch(self, epoch: int) -> None:
        """Draw the pairs of epoch `epoch` from the next access on, in worker processes too."""
        self._epoch.fill_(epoch)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows at once, as the loaders of torch ask for a batch."""
        for row in rows:
            if not 0 <= row < len(self):
                raise IndexError(f"Row {row} is out of range for {len(self)} rows.")
        return list(self._draw(int(self._epoch), np.asarray(rows, dtype=np.int64)))

    def to_dataset(self) -> datasets.Dataset:
        """The rows of the current epoch as a `datasets.Dataset`."""
        kinds = {name: datasets.Value("int64" if name == "label" else "string") for name in self.column_names}
        parts = []
        # Step by step into Arrow: millions of rows never are Python objects at once.
        for start in range(0, len(self), _ROWS_PER_STEP):
            rows = list(self._draw(int(self._epoch), np.arange(start, min(start + _ROWS_PER_STEP, len(self)))))
            columns = {name: [row[name] for row in rows] for name in self.column_names}
            parts.append(datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)))
        return datasets.concatenate_datasets(parts)

    def _draw(self, epoch: int, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        raise NotImplementedError


class CaptionPairDataset(PairDataset):
    """
    Two distinct captions per image, drawn anew each epoch: the positives of caption-contrastive tuning.

    Every image gives one row `{"anchor": str, "positive": str, "label": int}`, with `"negative": str` before the label
    if `hard_negatives` is set. The label is the number of the image: rows of equal label are never each other's
    negatives. By default the pair is drawn uniformly among the distinct captions of the image (over all its sources),
    without replacement. All draws are pure functions of `(seed, epoch, row)`. Source: paper section 3.1, any two
    captions of an image are positives.

    Args:
        captions: as for `CaptionTable`, or a `CaptionTable`; at least two distinct captions per image.
        seed (`int`, defaults to 0): seed of the draws.
        hard_negatives (`bool`, defaults to `False`):
            Add a random caption of another image, from the same source as the positive and different in text from all
            captions of the anchor's image. Source: released stage-1 data code.
        pair_sources (two name patterns, *optional*):
            Draw the two captions from two kinds of sources, for example `("short*", "long*")`: a coin per row decides
            which of the two is the anchor's. Patterns as in `fnmatch`. Source: released stage-1 data code.
        instruction (`str`, *optional*):
            Instruction of the anchor column; positives and negatives get none. For a trainer to read; the texts stay
            as they are. The paper's is "Given a caption, retrieve a similar relevant caption." (section 3.1).

    Attributes:
        table (`CaptionTable`): the captions.

    Raises:
        ValueError: if an image has fewer than two distinct captions (the message names the row), no caption in one of
            the `pair_sources`, or there is no caption to draw negatives from.

    Example:
    >>> pairs = CaptionPairDataset([["a cat", "a grey cat", "a cat asleep"]], seed=1)
    >>> pairs.set_epoch(3)
    >>> pairs[0]["anchor"] != pairs[0]["positive"], pairs[0]["label"]
    (True, 0)
    """

    def __init__(
        self,
        captions: Captions | CaptionTable,
        seed: int = 0,
        *,
        hard_negatives: bool = False,
        pair_sources: tuple[str, str] | None = None,
        instruction: str | None = None,
    ) -> None:
        self.table = captions if isinstance(captions, CaptionTable) else CaptionTable(captions)
        super().__init__(len(self.table), seed, instruction, has_negatives=hard_negatives)
        self._sides = None if pair_sources is None else resolve_sides(pair_sources, self.table.source_names)
        self._check_pairs()
        self._captions_of_source: dict[int, np.ndarray] = {}
        if hard_negatives:
            self._captions_of_source = self._index_sources()

    def _check_pairs(self) -> None:
        few = np.flatnonzero(self.table.distinct_counts < 2)
        if few.size:
            row = int(few[0])
            raise ValueError(
                f"Row {row} has fewer than two distinct captions: {self.table[row]!r} ({few.size} such rows). "
                'Caption pairs need two per image; drop the rows (`load_captions(..., on_bad_row="skip", '
                "min_captions=2)`) or add captions."
            )
        if self._sides is None:
            return
        # A row can only lack a pair if a side is empty or texts repeat within the image.
        counts = np.diff(self.table.offsets)
        suspicious = self.table.distinct_counts < counts
        for side in self._sides:
            present = np.concatenate([[0], np.cumsum(np.isin(self.table.source_ids, list(side)))])
            suspicious |= np.diff(present[self.table.offsets]) == 0
        for row in np.flatnonzero(suspicious).tolist():
            if not side_pairs(self.table[row], self._source_ids(row), self._sides):
                raise ValueError(
                    f"Row {row} has no two distinct captions in the two `pair_sources`: {self.table[row]!r}. "
                    "Drop the row, or widen the patterns."
                )

    def _index_sources(self) -> dict[int, np.ndarray]:
        index = {}
        drawn = range(len(self.table.source_names)) if self._sides is None else set().union(*self._sides)
        for source in drawn:
            rows = np.flatnonzero(self.table.source_ids == source)
            if rows.size and self.table.image_of(rows[0]) == self.table.image_of(rows[-1]):
                raise ValueError(
                    f"Only one image has captions in the source `{self.table.source_names[source]}`, so there is no "
                    "caption of that kind to draw hard negatives from. Leave the source out, or add images."
                )
            index[source] = rows
        return index

    def _source_ids(self, row: int) -> list[int]:
        return self.table.source_ids[self.table.offsets[row] : self.table.offsets[row + 1]].tolist()

    def _draw(self, epoch: int, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        bits = pair_bits(self._seed, epoch, rows)
        negative_bits = random_bits(self._seed, epoch, rows, _HARD_NEGATIVE).tolist()
        for row, first_try, *row_bits in zip(rows.tolist(), negative_bits, *bits):
            texts, source_ids = self.table[row], self._source_ids(row)
            anchor, positive, source = draw_pair(texts, source_ids, self._sides, *row_bits)
            drawn: dict[str, Any] = {"anchor": anchor, "positive": positive}
            if self._captions_of_source:
                drawn["negative"] = self._negative(epoch, row, source, set(texts), first_try)
            yield drawn | {"label": row}

    def _negative(self, epoch: int, row: int, source: int, own: set[str], bits: int) -> str:
        candidates = self._captions_of_source[source]
        position = bits % len(candidates)
        for attempt in range(1, _NEGATIVE_DRAWS + 1):
            if (text := self.table.caption(int(candidates[position]))) not in own:
                return text
            bits = int(random_bits(self._seed, epoch, np.array([row]), _HARD_NEGATIVE + attempt)[0])
            position = bits % len(candidates)
        # Nearly all captions of the source are the image's own texts: look at every one of them.
        for flat_row in np.roll(candidates, -position).tolist():
            if (text := self.table.caption(flat_row)) not in own:
                return text
        raise ValueError(
            f"Row {row} has no hard negative: all captions in the source `{self.table.source_names[source]}` are "
            "equal to one of its own. Leave the source out, or set `hard_negatives=False`."
        )


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
        sources = open_source(source, split, subset)
        roles = _resolve_roles(columns, kinds_of(sources), sources[0].name)
        self._columns, self._labels, self.report = _read_rows(
            sources, roles, lambda entry, where: _clean_row(entry, where, bad), bad, "the text pairs"
        )
        super().__init__(len(self._labels), seed, instruction, has_negatives="negative" in roles)

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
        sources = open_source(source, split, subset)
        check_columns([column], kinds_of(sources), sources[0].name)
        columns, self._labels, self.report = _read_rows(
            sources,
            {"anchor": column},
            lambda entry, where: _clean_sentence(entry["anchor"], where, min_characters, bad),
            bad,
            "the text lines",
        )
        self._texts = columns["anchor"]
        super().__init__(len(self._labels), 0, instruction, has_negatives=False)

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


def _read_rows(
    sources: list[TextSource],
    roles: Mapping[str, str],
    clean: Callable[[dict[str, Any], str], dict[str, Any] | None],
    bad: BadRows,
    name: str,
) -> tuple[dict[str, TextColumn], np.ndarray, LoadReport]:
    """Texts of each role, and as label of each row the first row with the same anchor."""
    chunks: dict[str, list[Any]] = {role: [] for role in roles}
    hashes = array("q")  # of 64 bits, which all but never collide
    for block in good_blocks(sources, list(roles.values()), bad):
        rows = []
        for number, *entry in zip(block.numbers, *map(block.values, roles.values())):
            row = clean(dict(zip(roles, entry)), describe_place(block.file, block.unit, number))
            if row is not None:
                rows.append(row)
                hashes.append(hash(row["anchor"]))
        for role, chunk in chunks.items():
            chunk.append(texts_to_array([row[role] for row in rows]))
    if not hashes:
        raise ValueError(
            f"No usable row among {bad.report.rows_read} rows ({bad.report.not_sentences} blank, short or heading "
            f"lines). First problems: {bad.report.examples or 'none'}."
        )
    columns = {role: TextColumn(chunk) for role, chunk in chunks.items()}
    _, first, inverse = np.unique(np.array(hashes, dtype=np.int64), return_index=True, return_inverse=True)
    num_texts = sum(int(column.lengths().sum()) for column in columns.values())
    return columns, first[inverse], bad.finish(name, len(hashes), num_texts)


def _clean_row(entry: Mapping[str, Any], where: str, bad: BadRows) -> dict[str, Any] | None:
    """The usable texts of each role, or None if a role has none."""
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


def _clean_sentence(line: Any, where: str, min_characters: int, bad: BadRows) -> dict[str, Any] | None:
    text = line.strip() if isinstance(line, str) else line
    if isinstance(text, str) and (len(text) < min_characters or (text[:1] == "=" and text[-1:] == "=")):
        bad.report.not_sentences += 1
    elif problem := text_problem(text):
        bad.add("bad_texts", where, f"the line {problem}")
    else:
        return {"anchor": text}
    return None


__all__ = ["CaptionPairDataset", "DropoutPairDataset", "TextPairDataset"]
