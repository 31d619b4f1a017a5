# SPDX-License-Identifier: Apache-2.0
"""Vision towers of published checkpoints: their sizes from the shapes, their weights under our names."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CLIPVisionConfig, PreTrainedConfig, SiglipVisionConfig

from llm2clip_hf.modeling import Eva02VisionConfig
from llm2clip_hf.modeling.modeling_eva02 import rotary_table

from .checkpoint_files import Checkpoint


# Width of an attention head where neither the weights nor a config tell it: 64, but in EVA g/14, EVA ViT-E/14
# (reference: their published configs) and SigLIP So400m.
_HEAD_WIDTHS = {1408: 88, 1792: 112}
_SIGLIP_HEAD_WIDTHS = {1152: 72}
_HEAD_WIDTH = 64
# Pairs (pattern, replacement); a key is renamed by the first pattern that matches the whole of it.
Table = Sequence[tuple[str, str]]


@dataclass
class Tower:
    """
    A vision tower found in a checkpoint.

    Args:
        config (`PreTrainedConfig`): Its config.
        projection (`str`): `vision_projection` of the model.
        weights (`dict[str, torch.Tensor]`): Weights under our names, projection included.
        source_keys (`set[str]`): The keys they came from.
        droppable (`tuple[str, ...]`): Patterns of keys that carry nothing that is not computed.
        start_droppable (`tuple[str, ...]`):
            Patterns of keys that a starting tower, a checkpoint without a text adaptor, leaves behind.
    """

    config: PreTrainedConfig
    projection: str
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    source_keys: set[str] = field(default_factory=set)
    droppable: tuple[str, ...] = ()
    start_droppable: tuple[str, ...] = ()

    def rename(self, weights: dict[str, torch.Tensor], table: Table) -> None:
        """Takes every weight that `table` knows."""
        for key, value in weights.items():
            for pattern, replacement in table:
                if re.fullmatch(pattern, key):
                    self.put(re.sub(f"^{pattern}$", replacement, key), value, key)
                    break

    def put(self, name: str, value: torch.Tensor, *keys: str) -> None:
        self.weights[name] = value
        self.source_keys.update(keys)


def tensor(checkpoint: Checkpoint, key: str, ndim: int) -> torch.Tensor:
    """A weight from whose shape a size is read."""
    value = checkpoint.weights.get(key)
    if value is None:
        raise ValueError(f"{checkpoint.name!r} has no weight `{key}`, so it is incomplete or of another kind.")
    if value.ndim != ndim or 0 in value.shape:
        raise ValueError(f"`{key}` must have {ndim} dimensions, none empty, got shape {tuple(value.shape)}.")
    return value


def count_layers(checkpoint: Checkpoint, prefix: str) -> int:
    """Highest number after `prefix`, plus one; a layer that is absent shows later as missing weights."""
    numbers = [int(m[1]) for key in checkpoint.weights if (m := re.match(re.escape(prefix) + r"(\d+)\.", key))]
    if not numbers:
        raise ValueError(f"{checkpoint.name!r} has no weights `{prefix}*`, so it is incomplete or of another kind.")
    return max(numbers) + 1


def _sizes(checkpoint: Checkpoint, patches: str, positions: int, has_class_token: bool = True) -> dict[str, int]:
    """Sizes that a patch convolution `(width, channels, patch, patch)` and a number of positions tell."""
    width, channels, patch, patch_width = tensor(checkpoint, patches, 4).shape
    grid = math.isqrt(positions - has_class_token)
    if patch != patch_width or grid < 1 or grid * grid != positions - has_class_token:
        raise ValueError(
            f"Only square images and patches can be converted, got patches of {patch} x {patch_width} pixels and "
            f"{positions} positions in {checkpoint.name!r}."
        )
    return {"hidden_size": width, "num_channels": channels, "patch_size": patch, "image_size": grid * patch}


def _original(checkpoint: Checkpoint) -> dict[str, Any]:
    """`vision_cfg` of the original model JSON, where there is one."""
    config = checkpoint.model_config or {}
    config = config.get("model_cfg", config)
    return dict(config.get("vision_cfg", {}))


def _num_heads(checkpoint: Checkpoint, width: int, default: int) -> int:
    stated = _original(checkpoint)
    head_width = stated.get("head_width", width // stated["heads"] if stated.get("heads") else default)
    if not isinstance(head_width, int) or head_width < 1 or width % head_width:
        raise ValueError(
            f"Heads of width {head_width} do not divide the width {width} of the tower in {checkpoint.name!r}. Give "
            "the original model JSON, which states `head_width`."
        )
    return width // head_width


def _check_stated(checkpoint: Checkpoint, stated: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """What a config says of a size must be what the shapes say."""
    wrong = [
        f"`{name}` is {stated[name]!r} but {value!r} in the weights"
        for name, value in found.items()
        if stated.get(name) is not None and stated[name] != value
    ]
    if wrong:
        raise ValueError(f"{where} does not belong to the weights of {checkpoint.name!r}: {'; '.join(wrong)}.")


def _check_original(checkpoint: Checkpoint, fields: dict[str, Any]) -> None:
    names = {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "patch_size": "patch_size",
        "image_size": "image_size",
    }
    found = {name: fields[ours] for name, ours in names.items()}
    _check_stated(checkpoint, _original(checkpoint), found, "The model JSON")


# ------------------------------------------------------------------------------------------------------- EVA towers

_EVA_BLOCK = r"visual\.blocks\.(\d+)\."
_EVA_TABLE: Table = (
    (r"visual\.cls_token", "vision_model.embeddings.cls_token"),
    (r"visual\.pos_embed", "vision_model.embeddings.position_embeddings"),
    (r"visual\.patch_embed\.proj\.(weight|bias)", r"vision_model.embeddings.patch_embedding.\1"),
    (_EVA_BLOCK + r"norm([12])\.(weight|bias)", r"vision_model.layers.\1.layer_norm\2.\3"),
    (_EVA_BLOCK + r"attn\.([qkv]_proj)\.(weight|bias)", r"vision_model.layers.\1.self_attn.\2.\3"),
    (_EVA_BLOCK + r"attn\.([qv])_bias", r"vision_model.layers.\1.self_attn.\2_proj.bias"),
    (_EVA_BLOCK + r"attn\.inner_attn_ln\.(weight|bias)", r"vision_model.layers.\1.self_attn.inner_norm.\2"),
    (_EVA_BLOCK + r"attn\.proj\.(weight|bias)", r"vision_model.layers.\1.self_attn.out_proj.\2"),
    (_EVA_BLOCK + r"mlp\.w1\.(weight|bias)", r"vision_model.layers.\1.mlp.gate_proj.\2"),
    (_EVA_BLOCK + r"mlp\.(?:w2|fc1)\.(weight|bias)", r"vision_model.layers.\1.mlp.up_proj.\2"),
    (_EVA_BLOCK + r"mlp\.ffn_ln\.(weight|bias)", r"vision_model.layers.\1.mlp.inner_norm.\2"),
    (_EVA_BLOCK + r"mlp\.(?:w3|fc2)\.(weight|bias)", r"vision_model.layers.\1.mlp.down_proj.\2"),
    (r"visual\.norm\.(weight|bias)", r"vision_model.norm.\1"),
    (r"visual\.head\.(weight|bias)", r"visual_projection.\1"),
)
_EVA_ROPE = r"visual\.(?:blocks\.\d+\.attn\.)?rope\.freqs_(?:cos|sin)"


def eva_tower(checkpoint: Checkpoint) -> Tower:
    """The EVA towers of the original implementation: EVA02 and the post-norm ViT-E, in `.pt` files."""
    weights, stated = checkpoint.weights, _original(checkpoint)
    swiglu = "visual.blocks.0.mlp.w1.weight" in weights
    rope = next((key for key in weights if re.fullmatch(_EVA_ROPE, key) and key.endswith("_cos")), None)
    rotary = rope is not None or bool(stated.get("rope") if stated else swiglu)
    first = "visual.blocks.0.mlp." + ("w1" if swiglu else "fc1") + ".weight"
    fields: dict[str, Any] = {
        **_sizes(checkpoint, "visual.patch_embed.proj.weight", tensor(checkpoint, "visual.pos_embed", 3).shape[1]),
        "num_hidden_layers": count_layers(checkpoint, "visual.blocks."),
        "intermediate_size": tensor(checkpoint, first, 2).shape[0],
        "use_rotary": rotary,
        "use_swiglu": swiglu,
        "sub_norm": "visual.blocks.0.attn.inner_attn_ln.weight" in weights,
        # Not to be seen in the weights; of the published towers, the one without rotary positions has it.
        "post_norm": bool(stated.get("postnorm") if stated else not rotary),
    }
    width = fields["hidden_size"]
    if rope is not None:
        head_width = tensor(checkpoint, rope, 2).shape[1]
        _check_stated(checkpoint, stated, {"head_width": head_width}, "The model JSON")
        if width % head_width:
            raise ValueError(f"`{rope}` is {head_width} wide, which does not divide the tower's width {width}.")
        fields["num_attention_heads"] = width // head_width
        fields["rotary_grid_size"] = _rotary_grid(checkpoint, rope, fields["image_size"] // fields["patch_size"])
    else:
        fields["num_attention_heads"] = _num_heads(checkpoint, width, _HEAD_WIDTHS.get(width, _HEAD_WIDTH))
        fields["rotary_grid_size"] = int(stated.get("pt_hw_seq_len", 16))
    _check_original(checkpoint, fields)
    tower = Tower(Eva02VisionConfig(**fields), "linear_bias", droppable=(_EVA_ROPE,))
    tower.start_droppable = (r"text\..*", r"visual\.head\..*")
    tower.rename(weights, _EVA_TABLE)
    _split(tower, weights, _EVA_BLOCK + r"attn\.qkv\.(weight)", r"vision_model.layers.\1.self_attn.{}_proj.\2")
    return tower


def _rotary_grid(checkpoint: Checkpoint, key: str, grid: int) -> int:
    """Side of the pretraining grid, from the table of rotary positions, all of which must then agree."""
    cos = tensor(checkpoint, key, 2)
    sin = checkpoint.weights.get(key.replace("freqs_cos", "freqs_sin"))
    exact = cos.dtype == torch.float32
    if sin is None or sin.shape != cos.shape or len(cos) != grid * grid:
        raise ValueError(f"`{key}` and its sines must have shape ({grid * grid}, head width), got {tuple(cos.shape)}.")
    grid_size = 16
    if grid > 1:
        # The slowest channel at the second column: its angle is below one turn for any sensible grid.
        slowest = 10000.0 ** ((cos.shape[1] // 2 - 2) / (cos.shape[1] // 2))
        angle = torch.atan2(sin[1, -1].double(), cos[1, -1].double()).item()
        grid_size = max(round(angle * slowest * grid), 1)
    for size in (grid_size, 16):  # half precision does not resolve the slowest channel
        expected = rotary_table(grid, grid, cos.shape[1], 10000.0, size)
        error = max((a - b.float()).abs().max().item() for a, b in zip(expected, (cos, sin), strict=True))
        if error <= (1e-4 if exact else 1e-2):
            return size
    raise ValueError(
        f"The rotary positions in `{key}` are not those of EVA02 (base 10000, adjacent channels paired), so the tower "
        "would not compute what it was trained for."
    )


def _split(tower: Tower, weights: dict[str, torch.Tensor], pattern: str, replacement: str) -> None:
    """Takes fused query, key and value weights apart; `{}` in `replacement` stands for `q`, `k` and `v`."""
    for key, value in weights.items():
        if not re.fullmatch(pattern, key):
            continue
        if value.shape[0] % 3:
            raise ValueError(f"`{key}` must hold queries, keys and values, got {value.shape[0]} rows.")
        for letter, part in zip("qkv", value.chunk(3), strict=True):
            tower.put(re.sub(f"^{pattern}$", replacement.format(letter), key), part, key)


# ------------------------------------------------------------------------------------------------- OpenAI's CLIP ViT

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
        **_sizes(checkpoint, "visual.conv1.weight", positions),
        "num_hidden_layers": count_layers(checkpoint, "visual.transformer.resblocks."),
        "intermediate_size": tensor(checkpoint, first, 2).shape[0],
        "hidden_act": "quick_gelu" if quick_gelu else "gelu",
        "layer_norm_eps": 1e-5,
    }
    _check_original(checkpoint, fields)
    fields["num_attention_heads"] = _num_heads(checkpoint, fields["hidden_size"], _HEAD_WIDTH)
    tower = Tower(CLIPVisionConfig(**fields), "linear", start_droppable=(*_CLIP_TEXT, r"visual\.proj"))
    tower.rename(checkpoint.weights, _CLIP_TABLE)
    _split(
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
    stated = checkpoint.config.get("vision_config") or {}
    prefix = "vision_model.encoder.layers."
    positions = tensor(checkpoint, "vision_model.embeddings.position_embedding.weight", 2).shape[0]
    found: dict[str, Any] = {
        **_sizes(checkpoint, "vision_model.embeddings.patch_embedding.weight", positions),
        "num_hidden_layers": count_layers(checkpoint, prefix),
        "intermediate_size": tensor(checkpoint, prefix + "0.mlp.fc1.weight", 2).shape[0],
    }
    _check_stated(checkpoint, stated, found, "`config.json`")
    fields = {name: stated[name] for name in ("hidden_act", "layer_norm_eps", "attention_dropout") if name in stated}
    heads = stated.get("num_attention_heads") or _num_heads(checkpoint, found["hidden_size"], _HEAD_WIDTH)
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


# ------------------------------------------------------------------------------------------------------ SigLIP of timm

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
)


def siglip_tower(checkpoint: Checkpoint) -> Tower:
    """The SigLIP2 tower of the original implementation, timm's ViT with attention pooling and no projection."""
    positions = tensor(checkpoint, "visual.trunk.pos_embed", 3)
    fields: dict[str, Any] = {
        **_sizes(checkpoint, "visual.trunk.patch_embed.proj.weight", positions.shape[1], has_class_token=False),
        "num_hidden_layers": count_layers(checkpoint, "visual.trunk.blocks."),
        "intermediate_size": tensor(checkpoint, "visual.trunk.blocks.0.mlp.fc1.weight", 2).shape[0],
    }
    width = fields["hidden_size"]
    heads = _num_heads(checkpoint, width, _SIGLIP_HEAD_WIDTHS.get(width, _HEAD_WIDTH))
    tower = Tower(SiglipVisionConfig(**fields, num_attention_heads=heads), "none")
    # The LLM of the online setting: named by the user, never taken from here.
    tower.droppable = (r"text\.text\.model\..*",)
    tower.start_droppable = (r"text\..*",)
    tower.rename(checkpoint.weights, _SIGLIP_TABLE)
    _split(
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
    return tower


__all__ = [
    "Tower",
    "count_layers",
    "eva_tower",
    "open_clip_tower",
    "siglip_tower",
    "tensor",
    "transformers_clip_tower",
]
