# SPDX-License-Identifier: Apache-2.0
"""Text encoders of every kind against the models of transformers, one text at a time and without padding."""

import pytest
import tiny_models
import torch
from process_groups import run_ranks
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    GPT2Config,
    GPT2Model,
    SiglipConfig,
    SiglipModel,
    SiglipTextModel,
)

from llm2clip_hf.evaluation import caption_retrieval_accuracy, embed_texts, encode_texts, evaluate_caption_retrieval


TEXTS = ["a red boat on the sea", "https://example.org/cat.jpg", "two dogs", "a red boat on the sea", "./x.png 12345"]
CAPTIONS = [
    ["a red boat", "ein rotes Boot auf dem Meer"],
    ["two dogs on a street", "people in a street"],
    ["./house.png", "a photo of a house"],
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.llama3_tokenizer(instruct=False)


@pytest.fixture(scope="module")
def llm():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_models.text_config("llama")).eval()


@torch.no_grad()
def states(model, tokenizer, text, **kwargs):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    return model(input_ids=ids, **kwargs).last_hidden_state[0]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_raw_llm_equals_its_hidden_states(llm, tokenizer, is_causal, pooling, batch_size):
    options = {"processor": tokenizer, "is_causal": is_causal, "pooling": pooling, "batch_size": batch_size}
    embeds = embed_texts(llm, TEXTS, **options)
    assert getattr(llm.config, "is_causal", None) is None or llm.config.is_causal
    for embed, text in zip(embeds, TEXTS):
        mask = None
        if not is_causal:  # an explicit mask that hides nothing
            length = len(tokenizer(text)["input_ids"])
            mask = torch.zeros(1, 1, length, length)
        hidden = states(llm.model, tokenizer, text, attention_mask=mask)
        # The begin-of-text token is read, not pooled.
        expected = hidden[-1] if pooling == "last" else hidden[1:].mean(0)
        torch.testing.assert_close(embed, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(embeds[0], embeds[3])


def test_the_direction_is_that_of_the_config_by_default_and_is_put_back(llm, tokenizer):
    causal = embed_texts(llm, TEXTS, processor=tokenizer, is_causal=True)
    both_ways = embed_texts(llm, TEXTS, processor=tokenizer, is_causal=False)
    assert (causal - both_ways).abs().max() > 1e-3
    torch.testing.assert_close(embed_texts(llm, TEXTS, processor=tokenizer), causal)
    llm.config.is_causal = False
    try:
        torch.testing.assert_close(embed_texts(llm.model, TEXTS, processor=tokenizer), both_ways)
        torch.testing.assert_close(embed_texts(llm, TEXTS, processor=tokenizer, is_causal=True), causal)
        assert llm.config.is_causal is False
    finally:
        llm.config.is_causal = True
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=331, n_embd=24, n_layer=1, n_head=2, n_positions=40, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ValueError, match="GPT2Model"):
        embed_texts(GPT2Model(config), TEXTS, processor=tokenizer, is_causal=False)


def test_a_folder_is_loaded_with_its_tokenizer(llm, tokenizer, tmp_path):
    llm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = embed_texts(llm, TEXTS, processor=tokenizer, is_causal=False)
    torch.testing.assert_close(embed_texts(tmp_path, TEXTS, is_causal=False), expected)
    embeds = embed_texts(llm, [text for pair in CAPTIONS for text in pair], processor=tokenizer)
    expected = caption_retrieval_accuracy(embeds[::2], embeds[1::2]) | {"num_images": 3, "num_skipped": 0}
    assert evaluate_caption_retrieval(str(tmp_path), CAPTIONS, batch_size=2) == pytest.approx(expected)
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ValueError, match="is a sentence-transformers model"):
        embed_texts(str(tmp_path), TEXTS)
    torch.testing.assert_close(
        embed_texts(str(tmp_path), TEXTS, pooling="mean"), embed_texts(llm, TEXTS, processor=tokenizer)
    )


