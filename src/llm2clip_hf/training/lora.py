# SPDX-License-Identifier: Apache-2.0
"""
LoRA on a tower of the model, in such a way that what is saved is a plain model.

(1) `attach_lora` puts PEFT layers into a tower and freezes the rest of it.
(2) `merged_state` is the state dict of the model with the adapters merged, under the names of the plain model.
(3) `lora_state` are the adapters alone; with them, and the tower that training began with, a run resumes exactly,
    which it would not from rounded, merged weights.
"""

import copy
import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ..modeling.loading_llm2clip import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ENCODER_SETTINGS, find_file, merge_adapters
from ..modeling.text_llm2clip import check_adapter_base, is_quantized, weights_digest


logger = logging.getLogger(__name__)
# Where a checkpoint keeps adapters: beside a tokenizer or config, `AutoModel` would load the causal LLM with them.
ADAPTER_FOLDER = "adapter"
# Weights that would be loaded in place of, or with, those that are written into a folder next.
REPLACED_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ENCODER_SETTINGS,
)
# How PEFT and transformers name the weights of a wrapped model in a file.
_PREFIX = "base_model.model."
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


# ------------------------------------------------------------------------------------------------------ saved adapters


def stored_lora(name_or_path: str, revision: str | None = None) -> LoraConfig:
    """The config of saved adapters, to train them on."""
    file: Any = find_file(name_or_path, ADAPTER_CONFIG, {"revision": revision})
    config = LoraConfig.from_pretrained(str(file.parent))
    config.inference_mode = False
    return config


def check_stored_lora(
    name_or_path: str, settings: Mapping[str, Any], lora: Any, bidirectional: bool = True, revision: str | None = None
) -> None:
    """Refuses arguments of `build_caption_encoder` that ask for other adapters than the saved ones."""
    own = stored_lora(name_or_path, revision)
    given = dict(lora) if isinstance(lora, Mapping) else {}
    others = {name: value for name, value in given.items() if value != getattr(own, name, None)}
    if others or isinstance(lora, LoraConfig):
        raise ValueError(
            f"`{name_or_path}` has adapters of its own, and `lora` asks for {others or 'a config'}. Pass "
            "`lora='default'` (no `--lora_...` option) to train them on, or `lora=None` to merge them, to save a "
            "whole LLM that new ones are trained on."
        )
    if not bidirectional and not settings["is_causal"]:
        raise ValueError(f"The adapters in `{name_or_path}` were trained bidirectionally. Leave `bidirectional` out.")


def attach_stored_lora(
    llm: PreTrainedModel, name_or_path: str, settings: dict[str, Any], revision: str | None = None
) -> None:
    """Puts saved adapters into their LLM, trainable."""
    check_adapter_base(llm, settings, name_or_path)
    add_lora(llm, stored_lora(name_or_path, revision))
    file: Any = find_file(name_or_path, ADAPTER_WEIGHTS, {"revision": revision})
    load_adapter_weights(llm, load_file(file), file)


