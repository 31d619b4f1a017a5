# SPDX-License-Identifier: Apache-2.0
"""Reading a caption-embedding store: access, laziness, pickling, refusals, damage."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from llm2clip_hf.data import CaptionEmbeddingStore, embed_captions


FINGERPRINT = {"weights_sha256": "abc", "max_length": 512, "is_causal": False}
CAPTIONS = [[f"{image}/{number}" for number in range(1 + image % 4)] for image in range(31)]
VALUES = {text: torch.randn(5, generator=torch.Generator().manual_seed(n)) for n, text in enumerate(sum(CAPTIONS, []))}


@pytest.fixture
def folder(tmp_path):
    def encode(texts):
        return torch.stack([VALUES[text] for text in texts])

    path = tmp_path / "store"
    embed_captions(
        encode, CAPTIONS, path, fingerprint=FINGERPRINT, dtype="float32", rows_per_shard=13, show_progress=False
    )
    return path


@pytest.fixture
def rows():
    return torch.stack(list(VALUES.values()))


def test_gather_takes_any_rows_in_any_order(folder, rows):
    store = CaptionEmbeddingStore.open(folder)
    assert store.num_captions == len(rows) == 76
    order = torch.randint(len(rows), (500,))
    expected = rows[order]
    for wanted in (order, order.numpy(), order.tolist()):
        assert torch.equal(store.gather(wanted), expected)
    assert store.gather([]).shape == (0, 5)
    for row in (-1, 76):
        with pytest.raises(IndexError, match=f"Caption row {row} is out of range for 76"):
            store.gather([3, row])


def test_items_are_the_captions_of_an_image_also_across_shards(folder, rows):
    store = CaptionEmbeddingStore.open(folder)
    start = 0
    for image, texts in enumerate(CAPTIONS):
        assert torch.equal(store[image], rows[start : start + len(texts)])
        start += len(texts)
    # Row 39 starts the fourth shard; an image has rows on both sides.
    assert any(a < 39 < b for a, b in zip(store.offsets[:-1], store.offsets[1:]))
    assert len(list(store)) == 31
    with pytest.raises(IndexError, match="Image 31 is out of range"):
        store[31]


def test_results_are_copies_that_may_be_changed(folder, rows):
    store = CaptionEmbeddingStore.open(folder)
    store[0].zero_()
    store.gather([1]).zero_()
    assert torch.equal(store.gather(range(76)), rows)


def test_opening_reads_no_embeddings_and_access_maps_only_its_shard(folder):
    store = CaptionEmbeddingStore.open(folder)
    assert (store._shards, store._layout) == ({}, None)
    store.gather([20])
    assert list(store._shards) == [1]
    # The array is a view of the file, not a copy in memory.
    assert isinstance(store._shards[1].base, np.memmap)


def test_a_pickled_store_carries_no_data_and_reads_the_same(folder, rows):
    store = CaptionEmbeddingStore.open(folder)
    store[3]
    data = pickle.dumps(store)
    assert len(data) < 4000
    assert torch.equal(pickle.loads(data).gather(range(76)), rows)


class RowDataset(Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return self.store.num_captions

    def __getitem__(self, row):
        return self.store.gather([row])[0]


def test_workers_of_a_loader_read_the_store(folder, rows):
    loader = DataLoader(RowDataset(CaptionEmbeddingStore.open(folder)), batch_size=10, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), rows)


def test_a_store_of_another_encoder_is_refused_with_the_differing_keys(folder):
    assert CaptionEmbeddingStore.open(folder, FINGERPRINT).fingerprint == FINGERPRINT
    other = {"weights_sha256": "abc", "max_length": 77, "template": "chat"}
    with pytest.raises(ValueError) as error:
        CaptionEmbeddingStore.open(folder, other)
    message = str(error.value)
    assert "`max_length`: store 512, expected 77" in message
    assert "`template`: store '(absent)', expected 'chat'" in message
    assert "`is_causal`: store False, expected '(absent)'" in message
    assert "weights_sha256" not in message


def test_open_refuses_what_is_not_a_complete_store(folder, tmp_path):
    with pytest.raises(ValueError, match="no caption embedding store"):
        CaptionEmbeddingStore.open(tmp_path)
    shard = folder / "embeddings-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"embeddings-00002.safetensors` should have {len(content)} bytes, got"):
        CaptionEmbeddingStore.open(folder)
    shard.unlink()
    with pytest.raises(ValueError, match="got no file"):
        CaptionEmbeddingStore.open(folder)
    index = folder / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format_version": 99}))
    with pytest.raises(ValueError, match="version 99; this release reads"):
        CaptionEmbeddingStore.open(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        CaptionEmbeddingStore.open(folder)


def test_verify_names_the_file_with_a_changed_bit(folder):
    store = CaptionEmbeddingStore.open(folder)
    store.verify()
    shard = folder / "embeddings-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"do not match their SHA-256: \['embeddings-00003.safetensors'\]"):
        CaptionEmbeddingStore.open(folder).verify()


def test_a_shard_that_states_another_shape_is_refused(folder):
    # Shards 0 and 1 have the same size in bytes; give shard 0 the header of another shape.
    shard = folder / "embeddings-00000.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"shape":[13,5]', b'"shape":[5,13]'))
    with pytest.raises(ValueError, match=r"tensor `embeddings` of dtype F32 and shape \(13, 5\)"):
        CaptionEmbeddingStore.open(folder)[0]


def test_a_moved_store_opens_at_its_new_place(folder, tmp_path, rows):
    shutil.move(folder, tmp_path / "moved")
    assert torch.equal(CaptionEmbeddingStore.open(tmp_path / "moved").gather([75]), rows[75:])
