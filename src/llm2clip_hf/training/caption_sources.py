# SPDX-License-Identifier: Apache-2.0
"""
Where caption batches come from: one or several map-style sources, or a stream, as rows of the same form.

A row is a dict of texts `anchor`, `positive` and optionally `negative` (or `negative_1`, `negative_2`, ...), and
optionally a whole number `label`, equal for rows of the same image.
"""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from .caption_loss import TEXT_ID
from .streams import EndlessStream, shards_itself


Row = dict[str, Any]

LABEL = "label"
INSTRUCTION = "instruction"
SOURCE_NAME = "dataset_name"  # as sentence-transformers calls it, for `prompts` by data set
_NEGATIVE = re.compile(r"negative(_\d+)?")


def ordered_columns(names: Iterable[str], where: str) -> list[str]:
    """
    The columns of a source in the order that the loss takes them.

    Args:
        names (iterable of `str`): Columns that the source has.
        where (`str`): Its name in errors.

    Returns:
        `list[str]`: anchor, positive, negatives, label.

    Raises:
        ValueError: if a column is missing or unknown.
    """
    given = list(names)
    missing = [name for name in ("anchor", "positive") if name not in given]
    if missing:
        raise ValueError(
            f"{where} has the columns {given}, but needs `{'` and `'.join(missing)}`. Rename its columns to `anchor`, "
            "`positive`, `negative`, `label`."
        )
    negatives = sorted((name for name in given if _NEGATIVE.fullmatch(name)), key=lambda name: (len(name), name))
    if "negative" in negatives and len(negatives) > 1:
        raise ValueError(
            f"{where} has the columns {negatives}. Call several negatives `negative_1`, `negative_2`, ..."
        )
    unknown = [name for name in given if name not in ("anchor", "positive", LABEL, *negatives)]
    if unknown:
        raise ValueError(
            f"{where} has the unknown columns {unknown}. Remove them; known are `anchor`, `positive`, `negative` (or "
            "`negative_1`, `negative_2`, ...) and `label`."
        )
    return ["anchor", "positive", *negatives, *([LABEL] if LABEL in given else [])]


def is_map_style(source: Any) -> bool:
    """Whether a source has rows with numbers, as opposed to a stream."""
    is_stream = isinstance(source, torch.utils.data.IterableDataset)  # which inherits `__getitem__` all the same
    return not is_stream and hasattr(source, "__getitem__") and hasattr(source, "__len__")


class SourceRows(torch.utils.data.Dataset):
    """
    The rows of one or several map-style sources, numbered source after source.

    Args:
        sources (mapping from `str` to source):
            Sources with `__len__` and `__getitem__`; optional are `set_epoch`, `column_names` and `instruction`. The
            name is added to the rows if there are several sources.

    Raises:
        ValueError: if there is no source, or one is a stream, empty, or has other columns than those of a caption row.
    """

    def __init__(self, sources: Mapping[str, Any]) -> None:
        if not sources:
            raise ValueError("The mapping of training sources is empty. Give at least one source.")
        self.names, self.sources = list(sources), list(sources.values())
        for name, source in sources.items():
            if not is_map_style(source):
                raise ValueError(
                    f"The source `{name}` is {type(source).__name__}, which has no row numbers. Single-source batches "
                    "need map-style sources; a stream must be the only training set."
                )
            if not len(source):
                raise ValueError(f"The source `{name}` is empty. Leave it out.")
        self.columns = [
            ordered_columns(getattr(source, "column_names", None) or source[0], f"The source `{name}`")
            for name, source in sources.items()
        ]
        self.sizes = [len(source) for source in self.sources]
        self._ends = list(accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> Row:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Row]:
        """Several rows at once; those of one source are read together."""
        places = [self._place(row) for row in rows]
        found: list[Row] = [{}] * len(rows)
        for number in {source for source, _ in places}:
            positions = [position for position, (source, _) in enumerate(places) if source == number]
            for position, row in zip(positions, self._read(number, [places[p][1] for p in positions])):
                found[position] = row
        return found

    def set_epoch(self, epoch: int) -> None:
        """Tells all sources the epoch."""
        for source in self.sources:
            if hasattr(source, "set_epoch"):
                source.set_epoch(epoch)

    def _place(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"Row {row} is out of range for {len(self)} rows.")
        number = bisect_right(self._ends, row)
        return number, row - (self._ends[number - 1] if number else 0)

    def _read(self, number: int, rows: list[int]) -> Iterator[Row]:
        source = self.sources[number]
        extra = {INSTRUCTION: instruction} if (instruction := getattr(source, "instruction", None)) else {}
        if len(self.sources) > 1:
            extra[SOURCE_NAME] = self.names[number]
        read: Callable[[list[int]], Iterable[Row]] = getattr(source, "__getitems__", None) or (
            lambda rows: [source[row] for row in rows]
        )
        for row in read(rows):
            yield {column: row[column] for column in self.columns[number]} | extra


