# SPDX-License-Identifier: Apache-2.0
"""What the readers of vision towers share: a tower under our names, and sizes read from shapes."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from .checkpoint_files import Checkpoint


# Width of an attention head where neither the weights nor a config tell it.
HEAD_WIDTH = 64
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
        projection_keys (`set[str]`): Those of them that are the projection's.
        droppable (`tuple[str, ...]`): Patterns of keys that carry nothing that is not computed.
        start_droppable (`tuple[str, ...]`):
            Patterns of keys that a starting tower, a checkpoint without a text adaptor, leaves behind.
    """

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
            for pattern, replacement in table:
                if re.fullmatch(pattern, key):
                    self.put(re.sub(f"^{pattern}$", replacement, key), value, key)
                    break

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


def count_layers(checkpoint: Checkpoint, prefix: str) -> int:
    """Highest number after `prefix`, plus one; a layer that is absent shows later as missing weights."""
    numbers = [int(m[1]) for key in checkpoint.weights if (m := re.match(re.escape(prefix) + r"(\d+)\.", key))]
    if not numbers:
        raise ValueError(f"{checkpoint.name!r} has no weights `{prefix}*`, so it is incomplete or of another kind.")
    return max(numbers) + 1


def read_sizes(checkpoint: Checkpoint, patches: str, positions: int, has_class_token: bool = True) -> dict[str, int]:
    """Sizes that a patch convolution `(width, channels, patch, patch)` and a number of positions tell."""
    width, channels, patch, patch_width = tensor(checkpoint, patches, 4).shape
    grid = math.isqrt(positions - has_class_token)
    if patch != patch_width or grid < 1 or grid * grid != positions - has_class_token:
        raise ValueError(
            f"Only square images and patches can be converted, got patches of {patch} x {patch_width} pixels and "
            f"{positions} positions in {checkpoint.name!r}."
        )
    return {"hidden_size": width, "num_channels": channels, "patch_size": patch, "image_size": grid * patch}


def original_vision(checkpoint: Checkpoint) -> dict[str, Any]:
    """`vision_cfg` of the original model JSON, where there is one."""
    config = checkpoint.model_config or {}
    config = config.get("model_cfg", config)
    return dict(config.get("vision_cfg", {}))


def num_heads(checkpoint: Checkpoint, stated: dict[str, Any], width: int, default: int) -> int:
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
    names = {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "patch_size": "patch_size",
        "image_size": "image_size",
    }
    found = {name: fields[ours] for name, ours in names.items()}
    check_stated(checkpoint, original_vision(checkpoint), found, "The model JSON")


def split_fused(tower: Tower, weights: dict[str, torch.Tensor], pattern: str, replacement: str) -> None:
    """Takes fused query, key and value weights apart; `{}` in `replacement` stands for `q`, `k` and `v`."""
    for key, value in weights.items():
        if not re.fullmatch(pattern, key):
            continue
        if value.shape[0] % 3:
            raise ValueError(f"`{key}` must hold queries, keys and values, got {value.shape[0]} rows.")
        for letter, part in zip("qkv", value.chunk(3), strict=True):
            tower.put(re.sub(f"^{pattern}$", replacement.format(letter), key), part, key)


__all__ = [
    "HEAD_WIDTH",
    "Table",
    "Tower",
    "check_original",
    "check_stated",
    "count_layers",
    "num_heads",
    "original_vision",
    "read_sizes",
    "split_fused",
    "tensor",
]
