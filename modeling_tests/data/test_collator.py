# SPDX-License-Identifier: Apache-2.0
"""Batches: stacked pixels, stacked embeddings or tokens, nothing else."""

import pytest
import tiny_models
import torch

from llm2clip_hf.data import ImageTextCollator


def sample(number: int, **kwargs) -> dict:
    return {"pixel_values": torch.full((3, 2, 4), float(number)), "index": number, **kwargs}


def test_embeddings_are_stacked():
    samples = [sample(n, llm_embeds=torch.arange(5.0) + n) for n in (4, 2)]
    batch = ImageTextCollator()(samples)
    assert set(batch) == {"pixel_values", "llm_embeds", "index"}
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
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "index"}
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
    assert set(ImageTextCollator()(samples)) == {"pixel_values", "llm_embeds"}


def test_keys_pass_through_as_names():
    samples = [sample(n, llm_embeds=torch.zeros(4), key=f"{n:03d}") for n in (4, 2)]
    batch = ImageTextCollator()(samples)
    assert set(batch) == {"pixel_values", "llm_embeds", "index", "key"}
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
        ([sample(0, labels=1, **embeds)], "may have `index` and `key`"),
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
