# SPDX-License-Identifier: Apache-2.0
"""LoRA on the LLM: add it, load its weights, merge it."""

import copy
import logging
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


logger = logging.getLogger(__name__)

# What layers of experts, dense or shared ones beside them, and routers are called; PEFT takes some of these names for
# the experts themselves, whatever they are in the LLM.
_EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "router"} | {
    "shared_expert_gate"
}


def lora_config(lora: LoraConfig | Mapping[str, Any]) -> LoraConfig:
    """
    A LoRA config: the paper's recipe, rank 16 and alpha 32 (section 4.1), with dropout 0.05 on all linear layers
    (released code), and other values for the fields that a mapping names; a `LoraConfig` is copied as it is.

    PEFT has no dropout for `target_parameters`, the experts of a mixture, so there is none where a mapping names them.
    """
    if isinstance(lora, LoraConfig):
        return copy.deepcopy(lora)
    fields: dict[str, Any] = {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0 if lora.get("target_parameters") else 0.05,
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

    In a mixture of experts, "all-linear" are the layers outside of experts and routers (the attention), and what is
    trained is logged; experts are trained where `target_parameters` names them.

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
    if config.target_parameters and config.lora_dropout:
        raise ValueError(f"`lora_dropout` is {config.lora_dropout}, and `target_parameters` take none. Set it to 0.")
    _check_targets(llm, config)
    experts = expert_parameters(llm)
    if experts:
        _target_beside_experts(llm, config)
    llm.add_adapter(config)
    for parameter in llm.parameters():
        if parameter.requires_grad:
            # In bfloat16 an update of a few 1e-4 of the weight is rounded away.
            parameter.data = parameter.data.float()
    if experts and llm.device.type != "meta":
        logger.warning("%s is a mixture of experts: LoRA is %s.", type(llm).__name__, describe_lora(llm))


def expert_parameters(llm: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the experts of a mixture by name, each those of all experts of a layer: three dimensions."""
    return {
        f"{name}.{leaf}": p
        for name, module in llm.named_modules()
        if not isinstance(module, nn.Conv1d)
        for leaf, p in module.named_parameters(recurse=False)
        if p.ndim == 3
    }


def _expert_paths(llm: nn.Module) -> list[str]:
    """The names of `expert_parameters` within a layer."""
    return sorted({re.sub(r"^.*\.\d+\.", "", name) for name in expert_parameters(llm)})


def describe_lora(llm: PreTrainedModel) -> str:
    """What LoRA trains in an LLM and, of a mixture of experts, what it leaves out; without a full stop."""
    layers = tuner_layers(llm)
    trained = sum(p.numel() for p in llm.parameters() if p.requires_grad)
    text = f"on {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}, {trained / 1e6:,.2f} M parameters"
    experts = {name.replace(".base_layer", ""): p.numel() for name, p in expert_parameters(llm).items()}
    frozen = sum(count for name, count in experts.items() if name.rpartition(".")[0] not in layers)
    if frozen:
        text += f"; experts ({frozen / 1e6:,.2f} M parameters), routers and layers named like them stay as they are"
    return text


def _target_beside_experts(llm: PreTrainedModel, config: LoraConfig) -> None:
    """
    Names the layers of a mixture of experts that LoRA is for in full.

    PEFT reads `all-linear`, patterns and some names (`down_proj`, ...) as those of experts, in some architectures.
    """
    head: Any = llm.get_output_embeddings()
    names = {name for name, module in llm.named_modules() if isinstance(module, nn.Linear) and module is not head}
    targets: Any = config.target_modules or ()
    if targets == "all-linear":
        config.target_modules = sorted(name for name in names if name.rpartition(".")[2] not in _EXPERT_NAMES)
        return
    if isinstance(targets, str):
        chosen = {name for name, _ in llm.named_modules() if re.fullmatch(targets, name)}
    else:
        chosen = {name for name, _ in llm.named_modules() if any(f".{name}".endswith(f".{t}") for t in targets)}
    refused = sorted({name.rpartition(".")[2] for name in chosen} & _EXPERT_NAMES)
    if refused:
        open_to = sorted({name.rpartition(".")[2] for name in names} - _EXPERT_NAMES)
        raise ValueError(
            f"`lora.target_modules` names {', '.join(map(repr, refused))}, which PEFT takes for the experts of "
            f"{type(llm).__name__}. Name layers among {', '.join(open_to)}; train experts with "
            f"`lora={{'target_parameters': {_expert_paths(llm)}}}`."
        )
    config.target_modules = sorted(chosen)


def _check_targets(llm: PreTrainedModel, config: LoraConfig) -> None:
    """Names the target that no layer has; PEFT speaks up only when all of them miss."""
    parameters = [name for name, _ in llm.named_parameters()]
    if absent := [t for t in config.target_parameters or () if not any(f".{n}".endswith(f".{t}") for n in parameters)]:
        raise ValueError(
            f"`lora.target_parameters` names {', '.join(map(repr, absent))}, which no parameter of "
            f"{type(llm).__name__} is called. Its experts are {_expert_paths(llm)}."
        )
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
    """The PEFT layers of a model by name; of several around one module, as for the experts of a mixture, the outer."""
    layers: dict[str, BaseTunerLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and name.removesuffix(".base_layer") not in layers:
            layers[name] = module
    return layers


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
        single: Any = copy.deepcopy(layer)
        for part in tuple(single.modules()):
            if isinstance(part, BaseTunerLayer):
                part.merge(safe_merge=True)
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
