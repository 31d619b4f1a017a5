# Copyright 2026 The llm2clip_hf authors.
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The vision tower: loaded to start a model from, and that of a model by itself, a backbone for other models."""

import copy
import importlib
import inspect
import json
import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MODEL_MAPPING, AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    can_return_tuple,
)

from .configuration_llm2clip import LLM2CLIPConfig
from .loading_llm2clip import (
    check_complete,
    find_file,
    load_within,
    part_config,
    part_keywords,
    skip_shards,
    source_keywords,
)


# Towers without patches of a stated size that put a pooled or class token before the tokens of the image.
POOLED_TOKEN_FIRST = ("dinov3_convnext", "pvt")


def vision_class(vision_config: Any) -> Any:
    """
    The class of a vision tower, also where the Auto classes of transformers leave it out (AltCLIP, BLIP, MetaCLIP 2).
    """
    config_class = type(vision_config)
    if config_class not in MODEL_MAPPING:
        module = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
        found = [name for name in dir(module) if name.endswith("VisionModel")]
        found = [name for name in found if getattr(getattr(module, name), "config_class", None) is config_class]
        if not found:
            raise ValueError(
                f"transformers has no model of images alone for a config of type {vision_config.model_type!r}. Use a "
                "vision backbone, such as CLIP, SigLIP, DINOv2, ViT, Swin or ConvNeXt."
            )
        AutoModel.register(config_class, getattr(module, found[0]), exist_ok=True)
    return MODEL_MAPPING[config_class]


def pooler_options(vision_config: Any, pooling: str) -> dict[str, Any]:
    """Keywords that leave out a tower's pooler where its output is not used, and checkpoints often have none (ViT)."""
    parameters = inspect.signature(vision_class(vision_config).__init__).parameters
    return {"add_pooling_layer": False} if pooling != "pooler" and "add_pooling_layer" in parameters else {}


def build_vision_tower(config: LLM2CLIPConfig) -> Any:
    """A new vision tower, with no more than its pooling needs."""
    return AutoModel.from_config(config.vision_config, **pooler_options(config.vision_config, config.vision_pooling))


def num_prefix_tokens(vision_config: Any, num_tokens: int, height: int, width: int) -> int:
    """How many of a tower's tokens stand before those of the image: class, register and pooled tokens."""
    patch = getattr(vision_config, "patch_size", None)
    if patch is None:
        return int(vision_config.model_type in POOLED_TOKEN_FIRST)
    patch = getattr(vision_config, "patch_stride", None) or patch  # where patches overlap (Hiera)
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    # A tower that merges patches has fewer tokens than patches, and none before them.
    return max(num_tokens - (height // patch_height) * (width // patch_width), 0)


def pool_image(
    outputs: Any, config: LLM2CLIPConfig, height: int, width: int, patch_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """One vector per image."""
    name, pooling = config.vision_config.model_type, config.vision_pooling
    if pooling == "pooler":
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None:
            raise ValueError(
                f"The vision tower {name!r} gives no pooled output, so `vision_pooling='pooler'` cannot be used. Set "
                "`vision_pooling` to 'cls' or 'mean'."
            )
        return pooled.flatten(1)
    states = getattr(outputs, "last_hidden_state", None)
    if states is not None and states.ndim == 4 and pooling == "mean":  # (batch, channels, height, width)
        return states.mean((2, 3))
    if states is None or states.ndim != 3:
        shape = None if states is None else tuple(states.shape)
        raise ValueError(
            f"The vision tower {name!r} gives states of shape {shape}, which have no tokens, so "
            f"`vision_pooling={pooling!r}` cannot be used. Set it to 'pooler' or 'mean'."
        )
    if pooling == "cls":
        return states[:, 0]
    if patch_mask is not None:
        weights = patch_mask.to(states.dtype).unsqueeze(-1)
        return (states * weights).sum(1) / weights.sum(1)
    return states[:, num_prefix_tokens(config.vision_config, states.shape[1], height, width) :].mean(1)


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


def run_vision_tower(
    model: Any, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None, **kwargs: Any
) -> BaseModelOutputWithPooling:
    """What the `vision_model` of a model makes of images, with the pooled vector of its config."""
    check_pixel_values(pixel_values, model.config, check_finite=not model.training)
    if interpolate_pos_encoding is not None:
        kwargs["interpolate_pos_encoding"] = interpolate_pos_encoding
    outputs = model.vision_model(pixel_values=pixel_values.to(model.vision_model.dtype), **kwargs)
    height, width = pixel_values.shape[-2:]
    return BaseModelOutputWithPooling(
        last_hidden_state=outputs.last_hidden_state,
        pooler_output=pool_image(outputs, model.config, height, width, kwargs.get("pixel_attention_mask")),
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
    )


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
        source, kwargs = skip_shards(pretrained_model_name_or_path, kwargs, cls.config_class, others)
        loaded: Any = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
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
        return run_vision_tower(self, pixel_values, interpolate_pos_encoding, **kwargs)


def vision_kwargs(shared: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Keywords for loading the vision tower; it comes from one repository, and is trained, in float32."""
    source = {name: shared[name] for name in ("revision", "trust_remote_code") if shared.get(name) is not None}
    return part_keywords("vision", shared, {**source, **given})


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


def pretrained_logit_scale(name: str, kwargs: dict[str, Any]) -> float:
    """The trained logarithm of the logit scale of a CLIP-like checkpoint."""
    for file, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        listed = find_file(name, index, kwargs)
        if listed is not None:
            file = json.loads(listed.read_text(encoding="utf-8"))["weight_map"].get("logit_scale", file)
        found = find_file(name, file, kwargs)
        scale = None if found is None else load_state_dict(str(found)).get("logit_scale")
        if scale is not None and scale.numel() == 1:
            return float(scale)
    raise ValueError(
        f"`logit_scale_init_value` is 'pretrained', but {name!r} has no `logit_scale` of one number. Give a number, "
        "or leave it out."
    )
