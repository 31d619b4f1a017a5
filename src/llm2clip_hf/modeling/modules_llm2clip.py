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
"""Building blocks of LLM2CLIP: the text adaptor, the poolings, and what is checked of an LLM's weights."""

import hashlib
import importlib
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedModel

from .configuration_llm2clip import TEXT_POOLINGS, LLM2CLIPConfig


# What `sampled_weights_digest` looks at.
SAMPLES_PER_PARAMETER = 16
SAMPLED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Towers without patches of a stated size that put a pooled or class token before the tokens of the image.
POOLED_TOKEN_FIRST = ("dinov3_convnext", "pvt")


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
        plain = parameter.dtype in SAMPLED_DTYPES and not parameter.is_meta and not hasattr(parameter, "placements")
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


def vision_class(vision_config: Any) -> Any:
    """
    The class of a vision tower, also where the Auto classes of transformers leave it out (AltCLIP, BLIP, MetaCLIP 2).
    """
    config_class = type(vision_config)
    if config_class not in MODEL_MAPPING:
        module = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
        found = [name for name in dir(module) if name.endswith("VisionModel")]
        found = [name for name in found if getattr(getattr(module, name), "config_class", None) is config_class]
        if not found:
            raise ValueError(
                f"transformers has no model of images alone for a config of type {vision_config.model_type!r}. Use a "
                "vision backbone, such as CLIP, SigLIP, DINOv2, ViT, Swin or ConvNeXt."
            )
        AutoModel.register(config_class, getattr(module, found[0]), exist_ok=True)
    return MODEL_MAPPING[config_class]


def pooler_options(vision_config: Any, pooling: str) -> dict[str, Any]:
    """Keywords that leave out a tower's pooler where its output is not used, and checkpoints often have none (ViT)."""
    parameters = inspect.signature(vision_class(vision_config).__init__).parameters
    return {"add_pooling_layer": False} if pooling != "pooler" and "add_pooling_layer" in parameters else {}


def build_vision_tower(config: LLM2CLIPConfig) -> Any:
    """A new vision tower, with no more than its pooling needs."""
    return AutoModel.from_config(config.vision_config, **pooler_options(config.vision_config, config.vision_pooling))


def _num_patches(vision_config: Any, height: int, width: int) -> int | None:
    patch = getattr(vision_config, "patch_size", None)
    if patch is None:
        return None
    patch = getattr(vision_config, "patch_stride", None) or patch  # where patches overlap (Hiera)
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    return (height // patch_height) * (width // patch_width)


def num_prefix_tokens(vision_config: Any, num_tokens: int, height: int, width: int) -> int:
    """How many of a tower's tokens stand before those of the image: class, register and pooled tokens."""
    patches = _num_patches(vision_config, height, width)
    if patches is None:
        return int(vision_config.model_type in POOLED_TOKEN_FIRST)
    # A tower that merges patches has fewer tokens than patches, and none before them.
    return max(num_tokens - patches, 0)


def pool_image(
    outputs: Any, config: LLM2CLIPConfig, height: int, width: int, patch_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """One vector per image."""
    name, pooling = config.vision_config.model_type, config.vision_pooling
    if pooling == "pooler":
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None:
            raise ValueError(
                f"The vision tower {name!r} gives no pooled output, so `vision_pooling='pooler'` cannot be used. Set "
                "`vision_pooling` to 'cls' or 'mean'."
            )
        return pooled.flatten(1)
    states = getattr(outputs, "last_hidden_state", None)
    if states is not None and states.ndim == 4 and pooling == "mean":  # (batch, channels, height, width)
        return states.mean((2, 3))
    if states is None or states.ndim != 3:
        shape = None if states is None else tuple(states.shape)
        raise ValueError(
            f"The vision tower {name!r} gives states of shape {shape}, which have no tokens, so "
            f"`vision_pooling={pooling!r}` cannot be used. Set it to 'pooler' or 'mean'."
        )
    if pooling == "cls":
        return states[:, 0]
    if patch_mask is not None:
        weights = patch_mask.to(states.dtype).unsqueeze(-1)
        return (states * weights).sum(1) / weights.sum(1)
    return states[:, num_prefix_tokens(config.vision_config, states.shape[1], height, width) :].mean(1)


__all__ = [
    "LLM2CLIPTextAdapter",
    "build_vision_tower",
    "check_text_fingerprint",
    "num_prefix_tokens",
    "pool_image",
    "pool_text",
    "pooler_options",
    "same_sampled_weights",
    "sampled_weights",
    "sampled_weights_digest",
    "vision_class",
]
