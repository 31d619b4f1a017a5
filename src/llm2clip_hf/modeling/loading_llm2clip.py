# Copyright 2026 The llm2clip_hf authors.
# SPDX-License-Identifier: Apache-2.0
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Loading of the parts: a vision tower, and an LLM that a model names or is built from."""

import os
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)

# How files are fetched, the same for every repository. Not among them, since they belong to one repository: its
# revision, and the permission to run its code.
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
_SOURCE_KEYWORDS = (*HUB_KEYWORDS, "code_revision", "revision", "subfolder", "trust_remote_code")


def external_text_kwargs(kwargs: dict[str, Any], given: dict[str, Any] | None) -> dict[str, Any]:
    """
    Keywords for loading an external LLM: those of the model that hold for it too, unless it has its own.

    Args:
        kwargs (`dict`):
            Keywords of the model's `from_pretrained`. Of these, `dtype`, `attn_implementation`, `device_map` and what
            goes with it, `token`, `cache_dir`, `local_files_only`, `force_download` and `proxies` are taken;
            `trust_remote_code` and `revision` are not, since they are said of one repository.
        given (`dict`, *optional*): `text_model_kwargs`, which win.

    Returns:
        `dict`
    """
    given = dict(given or {})
    found = {name: kwargs[name] for name in (*HUB_KEYWORDS, "max_memory", "offload_buffers") if name in kwargs}
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if not isinstance(dtype, dict) and "torch_dtype" not in given:
        found["dtype"] = dtype
    found["attn_implementation"] = _attention(kwargs.get("attn_implementation"), kwargs.get("config"))
    if kwargs.get("device_map") is not None and "device_map" not in given:
        found["device_map"] = _text_device_map(kwargs["device_map"])
    if kwargs.get("offload_folder") is not None:
        # A folder of its own: the index of a folder names the weights of one model.
        found["offload_folder"] = os.path.join(kwargs["offload_folder"], "text_model")
    return {name: value for name, value in found.items() if value is not None} | given


def stored_text_weights(name: Any, kwargs: dict[str, Any]) -> str:
    """Where the LLM of a stored model is, `config.text_weights`, read before the model is loaded."""
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        fields = PreTrainedConfig.get_config_dict(config or name, **source_keywords(kwargs))[0]
        return str(fields.get("text_weights") or ("none" if fields.get("text_config") is None else "bundled"))
    return str(getattr(config, "text_weights", None))


def text_keywords(text_weights: str, kwargs: dict[str, Any], given: dict[str, Any]) -> dict[str, Any] | None:
    """
    Brings keywords for loading an LLM to where the LLM is loaded.

    Args:
        text_weights (`str`): Where that is: `"bundled"`, `"external"`, or `"none"` if no LLM is to be loaded.
        kwargs (`dict`): Keywords of the model's `from_pretrained`; changed.
        given (`dict`): `text_model_kwargs`.

    Returns:
        `dict`, *optional*: what remains of `given`: keywords for an external LLM.

    Raises:
        ValueError: for a keyword that cannot be used.
    """
    given = dict(given)
    if text_weights == "external":
        quantization = kwargs.pop("quantization_config", None)
        return given if quantization is None else {"quantization_config": quantization, **given}
    if text_weights == "none":
        names = [*given, *(["quantization_config"] if kwargs.get("quantization_config") is not None else [])]
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in names)} would hold for an LLM, and none is loaded here. Leave it out, "
            "or pass it where the LLM itself is loaded."
        )
    for name in ("quantization_config", "dtype", "torch_dtype"):
        if name in given:
            kwargs["dtype" if name == "torch_dtype" else name] = given.pop(name)
    if "attn_implementation" in given:
        other = kwargs.get("attn_implementation")
        both = other if isinstance(other, dict) else {name: other for name in ("", "vision_config") if other}
        kwargs["attn_implementation"] = {**both, "text_config": given.pop("attn_implementation")}
    if given:
        raise ValueError(
            f"The LLM is bundled with the model, so `text_model_kwargs` cannot take {', '.join(map(repr, given))}: of "
            "`quantization_config`, `dtype` and `attn_implementation` it can. Pass other arguments to "
            "`from_pretrained` itself, where they hold for all parts."
        )
    return None


def _attention(requested: Any, config: Any) -> Any:
    """The attention that was asked for; Auto classes put it into the config before they call the model's class."""
    if requested is None and isinstance(config, PreTrainedConfig):
        text_config = getattr(config, "text_config", None)
        requested = (config if text_config is None else text_config)._attn_implementation
    if isinstance(requested, dict):
        requested = requested.get("text_config", requested.get(""))
    return requested


