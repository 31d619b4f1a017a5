# SPDX-License-Identifier: Apache-2.0
"""
Several processes that fill one folder: who does which shard, and how each learns of the end or failure of the others.

Nobody waits in a collective: shards take minutes, and a process group gives up on a rank that is late, or waits for
ever for one that is dead. Processes meet in the folder instead. Each keeps a small status file there with a sign of
life, or the error that ended it; process 0 watches all of them and the others watch process 0, which passes errors on.
So the processes may sit on several machines that share the folder, with or without a process group.
"""

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from ... import distributed
from ...files import sha256_of_file, write_atomically, write_json_atomically
from ..captions import CaptionTable
from .embedding_store import FORMAT_NAME, FORMAT_VERSION, INDEX_FILE, LAYOUT_FILE, PLAN_FILE, CaptionEmbeddingStore
from .fingerprint import FingerprintValue, build_differences
from .mapped_files import keys_digest, write_keys


if sys.platform != "win32":
    import fcntl
logger = logging.getLogger(__name__)
STATUS_FILES = "process-*.json"
_SECONDS_BETWEEN_SIGNS = 5.0
_LONGEST_PAUSE = 1.0


class OtherProcessFailedError(RuntimeError):
    """Another process ended with an error; this one has none of its own. `failure` says which and why."""

    def __init__(self, failure: str, message: str) -> None:
        super().__init__(message)
        self.failure = failure


