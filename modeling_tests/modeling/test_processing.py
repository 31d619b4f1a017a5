# SPDX-License-Identifier: Apache-2.0
"""The text template in the tokenizer, and the processor."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from llm2clip_hf import LLM2CLIPProcessor
from llm2clip_hf.modeling import apply_text_template, pool_text, text_prefix_length


CAPTIONS = [
    "a photo of a red boat",
    "Two dogs (one black) run!\nThe grass is green...",
    "12345 people; 'tis a street",
    "ein gr\u00fcnes Boot auf dem Meer",
    "\u4e00\u53ea\u732b",
    "user",
    ".",
    "don't",
]


def original_ids(caption: str) -> list[int]:
    """The original's string template, tokenized as one string, begin-of-text added by the tokenizer."""
    tokenizer = tiny_models.llama3_tokenizer()
    text = f"<|start_header_id|>user<|end_header_id|>\n\n{caption.strip()}<|eot_id|>"
    return tokenizer(text)["input_ids"]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_llama3_ids_are_those_of_the_originals_string_template(caption: str) -> None:
    templated = apply_text_template(tiny_models.llama3_tokenizer())
    assert templated(caption)["input_ids"] == original_ids(caption)
    assert templated(f"  {caption} \n")["input_ids"] == original_ids(caption)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooled_positions_are_exactly_caption_and_end_of_turn(side: str) -> None:
    raw = tiny_models.llama3_tokenizer()
    processor = tiny_models.processor()
    processor.tokenizer.padding_side = side
    batch = processor(text=CAPTIONS)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    # One-hot states: the pooled vector is the histogram of the pooled ids.
    states = torch.nn.functional.one_hot(ids, tiny_models.VOCAB).float()
    pooled = pool_text(states, mask, text_prefix_length(processor.tokenizer))
    for row, caption in enumerate(CAPTIONS):
        own = raw(caption.strip() + "<|eot_id|>", add_special_tokens=False)["input_ids"]
        expected = torch.bincount(torch.tensor(own), minlength=tiny_models.VOCAB) / len(own)
        torch.testing.assert_close(pooled[row], expected)


def test_prefix_length_counts_the_leading_template_tokens() -> None:
    raw = tiny_models.llama3_tokenizer()
    assert text_prefix_length(raw) == 1
    assert text_prefix_length(apply_text_template(raw)) == 5
    assert text_prefix_length(apply_text_template(raw, template=None)) == 1
    assert text_prefix_length(apply_text_template(tiny_models.llama3_tokenizer(instruct=False))) == 1


def test_template_cannot_be_applied_twice(tmp_path: Path) -> None:
    once = apply_text_template(tiny_models.llama3_tokenizer())
    assert once.chat_template is None
    for template in ("auto", "llama3", None):
        again = apply_text_template(once, template)
        assert again(CAPTIONS)["input_ids"] == once(CAPTIONS)["input_ids"]
    once.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert apply_text_template(loaded, "llama3")(CAPTIONS)["input_ids"] == once(CAPTIONS)["input_ids"]
    with pytest.raises(ValueError, match=r"already puts \['<\|begin_of_text\|>', .*would come on top"):
        apply_text_template(once, "question: {text}")


def test_template_leaves_the_given_tokenizer_alone() -> None:
    raw = tiny_models.llama3_tokenizer()
    before = raw("  a red boat ")["input_ids"]
    apply_text_template(raw)
    assert raw("  a red boat ")["input_ids"] == before and raw.chat_template is not None


def test_template_survives_saving(tmp_path: Path) -> None:
    templated = apply_text_template(tiny_models.llama3_tokenizer())
    templated.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(CAPTIONS)["input_ids"] == templated(CAPTIONS)["input_ids"]
    assert loaded.model_max_length == 512 and loaded.pad_token == "<|eot_id|>"
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert not (tmp_path / "chat_template.jinja").exists()


