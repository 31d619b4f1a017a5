# SPDX-License-Identifier: Apache-2.0
"""
A process that makes some shards of a store: which are its own, which are done, and when the store is.

Nobody waits in a collective: shards take minutes, and a process group gives up on a rank that is late, or waits for
ever for one that is dead. What is done is what lies in the folder, whoever did it.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ... import distributed
from . import build
from .build import FORMAT_VERSION, INDEX_FILE, shard_name, shard_names
from .embedding_store import CaptionEmbeddingStore
from .fingerprint import FingerprintValue
from .folder import StoreFolder
from .slices import CaptionSlice, CaptionSlices


logger = logging.getLogger(__name__)
_LONGEST_PAUSE = 2.0


def own_shards(count: int, shard_range: tuple[int, int] | None) -> tuple[range, int, int]:
    """The shards of this process, its rank, and how many processes there are."""
    start, stop = shard_range or (0, count)
    if not 0 <= start < stop <= count:
        raise ValueError(f"`shard_range` {start}:{stop} must be a range within the {count} shards of these captions.")
    rank, size = _placement()
    return range(start, stop)[rank::size], rank, size


def _placement() -> tuple[int, int]:
    if distributed.is_initialized():
        return distributed.rank(), distributed.world_size()
    texts = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if None in texts:
        return 0, 1
    try:
        rank, size = (int(text) for text in texts if text is not None)
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size:
        raise ValueError(
            f"The environment variables `RANK` {texts[0]!r} and `WORLD_SIZE` {texts[1]!r} must be numbers with "
            "0 <= RANK < WORLD_SIZE. Launch with torchrun or `accelerate launch`, or unset both."
        )
    return rank, size


class Job(NamedTuple):
    """A slice, and what its shard lacks."""

    number: int
    captions: CaptionSlice
    is_missing: bool


class StoreWork:
    """The folder of a store as one of those sees it that fill it."""

    def __init__(
        self,
        output_dir: str | Path,
        slices: CaptionSlices,
        fingerprint: Mapping[str, FingerprintValue],
        dtype: str,
        repair: bool,
    ) -> None:
        folder = StoreFolder(output_dir)
        self._folder, self._slices, self._repair = folder, slices, repair
        self._plan: dict[str, Any] = {"fingerprint": dict(fingerprint), "dtype": dtype}
        self._is_finished = folder.size(INDEX_FILE) is not None
        self._there = set(shard_names(folder))
        self._has_keys = getattr(slices, "keys", None) is not None  # slices that are read tell when they are

    def old_store(self) -> CaptionEmbeddingStore | None:
        """The finished store of an earlier release; a folder that cannot be gone on with is refused."""
        index = build.read_index(self._folder) if self._is_finished and not self._repair else None
        if index is not None and index["format_version"] < FORMAT_VERSION:
            self._refuse_differences(index)
            store = CaptionEmbeddingStore.open(self._folder.path)
            slices = [self._slices.load(shard) for shard in range(len(self._slices))]
            if len({id(each.table) for each in slices}) > 1 or not store.holds(slices[0].table):
                self._refuse("holds the embeddings of other captions, made by an earlier release")
            if slices[0].keys is not None and not store.has_keys:
                self._refuse("was made by an earlier release, whose stores take no keys later")
            return store
        if self._folder.size("build.json") is not None:
            self._refuse("holds an unfinished store of an earlier release")
        # A folder of another run is refused before the first batch, where a look at one shard tells.
        for name in sorted(self._there)[:1]:
            try:
                record = build.shard_record(self._folder, name)
            except build.DamagedFileError:
                break
            self._refuse_differences({key: record[key] for key in self._plan})
        return None

    def prepare(self, shard: int) -> Job:
        """Step (1)."""
        captions, name = self._slices.load(shard), shard_name(shard)
        self._has_keys |= captions.keys is not None
        if name not in self._there:
            return Job(shard, captions, True)
        try:
            record = build.shard_record(self._folder, name)
        except build.DamagedFileError as error:
            logger.warning("%s; its captions are embedded again.", error)
            return Job(shard, captions, True)
        self._refuse_differences({key: record[key] for key in self._plan})
        if not self._is_of(record, shard, captions):
            return Job(shard, captions, True)
        # Those of a finished store were whole when its index was written.
        if (not self._is_finished or self._repair) and (damage := build.damage_of(self._folder, name)):
            logger.warning("%s; its captions are embedded again.", damage)
            return Job(shard, captions, True)
        if captions.keys is not None:
            self._add_keys(shard, captions, record)
        return Job(shard, captions, False)

    def refuse_others(self, shard: int, captions: CaptionSlice) -> None:
        """An error if there is a shard of this number with other captions; those of earlier releases say nothing."""
        index = build.read_index(self._folder)
        if shard_name(shard) in self._there and (index or {}).get("format_version") != 1:
            with suppress(build.DamagedFileError):
                self._is_of(build.shard_record(self._folder, shard_name(shard)), shard, captions)

    def _is_of(self, record: Mapping[str, Any], shard: int, captions: CaptionSlice) -> bool:
        """Whether a shard holds these captions, which is an error if not, unless it is to be repaired."""
        own = [list(self._slices.rows_of(shard)), list(captions.table.source_names), captions.digest()]
        found = [record["rows"], record["source_names"], record["captions_sha256"]]
        if own != found and not self._repair:
            rows = (
                "" if own[0] == found[0] else f", of the rows {found[0]} instead of {own[0]}: check `rows_per_shard`"
            )
            self._refuse(f"holds the embeddings of other captions in `{record['file']}`{rows}")
        return own == found

    def _add_keys(self, shard: int, captions: CaptionSlice, record: Mapping[str, Any]) -> None:
        if not record["has_keys"]:
            self.write(Job(shard, captions, False), build.read_shard(self._folder, record))
        elif build.keys_of(self._folder, record["file"]) != list(captions.keys or ()):
            self._refuse(f"has other keys than `keys`, or the same in another order, in `{record['file']}`")

    def write(self, job: Job, embeddings: torch.Tensor | Mapping[str, np.ndarray]) -> None:
        """Write the shard of a slice, from embeddings `(captions, dim)` or what another shard had of them."""
        dtype = self._plan["dtype"]
        rows = build.pack_rows(embeddings, dtype) if isinstance(embeddings, torch.Tensor) else embeddings
        self._folder.remove(INDEX_FILE)  # a finished store is none while it changes
        self._is_finished = False
        self._folder.remove_unfinished([shard_name(job.number)])
        build.write_shard(
            self._folder,
            job.number,
            rows,
            job.captions,
            self._slices.rows_of(job.number),
            self._slices.num_rows,
            self._plan["fingerprint"],
            dtype,
        )

    def finish(self, rank: int, size: int, timeout: float, waits: bool) -> CaptionEmbeddingStore | None:
        """Step (3), by process 0, or by any that waits for nobody."""
        if more := sorted(set(shard_names(self._folder)) - set(map(shard_name, range(len(self._slices))))):
            self._refuse(f"holds shards of further captions, such as `{more[0]}`", "")
        pause, last_new, known = 0.01, time.monotonic(), -1
        while missing := self._missing(rank, waits):
            if not waits:
                logger.info(
                    "%d shards of `%s` are still to be made: %s.", len(missing), self._folder.path, missing[:3]
                )
                return None
            if len(missing) != known:
                known, last_new = len(missing), time.monotonic()
            if time.monotonic() - last_new > timeout:
                listed = ", ".join(f"`{name}`" for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
                raise TimeoutError(
                    f"Process {rank} of {size} waited {timeout:.0f} s for {len(missing)} files of "
                    f"`{self._folder.path}` ({listed}), and no new one came. Check that every process calls "
                    "`embed_captions`, is alive and sees the same folder, then start all again, or embed the missing "
                    "shards with `shard_range`; finished shards are kept."
                )
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE, pause * 1.5)
        if (rank == 0 or not waits) and (not self._is_finished or self._folder.size(INDEX_FILE) is None):
            build.merge(self._folder)
        return CaptionEmbeddingStore.open(self._folder.path)

    def _missing(self, rank: int, waits: bool) -> list[str]:
        """What the store still lacks, as far as it is not this process that makes it."""
        if waits and rank > 0:
            index = build.read_index(self._folder)
            is_new = index is not None and (not self._has_keys or "keys" in index)
            return [] if is_new else [INDEX_FILE, *self._missing(0, waits)]
        there, names = self._folder.names(), [*map(shard_name, range(len(self._slices)))]
        missing = [name for name in names if name not in there]
        if not missing and waits and self._has_keys:  # other processes may still be adding them to shards
            missing = [name for name in names if not build.shard_record(self._folder, name)["has_keys"]]
        return missing

    def _refuse_differences(self, found: Mapping[str, Any]) -> None:
        if differences := build.shard_differences(found, self._plan):
            self._refuse(f"holds embeddings made in another way: {differences}", "")

    def _refuse(self, what: str, remedy: str = "or mend it with `llm2clip store repair`, ") -> None:
        raise ValueError(
            f"`{self._folder.path}` {what}. Choose another `output_dir`, {remedy}or delete the folder to embed again."
        )


def refuse_other_captions(
    output_dir: str | Path, slices: CaptionSlices, shards: Sequence[int]
) -> list[tuple[int, int]]:
    """Images and captions of some slices; a ValueError if a folder has shards of these numbers of other captions."""
    work = StoreWork(output_dir, slices, {}, "", repair=False)
    counts = []
    for shard in shards:
        captions = slices.load(shard)
        work.refuse_others(shard, captions)
        counts.append((captions.stop - captions.start, int(captions.offsets()[-1])))
    return counts


__all__ = ["Job", "StoreWork", "own_shards", "refuse_other_captions"]
