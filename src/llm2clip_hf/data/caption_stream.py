# SPDX-License-Identifier: Apache-2.0
"""The streamed form of `CaptionPairDataset`: a `datasets.IterableDataset` whose draws follow its epoch."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import datasets
import numpy as np
import torch

from .columns import column_kind, learn_kinds, resolve_caption_columns
from .reports import BadRows, LoadReport, logger, text_problem
from .sampling import Sides, draw_pair, pair_bits, resolve_sides, side_pairs


_ID_BITS = (1 << 63) - 1
# One slot of counts per loader worker, so that no two processes write the same number.
_WORKER_SLOTS = 256
_COUNTERS = ("rows_read", "rows_kept", "texts_kept", "bad_rows", "bad_texts", "too_few_texts")
FEATURES = {"anchor": "string", "positive": "string", "label": "int64"}
# Methods of `IterableDataset` that give another one, which must go on drawing by epoch. The others call these.
_DERIVING = (
    *("map", "filter", "shard", "reshard", "skip", "take", "repeat", "with_format", "batch", "cast", "cast_column"),
    *("select_columns", "remove_columns", "rename_columns", "rename_column"),
)


class CaptionPairStream(datasets.IterableDataset):
    """
    What `stream_caption_pairs` returns; `shuffle` and its other methods give one with the same draws and instruction.
    """

    def __init__(self, mapped: datasets.IterableDataset, draw: "PairDraw", instruction: str | None) -> None:
        # As every method of `datasets` makes its result.
        super().__init__(
            ex_iterable=mapped._ex_iterable,
            info=mapped._info,
            split=mapped._split,
            formatting=mapped._formatting,
            distributed=mapped._distributed,
            token_per_repo_id=mapped._token_per_repo_id,
        )
        self._draw = draw
        self.instruction = instruction

    def shuffle(
        self, seed: int | None = None, generator: np.random.Generator | None = None, *args: Any, **kwargs: Any
    ) -> "CaptionPairStream":
        """`IterableDataset.shuffle`, by default with the seed of the draws, so that runs and processes agree."""
        if seed is None and generator is None:
            seed = self._draw.seed
        return CaptionPairStream(super().shuffle(seed, generator, *args, **kwargs), self._draw, self.instruction)

    def set_epoch(self, epoch: int) -> None:
        """Draw the pairs (and, after `shuffle`, the order) of epoch `epoch` from the next iteration on."""
        super().set_epoch(epoch)
        self._draw.epoch.fill_(epoch)

    @property
    def report(self) -> LoadReport:
        """Counts since the stream was made, over all workers of this process and all epochs."""
        totals = self._draw.counts.sum(dim=0).tolist()
        return LoadReport(**dict(zip(_COUNTERS, totals)))


def _keeping_draws(method: Callable[..., datasets.IterableDataset]) -> Callable[..., CaptionPairStream]:
    @wraps(method)
    def derive(self: CaptionPairStream, *args: Any, **kwargs: Any) -> CaptionPairStream:
        return CaptionPairStream(method(self, *args, **kwargs), self._draw, self.instruction)

    return derive


for _name in _DERIVING:
    if hasattr(datasets.IterableDataset, _name):
        setattr(CaptionPairStream, _name, _keeping_draws(getattr(datasets.IterableDataset, _name)))


@dataclass
class PairDraw:
    """Turns a batch of caption rows into pairs."""

    columns: tuple[str, ...]
    id_column: str | None
    id_from_content: bool
    seed: int
    sides: Sides | None
    on_bad_row: str

    def __post_init__(self) -> None:
        BadRows(self.on_bad_row)  # refuses an unknown policy
        # In shared memory: workers that live on see a new epoch, and their counts arrive here.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.counts = torch.zeros(_WORKER_SLOTS, len(_COUNTERS), dtype=torch.int64).share_memory_()

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        bad = BadRows(self.on_bad_row)
        labels, captions = [], []
        for position, index in enumerate(indices):
            identity = index if self.id_column is None else batch[self.id_column][position]
            named = f" (`{self.id_column}` {identity!r})" if self.id_column else ""
            place = f"Row {index} of the stream{named}:"
            texts, source_ids = self._clean([batch[column][position] for column in self.columns], place, bad)
            if not (len(set(texts)) > 1 if self.sides is None else side_pairs(texts, source_ids, self.sides)):
                bad.add("too_few_texts", place, "the image has no two distinct captions to draw from")
                continue
            label = self._label("\0".join(texts) if self.id_from_content else identity)
            if label is None:
                bad.add("bad_rows", place, "the id is neither a non-empty string nor an integer from 0 to 2**63 - 1")
                continue
            labels.append(label)
            captions.append((texts, source_ids))
        bad.report.rows_read, bad.report.rows_kept = len(indices), len(labels)
        bad.report.texts_kept = sum(len(texts) for texts, _ in captions)
        self._count(bad.report)
        bits = pair_bits(self.seed, int(self.epoch), np.array(labels, dtype=np.int64))
        drawn = [
            draw_pair(texts, sources, self.sides, *row_bits)[:2]
            for (texts, sources), *row_bits in zip(captions, *bits)
        ]
        anchors, positives = [anchor for anchor, _ in drawn], [positive for _, positive in drawn]
        return {"anchor": anchors, "positive": positives, "label": labels}

    def _clean(self, entries: Sequence[Any], place: str, bad: BadRows) -> tuple[list[str], list[int]]:
        texts, source_ids = [], []
        for source, entry in enumerate(entries):
            for text in entry if isinstance(entry, (list, tuple)) else [entry]:
                if problem := text_problem(text):
                    bad.add("bad_texts", place, f"a caption in column `{self.columns[source]}` {problem}")
                else:
                    texts.append(text)
                    source_ids.append(source)
        return texts, source_ids

    def _label(self, identity: Any) -> int | None:
        if isinstance(identity, str) and identity:
            digest = hashlib.blake2b(identity.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
            return int.from_bytes(digest, "little") & _ID_BITS
        return identity if isinstance(identity, int) and 0 <= identity <= _ID_BITS else None

    def _count(self, report: LoadReport) -> None:
        worker = torch.utils.data.get_worker_info()
        slot = self.counts[(0 if worker is None else worker.id + 1) % _WORKER_SLOTS]
        had_bad = bool(slot[_COUNTERS.index("bad_rows") :].any())
        slot += torch.tensor([getattr(report, name) for name in _COUNTERS])
        if report.num_bad and not had_bad:
            logger.warning(
                "Bad rows are left out of the caption stream; its `report` counts them. First: %s",
                " | ".join(report.examples),
            )


_ROWS_PER_BATCH = 64
_ROWS_TO_LEARN_COLUMNS = 100


def stream_caption_pairs(
    dataset: datasets.IterableDataset,
    columns: str | Sequence[str] | Mapping[str, str] | None = None,
    *,
    id_column: str | None = None,
    id_from_content: bool = False,
    seed: int = 0,
    pair_sources: tuple[str, str] | None = None,
    instruction: str | None = None,
    on_bad_row: str = "error",
) -> CaptionPairStream:
    """
    Two distinct captions per image from a stream: `CaptionPairDataset` for data that are not on this machine.

    A row is identified by `id_column` (an integer as it is; a string by its hash), by the text of its captions, or by
    its position in the stream. The identifier is the `label`, and takes the place of the row number in the draw: the
    pair is a pure function of `(seed, epoch, identifier)`. So with the row number as identifier the pairs equal those
    of `CaptionPairDataset` of the same rows. The position only identifies a row in a stream of a single shard:
    workers and ranks that share several shards count each from zero. Shuffle the returned stream, not `dataset`,
    whose positions would no longer be those of its rows. Hard negatives need access to all rows, so a stream has none.

    Args:
        dataset (`datasets.IterableDataset`): rows with captions, for example `load_dataset(..., streaming=True)`.
        columns (*optional*):
            Caption columns, as for `load_captions`; of a stream without declared features, found in its first rows.
        id_column (`str`, *optional*):
            Column with a unique, non-negative integer or a unique string per image, such as its key or URL. Needed
            with several shards unless `id_from_content` is set.
        id_from_content (`bool`, defaults to `False`):
            Identify a row by its captions; images with equal captions then share a label, so they are never each
            other's negatives.
        seed (`int`, defaults to 0): seed of the draws.
        pair_sources (two name patterns, *optional*): as for `CaptionPairDataset`.
        instruction (`str`, *optional*): as for `CaptionPairDataset`.
        on_bad_row (`str`, defaults to `"error"`):
            `"error"` raises at a caption that is null, empty or no valid text, an image without two distinct captions,
            and a bad id. `"skip"` leaves them out; the stream's `report` counts them, and the first in each process is
            logged.

    Returns:
        `datasets.IterableDataset` of `{"anchor": str, "positive": str, "label": int}` with `set_epoch(epoch)`,
        `instruction`, and `report` (`LoadReport`). Streams made by its methods, such as `shuffle`, have these too and
        draw with it: the epoch set on either counts. `split_dataset_by_node` of `datasets` gives a plain stream, which
        draws the pairs of the epoch that is set here.

    Raises:
        ValueError: if the columns do not fit, or the rows cannot be identified.

    Example:
    >>> import datasets
    >>> rows = datasets.Dataset.from_dict({"captions": [["a cat", "a grey cat"], ["a dog", "two dogs"]]})
    >>> stream = stream_caption_pairs(rows.to_iterable_dataset(), seed=1)
    >>> stream.set_epoch(2)
    >>> [row["label"] for row in stream], stream.report.rows_kept
    ([0, 1], 2)
    """
    if not isinstance(dataset, datasets.IterableDataset):
        raise ValueError(
            f"`dataset` must be a `datasets.IterableDataset`, got {type(dataset).__name__}. Use `CaptionPairDataset` "
            "for data with random access."
        )
    kinds = _column_kinds(dataset)
    chosen = resolve_caption_columns(columns, kinds, "")
    _check_identity(dataset, kinds, id_column, id_from_content)
    sides = None if pair_sources is None else resolve_sides(pair_sources, tuple(chosen))
    draw = PairDraw(tuple(chosen.values()), id_column, id_from_content, seed, sides, on_bad_row)
    needed = list(dict.fromkeys([*chosen.values(), *([id_column] if id_column else [])]))
    mapped = dataset.select_columns(needed).map(
        draw,
        with_indices=True,
        batched=True,
        batch_size=_ROWS_PER_BATCH,
        remove_columns=needed,
        features=datasets.Features({name: datasets.Value(kind) for name, kind in FEATURES.items()}),
    )
    return CaptionPairStream(mapped, draw, instruction)


def _check_identity(
    dataset: datasets.IterableDataset, kinds: Mapping[str, str], id_column: str | None, id_from_content: bool
) -> None:
    if id_column is not None and id_from_content:
        raise ValueError("`id_column` and `id_from_content` exclude each other. Give one of them.")
    if id_column is not None and id_column not in kinds:
        raise ValueError(f"There is no id column `{id_column}`; the stream has {sorted(kinds)}.")
    if id_column is None and not id_from_content and dataset.num_shards > 1:
        raise ValueError(
            f"The stream has {dataset.num_shards} shards, so the position of a row depends on who reads them. Name a "
            "column that identifies each image with `id_column`, or set `id_from_content=True`."
        )


def _column_kinds(dataset: datasets.IterableDataset) -> dict[str, str]:
    if dataset.features is not None:
        return {column.name: column_kind(column.type) for column in dataset.features.arrow_schema}
    kinds = learn_kinds(dataset.take(_ROWS_TO_LEARN_COLUMNS), of_null="string")
    if not kinds:
        raise ValueError("The stream has no row.")
    return kinds


__all__ = ["stream_caption_pairs"]
