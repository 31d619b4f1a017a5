# SPDX-License-Identifier: Apache-2.0
"""OpenAI's CLIP ViT in the layouts of the original implementation, of open_clip and of transformers."""

import re
from typing import Any

from transformers import CLIPVisionConfig

from .checkpoint_files import Checkpoint
from .vision_keys import (
    HEAD_WIDTH,
    Table,
    Tower,
    check_original,
    check_stated,
    count_layers,
    num_heads,
    original_vision,
    read_sizes,
    split_fused,
    tensor,
)


_CLIP_BLOCK = r"visual\.transformer\.resblocks\.(\d+)\."
_CLIP_LAYER = r"vision_model.encoder.layers.\1."
_CLIP_TABLE: Table = (
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.ln_pre\.(weight|bias)", r"vision_model.pre_layrnorm.\1"),
    (_CLIP_BLOCK + r"ln_([12])\.(weight|bias)", _CLIP_LAYER + r"layer_norm\2.\3"),
    (_CLIP_BLOCK + r"attn\.out_proj\.(weight|bias)", _CLIP_LAYER + r"self_attn.out_proj.\2"),
    (_CLIP_BLOCK + r"mlp\.c_fc\.(weight|bias)", _CLIP_LAYER + r"mlp.fc1.\2"),
    (_CLIP_BLOCK + r"mlp\.c_proj\.(weight|bias)", _CLIP_LAYER + r"mlp.fc2.\2"),
    (r"visual\.ln_post\.(weight|bias)", r"vision_model.post_layernorm.\1"),
)
# The text tower of a CLIP, in open_clip's and in OpenAI's layout.
_CLIP_TEXT = (
    r"text\..*",
    r"transformer\..*",
    r"token_embedding\..*",
    r"ln_final\..*",
    r"positional_embedding",
    r"text_projection(\.weight)?",
    r"attn_mask",
    r"input_resolution|context_length|vocab_size",
)


def open_clip_tower(checkpoint: Checkpoint, is_start: bool) -> Tower:
    """OpenAI-style towers in training checkpoints of the original implementation, and in those of open_clip."""
    config = checkpoint.model_config or {}
    config = config.get("model_cfg", config)
    if is_start and not config:
        raise ValueError(
            f"The weights of {checkpoint.name!r} do not tell whether its activation is GELU or QuickGELU. Give its "
            "model JSON, which states `quick_gelu`."
        )
    # The towers of LLM2CLIP start from OpenAI's weights, whose activation is QuickGELU; a JSON that is silent means
    # GELU in open_clip.
    quick_gelu = bool(config.get("quick_gelu", not is_start))
    positions = tensor(checkpoint, "visual.positional_embedding", 2).shape[0]
    first = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    fields: dict[str, Any] = {
        **read_sizes(checkpoint, "visual.conv1.weight", positions),
        "num_hidden_layers": count_layers(checkpoint, "visual.transformer.resblocks."),
        "intermediate_size": tensor(checkpoint, first, 2).shape[0],
        "hidden_act": "quick_gelu" if quick_gelu else "gelu",
        "layer_norm_eps": 1e-5,
    }
    check_original(checkpoint, fields)
    fields["num_attention_heads"] = num_heads(
        checkpoint, original_vision(checkpoint), fields["hidden_size"], HEAD_WIDTH
    )
    tower = Tower(CLIPVisionConfig(**fields), "linear", start_droppable=_CLIP_TEXT)
    tower.rename(checkpoint.weights, _CLIP_TABLE)
    split_fused(
        tower,
        checkpoint.weights,
        _CLIP_BLOCK + r"attn\.in_proj_(weight|bias)",
        _CLIP_LAYER + r"self_attn.{}_proj.\2",
    )
    if "visual.proj" in checkpoint.weights:
        # A matrix that is multiplied from the right.
        tower.put("visual_projection.weight", tensor(checkpoint, "visual.proj", 2).T.contiguous(), "visual.proj")
    return tower


def transformers_clip_tower(checkpoint: Checkpoint) -> Tower:
    """The published folders in the format of transformers: a CLIP vision tower under its own names."""
    if checkpoint.config is None:
        raise ValueError(
            f"{checkpoint.name!r} has no `config.json`, which states the heads and the activation of its tower. Give "
            "the whole folder or repository."
        )
    stated = checkpoint.config.get("vision_config") or checkpoint.config
    prefix = "vision_model.encoder.layers."
    positions = tensor(checkpoint, "vision_model.embeddings.position_embedding.weight", 2).shape[0]
    found: dict[str, Any] = {
        **read_sizes(checkpoint, "vision_model.embeddings.patch_embedding.weight", positions),
        "num_hidden_layers": count_layers(checkpoint, prefix),
        "intermediate_size": tensor(checkpoint, prefix + "0.mlp.fc1.weight", 2).shape[0],
    }
    check_stated(checkpoint, stated, found, "`config.json`")
    fields = {name: stated[name] for name in ("hidden_act", "layer_norm_eps", "attention_dropout") if name in stated}
    # What a config of transformers leaves out has the default of its class.
    heads = stated.get("num_attention_heads", CLIPVisionConfig().num_attention_heads)
    if not isinstance(heads, int) or heads < 1 or found["hidden_size"] % heads:
        raise ValueError(
            f"`num_attention_heads` of the `config.json` of {checkpoint.name!r} is {heads!r}, which does not divide "
            f"the width {found['hidden_size']} of its tower. Give the `config.json` that belongs to the weights."
        )
    biased = "visual_projection.bias" in checkpoint.weights
    tower = Tower(
        CLIPVisionConfig(**found, **fields, num_attention_heads=heads), "linear_bias" if biased else "linear"
    )
    # Stored by old versions of transformers, computed by the others.
    tower.droppable = (r"vision_model\.embeddings\.position_ids",)
    ids = re.compile(tower.droppable[0])
    for key, value in checkpoint.weights.items():
        if key.startswith(("vision_model.", "visual_projection.")) and not ids.fullmatch(key):
            tower.put(key, value, key)
    return tower


__all__ = ["open_clip_tower", "transformers_clip_tower"]
