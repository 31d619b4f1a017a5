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
"""Checks of the inputs of LLM2CLIP, and of the LLM that it is given: what came, what is expected, what to do."""

import copy
import math
import re
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MODEL_MAPPING, PreTrainedModel

from .configuration_llm2clip import LLM2CLIPConfig
from .modules_llm2clip import build_vision_tower, num_prefix_tokens, pool_image


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


class _RandomNumbers(TorchDispatchMode):
    """Notes whether random numbers are drawn; attention kernels are marked so for a dropout that is off."""

    drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drawn |= torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func.name()
        return func(*args, **(kwargs or {}))


def _trial(config: LLM2CLIPConfig, size: tuple[int, int], device: str) -> tuple[Any, Any, bool]:
    """A tower of the config's own class run on two images: the tower, its outputs, whether it drew random numbers."""
    vision_config, inputs = config.vision_config, {}
    channels = getattr(vision_config, "num_channels", None) or 3
    with torch.device(device), torch.no_grad(), torch.random.fork_rng(devices=[]), _RandomNumbers() as random_numbers:
        tower = build_vision_tower(config).eval()
        random_numbers.drawn = False
        pixel_values = torch.zeros(2, channels, *size)
        if vision_config.model_type == "siglip2_vision_model":
            side = math.isqrt(vision_config.num_patches)
            pixel_values = torch.zeros(2, side * side, channels * vision_config.patch_size**2)
            inputs["pixel_attention_mask"] = torch.ones(2, side * side, dtype=torch.long)
            inputs["spatial_shapes"] = torch.tensor([[side, side]] * 2, device="cpu")
        return tower, tower(pixel_values=pixel_values, **inputs), random_numbers.drawn


def measure_vision_tower(config: LLM2CLIPConfig) -> int:
    """Runs a tower without weights, and checks that it gives one vector per image, the same at each call."""
    vision_config = copy.deepcopy(config.vision_config)
    config = copy.copy(config)
    config.vision_config = vision_config
    vision_config._attn_implementation = "eager"  # kernels need a device
    name, pooling = vision_config.model_type, config.vision_pooling
    size = getattr(vision_config, "image_size", None) or 224
    size = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    try:
        try:
            tower, outputs, is_random = _trial(config, size, "meta")
        except Exception as error:
            if "meta" not in str(error):
                raise
            # It reads values. One layer is enough.
            if hasattr(vision_config, "num_hidden_layers"):
                vision_config.num_hidden_layers = 1
            tower, outputs, is_random = _trial(config, size, "cpu")
    except Exception as error:  # of the tower: nothing in common but that it does not run
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"The vision tower {name!r} does not run on a batch of images alone ({reason}). "
            "Use one that does: CLIP, SigLIP, DINOv2, ViT, Swin, ConvNeXt, ..."
        ) from error
    if is_random:
        raise ValueError(
            f"The vision tower {name!r} draws random numbers in evaluation mode, so the same image would get another "
            "embedding at each call. Use one that does not; the encoder of ViT-MAE loads as a ViT: "
            "`ViTModel.from_pretrained(..., add_pooling_layer=False)`."
        )
    states: Any = getattr(outputs, "last_hidden_state", None)
    pooled = pool_image(outputs, config, *size)
    if len(pooled) != 2 or (states is not None and len(states) != 2):
        raise ValueError(
            f"The vision tower {name!r} gives {len(pooled if states is None else states)} output(s) for a batch of 2 "
            "images, so images would be mixed up. Use one that gives one output per image."
        )
    if pooling != "pooler":
        _check_tokens(tower, states, config, size)
    return pooled.shape[-1]


def _check_tokens(tower: Any, states: torch.Tensor, config: LLM2CLIPConfig, size: tuple[int, int]) -> None:
    """That there is a class token to pool, or that the tokens to average are those of the image."""
    vision_config, count = config.vision_config, states.shape[1]
    others = "'pooler' or 'mean'" if config.vision_pooling == "cls" else "'pooler'"
    remedy = f"Set `vision_pooling` to {others}."
    prefix = num_prefix_tokens(vision_config, count, *size) if states.ndim == 3 else 0
    if config.vision_pooling == "cls":
        names = [name for name, _ in tower.named_parameters()]
        if prefix == 0 or not any("cls" in name or "class" in name for name in names):
            raise ValueError(
                f"The vision tower {vision_config.model_type!r} has no class token, so `vision_pooling='cls'` would "
                f"take the top left patch. {remedy}"
            )
        return
    channels_last = states.ndim == 4 and states.shape[1] == states.shape[2] != states.shape[3]
    # Hierarchical towers do not say how many tokens an image becomes; a square has a square number of them.
    patches = count - prefix
    is_square = size[0] != size[1] or states.ndim == 4 or math.isqrt(patches) ** 2 == patches
    if channels_last or not is_square or hasattr(vision_config, "num_detection_tokens"):
        raise ValueError(
            f"The vision tower {vision_config.model_type!r} gives states of shape {tuple(states.shape)}, of which it "
            f"is not known which are the patches, so `vision_pooling='mean'` cannot be used. {remedy}"
        )