def test_long_texts_are_truncated(llm, tokenizer):
    long, cut = "a " * 900, "a " * 900 + "b"
    embeds = embed_texts(llm, [long, cut], processor=tokenizer, pooling="last")
    assert torch.equal(embeds[0], embeds[1])
    short = embed_texts(llm, ["a red boat on the sea", "a red boat on a street"], processor=tokenizer, max_length=4)
    torch.testing.assert_close(short[0], short[1])


SIZES = {"hidden_size": 18, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 3}


def clip_models(folder):
    torch.manual_seed(0)
    text = {"vocab_size": 331, "max_position_embeddings": 24, "eos_token_id": 4, "bos_token_id": 0, **SIZES}
    config = CLIPConfig(text_config={"projection_dim": 20, **text}, vision_config=SIZES, projection_dim=20)
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    return model, CLIPTextModelWithProjection.from_pretrained(folder)


def siglip_models(folder):
    torch.manual_seed(0)
    text = {"vocab_size": 331, "max_position_embeddings": 24, **SIZES}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=SIZES)).eval()
    model.save_pretrained(folder)
    return model, SiglipTextModel.from_pretrained(folder)


@pytest.mark.parametrize("build", [clip_models, siglip_models])
def test_a_text_tower_alone_equals_the_whole_model_in_the_joint_space(build, tmp_path):
    model, tower = build(tmp_path)
    tokenizer = tiny_models.llama3_tokenizer(instruct=False)
    tokenizer.pad_token = "<|end_of_text|>"
    options = {"processor": tokenizer, "batch_size": 2}
    expected = encode_texts(model, TEXTS, **options)
    torch.testing.assert_close(embed_texts(model, TEXTS, **options), expected)
    torch.testing.assert_close(embed_texts(tower, TEXTS, **options), expected)
    for text, embed in zip(TEXTS, expected):
        padding = {"padding": "max_length", "max_length": 24} if build is siglip_models else {}
        ids = torch.tensor([tokenizer(text, truncation=True, **({"max_length": 24} | padding))["input_ids"]])
        with torch.no_grad():
            features = model.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(embed, torch.nn.functional.normalize(features)[0], rtol=0, atol=1e-6)


def test_llm2clip_gives_its_joint_space():
    model, processor = tiny_models.model(), tiny_models.processor()
    embeds = embed_texts(model, TEXTS, processor=processor)
    batch = processor(text=TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).text_embeds
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)


def test_options_and_encoders_that_do_not_fit_are_refused(llm, tokenizer, tmp_path):
    clip, _ = clip_models(tmp_path)
    cases = [
        ((clip,), {"processor": tokenizer, "is_causal": False}, "`is_causal` and `pooling` concern a raw LLM"),
        ((clip,), {}, "CLIPModel needs a tokenizer"),
        ((llm,), {}, "LlamaForCausalLM needs a tokenizer"),
        ((llm,), {"processor": tokenizer, "pooling": "max"}, "`pooling` must be 'mean' or 'last', got 'max'"),
        ((CLIPTextModel(clip.config.text_config),), {"processor": tokenizer}, "has no projection"),
        ((print,), {}, "is neither a `SentenceTransformer` nor a model"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            embed_texts(*arguments, TEXTS, **options)
    with pytest.raises(ValueError, match="Text 1 is ''"):
        embed_texts(llm, ["a", ""], processor=tokenizer)


def _embeds_of_rank(llm, tokenizer):
    return embed_texts(llm, TEXTS, processor=tokenizer, is_causal=False, batch_size=1).numpy()


def test_two_processes_equal_one(llm, tokenizer):
    expected = embed_texts(llm, TEXTS, processor=tokenizer, is_causal=False)
    for embeds in run_ranks(2, _embeds_of_rank, llm, tokenizer):
        torch.testing.assert_close(torch.from_numpy(embeds), expected, rtol=1e-5, atol=1e-6)
