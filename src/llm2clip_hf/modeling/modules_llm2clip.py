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
"""Building blocks of LLM2CLIP: the text adaptor, the poolings, and the check that a decoder is bidirectional."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel

from .configuration_llm2clip import TEXT_POOLINGS, LLM2CLIPConfig


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
        hidden_states = llm_embeds.to(self.projection.weight.dtype)
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
def assert_bidirectional(text_model: Any) -> None:
    """
    Checks that a decoder attends in both directions, whatever the padding.

    Two texts that differ in their last token go through the model without a mask, padded right and padded left: an
    earlier token must see the difference in each layout, and the layouts must agree.

    Args:
        text_model (`PreTrainedModel`): The LLM, with `config.is_causal=False`.

    Raises:
        ValueError: if it does not; architectures such as GPT-2, Bloom or Mamba ignore the setting.
    """
    name = type(text_model).__name__
    device = text_model.get_input_embeddings().weight.device
    vocab_size = text_model.config.get_text_config().vocab_size
    text = torch.arange(1, 7, device=device) * 31 % (vocab_size - 2) + 1
    changed = text.clone()
    changed[-1] = text[-1] % (vocab_size - 1) + 1
    ids, pad = torch.stack([text, changed]), torch.ones(2, 3, dtype=torch.long, device=device)
    mask = torch.ones_like(ids)
    layouts = {
        "without a mask": (ids, None, 0),
        "padded right": (torch.cat([ids, pad], 1), torch.cat([mask, 0 * pad], 1), 0),
        "padded left": (torch.cat([pad, ids], 1), torch.cat([0 * pad, mask], 1), 3),
    }
    training = text_model.training
    text_model.eval()
    states = {}
    for layout, (input_ids, attention_mask, start) in layouts.items():
        output = text_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        states[layout] = output.last_hidden_state[:, start : start + ids.shape[1]].float()
    text_model.train(training)
    reference = states["without a mask"]
    scale = reference.abs().amax()
    # The layouts differ by rounding only: far below this, in full as in half precision.
    tolerance = 1e-3 if text_model.dtype == torch.float32 else 1e-1
    for layout, state in states.items():
        if not (state[0, 1] - state[1, 1]).abs().amax() > 1e-6 * scale:
            raise ValueError(
                f"{name} attends causally ({layout}): an earlier token does not see a later one although "
                "`config.is_causal` is False. Use a decoder that honours it, for example Llama, Qwen3, Mistral, Gemma "
                "or Phi-3."
            )
        if (state - reference).abs().amax() > tolerance * scale:
            raise ValueError(
                f"{name} gives other hidden states when the text is {layout} than without padding, so embeddings "
                "would depend on the batch. Use a decoder with relative positions: Llama, Qwen3, Mistral, ..."
            )


def measure_vision_width(config: LLM2CLIPConfig) -> int:
    """Width of the pooled vector of a tower whose config does not state it, found on the meta device."""
    vision_config = config.vision_config
    size = getattr(vision_config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    with torch.device("meta"), torch.no_grad():
        tower = AutoModel.from_config(vision_config).eval()
        outputs = tower(torch.empty(1, getattr(vision_config, "num_channels", 3), height, width))
        return pool_image(outputs, config, height, width).shape[-1]


def pool_image(outputs: Any, config: LLM2CLIPConfig, height: int, width: int) -> torch.Tensor:
    """One vector per image, `(batch, vision_hidden_size)`, as `config.vision_pooling` says."""
    if config.vision_pooling == "pooler":
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None:
            raise ValueError(
                f"The vision tower {config.vision_config.model_type!r} gives no pooled output, so "
                "`vision_pooling='pooler'` cannot be used. Set `vision_pooling` to 'cls' or 'mean'."
            )
        return pooled.flatten(1)
    states = outputs.last_hidden_state
    if states.ndim == 4 and config.vision_pooling == "mean":  # convolutional: (batch, channels, height, width)
        return states.mean((2, 3))
    if states.ndim != 3:
        raise ValueError(
            f"The vision tower {config.vision_config.model_type!r} gives states of shape {tuple(states.shape)}, which "
            f"have no tokens, so `vision_pooling={config.vision_pooling!r}` cannot be used. Set it to 'pooler' or "
            "'mean'."
        )
    if config.vision_pooling == "cls":
        return states[:, 0]
    # Class and register tokens come first; the mean is over patches.
    patch = getattr(config.vision_config, "patch_size", None)
    if patch is not None:
        patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
        num_patches = (height // patch_height) * (width // patch_width)
        states = states[:, max(states.shape[1] - num_patches, 0) :]
    return states.mean(1)


__all__ = ["LLM2CLIPTextAdapter", "assert_bidirectional", "measure_vision_width", "pool_image", "pool_text"]
