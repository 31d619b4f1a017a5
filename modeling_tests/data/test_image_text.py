# SPDX-License-Identifier: Apache-2.0
"""Image-text samples: the right pairs, the right mixture, the same draw on every path to a sample."""

import collections
import hashlib
import io

import numpy as np
import pytest
import tiny_models
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader

from llm2clip_hf.data import (
    CaptionTable,
    CenterCropTransform,
    ImageTextCollator,
    ImageTextDataset,
    RandomResizedCropTransform,
    embed_captions,
)


COUNT = 12
CAPTIONS = {
    "real": [[f"real {n} {k}" for k in range(1 + n % 3)] for n in range(COUNT)],
    "dense": [[f"dense {n}"] if n != 5 else [] for n in range(COUNT)],
}


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20 + n, 25, 3), dtype=np.uint8)) for n in range(COUNT)]


@pytest.fixture(scope="module")
def embeddings():
    table = CaptionTable(CAPTIONS)
    rows = torch.randn(table.num_captions, 6, generator=torch.Generator().manual_seed(1)).half().float()
    return dict(zip(table.rows(0, table.num_captions), rows))


@pytest.fixture
def store(tmp_path, embeddings):
    def encode(texts):
        return torch.stack([embeddings[text] for text in texts])

    return embed_captions(encode, CAPTIONS, tmp_path, fingerprint={}, rows_per_shard=7, show_progress=False)


def texts_of(dataset: ImageTextDataset, epochs: range) -> list[list[str]]:
    drawn = []
    for epoch in epochs:
        dataset.set_epoch(epoch)
        drawn.append([dataset[index]["text"] for index in range(len(dataset))])
    return drawn


def test_samples_pair_every_image_with_its_own_captions(images):
    transform = CenterCropTransform(16)
    dataset = ImageTextDataset(images, CAPTIONS, transform=transform)
    for epoch in range(5):
        dataset.set_epoch(epoch)
        for index in range(COUNT):
            sample = dataset[index]
            assert set(sample) == {"pixel_values", "text", "index", "image_id", "text_id"}
            assert sample["index"] == index
            assert sample["text"] in CAPTIONS["real"][index] + CAPTIONS["dense"][index]
            assert torch.equal(sample["pixel_values"], transform(images[index]))
    assert len(list(dataset)) == COUNT


def test_stored_embeddings_are_those_of_the_caption_that_text_would_give(images, store, embeddings):
    options = {"transform": CenterCropTransform(16), "seed": 3, "caption_weights": {"real": 1, "dense": 2}}
    with_text = ImageTextDataset(images, CAPTIONS, **options)
    with_store = ImageTextDataset(images, store=store, **options)
    with_both = ImageTextDataset(images, CAPTIONS, store=store, **options)
    for epoch in range(4):
        for dataset in (with_text, with_store, with_both):
            dataset.set_epoch(epoch)
        for index in range(COUNT):
            expected = embeddings[with_text[index]["text"]]
            for dataset in (with_store, with_both):
                sample = dataset[index]
                text_id = set() if dataset is with_store else {"text_id"}
                assert set(sample) == {"pixel_values", "llm_embeds", "index", "image_id", *text_id}
                assert sample["llm_embeds"].dtype == torch.float32
                assert torch.equal(sample["llm_embeds"], expected)


def test_the_text_beside_a_stored_embedding_is_that_of_the_same_caption(images, store, embeddings):
    options = {"transform": CenterCropTransform(16), "seed": 3, "caption_weights": {"real": 1, "dense": 2}}
    text_alone = ImageTextDataset(images, CAPTIONS, with_text=True, **options)
    both = ImageTextDataset(images, CAPTIONS, store=store, with_text=True, **options)
    drawn = set()
    for epoch in range(4):
        for dataset in (text_alone, both):
            dataset.set_epoch(epoch)
        for index in range(COUNT):
            sample = both[index]
            assert set(sample) == {"pixel_values", "llm_embeds", "text", "index", "image_id", "text_id"}
            assert torch.equal(sample["llm_embeds"], embeddings[sample["text"]])
            assert sample["text"] == text_alone[index]["text"]
            drawn.add(sample["text"])
    assert len(drawn) > COUNT
    with pytest.raises(ValueError, match="`with_text=True` needs the texts"):
        ImageTextDataset(images, store=store, with_text=True, **options)