def test_truncation_keeps_header_and_end_of_turn() -> None:
    processor = tiny_models.processor()
    caption = "a red boat on the sea " * 5000  # about 100 kB
    ids = processor(text=caption)["input_ids"][0].tolist()
    full = original_ids(caption)
    assert len(ids) == 512
    assert ids[:5] == full[:5] and ids[-1] == full[-1]
    assert ids[5:-1] == full[5 : 5 + 506]


def test_a_template_string_and_the_other_families() -> None:
    raw = tiny_models.llama3_tokenizer()
    raw.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chatml = apply_text_template(raw, "chatml")
    text = "<|begin_of_text|><|im_start|>user\na red boat<|im_end|>"
    assert chatml("a red boat")["input_ids"] == raw(text, add_special_tokens=False)["input_ids"]
    own = apply_text_template(raw, "user: {text}<|eot_id|>")
    expected = raw("user:", add_special_tokens=False)["input_ids"]
    assert own("a red boat")["input_ids"][1 : 1 + len(expected)] == expected


# What families' own chat templates do, in short, and the user turn without system prompt and assistant's header.
EACH = "{% for m in messages %}"
CHAT_TEMPLATES = {
    "phi-4": (
        EACH + "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        "<|im_start|>user<|im_sep|>{text}<|im_end|>",
    ),
    "phi-4-mini": (
        EACH + "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}",
        "<|user|>{text}<|end|>",
    ),
    "phi-3": (
        EACH + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|user|>\n{text}<|end|>",
    ),
    "qwen2": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        + EACH
        + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        "<|im_start|>user\n{text}<|im_end|>",
    ),
    "llama3": (
        EACH + "{{ bos_token if loop.first }}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}",
        "<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
    ),
    "gemma": (
        "{{ bos_token }}" + EACH + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}",
        "<start_of_turn>user\n{text}<end_of_turn>",
    ),
    "mistral": (
        "{{ bos_token }}" + EACH + "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}",
        "[INST]{text}[/INST]",
    ),
    "gpt-oss": (
        "<|start|>system<|message|>Hello.<|end|>" + EACH + "<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}",
        "<|start|>user<|message|>{text}<|end|>",
    ),
}


@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
def test_auto_is_the_user_turn_of_the_tokenizers_own_chat_template(name: str) -> None:
    tokens = sorted(
        {token for _, turn in CHAT_TEMPLATES.values() for token in re.findall(r"<[^<>]+>|\[/?INST\]", turn)}
    )
    raw = tiny_models.llama3_tokenizer()
    raw.add_special_tokens({"additional_special_tokens": [*tokens, "<|assistant|>", "<|return|>"]})
    raw.chat_template, turn = CHAT_TEMPLATES[name]
    found = apply_text_template(raw)("a red boat")["input_ids"]
    assert found == raw(turn.format(text="a red boat"))["input_ids"]


def test_folder_name_does_not_change_the_ids(tmp_path: Path) -> None:
    for name in ("Meta-Llama-3-8B-Instruct", "anything"):
        tiny_models.llama3_tokenizer().save_pretrained(tmp_path / name)
    ids = [
        apply_text_template(AutoTokenizer.from_pretrained(tmp_path / name))(CAPTIONS)["input_ids"]
        for name in ("Meta-Llama-3-8B-Instruct", "anything")
    ]
    assert ids[0] == ids[1]


def test_bad_templates_and_tokenizers() -> None:
    raw = tiny_models.llama3_tokenizer()
    with pytest.raises(ValueError, match=r"holds `\{text\}` once, got 'no slot'"):
        apply_text_template(raw, "no slot")
    with pytest.raises(ValueError, match="`max_length` is 6, but the template alone takes 6 tokens"):
        apply_text_template(raw, max_length=6)
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[U]": 1}, unk_token="[U]")))
    with pytest.raises(ValueError, match="neither a pad nor an end-of-sequence token"):
        apply_text_template(bare)
    with pytest.raises(ValueError, match="A tokenizer with a `tokenizers` backend is needed, got int"):
        text_prefix_length(3)


