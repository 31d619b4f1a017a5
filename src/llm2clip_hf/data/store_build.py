# SPDX-License-Identifier: Apache-2.0
"""
A store while it is being filled: plan, shards with their records, and the index that makes the folder a store.

    build.json                            the plan; all runs that fill the folder must agree with it
    embeddings-00000.safetensors          a shard, followed by
    embeddings-00000.json                 its record, written last: a shard without one is done again
    index.json                            written when all records are there; then plan and records are removed

Every file appears whole or not at all, so a kill at any moment costs the unfinished shard and nothing else.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .atomic import sha256_of_file, write_atomically, write_json_atomically
from .captions import CaptionTable
from .embedding_store import (
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_FILE,
    LAYOUT_FILE,
    PLAN_FILE,
    CaptionEmbeddingStore,
)
from .fingerprint import FingerprintValue
from .store_identity import fingerprint_differences, with_shared_entries
from .store_keys import keys_digest, write_keys
from .store_processes import STATUS_FILES, StoreProcesses, held


__all__ = ["StoreBuild"]

logger = logging.getLogger(__name__)

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
    """
    The folder of a store, as one of the processes that fill it sees it.

    Args:
        folder (`Path`): folder of the store.
        processes (`StoreProcesses`): this process among all.
        table (`CaptionTable`): the captions.
        fingerprint (mapping): what the embeddings depend on.
        dtype (`str`): dtype of the store.
        rows_per_shard (`int`): captions per shard.
    """

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
        """
        Open the finished store.

        Args:
            keys (sequence of `str`, *optional*): added if the store has none.

        Raises:
            ValueError: if the store was made in another way, or has other keys.
        """
        index_file = self._folder / INDEX_FILE
        index = json.loads(index_file.read_text(encoding="utf-8"))
        self._refuse_differences({key: index.get(key) for key in self._plan})
        if keys is not None and "keys" not in index:
            if self._processes.is_first:
                with held(self._folder / _LOCK_FILE):
                    write_json_atomically(index_file, index | {"keys": write_keys(self._folder, keys)})
            else:
                self._processes.wait_for(
                    lambda: "keys" in json.loads(index_file.read_text(encoding="utf-8")), lambda: "keys of process 0"
                )
            index = json.loads(index_file.read_text(encoding="utf-8"))
        if keys is not None and index["keys"]["keys_sha256"] != keys_digest(keys):
            raise ValueError(
                f"The store in `{self._folder}` has other keys than `keys`, or the same in another order. "
                "Leave `keys` out to use the store as it is, or choose another `output_dir`."
            )
        if self._processes.is_first:
            self._remove_leftovers()
        return CaptionEmbeddingStore.open(self._folder)

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
        # The dtype of the weights counts here: rows of two roundings are not mixed in one store.
        old, new = with_shared_entries(found["fingerprint"], self._plan["fingerprint"])
        differences = fingerprint_differences(
            _flat({**found, "fingerprint": old}), _flat({**self._plan, "fingerprint": new})
        )
        if differences:
            raise ValueError(
                f"`{self._folder}` holds embeddings made in another way: {differences}. "
                "Choose another `output_dir`, or delete the folder to embed again."
            )


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The plan with the fingerprint's keys beside its own, for messages that name single keys."""
    rest = {key: value for key, value in plan.items() if key != "fingerprint"}
    return rest | {f"fingerprint.{key}": value for key, value in plan["fingerprint"].items()}


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
