# SPDX-License-Identifier: Apache-2.0
"""
What a store is made of: shards, each whole by itself, and an index over all of them.

A shard is one safetensors file with the embeddings of a slice of the captions, their layout, and a record of what made
them. Whoever has a slice writes its shard, on any machine, in any order, without asking anybody; a shard that is there
is finished. `merge` looks at the records of all shards and writes the index, which makes the folder a store; it gives
the same bytes whoever calls it, and however often.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch

from .fingerprint import FingerprintValue, build_differences
from .folder import StoreFolder
from .mapped_files import (
    KEYS_FILE,
    DamagedFileError,
    Tensor,
    copy_tensors,
    pack_keys,
    read_record,
    read_tensor,
    tensors_digest,
    unpack_keys,
    write_keys,
    write_tensors,
)
from .slices import CaptionSlice


FORMAT_NAME = "llm2clip-caption-embeddings"
FORMAT_VERSION = 2
INDEX_FILE = "index.json"
LAYOUT_FILE = "layout.safetensors"
_SHARD_START = "embeddings-"
# Name of the dtype -> (torch dtype that is read, safetensors tag, integer type of the same width). numpy has no
# bfloat16, so every dtype is mapped as integers and reinterpreted by torch. int8 is read as row times scale.
DTYPES: dict[str, tuple[torch.dtype, str, type[np.generic]]] = {
    "float16": (torch.float16, "F16", np.int16),
    "bfloat16": (torch.bfloat16, "BF16", np.int16),
    "float32": (torch.float32, "F32", np.int32),
    "int8": (torch.float32, "I8", np.int8),
}
# What all shards of a store have in common.
_SHARED = ("dtype", "embedding_dim", "source_names", "has_keys")
_READERS = 16


def torch_dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a store dtype name; ValueError for a dtype that a store cannot have."""
    if name not in DTYPES:
        raise ValueError(f"`dtype` must be one of {sorted(DTYPES)}, got {name!r}.")
    return DTYPES[name][0]


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"{_SHARD_START}{number:05d}.safetensors"


def shard_names(folder: StoreFolder) -> list[str]:
    """The files of all shards that are there, in order of their numbers."""
    names = folder.names(_SHARD_START)
    return sorted((name for name in names if name.endswith(".safetensors")), key=lambda name: (len(name), name))


def pack_rows(embeddings: torch.Tensor, dtype: str) -> dict[str, np.ndarray]:
    """Embeddings as they lie in a shard: `embeddings` as integers, and for int8 `scales`, one per row."""
    kind, _, integer = DTYPES[dtype]
    values = embeddings.to(kind)
    if dtype == "int8":
        scales = values.abs().amax(1) / 127
        values = (values / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round()
        return {"embeddings": values.to(torch.int8).numpy(), "scales": scales.numpy()}
    return {"embeddings": values.contiguous().view({2: torch.int16, 4: torch.int32}[values.itemsize]).numpy()}


def write_shard(
    folder: StoreFolder,
    number: int,
    rows_on_disk: Mapping[str, np.ndarray],
    captions: CaptionSlice,
    rows: tuple[int, int],
    num_rows: int,
    fingerprint: Mapping[str, FingerprintValue],
    dtype: str,
) -> dict[str, Any]:
    """Write the embeddings of a slice, as `pack_rows` gives them; returns the record of the shard."""
    embeddings = rows_on_disk["embeddings"]
    tensors = [
        Tensor.of("embeddings", embeddings, DTYPES[dtype][1]),
        *([Tensor.of("scales", rows_on_disk["scales"])] if dtype == "int8" else []),
        Tensor.of("offsets", captions.offsets()),
        Tensor.of("source_ids", captions.source_ids().astype(np.int16)),
    ]
    if captions.keys is not None:
        text, bounds = pack_keys(captions.keys)
        tensors += [Tensor.of("key_text", text), Tensor.of("key_offsets", bounds)]
    record = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "rows": list(rows),
        "num_rows": num_rows,
        "num_images": captions.stop - captions.start,
        "num_captions": embeddings.shape[0],
        "embedding_dim": embeddings.shape[1],
        "source_names": list(captions.table.source_names),
        "has_keys": captions.keys is not None,
        "captions_sha256": captions.digest(),
        "fingerprint": dict(fingerprint),
    }
    return write_tensors(folder, shard_name(number), tensors, record)


