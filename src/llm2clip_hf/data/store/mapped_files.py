# SPDX-License-Identifier: Apache-2.0
"""
Files of a store: safetensors with a record of what they hold, written in one pass, mapped, searched in place.

The header of a shard carries its record and the digests of both record and tensors, so a shard is whole by itself. The
keys of the images of a store lie in `keys.safetensors`:

    hashes        (n,) int64, ascending   first eight bytes of the SHA-256 of each key
    images        (n,) int64              image of each hash
    offsets       (n + 1,) int64          key of image `i` is the bytes `offsets[i]` to `offsets[i + 1]` of `text`
    text          (bytes,) uint8          all keys in UTF-8, image by image

A look-up searches the hashes, which touches log2(n) pages of the mapped file, and compares the key itself.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .folder import StoreFolder


_HEAD_BYTES = 1 << 16
_READ_BYTES = 1 << 22


class DamagedFileError(ValueError):
    """A file of a store is not what was written."""


class Tensor(NamedTuple):
    """A tensor to be written; its parts are asked for twice, so it need not be in memory at once."""

    name: str
    tag: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]

    @classmethod
    def of(cls, name: str, array: np.ndarray, tag: str = "") -> "Tensor":
        """A tensor that is in memory, of the safetensors dtype `tag`."""
        tag = tag or {"i8": "I64", "i2": "I16", "i1": "I8", "u1": "U8", "f4": "F32"}[array.dtype.str[1:]]
        return cls(name, tag, array.shape, lambda: [np.ascontiguousarray(array)])


_BYTES = {"I64": 8, "F32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1}


def write_tensors(folder: StoreFolder, name: str, tensors: Sequence[Tensor], record: dict[str, Any]) -> dict[str, Any]:
    """Write a file whole or not at all; returns the record with the digest of the tensors and the size of the file."""
    # Widest first, so that every tensor is aligned.
    tensors = sorted(tensors, key=lambda tensor: -_BYTES[tensor.tag])
    digest = hashlib.sha256()
    header: dict[str, Any] = {}
    offset = 0
    for tensor in tensors:
        size = int(np.prod(tensor.shape, dtype=np.int64)) * _BYTES[tensor.tag]
        header[tensor.name] = {
            "dtype": tensor.tag,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
        for part in tensor.parts():
            digest.update(part.reshape(-1).view(np.uint8).data)
    record = record | {"sha256": digest.hexdigest()}
    return _write(
        folder,
        name,
        header,
        record,
        lambda: (part.reshape(-1).view(np.uint8).data for tensor in tensors for part in tensor.parts()),
    )


def copy_tensors(
    source: StoreFolder, name: str, target: StoreFolder, new_name: str, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the tensors of a file again, with some entries of the record changed."""
    header, length = _read_header(source, name)
    record = json.loads(header.pop("__metadata__")["record"]) | changes

    def blocks() -> Iterator[bytes]:
        with source.open(name) as file:
            file.seek(8 + length)
            yield from iter(lambda: file.read(_READ_BYTES), b"")

    return _write(target, new_name, header, record, blocks)


def _write(
    folder: StoreFolder, name: str, header: dict[str, Any], record: dict[str, Any], blocks: Callable[[], Iterable[Any]]
) -> dict[str, Any]:
    text = json.dumps(record, sort_keys=True, ensure_ascii=False)
    metadata = {"record": text, "record_sha256": hashlib.sha256(text.encode()).hexdigest()}
    head = json.dumps({"__metadata__": metadata, **header}).encode()
    head += b" " * (-len(head) % 8)

    def parts() -> Iterator[Any]:
        yield struct.pack("<Q", len(head)) + head
        yield from blocks()

    folder.write(name, parts())
    end = max(entry["data_offsets"][1] for entry in header.values())
    return {**json.loads(text), "file": name, "bytes": 8 + len(head) + end}


