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
"""The vision tower of an LLM2CLIP model by itself: a backbone for other models."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_llm2clip import LLM2CLIPConfig
from .inputs_llm2clip import check_pixel_values, measure_vision_tower
from .loading_llm2clip import check_complete
from .modules_llm2clip import build_vision_tower, pool_image


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
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
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


__all__ = ["LLM2CLIPVisionModel"]