def read_shard(folder: StoreFolder, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The embeddings of a shard as `pack_rows` gave them."""
    rows = {"embeddings": read_tensor(folder, record["file"], "embeddings", DTYPES[record["dtype"]][2])}
    if record["dtype"] == "int8":
        rows["scales"] = read_tensor(folder, record["file"], "scales", np.float32)
    return rows


def keys_of(folder: StoreFolder, name: str) -> list[str]:
    """The keys of the images of a shard."""
    text, bounds = next(_keys_of(folder, [name]))
    return [key.decode() for key in unpack_keys(text, bounds)]


def shard_record(folder: StoreFolder, name: str) -> dict[str, Any]:
    """The record of a shard; a `DamagedFileError` if it has none."""
    record = read_record(folder, name)
    if record.get("format") != FORMAT_NAME or record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"`{folder.place(name)}` has format {record.get('format')!r}, version {record.get('format_version')!r}; "
            f"this release makes stores of {FORMAT_NAME!r}, version {FORMAT_VERSION}."
        )
    return record


def shard_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In what the shards of two builds differ, as text; empty if they can be of one store."""
    keys = [key for key in _SHARED if key in found and key in wanted]
    return build_differences(
        *({"fingerprint": record["fingerprint"], **{key: record[key] for key in keys}} for record in (found, wanted))
    )


def damage_of(folder: StoreFolder, name: str, sha256: str | None = None) -> str:
    """What is wrong with a file, by its own digests or one from elsewhere; empty if nothing. Reads all of it."""
    try:
        record = read_record(folder, name)
    except DamagedFileError as error:
        return str(error)
    if not tensors_digest(folder, name) == record["sha256"] == (sha256 or record["sha256"]):
        return f"`{folder.place(name)}` does not match its SHA-256"
    return ""


def merge(folder: StoreFolder, others: Sequence[StoreFolder] = ()) -> dict[str, Any]:
    """
    Write the index over the shards of a folder, and those of others, which are copied; returns the index.

    Raises:
        ValueError: if a shard is missing or damaged, two overlap, or they were made in different ways; names them.
    """
    for other in others:
        _copy_shards(other, folder)
    records = _in_order(folder, _records_of(folder))
    names = [record["file"] for record in records]
    folder.remove_unfinished([*names, LAYOUT_FILE, KEYS_FILE, INDEX_FILE])
    first = records[0]
    layout = _write_layout(folder, records)
    shards = [
        {
            "file": record["file"],
            "bytes": record["bytes"],
            "images": record["num_images"],
            "rows": record["num_captions"],
            "sha256": record["sha256"],
            "captions_sha256": record["captions_sha256"],
        }
        for record in records
    ]
    index: dict[str, Any] = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "dtype": first["dtype"],
        "num_images": sum(record["num_images"] for record in records),
        "num_captions": sum(record["num_captions"] for record in records),
        "embedding_dim": first["embedding_dim"],
        "source_names": first["source_names"],
        "captions_sha256": _digest_of([[shard["images"], shard["captions_sha256"]] for shard in shards]),
        "fingerprint": first["fingerprint"],
        "layout": layout,
        "shards": shards,
    }
    if first["has_keys"]:
        index["keys"] = write_keys(folder, partial(_keys_of, folder, names))
    write_index(folder, index)
    return index


def write_index(folder: StoreFolder, index: Mapping[str, Any]) -> None:
    """Write an index with its own digest."""
    content = {**index, "index_sha256": _digest_of(index)}
    folder.write(INDEX_FILE, [(json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()])


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_index(folder: StoreFolder) -> dict[str, Any] | None:
    """The index of a finished store of this or an earlier version; None if there is none."""
    try:
        text = folder.read(INDEX_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    place = folder.place(INDEX_FILE)
    remedy = "Write it again with `llm2clip store merge`, or copy the store again."
    try:
        index = json.loads(text)
        found, version = index.get("format"), index.get("format_version")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"`{place}` is not valid JSON ({error}). {remedy}") from error
    if found != FORMAT_NAME or version not in (1, FORMAT_VERSION):
        raise ValueError(
            f"`{place}` has format {found!r}, version {version!r}; this release reads {FORMAT_NAME!r}, version 1 and "
            f"{FORMAT_VERSION}. Update the package, or embed the captions again."
        )
    if version > 1 and index.pop("index_sha256", None) != _digest_of(index):
        raise ValueError(f"`{place}` was changed after it was written. {remedy}")
    return dict(index)


def _records_of(folder: StoreFolder) -> list[dict[str, Any]]:
    names = shard_names(folder)
    if not names:
        raise ValueError(
            f"`{folder.path}` holds no shard. Embed captions into it first, with `llm2clip embed-captions`."
        )
    try:
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(partial(shard_record, folder), names))
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}. Embed its captions again with `llm2clip store repair`.") from error


