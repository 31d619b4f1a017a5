# SPDX-License-Identifier: Apache-2.0
"""
Several processes that fill one folder: who does which shard, and how each learns of the end or failure of the others.

Nobody waits in a collective: shards take minutes, and a process group gives up on a rank that is late, or waits for
ever for one that is dead. Processes meet in the folder instead. Each keeps a small status file there with a sign of
life, or the error that ended it; process 0 watches all of them and the others watch process 0, which passes errors on.
So the processes may sit on several machines that share the folder, with or without a process group.
"""

import json
import os
import platform
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from .. import distributed


if sys.platform != "win32":
    import fcntl


__all__ = ["StoreProcesses", "held"]

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

    Args:
        folder (`Path`): folder of the store, seen by all processes.
        timeout (`float`): seconds to wait for the others without any sign of life.

    Raises:
        ValueError: if `RANK` and `WORLD_SIZE` are not numbers with `0 <= RANK < WORLD_SIZE`.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        self.rank, self.size = _placement()
        self._folder, self._timeout = folder, timeout
        self._captions_done = 0
        self._next_sign = 0.0
        self._identity = {"host": platform.node(), "pid": os.getpid(), "run": uuid.uuid4().hex}
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

    def check(self) -> None:
        """
        Raises:
            RuntimeError: if another process has failed.
        """
        self._check(self._statuses())

    def wait_for(self, is_done: Callable[[], bool], missing: Callable[[], str]) -> None:
        """
        Wait until `is_done()`; the others are taken for dead after `timeout` seconds without a sign of life.

        Args:
            is_done: asked again and again; looks at files.
            missing: what is missing, for the message.

        Raises:
            RuntimeError: if another process has failed.
            TimeoutError: naming what is missing.
        """
        pause, last_sign = 0.01, time.monotonic()
        before: tuple[dict[int, str], str] | None = None
        while not is_done():
            statuses = self._statuses()
            self._check(statuses)
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

    def _check(self, statuses: dict[int, str]) -> None:
        for rank, text in statuses.items():
            failure = json.loads(text)["failure"]
            if failure is not None and text != self._old.get(rank):
                raise OtherProcessFailedError(
                    failure,
                    f"Of the {self.size} processes that fill `{self._folder}`, one failed: {failure} [The output of "
                    "that process has more. Finished shards stay; start all processes again to resume.]",
                )

    def _timeout_message(self, statuses: dict[int, str], missing: str) -> str:
        known = [(rank, json.loads(text)) for rank, text in statuses.items()]
        signs = [
            f"{rank} on {status['host']} ({status['failure'] or str(status['captions']) + ' captions'})"
            for rank, status in known
        ]
        return (
            f"Process {self.rank} of {self.size} waited {self._timeout:.0f} s for {missing} in `{self._folder}` "
            f"without a sign of life. Last known processes: {', '.join(signs) or 'none'}. Check that every process "
            "calls `embed_captions`, is alive and sees the same folder, then start all again: finished shards stay."
        )

    def _status_file(self, rank: int) -> Path:
        return self._folder / STATUS_FILES.replace("*", f"{rank:05d}")

    def _write_status(self, failure: str | None) -> None:
        self._next_sign = time.monotonic() + _SECONDS_BETWEEN_SIGNS
        status = {**self._identity, "time": time.time(), "captions": self._captions_done, "failure": failure}
        file = self._status_file(self.rank)
        # Whole or not at all, but not flushed to disk: it means nothing after a crash of the machine.
        temporary = file.with_name(f".{file.name}.tmp")
        try:
            temporary.write_text(json.dumps(status), encoding="utf-8")
            os.replace(temporary, file)
        except OSError:
            # An error in telling an error would hide it; a missing sign of life is what the timeout is for.
            temporary.unlink(missing_ok=True)

    def _statuses(self) -> dict[int, str]:
        """By rank, the status of every watched process that has one."""
        statuses = {}
        # With hundreds of processes, all watching all would be too much for a shared folder.
        for rank in range(1, self.size) if self.is_first else [0]:
            try:
                statuses[rank] = self._status_file(rank).read_text(encoding="utf-8")
            except OSError:
                continue
        return statuses


@contextmanager
def held(path: Path) -> Iterator[None]:
    """
    Holds a lock file while the block runs, so that two runs never write the same file; a kill frees it.

    Where the system or the file system has no locks, the block runs without.

    Args:
        path (`Path`): the lock file; created if needed, removed after a block without an error.

    Raises:
        RuntimeError: if another process holds it.
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