def check_images(images: Any) -> None:
    if isinstance(images, (list, tuple)) and not images:
        raise ValueError("`images` is an empty list. Give at least one image.")
    for row, image in enumerate(images if isinstance(images, (list, tuple)) else [images]):
        # Arrays and tensors have a dtype; images of PIL do not, and cannot hold NaN.
        if hasattr(image, "dtype") and not bool(torch.as_tensor(image).isfinite().all()):
            raise ValueError(f"Image {row} of `images` holds NaN or infinite values. Remove or repair it.")


def check_text(text: Any) -> str | list[str] | None:
    if text is None or isinstance(text, str):
        return text
    if not isinstance(text, (list, tuple)):
        raise ValueError(f"`text` must be a string or a list of strings, got {type(text).__name__}.")
    if not text:
        raise ValueError("`text` is an empty list. Give at least one text.")
    for row, item in enumerate(text):
        if not isinstance(item, str):
            raise ValueError(f"Text {row} of `text` must be a string, got {type(item).__name__}.")
    return list(text)


_CAUSAL = "attends causally"
_USE = "Use a decoder that honours `is_causal=False`, for example Llama, Qwen3, Mistral, Gemma or Phi-3."
# Sizes of a decoder's twin, by what the name of a field holds; the first that fits counts. Head widths stay.
_TWIN_LAYERS, _TWIN_HEADS = 8, 4
_TWIN_SIZES = (
    ("vocab", 128),
    ("chunk_size$", 16),
    ("position|layer|window|head|rank", None),
    ("experts_per|top_?k|moe_k|shared_expert|n_group|num_expert_group", 1),
    ("intermediate|ffn|n_inner|inner_dim|expert.*size", 64),
    ("expert", 4),
)


