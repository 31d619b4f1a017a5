# SPDX-License-Identifier: Apache-2.0
"""
The slices that captions are embedded in, one for each shard of a store.

A slice is read when its turn comes, so a process holds the captions of the shard that it works on, whatever the size
of the data: rows of parquet files and of `datasets` tables, or one file of image-text shards. Other tables are read
whole.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..captions import CaptionTable
from .mapped_files import check_keys


class CaptionSlice(NamedTuple):
    """The images `start` to `stop` of a table, with a key for each or none."""

    table: CaptionTable
    start: int
    stop: int
    keys: Sequence[str] | None

    def texts(self) -> list[str]:
        """All captions in flat order."""
        return self.table.rows(int(self.table.offsets[self.start]), int(self.table.offsets[self.stop]))

    def offsets(self) -> np.ndarray:
        """Where the captions of each image begin, and the end of the last."""
        found = self.table.offsets[self.start : self.stop + 1]
        return np.asarray(found - found[0], dtype=np.int64)

    def source_ids(self) -> np.ndarray:
        """The source of each caption."""
        return self.table.source_ids[self.table.offsets[self.start] : self.table.offsets[self.stop]]

    def digest(self) -> str:
        """`CaptionTable.digest` of these images."""
        return self.table.digest(self.start, self.stop)


class CaptionSlices(Protocol):
    """Captions in slices; shard `k` of a store is made from slice `k` alone."""

    num_rows: int
    """Rows of the data that the slices are cut from; of image-text shards, their number."""

    def __len__(self) -> int:
        """Number of slices."""

    def rows_of(self, shard: int) -> tuple[int, int]:
        """First row of a slice, and the row after its last one."""

    def load(self, shard: int) -> CaptionSlice:
        """Read a slice."""


class _RowSlices:
    def __init__(self, num_rows: int, rows_per_shard: int) -> None:
        if rows_per_shard < 1:
            raise ValueError(f"`rows_per_shard` must be positive, got {rows_per_shard}.")
        self.num_rows, self._rows_per_shard = num_rows, rows_per_shard

    def __len__(self) -> int:
        return -(-self.num_rows // self._rows_per_shard)

    def rows_of(self, shard: int) -> tuple[int, int]:
        start = shard * self._rows_per_shard
        return start, min(start + self._rows_per_shard, self.num_rows)


class TableSlices(_RowSlices):
    """The images of a table in memory."""

    def __init__(self, table: CaptionTable, keys: Sequence[str] | None, rows_per_shard: int) -> None:
        super().__init__(len(table), rows_per_shard)
        if keys is not None:
            check_keys(keys, len(table))
        self.table, self.keys = table, keys

    def load(self, shard: int) -> CaptionSlice:
        start, stop = self.rows_of(shard)
        return CaptionSlice(self.table, start, stop, None if self.keys is None else self.keys[start:stop])


Read = Callable[[int, int], tuple[CaptionTable, Sequence[str] | None]]


class ReadSlices(_RowSlices):
    """Rows of a source that is read in parts."""

    def __init__(self, read: Read, num_rows: int, rows_per_shard: int, name: str) -> None:
        super().__init__(num_rows, rows_per_shard)
        self._read, self._name = read, name

    def load(self, shard: int) -> CaptionSlice:
        start, stop = self.rows_of(shard)
        try:
            table, keys = self._read(start, stop)
        except ValueError as error:
            raise ValueError(f"Rows {start} to {stop} of {self._name}: {error}") from error
        if keys is not None:
            check_keys(keys, len(table))
        return CaptionSlice(table, 0, len(table), keys)


@dataclass
class DataShardSlices:
    """
    The captions of image-text shards: one slice, and so one shard of the store, for each of them.

    Args:
        shards: paths or patterns of tar or parquet files, as for `ImageTextStream`.
        caption_fields (mapping from source name to `str`): where the captions are, as for `ImageTextStream`.
        image_column, key_column (`str`, *optional*): as for `ImageTextStream`.
        on_bad_row (`"error"` or `"skip"`, defaults to `"error"`): as for `load_shard_captions`.
    """

    shards: Any
    caption_fields: Mapping[str, str]
    image_column: str | None = None
    key_column: str | None = None
    on_bad_row: str = "error"

    def __post_init__(self) -> None:
        from ..shard_index import make_shards

        self._readers = make_shards(self.shards, dict(self.caption_fields), self.image_column, self.key_column)
        self.num_rows = len(self._readers)

    def __len__(self) -> int:
        return self.num_rows

    def rows_of(self, shard: int) -> tuple[int, int]:
        return shard, shard + 1

    def load(self, shard: int) -> CaptionSlice:
        from ..shard_index import captions_of_shards

        table, keys = captions_of_shards([self._readers[shard]], self.caption_fields, self.on_bad_row)
        return CaptionSlice(table, 0, len(table), keys)


def caption_slices(
    source: Any,
    rows_per_shard: int,
    *,
    columns: Any = None,
    image_column: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    on_bad_row: str = "error",
) -> CaptionSlices:
    """
    The captions of a table without images, for `embed_captions`: read slice by slice where the table can be.

    Args:
        source: as for `load_captions`.
        rows_per_shard (`int`): images of a slice.
        columns, image_column, split, subset, on_bad_row (*optional*): as for `load_captions`.

    Returns:
        Slices with `len`, `rows_of(shard)` and `load(shard)`. Files of other kinds than parquet, and tables whose rows
        `image_column` puts together, are read whole.
    """
    from ..loading import captions_of_sources
    from ..sources import open_source, part_of_sources

    sources = open_source(source, split, subset)
    read = partial(captions_of_sources, columns=columns, image_column=image_column, on_bad_row=on_bad_row)
    name = f"`{source}`" if isinstance(source, (str, Path)) else "the captions"
    counts = [table.num_rows for table in sources]
    # Rows of one image may be anywhere in a table.
    if None in counts or image_column is not None or sources[0].image_column is not None:
        return TableSlices(read(sources, name=name), None, rows_per_shard)
    total = sum(count for count in counts if count is not None)
    return ReadSlices(
        lambda start, stop: (read(part_of_sources(sources, start, stop), name=name), None), total, rows_per_shard, name
    )


def image_text_slices(source: Any, rows_per_shard: int, **settings: Any) -> CaptionSlices:
    """
    The captions and keys of a table with images, for `embed_captions`: read slice by slice where it holds the images.

    Args:
        source: as for `load_image_text`.
        rows_per_shard (`int`): images of a slice.
        settings: options of `load_image_text`.

    Returns:
        Slices as from `caption_slices`. A table with paths of images is read whole: rows of one path are one image.
    """
    from ..image_sources import open_images_with_texts
    from ..loading import load_image_text

    split, subset, root = (settings.get(name) for name in ("split", "subset", "image_root"))
    opened = open_images_with_texts(source, settings.get("image_column"), split, subset, root, "train")
    dataset = opened.dataset
    if dataset is None:  # Paths may repeat anywhere, and each is one image.
        table = load_image_text(source, **settings)
        return TableSlices(table.captions, table.keys, rows_per_shard)
    rest = {name: value for name, value in settings.items() if name not in ("split", "subset", "image_root")}

    def read(start: int, stop: int) -> tuple[CaptionTable, Sequence[str] | None]:
        table = load_image_text(dataset.select(range(start, stop)), image_root=opened.root, **rest)
        return table.captions, table.keys

    name = f"`{source}`" if isinstance(source, (str, Path)) else "the image-text table"
    return ReadSlices(read, len(dataset), rows_per_shard, name)


__all__ = [
    "CaptionSlice",
    "CaptionSlices",
    "DataShardSlices",
    "ReadSlices",
    "TableSlices",
    "caption_slices",
    "image_text_slices",
]
