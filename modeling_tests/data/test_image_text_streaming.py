# SPDX-License-Identifier: Apache-2.0
"""Streams: the samples of the map-style data set, each once, also across ranks, workers and restarts."""

import json
import pickle

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset
from datasets import Image as ImageFeature
from shard_files import CAPTION_FIELDS, captions, members, write_shards, write_tar

from llm2clip_hf.data import (
    ImageTextDataset,
    ImageTextStream,
    RandomResizedCropTransform,
    count_samples,
    embed_captions,
)


SIZES = (5, 1, 7, 3, 4)
COUNT = sum(SIZES)
TABLE = {name: [captions(number)[name] for number in range(COUNT)] for name in ("real", "dense")}
TRANSFORM = RandomResizedCropTransform(6, scale=(0.5, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    write_shards(path, SIZES)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    def encode(texts):
        return torch.tensor([[float(hash_of(text)), 1.0] for text in texts])

    keys = [f"{number:05d}" for number in range(COUNT)]
    path = tmp_path_factory.mktemp("store")
    return embed_captions(encode, TABLE, path, fingerprint={}, keys=keys, show_progress=False)


def hash_of(text: str) -> int:
    return sum(ord(character) * (position + 1) for position, character in enumerate(text)) % 1000


def make(folder, **options) -> ImageTextStream:
    shards = options.pop("shards", str(folder / "{000..004}.tar"))
    fields = None if "store" in options else options.pop("caption_fields", CAPTION_FIELDS)
    return ImageTextStream(shards, fields, **({"transform": TRANSFORM, "shuffle_buffer": 4, "seed": 5} | options))


def map_style(**options) -> ImageTextDataset:
    images = [{"bytes": members(number)[0][1]} for number in range(COUNT)]
    return ImageTextDataset(images, TABLE, transform=TRANSFORM, seed=5, **options)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


def identity(samples):
    return list(samples)


def batches(stream, batch_size, num_workers=0, **options):
    return list(stream.loader(batch_size, num_workers=num_workers, collate_fn=identity, **options))


@pytest.mark.parametrize("epoch", [0, 3])
def test_samples_are_those_of_the_map_style_data_set(folder, epoch):
    weights = {"real": 1.0, "dense": 2.0}
    stream = make(folder, caption_weights=weights, sub_captions=0.5)
    oracle = map_style(caption_weights=weights, sub_captions=0.5)
    stream.set_epoch(epoch)
    oracle.set_epoch(epoch)
    samples = list(stream)
    assert sorted(sample["index"] for sample in samples) == list(range(COUNT)) != [s["index"] for s in samples]
    for sample in samples:
        assert_same(sample, oracle[sample["index"]])


def test_stored_embeddings_are_looked_up_by_key(folder, store):
    stream, oracle = make(folder, store=store), map_style(store=store)
    for stream_or_oracle in (stream, oracle):
        stream_or_oracle.set_epoch(2)
    samples = list(stream)
    assert len(samples) == COUNT
    for sample in samples:
        expected = oracle[sample["index"]]
        del expected["text_id"]  # the stream has no texts
        assert_same(sample, expected)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_share_the_samples_and_take_equal_steps(folder, world_size, num_workers):
    oracle = map_style()
    oracle.set_epoch(1)
    seen, steps = [], set()
    for rank in range(world_size):
        stream = make(folder, rank=rank, world_size=world_size)
        stream.set_epoch(1)
        found = batches(stream, 3, num_workers)
        assert len(stream) == COUNT // world_size == sum(map(len, found))
        assert all(len(batch) == 3 for batch in found[:-1])
        steps.add(len(found))
        seen += [sample for batch in found for sample in batch]
    assert len({sample["index"] for sample in seen}) == len(seen) == COUNT // world_size * world_size
    assert len(steps) == 1
    for sample in seen:
        assert_same(sample, oracle[sample["index"]])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle_buffer", [0, 4])
def test_a_resumed_run_sees_what_the_uninterrupted_one_sees(folder, num_workers, shuffle_buffer):
    options = {"rank": 1, "world_size": 2, "shuffle_buffer": shuffle_buffer}
    stream = make(folder, **options)
    stream.set_epoch(3)
    whole = batches(stream, 3, num_workers)
    for done in (0, 1, 2, len(whole)):
        state = stream.state_dict(done, num_workers=num_workers)
        resumed = make(folder, **options)
        loader = resumed.loader(3, num_workers=num_workers, collate_fn=identity)
        resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
        rest = list(loader)
        assert len(rest) == len(whole) - done
        for batch, expected in zip(rest, whole[done:]):
            for sample, other in zip(batch, expected, strict=True):
                assert_same(sample, other)
    # The epoch after the resumed one is read from its beginning.
    for one in (stream, resumed):
        one.set_epoch(4)
    assert [[s["index"] for s in b] for b in batches(resumed, 3, num_workers)] == [
        [s["index"] for s in b] for b in batches(stream, 3, num_workers)
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_placeholders_stand_in_for_the_batches_that_a_loop_drops(folder, num_workers, store):
    stream = make(folder, store=store)
    whole = list(stream.loader(3, num_workers=num_workers))
    stream.resume_at(0, 4, placeholders=True)
    resumed = list(stream.loader(3, num_workers=num_workers))
    assert resumed[:4] == [{}] * 4
    assert len(resumed) == len(whole)
    for batch, expected in zip(resumed[4:], whole[4:]):
        assert_same(batch, expected)


def test_resuming_decodes_nothing_of_what_was_seen(folder, monkeypatch):
    decoded = []
    stream = make(folder, transform=lambda image, generator: decoded.append(image) or torch.zeros(1))
    stream.loader(3)
    stream.resume_at(0, 5)
    assert len(list(stream)) == len(decoded) == COUNT - 15


def test_persistent_workers_follow_the_epoch(folder):
    stream = make(folder)
    loader = stream.loader(3, num_workers=2, collate_fn=identity, persistent_workers=True)
    for epoch in (0, 1, 5):
        stream.set_epoch(epoch)
        found = [sample for batch in loader for sample in batch]
        oracle = map_style()
        oracle.set_epoch(epoch)
        assert sorted(sample["index"] for sample in found) == list(range(COUNT))
        for sample in found:
            assert_same(sample, oracle[sample["index"]])


def test_a_state_of_another_stream_or_layout_is_refused(folder):
    stream = make(folder)
    stream.loader(3)
    state = stream.state_dict(2, num_workers=2)
    for options, name in (
        ({"seed": 6}, "seed"),
        ({"shuffle_buffer": 5}, "shuffle_buffer"),
        ({"world_size": 2, "rank": 0}, "world_size"),
        ({"shards": str(folder / "{000..003}.tar")}, "shards"),
    ):
        other = make(folder, **options)
        other.loader(3)
        with pytest.raises(ValueError, match=f"differ in .*'{name}'"):
            other.load_state_dict(state)
    other = make(folder)
    with pytest.raises(ValueError, match=r"'batch_size': \(3, 1\)"):
        other.load_state_dict(state)
    loader = other.loader(3)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="saved with 2 workers, the loader has 1"):
        next(iter(loader))
    with pytest.raises(ValueError, match="an epoch has 7 batches of 3"):
        other.resume_at(0, 8)


def parquet_shards(folder, with_features: bool):
    shards, first = [], 0
    for shard, size in enumerate(SIZES):
        numbers = range(first, first + size)
        columns = {
            "image": [{"bytes": members(number)[0][1], "path": None} for number in numbers],
            "real": [captions(number)["real"][0] for number in numbers],
            "dense": [captions(number)["dense"] for number in numbers],
            "id": [f"{number:05d}" for number in numbers],
        }
        image = ImageFeature() if with_features else {"bytes": Value("binary"), "path": Value("string")}
        features = Features(image=image, real=Value("string"), dense=List(Value("string")), id=Value("string"))
        path = folder / f"{shard}.parquet"
        Dataset.from_dict(columns, features=features).to_parquet(path, batch_size=3)
        shards.append(str(path))
        first += size
    return shards


@pytest.mark.parametrize("with_features", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_parquet_shards_and_streaming_data_sets_give_the_same_samples(
    tmp_path, folder, store, with_features, world_size
):
    files = parquet_shards(tmp_path, with_features)
    streaming = load_dataset("parquet", data_files=files, split="train", streaming=True)
    assert isinstance(streaming, IterableDataset)
    assert streaming.num_shards == len(SIZES)
    columns = {"caption_fields": {"real": "real", "dense": "dense"}}
    for options in (columns, {"store": store, "key_column": "id"}):
        for rank in range(world_size):
            layout = {"rank": rank, "world_size": world_size}
            expected = make(folder, **({"store": store} if "store" in options else {}), **layout)
            for shards in (files, streaming):
                stream = make(folder, shards=shards, **options, **layout)
                for one in (stream, expected):
                    one.loader(2)
                    one.set_epoch(2)
                    one.resume_at(2, 1)
                for sample, other in zip(stream, expected, strict=True):
                    assert_same(sample, other)


def test_a_webdataset_read_by_datasets_gives_the_same_samples(folder, tmp_path):
    contents = [member for number in (0, 4, 8) for member in members(number)]  # all PNG: one image column
    path = write_tar(tmp_path / "a.tar", contents)
    streaming = load_dataset("webdataset", data_files=[str(path)], split="train", streaming=True)
    fields = {"real": "txt", "dense": "json.dense"}
    options = {"caption_fields": fields, "image_column": "png", "key_column": "__key__"}
    expected = list(make(folder, shards=path, caption_fields=fields))
    found = list(make(folder, shards=streaming, **options))
    assert len(found) == 3
    for sample, other in zip(found, expected, strict=True):
        assert_same(sample, other)


# ------------------------------------------------------------------------------------------------------- bad samples


def bad_sample(kind: str, number: int) -> list[tuple[str, bytes]]:
    image, text, record = members(number)
    return {
        "no image": [text, record],
        "no caption": [image],
        "empty caption": [image, (text[0], b" "), (record[0], b'{"dense": []}')],
        "two images": [image, (f"{number:05d}.webp", image[1]), text],
        "bad json": [image, text, (record[0], b'{"dense": ')],
        "wrong type": [image, text, (record[0], b'{"dense": 3}')],
        "corrupt": [(image[0], image[1][: len(image[1]) // 2]), text, record],
        "empty image": [(image[0], b""), text, record],
        "html": [(image[0], b"<html>404 Not Found</html>"), text, record],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message", "option"),
    [
        ("no image", "it has 0 images among its members", "on_bad_sample"),
        ("no caption", "no caption in a source of positive weight", "on_bad_sample"),
        ("empty caption", "no caption in a source of positive weight", "on_bad_sample"),
        ("two images", "it has 2 images", "on_bad_sample"),
        ("bad json", "its `json` member cannot be read", "on_bad_sample"),
        ("wrong type", "its captions of source `dense` are 3", "on_bad_sample"),
        ("corrupt", "The image of sample .* cannot be read", "on_bad_image"),
        ("empty image", "The image of sample .* the file is empty", "on_bad_image"),
        ("html", "The image of sample .* cannot be read", "on_bad_image"),
    ],
)
def test_a_bad_sample_is_refused_by_name_or_replaced_and_counted(tmp_path, kind, message, option):
    contents = [m for number in range(8) for m in (bad_sample(kind, 4) if number == 4 else members(number))]
    path = write_tar(tmp_path / "a.tar", contents)
    with pytest.raises(ValueError, match=message) as caught:
        list(make(tmp_path, shards=path))
    assert f"sample `00004` of shard `{path}`" in str(caught.value)
    other = {"on_bad_sample": "on_bad_image", "on_bad_image": "on_bad_sample"}[option]
    with pytest.raises(ValueError, match=message):
        list(make(tmp_path, shards=path, **{other: "skip"}))
    for num_workers in (0, 2) if kind in ("corrupt", "no image") else (0,):
        stream = make(tmp_path, shards=path, **{option: "skip"})
        whole = batches(stream, 2, num_workers)
        indices = [sample["index"] for batch in whole for sample in batch]
        assert [len(batch) for batch in whole] == [2, 2, 2, 2]
        assert set(indices) == {0, 1, 2, 3, 5, 6, 7}
        assert stream.skipped.number == 1
        assert "00004" in stream.skipped.reasons[0]
        # The replacement is part of the position, too.
        for done in (1, 3):
            stream.resume_at(0, done)
            rest = [sample["index"] for batch in batches(stream, 2, num_workers) for sample in batch]
            assert rest == indices[2 * done :]


def test_a_key_that_the_store_lacks_is_refused_or_replaced(tmp_path, store):
    contents = [member for number in (0, 1, COUNT + 1, 2) for member in members(number)]
    path = write_tar(tmp_path / "a.tar", contents)
    key = f"{COUNT + 1:05d}"
    with pytest.raises(ValueError, match=f"sample `{key}` of shard `.*a.tar`: its key is not in the store"):
        list(make(tmp_path, shards=path, store=store))
    stream = make(tmp_path, shards=path, store=store, on_bad_sample="skip")
    assert {sample["index"] for sample in stream} == {0, 1, 3}
    assert stream.skipped.number == 1
    assert key in stream.skipped.reasons[0]


def test_members_out_of_order_are_refused_or_replaced(tmp_path):
    (image, *_), (other, *others) = members(0), members(1)
    contents = [image, other, *others, members(0)[1], *members(2), *members(3)]
    path = write_tar(tmp_path / "a.tar", contents)
    with pytest.raises(ValueError, match="sample `00000`"):
        list(make(tmp_path, shards=path, shuffle_buffer=0))
    stream = make(tmp_path, shards=path, on_bad_sample="skip")
    texts = {sample["text"].split(".")[0] for sample in stream}
    assert texts <= {
        f"{kind} {number}{k}" for number in (1, 2, 3) for kind, k in (("real", ""), ("dense", " 0"), ("dense", " 1"))
    }
    assert stream.skipped.number == 2
    assert any("its key occurs before" in reason for reason in stream.skipped.reasons)


def test_shards_that_are_cut_off_are_refused_before_the_first_step_or_used_as_far_as_they_go(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", [m for number in range(6) for m in members(number)]).read_bytes()
    path = tmp_path / "a.tar"
    header = whole.index(b"00004.png")
    cases = {
        b"": ("empty file", 0),
        b"<html>Not found</html>": ("truncated header", 0),
        whole[: header + 700]: ("unexpected end of data", 4),
        whole[: header + 100]: ("no end mark", 4),
        whole[:header]: ("no end mark", 4),
        whole[:header] + b"\1" * 512 + whole[header + 512 :]: ("no valid header at byte", 4),
    }
    good = write_tar(tmp_path / "b.tar", [m for number in range(6, 9) for m in members(number)])
    for content, (message, complete) in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"Shard `.*a.tar` cannot be read: .*{message}"):
            make(tmp_path, shards=path)
        stream = make(tmp_path, shards=[path, good], on_bad_sample="skip")
        assert stream.skipped.number == 1
        assert "a.tar" in stream.skipped.reasons[0]
        texts = {sample["text"].split()[1].rstrip(".") for sample in stream}
        # A sample before a header that is missing may be lost with it: nothing tells that it was complete.
        assert texts in [{str(n) for n in [*range(k), 6, 7, 8]} for k in (complete, max(0, complete - 1))]


def test_shards_that_do_not_exist_or_are_empty_are_refused(tmp_path, folder):
    empty = write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(ValueError, match="Shard `.*empty.tar` holds no sample"):
        make(tmp_path, shards=empty)
    for pattern in ("{000..005}.tar", "nothing-*.tar"):
        with pytest.raises(ValueError, match="matches no file"):
            make(folder, shards=str(folder / pattern))
    with pytest.raises(ValueError, match="named twice"):
        make(folder, shards=[str(folder / "000.tar"), str(folder / "00*.tar")])
    with pytest.raises(ValueError, match="20 samples in 5 shards"):
        make(folder, rank=0, world_size=21)
    with pytest.raises(ValueError, match="neither a `.tar` nor a `.parquet`"):
        make(folder, shards=__file__)
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"Shard `.*a\.parquet` cannot be read"):
        make(folder, shards=tmp_path / "a.parquet")


def test_stated_counts_are_used_and_wrong_ones_refused(folder, tmp_path):
    counts = count_samples(str(folder / "*.tar"))
    assert counts == {f"{shard:03d}.tar": size for shard, size in enumerate(SIZES)}
    (tmp_path / "sizes.json").write_text(str(counts).replace("'", '"'))
    expected = [sample["index"] for sample in make(folder)]
    for stated in (counts, list(SIZES), str(tmp_path / "sizes.json")):
        assert [sample["index"] for sample in make(folder, samples_per_shard=stated)] == expected
    for wrong, message in (
        ([5, 1, 8, 3, 4], "fewer samples than the 8"),
        ([5, 1, 6, 3, 4], "more samples than the 6"),
    ):
        with pytest.raises(ValueError, match=f"Shard `.*002.tar` has {message}"):
            list(make(folder, samples_per_shard=wrong))
    for wrong, message in (
        ([5, 1], "has 2 numbers for 5 shards"),
        ({"000.tar": 5}, "lacks 4 shards, first '001.tar'"),
        ([5, 1, 0, 3, 4], "positive integers"),
    ):
        with pytest.raises(ValueError, match=message):
            make(folder, samples_per_shard=wrong)


def test_bad_options_are_refused(folder, store):
    for options, message in (
        ({"caption_fields": None}, "Pass `caption_fields`.* or both"),
        ({"store": store, "sub_captions": 0.5}, "cannot be cut"),
        ({"shuffle_buffer": -1}, "must not be negative"),
        ({"on_bad_image": "drop"}, '`on_bad_image` must be "error" or "skip"'),
        ({"on_bad_sample": "drop"}, '`on_bad_sample` must be "error" or "skip"'),
        ({"sub_captions": 1.5}, "probability in"),
        ({"rank": 2, "world_size": 2}, r"`rank` must be in \[0, 2\)"),
        ({"rank": 1}, "Pass both"),
        ({"caption_weights": {"real": 1}}, r"names \['real'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make(folder, **options)


def test_a_misspelt_field_is_noticed(folder, tmp_path, caplog):
    make(folder)
    assert not caplog.records
    make(folder, caption_fields={"real": "txt", "dense": "json.dence"})
    assert "None of the first 5 samples" in caplog.text
    assert "caption of source `dense` in `json.dence`" in caplog.text
    with pytest.raises(ValueError, match=r"has no columns \['absent'\], it has"):
        make(folder, shards=parquet_shards(tmp_path, True), caption_fields={"real": "absent"})


def test_the_text_beside_a_stored_embedding_is_that_of_the_same_caption(folder, store):
    # The order of the fields is not that of the store.
    fields = dict(reversed(CAPTION_FIELDS.items()))
    stream = ImageTextStream(
        str(folder / "{000..004}.tar"), fields, store=store, transform=TRANSFORM, shuffle_buffer=4, seed=5
    )
    oracle = ImageTextDataset(map_style().images, TABLE, store=store, with_text=True, transform=TRANSFORM, seed=5)
    for epoch in range(3):
        stream.set_epoch(epoch)
        oracle.set_epoch(epoch)
        for sample in stream:
            assert_same(sample, oracle[sample["index"]])
            assert sample["llm_embeds"][0] == hash_of(sample["text"])


def test_captions_that_are_not_those_of_the_store_are_refused_or_replaced(folder, store):
    shards, options = str(folder / "{000..004}.tar"), {"store": store, "transform": TRANSFORM, "shuffle_buffer": 4}
    with pytest.raises(ValueError, match=r"names the sources \['real'\], the store .* has \['dense', 'real'\]"):
        ImageTextStream(shards, {"real": "txt"}, **options)
    swapped = {"real": "json.dense", "dense": "txt"}
    # Samples with one caption of each kind are the same both ways round.
    with pytest.raises(ValueError, match=r"captions in the sources \['real', 'dense'\], but the store"):
        list(ImageTextStream(shards, swapped, **options))
    stream = ImageTextStream(shards, swapped, on_bad_sample="skip", **options)
    assert {sample["index"] % 3 for sample in stream} == {1}
    assert stream.skipped.number > 0


def test_weights_are_read_beside_captions_and_samples_without_one_are_bad(tmp_path, store):
    weights = {number: 0.25 * (1 + number % 4) for number in range(8)}

    def write() -> str:
        contents = []
        for number in weights:
            *others, (name, record) = members(number)
            scored = json.loads(record) | {"score": weights[number]}
            contents += [*others, (name, json.dumps(scored).encode())]
        return str(write_tar(tmp_path / "a.tar", contents))

    tar = write()
    rows = {"image": [{"bytes": members(number)[0][1], "path": None} for number in weights]}
    rows |= {"real": [captions(number)["real"] for number in weights], "score": list(weights.values())}
    Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    for options in (
        {"shards": tar, "weight_column": "json.score"},
        {"shards": tar, "weight_column": "json.score", "store": store},
        {"shards": str(tmp_path / "a.parquet"), "weight_column": "score", "caption_fields": {"real": "real"}},
    ):
        samples = {sample["index"]: sample for sample in make(tmp_path, **options)}
        assert {index: sample.pop("weight") for index, sample in samples.items()} == weights
        for sample in make(tmp_path, **{**options, "weight_column": None}):
            assert_same(sample, samples[sample["index"]])
    for wrong in (0, None, "heavy", [1.0]):
        weights[3] = wrong
        stream = make(tmp_path, shards=write(), weight_column="json.score")
        with pytest.raises(ValueError, match=r"`00003`.*its weight is .*, expected a positive number"):
            list(stream)
        stream = make(tmp_path, shards=tar, weight_column="json.score", on_bad_sample="skip", shuffle_buffer=8)
        found = [(sample["index"], sample["weight"]) for sample in stream]
        assert len(found) == 8 and all(weights[index] == weight for index, weight in found)
        assert stream.skipped.number == 1
