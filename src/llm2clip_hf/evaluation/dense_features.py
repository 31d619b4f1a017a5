# SPDX-License-Identifier: Apache-2.0
"""
One vector in the joint space per patch of an image, without training (MaskCLIP, arXiv 2112.01071).

The token that stands for the image is made by attention over all patches, and what attention sums up, the projected
values, lies in the joint space. MaskCLIP takes every patch's own value instead of the sum: attention in which each
token sees itself only. Queries and keys play no part.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .encoding import evaluation_mode, normalize


__all__ = ["dense_image_features"]

_CLIP, _SIGLIP, _EVA02 = "clip_vision_model", "siglip_vision_model", "eva02_vision"


@torch.no_grad()
def dense_image_features(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    Embeddings of the patches of images in the joint space, as MaskCLIP makes them.

    In the tower's last block, attention gives every token its own value through the output projection (section
    "MaskCLIP" of that paper). As in its published code for a ViT, the residual connections and the MLP of that block
    stay; then come the final norm, the projection to the joint space and the L2 norm.

    A SigLIP tower sums its patches up in an attention pooling head: there the blocks stay as they are and every patch
    goes through the head by itself, which is MaskCLIP's step for the attention pooling of a ResNet. With
    `vision_pooling="cls"` or `"mean"` the last states are projected as that pooling does: without CLIP's final norm,
    and for SigLIP without the head, so that its last block takes the step.

    Args:
        model: `LLM2CLIPModel`, `CLIPModel` or `SiglipModel`, with a vision tower `clip_vision_model`,
            `siglip_vision_model` or `eva02_vision`; its train or eval mode is restored afterwards.
        pixel_values (`torch.FloatTensor` of shape `(B, 3, height, width)`):
            Images from the image processor, of any size: positions are interpolated to a size that is not the
            tower's own. Pixels beyond the last whole patch of a row or column are not seen.

    Returns:
        `torch.Tensor` of shape `(B, height // patch_size, width // patch_size, projection_dim)`, float32,
        L2-normalized, on the model's device: entry `[:, i, j]` is the patch in row `i` from the top and column `j`
        from the left. Without gradients.

    Raises:
        ValueError: for a tower of another kind, a model without an image side, or `pixel_values` of another shape or
            dtype or smaller than a patch.

    Example:
    >>> dense_image_features(model, torch.zeros(2, 3, 448, 672)).shape  # doctest: +SKIP
    torch.Size([2, 32, 48, 1280])
    """
    patch, own_size = tower_sizes(model)
    _check_pixels(pixel_values, patch)
    tower, projection = model.vision_model, getattr(model, "visual_projection", None)
    kind = tower.config.model_type
    pooled = getattr(model.config, "vision_pooling", "pooler") == "pooler"
    with evaluation_mode(model):
        height, width = pixel_values.shape[-2:]
        inputs = {
            "pixel_values": pixel_values.to(tower.device, tower.dtype),
            "interpolate_pos_encoding": (height, width) != (own_size, own_size),
        }
        if kind == _SIGLIP and pooled:
            states = _pool_each(_pooling_head(tower), tower(**inputs).last_hidden_state)
        else:
            with _own_values(_last_attention(tower)):
                states = tower(**inputs).last_hidden_state
            if kind == _CLIP and pooled:
                states = tower.post_layernorm(states)
        if kind != _SIGLIP:
            states = states[:, 1:]  # the class token
        if projection is not None and not isinstance(projection, nn.Identity):
            states = projection(states.to(projection.weight.dtype))
    return normalize(states.float()).unflatten(1, (height // patch, width // patch))


def tower_sizes(model: Any) -> tuple[int, int]:
    """Patch size and own image size of the vision tower, in pixels; a `ValueError` if it has no dense features."""
    tower = getattr(model, "vision_model", None)
    if not isinstance(tower, nn.Module) or not callable(getattr(model, "get_image_features", None)):
        raise ValueError(
            f"{type(model).__name__} is not a model of CLIP's interface with a vision tower, so it has no features of "
            "patches. Pass an `LLM2CLIPModel`, a `CLIPModel` or a `SiglipModel`."
        )
    config = getattr(tower, "config", None)
    kind = getattr(config, "model_type", type(tower).__name__)
    if config is None or kind not in (_CLIP, _SIGLIP, _EVA02):
        raise ValueError(
            f"The vision tower {kind!r} has no known value path from patches to the joint space. Dense features are "
            f"there for {_CLIP!r}, {_SIGLIP!r} and {_EVA02!r}."
        )
    return config.patch_size, config.image_size


def _check_pixels(pixel_values: Any, patch: int) -> None:
    if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
        got = pixel_values.dtype if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
        raise ValueError(
            f"`pixel_values` must be a floating-point tensor, got {got}. Let the image processor make it: "
            "`processor(images=..., return_tensors='pt')`."
        )
    if pixel_values.ndim != 4 or not len(pixel_values) or min(pixel_values.shape[-2:]) < patch:
        raise ValueError(
            "`pixel_values` must have shape (batch, channels, height, width) with at least one image and one patch of "
            f"{patch} x {patch} pixels, got {tuple(pixel_values.shape)}."
        )


def _last_attention(tower: Any) -> nn.Module:
    layers = tower.layers if tower.config.model_type == _EVA02 else tower.encoder.layers
    return layers[-1].self_attn


@contextmanager
def _own_values(attention: Any) -> Iterator[None]:
    """Attention whose output is each token's own value, through the output projection."""

    def replace(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> tuple[torch.Tensor, None]:
        values = module.v_proj(args[0] if args else kwargs["hidden_states"])
        # EVA02 has a norm between values and output projection.
        return module.out_proj(getattr(module, "inner_norm", nn.Identity())(values)), None

    hook = attention.register_forward_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _pooling_head(tower: Any) -> Any:
    head = getattr(tower, "head", None)
    if head is None:
        raise ValueError(
            f"The vision tower {_SIGLIP!r} was built without its pooling head (`vision_use_head=False`), so it gives "
            "no image vector. Load it with the head, or use `vision_pooling='mean'`."
        )
    return head


def _pool_each(head: Any, states: torch.Tensor) -> torch.Tensor:
    """What SigLIP's pooling head gives for each token of `states` `(B, N, C)` if that is the only one."""
    # Over one token, attention is that token's value. `in_proj` stacks queries, keys and values.
    attention = head.attention
    start = 2 * attention.embed_dim
    values = F.linear(states, attention.in_proj_weight[start:], attention.in_proj_bias[start:])
    values = attention.out_proj(values)
    return values + head.mlp(head.layernorm(values))
