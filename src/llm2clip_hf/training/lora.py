# SPDX-License-Identifier: Apache-2.0
"""
LoRA on a tower of the model, in such a way that what is saved is a plain model.

(1) `attach_lora` puts PEFT layers into a tower and freezes the rest of it.
(2) `merged_state` is the state dict of the model with the adapters merged, under the names of the plain model.
(3) `lora_state` are the adapters alone; with them, and the tower that training began with, a run resumes exactly,
    which it would not from rounded, merged weights.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from .adapters import add_lora, has_adapters, tuner_layers


__all__ = ["attach_lora", "lora_layers", "lora_state", "merge_lora", "merged_state"]

LORA_FILE = "lora.safetensors"


def attach_lora(part: Any, config: LoraConfig) -> None:
    """
    Adds trainable LoRA layers to a tower and freezes everything else of it.

    Args:
        part (`PreTrainedModel`): The tower; adapters that it has already are kept.
        config (`LoraConfig`): Rank, scale and target modules.

    Raises:
        ValueError: if no layer matches, or the adapters could not be merged into the weights.
    """
    for name, plain in (("use_dora", False), ("lora_bias", False), ("bias", "none")):
        value = getattr(config, name, plain)
        if value != plain:
            raise ValueError(f"LoRA with `{name}={value!r}` cannot be merged into plain weights. Leave `{name}` out.")
    if not has_adapters(part):
        add_lora(part, config)
    lora_layers(part)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """
    The LoRA layers of a model by name.

    Raises:
        ValueError: if an adapter layer is not a LoRA of a plain linear layer, for example of a quantised one.
    """
    layers: dict[str, LoraLinear] = {}
    for name, layer in tuner_layers(model).items():
        if not isinstance(layer, LoraLinear) or type(layer.get_base_layer()).__name__ not in _LINEAR:
            raise ValueError(
                f"`{name}` is a {type(layer).__name__} on a {type(layer.get_base_layer()).__name__}, which cannot be "
                "merged into plain weights. Use LoRA on linear layers of a model that is not quantised."
            )
        layers[name] = layer
    return layers


# `Eva02VisionOutputLinear` differs from `nn.Linear` in its initialisation only.
_LINEAR = ("Linear", "NonDynamicallyQuantizableLinear", "Eva02VisionOutputLinear", "LLM2CLIPAdapterLinear")


def merged_state(model: nn.Module, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """
    The state dict of a model with its adapters merged: `weight + scaling * B @ A`, computed in float32.

    Args:
        model (`nn.Module`): A model with or without LoRA layers; it is not changed.
        state (mapping, *optional*): Its state dict, where that takes a gather over processes; else `state_dict()`.

    Returns:
        `dict[str, torch.Tensor]`: Tensors under the names that the model has without adapters.
    """
    state = model.state_dict() if state is None else state
    layers = lora_layers(model)
    merged = {}
    for key, tensor in state.items():
        owner, base, leaf = key.partition(".base_layer.")
        if base and owner in layers:
            merged[f"{owner}.{leaf}"] = _add_delta(owner, layers[owner], tensor, state) if leaf == "weight" else tensor
        elif not _is_lora_key(key, layers):
            merged[key] = tensor
    return merged


def lora_state(model: nn.Module, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The adapter weights of a model alone, by their names in its state dict; arguments as of `merged_state`."""
    state = model.state_dict() if state is None else state
    layers = lora_layers(model)
    return {key: tensor for key, tensor in state.items() if _is_lora_key(key, layers)}


def merge_lora(model: nn.Module) -> None:
    """
    Merges the adapters of a model into its weights for good; it is a plain model afterwards.

    Args:
        model (`nn.Module`): A model whose towers may carry LoRA; it is changed.
    """
    layers = lora_layers(model)
    merged = merged_state(model)
    for name, layer in layers.items():
        base: Any = layer.get_base_layer()
        base.weight.data = merged[f"{name}.weight"]
        model.set_submodule(name, base)
    for module in model.modules():
        if getattr(module, "_hf_peft_config_loaded", False):
            module._hf_peft_config_loaded = False  # type: ignore[assignment]
            # `load_adapter` leaves those of the adapters' names, which saving would apply to all weights.
            vars(module).pop("_weight_conversions", None)
            if hasattr(module, "peft_config"):
                del module.peft_config


def _is_lora_key(key: str, layers: Mapping[str, Any]) -> bool:
    owner, found, _ = key.partition(".lora_")
    return bool(found) and owner in layers


def _add_delta(name: str, layer: LoraLinear, weight: torch.Tensor, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    total = weight.float()
    for adapter in layer.active_adapters:
        down, up = (state[f"{name}.lora_{side}.{adapter}.weight"].float() for side in "AB")
        total = total + layer.scaling[adapter] * (up @ down).to(total.device)
    return total.to(weight.dtype)
