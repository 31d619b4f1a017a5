# Copyright 2026 The llm2clip_hf authors.
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Loading of the parts: a vision tower, and an LLM, whole or as adapters, that a model names or is built from."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import extract_commit_hash

from .configuration_llm2clip import config_fields, unknown_keyword
from .text_llm2clip import check_adapter_base, is_quantized


logger = logging.get_logger(__name__)

# How files are fetched, the same for every repository. Not among them, since they belong to one repository: its
# revision, and the permission to run its code.
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
_SOURCE_KEYWORDS = (*HUB_KEYWORDS, "code_revision", "gguf_file", "revision", "subfolder", "trust_remote_code")
# Those that can be said of both parts at once, and those that can be said of one.
_PLACING = (
    "attn_implementation",
    "device_map",
    "dtype",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "torch_dtype",
)
SHARED_KEYWORDS = (*HUB_KEYWORDS, *_PLACING, "quantization_config", "revision", "trust_remote_code")
# Files of adapters, and what stage 1 says of its own beside them.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ENCODER_SETTINGS = "caption_encoder.json"
_SETTINGS = "base_model base_revision is_causal template pooling max_length normalize hidden_size".split()
_PART_KEYWORDS = (*_SOURCE_KEYWORDS, *_PLACING, "experts_implementation", "key_mapping", "use_safetensors", "variant")


def route_keywords(
    where: str, kwargs: dict[str, Any], fields: Collection[str], shared: Collection[str] = SHARED_KEYWORDS
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Sorts keywords by whom they are for, by their names."""
    own: dict[str, Any] = {}
    both: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {"vision": {}, "text": {}}
    for name, value in kwargs.items():
        part, _, rest = name.partition("_")
        if name in shared:
            both[name] = value
        elif name in fields:
            own[name] = value
        elif part in parts and rest:
            parts[part][rest] = value
        else:
            raise unknown_keyword(where, name, _known(fields, shared))
    return own, both, parts["vision"], parts["text"]


def _known(fields: Collection[str], shared: Collection[str] = SHARED_KEYWORDS) -> list[str]:
    return [*fields, *shared, *(f"{part}_{name}" for part in ("vision", "text") for name in _PART_KEYWORDS)]


def _check_part_keywords(where: str, part: str, names: Collection[str], known: Collection[str]) -> None:
    """Refuses keywords of one part that are none of `known`."""
    for name in names:
        if name not in known:
            raise unknown_keyword(where, f"{part}_{name}", [*_known(config_fields()), *(f"{part}_{n}" for n in known)])


def source_of_parts(
    where: str, kwargs: dict[str, Any], text_revision: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of a processor that say where the files of the vision tower and of the LLM are; others are refused."""
    _, both, vision, text = route_keywords(where, kwargs, (), (*HUB_KEYWORDS, "revision", "trust_remote_code"))
    for part, given in (("vision", vision), ("text", text)):
        _check_part_keywords(where, part, given, (*_SOURCE_KEYWORDS, "use_fast"))
    return {**both, **vision}, {**both, **({"revision": text_revision} if text_revision else {}), **text}


def pin_revision(name: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords for loading from a repository, with the commit that its revision means now."""
    if os.path.isdir(name):
        if kwargs.get("revision") is not None:
            raise ValueError(f"{str(name)!r} is a folder, which has no revision {kwargs['revision']!r}. Leave it out.")
        return kwargs
    options = {"_raise_exceptions_for_missing_entries": False, **file_keywords(kwargs)}
    commit = extract_commit_hash(cached_file(str(name), "config.json", **options), None)
    return kwargs if commit is None else {**kwargs, "revision": commit}


def part_keywords(part: str, kwargs: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Keywords for loading one part: those of the whole model that hold for it too, unless it has its own."""
    found = {name: kwargs[name] for name in (*HUB_KEYWORDS, "max_memory", "offload_buffers") if name in kwargs}
    attention, config = kwargs.get("attn_implementation"), kwargs.get("config")
    if attention is None and isinstance(config, PreTrainedConfig):
        # Auto classes put the attention that was asked for into the config before they call the model's class.
        own = getattr(config, f"{part}_config", None)
        attention = (config if own is None else own)._attn_implementation
    found["attn_implementation"] = (
        attention.get(f"{part}_config", attention.get("")) if isinstance(attention, dict) else attention
    )
    if kwargs.get("device_map") is not None and "device_map" not in given:
        found["device_map"] = part_device_map(kwargs["device_map"], f"{part}_model")
    if kwargs.get("offload_folder") is not None:
        # A folder of its own: the index of a folder names the weights of one model.
        found["offload_folder"] = os.path.join(kwargs["offload_folder"], f"{part}_model")
    return {name: value for name, value in found.items() if value is not None} | given


def external_text_kwargs(kwargs: dict[str, Any], given: dict[str, Any] | None) -> dict[str, Any]:
    """Keywords for loading an external LLM; of the dtypes of a whole model, only a single one holds for it."""
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    known = dtype is not None and not isinstance(dtype, dict) and "torch_dtype" not in (given or {})
    return part_keywords("text", kwargs, {**({"dtype": dtype} if known else {}), **(given or {})})


def stored_text_weights(name: Any, kwargs: dict[str, Any]) -> str:
    """Where the LLM of a stored model is, `config.text_weights`, read before the model is loaded."""
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        fields = PreTrainedConfig.get_config_dict(config or name, **source_keywords(kwargs))[0]
        return str(fields.get("text_weights") or ("none" if fields.get("text_config") is None else "bundled"))
    return str(getattr(config, "text_weights", None))


def text_keywords(text_weights: str, kwargs: dict[str, Any], given: dict[str, Any]) -> dict[str, Any] | None:
    """Brings keywords for loading an LLM to where the LLM is loaded."""
    given = dict(given)
    if text_weights == "external":
        quantization = kwargs.pop("quantization_config", None)
        return given if quantization is None else {"quantization_config": quantization, **given}
    if text_weights == "none":
        names = [*given, *(["quantization_config"] if kwargs.get("quantization_config") is not None else [])]
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in names)} would hold for an LLM, and none is loaded here. Leave it "
            "out, or pass it where the LLM itself is loaded."
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


