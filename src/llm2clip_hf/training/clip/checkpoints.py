# SPDX-License-Identifier: Apache-2.0
"""Saving and loading of a model in training: FSDP2, adapters, the LLM and what is attached."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial

from ...hub.cards import LLM2CLIPModelCardData
from ...modeling.configuration_llm2clip import is_repository
from ..lora import has_adapters, lora_layers, lora_state, merged_state, plain_copy
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


def register_feature_methods(model: Any) -> None:
    """Lets the methods that give features be called on a model that is sharded."""
    for name in _FEATURE_METHODS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


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
            own = part.state_dict()
            elsewhere += [f"{name}.{key}" for key in own.keys() - lora_state(own).keys()]
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


def save_model(model: Any, folder: Path, state: Any = None) -> None:
    """
    Writes a model: plain, with LoRA merged, and the adapters and what is attached beside it. A frozen LLM is named
    instead, and one that was trained is bundled.
    """
    fields = {"text_weights": saved_text_weights(model)} if is_llm2clip(model) else {}
    adapted, with_clip_text = has_adapters(model), hasattr(model, clip_text.NAME)
    folder.mkdir(parents=True, exist_ok=True)
    if adapted or with_clip_text:
        state = model.state_dict() if state is None else state
        adapters = {key: tensor.contiguous().cpu() for key, tensor in lora_state(state).items()}
        state, attached = clip_text.split_state(merged_state(model, state))
        if adapters:
            save_file(adapters, folder / LORA_FILE)
        if with_clip_text:
            clip_text.save_attached(folder, model, attached)
    if adapted or isinstance(model, FSDPModule):
        if fields and fields["text_weights"] != "bundled":
            state = {key: tensor for key, tensor in state.items() if not key.startswith("text_model.")}
        model, state = plain_copy(model, state, **fields), None
    model.save_pretrained(folder, state_dict=state, **fields)


def save_card(trainer: Any, config: Any, given: Mapping[str, Any]) -> None:
    """Writes the card of a model that was saved into `args.output_dir`, of the arguments of `create_model_card`."""
    folder = Path(str(trainer.args.output_dir))
    config = type(config).from_pretrained(folder)  # as it was saved: it says where the LLM is
    sources = [given["finetuned_from"], config.text_base_model] if given.get("finetuned_from") else []
    tags, data = ([each] if isinstance(each, str) else each for each in (given.get("tags"), given.get("dataset")))
    fields: dict[str, Any] = {
        "name": given.get("model_name") or trainer.hub_model_id or folder.absolute().name,
        "license": given.get("license"),
        "language": given.get("language"),
        "tags": tags,
        "base_model": [source for source in sources if is_repository(source)],
        "datasets": given.get("dataset_tags"),
        **({"training_data": data} if data else {}),
    }
    LLM2CLIPModelCardData.from_trainer(trainer, config, **fields).save(folder)
