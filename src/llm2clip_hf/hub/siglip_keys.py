# SPDX-License-Identifier: Apache-2.0
"""The SigLIP ViT of timm, as the original implementation and open_clip hold it."""

from typing import Any

import torch
from transformers import SiglipVisionConfig

from .checkpoint_files import Checkpoint
from .vision_keys import (
    HEAD_WIDTH,
    Table,
    Tower,
    check_original,
    count_layers,
    num_heads,
    original_vision,
    read_sizes,
    split_fused,
    tensor,
)


# Widths of an attention head of So400m and of gopt; they are in no weight.
_HEAD_WIDTHS = {1152: 72, 1536: 96}
# (width, patch, image) of the towers to which timm gives the tanh approximation of GELU. All its others, So400m/14
# among them, run with the exact one, unlike in transformers.
_TANH_GELU = {
    (768, 32, 256),
    (1024, 16, 512),
    (1152, 16, 256),
    (1152, 16, 384),
    (1152, 16, 512),
    (1536, 16, 256),
    (1536, 16, 384),
}
_SIGLIP_BLOCK = r"visual\.trunk\.blocks\.(\d+)\."
_SIGLIP_LAYER = r"vision_model.encoder.layers.\1."
_SIGLIP_TABLE: Table = (
    (r"visual\.trunk\.patch_embed\.proj\.(weight|bias)", r"vision_model.embeddings.patch_embedding.\1"),
    (_SIGLIP_BLOCK + r"norm([12])\.(weight|bias)", _SIGLIP_LAYER + r"layer_norm\2.\3"),
    (_SIGLIP_BLOCK + r"attn\.proj\.(weight|bias)", _SIGLIP_LAYER + r"self_attn.out_proj.\2"),
    (_SIGLIP_BLOCK + r"mlp\.(fc[12])\.(weight|bias)", _SIGLIP_LAYER + r"mlp.\2.\3"),
    (r"visual\.trunk\.norm\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    (r"visual\.trunk\.attn_pool\.latent", "vision_model.head.probe"),
    (r"visual\.trunk\.attn_pool\.proj\.(weight|bias)", r"vision_model.head.attention.out_proj.\1"),
    (r"visual\.trunk\.attn_pool\.norm\.(weight|bias)", r"vision_model.head.layernorm.\1"),
    (r"visual\.trunk\.attn_pool\.mlp\.(fc[12])\.(weight|bias)", r"vision_model.head.mlp.\1.\2"),
    (r"visual\.head\.proj\.(weight|bias)", r"visual_projection.\1"),
)


def siglip_tower(checkpoint: Checkpoint) -> Tower:
    """The SigLIP2 tower of the original implementation: timm's ViT with attention pooling; no projection, usually."""
    positions = tensor(checkpoint, "visual.trunk.pos_embed", 3)
    fields: dict[str, Any] = {
        **read_sizes(checkpoint, "visual.trunk.patch_embed.proj.weight", positions.shape[1], has_class_token=False),
        "num_hidden_layers": count_layers(checkpoint, "visual.trunk.blocks."),
        "intermediate_size": tensor(checkpoint, "visual.trunk.blocks.0.mlp.fc1.weight", 2).shape[0],
    }
    check_original(checkpoint, fields)
    width = fields["hidden_size"]
    fields["num_attention_heads"] = num_heads(
        checkpoint, original_vision(checkpoint), width, _HEAD_WIDTHS.get(width, HEAD_WIDTH)
    )
    approximate = (width, fields["patch_size"], fields["image_size"]) in _TANH_GELU
    fields["hidden_act"] = "gelu_pytorch_tanh" if approximate else "gelu"
    tower = Tower(SiglipVisionConfig(**fields), "none", start_droppable=(r"text\..*",))
    tower.rename(checkpoint.weights, _SIGLIP_TABLE)
    split_fused(
        tower,
        checkpoint.weights,
        _SIGLIP_BLOCK + r"attn\.qkv\.(weight|bias)",
        _SIGLIP_LAYER + r"self_attn.{}_proj.\2",
    )
    name = "vision_model.embeddings.position_embedding.weight"
    tower.put(name, positions[0], "visual.trunk.pos_embed")
    for kind in ("weight", "bias"):
        # torch's attention module, which transformers uses for pooling, holds the three projections as one.
        keys = [f"visual.trunk.attn_pool.{part}.{kind}" for part in ("q", "kv")]
        if all(key in checkpoint.weights for key in keys):
            fused = torch.cat([checkpoint.weights[key] for key in keys])
            tower.put(f"vision_model.head.attention.in_proj_{kind}", fused, *keys)
    if "visual_projection.weight" in tower.weights:
        tower.projection = "linear_bias" if "visual_projection.bias" in tower.weights else "linear"
    return tower


__all__ = ["siglip_tower"]