def read_record(folder: StoreFolder, name: str) -> dict[str, Any]:
    """The record of a file, as `write_tensors` returns it; tensors are not read."""
    size = folder.size(name)
    header, length = _read_header(folder, name)
    metadata = header.pop("__metadata__", {})
    if "record" not in metadata:
        raise ValueError(
            f"`{folder.place(name)}` has no record of what made it: it is of an earlier release, or not of a store. "
            "Choose another folder, or remove it."
        )
    text = metadata["record"]
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("record_sha256"):
        raise DamagedFileError(f"`{folder.place(name)}` has a header that was changed after it was written")
    expected = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    if size != expected:
        raise DamagedFileError(f"`{folder.place(name)}` should have {expected} bytes, got {size}")
    return {**json.loads(text), "file": name, "bytes": expected}


def read_tensor(folder: StoreFolder, name: str, tensor: str, dtype: type[np.generic]) -> np.ndarray:
    """One tensor of a file, read without the others."""
    header, length = _read_header(folder, name)
    start, stop = (8 + length + offset for offset in header[tensor]["data_offsets"])
    return np.frombuffer(folder.read(name, start, stop), dtype=dtype).reshape(header[tensor]["shape"])


def tensors_digest(folder: StoreFolder, name: str) -> str:
    """SHA-256 of the bytes of all tensors of a file."""
    with folder.open(name) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + length)
        return _digest_of(file)


def file_digest(folder: StoreFolder, name: str) -> str:
    """SHA-256 of a whole file."""
    with folder.open(name) as file:
        return _digest_of(file)