def test_sources_are_drawn_by_weight_and_captions_uniformly_within(images):
    captions = {"real": [["r0", "r1", "r2"]] * COUNT, "dense": ["d"] * COUNT, "unused": ["u"] * COUNT}
    weights = {"real": 3, "dense": 1, "unused": 0}
    dataset = ImageTextDataset(images, captions, transform=lambda image, generator: None, caption_weights=weights)
    counts = collections.Counter(sum(texts_of(dataset, range(100)), []))
    # 1200 draws; every outcome has probability 1/4, standard deviation 15.
    assert set(counts) == {"r0", "r1", "r2", "d"}
    assert all(225 < count < 375 for count in counts.values())


def test_sources_have_equal_weight_by_default_whatever_their_number_of_captions(images):
    captions = {"real": [["r0", "r1", "r2", "r3"]] * COUNT, "dense": ["d"] * COUNT}
    dataset = ImageTextDataset(images, captions, transform=lambda image, generator: None)
    drawn = sum(texts_of(dataset, range(100)), [])
    assert 525 < drawn.count("d") < 675


def test_draws_depend_on_seed_epoch_and_index_only(images):
    def transform():
        return RandomResizedCropTransform(16, scale=(0.3, 1))

    first = ImageTextDataset(images, CAPTIONS, transform=transform(), seed=7)
    second = ImageTextDataset(images[:6], {k: v[:6] for k, v in CAPTIONS.items()}, transform=transform(), seed=7)
    first.set_epoch(2)
    second.set_epoch(2)
    in_order = [first[index] for index in range(COUNT)]
    torch.manual_seed(123)
    for index in (5, 0, 3, 3):
        for dataset in (first, second):
            sample = dataset[index]
            assert sample["text"] == in_order[index]["text"]
            assert torch.equal(sample["pixel_values"], in_order[index]["pixel_values"])
    first.set_epoch(3)
    assert [first[index]["text"] for index in range(COUNT)] != [sample["text"] for sample in in_order]
    assert not torch.equal(first[0]["pixel_values"], in_order[0]["pixel_values"])
    other_seed = ImageTextDataset(images, CAPTIONS, transform=transform(), seed=8)
    other_seed.set_epoch(2)
    assert not torch.equal(other_seed[0]["pixel_values"], in_order[0]["pixel_values"])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_persistent_workers_follow_the_epoch_and_draw_the_same(images, store, context):
    dataset = ImageTextDataset(images, store=store, transform=RandomResizedCropTransform(8), seed=1)
    loader = DataLoader(
        dataset,
        batch_size=5,
        num_workers=1,
        persistent_workers=True,
        collate_fn=ImageTextCollator(),
        multiprocessing_context=context,
    )
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        loaded = list(loader)
        expected = ImageTextCollator()([dataset[index] for index in range(COUNT)])
        for name, value in expected.items():
            assert torch.equal(torch.cat([batch[name] for batch in loaded]), value), (epoch, name)
        epochs.append(expected)
    assert not torch.equal(epochs[0]["llm_embeds"], epochs[1]["llm_embeds"])


def test_batches_train_the_model(images, store):
    dataset = ImageTextDataset(
        images, CAPTIONS, transform=RandomResizedCropTransform.from_image_processor(tiny_models.image_processor())
    )
    batch = ImageTextCollator(tiny_models.processor())([dataset[index] for index in range(4)])
    batch.pop("index")
    loss = tiny_models.model()(**batch, return_loss=True).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_an_image_column_and_paths_give_the_same_samples(images, tmp_path):
    paths = []
    for number, image in enumerate(images):
        paths.append(str(tmp_path / f"{number}.png"))
        image.save(paths[-1])
    column = Dataset.from_dict({"image": paths}).cast_column("image", ImageFeature())["image"]
    transform = RandomResizedCropTransform(8)
    datasets = [ImageTextDataset(source, CAPTIONS, transform=transform) for source in (images, paths, column)]
    for index in (0, 11):
        first, *others = [dataset[index]["pixel_values"] for dataset in datasets]
        assert all(torch.equal(first, other) for other in others)


