# SPDX-License-Identifier: Apache-2.0
"""
Caption embeddings on disk, computed once and read many times.

A store is a folder:

    index.json                  format version, sizes, dtype, source names, fingerprint, and a digest per file
    layout.safetensors          `offsets` (num_images + 1,) and `source_ids` (num_captions,)
    embeddings-00000.safetensors, ...   `embeddings` (rows, dim); every shard but the last has `rows_per_shard` rows

Captions are flat rows, image by image. Files are memory-mapped: opening reads `index.json` only, and an access touches
the pages of its rows. `embed_captions` writes a store.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .atomic import sha256_of_file
from .fingerprint import FingerprintValue


__all__ = ["CaptionEmbeddingStore"]

FORMAT_NAME = "llm2clip-caption-embeddings"
FORMAT_VERSION = 1
INDEX_FILE = "index.json"
LAYOUT_FILE = "layout.safetensors"
PLAN_FILE = "build.json"

# Name of the dtype -> (torch dtype, safetensors tag, integer type of the same width). numpy has no bfloat16, so every
# dtype is mapped as integers and reinterpreted by torch.
_DTYPES: dict[str, tuple[torch.dtype, str, type[np.generic]]] = {
    "float16": (torch.float16, "F16", np.int16),
    "bfloat16": (torch.bfloat16, "BF16", np.int16),
    "float32": (torch.float32, "F32", np.int32),
}


class CaptionEmbeddingStore:
    """
    Memory-mapped, read-only embeddings of all captions of a data set.

    Made by `CaptionEmbeddingStore.open`. The embeddings are what the LLM gives: pooled, not normalized. The store can
    be pickled and shared with the workers of a `DataLoader`; each process maps the files for itself.

    Attributes:
        path (`Path`): folder of the store.
        num_images (`int`): images; also `len(store)`.
        num_captions (`int`): captions of all images together.
        embedding_dim (`int`): width of an embedding.
        dtype (`torch.dtype`): float16, bfloat16 or float32.
        source_names (`tuple[str, ...]`): names of the caption sources, e.g. `("real", "dense")`.
        captions_sha256 (`str`): `CaptionTable.sha256` of the captions that were embedded.
        fingerprint (`dict`): what the embeddings depend on, see `embedding_fingerprint`.

    Example:
    >>> import tempfile
    >>> from llm2clip_hf.data import embed_captions
    >>> encode = lambda texts: torch.tensor([[float(len(text)), 1.0] for text in texts])
    >>> folder = tempfile.mkdtemp() + "/store"
    >>> captions = {"real": ["a", "bb"], "dense": ["ccc", "dddd"]}
    >>> store = embed_captions(encode, captions, folder, fingerprint={"llm": "length"}, show_progress=False)
    >>> store[1].tolist(), store.sources(1)
    ([[2.0, 1.0], [4.0, 1.0]], ['real', 'dense'])
    """

    def __init__(self, path: str | Path, index: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.num_images: int = index["num_images"]
        self.num_captions: int = index["num_captions"]
        self.embedding_dim: int = index["embedding_dim"]
        self.source_names: tuple[str, ...] = tuple(index["source_names"])
        self.captions_sha256: str = index["captions_sha256"]
        self.fingerprint: dict[str, FingerprintValue] = dict(index["fingerprint"])
        self.dtype, self._tag, self._integer = _DTYPES[index["dtype"]]
        self._rows_per_shard: int = index["rows_per_shard"]
        self._layout_entry: dict[str, Any] = index["layout"]
        self._shard_entries: list[dict[str, Any]] = index["shards"]
        self._shards: dict[int, np.ndarray] = {}
        self._layout: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def open(
        cls, path: str | Path, expected_fingerprint: Mapping[str, FingerprintValue] | None = None
    ) -> "CaptionEmbeddingStore":
        """
        Open a finished store; the cost does not depend on the number of captions.

        Args:
            path (`str` or `Path`): folder of the store.
            expected_fingerprint (mapping, *optional*):
                Fingerprint of the model that will use the embeddings. All keys must agree with those of the store.

        Returns:
            `CaptionEmbeddingStore`.

        Raises:
            ValueError: if there is no finished store, a file is missing or truncated, or the fingerprints differ.
        """
        path = Path(path)
        store = cls(path, _read_index(path))
        for entry in [store._layout_entry, *store._shard_entries]:
            file = path / entry["file"]
            size = file.stat().st_size if file.is_file() else None
            if size != entry["bytes"]:
                raise ValueError(
                    f"`{file}` should have {entry['bytes']} bytes, got {'no file' if size is None else size}. "
                    "Copy the store again, or delete it and embed the captions again."
                )
        if expected_fingerprint is not None:
            differences = fingerprint_differences(store.fingerprint, expected_fingerprint)
            if differences:
                raise ValueError(
                    f"The embeddings in `{path}` were made by another text encoder: {differences}. "
                    "Embed the captions with this model, or use the model that the store was made with."
                )
        return store

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> torch.Tensor:
        """Embeddings of the captions of image `index`, of shape `(num_captions_of_image, embedding_dim)`."""
        start, stop = self._caption_range(index)
        return self.gather(np.arange(start, stop))

    @property
    def offsets(self) -> np.ndarray:
        """`(num_images + 1,)` int64: the captions of image `i` are the rows `offsets[i]` to `offsets[i + 1]`."""
        return self._mapped_layout()[0]

    @property
    def source_ids(self) -> np.ndarray:
        """`(num_captions,)` int16: position in `source_names` of every caption row."""
        return self._mapped_layout()[1]

    def sources(self, index: int) -> list[str]:
        """Source name of each caption of image `index`, in the order of `store[index]`."""
        start, stop = self._caption_range(index)
        return [self.source_names[source] for source in self.source_ids[start:stop]]

    def gather(self, caption_rows: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """
        Embeddings of any caption rows, in the given order; rows may repeat.

        Args:
            caption_rows (`(n,)` integers): rows in `[0, num_captions)`.

        Returns:
            `torch.Tensor` of shape `(n, embedding_dim)` and the dtype of the store; a copy.

        Raises:
            IndexError: if a row is out of range.
        """
        rows = np.asarray(caption_rows, dtype=np.int64).reshape(-1)
        outside = np.flatnonzero((rows < 0) | (rows >= self.num_captions))
        if outside.size:
            raise IndexError(f"Caption row {rows[outside[0]]} is out of range for {self.num_captions} captions.")
        shard_of_row = rows // self._rows_per_shard
        gathered = np.empty((len(rows), self.embedding_dim), dtype=self._integer)
        for shard in np.unique(shard_of_row).tolist():
            members = shard_of_row == shard
            gathered[members] = self._mapped_shard(shard)[rows[members] - shard * self._rows_per_shard]
        return torch.from_numpy(gathered).view(self.dtype)

    def verify(self) -> None:
        """
        Read every file and compare its SHA-256 with the index.

        Raises:
            ValueError: naming the files that differ.
        """
        entries = [self._layout_entry, *self._shard_entries]
        damaged = [entry["file"] for entry in entries if sha256_of_file(self.path / entry["file"]) != entry["sha256"]]
        if damaged:
            raise ValueError(
                f"Files of the store `{self.path}` do not match their SHA-256: {damaged}. "
                "Copy the store again, or delete it and embed the captions again."
            )

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the data; the other process maps the files again.
        return {**self.__dict__, "_shards": {}, "_layout": None}

    def _caption_range(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self.num_images:
            raise IndexError(f"Image {index} is out of range for {self.num_images} images.")
        return int(self.offsets[index]), int(self.offsets[index + 1])

    def _mapped_layout(self) -> tuple[np.ndarray, np.ndarray]:
        if self._layout is None:
            file = self.path / self._layout_entry["file"]
            offsets = map_tensor(file, "offsets", "I64", (self.num_images + 1,), np.int64)
            source_ids = map_tensor(file, "source_ids", "I16", (self.num_captions,), np.int16)
            self._layout = (offsets, source_ids)
        return self._layout

    def _mapped_shard(self, shard: int) -> np.ndarray:
        if shard not in self._shards:
            entry = self._shard_entries[shard]
            shape = (entry["rows"], self.embedding_dim)
            file = self.path / entry["file"]
            self._shards[shard] = map_tensor(file, "embeddings", self._tag, shape, self._integer)
        return self._shards[shard]


def map_tensor(path: Path, name: str, tag: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """
    Memory-map one tensor of a safetensors file as a numpy array.

    The lazy slices of the safetensors library cost about 50 microseconds per access and cannot gather; a numpy map of
    the same bytes costs 4 and gathers 4096 rows of 512 halves in 2 milliseconds instead of 300.

    Args:
        path (`Path`): safetensors file.
        name (`str`): tensor in it.
        tag (`str`): dtype the header must state, e.g. `"F16"`.
        shape (`tuple[int, ...]`): shape the header must state.
        dtype: numpy type of the same width to map the bytes as.

    Returns:
        `np.ndarray`, read-only.

    Raises:
        ValueError: if the header does not state this tensor.
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
    return np.asarray(np.memmap(path, mode="r", dtype=dtype, offset=offset, shape=shape))