def _twin_size(name: str, value: Any, heads: int) -> Any:
    """A field of a decoder's config in that of its twin."""
    if isinstance(value, list):
        return [_twin_size(name, each, heads) for each in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name in ("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "num_kv_heads"):
        return _TWIN_HEADS if value >= heads else min(value, _TWIN_HEADS // 2)
    if name.endswith(("token_id", "token_index")):
        return 0 if name.startswith("pad") else 1
    size = next((size for part, size in _TWIN_SIZES if re.search(part, name)), None)
    return value if size is None else min(value, size)


def _field(config: Any, name: str) -> Any:
    """A field by its common name; also one that differs from layer to layer, which a config does not give."""
    return vars(config).get(config.attribute_map.get(name, name))


def _twin_config(config: Any, layers: int) -> Any:
    """The config of a small decoder of the same kind: kinds of layers, attention, positions and routing stay."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    heads, head_width, width = (_field(config, name) for name in ("num_attention_heads", "head_dim", "hidden_size"))
    small, depth = _TWIN_HEADS * (head_width or width // heads), config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, (list, tuple)) and len(value) == depth:
            value = value[:layers]
        if isinstance(value, int) and "shared_layers" in name:
            value = min(value, layers // 3)
        vars(config)[name] = small if value == width and "position" not in name else _twin_size(name, value, heads)
    config.num_hidden_layers = layers
    # Layers that differ from the others in such a field, as those with global attention of Gemma 4.
    per_layer: dict[int, Any] = getattr(getattr(config, "_heterogeneity_spec", None), "per_layer_overrides", {})
    for layer, overrides in list(per_layer.items()):
        overrides.update({name: _twin_size(name, value, heads) for name, value in overrides.items()})
        if layer >= layers:
            del per_layer[layer]
    if hasattr(config, "mamba_d_head"):
        config.mamba_n_heads = config.mamba_expand * small // config.mamba_d_head
    return config


def _twin(text_model: Any, layers: int) -> Any:
    """
    A small decoder with random float32 weights on the CPU, of the class and the config of an LLM: what it does of
    attention and padding, the LLM does, whose own weights would hide it behind rounding.
    """
    config = _twin_config(text_model.config.get_text_config(), layers)
    model_class: Any = type(text_model) if isinstance(text_model, PreTrainedModel) else MODEL_MAPPING[type(config)]
    attention = text_model.config._attn_implementation
    if attention not in ("eager", "sdpa"):  # others need an accelerator
        attention = "sdpa" if model_class._supports_sdpa else "eager"
    config._attn_implementation = attention
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            return model_class(config).eval()
    finally:
        torch.set_default_dtype(dtype)


def _find_twin_fault(text_model: Any) -> str | None:
    """What `_find_fault` says of the twin of few layers and, where that fails or is causal, of one of all layers."""
    config = text_model.config.get_text_config()
    if _field(config, "num_attention_heads") is None:
        return f"{_CAUSAL}: it has no attention heads. {_USE}"
    if config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False):
        return f"{_CAUSAL}: its ALiBi ranks a later token the higher the further away it is. {_USE}"
    depth = config.num_hidden_layers
    lists = [value for value in vars(config).values() if isinstance(value, (list, tuple)) and len(value) == depth]
    kinds = [str(kind) for kind in zip(*lists)]
    # As many layers as show each of their kinds.
    layers = min(depth, max(_TWIN_LAYERS, 1 + max(map(kinds.index, kinds), default=0)))
    try:
        fault = _find_fault(_twin(text_model, layers))
    except Exception:
        if layers == depth:
            raise
        fault = _CAUSAL
    if fault is None or layers == depth or not fault.startswith(_CAUSAL):
        return fault
    return _find_fault(_twin(text_model, depth))


@torch.no_grad()
def _find_fault(text_model: Any) -> str | None:
    """Why a decoder cannot be an LLM of LLM2CLIP, after its class name; `None` if it can."""
    device = text_model.device
    ids = torch.arange(1, 7, device=device).repeat(2, 1)
    ids[1, -1] += 1
    pad, mask = torch.ones(2, 3, dtype=torch.long, device=device), torch.ones_like(ids)
    layouts = {
        "without a mask": (ids, None, 0),
        "padded right": (torch.cat([ids, pad], 1), torch.cat([mask, 0 * pad], 1), 0),
        "padded left": (torch.cat([pad, ids], 1), torch.cat([0 * pad, mask], 1), 3),
    }
    states = {}
    for layout, (input_ids, attention_mask, start) in layouts.items():
        output = text_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        states[layout] = output.last_hidden_state[:, start : start + ids.shape[1]].float()
    reference = states["without a mask"]
    scale = reference.abs().amax()
    # In float32 the layouts differ by up to 1e-3 (Gemma 3n), what depends on padding by 1.5e-2 and more.
    for layout, state in states.items():
        if not (state[0, 1] - state[1, 1]).abs().amax() > 1e-6 * scale:
            return (
                f"{_CAUSAL} ({layout}): an earlier token does not see a later one although `config.is_causal` is "
                f"False. {_USE}"
            )
        if not (state - reference).abs().amax() <= 4e-3 * scale:
            return (
                f"gives other hidden states when the text is {layout} than without padding, so embeddings would "
                "depend on the batch. Use a decoder with relative positions: Llama, Qwen3, Mistral, ..."
            )
    return None


_FAULTS: dict[Any, str | None] = {}  # by class and config


def assert_bidirectional(text_model: Any) -> None:
    """
    Checks that a decoder attends in both directions, whatever the padding.

    Two texts that differ in their last token go through the model without a mask, padded right and padded left: an
    earlier token must see the difference in each layout, and the layouts must agree. This is asked of a small float32
    copy of the architecture with random weights, on the CPU, so that neither dtype, device, quantisation nor size of
    the LLM matters; of the LLM itself, in float32, only where no such copy can be built.

    Args:
        text_model (`PreTrainedModel`): The LLM, with `config.is_causal=False`; it may be on the meta device.

    Raises:
        ValueError: if it does not; architectures such as GPT-2, Bloom or Mamba ignore the setting.
    """
    name = type(text_model).__name__
    key = (type(text_model), text_model.config._attn_implementation, text_model.config.to_json_string(use_diff=False))
    try:
        if key not in _FAULTS:
            _FAULTS[key] = _find_twin_fault(text_model)
        fault = _FAULTS[key]
    except Exception as error:  # of the model's own code
        # Nothing to look at: on the meta device, or partitioned by DeepSpeed.
        if next(text_model.parameters()).is_meta or next(text_model.parameters()).numel() == 0:
            return
        if text_model.dtype != torch.float32:
            raise ValueError(
                f"No small copy of {name} can be built to see how it attends ({type(error).__name__}: {error}), and "
                f"its own weights do not show it in {text_model.dtype}. Load it in float32."
            ) from error
        training = text_model.training
        fault = _find_fault(text_model.eval())
        text_model.train(training)
    if fault is not None:
        raise ValueError(f"{name} {fault}")


__all__ = [
    "assert_bidirectional",
    "check_ids",
    "check_images",
    "check_llm_embeds",
    "check_pixel_values",
    "check_text",
    "measure_vision_tower",
]
