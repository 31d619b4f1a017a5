# SPDX-License-Identifier: Apache-2.0
"""EVA towers, EVA02 and the ViT-E before it, in every layout that they come in.

The original implementation keeps them in `.pt` files, open_clip as towers of timm, and folders with remote code under
names like those of CLIP in transformers. The layouts differ in names only, so one table knows them all: a key is told
by what stands at its end, and no key that the table does not know is let through.
"""

import re
from typing import Any

import torch

from ..modeling import Eva02VisionConfig
from ..modeling.modeling_eva02 import rotary_table
from .checkpoint_files import Checkpoint
from .vision_keys import Table, Tower, check_original, check_stated, num_heads, original_vision, read_sizes, tensor


_ROOT = r"(?:(?:visual|vision_model|vision_tower|trunk)\.)*"
_BLOCK = _ROOT + r"(?:blocks|layers|encoder\.layers)\.(\d+)\."
_ATTENTION = _BLOCK + r"(?:attn|self_attn)\."
_LAYER = r"vision_model.layers.\1."
_CLASS_TOKEN = "vision_model.embeddings.cls_token"
_POSITIONS = "vision_model.embeddings.position_embeddings"
_PATCHES = "vision_model.embeddings.patch_embedding."
_EMBEDDINGS: Table = (
    (_ROOT + r"(?:embeddings\.)?(?:cls_token|class_embedding)", _CLASS_TOKEN),
    (_ROOT + r"(?:embeddings\.)?(?:pos_embed|position_embeddings?(?:\.weight)?)", _POSITIONS),
    (_ROOT + r"(?:embeddings\.)?(?:patch_embed\.proj|patch_embedding)\.(weight|bias)", _PATCHES + r"\1"),
)
_TABLE: Table = (
    *_EMBEDDINGS,
    (_BLOCK + r"(?:layer_)?norm([12])\.(weight|bias)", _LAYER + r"layer_norm\2.\3"),
    (_ATTENTION + r"qkv\.(weight)", _LAYER + r"self_attn.{}_proj.\2"),
    (_ATTENTION + r"([qkv]_proj)\.(weight|bias)", _LAYER + r"self_attn.\2.\3"),
    (_ATTENTION + r"([qv])_bias", _LAYER + r"self_attn.\2_proj.bias"),
    (_ATTENTION + r"(?:inner_attn_ln|norm)\.(weight|bias)", _LAYER + r"self_attn.inner_norm.\2"),
    (_ATTENTION + r"(?:out_)?proj\.(weight|bias)", _LAYER + r"self_attn.out_proj.\2"),
    (_BLOCK + r"mlp\.(?:ffn_ln|norm)\.(weight|bias)", _LAYER + r"mlp.inner_norm.\2"),
    (_ROOT + r"(?:norm|post_layernorm)\.(weight|bias)", r"vision_model.norm.\1"),
    (_ROOT + r"(?:head|visual_projection)\.(weight|bias)", r"visual_projection.\1"),
)
# The layers of a block's MLP by their names in each layout: gate, up and down of a SwiGLU; up and down of an MLP.
_MLPS = (
    {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"},
    {"fc1_g": "gate_proj", "fc1_x": "up_proj", "fc2": "down_proj"},
    {"fc1": "gate_proj", "fc2": "up_proj", "fc3": "down_proj"},
    {"fc1": "up_proj", "fc2": "down_proj"},
)
_MLP = _BLOCK + r"mlp\.(\w+)\.(weight|bias)"
_ROPE = r"(?:.*\.)?rope\.freqs_(?:cos|sin)"
# What configs of the remote code say, by the names of the original's.
_ALIASES = {
    "use_rope": "rope",
    "post_layernorm": "postnorm",
    "pretrained_seq_len": "pt_hw_seq_len",
    "num_attention_heads": "heads",
}


def is_eva(weights: dict[str, torch.Tensor]) -> bool:
    """A class token and a patch embedding with a bias: CLIP has no such bias, SigLIP no class token."""
    tower = Tower(Eva02VisionConfig(), "none")
    tower.rename(weights, _EMBEDDINGS)
    return {_CLASS_TOKEN, _PATCHES + "bias"} <= tower.weights.keys()


def eva_tower(checkpoint: Checkpoint) -> Tower:
    """
    Reads an EVA tower; see the module.

    Heads, rotary positions and the place of the norms come from the rotary tables, else from the JSON or `config.json`
    that came along, else they are those of the published towers.
    """
    weights, stated = checkpoint.weights, _stated(checkpoint)
    tower = Tower(Eva02VisionConfig(), "linear_bias", droppable=(_ROPE, r"(?:.*\.)?position_ids"))
    tower.start_droppable = (r"text\..*", r"text_(?:model|projection)\..*")
    tower.rename(weights, _TABLE)
    swiglu = _rename_mlps(tower, weights)
    ours = Checkpoint(checkpoint.name, _with_all_axes(tower), model_config=checkpoint.model_config)
    rope = next((key for key in weights if re.fullmatch(_ROPE, key) and key.endswith("_cos")), None)
    # In a JSON of the original, silence means no; otherwise SwiGLU means EVA02, which has rotary positions.
    rotary = rope is not None or bool(stated.get("rope", swiglu))
    positions = tensor(ours, _POSITIONS, 3).shape[1]
    fields: dict[str, Any] = {
        **read_sizes(ours, _PATCHES + "weight", positions, "vision_model.layers.", "mlp.up_proj"),
        "use_rotary": rotary,
        "use_swiglu": swiglu,
        "sub_norm": "vision_model.layers.0.self_attn.inner_norm.weight" in tower.weights,
        # Not to be seen in the weights; of the published towers, the one without rotary positions has it.
        "post_norm": bool(stated.get("postnorm", not rotary)),
        "layer_norm_eps": float(stated.get("layer_norm_eps", 1e-6)),
        "rotary_base": float(stated.get("rope_theta", 10000.0)),
    }
    fields |= _heads_and_grid(checkpoint, rope, fields, stated)
    check_original(checkpoint, fields)
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "image_size", "patch_size")
    check_stated(checkpoint, _folder_config(checkpoint), {name: fields[name] for name in names}, "`config.json`")
    tower.config = Eva02VisionConfig(**fields)
    if "visual_projection.bias" not in tower.weights:
        tower.projection = "linear"
    return tower


