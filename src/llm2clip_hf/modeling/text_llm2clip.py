# Copyright 2026 The llm2clip_hf authors.
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The text side: the adaptor, the pooling of an LLM's states, and what an LLM must be to be used."""

import copy
import hashlib
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedModel

from .configuration_llm2clip import TEXT_POOLINGS, LLM2CLIPConfig


# What `sampled_weights_digest` looks at.
SAMPLES_PER_PARAMETER = 16
SAMPLED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CAUSAL = "attends causally"
_USE = "Use a decoder that honours `is_causal=False`, for example Llama, Qwen3, Mistral, Gemma or Phi-3."
# Sizes of a decoder's twin, by what the name of a field holds; the first that fits counts. Head widths stay.
_TWIN_LAYERS, _TWIN_HEADS = 8, 4
_TWIN_SIZES = (
    ("vocab", 128),
    ("chunk_size$", 16),
    ("position|layer|window|head|rank", None),
    ("experts_per|top_?k|moe_k|shared_expert|n_group|num_expert_group", 1),
    ("intermediate|ffn|n_inner|inner_dim|expert.*size", 64),
    ("expert", 4),
)


def floating_dtype(layer: Any) -> torch.dtype:
    """The dtype that a layer computes in: that of its weight, or float32 where quantised weights are integers."""
    dtype: torch.dtype = layer.weight.dtype
    return dtype if dtype.is_floating_point else torch.float32


class LLM2CLIPAdapterLinear(nn.Linear):
    """A linear layer by another name, by which `_init_weights` knows it: it is initialised as `torch.nn.Linear` is."""


