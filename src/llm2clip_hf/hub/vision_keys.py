# SPDX-License-Identifier: Apache-2.0
"""What the readers of vision towers share: a tower under our names, and sizes read from shapes."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoConfig, CLIPVisionConfig, PreTrainedConfig, SiglipVisionConfig

from .checkpoint_files import Checkpoint, check_loaded
from .text_keys import quiet_transformers


# Pairs (pattern, replacement); a key is renamed by the first pattern that matches the whole of it. A replacement with
# `{}` takes fused query, key and value weights apart.
Table = Sequence[tuple[str, str]]


@dataclass
class Tower:
    """A vision tower found in a checkpoint."""

    config: PreTrainedConfig
    projection: str
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    source_keys: set[str] = field(default_factory=set)
    projection_keys: set[str] = field(default_factory=set)
    droppable: tuple[str, ...] = ()
    start_droppable: tuple[str, ...] = ()

    def rename(self, weights: dict[str, torch.Tensor], table: Table) -> None:
        """Takes every weight that `table` knows."""
        for key, value in weights.items():
            found = ((match, name) for pattern, name in table if (match := re.fullmatch(pattern, key)))
            match, name = next(found, (None, ""))
            if match is None:
                continue
            if "{}" not in name:
                self.put(match.expand(name), value, key)
                continue
            if value.shape[0] % 3:
                raise ValueError(f"`{key}` must hold queries, keys and values, got {value.shape[0]} rows.")
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                self.put(match.expand(name.format(letter)), part, key)

    def put(self, name: str, value: torch.Tensor, *keys: str) -> None:
        if name in self.weights:
            raise ValueError(f"`{keys[0]}` is the second weight for `{name}`, so the checkpoint holds two towers.")
        self.weights[name] = value
        self.source_keys.update(keys)
        if name.startswith("visual_projection."):
            self.projection_keys.update(keys)


def tensor(checkpoint: Checkpoint, key: str, ndim: int) -> torch.Tensor:
    """A weight from whose shape a size is read."""
    value = checkpoint.weights.get(key)
    if value is None:
        raise ValueError(f"{checkpoint.name!r} has no weight `{key}`, so it is incomplete or of another kind.")
    if value.ndim != ndim or 0 in value.shape:
        raise ValueError(f"`{key}` must have {ndim} dimensions, none empty, got shape {tuple(value.shape)}.")
    return value


def _count_layers(checkpoint: Checkpoint, prefix: str) -> int:
    """Highest number after `prefix`, plus one; a layer that is absent shows later as missing weights."""
    numbers = [int(m[1]) for key in checkpoint.weights if (m := re.match(re.escape(prefix) + r"(\d+)\.", key))]
    if not numbers:
        raise ValueError(f"{checkpoint.name!r} has no weights `{prefix}*`, so it is incomplete or of another kind.")
    return max(numbers) + 1


def read_sizes(
    checkpoint: Checkpoint, patches: str, positions: int, layers: str, mlp: str, has_class_token: bool = True
) -> dict[str, Any]:
    """
    Sizes that shapes tell.

    From the patch convolution `(width, channels, patch, patch)`, the number of positions, the numbers after `layers`,
    and the first weight of the MLP of layer 0.
    """
    width, channels, patch, patch_width = tensor(checkpoint, patches, 4).shape
    grid = math.isqrt(positions - has_class_token)
    if patch != patch_width or grid < 1 or grid * grid != positions - has_class_token:
        raise ValueError(
            f"Only square images and patches can be converted, got patches of {patch} x {patch_width} pixels and "
            f"{positions} positions in {checkpoint.name!r}."
        )
    return {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": grid * patch,
        "num_hidden_layers": _count_layers(checkpoint, layers),
        "intermediate_size": tensor(checkpoint, f"{layers}0.{mlp}.weight", 2).shape[0],
    }


def original_vision(checkpoint: Checkpoint) -> dict[str, Any]:
    """`vision_cfg` of the original model JSON, where there is one."""
    config = checkpoint.model_config or {}
    config = config.get("model_cfg", config)
    return dict(config.get("vision_cfg", {}))


def num_heads(checkpoint: Checkpoint, stated: dict[str, Any], width: int, default: int = 64) -> int:
    """Attention heads as a config states them, `heads` or `head_width`; else by the width of a head, `default`."""
    head_width = stated.get("head_width", width // stated["heads"] if stated.get("heads") else default)
    if not isinstance(head_width, int) or head_width < 1 or width % head_width:
        raise ValueError(
            f"Heads of width {head_width} do not divide the width {width} of the tower in {checkpoint.name!r}. Give "
            "the original model JSON, which states `head_width`."
        )
    return width // head_width


def check_stated(checkpoint: Checkpoint, stated: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """What a config says of a size must be what the shapes say."""
    wrong = [
        f"`{name}` is {stated[name]!r} but {value!r} in the weights"
        for name, value in found.items()
        if stated.get(name) is not None and stated[name] != value
    ]
    if wrong:
        raise ValueError(f"{where} does not belong to the weights of {checkpoint.name!r}: {'; '.join(wrong)}.")


def check_original(checkpoint: Checkpoint, fields: dict[str, Any]) -> None:
    names = {"width": "hidden_size", "layers": "num_hidden_layers"}
    found = {name: fields[names.get(name, name)] for name in ("width", "layers", "patch_size", "image_size")}
    check_stated(checkpoint, original_vision(checkpoint), found, "The model JSON")


_CLIP_BLOCK = r"visual\.transformer\.resblocks\.(\d+)\."
_CLIP_LAYER = r"vision_model.encoder.layers.\1."
_CLIP_TABLE: Table = (
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.ln_pre\.(weight|bias)", r"vision_model.pre_layrnorm.\1"),
    (_CLIP_BLOCK + r"ln_([12])\.(weight|bias)", _CLIP_LAYER + r"layer_norm\2.\3"),
    (_CLIP_BLOCK + r"attn\.in_proj_(weight|bias)", _CLIP_LAYER + r"self_attn.{}_proj.\2"),
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
    fields = read_sizes(checkpoint, "visual.conv1.weight", positions, "visual.transformer.resblocks.", "mlp.c_fc")
    check_original(checkpoint, fields)
    fields["num_attention_heads"] = num_heads(checkpoint, original_vision(checkpoint), fields["hidden_size"])
    fields |= {"hidden_act": "quick_gelu" if quick_gelu else "gelu", "layer_norm_eps": 1e-5}
    tower = Tower(CLIPVisionConfig(**fields), "linear", start_droppable=_CLIP_TEXT)
    tower.rename(checkpoint.weights, _CLIP_TABLE)
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
    patches, layers = "vision_model.embeddings.patch_embedding.weight", "vision_model.encoder.layers."
    positions = tensor(checkpoint, "vision_model.embeddings.position_embedding.weight", 2).shape[0]
    found = read_sizes(checkpoint, patches, positions, layers, "mlp.fc1")
    check_stated(checkpoint, stated, found, "`config.json`")
    fields = {name: stated[name] for name in ("hidden_act", "layer_norm_eps", "attention_dropout") if name in stated}
    # What a config of transformers leaves out has the default of its class.
    heads = stated.get("num_attention_heads", CLIPVisionConfig().num_attention_heads)
    if not isinstance(heads, int) or heads < 1 or found["hidden_size"] % heads:
        raise ValueError(
            f"`num_attention_heads` of the `config.json` of {checkpoint.name!r} is {heads!r}, which does not divide "
            f"the width {found['hidden_size']} of its tower. Give the `config.json` that belongs to the weights."
        )
    tower = Tower(CLIPVisionConfig(**found, **fields, num_attention_heads=heads), "linear")
    # Stored by old versions of transformers, computed by the others.
    ids = "vision_model.embeddings.position_ids"
    tower.droppable = (re.escape(ids),)
    for key, value in checkpoint.weights.items():
        if key.startswith(("vision_model.", "visual_projection.")) and key != ids:
            tower.put(key, value, key)
    tower.projection = "linear_bias" if "visual_projection.bias" in tower.weights else "linear"
    return tower


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
    (_SIGLIP_BLOCK + r"attn\.qkv\.(weight|bias)", _SIGLIP_LAYER + r"self_attn.{}_proj.\2"),
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
    patches, layers = "visual.trunk.patch_embed.proj.weight", "visual.trunk.blocks."
    fields = read_sizes(checkpoint, patches, positions.shape[1], layers, "mlp.fc1", has_class_token=False)
    check_original(checkpoint, fields)
    width = fields["hidden_size"]
    head_width = {1152: 72, 1536: 96}.get(width, 64)  # of So400m and of gopt; in no weight
    fields["num_attention_heads"] = num_heads(checkpoint, original_vision(checkpoint), width, head_width)
    approximate = (width, fields["patch_size"], fields["image_size"]) in _TANH_GELU
    fields["hidden_act"] = "gelu_pytorch_tanh" if approximate else "gelu"
    tower = Tower(SiglipVisionConfig(**fields), "none", start_droppable=(r"text\..*",))
    tower.rename(checkpoint.weights, _SIGLIP_TABLE)
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


# Model types of transformers whose vision tower can start an LLM2CLIP, by the projection that the original gives it.
START_TYPES = {"clip": "linear", "siglip": "none"}
# The parts of a CLIP or SigLIP of transformers that are not its vision tower.
_START_LEFT_OVER = re.compile(
    r"text_model\..*|text_projection.*|visual_projection.*|logit_(scale|bias)|.*position_ids"
)


def transformers_start(checkpoint: Checkpoint, model_type: str) -> Tower:
    """The vision tower of a CLIP or SigLIP folder, loaded by transformers itself."""
    folder = str(checkpoint.folder)
    vision_config = AutoConfig.from_pretrained(folder, trust_remote_code=False).vision_config
    model_class: Any = MODEL_MAPPING[type(vision_config)]
    with quiet_transformers():
        model, info = model_class.from_pretrained(
            folder, config=vision_config, dtype=torch.float32, output_loading_info=True
        )
    unexpected = [key for key in info["unexpected_keys"] if not _START_LEFT_OVER.fullmatch(key)]
    check_loaded(checkpoint.name, {**info, "unexpected_keys": unexpected})
    tower = Tower(vision_config, START_TYPES[model_type], droppable=(_START_LEFT_OVER.pattern,))
    for key, value in model.state_dict().items():
        tower.put(f"vision_model.{key}", value)
    # Loading has renamed and checked them.
    tower.source_keys.update(key for key in checkpoint.weights if not _START_LEFT_OVER.fullmatch(key))
    return tower


__all__ = [
    "START_TYPES",
    "Table",
    "Tower",
    "check_original",
    "check_stated",
    "num_heads",
    "open_clip_tower",
    "original_vision",
    "read_sizes",
    "siglip_tower",
    "tensor",
    "transformers_clip_tower",
    "transformers_start",
]