class StoreProcesses:
    """
    This process among those that fill `folder`.

    Rank and number come from the default process group, or from the environment variables `RANK` and `WORLD_SIZE` that
    torchrun and `accelerate launch` set. Otherwise there is one process.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        self.rank, self.size = _placement()
        self._folder, self._timeout = folder, timeout
        self._captions_done = 0
        self._next_sign = 0.0
        # Statuses that were there before this run, by rank; an error in them is an old one.
        self._old: dict[int, str] = {}

    @property
    def is_first(self) -> bool:
        """Whether this process writes what exists once: plan, layout, keys and index."""
        return self.rank == 0

    def owns(self, shard: int) -> bool:
        """Whether this process embeds shard number `shard`; every shard has one owner."""
        return shard % self.size == self.rank

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around all work: an error in it is told to the other processes."""
        if self.size == 1:
            yield
            return
        self._begin()
        try:
            yield
        except OtherProcessFailedError as error:
            self._write_status(error.failure)
            raise
        except BaseException as error:
            self._write_status(f"process {self.rank}: {type(error).__name__}: {error}")
            raise
        self._status_file(self.rank).unlink(missing_ok=True)

    def sign_of_life(self, captions: int = 0) -> None:
        """Tells the others, every few seconds at most, that this process is alive and did `captions` more captions."""
        self._captions_done += captions
        if self.size > 1 and time.monotonic() >= self._next_sign:
            self._write_status(None)

    def wait_for(self, is_done: Callable[[], bool], missing: Callable[[], str]) -> None:
        """Wait until `is_done()`; the others are taken for dead after `timeout` seconds without a sign of life."""
        pause, last_sign = 0.01, time.monotonic()
        before: tuple[dict[int, str], str] | None = None
        while not is_done():
            statuses = self.check()
            signs = (statuses, missing())
            if signs != before:
                before, last_sign = signs, time.monotonic()
            elif time.monotonic() - last_sign > self._timeout:
                raise TimeoutError(self._timeout_message(statuses, missing()))
            self.sign_of_life()
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE, pause * 1.5)

    def _begin(self) -> None:
        failure = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._status_file(self.rank).unlink(missing_ok=True)
        except OSError as error:
            failure = f"{type(error).__name__}: {error}"
            if not distributed.is_initialized():
                raise
        if distributed.is_initialized():
            # One meeting at the start, after which every status is of this run.
            failures: list[str | None] = [None] * self.size
            dist.all_gather_object(failures, failure)
            for rank, each in enumerate(failures):
                if each is not None:
                    raise RuntimeError(f"Process {rank} of {self.size} cannot use `{self._folder}`: {each}")
        else:
            self._old = self._statuses()
        self._write_status(None)

    def check(self) -> dict[int, str]:
        """The statuses of the watched processes; an error if one of them failed."""
        statuses = self._statuses()
        for rank, text in statuses.items():
            failure = json.loads(text)["failure"]
            if failure is not None and text != self._old.get(rank):
                raise OtherProcessFailedError(
                    failure,
                    f"Of the {self.size} processes that fill `{self._folder}`, one failed: {failure} [The output of "
                    "that process has more. Finished shards stay; start all processes again to resume.]",
                )
        return statuses

    def _timeout_message(self, statuses: dict[int, str], missing: str) -> str:
        signs = []
        for rank, text in statuses.items():
            status = json.loads(text)
            signs.append(f"{rank} on {status['host']} ({status['failure'] or str(status['captions']) + ' captions'})")
        return (
            f"Process {self.rank} of {self.size} waited {self._timeout:.0f} s for {missing} in `{self._folder}` "
            f"without a sign of life. Last known processes: {', '.join(signs) or 'none'}. Check that every process "
            "calls `embed_captions`, is alive and sees the same folder, then start all again: finished shards stay."
        )

    def _status_file(self, rank: int) -> Path:
        return self._folder / STATUS_FILES.replace("*", f"{rank:05d}")

    def _write_status(self, failure: str | None) -> None:
        self._next_sign = time.monotonic() + _SECONDS_BETWEEN_SIGNS
        status = {"host": platform.node(), "pid": os.getpid(), "time": time.time(), "captions": self._captions_done}
        file = self._status_file(self.rank)
        # Whole or not at all, but not flushed to disk: it means nothing after a crash of the machine.
        temporary = file.with_name(f".{file.name}.tmp")
        try:
            temporary.write_text(json.dumps(status | {"failure": failure}), encoding="utf-8")
            os.replace(temporary, file)
        except OSError:
            # An error in telling an error would hide it; a missing sign of life is what the timeout is for.
            temporary.unlink(missing_ok=True)

    def _statuses(self) -> dict[int, str]:
        """By rank, the status of every watched process that has one."""
        statuses = {}
        # With hundreds of processes, all watching all would be too much for a shared folder.
        for rank in range(1, self.size) if self.is_first else [0]:
            with suppress(OSError):
                statuses[rank] = self._status_file(rank).read_text(encoding="utf-8")
        return statuses


@contextmanager
def held(path: Path) -> Iterator[None]:
    """
    Holds a lock file while the block runs, so that two runs never write the same file; a kill frees it.

    Where the system or the file system has no locks, the block runs without.
    """
    if sys.platform == "win32":
        yield
        return
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RuntimeError(
                f"Another run ({file.read().strip() or 'unknown'}) is embedding captions into `{path.parent}`. "
                "Wait for it, end it, or choose another `output_dir`."
            ) from error
        except OSError:
            yield
            return
        file.truncate(0)
        file.write(f"host {platform.node()}, process {os.getpid()}")
        file.flush()
        yield
        path.unlink(missing_ok=True)


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


_LOCK_FILE = ".build.lock"
# What killed and finished runs of any number of processes leave behind.
_LEFTOVERS = (
    PLAN_FILE,
    "embeddings-*.json",
    STATUS_FILES,
    f".{STATUS_FILES}.tmp",
    f".{PLAN_FILE}.tmp",
    ".embeddings-*.tmp",
    ".embeddings-*.lock",
    _LOCK_FILE,
)


