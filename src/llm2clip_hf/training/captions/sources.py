# SPDX-License-Identifier: Apache-2.0
"""
Where caption batches come from: one or several map-style sources, or a stream, as rows of the same form.

A row is a dict of texts `anchor`, `positive` and optionally `negative` (or `negative_1`, `negative_2`, ...), and
optionally a whole number `label`, equal for rows of the same image.
"""

import hashlib
import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from ...data.sampling import random_bits
from ..run_checks import steps_of_run
from ..streams import EndlessStream, shards_itself
from .loss import TEXT_ID


logger = logging.getLogger(__name__)
Row = dict[str, Any]
LABEL = "label"
INSTRUCTION = "instruction"
SOURCE_NAME = "dataset_name"  # as sentence-transformers calls it, for `prompts` by data set
_NEGATIVE = re.compile(r"negative(_\d+)?")


def ordered_columns(names: Iterable[str], where: str) -> list[str]:
    """The columns of a source in the order that the loss takes them."""
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


def open_training_set(dataset: Any) -> "tuple[SourceRows | None, Any]":
    """The rows of a map-style training set, or the stream."""
    if dataset is None:
        return None, None
    if isinstance(dataset, Mapping):
        return SourceRows(dataset), None
    if is_map_style(dataset):
        return SourceRows({getattr(getattr(dataset, "info", None), "dataset_name", None) or "train": dataset}), None
    if not hasattr(dataset, "__iter__"):
        raise ValueError(
            f"`train_dataset` is {type(dataset).__name__}, which has neither rows nor is a stream. Give a "
            "CaptionPairDataset, a datasets.Dataset, a mapping of them, or a stream of rows."
        )
    return None, dataset


def evaluation_set(dataset: Any) -> Any:
    """A `datasets.Dataset`, or a dict of them, of an evaluation set, with the columns in order."""
    if dataset is None:
        return None
    if isinstance(dataset, Mapping):
        return {name: evaluation_set(source) for name, source in dataset.items()}
    instruction = getattr(dataset, INSTRUCTION, None)
    dataset = dataset.to_dataset() if hasattr(dataset, "to_dataset") else dataset
    columns = ordered_columns([name for name in dataset.column_names if name != INSTRUCTION], "The evaluation set")
    if instruction:
        dataset = dataset.add_column(INSTRUCTION, [instruction] * len(dataset))
    return dataset.select_columns([*columns, *([INSTRUCTION] if INSTRUCTION in dataset.column_names else [])])


