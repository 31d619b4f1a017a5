# SPDX-License-Identifier: Apache-2.0
"""Reading a caption-embedding store: access, laziness, pickling, refusals, damage."""

import json
import pickle
import shutil

import numpy as np
import pytest
import tiny_models
import torch
import version_1
from torch.utils.data import DataLoader, Dataset

from llm2clip_hf.data import CaptionEmbeddingStore, embed_captions
from llm2clip_hf.data.store import mapped_files as store_keys
from llm2clip_hf.data.store.folder import StoreFolder


FINGERPRINT = {"weights_sha256": "abc", "max_length": 512, "is_causal": False}
CAPTIONS = [[f"{image}/{number}" for number in range(1 + image % 4)] for image in range(31)]
VALUES = {text: torch.randn(5, generator=torch.Generator().manual_seed(n)) for n, text in enumerate(sum(CAPTIONS, []))}


def encode(texts):
    return torch.stack([VALUES[text] for text in texts])


@pytest.fixture
def folder(tmp_path):
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


def test_rows_are_read_from_the_map_and_joined_across_shards(folder, rows):
    store = CaptionEmbeddingStore.open(folder)
    for start, stop in [(0, 13), (3, 9), (12, 13), (13, 26), (5, 14), (0, 76), (70, 76), (20, 20), (76, 76)]:
        assert torch.equal(store.rows(start, stop), rows[start:stop])
    # Within a shard, the memory is that of a map of the file.
    with open("/proc/self/maps") as maps:
        part = store.rows(3, 9)
        address = part.data_ptr()
        named = [line for line in maps if "embeddings-00000.safetensors" in line]
    ranges = [[int(number, 16) for number in line.split()[0].split("-")] for line in named]
    assert any(low <= address < high for low, high in ranges)
    for start, stop in [(-1, 3), (0, 77), (5, 4)]:
        with pytest.raises(IndexError, match=f"Caption rows {start} to {stop} are no range within 76"):
            store.rows(start, stop)


