# Copyright 2026 The llm2clip_hf authors.
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The EVA02 vision tower (arXiv 2303.11331), and the post-norm EVA ViT-E (arXiv 2303.15389)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.clip.modeling_clip import eager_attention_forward
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_eva02 import Eva02VisionConfig


# Cosines and sines, each `(tokens, head_dim)`.
Rotary = tuple[torch.Tensor, torch.Tensor]


def rotary_table(
    height: int, width: int, head_dim: int, base: float, grid_size: int, device: torch.device | None = None
) -> Rotary:
    """
    Cosines and sines of the 2-D rotary positions of a grid of patches.

    The first half of the channels turns with the row, the second half with the column. Row `i` of `height` counts as
    position `i / height * grid_size`, so every grid spans the one of pretraining; columns likewise. Channels `2k` and
    `2k + 1` of a half turn together, by `position / base**(4k / head_dim)`.
    """
    axis_dim = head_dim // 2
    frequencies = 1.0 / base ** (torch.arange(0, axis_dim, 2, dtype=torch.float32, device=device) / axis_dim)
    rows = torch.arange(height, dtype=torch.float32, device=device) / height * grid_size
    columns = torch.arange(width, dtype=torch.float32, device=device) / width * grid_size
    row_angles = (rows[:, None] * frequencies).repeat_interleave(2, -1)  # (height, axis_dim)
    column_angles = (columns[:, None] * frequencies).repeat_interleave(2, -1)  # (width, axis_dim)
    angles = torch.cat(
        [
            row_angles[:, None].expand(height, width, axis_dim),
            column_angles[None].expand(height, width, axis_dim),
        ],
        -1,
    ).reshape(height * width, head_dim)
    return angles.cos(), angles.sin()


