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
"""Checks of the inputs of LLM2CLIP: every message says what was given, what is expected and what to do."""

import torch

from .configuration_llm2clip import LLM2CLIPConfig


def check_ids(input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, max_length: int | None) -> None:
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        got = input_ids.dtype if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"`input_ids` must be an int64 or int32 tensor, got {got}.")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"`input_ids` must have shape (batch, length), neither 0, got {tuple(input_ids.shape)}.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}."
        )
    if max_length is not None and input_ids.shape[1] > max_length:
        raise ValueError(
            f"`input_ids` has {input_ids.shape[1]} tokens, more than the {max_length} that the LLM can take. Truncate "
            "the text: `processor(text=...)` does."
        )


def check_pixel_values(pixel_values: torch.Tensor, config: LLM2CLIPConfig, check_finite: bool) -> None:
    if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
        got = pixel_values.dtype if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
        raise ValueError(
            f"`pixel_values` must be a floating-point tensor, got {got}. Let the processor make it: "
            "`processor(images=..., return_tensors='pt')`."
        )
    vision_config = config.vision_config
    channels = getattr(vision_config, "num_channels", None)
    patches = vision_config.model_type == "siglip2_vision_model"  # (batch, patches, values of a patch)
    if pixel_values.ndim != (3 if patches else 4) or (
        not patches and channels is not None and pixel_values.shape[1] != channels
    ):
        raise ValueError(
            f"`pixel_values` must have shape (batch, {channels or 'channels'}, height, width), got "
            f"{tuple(pixel_values.shape)}."
        )
    if pixel_values.shape[0] == 0:
        raise ValueError(f"`pixel_values` is an empty batch, of shape {tuple(pixel_values.shape)}.")
    # Reading a tensor breaks graphs and costs a synchronisation: only where results are looked at anyway.
    if not check_finite or torch.compiler.is_compiling() or pixel_values.device.type == "meta":
        return
    finite = pixel_values.isfinite().flatten(1).all(1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"Row {row} of `pixel_values` holds NaN or infinite values. Remove or repair that image.")


def check_llm_embeds(llm_embeds: torch.Tensor, config: LLM2CLIPConfig) -> None:
    width = config.llm_hidden_size
    if not isinstance(llm_embeds, torch.Tensor) or not llm_embeds.is_floating_point():
        got = llm_embeds.dtype if isinstance(llm_embeds, torch.Tensor) else type(llm_embeds).__name__
        raise ValueError(
            f"`llm_embeds` must be a floating-point tensor, got {got}. Token ids are passed as `input_ids`."
        )
    if llm_embeds.ndim != 2 or llm_embeds.shape[1] != width:
        raise ValueError(
            f"`llm_embeds` must have shape (batch, {width}), got {tuple(llm_embeds.shape)}. They must come from "
            f"an LLM of width {width}, the one that the adaptor was trained with."
        )
    if llm_embeds.shape[0] == 0:
        raise ValueError(f"`llm_embeds` is an empty batch, of shape {tuple(llm_embeds.shape)}.")


__all__ = ["check_ids", "check_llm_embeds", "check_pixel_values"]
