# SPDX-License-Identifier: Apache-2.0
"""A caption LLM in 4 or 8 bits under trainable LoRA (QLoRA, arXiv 2305.14314)."""

import importlib.util
import json
from typing import Any

import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin


def quantized_model_kwargs(quantization: str | QuantizationConfigMixin | None) -> dict[str, Any]:
    """
    Arguments of `from_pretrained` that load an LLM quantised, on the GPU of this process.

    Args:
        quantization: `"4bit"` (NF4, double quantisation, bf16 arithmetic), `"8bit"` (LLM.int8), a quantisation config
            of transformers, or `None` for none.

    Returns:
        `dict`: empty for `None`.

    Raises:
        ValueError: for another value.
        ImportError: if bitsandbytes is needed and not installed.
        RuntimeError: if there is no GPU for it.
    """
    if quantization is None:
        return {}
    if isinstance(quantization, QuantizationConfigMixin):
        if not isinstance(quantization, BitsAndBytesConfig):
            # Other methods have other needs, which transformers checks; some run on a CPU.
            return {"quantization_config": quantization}
        config = quantization
    elif quantization == "4bit":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    elif quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        raise ValueError(
            f"`quantization` must be None, '4bit', '8bit' or a quantisation config of transformers, got "
            f"{quantization!r}."
        )
    if not _has_bitsandbytes():
        raise ImportError(
            "`quantization` needs `bitsandbytes`, which is not installed. Install it with `pip install bitsandbytes`, "
            "or leave `quantization` out."
        )
    if not _has_gpu():
        raise RuntimeError("`quantization` with bitsandbytes needs a GPU, and torch finds none. Leave it out.")
    # The process's own GPU under a launcher; bf16 for what stays unquantised, so that LoRA alone is float32.
    return {"quantization_config": config, "device_map": {"": PartialState().device}, "dtype": torch.bfloat16}


def quantization_label(llm: Any) -> str | None:
    """The quantisation of a loaded LLM as one line of JSON, `None` for one that is not quantised."""
    config = getattr(getattr(llm, "config", None), "quantization_config", None)
    if config is None or not getattr(llm, "is_quantized", False):
        return None
    fields = config if isinstance(config, dict) else config.to_dict()
    return json.dumps(fields, sort_keys=True, default=str)


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _has_gpu() -> bool:
    return torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