class StreamRows(torch.utils.data.IterableDataset):
    """
    The rows of a stream for one process: batches of all processes are cut from it, and each process takes its part.

    The stream is read again when it ends, after `set_epoch` with the number of the pass. A stream whose attribute
    `shards_itself` is true gives each process rows of its own and is passed on as it is.

    Args:
        stream: Gives the same rows in the same order on every process.
        batch_size (`int`): Rows per process.
        num_processes (`int`, *optional*, defaults to 1): Processes that share a global batch.
        process (`int`, *optional*, defaults to 0): Number of this process.
    """

    def __init__(self, stream: Any, batch_size: int, num_processes: int = 1, process: int = 0) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.num_processes, self.process = (1, 0) if shards_itself(stream) else (num_processes, process)

    def __iter__(self) -> Iterator[Row]:
        columns: list[str] | None = None
        first = self.process * self.batch_size
        instruction = getattr(self.stream, "instruction", None)
        extra = {INSTRUCTION: instruction} if instruction else {}
        empty = True
        for number, row in enumerate(EndlessStream(self.stream)):
            empty = False
            columns = columns or ordered_columns(row, "The stream")
            if first <= number % (self.batch_size * self.num_processes) < first + self.batch_size:
                yield {column: row[column] for column in columns} | extra
        if empty:
            raise ValueError("The training stream gives no row.")


@dataclass
class CaptionCollator(SentenceTransformerDataCollator):
    """
    The collator of sentence-transformers for caption rows.

    The instruction of a row's source becomes the `prompt` of the anchors, which is read and not pooled. With
    `with_text_ids` every column carries a number per text, by which the loss finds equal texts; those of anchors are
    of the text without its instruction.

    Args:
        with_text_ids (`bool`): Whether to number texts.
    """

    with_text_ids: bool = field(default=False)

    def __call__(self, features: list[Row]) -> dict[str, Any]:
        """
        The batch of some rows.

        Args:
            features (`list[dict]`): Rows of one source.

        Returns:
            `dict`: tokenised columns under `<column>_<feature>`, and `label` if the rows have it.

        Raises:
            ValueError: if the rows differ in their instructions.
        """
        instructions = {row.get(INSTRUCTION) for row in features}
        if len(instructions) > 1:
            raise ValueError(
                f"Rows of one batch have {len(instructions)} instructions, first "
                f"{sorted(map(str, instructions))[:2]}. Give every instruction a source of its own."
            )
        rows = [{name: value for name, value in row.items() if name != INSTRUCTION} for row in features]
        instruction = instructions.pop() if instructions else None
        collator = self if instruction is None else replace(self, prompts={"anchor": instruction})
        batch = SentenceTransformerDataCollator.__call__(collator, rows)
        if self.with_text_ids:
            for column in rows[0]:
                if column not in (LABEL, SOURCE_NAME):
                    batch[f"{column}_{TEXT_ID}"] = torch.tensor([_number_of(row[column]) for row in rows])
        return batch


def _number_of(text: str) -> int:
    """64 bits of a digest of a text, as a signed number."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