class SourceRows(torch.utils.data.Dataset):
    """The rows of one or several map-style sources, numbered source after source."""

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
    """

    with_text_ids: bool = field(default=False)

    def __call__(self, features: list[Row]) -> dict[str, Any]:
        """The batch of some rows."""
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


# Streams of `random_bits`; every kind of choice has its own number (`data.captions` has 10 and 11).
_ROW_ORDER, _BATCH_ORDER, _EVALUATION_ORDER = 100, 101, 102


class SingleSourceBatchSampler(torch.utils.data.Sampler[list[int]]):
    r"""
    Cuts several sources into batches of all processes together, and shuffles the batches.

    (1) The rows of each source are shuffled. (2) They are cut into global batches of `num_processes * batch_size`
    rows; the last, smaller one is dropped. (3) The global batches of all sources are shuffled. Each is then given out
    as `num_processes` batches in a row, one for each process: accelerate deals them out in this order, so all
    processes are at the same global batch in the same step. This is the sampling of the released stage-1 code.

    Everything is a pure function of `(seed, epoch)`, so that a resumed run sees the same batches.
    """

    def __init__(
        self, sizes: Sequence[int], batch_size: int, num_processes: int = 1, seed: int = 0, drop_last: bool = True
    ) -> None:
        if min([*sizes, batch_size, num_processes], default=0) < 1 or not sizes:
            raise ValueError(
                f"Sizes of sources, rows and processes must be positive, got {list(sizes)}, {batch_size} and "
                f"{num_processes}."
            )
        if num_processes > 1 and not drop_last:
            raise ValueError(
                f"With {num_processes} processes the last, smaller batch of a source must be dropped: it would leave "
                "processes without rows. Set `dataloader_drop_last=True`."
            )
        self.sizes = list(sizes)
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for epoch `epoch` from the next pass on."""
        self.epoch = epoch

    def batches_of(self, source: int) -> int:
        """Global batches of a source."""
        rows, step = self.sizes[source], self.batch_size * self.num_processes
        return rows // step if self.drop_last else -(-rows // step)

    def check_sources(self, names: Sequence[str] = ()) -> None:
        """Raises a `ValueError` if there is no batch; warns of the sources among `names` that give none."""
        devices = f"on each of {self.num_processes} devices" if self.num_processes > 1 else "per device"
        if not len(self):
            raise ValueError(
                f"The training set holds less than one batch of {self.batch_size} pairs {devices}: its sources have "
                f"{self.sizes} rows. Lower `per_device_train_batch_size`."
            )
        for number, name in enumerate(names):
            if not self.batches_of(number):
                logger.warning(
                    "The source `%s` of %d rows holds less than one batch of %d pairs %s, so it takes no part. Lower "
                    "`per_device_train_batch_size` or leave the source out.",
                    name,
                    self.sizes[number],
                    self.batch_size,
                    devices,
                )

    def __len__(self) -> int:
        return sum(self.batches_of(source) for source in range(len(self.sizes))) * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        epoch, step = self.epoch, self.batch_size * self.num_processes
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        rows, batches = [], []
        for source, (start, stop) in enumerate(zip(starts[:-1], starts[1:])):
            numbers = np.arange(start, stop)
            rows.append(numbers[random_bits(self.seed, epoch, numbers, _ROW_ORDER).argsort(kind="stable")])
            batches += [(source, number * step) for number in range(self.batches_of(source))]
        order = random_bits(self.seed, epoch, np.arange(len(batches)), _BATCH_ORDER).argsort(kind="stable")
        for number in order.tolist():
            source, begin = batches[number]
            batch = rows[source][begin : begin + step].tolist()
            for first in range(0, len(batch), self.batch_size):
                yield batch[first : first + self.batch_size]


def count_steps(args: Any, sizes: Sequence[int]) -> int:
    """Optimizer steps of a run of stage 1, as its trainer counts them."""
    processes = 1 if args.accelerator_config.split_batches else args.world_size
    sampler = SingleSourceBatchSampler(sizes, args.train_batch_size, processes, drop_last=args.dataloader_drop_last)
    sampler.check_sources()
    return steps_of_run(args, len(sampler) // processes)


class EvaluationBatchSampler(torch.utils.data.Sampler[list[int]]):
    r"""
    The batches of one process that evaluates: every row is in one batch of one process.

    All processes have equally many batches, as the loss over all of them needs, and the sizes of all batches differ by
    one at most, so that no row meets far fewer negatives than the others. Rows are shuffled, always the same way.
    """

    def __init__(self, rows: int, batch_size: int, num_processes: int = 1, process: int = 0, seed: int = 0) -> None:
        if rows < num_processes:
            raise ValueError(
                f"The evaluation set has {rows} rows for {num_processes} processes, each of which needs one. Give it "
                "more rows."
            )
        self.rows = rows
        self.num_processes = num_processes
        self.process = process
        self.seed = seed
        self._batches = min(-(-rows // (batch_size * num_processes)), rows // num_processes)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        order = random_bits(self.seed, 0, np.arange(self.rows), _EVALUATION_ORDER).argsort(kind="stable").tolist()
        parts = self._batches * self.num_processes
        for part in range(self.process, parts, self.num_processes):
            yield order[self.rows * part // parts : self.rows * (part + 1) // parts]
