# SPDX-License-Identifier: Apache-2.0
"""What would let a run end in nothing, found before its first step."""

from typing import Any

from torch import nn


def check_float32_weights(model: nn.Module, learning_rate: float, remedy: str) -> None:
    """
    Checks that no trained weight is in half precision, in which updates of the size of a learning rate are rounded
    away; frozen weights may be.

    Args:
        model (`nn.Module`): The model.
        learning_rate (`float`): That of the run, for the message.
        remedy (`str`): What to do about it, for the message.

    Raises:
        ValueError: naming the first such weight.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    half = [(name, p.dtype) for name, p in trained if p.is_floating_point() and p.dtype.itemsize < 4]
    if half:
        name, dtype = half[0]
        raise ValueError(
            f"{len(half)} trained parameters are in half precision, first `{name}` in {dtype}; at a learning rate of "
            f"{learning_rate:g} their updates would be rounded away. {remedy}; `bf16=True` computes in bfloat16 all "
            "the same."
        )


def check_whole_weights(trainer: Any) -> None:
    """
    Checks that every process holds all weights, which merging LoRA, evaluators and the recomputation of mini-batches
    take for granted.

    Args:
        trainer (`Trainer`): The trainer, after its initialisation.

    Raises:
        ValueError: under FSDP and under stage 3 of DeepSpeed.
    """
    deepspeed = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled:
        found = "FSDP"
    elif deepspeed is not None and deepspeed.zero_stage == 3:
        found = "stage 3 of DeepSpeed"
    else:
        return
    raise ValueError(
        f"{found} spreads the weights of the LLM over processes, and {type(trainer).__name__} could not save them. "
        "Start it with DistributedDataParallel: `accelerate launch --multi_gpu`, or a configuration without FSDP. An "
        "LLM that is too large for one GPU is trained with LoRA on `quantization='4bit'` (see "
        "`build_caption_encoder`)."
    )
