# Copyright 2026 The llm2clip_hf authors.
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Configuration of the EVA02 vision tower, and of the EVA ViT-E that comes before it in the same family."""

import math
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


# The towers of the published checkpoints, by the names of their original configs (hidden width of a block: EVA02
# int(width * 2.6667), ViT-E 15360).
_LARGE = {"hidden_size": 1024, "intermediate_size": 2730, "num_hidden_layers": 24, "num_attention_heads": 16}
_HUGE = {"hidden_size": 1792, "intermediate_size": 15360, "num_hidden_layers": 64, "num_attention_heads": 16}
_VIT_E = {"use_rotary": False, "use_swiglu": False, "sub_norm": False, "post_norm": True}
EVA02_PRESETS: dict[str, dict[str, Any]] = {
    "EVA02-CLIP-B-16": {},
    "EVA02-CLIP-L-14": {**_LARGE, "patch_size": 14},
    "EVA02-CLIP-L-14-336": {**_LARGE, "patch_size": 14, "image_size": 336},
    "EVA02-CLIP-bigE-14": {**_HUGE, "patch_size": 14, **_VIT_E},
}
_SIZES = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size "
    "rotary_grid_size"
).split()


def check_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


class Eva02VisionConfig(PreTrainedConfig):
    r"""
    Configuration of an [`Eva02VisionModel`]. The defaults are EVA02-B/16 at 224 pixels.

    Args:
        hidden_size (`int`, *optional*, defaults to 768): Width of a token.
        intermediate_size (`int`, *optional*, defaults to 2048): Hidden width of a block's MLP.
        num_hidden_layers (`int`, *optional*, defaults to 12): Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Attention heads; they divide `hidden_size`, and with rotary positions their width is a multiple of 4.
        num_channels (`int`, *optional*, defaults to 3): Channels of an image.
        image_size (`int`, *optional*, defaults to 224): Height and width of an image in pixels.
        patch_size (`int`, *optional*, defaults to 16): Height and width of a patch in pixels.
        use_rotary (`bool`, *optional*, defaults to `True`):
            2-D rotary positions on queries and keys of the patches, on top of the learned ones (EVA02).
        rotary_base (`float`, *optional*, defaults to 10000.0): Base of the rotary frequencies.
        rotary_grid_size (`int`, *optional*, defaults to 16):
            Side, in patches, of the pretraining grid to which the positions of any other grid are rescaled.
        use_swiglu (`bool`, *optional*, defaults to `True`): SwiGLU (EVA02) or a GELU MLP (ViT-E).
        sub_norm (`bool`, *optional*, defaults to `True`):
            LayerNorm before the output projections of attention and MLP (EVA02).
        post_norm (`bool`, *optional*, defaults to `False`):
            LayerNorm after attention and MLP, inside the residual branch (ViT-E), instead of before them.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6): Epsilon of every LayerNorm.
        attention_dropout (`float`, *optional*, defaults to 0.0): Dropout of the attention weights, in `[0, 1)`.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of new weights.

    Raises:
        ValueError: for a value outside these ranges.

    Example:

    ```python
    >>> config = Eva02VisionConfig.from_preset("EVA02-CLIP-L-14-336")
    >>> config.hidden_size, config.image_size // config.patch_size
    (1024, 24)

    ```
    """

    model_type = "eva02_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 16,
        use_rotary: bool = True,
        rotary_base: float = 10000.0,
        rotary_grid_size: int = 16,
        use_swiglu: bool = True,
        sub_norm: bool = True,
        post_norm: bool = False,
        layer_norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.use_rotary = use_rotary
        self.rotary_base = rotary_base
        self.rotary_grid_size = rotary_grid_size
        self.use_swiglu = use_swiglu
        self.sub_norm = sub_norm
        self.post_norm = post_norm
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self._check_values()
        super().__init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **kwargs: Any) -> "Eva02VisionConfig":
        """
        The config of a published tower.

        Args:
            name (`str`):
                `"EVA02-CLIP-B-16"`, `"EVA02-CLIP-L-14"`, `"EVA02-CLIP-L-14-336"` or `"EVA02-CLIP-bigE-14"`.
            kwargs: Fields that differ from it.

        Returns:
            [`Eva02VisionConfig`]

        Raises:
            ValueError: for an unknown name.
        """
        if name not in EVA02_PRESETS:
            raise ValueError(f"`name` must be one of {', '.join(map(repr, EVA02_PRESETS))}, got {name!r}.")
        return cls(**{**EVA02_PRESETS[name], **kwargs})

    def _check_values(self) -> None:
        for name in _SIZES:
            check_positive_int(name, getattr(self, name))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` must divide `hidden_size`, got {self.num_attention_heads} and "
                f"{self.hidden_size}."
            )
        head_dim = self.hidden_size // self.num_attention_heads
        if self.use_rotary and head_dim % 4:
            raise ValueError(
                "Rotary positions need heads whose width is a multiple of 4 (two axes, pairs of channels), got "
                f"{head_dim}. Change `num_attention_heads`, or set `use_rotary=False`."
            )
        if self.image_size < self.patch_size:
            raise ValueError(
                f"`image_size` must be at least `patch_size`, got {self.image_size} and {self.patch_size}."
            )
        if not 0.0 <= self.attention_dropout < 1.0:
            raise ValueError(f"`attention_dropout` must lie in [0, 1), got {self.attention_dropout!r}.")
        for name in ("rotary_base", "layer_norm_eps", "initializer_range"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"`{name}` must be a positive number, got {getattr(self, name)!r}.")


Eva02VisionConfig.register_for_auto_class()
# Here, so that the type is known wherever this file is: in the package, and beside the weights of a saved model. The
# class that came first stays: a saved model loads this file once per entry file, and its parts must agree on one.
if Eva02VisionConfig.model_type not in CONFIG_MAPPING:
    AutoConfig.register(Eva02VisionConfig.model_type, Eva02VisionConfig)