def test_a_damaged_image_is_refused_with_its_row(images, tmp_path):
    path = tmp_path / "damaged.jpg"
    path.write_bytes(b"\xff\xd8\xff garbage")
    dataset = ImageTextDataset([*images[:3], path], ["a", "b", "c", "d"], transform=CenterCropTransform(8))
    assert dataset[2]["text"] == "c"
    with pytest.raises(ValueError, match=r"Image 3 \(`.*damaged.jpg`\) cannot be read"):
        dataset[3]


def test_bad_arguments_are_refused(images, store):
    transform = CenterCropTransform(8)
    one_source = [["a"]] * COUNT
    cases = [
        ({}, "Neither `captions` nor `store`"),
        ({"captions": one_source[:-1]}, r"Images \(12\) and images with captions \(11\)"),
        ({"captions": one_source, "store": store}, "was made from other captions"),
        ({"captions": CAPTIONS, "caption_weights": {"real": 1}}, r"names \['real'\], the captions have the sources"),
        ({"captions": CAPTIONS, "caption_weights": {"real": 1, "dense": -1}}, "finite and non-negative"),
        ({"captions": CAPTIONS, "caption_weights": {"real": 0, "dense": 0}}, "with a positive sum"),
        ({"captions": CAPTIONS, "caption_weights": {"real": 1, "dense": float("nan")}}, "finite and non-negative"),
        ({"captions": CAPTIONS, "caption_weights": {"real": 0, "dense": 1}}, "Image 5 has captions only in sources"),
        ({"store": store, "caption_weights": {"real": 0, "dense": 1}}, "Image 5 has captions only in sources"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            ImageTextDataset(images, transform=transform, **arguments)
    dataset = ImageTextDataset(images, CAPTIONS, transform=transform)
    for index in (-1, COUNT):
        with pytest.raises(IndexError):
            dataset[index]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_replaced_by_another_row_and_counted(images, tmp_path, num_workers):
    damaged = {3: tmp_path / "empty.jpg", 7: tmp_path / "page.jpg"}
    damaged[3].write_bytes(b"")
    damaged[7].write_bytes(b"<html>Not found</html>")
    rows = [damaged.get(row, image) for row, image in enumerate(images)]
    options = {"transform": RandomResizedCropTransform(8), "seed": 2}
    good = ImageTextDataset(images, CAPTIONS, **options)
    dataset = ImageTextDataset(rows, CAPTIONS, on_bad_image="skip", **options)
    replaced = set()
    for epoch in range(4):
        good.set_epoch(epoch)
        dataset.set_epoch(epoch)
        loader = DataLoader(dataset, batch_size=5, num_workers=num_workers, collate_fn=list)
        samples = [sample for batch in loader for sample in batch]
        assert len(samples) == COUNT
        for row, sample in enumerate(samples):
            assert sample["index"] == row or row in damaged
            assert sample["index"] not in damaged
            expected = good[sample["index"]]
            assert sample["text"] == expected["text"]
            assert torch.equal(sample["pixel_values"], expected["pixel_values"])
        assert [dataset[row]["index"] for row in damaged] == [samples[row]["index"] for row in damaged]
        replaced |= {(row, samples[row]["index"]) for row in damaged}
    assert len(replaced) > 2
    report = dataset.skipped
    assert report.number == 2 * 2 * 4
    assert any("Image 3 (`" in reason and "empty.jpg" in reason for reason in report.reasons)
    assert any("Image 7 (`" in reason and "page.jpg" in reason for reason in report.reasons)


def test_images_that_cannot_be_read_at_all_are_refused(tmp_path):
    paths = [str(tmp_path / f"{row}.jpg") for row in range(COUNT)]
    dataset = ImageTextDataset(paths, CAPTIONS, transform=CenterCropTransform(8), on_bad_image="skip")
    with pytest.raises(ValueError, match="Image 4 and 32 images chosen in its place cannot be read"):
        dataset[4]
    with pytest.raises(ValueError, match='`on_bad_image` must be "error" or "skip"'):
        ImageTextDataset(paths, CAPTIONS, transform=CenterCropTransform(8), on_bad_image="drop")


def test_sub_captions_are_parts_of_the_caption_that_would_be_drawn(images, store):
    captions = [f"One {row}. Two {row}. Three {row}." for row in range(COUNT)]
    transform = CenterCropTransform(4)
    whole = ImageTextDataset(images, captions, transform=transform)
    parts = ImageTextDataset(images, captions, transform=transform, sub_captions=0.5)
    shorter = 0
    for epoch in range(20):
        whole.set_epoch(epoch)
        parts.set_epoch(epoch)
        for row in range(COUNT):
            text, part = whole[row]["text"], parts[row]["text"]
            assert part in text
            assert part == parts[row]["text"]
            shorter += part != text
    # 240 draws of probability 1/2, standard deviation 8.
    assert 85 < shorter < 155
    with pytest.raises(ValueError, match="stored embeddings, which cannot be cut"):
        ImageTextDataset(images, store=store, transform=transform, sub_captions=0.5)
    with pytest.raises(ValueError, match=r"probability in \[0, 1\], got -1"):
        ImageTextDataset(images, captions, transform=transform, sub_captions=-1)


def test_ids_are_equal_for_equal_files_pixels_and_texts_and_the_same_in_every_process(tmp_path):
    buffer = io.BytesIO()
    Image.linear_gradient("L").save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    (tmp_path / "b.png").write_bytes(buffer.getvalue())
    decoded = [Image.linear_gradient("L"), Image.linear_gradient("L").rotate(90), Image.linear_gradient("L")]
    files = [str(tmp_path / "a.png"), tmp_path / "b.png", {"bytes": buffer.getvalue(), "path": "c.png"}]
    captions = ["a cat", "a cat", "a dog", " a cat", "a cat", "A cat"]
    dataset = ImageTextDataset([*files, *decoded], captions, transform=CenterCropTransform(8))
    images, texts = zip(*((sample["image_id"], sample["text_id"]) for sample in dataset))
    assert [images.index(each) for each in images] == [0, 0, 0, 3, 4, 3]
    assert [texts.index(each) for each in texts] == [0, 0, 2, 3, 0, 5]
    assert texts[0] == -9045190309551020975  # the first 8 bytes of the SHA-256 of "a cat", little-endian and signed
    assert images[0] == int.from_bytes(hashlib.sha256(buffer.getvalue()).digest()[:8], "little", signed=True)


def test_weights_of_pairs_reach_the_batch_and_bad_ones_are_refused(images, store):
    weights = np.linspace(0.5, 2.0, COUNT)
    dataset = ImageTextDataset(images, store=store, transform=CenterCropTransform(16), weights=weights)
    batch = ImageTextCollator()([dataset[2], dataset[0]])
    assert batch["weight"].dtype == torch.float32
    torch.testing.assert_close(batch["weight"], torch.tensor(weights[[2, 0]], dtype=torch.float32), atol=0, rtol=0)
    for wrong, message in (
        (weights[1:], r"shape \(\d+,\) for \d+ images"),
        (np.where(weights == weights[3], 0, weights), "The weight of image 3 is 0.0"),
        (np.where(weights == weights[1], np.nan, weights), "The weight of image 1 is nan"),
        (np.where(weights == weights[1], np.inf, weights), "The weight of image 1 is inf"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageTextDataset(images, store=store, transform=CenterCropTransform(16), weights=wrong)


def sample(number: int, **kwargs) -> dict:
    return {"pixel_values": torch.full((3, 2, 4), float(number)), "index": number, **kwargs}


def test_embeddings_are_stacked():
    samples = [sample(n, llm_embeds=torch.arange(5.0) + n) for n in (4, 2)]
    batch = ImageTextCollator()(samples)
    assert set(batch) == {"pixel_values", "llm_embeds", "index", "text_id"}
    assert torch.equal(batch["pixel_values"], torch.stack([s["pixel_values"] for s in samples]))
    assert torch.equal(batch["llm_embeds"], torch.stack([s["llm_embeds"] for s in samples]))
    assert batch["index"].tolist() == [4, 2]
    assert batch["index"].dtype == torch.int64


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_tokenized_like_the_processor_does(side):
    processor = tiny_models.processor()
    processor.tokenizer.padding_side = side
    texts = ["a red boat", " two dogs \n", "x"]
    batch = ImageTextCollator(processor)([sample(n, text=text) for n, text in enumerate(texts)])
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "index", "text_id"}
    expected = processor(text=[text.strip() for text in texts])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])


def test_long_texts_are_truncated_and_keep_the_end_of_turn():
    processor = tiny_models.processor()
    batch = ImageTextCollator(processor)([sample(0, text="boat " * 3000)])
    assert batch["input_ids"].shape == (1, 512)
    assert batch["input_ids"][0, -1] == processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    short = ImageTextCollator(processor, max_length=20)([sample(0, text="boat " * 3000)])
    assert short["input_ids"].shape == (1, 20)


def test_samples_without_index_give_no_index():
    samples = [{"pixel_values": torch.zeros(3, 2, 2), "llm_embeds": torch.zeros(4)}] * 2
    assert set(ImageTextCollator()(samples)) == {"pixel_values", "llm_embeds", "text_id"}


def test_keys_pass_through_as_names():
    samples = [sample(n, llm_embeds=torch.zeros(4), key=f"{n:03d}") for n in (4, 2)]
    batch = ImageTextCollator()(samples)
    assert set(batch) == {"pixel_values", "llm_embeds", "index", "key", "text_id"}
    assert batch["key"] == ["004", "002"]


def test_mixed_missing_and_unknown_keys_are_refused():
    embeds = {"llm_embeds": torch.zeros(4)}
    no_index = {name: value for name, value in sample(1, **embeds).items() if name != "index"}
    cases = [
        ([], "batch is empty"),
        ([sample(0, **embeds), sample(1, text="a")], r"Sample 1 has the keys \['index', 'pixel_values', 'text'\]"),
        ([sample(0, **embeds), no_index], "Sample 1 has the keys"),
        ([sample(0)], "one of `llm_embeds` and `text`"),
        ([sample(0, text="a", **embeds)], "one of `llm_embeds` and `text`"),
        ([sample(0, labels=1, **embeds)], "may have `key` and"),
        ([{"text": "a"}], "They need `pixel_values`"),
        ([sample(0, text="a")], "the collator has no processor"),
        ([sample(0, **embeds), sample(1, llm_embeds=torch.zeros(5))], r"`llm_embeds` of sample 1 has shape \(5,\)"),
        (
            [sample(0, **embeds), sample(1, **embeds) | {"pixel_values": torch.zeros(3, 4, 2)}],
            r"`pixel_values` of sample 1 has shape \(3, 4, 2\)",
        ),
    ]
    for samples, message in cases:
        with pytest.raises(ValueError, match=message):
            ImageTextCollator()(samples)


def test_a_batch_of_empty_samples_is_empty_and_a_mixed_one_is_refused():
    sample = {"pixel_values": torch.zeros(3, 2, 2), "llm_embeds": torch.ones(4)}
    assert ImageTextCollator()([{}, {}]) == {}
    with pytest.raises(ValueError, match="All samples of a batch need the same keys"):
        ImageTextCollator()([sample, {}])
