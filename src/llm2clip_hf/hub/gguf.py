# SPDX-License-Identifier: Apache-2.0
"""
Decoder LLMs in gguf files, through transformers, to plain folders that stage 1 starts from.

What transformers would let pass is refused: it draws absent tensors at random, and reads models that are no decoder.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from ..files import temporary_folder
from .cards import conversion_card
from .checkpoint_files import check_keys, check_values, one_line
from .text_keys import quiet_transformers


GGUF_KIND = "decoder LLM in a gguf file"


def convert_gguf(source: Path, output: Path) -> tuple[PreTrainedConfig, float]:
    """Writes model, tokenizer and card; the config, and the largest difference of a weight after reloading."""
    with quiet_transformers():
        model, tokenizer = _read(source)
        written = model.state_dict()
        check_values(str(source), written)
        with temporary_folder(output) as folder:
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
            (folder / "README.md").write_text(conversion_card(str(source), GGUF_KIND), encoding="utf-8")
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
            difference = max(float((value - loaded[name]).abs().max()) for name, value in written.items())
    return model.config, difference


def _read(source: Path) -> tuple[Any, Any]:
    """The causal language model in float32, and its tokenizer."""
    name = str(source)
    _check_header(source)
    try:
        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
        is_decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder
    except ValueError as error:
        raise ValueError(f"{name!r} is no LLM that transformers reads: {one_line(error)}") from error
    if not is_decoder:
        raise ValueError(f"{name!r} holds a `{config.model_type}`, not a decoder LLM. Give one, for example a Llama.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers and gguf raise what reading happened to raise
        raise ValueError(f"{name!r} cannot be read as a `{config.model_type}`: {one_line(error)}") from error
    model, info = loaded
    check_keys(name, f"a `{config.model_type}`", most=4, missing=info["missing_keys"])
    # The weights are plain now; what is left of the gguf would keep them from being saved.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model, tokenizer


def _check_header(source: Path) -> None:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("A gguf file is read by `gguf`, which is not installed: `pip install gguf`.") from error
    try:
        has_tokenizer = GGUFReader(source).get_field("tokenizer.ggml.tokens") is not None
    except Exception as error:  # a truncated file is told by an index, a shape or a number
        raise ValueError(f"{str(source)!r} is no whole gguf file: {one_line(error)}. Fetch it again.") from error
    if not has_tokenizer:
        raise ValueError(f"{str(source)!r} holds no tokenizer (`tokenizer.ggml.tokens`). Give a gguf that does.")


__all__ = ["GGUF_KIND", "convert_gguf"]
