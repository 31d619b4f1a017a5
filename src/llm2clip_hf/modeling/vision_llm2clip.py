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
"""The vision tower: loaded to start a model from, and that of a model by itself, a backbone for other models."""

import os
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_llm2clip import LLM2CLIPConfig
from .inputs_llm2clip import check_pixel_values, measure_vision_tower
from .loading_llm2clip import (
    HUB_KEYWORDS,
    check_complete,
    choose_shards,
    forget_shards,
    load_within,
    part_config,
    part_device_map,
    source_keywords,
)
from .modules_llm2clip import build_vision_tower, pool_image, pooler_options, vision_class


class LLM2CLIPVisionModel(PreTrainedModel):
    r"""
    The vision tower of an LLM2CLIP model, without its projection, its text side and its logit scale.

    `LLM2CLIPVisionModel.from_pretrained(folder)` reads the tower's weights out of a folder of [`LLM2CLIPModel`] and
    nothing else: the LLM is neither built nor fetched. `forward` gives what the tower in the whole model gives.

    Args:
        config ([`LLM2CLIPConfig`]): Config of the whole model.

    Example:

    ```python
    >>> config = LLM2CLIPConfig(
    ...     vision_config={"model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 40,
    ...                    "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 30, "patch_size": 6}
    ... )
    >>> output = LLM2CLIPVisionModel(config).eval()(torch.zeros(2, 3, 30, 30), output_hidden_states=True)
    >>> output.last_hidden_state.shape, output.pooler_output.shape, len(output.hidden_states)
    (torch.Size([2, 26, 24]), torch.Size([2, 24]), 3)

    ```
    """

    config: LLM2CLIPConfig
    config_class = LLM2CLIPConfig
    base_model_prefix = "llm2clip_vision"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _keys_to_ignore_on_load_unexpected = [
        r"^(text_model|text_adapter|visual_projection)\.",
        r"^logit_(scale|bias)$",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LLM2CLIPConfig) -> None:
        super().__init__(config)
        config.set_vision_width(measure_vision_tower(config))
        self.vision_model: Any = build_vision_tower(config)
        # The layers of the tower hold its config object, so it is the one that settings must reach.
        config.vision_config = self.vision_model.config
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.vision_model.get_input_embeddings()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        r"""
        Loads the tower out of the folder or repository of a whole model.

        Args:
            pretrained_model_name_or_path (`str`): Folder or repository of an [`LLM2CLIPModel`].
            output_loading_info (`bool`, *optional*, defaults to `False`): Return also the dictionary of keys.
            kwargs: As for any transformers model. `dtype` is float32 by default, as the tower is stored; what the
                folder records is the LLM's.

        Returns:
            [`LLM2CLIPVisionModel`] in evaluation mode.

        Raises:
            ValueError: if weights of the tower are missing.
        """
        kwargs.setdefault("dtype", torch.float32)
        others = ("text_model.", "text_adapter.", "visual_projection.", "logit_")
        kwargs = choose_shards(pretrained_model_name_or_path, kwargs, cls.config_class, others)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        forget_shards(model.config)
        if not output_loading_info:
            check_complete(pretrained_model_name_or_path, info)
        return (model, info) if output_loading_info else model

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None, **kwargs: Any
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Runs the tower.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`):
                Images from the image processor.
            interpolate_pos_encoding (`bool`, *optional*):
                Let the tower interpolate its positions to another image size, where it can.
            kwargs: Passed to the tower, for example `output_hidden_states=True`.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` of shape `(batch, tokens, vision_hidden_size)`,
            `pooler_output` of shape `(batch, vision_hidden_size)`, pooled as `config.vision_pooling` says and not
            projected, and `hidden_states` and `attentions` where they are asked for.

        Raises:
            ValueError: for a wrong shape or dtype, an empty batch, or (in evaluation mode) NaN or infinite values.
        """
        check_pixel_values(pixel_values, self.config, check_finite=not self.training)
        if interpolate_pos_encoding is not None:
            kwargs["interpolate_pos_encoding"] = interpolate_pos_encoding
        outputs = self.vision_model(pixel_values=pixel_values.to(self.vision_model.dtype), **kwargs)
        height, width = pixel_values.shape[-2:]
        mask = kwargs.get("pixel_attention_mask")
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=pool_image(outputs, self.config, height, width, mask),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )


def vision_kwargs(shared: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Keywords for loading the vision tower: those of both parts that hold for it, and its own, which win."""
    names = (*HUB_KEYWORDS, "max_memory", "offload_buffers", "revision", "trust_remote_code")
    found = {name: shared[name] for name in names if name in shared}
    attention = shared.get("attn_implementation")
    if isinstance(attention, dict):
        attention = attention.get("vision_config", attention.get(""))
    found["attn_implementation"] = attention
    found["device_map"] = part_device_map(shared.get("device_map"), "vision_model")
    if shared.get("offload_folder") is not None:
        found["offload_folder"] = os.path.join(shared["offload_folder"], "vision_model")
    return {name: value for name, value in found.items() if value is not None} | given


def load_pretrained_vision(
    name: str, kwargs: dict[str, Any] | None = None, pooling: str | None = None
) -> tuple[Any, str | None]:
    """A vision tower, out of its own repository or out of that of a CLIP-like model."""
    kwargs = {"dtype": torch.float32, **(kwargs or {})}
    whole, config = part_config(name, source_keywords(kwargs), kwargs, "vision")
    tower_class = vision_class(config)

    def load(chosen: str) -> tuple[Any, Any]:
        options = {"config": config, "output_loading_info": True, **kwargs, **pooler_options(config, chosen)}
        loaded: tuple[Any, Any] = tower_class.from_pretrained(name, **options)
        return loaded

    model, info = load(pooling or "pooler")
    if info["missing_keys"] and config is not whole:
        return load_within(name, whole, tower_class, kwargs), pooling
    without_pooler = {key for key in info["missing_keys"] if key.startswith("pooler.")}
    if without_pooler and without_pooler == set(info["missing_keys"]) and pooler_options(config, "cls"):
        if pooling is not None:
            raise ValueError(
                f"{name!r} has no weights for the pooler of {config.model_type!r}, which would be random. Set "
                "`vision_pooling='cls'`."
            )
        pooling = "cls"
        model, info = load(pooling)
    check_complete(name, info)
    return model, pooling


class _LogitScale(PreTrainedModel):
    """Reads one parameter out of a checkpoint of any format."""

    config_class = PreTrainedConfig
    base_model_prefix = "scale"
    _keys_to_ignore_on_load_unexpected = [r".*"]

    def __init__(self, config: PreTrainedConfig, size: tuple[int, ...] = ()) -> None:
        super().__init__(config)
        self.logit_scale = torch.nn.Parameter(torch.zeros(size))
        self.post_init()


def pretrained_logit_scale(name: str, kwargs: dict[str, Any]) -> float:
    """The trained logarithm of the logit scale of a CLIP-like checkpoint."""
    source = source_keywords(kwargs)
    for size in ((), (1,)):
        loaded: Any = _LogitScale.from_pretrained(
            name, size, config=PreTrainedConfig(), output_loading_info=True, ignore_mismatched_sizes=True, **source
        )
        model, info = loaded
        if not info["missing_keys"] and not info["mismatched_keys"]:
            return float(model.logit_scale.detach())
    raise ValueError(
        f"`logit_scale_init_value` is 'pretrained', but {name!r} has no `logit_scale` of one number. Give a number, "
        "or leave it out."
    )


__all__ = ["LLM2CLIPVisionModel", "load_pretrained_vision", "pretrained_logit_scale", "vision_kwargs"]