def _in_order(folder: StoreFolder, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records in the order of their rows, which must be of one build and without a gap."""
    records = sorted(records, key=lambda record: (record["rows"], record["file"]))
    total = max(record["num_rows"] for record in records)
    end, before = 0, ""
    remedy = "Embed them with `llm2clip embed-captions` and the same data; finished shards are kept."
    for record in records:
        if differences := shard_differences(records[0], record):
            raise ValueError(
                f"`{records[0]['file']}` and `{record['file']}` of `{folder.path}` were made in two ways: "
                f"{differences}. Embed the captions of one of them again, with the settings of the other."
            )
        start, stop = record["rows"]
        if start < end:
            raise ValueError(
                f"`{before}` and `{record['file']}` of `{folder.path}` overlap: both hold row {start}. They are of "
                "two builds with different slices; remove the shards of one of them."
            )
        if start > end:
            raise ValueError(f"Rows {end} to {start} of {total} are missing in `{folder.path}`. {remedy}")
        end, before = stop, record["file"]
    if end < total:
        raise ValueError(f"Rows {end} to {total} of {total} are missing in `{folder.path}`. {remedy}")
    return records


def _write_layout(folder: StoreFolder, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    images = sum(record["num_images"] for record in records)
    captions = sum(record["num_captions"] for record in records)

    def offsets() -> Iterator[np.ndarray]:
        first = 0
        yield np.zeros(1, dtype=np.int64)
        for record in records:
            yield first + read_tensor(folder, record["file"], "offsets", np.int64)[1:]
            first += record["num_captions"]

    def source_ids() -> Iterable[np.ndarray]:
        return (read_tensor(folder, record["file"], "source_ids", np.int16) for record in records)

    tensors = [
        Tensor("offsets", "I64", (images + 1,), offsets),
        Tensor("source_ids", "I16", (captions,), source_ids),
    ]
    return write_tensors(folder, LAYOUT_FILE, tensors, {})


def _keys_of(folder: StoreFolder, names: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for name in names:
        yield read_tensor(folder, name, "key_text", np.uint8), read_tensor(folder, name, "key_offsets", np.int64)


def _copy_shards(source: StoreFolder, target: StoreFolder) -> None:
    there = set(shard_names(target))
    for record in _records_of(source):
        name = record["file"]
        if name in there:
            if read_record(target, name)["sha256"] == record["sha256"]:
                continue
            raise ValueError(
                f"`{source.place(name)}` and `{target.place(name)}` overlap and differ. Remove the one that is wrong."
            )
        copied = False
        if not source.is_remote and not target.is_remote:
            with suppress(OSError):  # another disk, or a file system without links
                os.makedirs(target.root, exist_ok=True)
                os.link(f"{source.root}/{name}", f"{target.root}/{name}")
                copied = True
        if not copied:
            copy_tensors(source, name, target, name, {})


def append(folder: StoreFolder, others: Sequence[StoreFolder]) -> dict[str, Any]:
    """Put copies of the shards of other finished stores behind those of a store; returns the new index."""
    records = _in_order(folder, _records_of(folder))
    added = [(other, record) for other in others for record in _in_order(other, _records_of(other))]
    for other, record in added:  # before anything is written
        if differences := shard_differences(records[0], record):
            raise ValueError(
                f"`{other.path}` was made in another way than `{folder.path}`: {differences}. Embed its captions "
                "again, with the settings of the other."
            )
    end = records[-1]["rows"][1]
    total = end + sum(record["rows"][1] - record["rows"][0] for _, record in added)
    number = max(int(record["file"][len(_SHARD_START) :].partition(".")[0]) for record in records)
    folder.remove(INDEX_FILE)
    for other, record in added:
        number += 1
        size = record["rows"][1] - record["rows"][0]
        copy_tensors(other, record["file"], folder, shard_name(number), {"rows": [end, end + size], "num_rows": total})
        end += size
    return merge(folder)


__all__ = [
    "DTYPES",
    "FORMAT_VERSION",
    "INDEX_FILE",
    "DamagedFileError",
    "append",
    "damage_of",
    "keys_of",
    "merge",
    "pack_rows",
    "read_index",
    "read_shard",
    "shard_differences",
    "shard_name",
    "shard_names",
    "shard_record",
    "torch_dtype_of",
    "write_index",
    "write_shard",
]