def apply_rotary(states: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turns adjacent channel pairs of `states` `(..., tokens, head_dim)`, in float32."""
    cos, sin = rotary
    values = states.float()
    even, odd = values.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return (values * cos + turned * sin).to(states.dtype)


class Eva02VisionEmbeddings(nn.Module):
    """Patches and a class token, with learned absolute positions."""

    def __init__(self, config: Eva02VisionConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.patch_size = config.patch_size
        self.grid_size = config.image_size // config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.grid_size**2 + 1, config.hidden_size))

    def _positions(self, height: int, width: int) -> torch.Tensor:
        if (height, width) == (self.grid_size, self.grid_size):
            return self.position_embeddings
        cls_position, patches = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        grid = patches.unflatten(1, (self.grid_size, self.grid_size)).permute(0, 3, 1, 2)
        # In float32: in half precision, resampling shifts the positions.
        grid = F.interpolate(grid.float(), size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([cls_position, grid.flatten(2).transpose(1, 2).to(patches.dtype)], 1)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        height, width = pixel_values.shape[-2:]
        if not interpolate_pos_encoding and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"Images of {height} x {width} pixels do not have the size of this tower, {self.image_size} x "
                f"{self.image_size}. Resize them, or pass `interpolate_pos_encoding=True`."
            )
        if min(height, width) < self.patch_size:
            raise ValueError(
                f"Images of {height} x {width} pixels hold no patch of {self.patch_size} x {self.patch_size}. Resize "
                "them."
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        positions = self._positions(patches.shape[-2], patches.shape[-1])
        patches = patches.flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], 1) + positions


class Eva02VisionOutputLinear(nn.Linear):
    """The last layer of a residual branch in block `depth` (from 1); it starts smaller the deeper it is."""

    def __init__(self, in_features: int, out_features: int, depth: int) -> None:
        self.depth = depth
        super().__init__(in_features, out_features)


class Eva02VisionAttention(nn.Module):
    """Self-attention with a bias on queries and values only, rotary positions and an inner LayerNorm."""

    def __init__(self, config: Eva02VisionConfig, depth: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        # Read by the attention functions of transformers.
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.inner_norm: nn.Module = nn.Identity()
        if config.sub_norm:
            self.inner_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.out_proj = Eva02VisionOutputLinear(config.hidden_size, config.hidden_size, depth)

    def forward(
        self, hidden_states: torch.Tensor, rotary: Rotary | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, tokens, _ = hidden_states.shape
        shape = (batch, tokens, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if rotary is not None:
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        states, weights = attention(
            self,
            query,
            key,
            value,
            None,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            **kwargs,
        )
        return self.out_proj(self.inner_norm(states.reshape(batch, tokens, -1))), weights


class Eva02VisionMLP(nn.Module):
    """`W3 LN(SiLU(W1 x) * (W2 x))` or, without SwiGLU, `W3 LN(GELU(W2 x))`; the LayerNorm only with `sub_norm`."""

    def __init__(self, config: Eva02VisionConfig, depth: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size) if config.use_swiglu else None
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.inner_norm: nn.Module = nn.Identity()
        if config.sub_norm:
            self.inner_norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.down_proj = Eva02VisionOutputLinear(config.intermediate_size, config.hidden_size, depth)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raised = self.up_proj(hidden_states)
        raised = F.gelu(raised) if self.gate_proj is None else F.silu(self.gate_proj(hidden_states)) * raised
        return self.down_proj(self.inner_norm(raised))


class Eva02VisionLayer(GradientCheckpointingLayer):
    """A block: attention and MLP, each with a residual and a LayerNorm before it or, with `post_norm`, after it."""

    def __init__(self, config: Eva02VisionConfig, depth: int) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Eva02VisionAttention(config, depth)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Eva02VisionMLP(config, depth)

    def forward(self, hidden_states: torch.Tensor, rotary: Rotary | None = None, **kwargs: Any) -> torch.Tensor:
        if self.post_norm:
            attended, _ = self.self_attn(hidden_states, rotary, **kwargs)
            hidden_states = hidden_states + self.layer_norm1(attended)
            return hidden_states + self.layer_norm2(self.mlp(hidden_states))
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), rotary, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class Eva02VisionModel(PreTrainedModel):
    r"""
    The EVA02 vision tower, or with the settings of `EVA02-CLIP-bigE-14` the EVA ViT-E.

    In [`LLM2CLIPModel`] it is used with `vision_projection="linear_bias"`: the head of the original, with its bias.

    Args:
        config ([`Eva02VisionConfig`]): The configuration.

    Example:

    ```python
    >>> config = Eva02VisionConfig(
    ...     hidden_size=24, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3, image_size=30,
    ...     patch_size=6,
    ... )
    >>> Eva02VisionModel(config).eval()(torch.zeros(2, 3, 30, 30)).pooler_output.shape
    torch.Size([2, 24])

    ```
    """

    config: Eva02VisionConfig
    config_class = Eva02VisionConfig
    base_model_prefix = "eva02_vision"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["Eva02VisionEmbeddings", "Eva02VisionLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Eva02VisionLayer, "attentions": Eva02VisionAttention}

    def __init__(self, config: Eva02VisionConfig) -> None:
        super().__init__(config)
        self.embeddings = Eva02VisionEmbeddings(config)
        self.layers = nn.ModuleList(Eva02VisionLayer(config, 1 + i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Modules without parameters of their own, such as this one, are not offered here.
        std = self.config.initializer_range
        if isinstance(module, Eva02VisionEmbeddings):
            init.normal_(module.cls_token, std=std)
            init.normal_(module.position_embeddings, std=std)
        elif isinstance(module, Eva02VisionOutputLinear):
            # As in the original: what a block adds to the residual shrinks with its depth.
            init.normal_(module.weight, std=std / (2 * module.depth) ** 0.5)

    def _rotary(self, height: int, width: int, device: torch.device) -> Rotary | None:
        config = self.config
        if not config.use_rotary:
            return None
        head_dim = config.hidden_size // config.num_attention_heads
        rows, columns = height // config.patch_size, width // config.patch_size
        cos, sin = rotary_table(rows, columns, head_dim, config.rotary_base, config.rotary_grid_size, device)
        # The class token is not turned. Computed, not stored: there is no buffer that loading could leave undefined.
        return torch.cat([torch.ones_like(cos[:1]), cos]), torch.cat([torch.zeros_like(sin[:1]), sin])

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        r"""
        Embeds images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, num_channels, height, width)`): Normalised images.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Accept other sizes than `config.image_size`: the learned positions are resampled (bicubic), the rotary
                ones rescaled.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` of shape `(batch, patches + 1, hidden_size)`, class token
            first, after the final LayerNorm; `pooler_output` of shape `(batch, hidden_size)`, the class token of it.

        Raises:
            ValueError: for images of another size without `interpolate_pos_encoding`, or smaller than a patch.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        rotary = self._rotary(pixel_values.shape[-2], pixel_values.shape[-1], hidden_states.device)
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotary, **kwargs)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0])


Eva02VisionModel.register_for_auto_class("AutoModel")
# For the class that the type stands for, too: it may come from another copy of the configuration file.
for _config_class in (Eva02VisionConfig, CONFIG_MAPPING[Eva02VisionConfig.model_type]):
    AutoModel.register(_config_class, Eva02VisionModel, exist_ok=True)