def _digest_of(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(_READ_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _read_header(folder: StoreFolder, name: str) -> tuple[dict[str, Any], int]:
    head = folder.read(name, 0, _HEAD_BYTES)
    try:
        (length,) = struct.unpack("<Q", head[:8])
        if length > 100_000_000:
            raise ValueError(f"it states {length} bytes")
        if len(head) < 8 + length:
            head += folder.read(name, len(head), 8 + length)
        header: dict[str, Any] = json.loads(head[8 : 8 + length])
        if not all("data_offsets" in entry for key, entry in header.items() if key != "__metadata__"):
            raise ValueError("a tensor has no place")
    except (struct.error, ValueError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"`{folder.place(name)}` has no readable header: {error}") from error
    return header, int(length)


def map_tensor(
    path: Path,
    name: str,
    tag: str,
    shape: tuple[int, ...],
    dtype: type[np.generic],
    mode: Literal["r", "c"] = "r",
) -> np.ndarray:
    """
    Memory-map one tensor of a safetensors file as a numpy array.

    The lazy slices of the safetensors library cost about 50 microseconds per access and cannot gather; a numpy map of
    the same bytes costs 4 and gathers 4096 rows of 512 halves in 2 milliseconds instead of 300.
    """
    header, length = _read_header(StoreFolder(path.parent), path.name)
    found = header.get(name)
    if found is None or found["dtype"] != tag or tuple(found["shape"]) != shape:
        raise DamagedFileError(
            f"`{path}` should hold a tensor `{name}` of dtype {tag} and shape {shape}, got {found}. "
            "The file does not belong to this store; copy the store again, or embed the captions again."
        )
    if 0 in shape:
        return np.empty(shape, dtype=dtype)
    offset = 8 + length + found["data_offsets"][0]
    # A plain array over the map: the memmap subclass pays for its bookkeeping at every slice.
    return np.asarray(np.memmap(path, mode=mode, dtype=dtype, offset=offset, shape=shape))


KEYS_FILE = "keys.safetensors"


def check_keys(keys: Sequence[str], num_images: int) -> None:
    if isinstance(keys, str) or len(keys) != num_images:
        raise ValueError(f"`keys` has {len(keys)} entries for {num_images} images. Give one key per image.")
    seen: dict[str, int] = {}
    for image, key in enumerate(keys):
        if not isinstance(key, str) or not key:
            raise ValueError(f"The key {key!r} of image {image} is not a non-empty string. Give every image a key.")
        first = seen.setdefault(key, image)
        if first != image:
            raise ValueError(
                f"The key {key!r} belongs to image {first} and to image {image}. Keys must be unique; with several "
                "shards whose keys start anew, put the name of the shard before the key."
            )


def pack_keys(keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of keys, one after the other, and where each begins, with the end of the last."""
    encoded = [key.encode() for key in keys]
    offsets = np.concatenate([[0], np.cumsum([len(key) for key in encoded])]).astype(np.int64)
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets


def write_keys(folder: StoreFolder, parts: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]) -> dict[str, Any]:
    """Write the keys of all images into a store, from those of its shards as `pack_keys` gives them."""
    hashes = np.array([_hash(key) for text, offsets in parts() for key in unpack_keys(text, offsets)], dtype=np.int64)
    images = np.argsort(hashes, kind="stable")
    ordered = hashes[images]
    _refuse_repeated(np.flatnonzero(ordered[1:] == ordered[:-1]), images, parts)
    ends = [offsets for _, offsets in parts()]
    starts = np.concatenate([[0], np.cumsum([offsets[-1] for offsets in ends])])
    joined = np.concatenate([[0], *(start + offsets[1:] for start, offsets in zip(starts, ends))]).astype(np.int64)
    tensors = [
        Tensor.of("hashes", ordered),
        Tensor.of("images", images.astype(np.int64)),
        Tensor.of("offsets", joined),
        Tensor("text", "U8", (int(joined[-1]),), lambda: (text for text, _ in parts())),
    ]
    entry = write_tensors(folder, KEYS_FILE, tensors, {})
    return entry | {"text_bytes": int(joined[-1])}


def _refuse_repeated(candidates: np.ndarray, images: np.ndarray, parts: Callable[[], Iterable[Any]]) -> None:
    if not candidates.size:
        return
    wanted = {int(image) for place in candidates for image in images[place : place + 2]}
    number = 0
    seen: dict[bytes, int] = {}
    for text, offsets in parts():
        for image, key in enumerate(unpack_keys(text, offsets), start=number):
            if image in wanted and (first := seen.setdefault(key, image)) != image:
                raise ValueError(
                    f"The key {key.decode()!r} belongs to image {first} and to image {image}. Keys must be unique; "
                    "with several shards whose keys start anew, put the name of the shard before the key."
                )
        number += len(offsets) - 1


def unpack_keys(text: np.ndarray, offsets: np.ndarray) -> Iterator[bytes]:
    """The keys in what `pack_keys` gives, in UTF-8."""
    content, bounds = text.tobytes(), offsets.tolist()
    return (content[start:stop] for start, stop in zip(bounds, bounds[1:]))


class KeyIndex:
    """The mapped keys of a store."""

    def __init__(self, file: Path, entry: Mapping[str, Any], num_images: int) -> None:
        self._hashes = map_tensor(file, "hashes", "I64", (num_images,), np.int64)
        self._images = map_tensor(file, "images", "I64", (num_images,), np.int64)
        self._offsets = map_tensor(file, "offsets", "I64", (num_images + 1,), np.int64)
        self._text = map_tensor(file, "text", "U8", (entry["text_bytes"],), np.uint8)

    def find(self, key: str) -> int | None:
        """Image of `key`, or `None`."""
        encoded = key.encode()
        wanted = _hash(encoded)
        position = int(np.searchsorted(self._hashes, np.int64(wanted)))
        # Different keys may have the same hash; they follow each other.
        while position < len(self._hashes) and self._hashes[position] == wanted:
            image = int(self._images[position])
            if self._bytes_of(image) == encoded:
                return image
            position += 1
        return None

    def key_of(self, image: int) -> str:
        """The key of an image."""
        return self._bytes_of(image).decode()

    def _bytes_of(self, image: int) -> bytes:
        content: bytes = self._text[self._offsets[image] : self._offsets[image + 1]].tobytes()
        return content


def _hash(key: bytes) -> int:
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little", signed=True)


__all__ = [
    "KEYS_FILE",
    "DamagedFileError",
    "KeyIndex",
    "Tensor",
    "check_keys",
    "copy_tensors",
    "file_digest",
    "map_tensor",
    "pack_keys",
    "read_record",
    "read_tensor",
    "tensors_digest",
    "unpack_keys",
    "write_keys",
    "write_tensors",
]
