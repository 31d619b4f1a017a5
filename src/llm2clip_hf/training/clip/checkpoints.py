# SPDX-License-Identifier: Apache-2.0
"""Saving and loading of a model in training: FSDP2, adapters, the LLM and what is attached."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial

from ...hub.cards import LLM2CLIPModelCardData
from ...modeling.configuration_llm2clip import is_repository
from ..lora import has_adapters, lora_layers, lora_state
from ..publishing import LORA_FILE
from . import clip_text
from .parameters import has_llm, is_llm2clip


# Called without the model's `forward`.
_FEATURE_METHODS = ("get_image_features", "get_text_features", "get_llm_embeds")


def whole_parameter(parameter: torch.Tensor) -> torch.Tensor:
    """
    The whole tensor of a parameter that FSDP2 shards; any other as it is.

    For use outside of the model's `forward`, where FSDP2 does not see the gradient, so that the mean over processes is
    taken here.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


@contextmanager
def ready_for_fsdp2(model: Any) -> Iterator[None]:
    """Makes a model give the answers that accelerate shards it by, while it does."""
    # The list of a vision tower also names layers of the text tower that it was published with, and accelerate stops
    # at a name that is not there.
    present = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = sorted(present & set(model._no_split_modules or ()))
    if is_llm2clip(model) and model.text_model is None:
        # accelerate asks for token embeddings to shard apart; a model without an LLM answers with an error.
        model.get_input_embeddings = lambda: None
    try:
        yield
    finally:
        model.__dict__.pop("get_input_embeddings", None)


def register_feature_methods(model: Any) -> None:
    """Lets the methods that give features be called on a model that is sharded."""
    for name in _FEATURE_METHODS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def unsharded_class(model: Any) -> type:
    """The class that a model had before FSDP2 derived one from it."""
    classes = type(model).__mro__
    return classes[classes.index(FSDPModule) + 1] if isinstance(model, FSDPModule) else type(model)


_TOWERS = ("vision_model", "text_model")


def load_checkpoint(model: Any, folder: Path) -> None:
    """Loads the weights of a checkpoint; towers with LoRA keep their own weights, and get the adapters."""
    adapted = tuple(f"{name}." for name in _TOWERS if has_adapters(getattr(model, name, None)))
    files = sorted(folder.glob("model*.safetensors")) or [folder / "model.safetensors"]
    for file in (*files, *([folder / LORA_FILE] if adapted else [])):
        if not file.is_file():
            raise ValueError(
                f"`{file}` does not exist. Resume from a checkpoint that was saved with the same `train_vision` and "
                "`train_text`."
            )
    state = {key: tensor for file in files for key, tensor in load_file(file).items()}
    state = {key: tensor for key, tensor in state.items() if not key.startswith(adapted or ("\0",))}
    state |= clip_text.load_attached_state(folder, model)
    if adapted:
        state |= load_file(folder / LORA_FILE)
    found = model.load_state_dict(state, strict=False)
    elsewhere = ["text_model."] if has_llm(model) and not has_adapters(model.text_model) else []
    for name in _TOWERS:
        if f"{name}." in adapted:
            part = getattr(model, name)
            adapters = set(lora_state(part))
            elsewhere += [f"{name}.{key}" for key in part.state_dict() if key not in adapters]
    missing = [key for key in found.missing_keys if not key.startswith(tuple(elsewhere))]
    if missing or found.unexpected_keys:
        raise ValueError(
            f"The checkpoint does not fit the model: missing {missing[:3]}, unexpected {found.unexpected_keys[:3]}. "
            "Resume with the model and options that the run was started with."
        )


def saved_text_weights(model: Any) -> str:
    """Where the LLM that an LLM2CLIP model holds will be: with it if it was trained or exchanged, else where it is."""
    if not has_llm(model):
        return str(model.config.text_weights)
    if lora_layers(model.text_model):
        return "bundled"
    if not model.config.text_base_model:
        return "none"
    # Code that travelled with an older folder does not know.
    return "external" if getattr(model, "text_model_is_named", lambda: True)() else "bundled"


@contextmanager
def plain_model(model: Any) -> Iterator[None]:
    """
    Makes `save_pretrained` name a frozen LLM instead of writing it, bundle one that was trained, take towers with LoRA
    for plain ones, whose merged weights it is given, and a model under FSDP2 for one of its own class, whose code is
    saved with it.
    """
    sharded_class = type(model)
    model.__class__ = unsharded_class(model)
    towers: list[Any] = [tower for tower in (getattr(model, name, None) for name in _TOWERS) if has_adapters(tower)]
    towers.append(model)  # `add_adapter` of the whole model
    flags = [getattr(tower, "_hf_peft_config_loaded", False) for tower in towers]
    config: Any = getattr(model, "config", None)
    conversions = getattr(model, "_weight_conversions", None)
    if flags[-1]:  # `load_adapter` left those of the adapters' names
        model._weight_conversions = None
    text_weights = getattr(config, "text_weights", None)
    if has_llm(model):
        config.text_weights = saved_text_weights(model)
    for tower in towers:
        tower._hf_peft_config_loaded = False
    try:
        yield
    finally:
        model.__class__ = sharded_class
        for tower, flag in zip(towers, flags):
            tower._hf_peft_config_loaded = flag
        if flags[-1]:
            model._weight_conversions = conversions
        if has_llm(model):
            config.text_weights = text_weights


def save_card(
    trainer: Any,
    config: Any,
    name: str | None,
    license: str | None,
    language: Any,
    tags: Any,
    start: str | None,
    datasets: Any,
    training_data: Any,
) -> None:
    """Writes the card of a model that was saved into `args.output_dir`."""
    folder = Path(str(trainer.args.output_dir))
    config = type(config).from_pretrained(folder)  # as it was saved: it says where the LLM is
    sources = [start, config.text_base_model] if start else []
    fields: dict[str, Any] = {
        "name": name or trainer.hub_model_id or folder.absolute().name,
        "license": license,
        "language": language,
        "tags": tags,
        "base_model": [source for source in sources if is_repository(source)],
        "datasets": datasets,
    }
    if training_data:
        fields["training_data"] = training_data
    LLM2CLIPModelCardData.from_trainer(trainer, config, **fields).save(folder)
