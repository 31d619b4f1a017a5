# SPDX-License-Identifier: Apache-2.0
"""
Caption embeddings on disk, computed once and read many times.

A store is a folder:

    index.json                  format version, sizes, dtype, source names, fingerprint, and a digest per file
    layout.safetensors          `offsets` (num_images + 1,) and `source_ids` (num_captions,)
    keys.safetensors            a string key per image, if keys were given; see `mapped_files`
    embeddings-00000.safetensors, ...   `embeddings` (rows, dim); every shard but the last has `rows_per_shard` rows

Captions are flat rows, image by image. Files are memory-mapped: opening reads `index.json` only, and an access touches
the pages of its rows. `embed_captions` writes a store.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ...files import sha256_of_file
from .fingerprint import FingerprintValue, model_fingerprint, model_settings, require_identity
from .mapped_files import KeyIndex, map_tensor


FORMAT_NAME = "llm2clip-caption-embeddings"
FORMAT_VERSION = 1
INDEX_FILE = "index.json"
LAYOUT_FILE = "layout.safetensors"
PLAN_FILE = "build.json"
# `gather` copies blocks of about this size through a temporary that stays in the cache of a core.
_BLOCK_BYTES = 1 << 18
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
        has_keys (`bool`): whether images can be looked up by a string key, see `index_of`.

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
        # Absent in stores without keys, which older releases wrote too.
        self._keys_entry: dict[str, Any] | None = index.get("keys")
        self.has_keys = self._keys_entry is not None
        self._shards: dict[int, np.ndarray] = {}
        self._layout: tuple[np.ndarray, np.ndarray] | None = None
        self._keys: KeyIndex | None = None

    @classmethod
    def open(
        cls, path: str | Path, expected_fingerprint: Mapping[str, FingerprintValue] | None = None
    ) -> "CaptionEmbeddingStore":
        """
        Open a finished store; the cost does not depend on the number of captions.

        Args:
            path (`str` or `Path`): folder of the store.
            expected_fingerprint (mapping, *optional*):
                Fingerprint of the model that will use the embeddings. All keys must agree with those of the store; the
                weights of the LLM may have been rounded to bfloat16 on one side.

        Returns:
            `CaptionEmbeddingStore`.

        Raises:
            ValueError: if there is no finished store, a file is missing or truncated, or the fingerprints differ.
        """
        path = Path(path)
        store = cls(path, _read_index(path))
        for entry in store._entries:
            file = path / entry["file"]
            size = file.stat().st_size if file.is_file() else None
            if size != entry["bytes"]:
                raise ValueError(
                    f"`{file}` should have {entry['bytes']} bytes, got {'no file' if size is None else size}. "
                    "Copy the store again, or delete it and embed the captions again."
                )
        if expected_fingerprint is not None:
            store.check_compatible(expected_fingerprint)
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
        gathered = np.empty((len(rows), self.embedding_dim), dtype=self._integer)
        if len(rows) == 0:
            return torch.from_numpy(gathered).view(self.dtype)
        if rows.min() < 0 or rows.max() >= self.num_captions:
            outside = rows[(rows < 0) | (rows >= self.num_captions)]
            raise IndexError(f"Caption row {outside[0]} is out of range for {self.num_captions} captions.")
        shard_of_row = rows // self._rows_per_shard
        first = int(shard_of_row[0])
        if (shard_of_row == first).all():
            self._copy_rows(first, rows, slice(None), gathered)
        else:
            # Sorted by shard, so that every shard is one stretch of `order`.
            order = np.argsort(shard_of_row, kind="stable")
            bounds = np.flatnonzero(np.diff(shard_of_row[order])) + 1
            for members in np.split(order, bounds):
                self._copy_rows(int(shard_of_row[members[0]]), rows[members], members, gathered)
        return torch.from_numpy(gathered).view(self.dtype)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """
        Embeddings of the caption rows `start` to `stop` (exclusive), read from the mapped file without a copy.

        Rows of one shard are not copied; where the range crosses shards, their parts are joined in memory. Changing
        the result changes neither the files nor what other calls return.

        Args:
            start (`int`): first row, in `[0, num_captions]`.
            stop (`int`): row after the last one, in `[start, num_captions]`.

        Returns:
            `torch.Tensor` of shape `(stop - start, embedding_dim)` and the dtype of the store.

        Raises:
            IndexError: if the range is not within the store.
        """
        if not 0 <= start <= stop <= self.num_captions:
            raise IndexError(f"Caption rows {start} to {stop} are no range within {self.num_captions} captions.")
        if start == stop:
            return self.gather([])
        parts = []
        for shard in range(start // self._rows_per_shard, (stop - 1) // self._rows_per_shard + 1):
            first = shard * self._rows_per_shard
            # A private map per call: torch knows no read-only tensors, and a shared one would keep a user's changes.
            part = self._map_shard(shard, "c")[max(start - first, 0) : stop - first]
            parts.append(torch.from_numpy(part).view(self.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def iter_batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """
        All embeddings in the order of the caption rows.

        Args:
            batch_size (`int`): rows of a batch; the last one may have fewer. Large batches cost least.

        Returns:
            Iterator over tensors of shape `(batch_size, embedding_dim)`, as from `rows`.

        Raises:
            ValueError: if `batch_size` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be positive, got {batch_size}. Take about 4096.")
        return (
            self.rows(start, min(start + batch_size, self.num_captions))
            for start in range(0, self.num_captions, batch_size)
        )

    def index_of(self, key: str) -> int:
        """
        Image with the key `key`, found in O(log(num_images)) without loading the keys.

        Args:
            key (`str`): one of the `keys` that `embed_captions` was given, e.g. the `__key__` of a webdataset sample.

        Returns:
            `int`: number of the image, for `store[index]`.

        Raises:
            KeyError: if no image has this key.
            ValueError: if the store has no keys.
        """
        if self._keys_entry is None:
            raise ValueError(
                f"The store `{self.path}` has no keys. Call `embed_captions` again with the same arguments and "
                "`keys`; it adds them without encoding."
            )
        if self._keys is None:
            self._keys = KeyIndex(self.path, self._keys_entry, self.num_images)
        image = self._keys.find(key)
        if image is None:
            raise KeyError(f"No image of the store `{self.path}` has the key {key!r}.")
        return image

    def check_compatible(self, other: Any, tokenizer: Any = None) -> None:
        """
        Check that these embeddings are what `other` needs; to be called before training on them.

        Args:
            other:
                A fingerprint (see `embedding_fingerprint`); another `CaptionEmbeddingStore` that is to be mixed with
                this one; or an `LLM2CLIPModel`. Of a model, width, pooling and length of the template's header are
                compared with its config, and with `tokenizer` also the tokenizer with its template and the weights of
                the LLM that the model holds, all of which are read.
            tokenizer (*optional*): tokenizer of the model.

        Raises:
            ValueError: naming what differs, with both values.
        """
        if isinstance(other, Mapping):
            self._require_fingerprint(other, "the expected text encoder")
        elif isinstance(other, CaptionEmbeddingStore):
            self._require_width(other.embedding_dim, f"the store `{other.path}`")
            self._require_fingerprint(other.fingerprint, f"that of the store `{other.path}`")
        else:
            self._require_width(other.config.llm_hidden_size, "`config.llm_hidden_size` of the model")
            self._require_fingerprint(model_settings(other, tokenizer), "that of the model", shared_only=True)
            if tokenizer is not None and other.text_model is not None:
                # A model has no maximal length of its own; what was cut off is the choice of the store.
                max_length = int(self.fingerprint.get("max_length") or 0)
                self._require_fingerprint(model_fingerprint(other, tokenizer, max_length), "that of the model")

    def verify(self) -> None:
        """
        Read every file and compare its SHA-256 with the index.

        Raises:
            ValueError: naming the files that differ.
        """
        damaged = [
            entry["file"] for entry in self._entries if sha256_of_file(self.path / entry["file"]) != entry["sha256"]
        ]
        if damaged:
            raise ValueError(
                f"Files of the store `{self.path}` do not match their SHA-256: {damaged}. "
                "Copy the store again, or delete it and embed the captions again."
            )

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the data; the other process maps the files again.
        return {**self.__dict__, "_shards": {}, "_layout": None, "_keys": None}

    @property
    def _entries(self) -> list[dict[str, Any]]:
        keys = [] if self._keys_entry is None else [self._keys_entry]
        return [self._layout_entry, *keys, *self._shard_entries]

    def _require_width(self, width: int, owner: str) -> None:
        if width != self.embedding_dim:
            raise ValueError(
                f"The embeddings in `{self.path}` have width {self.embedding_dim}, {owner} has {width}. "
                "Use embeddings and model of the same LLM."
            )

    def _require_fingerprint(
        self, expected: Mapping[str, FingerprintValue], owner: str, shared_only: bool = False
    ) -> None:
        remedy = "Embed the captions with this model, or use the model that the store was made with."
        require_identity(self, expected, owner, remedy, shared_only=shared_only, ignored=())

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

    def _copy_rows(self, shard: int, rows: np.ndarray, members: np.ndarray | slice, output: np.ndarray) -> None:
        """Copy the flat rows `rows`, all of one shard, to the positions `members` of `output`."""
        if shard not in self._shards:
            self._shards[shard] = self._map_shard(shard, "r")
        mapped, local = self._shards[shard], rows - shard * self._rows_per_shard
        if isinstance(members, slice):
            # "clip" only leaves out a check that has been made.
            np.take(mapped, local, axis=0, out=output, mode="clip")
            return
        block = max(16, _BLOCK_BYTES // max(1, mapped.itemsize * self.embedding_dim))
        for start in range(0, len(local), block):
            output[members[start : start + block]] = mapped[local[start : start + block]]

    def _map_shard(self, shard: int, mode: Literal["r", "c"]) -> np.ndarray:
        entry = self._shard_entries[shard]
        shape = (entry["rows"], self.embedding_dim)
        return map_tensor(self.path / entry["file"], "embeddings", self._tag, shape, self._integer, mode)


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


__all__ = ["CaptionEmbeddingStore"]