def write_adapter(folder: Path, llm: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Writes adapters, their PEFT config and the settings of the encoder, with digests of the LLM they belong to."""
    if not has_adapters(llm):
        raise ValueError("The encoder has no adapters to save. Save all of it with `save_pretrained`.")
    name = llm.active_adapters()[0]
    state = get_peft_model_state_dict(llm, adapter_name=name)
    state = {f"{_PREFIX}{key}": value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config: Any = llm.peft_config[name]
    config.base_model_name_or_path, config.revision = settings["base_model"], settings["base_revision"]
    config.save_pretrained(str(folder))
    embeddings: Any = llm.get_input_embeddings()
    if isinstance(embeddings, BaseTunerLayer):
        embeddings = embeddings.get_base_layer()
    base = {
        "hidden_size": llm.config.hidden_size,
        "base_dtype": str(llm.dtype),
        "base_sha256": None if is_quantized(llm) else weights_digest(base_state(llm)),
        # Not quantised, so they tell the base of a quantised LLM as well as they can.
        "base_embeddings_sha256": weights_digest({"weight": embeddings.weight}),
    }
    content = json.dumps({**settings, **base}, indent=2) + "\n"
    (folder / ENCODER_SETTINGS).write_text(content, encoding="utf-8")


def load_adapter_weights(llm: PreTrainedModel, weights: Mapping[str, torch.Tensor], where: Any) -> None:
    """Loads adapter weights into the adapters that a model has."""
    name = llm.active_adapters()[0]
    own: Mapping[str, torch.Tensor] = get_peft_model_state_dict(llm, adapter_name=name)
    state = {key.removeprefix(_PREFIX): value for key, value in weights.items()}
    wrong: Iterable[str] = sorted(own.keys() ^ state.keys()) or sorted(
        f"{key} of shape {tuple(value.shape)}, not {tuple(own[key].shape)}"
        for key, value in state.items()
        if value.shape != own[key].shape
    )
    for first in wrong:
        raise ValueError(
            f"The adapter `{where}` does not fit {type(llm).__name__}: {first}. Load it on the LLM, and with the LoRA "
            "configuration, that it was trained on."
        )
    set_peft_model_state_dict(llm, state, name)


def load_adapter_checkpoint(llm: PreTrainedModel, checkpoint: str) -> None:
    """Loads the adapters of a checkpoint into those that a model has."""
    file = Path(checkpoint) / ADAPTER_FOLDER / ADAPTER_WEIGHTS
    if not file.is_file():
        raise ValueError(f"{checkpoint} holds no `{ADAPTER_FOLDER}/`. Give a checkpoint of a LoRA run.")
    load_adapter_weights(llm, load_file(file), file)


# ------------------------------------------------------------------------------------------------------------- merging


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The PEFT layers of a model by name; of several around one module, as for the experts of a mixture, the outer."""
    layers: dict[str, BaseTunerLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and name.removesuffix(".base_layer") not in layers:
            layers[name] = module
    return layers


def base_state(llm: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of an LLM as if it had no adapters."""
    state = llm.state_dict()
    return {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if not _is_lora(name)}


def lora_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter weights of a state dict alone."""
    return {name: tensor for name, tensor in state.items() if _is_lora(name)}


def _is_lora(name: str) -> bool:
    return ".lora_" in name


def merged_state(
    model: nn.Module,
    state: Mapping[str, torch.Tensor] | None = None,
    *,
    device: str | None = None,
    round_once: bool = True,
) -> dict[str, torch.Tensor]:
    """
    The state dict of a model, or `state` in its place, with the adapters merged by PEFT, under the names of the plain
    model; layer by layer, so that `device="cpu"` takes the memory of one layer of a model on a GPU. With `round_once`
    half-precision weights are added to in float32.
    """
    state = dict(model.state_dict() if state is None else state)
    for name, layer in tuner_layers(model).items():
        own = {key.removeprefix(f"{name}."): state.pop(key) for key in list(state) if key.startswith(f"{name}.")}
        single: Any = copy.deepcopy(layer)
        dtypes = {key.replace("base_layer.", ""): tensor.dtype for key, tensor in own.items()}
        if round_once:
            own = {key: tensor.float() for key, tensor in own.items()}
        single.load_state_dict(own, assign=True)  # which may be whole where the layer's own weights are sharded
        for part in tuple(single.modules()):
            if isinstance(part, BaseTunerLayer):
                part.merge(safe_merge=True)
        merged = single.get_base_layer().state_dict()
        state |= {f"{name}.{key}": tensor.to(device=device, dtype=dtypes[key]) for key, tensor in merged.items()}
    return {name: tensor.detach().to(device=device) for name, tensor in state.items()}


def plain_copy(model: Any, state: Mapping[str, torch.Tensor], **fields: Any) -> Any:
    """A model of the class and config of another, or with other `fields` of it, that holds `state` as it is."""
    classes = type(model).__mro__  # FSDP2 derives a class of its own from a model's
    model_class: Any = classes[classes.index(FSDPModule) + 1] if FSDPModule in classes else classes[0]
    config = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(config, name, value)
    with torch.device("meta"):
        plain = model_class._from_config(config, dtype=model.dtype)
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    return plain.eval()


def merged_llm(llm: PreTrainedModel) -> PreTrainedModel:
    """The LLM with its adapters merged into the weights; a copy on the CPU, or `llm` itself where it has none."""
    layers = tuner_layers(llm)
    if not layers:
        return llm
    # Rounded as PEFT does, and as an LLM with its adapters is loaded: fingerprints of stored embeddings depend on it.
    merged: PreTrainedModel = plain_copy(llm, merged_state(llm, device="cpu", round_once=False))
    for name, buffer in llm.named_buffers():  # those that are not in a state dict, such as rotary frequencies
        if name not in merged.state_dict() and not any(name.startswith(f"{layer}.") for layer in layers):
            owner, _, leaf = name.rpartition(".")
            merged.get_submodule(owner).register_buffer(leaf, buffer.detach().cpu(), persistent=False)
    return merged


def merge_lora(model: nn.Module) -> None:
    """
    Merges the adapters of a model into its weights for good; it is a plain model afterwards.

    Args:
        model (`nn.Module`): A model whose towers may carry LoRA; it is changed.
    """
    lora_layers(model)
    for part in merge_adapters(model, round_once=True):
        # `load_adapter` leaves those of the adapters' names, which saving would apply to all weights.
        part._weight_conversions = None


def attach_lora(part: Any, config: LoraConfig) -> None:
    """Adds trainable LoRA layers to a tower and freezes everything else of it."""
    for name, plain in (("use_dora", False), ("lora_bias", False), ("bias", "none")):
        value = getattr(config, name, plain)
        if value != plain:
            raise ValueError(f"LoRA with `{name}={value!r}` cannot be merged into plain weights. Leave `{name}` out.")
    if not has_adapters(part):
        add_lora(part, config)
    lora_layers(part)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The LoRA layers of a model by name."""
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


__all__ = ["attach_lora", "lora_layers", "lora_state", "merge_lora", "merged_state"]
