# SPDX-License-Identifier: Apache-2.0
"""
String keys of the images of a store: `keys.safetensors`, searched in place.

    hashes        (n,) int64, ascending   first eight bytes of the SHA-256 of each key
    images        (n,) int64              image of each hash
    offsets       (n + 1,) int64          key of image `i` is the bytes `offsets[i]` to `offsets[i + 1]` of `text`
    text          (bytes,) uint8          all keys in UTF-8, image by image

A look-up searches the hashes, which touches log2(n) pages of the mapped file, and compares the key itself.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file

from ...files import sha256_of_file, write_atomically


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
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    found = header.get(name)
    if found is None or found["dtype"] != tag or tuple(found["shape"]) != shape:
        raise ValueError(
            f"`{path}` should hold a tensor `{name}` of dtype {tag} and shape {shape}, got {found}. "
            "The file does not belong to this store; copy the store again, or embed the captions again."
        )
    if 0 in shape:
        return np.empty(shape, dtype=dtype)
    offset = 8 + header_bytes + found["data_offsets"][0]
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


def keys_digest(keys: Sequence[str]) -> str:
    """Hexadecimal SHA-256 of the keys in their order."""
    digest = hashlib.sha256()
    for key in keys:
        encoded = key.encode()
        digest.update(f"{len(encoded)}:".encode() + encoded)
    return digest.hexdigest()


def write_keys(folder: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Write the keys of all images into a store."""
    encoded = [key.encode() for key in keys]
    hashes = np.array([_hash(key) for key in encoded], dtype=np.int64)
    images = np.argsort(hashes, kind="stable")
    offsets = np.concatenate([[0], np.cumsum([len(key) for key in encoded])]).astype(np.int64)
    tensors = {
        "hashes": torch.from_numpy(hashes[images]),
        "images": torch.from_numpy(images.astype(np.int64)),
        "offsets": torch.from_numpy(offsets),
        "text": torch.from_numpy(np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()),
    }
    file = folder / KEYS_FILE
    write_atomically(file, lambda temporary: save_file(tensors, temporary))
    return {
        "file": file.name,
        "bytes": file.stat().st_size,
        "text_bytes": int(offsets[-1]),
        "sha256": sha256_of_file(file),
        "keys_sha256": keys_digest(keys),
    }


class KeyIndex:
    """The mapped keys of a store."""

    def __init__(self, folder: Path, entry: Mapping[str, Any], num_images: int) -> None:
        file = folder / entry["file"]
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
            if self._text[self._offsets[image] : self._offsets[image + 1]].tobytes() == encoded:
                return image
            position += 1
        return None


def _hash(key: bytes) -> int:
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little", signed=True)


__all__ = ["KEYS_FILE", "KeyIndex", "check_keys", "keys_digest", "map_tensor", "write_keys"]
