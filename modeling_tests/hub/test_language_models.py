# SPDX-License-Identifier: Apache-2.0
"""Conversion of caption-tuned LLMs, against the original protocol computed in plain torch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llm2clip_hf import LLM2CLIPModel, LLM2CLIPProcessor
from llm2clip_hf.cli import main as cli
from llm2clip_hf.hub import convert_checkpoint


CAPTIONS = ["a red boat", "Two dogs (one black) run over the green grass!", "ein gr\u00fcnes Boot\nauf dem Meer  "]
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
CONFIG: dict[str, Any] = {
    **tiny_models.TEXT["llama"],
    "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", **ROPE},
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    # As in the published ones: a class of another repository makes the decoder bidirectional.
    "auto_map": {"AutoModel": "some-org/mntp--modeling_llama_encoder.LlamaEncoderModel"},
    "architectures": ["LlamaEncoderModel"],
    "_name_or_path": "checkpoints/somewhere",
    "torch_dtype": "float32",
    "transformers_version": "4.40.2",
}


def llama_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    fields = {name: value for name, value in CONFIG.items() if name not in ("auto_map", "architectures", "model_type")}
    model = LlamaForCausalLM(LlamaConfig(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def save_llm(
    folder: Path, layout: str = "prefixed", dtype: torch.dtype = torch.float32, **config: Any
) -> dict[str, Any]:
    """A folder like the published ones; returns the decoder's weights by their plain names."""
    folder.mkdir()
    weights = {key: value.to(dtype) for key, value in llama_weights().items()}
    plain = {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}
    stored = dict(plain)
    if layout == "prefixed":
        stored = {f"model.{key}": value for key, value in plain.items()}
    elif layout == "with head":
        stored = {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    if layout == "pickled":
        torch.save(stored, folder / "pytorch_model.bin")
    elif layout == "sharded":
        for i in range(2):
            part = dict(list(stored.items())[i::2])
            save_file(part, folder / f"model-{i + 1:05d}-of-00002.safetensors", metadata={"format": "pt"})
    else:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    # The published tokenizers need not carry a chat template.
    tiny_models.llama3_tokenizer(instruct=False).save_pretrained(folder)
    return plain


def original_ids(caption: str) -> list[int]:
    text = f"<|start_header_id|>user<|end_header_id|>\n\n{caption.strip()}<|eot_id|>"
    return tiny_models.llama3_tokenizer()(text)["input_ids"]


def frequencies(head_dim: int) -> torch.Tensor:
    """Rotary frequencies of Llama 3.1 and later: low ones divided, high ones kept, those between mixed."""
    result = []
    for k in range(head_dim // 2):
        frequency = 500000.0 ** (-2 * k / head_dim)
        wavelength = 2 * torch.pi / frequency
        ratio = ROPE["original_max_position_embeddings"] / wavelength
        mix = (ratio - ROPE["low_freq_factor"]) / (ROPE["high_freq_factor"] - ROPE["low_freq_factor"])
        mix = min(max(mix, 0.0), 1.0)
        result.append((1 - mix) * frequency / ROPE["factor"] + mix * frequency)
    return torch.tensor(result, dtype=torch.float64)


def original_embeds(weights: dict[str, torch.Tensor], captions: list[str]) -> torch.Tensor:
    """The original protocol: padded left, all tokens see all, mean over the caption and the end-of-turn token."""
    w = {key: value.double() for key, value in weights.items()}
    rows = [original_ids(caption) for caption in captions]
    length = max(map(len, rows))
    tokenizer = tiny_models.llama3_tokenizer()
    ids = torch.tensor([[tokenizer.eos_token_id] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    heads, groups, head_dim = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], CONFIG["head_dim"]
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies(head_dim))
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    visible = torch.zeros(len(rows), 1, 1, length, dtype=torch.float64)
    visible.masked_fill_(mask[:, None, None] == 0, -torch.inf)

    def rms(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    def turn(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    x = w["embed_tokens.weight"][ids]
    for i in range(CONFIG["num_hidden_layers"]):
        layer, y = f"layers.{i}", rms(x, f"layers.{i}.input_layernorm.weight")
        q, k, v = (
            F.linear(y, w[f"{layer}.self_attn.{part}_proj.weight"]).unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for part in "qkv"
        )
        k, v = (z.repeat_interleave(heads // groups, 1) for z in (turn(k), v))
        mixed = ((turn(q) @ k.mT / head_dim**0.5 + visible).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, w[f"{layer}.self_attn.o_proj.weight"])
        y = rms(x, f"{layer}.post_attention_layernorm.weight")
        gate, up = (F.linear(y, w[f"{layer}.mlp.{part}_proj.weight"]) for part in ("gate", "up"))
        x = x + F.linear(F.silu(gate) * up, w[f"{layer}.mlp.down_proj.weight"])
    x = rms(x, "norm.weight")
    header = len(tiny_models.llama3_tokenizer()("<|start_header_id|>user<|end_header_id|>\n\n")["input_ids"])
    pooled = [x[i, length - len(row) + header :].mean(0) for i, row in enumerate(rows)]
    return torch.stack(pooled)


SLOW_LAYOUTS = [pytest.param(layout, marks=pytest.mark.slow) for layout in ("plain", "prefixed", "pickled")]


@pytest.mark.parametrize("layout", ["with head", "sharded", *SLOW_LAYOUTS])
def test_converted_llm_follows_the_original_protocol(layout: str, tmp_path: Path) -> None:
    training = pytest.importorskip("llm2clip_hf.training")
    weights = save_llm(tmp_path / "source", layout)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert report.kind == "caption-tuned LLM"
    assert len(report.dropped_keys) == {"with head": 2}.get(layout, 0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["is_causal"] is False and config["architectures"] == ["LlamaModel"] and "auto_map" not in config
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], value) for name, value in weights.items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [tokenizer(caption)["input_ids"] for caption in CAPTIONS] == [original_ids(c) for c in CAPTIONS]
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.model_max_length) == ("left", "<|eot_id|>", 512)
    wanted = original_embeds(weights, CAPTIONS)
    encoder = training.build_caption_encoder(str(tmp_path / "out"), lora=None)
    given = encoder.encode(CAPTIONS, convert_to_tensor=True).cpu().double()
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_converted_llm_is_the_text_side_of_a_model(tmp_path: Path) -> None:
    weights = save_llm(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "llm")
    tiny_models.model("dinov2").vision_model.save_pretrained(tmp_path / "vision")
    tiny_models.image_processor().save_pretrained(tmp_path / "vision")
    parts = (str(tmp_path / "vision"), str(tmp_path / "llm"))
    model, processor = (cls.from_vision_text_pretrained(*parts) for cls in (LLM2CLIPModel, LLM2CLIPProcessor))
    given = model.get_llm_embeds(**processor(text=CAPTIONS)).double()
    torch.testing.assert_close(given, original_embeds(weights, CAPTIONS), atol=1e-5, rtol=1e-5)
    # Its folder says how it is pooled, so it may be attached to a model that was built without it.
    later = tiny_models.model(text=None)
    later.attach_text_model(AutoModel.from_pretrained(tmp_path / "llm"))
    torch.testing.assert_close(later.get_llm_embeds(**processor(text=CAPTIONS)).double(), given)


LOADER = """
import sys
sys.modules["llm2clip_hf"] = None
from transformers import AutoModel, AutoTokenizer
from safetensors.torch import save_file
model, tokenizer = AutoModel.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
batch = tokenizer(["a red boat", "two dogs run over the grass"], padding=True, return_tensors="pt")
save_file({"states": model(**batch).last_hidden_state.detach().contiguous()}, sys.argv[2])
"""


@pytest.mark.slow
def test_converted_llm_loads_without_the_package(tmp_path: Path) -> None:
    weights = save_llm(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    target = str(tmp_path / "states.safetensors")
    command = [sys.executable, "-c", LOADER, str(tmp_path / "out"), target]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = original_embeds(weights, ["a red boat", "two dogs run over the grass"])
    states, header = load_file(target)["states"], 5
    for row, caption in enumerate(["a red boat", "two dogs run over the grass"]):
        own = states[row, states.shape[1] - len(original_ids(caption)) + header :].mean(0).double()
        torch.testing.assert_close(own, wanted[row], atol=1e-5, rtol=1e-5)


def test_dtype_is_kept_and_conversion_repeats(tmp_path: Path) -> None:
    weights = save_llm(tmp_path / "source", dtype=torch.bfloat16)
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in weights.items())
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    # A converted folder converts to itself.
    convert_checkpoint(tmp_path / "out", tmp_path / "again")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == before[name]


def test_model_type_of_a_repository_class_is_read_as_llama(tmp_path: Path) -> None:
    weights = save_llm(tmp_path / "source", model_type="llama_encoder")
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type == "llama"
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == weights.keys()


def change_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


BAD = {
    "missing": (
        lambda f: change_weights(f, lambda w: w.pop("model.norm.weight")),
        "1 missing: norm.weight",
    ),
    "unexpected": (
        lambda f: change_weights(f, lambda w: w.update({"model.other": torch.ones(2)})),
        "1 unexpected: model.other",
    ),
    "shape": (
        lambda f: change_weights(f, lambda w: w.update({"model.norm.weight": torch.ones(3)})),
        "1 of another shape: norm.weight",
    ),
    "LoRA": (
        lambda f: change_weights(f, lambda w: w.update({"model.layers.0.q_proj.lora_A.weight": torch.ones(2)})),
        "LoRA weights that are not merged",
    ),
    "twice": (
        lambda f: change_weights(f, lambda w: w.update({"norm.weight": w["model.norm.weight"].clone()})),
        "holds `norm.weight` twice",
    ),
    "NaN": (
        lambda f: change_weights(f, lambda w: w["model.norm.weight"].fill_(torch.nan)),
        "`norm.weight` holds NaN",
    ),
    "integers": (
        lambda f: change_weights(f, lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
        "must be floating-point, got torch.int8",
    ),
    "no tokenizer": (without_tokenizer, "has no tokenizer that can be read"),
    "unknown type": (
        lambda f: (f / "config.json").write_text(json.dumps({**CONFIG, "model_type": "nothing"})),
        "is of type 'nothing', which this version of transformers does not know",
    ),
    "causal type": (
        lambda f: (f / "config.json").write_text(json.dumps({**CONFIG, "model_type": "gpt2"})),
        "do not make up the decoder|causal|gpt2",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_llm_folders_leave_nothing(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_llm(tmp_path / "source")
    make, message = BAD[case]
    make(tmp_path / "source")
    capfd.readouterr()
    assert cli.main(["convert", str(tmp_path / "source"), str(tmp_path / "out")]) == 1
    error = capfd.readouterr().err
    assert error.startswith("llm2clip convert: ValueError: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_llm_takes_no_llm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_llm(tmp_path / "source")
    with pytest.raises(ValueError, match="is an LLM itself"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", text_model="other")
    assert cli.main(["convert", str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "found     caption-tuned LLM" in text and "LLM       llama, 2 layers of width 32" in text