def _folder_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config or {}
    return dict(config.get("vision_config") or config)


def _stated(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the JSON or the `config.json` says, by the names of the original's JSON."""
    original = original_vision(checkpoint)
    if original and "timm_model_name" not in original:
        return {"rope": False, "postnorm": False, **original}
    folder = _folder_config(checkpoint)
    if not folder:
        return {}
    # The remote code leaves out what has its default, and that of the norm's place is before the layer.
    return {"postnorm": False, **{_ALIASES.get(name, name): value for name, value in folder.items()}}


def _rename_mlps(tower: Tower, weights: dict[str, torch.Tensor]) -> bool:
    """Takes the layers of the MLPs; whether they are SwiGLUs."""
    keys = {key: match for key in weights if (match := re.fullmatch(_MLP, key))}
    present = {match[2] for match in keys.values()}
    names = next((names for names in _MLPS if names.keys() <= present), {})
    for key, match in keys.items():
        if match[2] in names:
            tower.put(f"vision_model.layers.{match[1]}.mlp.{names[match[2]]}.{match[3]}", weights[key], key)
    return len(names) == 3


def _with_all_axes(tower: Tower) -> dict[str, torch.Tensor]:
    """The tower's weights, with the class token and the positions, which some layouts keep without a batch axis."""
    for name in (_CLASS_TOKEN, _POSITIONS):
        value = tower.weights.get(name)
        if value is not None and value.ndim < 3:
            tower.weights[name] = value[(None,) * (3 - value.ndim)]
    return tower.weights


def _heads_and_grid(
    checkpoint: Checkpoint, rope: str | None, fields: dict[str, Any], stated: dict[str, Any]
) -> dict[str, int]:
    """Attention heads, and side of the pretraining grid."""
    width = fields["hidden_size"]
    if rope is None:
        head_width = {1408: 88, 1792: 112}.get(width, 64)  # of g/14 and of ViT-E/14; in no weight
        heads = num_heads(checkpoint, stated, width, head_width)
        return {"num_attention_heads": heads, "rotary_grid_size": int(stated.get("pt_hw_seq_len", 16))}
    head_width = tensor(checkpoint, rope, 2).shape[1]
    check_stated(checkpoint, stated, {"head_width": head_width}, "The model JSON")
    if width % head_width:
        raise ValueError(f"`{rope}` is {head_width} wide, which does not divide the tower's width {width}.")
    grid = fields["image_size"] // fields["patch_size"]
    return {
        "num_attention_heads": width // head_width,
        "rotary_grid_size": _rotary_grid(checkpoint, rope, grid, fields["rotary_base"]),
    }


def _rotary_grid(checkpoint: Checkpoint, key: str, grid: int, base: float) -> int:
    """Side of the pretraining grid, from the table of rotary positions, all of which must then agree."""
    cos = tensor(checkpoint, key, 2)
    sin = checkpoint.weights.get(key.replace("freqs_cos", "freqs_sin"))
    exact = cos.dtype == torch.float32
    if sin is None or sin.shape != cos.shape or len(cos) != grid * grid:
        raise ValueError(f"`{key}` and its sines must have shape ({grid * grid}, head width), got {tuple(cos.shape)}.")
    grid_size = 16
    if grid > 1:
        # The slowest channel at the second column: its angle is below one turn for any sensible grid.
        slowest = base ** ((cos.shape[1] // 2 - 2) / (cos.shape[1] // 2))
        angle = torch.atan2(sin[1, -1].double(), cos[1, -1].double()).item()
        grid_size = max(round(angle * slowest * grid), 1)
    for size in (grid_size, 16):  # half precision may not resolve the slowest channel
        expected = rotary_table(grid, grid, cos.shape[1], base, size)
        error = max((a - b.float()).abs().max().item() for a, b in zip(expected, (cos, sin), strict=True))
        if error <= (1e-4 if exact else 1e-2):
            return size
    raise ValueError(
        f"The rotary positions in `{key}` are not those of EVA02 (base {base:g}, adjacent channels paired), so the "
        "tower would not compute what it was trained for."
    )


__all__ = ["eva_tower", "is_eva"]
