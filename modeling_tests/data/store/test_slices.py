# SPDX-License-Identifier: Apache-2.0
"""Captions that are read slice by slice: the same as all at once, in the memory of one, without images."""

import io
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shard_files
import torch
from datasets import Dataset, Image

from llm2clip_hf.data import CaptionTable, embed_captions, load_captions, load_image_text, load_shard_captions
from llm2clip_hf.data.store.slices import DataShardSlices, ReadSlices, TableSlices, caption_slices, image_text_slices


ROWS = [{"raw_caption": f"photo {row}", "captions": [f"more {row} {k}" for k in range(row % 3)]} for row in range(25)]


def write_parquet(folder: Path, rows: list[dict]) -> Path:
    for number, part in enumerate((rows[:11], rows[11:12], rows[12:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"{number}.parquet", row_group_size=4)
    return folder


def all_of(slices) -> tuple[CaptionTable, list[str] | None]:
    """The slices put together, each of which is what it says."""
    parts = [slices.load(shard) for shard in range(len(slices))]
    columns = {name: [] for name in parts[0].table.source_names}
    for part, (start, stop) in zip(parts, map(slices.rows_of, range(len(slices)))):
        assert part.stop - part.start == stop - start
        own = part.table.select(range(part.start, part.stop))
        assert part.texts() == own.rows(0, own.num_captions)
        assert part.offsets().tolist() == own.offsets.tolist()
        assert part.source_ids().tolist() == own.source_ids.tolist()
        assert part.digest() == own.digest()
        for image in range(len(own)):
            names = own.source_ids[own.offsets[image] : own.offsets[image + 1]]
            for source, column in enumerate(columns.values()):
                column.append([text for text, name in zip(own[image], names) if name == source])
    keys = None if parts[0].keys is None else [key for part in parts for key in part.keys]
    return CaptionTable(columns), keys


@pytest.mark.parametrize("rows_per_shard", [1, 4, 10, 99])
def test_slices_of_parquet_files_are_the_rows_of_the_whole(tmp_path, rows_per_shard):
    folder = write_parquet(tmp_path, ROWS)
    slices = caption_slices(folder, rows_per_shard)
    assert isinstance(slices, ReadSlices)
    assert all_of(slices)[0].sha256 == load_captions(folder).sha256
    from_dataset = caption_slices(Dataset.from_list(ROWS), rows_per_shard)
    assert isinstance(from_dataset, ReadSlices)
    assert all_of(from_dataset)[0].sha256 == load_captions(folder).sha256


def test_a_slice_reads_the_row_groups_that_it_needs(tmp_path, monkeypatch):
    folder, groups = write_parquet(tmp_path, ROWS), []
    read = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, *a, **k: groups.append(k["row_groups"]) or read(self, *a, **k)
    )
    assert caption_slices(folder, 5).load(1).texts()[:2] == ["photo 5", "more 5 0"]
    assert groups == [[1], [2]]  # rows 5 to 9 of the first file, whose groups have four rows


def test_tables_whose_rows_belong_together_are_read_whole(tmp_path):
    rows = [{"image": image % 3, "caption": f"{image}"} for image in range(9)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    slices = caption_slices(tmp_path / "a.parquet", 2, image_column="image")
    assert isinstance(slices, TableSlices) and slices.num_rows == 3
    assert slices.load(0).texts() == ["0", "3", "6", "1", "4", "7"]
    (tmp_path / "b.jsonl").write_text('{"caption": "a"}\n{"caption": "b"}\n')
    assert isinstance(caption_slices(tmp_path / "b.jsonl", 1), TableSlices)


def test_slices_of_images_with_captions_have_their_keys(tmp_path):
    rows = [{"image": {"bytes": shard_files.image_bytes(row), "path": None}, "id": f"k{row}", "caption": f"c {row}"}
            for row in range(10)]  # fmt: skip
    Dataset.from_list(rows).cast_column("image", Image(decode=False)).to_parquet(tmp_path / "a.parquet")
    slices = image_text_slices(tmp_path / "a.parquet", 4, key_column="id")
    table, keys = all_of(slices)
    whole = load_image_text(tmp_path / "a.parquet", key_column="id")
    assert (table.sha256, keys) == (whole.captions.sha256, whole.keys)
    rows[6]["caption"] = " "
    Dataset.from_list(rows).cast_column("image", Image(decode=False)).to_parquet(tmp_path / "b.parquet")
    slices = image_text_slices(tmp_path / "b.parquet", 4, key_column="id")
    with pytest.raises(ValueError, match=r"Rows 4 to 8 of `.*b.parquet`: Row 2: a text in column `caption` is empty"):
        slices.load(1)


class CountingFile(io.FileIO):
    """Counts the bytes that are read."""

    total = 0

    def read(self, size=-1):
        content = super().read(size)
        CountingFile.total += len(content)
        return content


@pytest.fixture
def tars(tmp_path) -> list[Path]:
    """Shards of large images with small captions."""
    sizes = [5, 3, 4]
    paths, number = [], 0
    for shard, size in enumerate(sizes):
        members = []
        for _ in range(size):
            captions = f"a caption of sample {number}".encode()
            members += [(f"{number}.jpg", os.urandom(100_000)), (f"{number}.txt", captions)]
            number += 1
        paths.append(shard_files.write_tar(tmp_path / f"{shard}.tar", members))
    return paths


def test_a_shard_of_the_store_for_each_shard_of_images_whose_bytes_are_not_read(tmp_path, tars, monkeypatch):
    monkeypatch.setattr(io, "FileIO", CountingFile)
    slices = DataShardSlices(str(tmp_path / "*.tar"), {"real": "txt"})
    CountingFile.total = 0
    parts = [slices.load(shard) for shard in range(len(slices))]
    captions = sum(len(text.encode()) for part in parts for text in part.texts())
    headers = 512 * (2 * 12 + len(tars))  # one of every member, and the end mark of every file
    assert CountingFile.total <= 1.2 * (captions + headers) < 0.02 * sum(path.stat().st_size for path in tars)
    assert [part.keys for part in parts] == [
        [str(n) for n in numbers] for numbers in (range(5), range(5, 8), range(8, 12))
    ]
    store = embed_captions(
        lambda texts: torch.tensor([[float(text.split()[-1])] for text in texts]), slices, tmp_path / "store",
        fingerprint={}, show_progress=False,
    )  # fmt: skip
    assert [store.gather([store.index_of(str(number))]).item() for number in range(12)] == list(range(12))
    assert [entry["rows"] for entry in store._shard_entries] == [5, 3, 4]


def test_parquet_shards_are_read_without_their_images(tmp_path, monkeypatch):
    rows = [
        {"image": {"bytes": bytes(1000), "path": None}, "key": f"k{row}", "caption": f"c {row}"} for row in range(9)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    columns, read = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, *a, **k: columns.append(k["columns"]) or read(self, *a, **k)
    )
    part = DataShardSlices(tmp_path / "a.parquet", {"real": "caption"}, key_column="key").load(0)
    assert (columns, part.keys) == ([["caption", "key"]], [f"k{row}" for row in range(9)])
    assert part.texts() == [f"c {row}" for row in range(9)]


def test_the_readable_part_of_a_truncated_shard_is_used_on_request(tmp_path, tars):
    tars[1].write_bytes(tars[1].read_bytes()[:250_000])
    with pytest.raises(ValueError, match=r"Shard `.*1.tar` cannot be read: unexpected end of data"):
        load_shard_captions(str(tmp_path / "*.tar"), {"real": "txt"})
    table, keys = load_shard_captions(str(tmp_path / "*.tar"), {"real": "txt"}, on_bad_row="skip")
    assert keys == [str(number) for number in (*range(6), *range(8, 12))]
    assert table.report.bad_rows == 1 and "1.tar` cannot be read" in table.report.examples[0]
    slices = DataShardSlices(str(tmp_path / "*.tar"), {"real": "txt"}, on_bad_row="skip")
    assert slices.load(1).keys == ["5"]