def part_device_map(device_map: Any, part: str) -> Any:
    """The part of a device map that is about one part; one device, or a strategy such as `"auto"`, is for all."""
    if not isinstance(device_map, dict):
        return device_map
    parts = {"": device_map[""]} if "" in device_map else {}
    for name, device in device_map.items():
        if name.split(".")[0] == part:
            parts[name.removeprefix(part).removeprefix(".")] = device
    if not parts:
        logger.warning(f"`device_map` has no entry for `{part}`, so it is loaded to the CPU. Add one.")
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


def file_keywords(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Of keywords for loading a model, those that say where a single file of it is."""
    names = (*HUB_KEYWORDS, "revision", "subfolder")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None} if kwargs else {}


def source_keywords(kwargs: dict[str, Any] | None, revision: str | None = None) -> dict[str, Any]:
    """Of keywords for loading a model, those that also say where its config and tokenizer are."""
    found = {name: kwargs[name] for name in _SOURCE_KEYWORDS if name in kwargs} if kwargs else {}
    return found if revision is None else {"revision": revision, **found}


def find_adapters(name: str, source: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """What a repository or folder of adapters alone says of the model that they make; `None` for any other."""
    if find_file(name, "config.json", source) is not None:
        return None  # a whole model
    files = {file: find_file(name, file, source) for file in (ENCODER_SETTINGS, ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    settings_file, config_file, weights_file = files.values()
    if settings_file is None and config_file is None:
        return None
    settings = None if settings_file is None else json.loads(settings_file.read_text(encoding="utf-8"))
    if settings is not None and (missing := [repr(field) for field in _SETTINGS if field not in settings]):
        raise ValueError(f"`{settings_file}` has no {', '.join(missing)}. Save the encoder again.")
    if config_file is None or weights_file is None:
        found = ADAPTER_CONFIG if settings is None else ENCODER_SETTINGS
        absent = ADAPTER_CONFIG if config_file is None else ADAPTER_WEIGHTS
        raise ValueError(f"{name!r} holds `{found}`, but no `{absent}`. Save the encoder again.")
    if settings is not None:
        return settings
    config = json.loads(config_file.read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"`{config_file}` does not name the model that the adapters are for. Load that model and then these, with "
            "`model.load_adapter(...)`, or set `base_model_name_or_path`."
        )
    fields: dict[str, Any] = dict.fromkeys(("pooling", "hidden_size"))
    return {**fields, "base_model": base, "base_revision": config.get("revision"), "is_causal": False}


def find_file(name: str, file: str, source: dict[str, Any] | None = None) -> Path | None:
    """A file of a folder or a repository; `None` if it has none of that name."""
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries", "connection_errors")}
    found = cached_file(name, file, **file_keywords(source), **quiet)
    return None if found is None else Path(found)


def skip_shards(
    name: Any, kwargs: dict[str, Any], config_class: Any, unused: tuple[str, ...]
) -> tuple[Any, dict[str, Any]]:
    """
    Arguments by which `from_pretrained` takes the weights of a sharded checkpoint out of the files that it has a use
    for, the others not even being fetched; those that are given where there is nothing to skip.
    """
    others = (kwargs.get("variant"), kwargs.get("offload_folder"), kwargs.get("use_safetensors") is False)
    if any(others) or os.path.isfile(os.path.join(name, kwargs.get("subfolder") or "", SAFE_WEIGHTS_NAME)):
        return name, kwargs
    index = find_file(str(name), SAFE_WEIGHTS_INDEX_NAME, kwargs)
    shards: dict[str, str] = {} if index is None else json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    needed = {shard for key, shard in shards.items() if not key.startswith(unused)}
    if len(needed) == len(set(shards.values())):
        return name, kwargs
    state: dict[str, Any] = {}
    for shard in sorted(needed):
        found = load_state_dict(str(cached_file(str(name), shard, **file_keywords(kwargs))))
        state |= {key: value for key, value in found.items() if not key.startswith(unused)}
    config, rest = kwargs.get("config"), kwargs
    if not isinstance(config, PreTrainedConfig):
        config, rest = config_class.from_pretrained(config or name, return_unused_kwargs=True, **kwargs)
    return None, {**rest, "config": config, "state_dict": state}


def load_text_config(name: str, kwargs: dict[str, Any] | None = None) -> Any:
    """The config of an LLM, also of one saved as adapters only."""
    source = source_keywords(kwargs)
    adapter = find_adapters(name, source)
    if adapter is None:
        return AutoConfig.from_pretrained(name, **source)
    try:
        config = AutoConfig.from_pretrained(adapter["base_model"], **base_keywords(source, adapter))
    except OSError as error:
        raise OSError(
            f"The LLM {adapter['base_model']!r} of the adapters in {name!r} cannot be read: "
            f"{' '.join(str(error).split())[:200]} Put it where `{ENCODER_SETTINGS}` and `{ADAPTER_CONFIG}` say it "
            "is, or make a whole model with `build_caption_encoder(adapters, base_model=..., lora=None)` and "
            "`save_pretrained`."
        ) from error
    # As in the config of a whole model that stage 1 saves.
    text_config = config.get_text_config()
    if not adapter["is_causal"]:
        text_config.is_causal = False
    if adapter["pooling"] is not None:
        text_config.text_pooling = adapter["pooling"]
    return config


def base_keywords(kwargs: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    """Keywords for the base of adapters: revision and subfolder are those of the adapters alone."""
    kept = {key: value for key, value in kwargs.items() if key not in ("revision", "code_revision", "subfolder")}
    revision = adapter["base_revision"]
    return kept if revision is None else {**kept, "revision": revision}


@torch.no_grad()
def load_adapters(model: Any, name: str, source: dict[str, Any] | None = None) -> None:
    """Puts adapters into a model of transformers, with the float32 weights that they were trained as."""
    conversions = getattr(model, "_weight_conversions", None)
    with torch.random.fork_rng(devices=[]):  # they are drawn first, which must not change what is drawn later
        info = model.load_adapter(name, adapter_kwargs=file_keywords(source))
    # Those of the adapters' names would be applied to all weights when the model is saved.
    model._weight_conversions = conversions
    check_loading_info(name, vars(info) if info is not None else {})
    weights = load_state_dict(str(find_file(name, ADAPTER_WEIGHTS, source)))
    for key, parameter in model.named_parameters():
        value = weights.get(f"base_model.model.{key.replace('.default', '')}")
        if value is not None and ".lora_" in key:  # transformers has rounded it to the type of the model
            parameter.data = value.to(parameter.device, torch.float32)


@torch.no_grad()
def merge_adapters(model: Any, round_once: bool = False) -> list[Any]:
    """Merges adapters of PEFT into the weights of a model, layer by layer, and takes them out; of which parts."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    for layer in layers.values():
        weights = {weight: weight.dtype for weight in layer.get_base_layer().parameters()} if round_once else {}
        for weight in weights:  # of half precision, PEFT rounds what it adds, and the sum
            weight.data = weight.data.float()
        layer.merge(safe_merge=True)
        for weight, dtype in weights.items():
            weight.data = weight.data.to(dtype)
    for name, layer in layers.items():
        if not name.rpartition(".base_layer")[0]:  # adapters of several parameters lie one in the other
            model.set_submodule(name, layer.get_base_layer())
    adapted = [part for part in model.modules() if getattr(part, "_hf_peft_config_loaded", False)]
    for part in adapted:
        part._hf_peft_config_loaded = False
        del part.peft_config
    return adapted


def part_config(name: str, source: dict[str, Any], kwargs: dict[str, Any], part: str) -> tuple[Any, Any]:
    """The config that a repository holds, and in it that of the part, with the fields that `kwargs` set, taken out."""
    whole = load_text_config(name, source) if part == "text" else AutoConfig.from_pretrained(name, **source)
    # A composite model, such as CLIP or LLaVA, has one config for each of its parts.
    config = getattr(whole, f"{part}_config", None) or whole
    # A vision tower is trained, so it is not quantised.
    taken = (*_PART_KEYWORDS, *(["quantization_config"] if part == "text" else []))
    fields = [key for key in kwargs if key not in taken]
    _check_part_keywords(
        f"The {'LLM' if part == 'text' else 'vision tower'} {name!r}", part, fields, list(vars(config))
    )
    for field in fields:
        setattr(config, field, kwargs.pop(field))
    return whole, config


def load_within(name: str, whole: Any, part_class: Any, kwargs: dict[str, Any]) -> Any:
    """A part of a composite model, which is loaded whole, as transformers knows the names of all its weights."""
    model, info = AutoModel.from_pretrained(name, config=whole, output_loading_info=True, **kwargs)
    found = next(((path, each) for path, each in model.named_modules() if type(each) is part_class), None)
    if found is None:
        raise ValueError(
            f"{name!r} is a {whole.model_type!r} model, whose part of class {part_class.__name__} is not found. Save "
            "that part to a folder, and give the folder."
        )
    path, part = found
    for kind in ("missing_keys", "mismatched_keys"):
        info[kind] = [
            key for key in info[kind] if str(key[0] if isinstance(key, tuple) else key).startswith(f"{path}.")
        ]
    check_complete(name, info)
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        part.config.quantization_config = quantization
    return part


def load_pretrained_text(name: str | None, revision: str | None, kwargs: dict[str, Any] | None) -> Any:
    """
    A decoder without a head, out of its own repository or out of that of a multimodal model.

    The result of stage 1 may be saved as adapters only. They are merged, unless the LLM is quantised: then they stay
    beside the rounded weights.
    """
    if not name:
        raise ValueError(
            "The config says that the LLM is external, but `text_base_model` does not name it. Pass `text_model=`, or "
            "`load_text_model=False` to do without it."
        )
    kwargs = dict(kwargs or {})
    source = source_keywords(kwargs, revision)
    adapter = find_adapters(name, source)
    if adapter is not None and adapter["is_causal"]:
        raise ValueError(
            f"The adapters in {name!r} were trained on causal attention, and LLM2CLIP attends both ways. Use an "
            "encoder that was trained with `bidirectional=True`."
        )
    whole, config = part_config(name, source, kwargs, "text")
    # Set here, since loading drops it from keyword arguments.
    config.is_causal = False
    kwargs |= source
    if adapter is None:
        return _load_whole_text(name, whole, config, kwargs)
    model = _load_whole_text(str(adapter["base_model"]), whole, config, base_keywords(kwargs, adapter))
    check_adapter_base(model, adapter, name)
    load_adapters(model, name, source)
    if is_quantized(model):
        model.adapters_name = name
    else:
        merge_adapters(model)
    return model


def _load_whole_text(name: str, whole: Any, config: Any, kwargs: dict[str, Any]) -> Any:
    if config is not whole:
        if type(config) not in MODEL_MAPPING:
            raise ValueError(
                f"The language model of {name!r}, of type {config.model_type!r}, is none that transformers runs by "
                "itself. Use another LLM."
            )
        return load_within(name, whole, MODEL_MAPPING[type(config)], kwargs)
    model, info = AutoModel.from_pretrained(name, config=config, output_loading_info=True, **kwargs)
    check_complete(name, info)
    return model


def load_pretrained_tokenizer(name: str, revision: str | None, kwargs: dict[str, Any] | None) -> Any:
    """The tokenizer from where [`load_pretrained_text`] takes the LLM, for adapters without one that of their base."""
    source = {**source_keywords(kwargs), "revision": revision or (kwargs or {}).get("revision") or "main"}
    adapter = find_adapters(name, source)
    if adapter is not None and find_file(name, "tokenizer_config.json", source) is None:
        name, source = adapter["base_model"], {"revision": "main", **base_keywords(source, adapter)}
    options = {key: value for key, value in (kwargs or {}).items() if key == "use_fast"}
    return AutoTokenizer.from_pretrained(name, **source, **options)