def _text_device_map(device_map: Any) -> Any:
    """The part of a device map that is about the LLM; one device, or a strategy such as `"auto"`, is for all parts."""
    if not isinstance(device_map, dict):
        return device_map
    parts = {"": device_map[""]} if "" in device_map else {}
    for name, device in device_map.items():
        if name.split(".")[0] == "text_model":
            parts[name.removeprefix("text_model").removeprefix(".")] = device
    if not parts:
        logger.warning(
            "`device_map` has no entry for `text_model`, so the external LLM is loaded to the CPU. Add one, or pass "
            "`text_model_kwargs={'device_map': ...}`."
        )
    return parts or None


def check_loading_info(name: Any, info: dict[str, Any], ignored: tuple[str, ...] = ()) -> None:
    problems = [
        f"{kind.replace('_', ' ')}: {sorted(map(str, info[kind]))}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if info.get(kind) and kind not in ignored
    ]
    if problems:
        raise ValueError(
            f"The weights of {str(name)!r} do not fit the model that its config describes; {'; '.join(problems)}. "
            "Load with `output_loading_info=True` to accept that."
        )


def check_complete(name: Any, info: dict[str, Any]) -> None:
    # A head or the other tower may be left over from a pretrained part; nothing may be missing.
    check_loading_info(name, info, ignored=("unexpected_keys", "error_msgs"))


def source_keywords(kwargs: dict[str, Any] | None, revision: str | None = None) -> dict[str, Any]:
    """Of keywords for loading a model, those that also say where its config and tokenizer are."""
    found = {name: kwargs[name] for name in _SOURCE_KEYWORDS if name in kwargs} if kwargs else {}
    return found if revision is None else {"revision": revision, **found}


def load_pretrained_text(name: str | None, revision: str | None, kwargs: dict[str, Any] | None) -> PreTrainedModel:
    if not name:
        raise ValueError(
            "The config says that the LLM is external, but `text_base_model` does not name it. Pass `text_model=`, or "
            "`load_text_model=False` to do without it."
        )
    source = source_keywords(kwargs, revision)
    config = AutoConfig.from_pretrained(name, **source)
    # Set here, since loading drops it from keyword arguments.
    config.is_causal = False
    model, info = AutoModel.from_pretrained(
        name, config=config, output_loading_info=True, **{**(kwargs or {}), **source}
    )
    check_complete(name, info)
    return model


def load_pretrained_tokenizer(name: str, revision: str | None, kwargs: dict[str, Any] | None) -> Any:
    """The tokenizer from where [`load_pretrained_text`] takes the LLM."""
    return AutoTokenizer.from_pretrained(name, **{"revision": "main", **source_keywords(kwargs, revision)})


def load_pretrained_vision(name: str, kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    source = source_keywords(kwargs)
    config = AutoConfig.from_pretrained(name, **source)
    model_class: Any = AutoModel
    if getattr(config, "vision_config", None) is not None:
        # A CLIP-like model: its tower loads from the whole checkpoint by the names of its weights.
        config = config.vision_config
        model_class = MODEL_MAPPING[type(config)]
    model, info = model_class.from_pretrained(
        name, config=config, dtype=torch.float32, output_loading_info=True, **source
    )
    check_complete(name, info)
    return model


__all__ = [
    "HUB_KEYWORDS",
    "check_complete",
    "check_loading_info",
    "external_text_kwargs",
    "load_pretrained_text",
    "load_pretrained_tokenizer",
    "load_pretrained_vision",
    "stored_text_weights",
    "text_keywords",
]
