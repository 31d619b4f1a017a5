# SPDX-License-Identifier: Apache-2.0
"""What a run will need, told from configs alone: no weight is loaded."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModel


_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.55}


def describe_llm(
    name_or_path: str, *, lora_rank: int | None, dtype: str | None = None, quantization: str | None = None
) -> str:
    """
    Size of an LLM, of its LoRA adapters on all linear layers, and the memory of both with AdamW.

    Args:
        name_or_path (`str`): Folder or repository of the LLM.
        lora_rank (`int` or `None`): Rank of LoRA; 0 for training all weights, `None` for a frozen LLM.
        dtype (`str`, *optional*): Type of the weights; that of the checkpoint by default.
        quantization (`str`, *optional*): `"4bit"` or `"8bit"`.

    Returns:
        `str`: One line. Activations come on top; they grow with the tokens of a forward pass.
    """
    config = AutoConfig.from_pretrained(name_or_path)
    config = config.get_text_config()
    with torch.device("meta"):
        llm = AutoModel.from_config(config)
    total = sum(parameter.numel() for parameter in llm.parameters())
    trained = total if lora_rank == 0 else 0
    if lora_rank:
        linear = [module for module in llm.modules() if isinstance(module, torch.nn.Linear)]
        trained = sum(lora_rank * (module.in_features + module.out_features) for module in linear)
    weights = quantization or dtype or _name(config.dtype)
    # Weight, gradient and AdamW's two moments in float32 for each trained number.
    memory = total * _BYTES[weights] + 16 * trained
    return (
        f"LLM       {type(llm).__name__}, {total / 1e6:,.1f} M parameters in {weights}, {trained / 1e6:,.1f} M "
        f"trained, about {memory / 2**30:,.1f} GiB without activations"
    )


def _name(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if name in _BYTES else "float32"
