# SPDX-License-Identifier: Apache-2.0
"""Stores from embeddings that were made elsewhere, and as tables for other tools."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..captions import Captions, CaptionTable
from .embedding_store import CaptionEmbeddingStore
from .fingerprint import FingerprintValue
from .slices import TableSlices


if TYPE_CHECKING:
    import datasets


def import_embeddings(
    embeddings: Any,
    captions: Captions | CaptionTable,
    output_dir: str | Path,
    *,
    fingerprint: Mapping[str, FingerprintValue],
    column: str = "embeddings",
    dtype: str = "float16",
    rows_per_shard: int = 16384,
    keys: Sequence[str] | None = None,
) -> CaptionEmbeddingStore:
    """
    Make a store of embeddings that another program has made.

    Args:
        embeddings: one vector per caption, in the flat order of `CaptionTable`. An array or tensor `(captions, dim)`;
            the path of a `.npy` file, which is memory-mapped; the path of a parquet file or a `datasets.Dataset` with
            a column of vectors, or of lists of the vectors of an image.
        captions: the captions, as for `CaptionTable`.
        output_dir (`str` or `Path`): folder or address of the store.
        fingerprint (mapping of JSON scalars): what made the embeddings, see `embedding_fingerprint`.
        column (`str`, defaults to `"embeddings"`): column of the vectors.
        dtype (`str`, defaults to `"float16"`): as for `embed_captions`.
        rows_per_shard (`int`, defaults to 16384): images per file.
        keys (sequence of `str`, *optional*): one unique key per image.

    Returns:
        `CaptionEmbeddingStore`: the finished store, opened.

    Raises:
        ValueError: if embeddings and captions do not agree in number, or a value is not finite in `dtype`.

    Example:
    >>> import tempfile
    >>> store = import_embeddings(np.eye(2), ["a cat", "a dog"], tempfile.mkdtemp(), fingerprint={"llm": "mine"})
    >>> store.gather([1]).tolist()
    [[0.0, 1.0]]
    """
    table = captions if isinstance(captions, CaptionTable) else CaptionTable(captions)
    slices = TableSlices(table, keys, rows_per_shard)
    rows = _Rows(embeddings, column, table)
    for shard in range(len(slices)):
        start, stop = slices.rows_of(shard)
        part = slices.load(shard)
        CaptionEmbeddingStore.write_shard(
            output_dir,
            shard,
            rows.of_images(start, stop),
            table.select(range(start, stop)),
            rows=(start, stop),
            num_rows=slices.num_rows,
            fingerprint=fingerprint,
            dtype=dtype,
            keys=part.keys,
        )
    return CaptionEmbeddingStore.merge(output_dir)


class _Rows:
    """The vectors of some images, whatever they lie in."""

    def __init__(self, embeddings: Any, column: str, table: CaptionTable) -> None:
        self._offsets = table.offsets
        if isinstance(embeddings, (str, Path)):
            path = Path(embeddings)
            if path.suffix == ".npy":
                embeddings = np.load(path, mmap_mode="r", allow_pickle=False)
            elif path.suffix == ".parquet":
                import datasets

                embeddings = datasets.Dataset.from_parquet(str(path))
            else:
                raise ValueError(f"`{path}` is neither a `.npy` nor a `.parquet` file.")
        self._by_image = False
        if hasattr(embeddings, "column_names"):
            if column not in embeddings.column_names:
                raise ValueError(f"`embeddings` has no column `{column}`; it has {embeddings.column_names}.")
            embeddings = embeddings.select_columns([column]).with_format("numpy")[column]
            self._by_image = np.asarray(embeddings[0]).ndim > 1
        self._embeddings = embeddings
        found, needed = len(embeddings), len(table) if self._by_image else table.num_captions
        if found != needed:
            what = "images" if self._by_image else "captions"
            raise ValueError(f"`embeddings` has {found} rows for {needed} {what}. Give one for each.")

    def of_images(self, start: int, stop: int) -> torch.Tensor:
        if self._by_image:
            return torch.from_numpy(np.concatenate([np.asarray(each) for each in self._embeddings[start:stop]]))
        part = self._embeddings[int(self._offsets[start]) : int(self._offsets[stop])]
        return part if isinstance(part, torch.Tensor) else torch.from_numpy(np.array(part))


def export_dataset(store: CaptionEmbeddingStore) -> "datasets.Dataset":
    """
    A store as a `datasets.Dataset` with one row per image, for `push_to_hub`, parquet and other tools.

    Args:
        store (`CaptionEmbeddingStore`): the store.

    Returns:
        `datasets.Dataset` with the columns `embeddings` (a list of vectors; float16 as it is, the others as float32),
        `sources` (the source of each) and, if the store has keys, `key`. Rows are written to the cache of `datasets`
        image by image, so that no more than a batch of them is in memory.
    """
    import datasets

    kind = datasets.Value("float16" if store.dtype == torch.float16 else "float32")
    columns: dict[str, Any] = {"key": datasets.Value("string")} if store.has_keys else {}
    columns["embeddings"] = datasets.List(datasets.List(kind, store.embedding_dim))
    columns["sources"] = datasets.List(datasets.Value("string"))
    found: Any = datasets.Dataset.from_generator(
        _images, features=datasets.Features(columns), gen_kwargs={"store": store}
    )
    return found


def _images(store: CaptionEmbeddingStore) -> Iterator[dict[str, Any]]:
    for image in range(len(store)):
        vectors = store[image]
        row: dict[str, Any] = {"embeddings": (vectors if store.dtype == torch.float16 else vectors.float()).numpy()}
        row["sources"] = store.sources(image)
        yield row | {"key": store.key_of(image)} if store.has_keys else row


__all__ = ["export_dataset", "import_embeddings"]