class LLM2CLIPAdapterBlock(nn.Module):
    """Residual MLP block: `x + W2 GELU(W1 LN(x) + b1) + b2` (paper section 4.1, inverted bottleneck)."""

    def __init__(self, hidden_size: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.fc1 = LLM2CLIPAdapterLinear(hidden_size, expansion * hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = LLM2CLIPAdapterLinear(expansion * hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.fc2(self.dropout(F.gelu(self.fc1(self.norm(hidden_states)))))


class LLM2CLIPTextAdapter(nn.Module):
    """
    Maps LLM embeddings `(batch, llm_hidden_size)` to the joint space `(batch, projection_dim)`, un-normalised.

    Optional L2 norm, `adapter_num_layers` residual blocks, LayerNorm, linear projection with bias (paper section 4.1).

    Args:
        config ([`LLM2CLIPConfig`]): Widths, depth, expansion, dropout and `normalize_llm_embeds`.
    """

    def __init__(self, config: LLM2CLIPConfig) -> None:
        super().__init__()
        self.normalize_input = config.normalize_llm_embeds
        self.blocks = nn.ModuleList(
            LLM2CLIPAdapterBlock(config.llm_hidden_size, config.adapter_expansion, config.adapter_dropout)
            for _ in range(config.adapter_num_layers)
        )
        self.norm = nn.LayerNorm(config.llm_hidden_size)
        self.projection = LLM2CLIPAdapterLinear(config.llm_hidden_size, config.projection_dim)

    def forward(self, llm_embeds: torch.Tensor) -> torch.Tensor:
        hidden_states = llm_embeds.to(floating_dtype(self.projection))
        if self.normalize_input:
            hidden_states = F.normalize(hidden_states, dim=-1)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.projection(self.norm(hidden_states))


def pool_text(
    last_hidden_state: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    prefix_length: int = 0,
    pooling: str = "mean",
) -> torch.Tensor:
    """
    One vector per text: the mean of the hidden states of its own tokens, or the state of its last token.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, length, hidden_size)`): Output of the LLM.
        attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
            1 for tokens, 0 for padding on either side; all ones if left out.
        prefix_length (`int`, *optional*, defaults to 0):
            Number of leading tokens of each text that are left out of the mean. A text that has no other token is
            pooled over all it has.
        pooling (`str`, *optional*, defaults to `"mean"`):
            `"mean"`, `"last"` (the last attended token) or `"eos"` (the same, for a tokenizer that ends every text in
            an end token).

    Returns:
        `torch.Tensor` of shape `(batch, hidden_size)`, float32; zeros for a row without any token.

    Raises:
        ValueError: if `pooling` is none of these.
    """
    if pooling not in TEXT_POOLINGS:
        raise ValueError(f"`pooling` must be one of {', '.join(map(repr, TEXT_POOLINGS))}, got {pooling!r}.")
    if attention_mask is None:
        attention_mask = last_hidden_state.new_ones(last_hidden_state.shape[:2])
    attended = attention_mask.to(torch.bool)
    order = attended.cumsum(1)
    if pooling == "mean":
        pooled = attended & (order > prefix_length)
        pooled = torch.where(pooled.any(1, keepdim=True), pooled, attended)
    else:
        pooled = attended & (order == order[:, -1:])
    weights = pooled.to(torch.float32)
    # Padding may hold NaN in some attention backends, and 0 * NaN is NaN: select, do not multiply.
    hidden_states = last_hidden_state.to(torch.float32).masked_fill(~pooled.unsqueeze(-1), 0.0)
    return hidden_states.sum(1) / weights.sum(1, keepdim=True).clamp(min=1.0)


@torch.no_grad()
def sampled_weights_digest(text_model: Any) -> str | None:
    """
    SHA-256 of a few values of every parameter of an LLM: tells two LLMs apart at no cost, and is the same in float32,
    float16 and bfloat16.

    It is `weights_sample_sha256` of the fingerprint of stored embeddings. Names do not enter it, nor does a head.
    """
    if getattr(getattr(text_model, "config", None), "quantization_config", None) is not None:
        return None
    if isinstance(text_model, PreTrainedModel):
        text_model = text_model.base_model
    parts = []
    for name, parameter in text_model.named_parameters():
        if parameter.is_meta or parameter.dtype not in SAMPLED_DTYPES or "base_layer." in name:
            return None
        if parameter.numel() == 0:
            continue
        places = torch.arange(SAMPLES_PER_PARAMETER, device=parameter.device) * parameter.numel()
        values = parameter.reshape(-1)[places // SAMPLES_PER_PARAMETER].to("cpu", torch.bfloat16)
        # Below its normal numbers, float16 has not kept all bits of a bfloat16 value.
        values = values.masked_fill(values.abs() < torch.finfo(torch.float16).tiny, 0.0)
        content = f"{tuple(parameter.shape)}|".encode() + values.view(torch.int16).numpy().tobytes()
        parts.append(hashlib.sha256(content).digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()


@torch.no_grad()
def sampled_weights(text_model: Any) -> dict[str, torch.Tensor] | None:
    """Up to 1024 values of every parameter of an LLM, on the CPU, by which it is seen later whether it is the same."""
    samples = {}
    for name, parameter in text_model.named_parameters():
        # No subclass: neither quantized nor sharded.
        plain = parameter.dtype in SAMPLED_DTYPES and not parameter.is_meta and type(parameter.data) is torch.Tensor
        if not plain or "base_layer." in name or "_fsdp" in name:
            return None
        places = torch.arange(min(1024, parameter.numel()), device=parameter.device) * parameter.numel()
        samples[name] = parameter.reshape(-1)[places // max(len(places), 1)].to("cpu", copy=True)
    return samples


def same_sampled_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two LLMs agree in their samples; in different dtypes, to rounding."""
    if {name: len(values) for name, values in one.items()} != {name: len(values) for name, values in other.items()}:
        return False
    for name, values in one.items():
        found = other[name]
        if found.dtype == values.dtype:
            if not torch.equal(found, values):
                return False
        elif not torch.allclose(found.float(), values.float(), rtol=2**-7, atol=2**-14):
            return False
    return True


def check_text_fingerprint(text_model: Any, config: LLM2CLIPConfig, fingerprint: dict[str, Any]) -> None:
    """Checks that an LLM is the one whose stored embeddings a model was trained on, as far as that costs nothing."""
    own = {"text_prefix_length": config.text_prefix_length, "pooling": config.text_pooling}
    for key, value in own.items():
        if key in fingerprint and fingerprint[key] != value:
            field = f"config.{'text_pooling' if key == 'pooling' else key}"
            raise ValueError(
                f"`{field}` is {value!r}, but the embeddings that the model was trained on were made with "
                f"{fingerprint[key]!r}, as `config.text_fingerprint` says. Set `{field} = {fingerprint[key]!r}`."
            )
    recorded = fingerprint.get("weights_sample_sha256")
    found = None if recorded is None else sampled_weights_digest(text_model)
    if found is None or recorded == found:
        return
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in text_model.parameters()}
    made_in = str(fingerprint.get("weights_dtype"))
    # Rounded to float16 and from there to bfloat16, a float32 value may be another one than rounded at once.
    if {"float16", "float32"} <= {*dtypes, *made_in.split("+")}:
        return
    raise ValueError(
        f"The LLM ({text_model.config._name_or_path!r}) is not the one whose embeddings the model was trained on: the "
        f"SHA-256 of its sampled weights is {found}, `config.text_fingerprint` says {recorded}. Attach that LLM; to "
        "use another on purpose, set `text_fingerprint=None` in the config or pass it to `from_pretrained`."
    )


def check_adapter_base(llm: PreTrainedModel, settings: dict[str, Any], name: Any) -> None:
    """Checks that an LLM, without adapters, is the one that adapters were trained on."""
    width = settings["hidden_size"]
    problem = ""
    if width is not None and llm.config.hidden_size != width:
        problem = f"its width is {llm.config.hidden_size}, not {width}"
    else:
        # float16 holds other values than bfloat16.
        dtypes = {str(llm.dtype), settings.get("base_dtype")}
        comparable = len(dtypes) == 1 or "torch.float16" not in dtypes
        embeddings: Any = llm.get_input_embeddings()
        states = {"base_embeddings_sha256": {"weight": embeddings.weight}}
        if not is_quantized(llm):
            states["base_sha256"] = llm.state_dict()
        # The digest of all weights is missing where the LLM was quantised.
        known = {key: state for key, state in states.items() if comparable and settings.get(key)}
        if any(weights_digest(state) != settings[key] for key, state in known.items()):
            problem = "its weights are not those that the adapters were trained on"
    if problem:
        raise ValueError(
            f"The LLM in `{llm.config._name_or_path}` is not the base {settings['base_model']!r} of the adapters in "
            f"`{name}`: {problem}. Give the right LLM as `base_model`."
        )


@torch.no_grad()
def weights_digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of weights rounded to bfloat16, since an LLM may be trained in one precision and used in another."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        tensor = tensor.bfloat16() if tensor.is_floating_point() else tensor
        digest.update(f"{name}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_quantized(llm: Any) -> bool:
    config = getattr(getattr(llm, "config", None), "quantization_config", None)
    return config is not None and bool(getattr(llm, "is_quantized", False))


def check_ids(input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, max_length: int | None) -> None:
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        got = input_ids.dtype if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"`input_ids` must be an int64 or int32 tensor, got {got}.")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"`input_ids` must have shape (batch, length), neither 0, got {tuple(input_ids.shape)}.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}."
        )
    if max_length is not None and input_ids.shape[1] > max_length:
        raise ValueError(
            f"`input_ids` has {input_ids.shape[1]} tokens, more than the {max_length} that the LLM can take. Truncate "
            "the text: `processor(text=...)` does."
        )


def check_llm_embeds(llm_embeds: torch.Tensor, config: LLM2CLIPConfig) -> None:
    width = config.llm_hidden_size
    if not isinstance(llm_embeds, torch.Tensor) or not llm_embeds.is_floating_point():
        got = llm_embeds.dtype if isinstance(llm_embeds, torch.Tensor) else type(llm_embeds).__name__
        raise ValueError(
            f"`llm_embeds` must be a floating-point tensor, got {got}. Token ids are passed as `input_ids`."
        )
    if llm_embeds.ndim != 2 or llm_embeds.shape[1] != width:
        raise ValueError(
            f"`llm_embeds` must have shape (batch, {width}), got {tuple(llm_embeds.shape)}. They must come from "
            f"an LLM of width {width}, the one that the adaptor was trained with."
        )
    if llm_embeds.shape[0] == 0:
        raise ValueError(f"`llm_embeds` is an empty batch, of shape {tuple(llm_embeds.shape)}.")


def _twin_size(name: str, value: Any, heads: int) -> Any:
    """A field of a decoder's config in that of its twin."""
    if isinstance(value, list):
        return [_twin_size(name, each, heads) for each in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name in ("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "num_kv_heads"):
        return _TWIN_HEADS if value >= heads else min(value, _TWIN_HEADS // 2)
    if name.endswith(("token_id", "token_index")):
        return 0 if name.startswith("pad") else 1
    size = next((size for part, size in _TWIN_SIZES if re.search(part, name)), None)
    return value if size is None else min(value, size)


def _field(config: Any, name: str) -> Any:
    """A field by its common name; also one that differs from layer to layer, which a config does not give."""
    return vars(config).get(config.attribute_map.get(name, name))


def _twin_config(config: Any, layers: int) -> Any:
    """The config of a small decoder of the same kind: kinds of layers, attention, positions and routing stay."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    heads, head_width, width = (_field(config, name) for name in ("num_attention_heads", "head_dim", "hidden_size"))
    small, depth = _TWIN_HEADS * (head_width or width // heads), config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, (list, tuple)) and len(value) == depth:
            value = value[:layers]
        if isinstance(value, int) and "shared_layers" in name:
            value = min(value, layers // 3)
        vars(config)[name] = small if value == width and "position" not in name else _twin_size(name, value, heads)
    config.num_hidden_layers = layers
    # Layers that differ from the others in such a field, as those with global attention of Gemma 4.
    per_layer: dict[int, Any] = getattr(getattr(config, "_heterogeneity_spec", None), "per_layer_overrides", {})
    for layer, overrides in list(per_layer.items()):
        overrides.update({name: _twin_size(name, value, heads) for name, value in overrides.items()})
        if layer >= layers:
            del per_layer[layer]
    if hasattr(config, "mamba_d_head"):
        config.mamba_n_heads = config.mamba_expand * small // config.mamba_d_head
    return config


def _twin(text_model: Any, layers: int) -> Any:
    """
    A small decoder with random float32 weights on the CPU, of the class and the config of an LLM: what it does of
    attention and padding, the LLM does, whose own weights would hide it behind rounding.
    """
    config = _twin_config(text_model.config.get_text_config(), layers)
    model_class: Any = type(text_model) if isinstance(text_model, PreTrainedModel) else MODEL_MAPPING[type(config)]
    attention = text_model.config._attn_implementation
    if attention not in ("eager", "sdpa"):  # others need an accelerator
        attention = "sdpa" if model_class._supports_sdpa else "eager"
    config._attn_implementation = attention
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            return model_class(config).eval()
    finally:
        torch.set_default_dtype(dtype)


def _find_twin_fault(text_model: Any) -> str | None:
    """What `_find_fault` says of the twin of few layers and, where that fails or is causal, of one of all layers."""
    config = text_model.config.get_text_config()
    if _field(config, "num_attention_heads") is None:
        return f"{_CAUSAL}: it has no attention heads. {_USE}"
    if config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False):
        return f"{_CAUSAL}: its ALiBi ranks a later token the higher the further away it is. {_USE}"
    depth = config.num_hidden_layers
    lists = [value for value in vars(config).values() if isinstance(value, (list, tuple)) and len(value) == depth]
    kinds = [str(kind) for kind in zip(*lists)]
    # As many layers as show each of their kinds.
    layers = min(depth, max(_TWIN_LAYERS, 1 + max(map(kinds.index, kinds), default=0)))
    try:
        fault = _find_fault(_twin(text_model, layers))
    except Exception:
        if layers == depth:
            raise
        fault = _CAUSAL
    if fault is None or layers == depth or not fault.startswith(_CAUSAL):
        return fault
    return _find_fault(_twin(text_model, depth))


@torch.no_grad()
def _find_fault(text_model: Any) -> str | None:
    """Why a decoder cannot be an LLM of LLM2CLIP, after its class name; `None` if it can."""
    device = text_model.device
    ids = torch.arange(1, 7, device=device).repeat(2, 1)
    ids[1, -1] += 1
    pad, mask = torch.ones(2, 3, dtype=torch.long, device=device), torch.ones_like(ids)
    layouts = {
        "without a mask": (ids, None, 0),
        "padded right": (torch.cat([ids, pad], 1), torch.cat([mask, 0 * pad], 1), 0),
        "padded left": (torch.cat([pad, ids], 1), torch.cat([0 * pad, mask], 1), 3),
    }
    states = {}
    for layout, (input_ids, attention_mask, start) in layouts.items():
        output = text_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        states[layout] = output.last_hidden_state[:, start : start + ids.shape[1]].float()
    reference = states["without a mask"]
    scale = reference.abs().amax()
    # In float32 the layouts differ by up to 1e-3 (Gemma 3n), what depends on padding by 1.5e-2 and more.
    for layout, state in states.items():
        if not (state[0, 1] - state[1, 1]).abs().amax() > 1e-6 * scale:
            return (
                f"{_CAUSAL} ({layout}): an earlier token does not see a later one although `config.is_causal` is "
                f"False. {_USE}"
            )
        if not (state - reference).abs().amax() <= 4e-3 * scale:
            return (
                f"gives other hidden states when the text is {layout} than without padding, so embeddings would "
                "depend on the batch. Use a decoder with relative positions: Llama, Qwen3, Mistral, ..."
            )
    return None


_FAULTS: dict[Any, str | None] = {}  # by class and config


def assert_bidirectional(text_model: Any) -> None:
    """
    Checks that a decoder attends in both directions, whatever the padding.

    Two texts that differ in their last token go through the model without a mask, padded right and padded left: an
    earlier token must see the difference in each layout, and the layouts must agree. This is asked of a small float32
    copy of the architecture with random weights, on the CPU, so that neither dtype, device, quantisation nor size of
    the LLM matters; of the LLM itself, in float32, only where no such copy can be built.

    Args:
        text_model (`PreTrainedModel`): The LLM, with `config.is_causal=False`; it may be on the meta device.

    Raises:
        ValueError: if it does not; architectures such as GPT-2, Bloom or Mamba ignore the setting.
    """
    name = type(text_model).__name__
    key = (type(text_model), text_model.config._attn_implementation, text_model.config.to_json_string(use_diff=False))
    try:
        if key not in _FAULTS:
            _FAULTS[key] = _find_twin_fault(text_model)
        fault = _FAULTS[key]
    except Exception as error:  # of the model's own code
        # Nothing to look at: on the meta device, or partitioned by DeepSpeed.
        if next(text_model.parameters()).is_meta or next(text_model.parameters()).numel() == 0:
            return
        if text_model.dtype != torch.float32:
            raise ValueError(
                f"No small copy of {name} can be built to see how it attends ({type(error).__name__}: {error}), and "
                f"its own weights do not show it in {text_model.dtype}. Load it in float32."
            ) from error
        training = text_model.training
        fault = _find_fault(text_model.eval())
        text_model.train(training)
    if fault is not None:
        raise ValueError(f"{name} {fault}")