@pytest.mark.parametrize("batch_size", [1, 7, 13, 26, 100])
def test_batches_are_all_rows_in_order(folder, rows, batch_size):
    batches = list(CaptionEmbeddingStore.open(folder).iter_batches(batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert torch.equal(torch.cat(batches), rows)


def test_a_batch_size_of_zero_is_refused_at_once(folder):
    with pytest.raises(ValueError, match="`batch_size` must be positive, got 0"):
        CaptionEmbeddingStore.open(folder).iter_batches(0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_wide_rows_are_gathered_block_by_block(tmp_path, dtype):
    # 5000 halves are more than ten rows per block of a gather over several shards.
    values = torch.randn(90, 5000, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    texts = [str(row) for row in range(90)]
    store = embed_captions(
        lambda batch: values[[int(text) for text in batch]],
        texts,
        tmp_path,
        fingerprint={},
        dtype=dtype,
        rows_per_shard=40,
        show_progress=False,
    )
    order = torch.randint(90, (300,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(store.gather(order), values[order])
    assert torch.equal(store.gather(order % 40), values[order % 40])
    assert torch.equal(torch.cat(list(store.iter_batches(33))), values)


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
    store.rows(2, 9).zero_()
    for batch in store.iter_batches(5):
        batch.zero_()
    assert torch.equal(store.rows(0, 76), rows)
    assert torch.equal(store.gather(range(76)), rows)


def test_opening_reads_no_embeddings_and_access_maps_only_its_shard(folder):
    store = CaptionEmbeddingStore.open(folder)
    assert (store._shards, store._layout) == ({}, None)
    store.gather([40])
    assert list(store._shards) == [1]
    # The array is a view of the file, not a copy in memory.
    assert isinstance(store._shards[1][0].base, np.memmap)


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
    shard = folder / "embeddings-00002.safetensors"
    whole = shard.read_bytes()
    for place in (-1, 12, 400):
        content = bytearray(whole)
        content[place] ^= 1
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=r"do not match their SHA-256: \['embeddings-00002.safetensors'\]"):
            CaptionEmbeddingStore.open(folder).verify()


def test_a_shard_that_states_another_shape_is_refused(folder):
    shard = folder / "embeddings-00000.safetensors"
    changed = shard.read_bytes().replace(b'"shape": [31, 5]', b'"shape": [5, 31]')
    assert changed != shard.read_bytes()
    shard.write_bytes(changed)
    with pytest.raises(ValueError, match=r"tensor `embeddings` of dtype F32 and shape \(31, 5\)"):
        CaptionEmbeddingStore.open(folder)[0]


def test_a_moved_store_opens_at_its_new_place(folder, tmp_path, rows):
    shutil.move(folder, tmp_path / "moved")
    assert torch.equal(CaptionEmbeddingStore.open(tmp_path / "moved").gather([75]), rows[75:])


KEYS = [f"{image % 7:03d}/image-{image * 17 % 31}" for image in range(31)]


def embed(folder, **kwargs):
    options = {"fingerprint": FINGERPRINT, "dtype": "float32", "rows_per_shard": 13, "show_progress": False}
    return embed_captions(encode, CAPTIONS, folder, **options, **kwargs)


def test_images_are_found_by_their_key(tmp_path):
    store = embed(tmp_path, keys=KEYS)
    assert store.has_keys
    assert [store.index_of(key) for key in KEYS] == list(range(31))
    again = pickle.loads(pickle.dumps(CaptionEmbeddingStore.open(tmp_path)))
    assert [again.index_of(key) for key in KEYS] == list(range(31))
    for key in ("", "image", "000/image-1", KEYS[0][:-1], KEYS[0] + "0"):
        with pytest.raises(KeyError, match=f"has the key '{key}'"):
            store.index_of(key)
    (tmp_path / "keys.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="keys.safetensors` should have"):
        CaptionEmbeddingStore.open(tmp_path)


def test_keys_of_the_same_hash_are_told_apart(tmp_path, monkeypatch):
    # One hash for every fourth length: runs of several keys, also at both ends.
    monkeypatch.setattr(store_keys, "_hash", lambda key: len(key) % 4 - 2)
    keys = ["\u00e9" * image + "x" for image in range(31)]
    store = embed(tmp_path, keys=keys)
    assert [store.index_of(key) for key in keys] == list(range(31))
    with pytest.raises(KeyError, match="'xx'"):
        store.index_of("xx")


def test_a_look_up_reads_a_few_pages_of_many_keys(tmp_path):
    keys = [f"shard-{image // 1000:03d}/{image:09d}" for image in range(50_000)]
    entry = store_keys.write_keys(StoreFolder(tmp_path), lambda: [store_keys.pack_keys(keys)])
    touched = []

    class Watched(np.ndarray):
        def __getitem__(self, item):
            touched.append(item)
            return super().__getitem__(item)

    index = store_keys.KeyIndex(tmp_path / entry["file"], entry, len(keys))
    for name in ("_hashes", "_images", "_offsets", "_text"):
        array = getattr(index, name)
        assert isinstance(array.base, np.memmap)
        setattr(index, name, array.view(Watched))
    assert [index.find(keys[image]) for image in (0, 31_415, 49_999)] == [0, 31_415, 49_999]
    assert index.find("absent") is None
    assert len(touched) < 30


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (KEYS[:-1], "`keys` has 30 entries for 31 images"),
        ("a" * 31, "Give one key per image"),
        ([*KEYS[:-1], KEYS[4]], f"The key '{KEYS[4]}' belongs to image 4 and to image 30"),
        ([*KEYS[:-1], ""], "The key '' of image 30 is not a non-empty string"),
        ([*KEYS[:-1], 3], "The key 3 of image 30 is not"),
    ],
)
def test_keys_that_name_no_image_are_refused_before_anything_is_written(tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        embed(tmp_path / "store", keys=keys)
    assert not (tmp_path / "store").exists()


def test_a_store_without_keys_is_as_before_and_takes_them_later(folder, rows):
    index = json.loads((folder / "index.json").read_text())
    assert "keys" not in index
    assert index["format_version"] == 2
    store = CaptionEmbeddingStore.open(folder)
    assert not store.has_keys
    with pytest.raises(ValueError, match="has no keys. Call `embed_captions` again"):
        store.index_of(KEYS[0])
    with_keys = embed_captions(
        lambda texts: pytest.fail("nothing is to be encoded"),
        CAPTIONS,
        folder,
        fingerprint=FINGERPRINT,
        dtype="float32",
        rows_per_shard=13,
        keys=KEYS,
        show_progress=False,
    )
    assert [with_keys.index_of(key) for key in KEYS] == list(range(31))
    assert torch.equal(with_keys.gather(range(76)), rows)
    with_keys.verify()
    # Keys once given stay, and others are refused.
    assert embed(folder).index_of(KEYS[3]) == embed(folder, keys=KEYS).index_of(KEYS[3]) == 3
    with pytest.raises(ValueError, match="has other keys than `keys`"):
        embed(folder, keys=KEYS[::-1])


def test_what_a_store_is_used_with_must_fit(folder, tmp_path):
    store = CaptionEmbeddingStore.open(folder)
    store.check_compatible(FINGERPRINT)
    store.check_compatible(CaptionEmbeddingStore.open(folder))
    with pytest.raises(ValueError, match="`weights_sha256`: store 'abc', expected 'xyz'"):
        store.check_compatible(FINGERPRINT | {"weights_sha256": "xyz"})
    options = {"rows_per_shard": 13, "show_progress": False}
    other = embed_captions(encode, CAPTIONS, tmp_path / "b", fingerprint={"weights_sha256": "xyz"}, **options)
    with pytest.raises(ValueError, match=r"than that of the store `.*b`: .*`weights_sha256`: store 'abc', expected"):
        store.check_compatible(other)
    wider = embed_captions(
        lambda texts: torch.ones(len(texts), 6), CAPTIONS, tmp_path / "c", fingerprint={}, **options
    )
    with pytest.raises(ValueError, match=r"have width 5, the store `.*c` has 6"):
        store.check_compatible(wider)
    with pytest.raises(ValueError, match="have width 5, `config.llm_hidden_size` of the model has 32"):
        store.check_compatible(tiny_models.model())


def test_the_llm_of_a_model_is_compared_by_its_weights_and_template(tmp_path):
    model, tokenizer = tiny_models.model(), tiny_models.processor().tokenizer
    # The fingerprint of the store has its own maximal length, which a model does not.
    store = embed_captions(model, ["a", "b"], tmp_path, tokenizer=tokenizer, max_length=99, show_progress=False)
    store.check_compatible(model, tokenizer)
    store.check_compatible(tiny_models.model(text=None), tokenizer)
    with torch.no_grad():
        model.text_model.norm.weight[0] += 1
    store.check_compatible(model)
    with pytest.raises(ValueError, match="another text encoder than that of the model: `weights_sha256`"):
        store.check_compatible(model, tokenizer)
    with pytest.raises(ValueError, match="`tokenizer_sha256`"):
        store.check_compatible(tiny_models.model(), tiny_models.llama3_tokenizer())


def test_the_pooling_and_header_of_a_model_are_compared_without_its_weights(tmp_path):
    model, tokenizer = tiny_models.model(), tiny_models.processor().tokenizer
    mean = embed_captions(model, ["a", "b"], tmp_path / "mean", tokenizer=tokenizer, show_progress=False)
    last = embed_captions(
        tiny_models.model(text_pooling="last"), ["a", "b"], tmp_path / "l", tokenizer=tokenizer, show_progress=False
    )
    mean.check_compatible(model)
    last.check_compatible(tiny_models.model(text_pooling="last"), tokenizer)
    # Without a config of the LLM, a model takes what it is given; what its config names is compared all the same.
    last.check_compatible(tiny_models.model(text=None))
    for store, other, key in (
        (mean, tiny_models.model(text_pooling="last"), "pooling"),
        (last, model, "pooling"),
        (mean, tiny_models.model(text=None, text_pooling="last"), "pooling"),
        (mean, tiny_models.model(text_prefix_length=2), "text_prefix_length"),
    ):
        with pytest.raises(ValueError, match=f"`{key}`: store"):
            store.check_compatible(other)
    with pytest.raises(ValueError, match="`tokenizer_sha256`"):
        mean.check_compatible(tiny_models.model(text=None), tiny_models.llama3_tokenizer())


def test_a_fingerprint_of_an_earlier_release_counts_as_mean_and_matches_its_llm(tmp_path):
    model, tokenizer = tiny_models.model(), tiny_models.processor().tokenizer
    arguments = {"tokenizer": tokenizer, "show_progress": False}
    new = embed_captions(model, ["a", "b"], tmp_path, **arguments)
    index = json.loads((tmp_path / "index.json").read_text())
    for key in ("pooling", "weights_bf16_sha256", "weights_sample_sha256"):
        del index["fingerprint"][key]
    # The finished store is found again and used.
    version_1.write(tmp_path / "old", new, [["a"], ["b"]], fingerprint=index["fingerprint"])
    old = embed_captions(model, ["a", "b"], tmp_path / "old", **arguments)
    assert "pooling" not in old.fingerprint
    old.check_compatible(model, tokenizer)
    old.check_compatible(new)
    new.check_compatible(old)
    with pytest.raises(ValueError, match="`pooling`: store 'mean', expected 'last'"):
        old.check_compatible(tiny_models.model(text_pooling="last"))


def test_an_llm_rounded_to_bfloat16_is_recognized_and_other_dtypes_are_named(tmp_path):
    tokenizer, arguments = tiny_models.processor().tokenizer, {"show_progress": False}
    arguments["tokenizer"] = tokenizer
    model, half = tiny_models.model(), tiny_models.model()
    half.text_model.to(torch.bfloat16)
    full_store = embed_captions(model, ["a", "b"], tmp_path / "full", **arguments)
    store = embed_captions(half, ["a", "b"], tmp_path / "half", **arguments)
    rounded = tiny_models.model()
    rounded.text_model.load_state_dict({key: value.float() for key, value in half.text_model.state_dict().items()})
    for encoder in (model, half, rounded):
        store.check_compatible(encoder, tokenizer)
    full_store.check_compatible(half, tokenizer)
    full_store.check_compatible(store)
    # In one dtype, weights that only agree rounded are another LLM's.
    with pytest.raises(ValueError, match="`weights_sha256`"):
        full_store.check_compatible(rounded, tokenizer)
    half.text_model.to(torch.float16)
    with pytest.raises(ValueError, match=r"embedded with an LLM in float32, this one is in float16; .* load it in fl"):
        full_store.check_compatible(half, tokenizer)
    with pytest.raises(ValueError, match="`weights_sha256`"):
        store.check_compatible(tiny_models.model(seed=3), tokenizer)
