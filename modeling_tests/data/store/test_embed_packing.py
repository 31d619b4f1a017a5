# SPDX-License-Identifier: Apache-2.0
"""Packing captions without padding where the attention of the LLM can, against the padded path."""

import pytest
import tiny_models
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from llm2clip_hf.data import embed_captions
from llm2clip_hf.data.sampling import token_budget_batches
from llm2clip_hf.data.store.text_encoders import as_text_encoder


NAME = "flash_attention_stand_in"
CAPTIONS = [
    ["a photo of a red boat on the sea", "a boat"],
    ["x"],
    ["two dogs run over the green grass, one is black " * 4, "two dogs"],
    ["people in a street 12345", "a photo"],
]
shapes = []


def attend_within_segments(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """What varlen flash attention computes, segment by segment, and only from what it is given."""
    assert attention_mask is None
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == int(kwargs["cu_seq_lens_q"].diff().max())
    assert torch.equal(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"])
    assert kwargs["cu_seq_lens_q"].dtype == torch.int32
    assert kwargs["is_causal"] is False
    shapes.append(tuple(query.shape))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = []
    bounds = kwargs["cu_seq_lens_q"].tolist()
    for start, stop in zip(bounds, bounds[1:]):
        q, k, v = (tensor[:, :, start:stop] for tensor in (query, key, value))
        outputs.append((scaling * q @ k.transpose(-1, -2)).softmax(-1) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


@pytest.fixture(params=["llama", "qwen3", "phi3"])
def model(request):
    return tiny_models.model(text=request.param)


@pytest.fixture
def tokenizer():
    return tiny_models.processor().tokenizer


def use_stand_in(model):
    AttentionInterface.register(NAME, attend_within_segments)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    model.text_model.config._attn_implementation = NAME
    shapes.clear()


def test_packed_captions_have_the_embeddings_of_padded_ones(tmp_path, model, tokenizer):
    arguments = {"tokenizer": tokenizer, "dtype": "float32", "max_tokens_per_batch": 90, "show_progress": False}
    padded = embed_captions(model, CAPTIONS, tmp_path / "padded", **arguments)
    use_stand_in(model)
    packed = embed_captions(model, CAPTIONS, tmp_path / "packed", **arguments)
    assert packed.fingerprint == padded.fingerprint
    torch.testing.assert_close(packed.gather(range(7)), padded.gather(range(7)), rtol=1e-5, atol=1e-5)
    # One row per batch, with the tokens of the captions and nothing else, in every layer.
    lengths = [len(tokenizer(text.strip())["input_ids"]) for texts in CAPTIONS for text in texts]
    assert all(shape[0] == 1 for shape in shapes)
    assert sum(shape[2] for shape in shapes) == sum(lengths) * model.text_model.config.num_hidden_layers


@pytest.mark.parametrize("pooling", ["eos", "last"])
def test_the_pooling_of_the_model_is_that_of_its_store_packed_or_padded(tmp_path, tokenizer, pooling):
    model = tiny_models.model(text_pooling=pooling)
    arguments = {"tokenizer": tokenizer, "dtype": "float32", "show_progress": False}
    padded = embed_captions(model, CAPTIONS, tmp_path / "padded", **arguments)
    use_stand_in(model)
    packed = embed_captions(model, CAPTIONS, tmp_path / "packed", **arguments)
    assert padded.fingerprint["pooling"] == packed.fingerprint["pooling"] == pooling
    torch.testing.assert_close(packed.gather(range(7)), padded.gather(range(7)), rtol=1e-5, atol=1e-5)
    # The oracle: the state of the last token of each text, alone in its batch.
    model.text_model.config._attn_implementation = "eager"
    for row, text in enumerate(text for texts in CAPTIONS for text in texts):
        with torch.no_grad():
            states = model.text_model(torch.tensor([tokenizer(text.strip())["input_ids"]])).last_hidden_state
        torch.testing.assert_close(packed.gather([row])[0], states[0, -1], rtol=1e-5, atol=1e-5)


def test_a_packed_caption_does_not_depend_on_its_neighbours(model, tokenizer):
    use_stand_in(model)
    encoder = as_text_encoder(model, tokenizer, 512)
    texts = [text for texts in CAPTIONS for text in texts]
    together = encoder.encode(texts)
    for row, text in enumerate(texts):
        torch.testing.assert_close(together[row], encoder.encode([text])[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.flip(0), encoder.encode(texts[::-1]), rtol=1e-5, atol=1e-5)


def test_long_captions_are_truncated_alike_and_never_exceed_the_llm(model, tokenizer):
    texts = ["a boat on the sea " * 9, "a dog"]
    padded = as_text_encoder(model, tokenizer, 17).encode(texts)
    model.text_model.config.max_position_embeddings = 16
    use_stand_in(model)
    torch.testing.assert_close(
        as_text_encoder(model, tokenizer, 16).encode(texts[1:])[0], padded[1], rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="has 17 tokens, more than the 16 that the LLM can take"):
        as_text_encoder(model, tokenizer, 17).encode(texts)
    model.text_model.config.max_position_embeddings = 640
    torch.testing.assert_close(as_text_encoder(model, tokenizer, 17).encode(texts), padded, rtol=1e-5, atol=1e-5)


def test_a_header_alone_is_pooled_over_all_it_has(model, tokenizer):
    model.config.text_prefix_length = 30
    padded = as_text_encoder(model, tokenizer, 512).encode(["a boat", "x"])
    use_stand_in(model)
    torch.testing.assert_close(
        as_text_encoder(model, tokenizer, 512).encode(["a boat", "x"]), padded, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "pads"),
    [
        ("flash_attention_2", False),
        ("flash_attention_3", False),
        ("kernels-community/flash-attn2", False),
        ("sdpa", True),
        ("eager", True),
        ("flex_attention", True),
    ],
)
def test_captions_are_packed_for_flash_attention_only(tokenizer, name, pads):
    model = tiny_models.model()
    model.text_model.config._attn_implementation_internal = name
    assert as_text_encoder(model, tokenizer, 512).pads == pads


def test_a_packed_batch_may_be_filled_to_the_budget():
    lengths = torch.randint(1, 40, (101,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(token_budget_batches(lengths, max_tokens=100, pads=False))
    assert sorted(item for batch in batches for item in batch) == list(range(101))
    sums = [sum(lengths[item] for item in batch) for batch in batches]
    assert max(sums) <= 100
    # No batch could have taken the first item of the next one.
    assert all(total + lengths[after[0]] > 100 for total, after in zip(sums, batches[1:]))
    assert list(token_budget_batches([500, 3], max_tokens=100, pads=False)) == [[0], [1]]
