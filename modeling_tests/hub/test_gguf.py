# SPDX-License-Identifier: Apache-2.0
"""Conversion of gguf files, against the arrays that they were written from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llm2clip_hf.cli import main as cli
from llm2clip_hf.hub import convert_checkpoint


gguf = pytest.importorskip("gguf")

WIDTH, HEADS, KEYS, INNER, LAYERS = 16, 4, 2, 32, 2
TOKENS = [*bytes_to_unicode().values(), "ab", "<|end|>"]
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk.1.attn_v": "model.layers.1.self_attn.v_proj",
    "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
    "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
    "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
}


def write_gguf(
    path: Path, architecture: str = "llama", without: tuple[str, ...] = (), **changed: np.ndarray
) -> dict[str, np.ndarray]:
    """A tiny decoder in float32, with a byte-level tokenizer; the arrays in it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    if "tokenizer" not in without:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(len(TOKENS) - 1)
        writer.add_eos_token_id(len(TOKENS) - 1)
    narrow = WIDTH * KEYS // HEADS
    block = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (narrow, WIDTH)}
    block |= {"attn_v": (narrow, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH)}
    block |= {"ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
    shapes: dict[str, Any] = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in block.items()}
    generator = np.random.default_rng(0)
    arrays = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays |= changed
    for name in arrays.keys() - set(without):
        writer.add_tensor(f"{name}.weight", arrays[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


def test_weights_and_tokens_are_those_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "tiny.gguf", tmp_path / "llm"
    arrays = write_gguf(file)
    assert cli.main(["convert", str(file), str(folder)]) == 0
    assert "llama, 2 layers of width 16" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings
    weights = model.state_dict()
    for name, ours in NAMES.items():
        assert np.array_equal(weights[f"{ours}.weight"].numpy(), arrays[name]), name
    # A gguf interleaves the rotated halves of queries and keys; transformers has them one after the other.
    query = weights["model.layers.1.self_attn.q_proj.weight"].numpy().reshape(HEADS, 2, WIDTH // HEADS // 2, WIDTH)
    assert np.array_equal(query.swapaxes(1, 2).reshape(WIDTH, WIDTH), arrays["blk.1.attn_q"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab c")["input_ids"]) == ["ab", "\u0120", "c"]
    assert tokenizer.eos_token == "<|end|>"
    # A folder that a conversion wrote is replaced, and any other is not.
    convert_checkpoint(file, folder)
    with pytest.raises(ValueError, match="LLM itself"):
        convert_checkpoint(file, tmp_path / "other", text_model="llm")


@pytest.mark.parametrize(
    ("architecture", "without", "length", "message"),
    [
        ("bert", (), None, r"architecture bert is not supported"),
        ("t5encoder", (), None, r"holds a `t5`, not a decoder LLM"),
        ("unheard-of", (), None, r"architecture unheard-of is not supported"),
        ("llama", ("tokenizer",), None, r"holds no tokenizer"),
        ("llama", ("blk.1.attn_q", "output_norm"), None, r"2 missing: model\.layers\.1\.self_attn\.q_proj\.weight"),
        ("llama", (), 0.7, r"no whole gguf file"),
        ("llama", (), 0.02, r"no whole gguf file"),
        ("llama", (), 0.0, r"no whole gguf file"),
    ],
)
def test_what_is_no_decoder_is_refused_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    architecture: str,
    without: tuple[str, ...],
    length: float | None,
    message: str,
) -> None:
    file = tmp_path / "bad.gguf"
    write_gguf(file, architecture, without)
    if length is not None:
        content = file.read_bytes()
        file.write_bytes(content[: int(length * len(content))])
    with pytest.raises(ValueError, match=message) as error:
        convert_checkpoint(file, tmp_path / "llm")
    assert "bad.gguf" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "llm").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "nan.gguf", output_norm=np.full(WIDTH, np.nan, np.float32))
    with pytest.raises(ValueError, match=r"`model\.norm\.weight` holds NaN"):
        convert_checkpoint(tmp_path / "nan.gguf", tmp_path / "llm")
