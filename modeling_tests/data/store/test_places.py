# SPDX-License-Identifier: Apache-2.0
"""Stores at any address, of many shards with few descriptors, and with rows of one byte per number."""

import json
import pickle
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm2clip_hf.data import CaptionEmbeddingStore, CaptionTable, embed_captions, export_dataset, import_embeddings
from llm2clip_hf.data.store import build
from llm2clip_hf.data.store.folder import StoreFolder


CAPTIONS = {"real": [[f"{image}/{k}" for k in range(1 + image % 3)] for image in range(20)], "more": [["m"]] * 20}
KEYS = [f"key {image}" for image in range(20)]
OPTIONS = {"fingerprint": {"llm": "x"}, "rows_per_shard": 6, "keys": KEYS, "show_progress": False}


def encode(texts):
    seeds = [sum(text.encode()) for text in texts]
    return torch.stack([torch.randn(9, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def flat():
    table = CaptionTable(CAPTIONS)
    return encode(table.rows(0, table.num_captions))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    yield tmp_path / "home" / "llm2clip_hf" / "stores"
    fsspec.filesystem("memory").store.clear()


def test_a_store_at_an_address_is_the_local_one(tmp_path, cache):
    local = embed_captions(encode, CAPTIONS, tmp_path / "local", **OPTIONS)
    store = embed_captions(encode, CAPTIONS, "memory://bucket/store", **OPTIONS)
    system = fsspec.filesystem("memory")
    assert {name.rpartition("/")[2]: system.cat_file(name) for name in system.ls("/bucket/store", detail=False)} == {
        file.name: file.read_bytes() for file in (tmp_path / "local").iterdir()
    }
    assert not list(Path().glob("memory:*"))
    # What is touched is copied, once, and found by its digest.
    assert not cache.exists()
    assert torch.equal(store.gather([0]), local.gather([0]))
    assert [file.name.split("-", 1)[1] for file in cache.iterdir()] == ["embeddings-00000.safetensors"]
    assert torch.equal(store.gather(range(store.num_captions)), local.gather(range(local.num_captions)))
    assert [store.index_of(key) for key in KEYS] == list(range(20))
    assert store.sources(3) == local.sources(3)
    assert len(list(cache.iterdir())) == 4 + 2
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(torch.cat(list(again.iter_batches(7))), torch.cat(list(local.iter_batches(7))))
    store.verify()
    assert store.holds(CaptionTable(CAPTIONS))


def test_a_store_at_an_address_is_resumed_merged_extended_and_checked(tmp_path, cache):
    address = "memory://bucket/other"
    with pytest.raises(ValueError, match=r"`memory://bucket/other` is no caption embedding store"):
        CaptionEmbeddingStore.open(address)
    assert embed_captions(encode, CAPTIONS, address, **OPTIONS, shard_range=(1, 3)) is None
    with pytest.raises(ValueError, match="is not finished"):
        CaptionEmbeddingStore.open(address)
    embed_captions(encode, CAPTIONS, tmp_path / "here", **OPTIONS, shard_range=(0, 1))
    embed_captions(encode, CAPTIONS, tmp_path / "here", **OPTIONS, shard_range=(3, 4))
    store = CaptionEmbeddingStore.merge(address, [tmp_path / "here"])
    assert torch.equal(store.gather(range(store.num_captions)), flat().half())
    seen = []
    embed_captions(lambda texts: seen.extend(texts) or encode(texts), CAPTIONS, address, **OPTIONS)
    assert seen == []
    system = fsspec.filesystem("memory")
    content = bytearray(system.cat_file("/bucket/other/embeddings-00002.safetensors"))
    content[-1] ^= 1
    system.pipe_file("/bucket/other/embeddings-00002.safetensors", bytes(content))
    with pytest.raises(ValueError, match=r"memory://bucket/other.*SHA-256: \['embeddings-00002.safetensors'\]"):
        CaptionEmbeddingStore.open(address).verify()
    embed_captions(
        lambda texts: seen.extend(texts) or encode(texts), CAPTIONS, address, **OPTIONS, repair=True
    ).verify()
    assert len(set(seen)) == 6 + 6 + 1
    part = embed_captions(encode, ["a", "b"], tmp_path / "part", **{**OPTIONS, "keys": ["x", "y"]})
    with pytest.raises(ValueError, match="`source_names`"):
        build.append(StoreFolder(address), [StoreFolder(part.path)])


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://bucket/x", r"`s3://bucket/x` needs a package that opens `s3://` addresses: Install s3fs"),
        ("nothing://bucket/x", r"`nothing://bucket/x` cannot be opened: Protocol not known: nothing"),
        (Path("s3://bucket/x"), r"`s3:/bucket/x` is an address that has lost a slash in a `Path`"),
    ],
)
def test_an_address_that_cannot_be_opened_is_told_and_nothing_is_written(tmp_path, monkeypatch, address, message):
    monkeypatch.chdir(tmp_path)
    if "s3fs" in message:
        monkeypatch.setitem(sys.modules, "s3fs", None)
    for call in (
        lambda: embed_captions(encode, CAPTIONS, address, **OPTIONS),
        lambda: CaptionEmbeddingStore.open(address),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


FEW_DESCRIPTORS = """
    import os, resource, sys
    import numpy as np, torch
    from llm2clip_hf.data import CaptionEmbeddingStore
    folder, shards, limit, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    os.fsync = lambda descriptor: None
    for k in range(shards):
        CaptionEmbeddingStore.write_shard(folder, k, np.full((2, 4), k % 1000), [["a", "b"]], rows=(k, k + 1),
                                          num_rows=shards, fingerprint={}, dtype=dtype)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    store = CaptionEmbeddingStore.merge(folder)
    order = np.random.default_rng(0).permutation(2 * shards)
    for _ in range(2):
        expected = torch.from_numpy(order // 2 % 1000).float()
        assert torch.allclose(store.gather(order)[:, 0].float(), expected, rtol=1e-6)
    assert sum(len(batch) for batch in store.iter_batches(64)) == 2 * shards
    assert len(store._shards) <= limit // 4 < len(os.listdir("/proc/self/fd")) <= limit
    store.verify()
"""


@pytest.mark.parametrize(
    ("shards", "limit", "dtype"),
    [(300, 64, "float16"), (200, 64, "int8"), pytest.param(10_000, 256, "float16", marks=pytest.mark.slow)],
)
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
def test_many_shards_are_read_with_few_descriptors(tmp_path, shards, limit, dtype):
    code = textwrap.dedent(FEW_DESCRIPTORS)
    words = [sys.executable, "-c", code, str(tmp_path), str(shards), str(limit), dtype]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr


def test_opening_reads_the_index_alone(tmp_path, monkeypatch):
    store = embed_captions(encode, CAPTIONS, tmp_path, **OPTIONS)
    read = []
    monkeypatch.setattr(
        StoreFolder, "read", lambda self, name, *a, f=StoreFolder.read: read.append(name) or f(self, name, *a)
    )
    opened = CaptionEmbeddingStore.open(tmp_path)
    assert read == ["index.json"] and opened.num_captions == store.num_captions
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    entries = json.loads((tmp_path / "index.json").read_text())["shards"][0]
    many = [entries | {"file": f"embeddings-{k:05d}.safetensors"} for k in range(20_000)]
    index = json.loads((tmp_path / "index.json").read_text()) | {
        "shards": many,
        "num_captions": 20_000 * entries["rows"],
    }
    assert len(CaptionEmbeddingStore(tmp_path, index)._first_rows) == 20_001
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 100_000  # KiB


def test_rows_of_one_byte_per_number(tmp_path):
    store = embed_captions(encode, CAPTIONS, tmp_path / "store", **OPTIONS, dtype="int8")
    exact = flat()
    # The nearest multiple of a 127th of the largest value of the row.
    scales = exact.abs().amax(1, keepdim=True) / 127
    expected = (exact / scales).round() * scales
    found = store.gather(range(store.num_captions))
    assert (store.dtype, store.stored_dtype, found.dtype) == (torch.float32, "int8", torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert ((found - exact).abs() <= scales / 2 * (1 + 1e-5)).all()
    assert torch.equal(torch.cat(list(store.iter_batches(7))), found)
    assert torch.equal(store.rows(3, 30), found[3:30])
    order = torch.randint(len(found), (200,))
    assert torch.equal(store.gather(order), found[order])
    assert load_file(tmp_path / "store" / "embeddings-00000.safetensors")["embeddings"].dtype == torch.int8
    # A caption of zeros, and keys that come later, which change no number.
    zeros = embed_captions(
        lambda texts: torch.zeros(len(texts), 3), ["a"], tmp_path / "0", fingerprint={}, dtype="int8"
    )
    assert zeros.gather([0]).tolist() == [[0, 0, 0]]
    without = {**OPTIONS, "keys": None, "dtype": "int8"}
    embed_captions(encode, CAPTIONS, tmp_path / "later", **without)
    embed_captions(lambda texts: pytest.fail("encoded"), CAPTIONS, tmp_path / "later", **OPTIONS, dtype="int8")
    for file in (tmp_path / "store").iterdir():
        assert file.read_bytes() == (tmp_path / "later" / file.name).read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_a_store_is_exported_as_a_dataset(tmp_path, dtype):
    store = embed_captions(encode, CAPTIONS, tmp_path / "store", **OPTIONS, dtype=dtype)
    rows = export_dataset(store)
    assert rows.column_names == ["key", "embeddings", "sources"] and rows["key"][:] == KEYS
    for image in range(20):
        found = torch.tensor(rows[image]["embeddings"], dtype=torch.float32)
        assert torch.equal(found, store[image].float())
        assert rows[image]["sources"] == store.sources(image)
    # And back, from the table, from a parquet file, an array and an array file.
    rows.to_parquet(tmp_path / "rows.parquet")
    values = store.gather(range(store.num_captions))
    np.save(tmp_path / "rows.npy", values.float().numpy())
    options = {"fingerprint": OPTIONS["fingerprint"], "keys": KEYS, "rows_per_shard": 6, "dtype": dtype}
    for number, source in enumerate([rows, tmp_path / "rows.parquet", values.float().numpy(), tmp_path / "rows.npy"]):
        again = import_embeddings(source, CAPTIONS, tmp_path / str(number), **options)
        assert again.holds(CaptionTable(CAPTIONS)) and again.fingerprint == store.fingerprint
        torch.testing.assert_close(again.gather(range(len(values))), values, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="`embeddings` has 3 rows for 59 captions"):
        import_embeddings(values[:3], CAPTIONS, tmp_path / "few", **options)
    with pytest.raises(ValueError, match="has no column `x`; it has"):
        import_embeddings(rows, CAPTIONS, tmp_path / "few", column="x", **options)