class StoreBuild:
    """The folder of a store, as one of the processes that fill it sees it."""

    def __init__(
        self,
        folder: Path,
        processes: StoreProcesses,
        table: CaptionTable,
        fingerprint: Mapping[str, FingerprintValue],
        dtype: str,
        rows_per_shard: int,
    ) -> None:
        self._folder, self._processes, self._table = folder, processes, table
        plan = {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "dtype": dtype,
            "num_images": len(table),
            "num_captions": table.num_captions,
            "rows_per_shard": rows_per_shard,
            "source_names": list(table.source_names),
            "captions_sha256": table.sha256,
            "fingerprint": dict(fingerprint),
        }
        # Through JSON and back, so that a comparison with a file never fails on a tuple or a numpy number.
        self._plan: dict[str, Any] = json.loads(json.dumps(plan))
        self._num_shards = -(-table.num_captions // rows_per_shard)
        self._missing = list(range(self._num_shards))

    @property
    def has_index(self) -> bool:
        """Whether the store is finished."""
        return (self._folder / INDEX_FILE).is_file()

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Around the writing of shards: claims the folder, and writes the plan or compares with it."""
        if not self._processes.is_first:
            self._follow()
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with held(self._folder / _LOCK_FILE):
            if not self.has_index:
                self._start()
            yield

    def rows_of(self, shard: int) -> tuple[int, int]:
        """First caption row of a shard and the row after its last one."""
        start = shard * self._plan["rows_per_shard"]
        return start, min(start + self._plan["rows_per_shard"], self._table.num_captions)

    def own_shards(self) -> tuple[list[int], list[int]]:
        """Numbers of this process's shards: the finished ones and those to do."""
        own = [shard for shard in range(self._num_shards) if self._processes.owns(shard)]
        finished = {shard for shard in own if self.is_finished(shard)}
        return sorted(finished), [shard for shard in own if shard not in finished]

    def is_finished(self, shard: int) -> bool:
        """Whether shard number `shard` needs no more work."""
        record = _read_json(self._folder / _record_name(shard))
        file = self._folder / _shard_name(shard)
        if record is not None and file.is_file() and file.stat().st_size == record["bytes"]:
            return True
        # Records are removed after the index is written, so the order of the two questions matters.
        return self.has_index

    def claimed(self, shard: int) -> AbstractContextManager[None]:
        """Context in which no other run writes shard number `shard`."""
        return held(self._folder / f".{_shard_name(shard)}.lock")

    def write_shard(self, shard: int, embeddings: torch.Tensor) -> None:
        """Write the embeddings `(rows, dim)` of a shard, then its record."""
        file = self._folder / _shard_name(shard)
        write_atomically(file, lambda temporary: save_file({"embeddings": embeddings}, temporary))
        record = {
            "file": file.name,
            "rows": embeddings.shape[0],
            "dim": embeddings.shape[1],
            "bytes": file.stat().st_size,
            "sha256": sha256_of_file(file),
        }
        write_json_atomically(self._folder / _record_name(shard), record)

    def finish(self, keys: Sequence[str] | None) -> None:
        """Process 0 waits for all shards and writes the index; the others wait for the index."""
        if not self._processes.is_first:
            self._processes.wait_for(lambda: self.has_index, lambda: f"`{INDEX_FILE}` of process 0")
        elif not self.has_index:
            self._processes.wait_for(lambda: not self._still_missing(), self._describe_missing)
            self._write_index(keys)

    def open(self, keys: Sequence[str] | None) -> CaptionEmbeddingStore:
        """Open the finished store."""
        index = self._index()
        self._refuse_differences({key: index.get(key) for key in self._plan})
        if keys is not None and "keys" not in index:
            if self._processes.is_first:
                with held(self._folder / _LOCK_FILE):
                    index |= {"keys": write_keys(self._folder, keys)}
                    write_json_atomically(self._folder / INDEX_FILE, index)
            else:
                self._processes.wait_for(lambda: "keys" in self._index(), lambda: "keys of process 0")
                index = self._index()
        if keys is not None and index["keys"]["keys_sha256"] != keys_digest(keys):
            raise ValueError(
                f"The store in `{self._folder}` has other keys than `keys`, or the same in another order. "
                "Leave `keys` out to use the store as it is, or choose another `output_dir`."
            )
        if self._processes.is_first:
            self._remove_leftovers()
        return CaptionEmbeddingStore.open(self._folder)

    def _index(self) -> dict[str, Any]:
        index: dict[str, Any] = json.loads((self._folder / INDEX_FILE).read_text(encoding="utf-8"))
        return index

    def _start(self) -> None:
        plan_file = self._folder / PLAN_FILE
        if (found := _read_json(plan_file)) is not None:
            self._refuse_differences(found)
            finished = self._num_shards - len(self._still_missing())
            logger.info("Resuming in %s: %d of %d shards are finished.", self._folder, finished, self._num_shards)
        elif leftovers := sorted(file.name for file in self._folder.glob("embeddings-*")):
            raise ValueError(
                f"`{self._folder}` holds {leftovers[:3]} of an unknown run, but no `{PLAN_FILE}` and no "
                f"`{INDEX_FILE}`. Choose another `output_dir`, or delete the folder."
            )
        layout = {
            "offsets": torch.from_numpy(self._table.offsets),
            "source_ids": torch.from_numpy(self._table.source_ids),
        }
        write_atomically(self._folder / LAYOUT_FILE, lambda temporary: save_file(layout, temporary))
        write_json_atomically(plan_file, self._plan)

    def _follow(self) -> None:
        plan_file = self._folder / PLAN_FILE
        self._processes.wait_for(lambda: self.has_index or plan_file.is_file(), lambda: f"`{PLAN_FILE}` of process 0")
        # Gone again if process 0 found all shards finished.
        if (found := _read_json(plan_file)) is not None:
            self._refuse_differences(found)

    def _still_missing(self) -> list[int]:
        self._missing = [shard for shard in self._missing if not self.is_finished(shard)]
        return self._missing

    def _describe_missing(self) -> str:
        files = ", ".join(f"`{_shard_name(shard)}`" for shard in self._missing[:5])
        more = f" and {len(self._missing) - 5} more" if len(self._missing) > 5 else ""
        return f"{len(self._missing)} of {self._num_shards} shards ({files}{more})"

    def _write_index(self, keys: Sequence[str] | None) -> None:
        records = [
            json.loads((self._folder / _record_name(shard)).read_text(encoding="utf-8"))
            for shard in range(self._num_shards)
        ]
        dims = {record.pop("dim") for record in records}
        if len(dims) > 1:
            raise ValueError(
                f"The shards in `{self._folder}` have different embedding widths {sorted(dims)}: the encoder changed "
                "between runs or processes with the same fingerprint. Delete the folder and embed again."
            )
        layout = self._folder / LAYOUT_FILE
        layout_entry = {"file": layout.name, "bytes": layout.stat().st_size, "sha256": sha256_of_file(layout)}
        index = self._plan | {"embedding_dim": dims.pop(), "layout": layout_entry, "shards": records}
        if keys is not None:
            index["keys"] = write_keys(self._folder, keys)
        write_json_atomically(self._folder / INDEX_FILE, index)

    def _remove_leftovers(self) -> None:
        for pattern in _LEFTOVERS:
            for file in self._folder.glob(pattern):
                # They do no harm, and a finished store may be read-only.
                with suppress(OSError):
                    file.unlink(missing_ok=True)

    def _refuse_differences(self, found: Mapping[str, Any]) -> None:
        differences = build_differences(found, self._plan)
        if differences:
            raise ValueError(
                f"`{self._folder}` holds embeddings made in another way: {differences}. "
                "Choose another `output_dir`, or delete the folder to embed again."
            )


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return content


def _shard_name(shard: int) -> str:
    return f"embeddings-{shard:05d}.safetensors"


def _record_name(shard: int) -> str:
    return f"embeddings-{shard:05d}.json"


__all__ = ["StoreBuild", "StoreProcesses", "held"]
