# SPDX-License-Identifier: Apache-2.0
"""LoRA on the LLM: add it, load its weights, merge it."""

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel


def lora_config(lora: LoraConfig | Mapping[str, Any]) -> LoraConfig:
    """
    A LoRA config: the paper's recipe, rank 16 and alpha 32 (section 4.1), with dropout 0.05 on all linear layers
    (released code), and other values for the fields that a mapping names; a `LoraConfig` is copied as it is.
    """
    if isinstance(lora, LoraConfig):
        return copy.deepcopy(lora)
    fields: dict[str, Any] = {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
        "bias": "none",
        "task_type": TaskType.FEATURE_EXTRACTION,
    }
    try:
        return LoraConfig(**{**fields, **lora})
    except TypeError as error:
        raise ValueError(f"`lora` is {dict(lora)!r}, but {error}. Name fields of `peft.LoraConfig`.") from error


def has_adapters(model: nn.Module | None) -> bool:
    """Whether a model contains adapter layers of PEFT."""
    return model is not None and bool(tuner_layers(model))


def add_lora(llm: PreTrainedModel, config: LoraConfig) -> None:
    """
    Puts LoRA layers into a model and freezes everything else.

    Args:
        llm (`PreTrainedModel`): The LLM, changed in place; its weights may be quantised.
        config (`LoraConfig`): Ranks and targets.

    Raises:
        ValueError: if a target names no layer of the LLM, or `modules_to_save` asks for what cannot be merged.
    """
    if config.modules_to_save:
        raise ValueError(
            f"`lora.modules_to_save` is {config.modules_to_save!r}, but an encoder is saved with its adapters merged, "
            "which keeps LoRA only. Leave it out, or train all weights with `lora=None`."
        )
    _check_targets(llm, config)
    llm.add_adapter(config)
    for parameter in llm.parameters():
        if parameter.requires_grad:
            # In bfloat16 an update of a few 1e-4 of the weight is rounded away.
            parameter.data = parameter.data.float()


def _check_targets(llm: PreTrainedModel, config: LoraConfig) -> None:
    """Names the target that no layer has; PEFT speaks up only when all of them miss."""
    targets = config.target_modules
    if not targets or targets == "all-linear":
        return
    names = [name for name, module in llm.named_modules() if any(True for _ in module.parameters(recurse=False))]
    if isinstance(targets, str):
        missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        missing = [t for t in sorted(targets) if not any(n == t or n.endswith(f".{t}") for n in names)]
    if missing:
        layers = sorted({n.rpartition(".")[2] for n in names if getattr(llm.get_submodule(n), "in_features", None)})
        raise ValueError(
            f"`lora.target_modules` names {', '.join(map(repr, missing))}, which no layer of {type(llm).__name__} is "
            f"called. Its linear layers are {', '.join(layers)}; 'all-linear' takes all of them."
        )


def load_adapter_weights(llm: PreTrainedModel, file: Path) -> None:
    """
    Loads adapter weights into the adapters that a model has.

    Args:
        llm (`PreTrainedModel`): A model with adapters.
        file (`Path`): Safetensors file as PEFT writes it.

    Raises:
        ValueError: if names or shapes of the file are not those of the adapters.
    """
    name = llm.active_adapters()[0]
    own: Mapping[str, torch.Tensor] = get_peft_model_state_dict(llm, adapter_name=name)
    # transformers and PEFT write the names of a wrapped model.
    state = {key.removeprefix("base_model.model."): value for key, value in load_file(file).items()}
    wrong: Iterable[str] = sorted(own.keys() ^ state.keys()) or sorted(
        f"{key} of shape {tuple(value.shape)}, not {tuple(own[key].shape)}"
        for key, value in state.items()
        if value.shape != own[key].shape
    )
    for first in wrong:
        raise ValueError(
            f"The adapter `{file}` does not fit {type(llm).__name__}: {first}. Load it on the LLM, and with the LoRA "
            "configuration, that it was trained on."
        )
    set_peft_model_state_dict(llm, state, name)


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The PEFT layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def base_state(llm: PreTrainedModel) -> dict[str, torch.Tensor]:
    """State dict of the LLM as if it had no adapters, by the names that it has without them."""
    layers = tuner_layers(llm)
    state = {
        name: tensor
        for name, tensor in llm.state_dict().items()
        if not any(name.startswith(f"{layer}.") for layer in layers)
    }
    for name, layer in layers.items():
        base = layer.get_base_layer().state_dict()
        state.update({f"{name}.{key}": tensor for key, tensor in base.items()})
    return state


def merged_llm(llm: PreTrainedModel) -> PreTrainedModel:
    """
    The LLM with its adapters merged into the weights.

    Args:
        llm (`PreTrainedModel`): An LLM with or without PEFT layers; it is not changed.

    Returns:
        `PreTrainedModel`: `llm` itself if it has no adapters, else a new model on the CPU. The adapters are merged
        layer by layer, which takes the memory of one more copy of the LLM, not two.
    """
    layers = tuner_layers(llm)
    if not layers:
        return llm
    state = {
        name: tensor.detach().cpu()
        for name, tensor in llm.state_dict().items()
        if not any(name.startswith(f"{layer}.") for layer in layers)
    }
    for name, layer in layers.items():
        single = copy.deepcopy(layer)
        single.merge(safe_merge=True)
        base = single.get_base_layer().state_dict()
        state.update({f"{name}.{key}": tensor.detach().cpu() for key, tensor in base.items()})
    with torch.device("meta"):
        merged = type(llm)._from_config(copy.deepcopy(llm.config), dtype=llm.dtype)
    merged.load_state_dict(state, strict=True, assign=True)
    for name, buffer in llm.named_buffers():  # those that are not in a state dict, such as rotary frequencies
        if any(name.startswith(f"{layer}.") for layer in layers):
            continue
        owner, _, leaf = name.rpartition(".")
        merged.get_submodule(owner).register_buffer(leaf, buffer.detach().cpu(), persistent=name in state)
    merged.tie_weights()
    return merged.eval()
