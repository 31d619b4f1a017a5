# SPDX-License-Identifier: Apache-2.0
"""
Caption embeddings on disk, computed once and read many times.

A store is a folder, here or at an address that fsspec opens:

    index.json                  format version, sizes, dtype, source names, fingerprint, and a digest per file
    layout.safetensors          `offsets` (num_images + 1,) and `source_ids` (num_captions,)
    keys.safetensors            a string key per image, if keys were given; see `mapped_files`
    embeddings-00000.safetensors, ...   shards: `embeddings` (rows, dim), with the layout and keys of their own images

Captions are flat rows, image by image. Files are memory-mapped: opening reads `index.json` only, and an access touches
the pages of its rows. `embed_captions` writes a store; those of version 1, whose shards do not stand alone, are read.
"""

import functools
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..captions import Captions, CaptionTable
from . import build
from .build import DTYPES, INDEX_FILE
from .fingerprint import FingerprintValue, model_fingerprint, model_settings, require_identity
from .folder import StoreFolder
from .mapped_files import KeyIndex, check_keys, file_digest, map_tensor
from .slices import CaptionSlice


# `gather` copies blocks of about this size through a temporary that stays in the cache of a core.
_BLOCK_BYTES = 1 << 18
# Every mapped shard holds a file descriptor, of int8 two.
_SHARE_OF_DESCRIPTORS = 4
_MOST_MAPPED = 4096


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
        dtype (`torch.dtype`): float16, bfloat16 or float32, which int8 is read as.
        stored_dtype (`str`): what the rows are on disk; `"int8"` is with a scale per row.
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
        self._folder = StoreFolder(path)
        self.path: Any = self._folder.path
        self.num_images: int = index["num_images"]
        self.num_captions: int = index["num_captions"]
        self.embedding_dim: int = index["embedding_dim"]
        self.source_names: tuple[str, ...] = tuple(index["source_names"])
        self.captions_sha256: str = index["captions_sha256"]
        self.fingerprint: dict[str, FingerprintValue] = dict(index["fingerprint"])
        self.stored_dtype: str = index["dtype"]
        self.dtype, self._tag, self._integer = DTYPES[self.stored_dtype]
        self._version: int = index["format_version"]
        self._layout_entry: dict[str, Any] = index["layout"]
        self._shard_entries: list[dict[str, Any]] = index["shards"]
        # Shard `k` holds the caption rows `_first_rows[k]` to `_first_rows[k + 1]`.
        self._first_rows = _starts(entry["rows"] for entry in self._shard_entries)
        # Rows of every shard but the last, if they are equal: a division finds a shard faster than a search.
        sizes = set(np.diff(self._first_rows[:-1]).tolist())
        self._equal_rows = sizes.pop() if len(sizes) == 1 else self.num_captions if not sizes else None
        self._keys_entry: dict[str, Any] | None = index.get("keys")
        self.has_keys = self._keys_entry is not None
        # The shards that were touched last, each with its map.
        self._shards: OrderedDict[int, tuple[np.ndarray, np.ndarray | None]] = OrderedDict()
        self._layout: tuple[np.ndarray, np.ndarray] | None = None
        self._keys: KeyIndex | None = None

    @classmethod
    def open(
        cls, path: str | Path, expected_fingerprint: Mapping[str, FingerprintValue] | None = None
    ) -> "CaptionEmbeddingStore":
        """
        Open a finished store; the cost does not depend on the number of captions.

        Args:
            path (`str` or `Path`):
                Folder of the store, or an address such as `s3://bucket/store`, whose shards are copied to the cache of
                this machine (`HF_HOME`) when they are first touched.
            expected_fingerprint (mapping, *optional*):
                Fingerprint of the model that will use the embeddings. All keys must agree with those of the store; the
                weights of the LLM may have been rounded to bfloat16 on one side.

        Returns:
            `CaptionEmbeddingStore`.

        Raises:
            ValueError: if there is no finished store, a file is missing or truncated, or the fingerprints differ.
        """
        folder = StoreFolder(path)
        index = build.read_index(folder)
        if index is None:
            if build.shard_names(folder) or folder.size("build.json") is not None:
                raise ValueError(
                    f"The store in `{path}` is not finished. Call `embed_captions` with the same arguments to resume, "
                    "or `llm2clip store merge` if all shards are there."
                )
            raise ValueError(f"`{path}` is no caption embedding store: it has no `{INDEX_FILE}`. Check the path.")
        store = cls(path, index)
        sizes = folder.sizes()
        for entry in store._entries:
            if (size := sizes.get(entry["file"])) != entry["bytes"]:
                raise ValueError(
                    f"`{folder.place(entry['file'])}` should have {entry['bytes']} bytes, got "
                    f"{'no file' if size is None else size}. Copy the store again, or mend it with "
                    "`llm2clip store repair`."
                )
        if expected_fingerprint is not None:
            store.check_compatible(expected_fingerprint)
        return store

    @staticmethod
    def is_finished(path: str | Path) -> bool:
        """Whether a folder or an address holds a finished store."""
        return StoreFolder(path).size(INDEX_FILE) is not None

    @property
    def num_shards(self) -> int:
        """Number of files with embeddings."""
        return len(self._shard_entries)

    @property
    def num_bytes(self) -> int:
        """Size of all files of the index."""
        return sum(entry["bytes"] for entry in self._entries)

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
        scales = np.empty(len(rows), dtype=np.float32) if self.stored_dtype == "int8" else None
        if len(rows) == 0:
            return self._as_read(gathered, scales)
        if rows.min() < 0 or rows.max() >= self.num_captions:
            outside = rows[(rows < 0) | (rows >= self.num_captions)]
            raise IndexError(f"Caption row {outside[0]} is out of range for {self.num_captions} captions.")
        shard_of_row = self._shards_of(rows)
        first = int(shard_of_row[0])
        if (shard_of_row == first).all():
            self._copy_rows(first, rows, slice(None), gathered, scales)
        else:
            # Sorted by shard, so that every shard is one stretch of `order`.
            order = np.argsort(shard_of_row, kind="stable")
            bounds = np.flatnonzero(np.diff(shard_of_row[order])) + 1
            for members in np.split(order, bounds):
                self._copy_rows(int(shard_of_row[members[0]]), rows[members], members, gathered, scales)
        return self._as_read(gathered, scales)

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
        shards = self._shards_of(np.array([start, stop - 1]))
        for shard in range(int(shards[0]), int(shards[1]) + 1):
            first = int(self._first_rows[shard])
            # A private map per call: torch knows no read-only tensors, and a shared one would keep a user's changes.
            part = slice(max(start - first, 0), stop - first)
            values, scales = self._map_shard(shard, "c")
            parts.append(self._as_read(values[part], None if scales is None else scales[part]))
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
        image = self._key_index().find(key)
        if image is None:
            raise KeyError(f"No image of the store `{self.path}` has the key {key!r}.")
        return image

    def key_of(self, image: int) -> str:
        """The key of an image of a store with keys."""
        return self._key_index().key_of(image)

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
        wrong = [entry["file"] for entry in self._entries if not self._is_whole(entry)]
        if wrong:
            raise ValueError(
                f"Files of the store `{self.path}` do not match their SHA-256: {wrong}. Copy the store again, or "
                "embed these captions again with `llm2clip store repair`."
            )

    def _is_whole(self, entry: Mapping[str, Any]) -> bool:
        if self._version == 1:
            return file_digest(self._folder, entry["file"]) == entry["sha256"]
        return not build.damage_of(self._folder, entry["file"], entry["sha256"])

    def holds(self, captions: CaptionTable, any_sources: bool = False) -> bool:
        """
        Whether these are the embeddings of exactly these captions, in their order and grouping.

        Args:
            captions (`CaptionTable`): the captions.
            any_sources (`bool`, defaults to `False`): leave the sources of the captions, and their names, aside.
        """
        if (len(captions), captions.num_captions) != (self.num_images, self.num_captions):
            return False
        if not any_sources and captions.source_names != self.source_names:
            return False
        if not any_sources and not np.array_equal(captions.source_ids, self.source_ids):
            return False
        if not np.array_equal(captions.offsets, self.offsets):
            return False
        if self._version == 1:
            return self.captions_sha256 == captions.sha256_as(self.source_names, self.source_ids)
        ends = _starts(entry["images"] for entry in self._shard_entries).tolist()
        return all(
            captions.digest(start, stop) == entry["captions_sha256"]
            for start, stop, entry in zip(ends, ends[1:], self._shard_entries)
        )

    @staticmethod
    def write_shard(
        path: str | Path,
        number: int,
        embeddings: torch.Tensor | np.ndarray,
        captions: Captions | CaptionTable,
        *,
        rows: tuple[int, int],
        num_rows: int,
        fingerprint: Mapping[str, FingerprintValue],
        dtype: str = "float16",
        keys: Sequence[str] | None = None,
    ) -> None:
        """
        Write one shard of a store from embeddings that were made elsewhere; `merge` makes the store of all.

        Args:
            path (`str` or `Path`): folder or address of the store.
            number (`int`): number of the shard; an older one of that number is replaced.
            embeddings (`(captions, dim)`): one row per caption, in the flat order of `CaptionTable`.
            captions: the captions of the shard, as for `CaptionTable`.
            rows (`(start, stop)`): which rows of the data the shard is made from; shards follow each other.
            num_rows (`int`): rows of the data as a whole.
            fingerprint (mapping of JSON scalars): what the embeddings depend on, see `embedding_fingerprint`.
            dtype (`str`, defaults to `"float16"`): `"float16"`, `"bfloat16"`, `"float32"` or `"int8"`.
            keys (sequence of `str`, *optional*): one unique key per image.

        Raises:
            ValueError: if embeddings, captions and keys do not agree in number, or a value is not finite in `dtype`.
            OSError: if the file cannot be written.

        Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> for number, text in enumerate(["a cat", "a dog"]):
        ...     CaptionEmbeddingStore.write_shard(
        ...         folder, number, np.full((1, 3), number), [text], rows=(number, number + 1), num_rows=2,
        ...         fingerprint={"llm": "mine"},
        ...     )
        >>> CaptionEmbeddingStore.merge(folder).gather([1]).tolist()
        [[1.0, 1.0, 1.0]]
        """
        table = captions if isinstance(captions, CaptionTable) else CaptionTable(captions)
        values = torch.as_tensor(embeddings).to(build.torch_dtype_of(dtype))
        if values.ndim != 2 or len(values) != table.num_captions:
            raise ValueError(
                f"`embeddings` has shape {tuple(values.shape)} for {table.num_captions} captions. It must have one "
                "row per caption."
            )
        if not values.isfinite().all():
            raise ValueError(f"`embeddings` has a value that is not finite in {dtype}.")
        if keys is not None:
            check_keys(keys, len(table))
        if not 0 <= rows[0] < rows[1] <= num_rows:
            raise ValueError(f"`rows` {rows} must be a range within the `num_rows` {num_rows} of the data.")
        part = CaptionSlice(table, 0, len(table), keys)
        packed = build.pack_rows(values, dtype)
        build.write_shard(StoreFolder(path), number, packed, part, rows, num_rows, fingerprint, dtype)

    @classmethod
    def merge(cls, path: str | Path, others: Sequence[str | Path] = ()) -> "CaptionEmbeddingStore":
        """
        Make a store of the shards in a folder: write its index. Shards of other folders are copied (or linked) first.

        Args:
            path (`str` or `Path`): folder or address of the store.
            others (sequence of paths, *optional*): folders with further shards, e.g. of other machines.

        Returns:
            `CaptionEmbeddingStore`: the finished store, opened.

        Raises:
            ValueError: if shards are missing, damaged, overlap, or were made in different ways; names them.
        """
        build.merge(StoreFolder(path), [StoreFolder(other) for other in others])
        return cls.open(path)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the data; the other process maps the files again.
        return {**self.__dict__, "_shards": OrderedDict(), "_layout": None, "_keys": None}

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

    def _local(self, entry: Mapping[str, Any]) -> Path:
        return self._folder.local_copy(entry["file"], entry["sha256"])

    def _key_index(self) -> KeyIndex:
        if self._keys is None:
            assert self._keys_entry is not None
            self._keys = KeyIndex(self._local(self._keys_entry), self._keys_entry, self.num_images)
        return self._keys

    def _mapped_layout(self) -> tuple[np.ndarray, np.ndarray]:
        if self._layout is None:
            file = self._local(self._layout_entry)
            offsets = map_tensor(file, "offsets", "I64", (self.num_images + 1,), np.int64)
            source_ids = map_tensor(file, "source_ids", "I16", (self.num_captions,), np.int16)
            self._layout = (offsets, source_ids)
        return self._layout

    def _shards_of(self, rows: np.ndarray) -> np.ndarray:
        if self._equal_rows is not None:
            # What the last shard has more than the others.
            return np.minimum(rows // self._equal_rows, len(self._shard_entries) - 1)
        found: np.ndarray = np.searchsorted(self._first_rows, rows, side="right") - 1
        return found

    def _as_read(self, values: np.ndarray, scales: np.ndarray | None) -> torch.Tensor:
        found = torch.from_numpy(values)
        return found.view(self.dtype) if scales is None else found.float().mul_(torch.from_numpy(scales)[:, None])

    def _copy_rows(
        self,
        shard: int,
        rows: np.ndarray,
        members: np.ndarray | slice,
        output: np.ndarray,
        output_scales: np.ndarray | None,
    ) -> None:
        """Copy the flat rows `rows`, all of one shard, to the positions `members` of `output`."""
        if shard not in self._shards:
            while len(self._shards) >= _most_mapped():
                self._shards.popitem(last=False)
            self._shards[shard] = self._map_shard(shard, "r")
        self._shards.move_to_end(shard)
        (mapped, scales), local = self._shards[shard], rows - self._first_rows[shard]
        if scales is not None and output_scales is not None:
            output_scales[members] = scales[local]
        if isinstance(members, slice):
            # "clip" only leaves out a check that has been made.
            np.take(mapped, local, axis=0, out=output, mode="clip")
            return
        block = max(16, _BLOCK_BYTES // max(1, mapped.itemsize * self.embedding_dim))
        for start in range(0, len(local), block):
            output[members[start : start + block]] = mapped[local[start : start + block]]

    def _map_shard(self, shard: int, mode: Literal["r", "c"]) -> tuple[np.ndarray, np.ndarray | None]:
        entry = self._shard_entries[shard]
        shape = (entry["rows"], self.embedding_dim)
        file, scales = self._local(entry), None
        if self.stored_dtype == "int8":
            scales = map_tensor(file, "scales", "F32", shape[:1], np.float32, mode)
        return map_tensor(file, "embeddings", self._tag, shape, self._integer, mode), scales


def _starts(counts: Iterable[int]) -> np.ndarray:
    """Where each of several parts of these sizes begins, and the end of the last."""
    return np.concatenate([[0], np.cumsum(np.fromiter(counts, dtype=np.int64))])


@functools.cache
def _most_mapped() -> int:
    """Shards that may be mapped at once; the rest of the descriptors is for images, workers and sockets."""
    if os.name != "posix":
        return _MOST_MAPPED
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST_MAPPED if limit < 0 else max(8, min(_MOST_MAPPED, limit // _SHARE_OF_DESCRIPTORS))


__all__ = ["CaptionEmbeddingStore"]