def word_processor() -> LLM2CLIPProcessor:
    """A tokenizer without any template: an empty text has no token."""
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "[U]": 2}, unk_token="[U]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    return LLM2CLIPProcessor(tiny_models.image_processor(), apply_text_template(fast))


def test_processor_equals_its_parts(tmp_path: Path) -> None:
    processor = tiny_models.processor()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 41, 3), dtype=np.uint8))
    batch = processor(images=[image], text=CAPTIONS, return_tensors="pt")
    pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], pixel_values)
    tokens = processor.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], tokens["input_ids"])
    assert torch.equal(batch["attention_mask"], tokens["attention_mask"])
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)(images=[image], text=CAPTIONS)
    assert loaded.keys() == batch.keys()
    for name, value in batch.items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "Neither `images` nor `text` is given"),
        ({"text": []}, "`text` is an empty list"),
        ({"images": []}, "`images` is an empty list"),
        ({"text": 3}, "`text` must be a string or a list of strings, got int"),
        ({"text": ["a", None]}, "Text 1 of `text` must be a string, got NoneType"),
        ({"text": ["a", ["b"]]}, "Text 1 of `text` must be a string, got list"),
        ({"text": ["a a", "  "]}, "Text 1 of `text` gives no token: '  '"),
        ({"text": ""}, "gives no token|Text 0"),
        ({"images": [torch.zeros(3, 40, 40), torch.full((3, 40, 40), float("nan"))]}, "Image 1 of `images` holds NaN"),
    ],
)
def test_bad_input_is_named(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        word_processor()(**call)


def test_empty_caption_is_its_end_of_turn_token() -> None:
    batch = tiny_models.processor()(text=["", "a red boat"])
    assert batch["attention_mask"].sum(1)[0] == 6
    model = tiny_models.model()
    embeds = model.get_llm_embeds(**batch)
    assert embeds.isfinite().all()
    outputs = model.text_model(batch["input_ids"][:1, :6]).last_hidden_state
    torch.testing.assert_close(embeds[0], outputs[0, 5], atol=1e-5, rtol=1e-5)


def test_the_options_of_a_call_are_not_saved(tmp_path: Path) -> None:
    processor = tiny_models.processor()
    text = "a red boat on the blue sea and a dog on the beach"
    expected = processor(text=text)["input_ids"]
    assert processor(text=text, max_length=9)["input_ids"].shape[-1] == 9
    processor.save_pretrained(tmp_path)
    assert LLM2CLIPProcessor.from_pretrained(tmp_path)(text=text)["input_ids"].equal(expected)


def test_processor_without_a_tokenizer_takes_images(tmp_path: Path) -> None:
    processor = LLM2CLIPProcessor(tiny_models.image_processor())
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 41, 3), dtype=np.uint8))
    wanted = tiny_models.image_processor()(image, return_tensors="pt")["pixel_values"]
    for each in (processor, AutoProcessor.from_pretrained(tmp_path), LLM2CLIPProcessor.from_pretrained(tmp_path)):
        assert isinstance(each, LLM2CLIPProcessor) and each.tokenizer is None
        assert each.model_input_names == ["pixel_values"]
        assert torch.equal(each(images=image)["pixel_values"], wanted)
        options = {"images_kwargs": {"do_normalize": False}, "text_kwargs": {"padding": True}}
        plain = tiny_models.image_processor()(image, do_normalize=False, return_tensors="pt")["pixel_values"]
        assert torch.equal(each(images=image, **options)["pixel_values"], plain)
        for call in ({"text": "a red boat"}, {"images": image, "text": ["a red boat"]}):
            with pytest.raises(
                ValueError, match="`text` is given, but this processor has no tokenizer.*--text-model LLM"
            ):
                each(**call)
    # Given one, it is a processor as any other, and is saved as such.
    processor.tokenizer = apply_text_template(tiny_models.llama3_tokenizer())
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded(text=CAPTIONS)["input_ids"].tolist() == tiny_models.processor()(text=CAPTIONS)["input_ids"].tolist()