def fingerprint_differences(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The keys in which two dictionaries differ with both values, as text for a message; empty if they agree."""
    missing = "(absent)"
    return "; ".join(
        f"`{key}`: store {stored.get(key, missing)!r}, expected {expected.get(key, missing)!r}"
        for key in sorted({*stored, *expected})
        if stored.get(key, missing) != expected.get(key, missing)
    )


def torch_dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a store dtype name; ValueError for a dtype that a store cannot have."""
    if name not in _DTYPES:
        raise ValueError(f"`dtype` must be one of {sorted(_DTYPES)}, got {name!r}.")
    return _DTYPES[name][0]


def _read_index(path: Path) -> dict[str, Any]:
    file = path / INDEX_FILE
    if not file.is_file():
        if (path / PLAN_FILE).is_file():
            raise ValueError(
                f"The store in `{path}` is not finished. Call `embed_captions` with the same arguments to resume."
            )
        raise ValueError(f"`{path}` is no caption embedding store: it has no `{INDEX_FILE}`. Check the path.")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"`{file}` is not valid JSON ({error}). Copy the store again.") from error
    if index.get("format") != FORMAT_NAME or index.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"`{file}` has format {index.get('format')!r}, version {index.get('format_version')!r}; this release "
            f"reads {FORMAT_NAME!r}, version {FORMAT_VERSION}. Update the package, or embed the captions again."
        )
    return index
