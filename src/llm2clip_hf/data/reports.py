# SPDX-License-Identifier: Apache-2.0
"""What loading a text data set found: rows read, rows and texts left out, and why; and where each kept row stood."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch


logger = logging.getLogger(__name__)
MAX_EXAMPLES = 5


@dataclass
class LoadReport:
    """
    Counts of what a loader read and what it left out.

    Args:
        rows_read (`int`): rows of the source.
        rows_kept (`int`): rows of the result (images, or pairs).
        texts_kept (`int`): texts of the result.
        bad_rows (`int`): rows that could not be read: not UTF-8, not JSON, another number of fields, no image id.
        bad_texts (`int`): single texts that are null, empty, white space, no string or, in a pair, of no use.
        too_few_texts (`int`): rows (or images) left out because too few distinct texts remained.
        not_sentences (`int`): lines of running text that are blank, headings or too short (`DropoutPairDataset`).
        shared_texts (`int`): captions whose text another image has too; as negatives of each other they are false.
        examples (`list[str]`): the first few rows or texts left out, each with its file and row.
    """

    rows_read: int = 0
    rows_kept: int = 0
    texts_kept: int = 0
    bad_rows: int = 0
    bad_texts: int = 0
    too_few_texts: int = 0
    not_sentences: int = 0
    shared_texts: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def num_bad(self) -> int:
        """Everything left out because it is wrong: rows, single texts, and rows with too few texts."""
        return self.bad_rows + self.bad_texts + self.too_few_texts

    def log(self, what: str) -> None:
        """One warning if anything bad was left out, and one line with the other counts."""
        if self.num_bad:
            logger.warning(
                "Left out of %s: %d unreadable rows, %d bad texts, %d rows with too few distinct texts. "
                "%d of %d rows remain. First: %s",
                what,
                *(self.bad_rows, self.bad_texts, self.too_few_texts, self.rows_kept, self.rows_read),
                " | ".join(self.examples),
            )
        logger.info(
            "%s: %d rows with %d texts; %d texts are shared by several images, %d lines are no sentences.",
            *(what, self.rows_kept, self.texts_kept, self.shared_texts, self.not_sentences),
        )


def check_choice(name: str, value: str) -> None:
    """ValueError unless an option that says what to do with a bad sample is `"error"` or `"skip"`."""
    if value not in ("error", "skip"):
        raise ValueError(f'`{name}` must be "error" or "skip", got {value!r}.')


class BadRows:
    """The policy for bad rows: raises at the first, or counts them in a report."""

    def __init__(self, policy: str) -> None:
        check_choice("on_bad_row", policy)
        self.skip = policy == "skip"
        self.report = LoadReport()

    def add(self, counter: str, place: str, problem: str) -> None:
        """Counts a bad row or text under the report's field `counter`; raises a `ValueError` with the policy error."""
        if not self.skip:
            raise ValueError(f'{place} {problem}. Mend it, or pass `on_bad_row="skip"` to leave such rows out.')
        setattr(self.report, counter, getattr(self.report, counter) + 1)
        if len(self.report.examples) < MAX_EXAMPLES:
            self.report.examples.append(f"{place} {problem}")

    def finish(self, what: str, rows_kept: int, texts_kept: int, shared_texts: int = 0) -> LoadReport:
        """The report with what remained, logged."""
        report = self.report
        report.rows_kept, report.texts_kept, report.shared_texts = rows_kept, texts_kept, shared_texts
        report.log(what)
        return report


class Places:
    """File and line (or row) of every kept row, for messages; eight bytes per row."""

    def __init__(self) -> None:
        self._files: list[tuple[str, str]] = []
        self._starts: list[int] = []
        self._numbers: list[np.ndarray] = []
        self._length = 0

    def append(self, file: str, unit: str, numbers: Sequence[int] | np.ndarray) -> None:
        """Adds rows of one file; `unit` is `"line"` or `"row"`."""
        self._files.append((file, unit))
        self._starts.append(self._length)
        self._numbers.append(np.asarray(numbers, dtype=np.int64))
        self._length += len(numbers)

    def __len__(self) -> int:
        return self._length

    def describe(self, row: int) -> str:
        """For example `captions.jsonl, line 7`."""
        block = int(np.searchsorted(self._starts, row, side="right")) - 1
        file, unit = self._files[block]
        return describe_place(file, unit, int(self._numbers[block][row - self._starts[block]]))


def describe_place(file: str, unit: str, number: int) -> str:
    """The place of a row as messages say it."""
    return f"`{file}`, {unit} {number}:" if file else f"{unit.capitalize()} {number}:"


def positive_number(value: object) -> float:
    """The number that a value is or spells; 0 for one that is not positive and finite, or none at all."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return 0.0
    return number if 0 < number < float("inf") else 0.0


def text_problem(text: object) -> str | None:
    """Why a value cannot serve as a text, or None if it can."""
    if text is None:
        return "is null"
    if isinstance(text, bytes):
        return "is not UTF-8"
    if not isinstance(text, str):
        return "is not a string"
    if not text.strip():
        return "is empty"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return "is not valid Unicode"
    return None


_ROWS = 129  # the main process and 128 workers; further workers share rows, whose counts are then lower bounds
_NAMES_PER_ROW = 8
_NAME_BYTES = 240


class SkipReport(NamedTuple):
    """
    What was skipped so far.

    Attributes:
        number (`int`): skipped samples; a sample that is skipped again in a later epoch counts again.
        reasons (`tuple[str, ...]`): messages of the first of them, up to 8 per worker, each with row, file or key.
    """

    number: int
    reasons: tuple[str, ...]


class SkipLog:
    """Counts and names skipped samples over all processes that share it."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_ROWS, dtype=torch.int64).share_memory_()
        self._names = torch.zeros(_ROWS, _NAMES_PER_ROW, _NAME_BYTES, dtype=torch.uint8).share_memory_()

    def add(self, reason: str) -> None:
        """Records one skipped sample, and logs the first ones of this process as warnings."""
        worker = torch.utils.data.get_worker_info()
        row = 0 if worker is None else 1 + worker.id % (_ROWS - 1)
        position = int(self._counts[row])
        if position < _NAMES_PER_ROW:
            encoded = reason.encode("utf-8")[:_NAME_BYTES]
            self._names[row, position, : len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
            logger.warning("Skipped: %s", reason)
        self._counts[row] = position + 1

    def report(self) -> SkipReport:
        """What was skipped so far, in all processes."""
        reasons = []
        for row in torch.nonzero(self._counts).flatten().tolist():
            for position in range(min(int(self._counts[row]), _NAMES_PER_ROW)):
                stored = bytes(self._names[row, position].tolist()).rstrip(b"\0")
                reasons.append(stored.decode("utf-8", errors="ignore"))
        return SkipReport(int(self._counts.sum()), tuple(reasons))


__all__ = ["LoadReport", "SkipLog", "SkipReport"]
