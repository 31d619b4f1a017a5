# SPDX-License-Identifier: Apache-2.0
"""
Optimizer parameter groups of CLIP training: what decays, and the layer-wise learning rate of the vision tower.

(1) Frozen parameters are left out.
(2) Weight decay goes to weight matrices and convolution kernels only (paper recipe: 0.05, and 0 for 1-d parameters,
    biases, class and position embeddings and the logit scale).
(3) The learning rate of the vision tower falls by `vision_layer_decay` per layer from its output to its input; LoRA
    weights have the rate of the layer that they are in.
(4) Parameters with the same learning rate and decay share a group; the order of groups depends on nothing but the
    model, so that an optimizer state loads into the groups it came from.
"""

import logging
import re
from typing import Any

from torch import nn


logger = logging.getLogger(__name__)

# Wrappers that put their own level into parameter names.
_WRAPPER_LEVELS = re.compile(r"(^|(?<=\.))(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|module)\.")


def is_decayed(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether the parameter `name` owned directly by `module` takes weight decay, see step (2)."""
    if parameter.ndim < 2 or isinstance(module, nn.Embedding):
        return False
    # `weight` and `in_proj_weight` are matrices; any other direct parameter of two or more dimensions is a token or a
    # table of positions (`cls_token`, `position_embeddings`, `mask_token`, `register_tokens`, `probe`).
    return name.endswith("weight")


def vision_layer_ids(vision_model: nn.Module) -> tuple[dict[str, int], int]:
    """
    Depth of every parameter of a vision tower.

    The stack of layers is the `nn.ModuleList` (or `nn.Sequential`) outside any other one that holds the most
    parameters. What is registered before it is the input (embeddings, stem: depth 0), element `i` has depth `i + 1`,
    what comes after it (final norm, head) has depth `number of layers + 1`. So has a layer norm that stands between
    the embeddings and the layers (CLIP's `pre_layrnorm`): the released code of the paper slows down embeddings and
    layers and nothing else. This holds for CLIP, SigLIP, DINOv2, BEiT, EVA02, MobileNet and most other towers.

    Args:
        vision_model (`nn.Module`): The tower.

    Returns:
        `tuple[dict[str, int], int]`: Depth by parameter name, and the number of layers; an empty dictionary and 0
        when there is no stack of at least two layers.
    """
    stacks: dict[str, nn.Module] = {}
    for name, module in vision_model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1 and name and not nested:
            stacks[name] = module
    sizes = {name: sum(p.numel() for p in stack.parameters()) for name, stack in stacks.items()}
    if not sizes:
        return {}, 0
    stack_name = max(sizes, key=lambda name: sizes[name])  # the first of equals
    num_layers = len(stacks[stack_name])  # type: ignore[arg-type]

    depths: dict[str, int] = {}
    passed = False
    for name, _ in vision_model.named_parameters():
        if name.startswith(f"{stack_name}."):
            passed = True
            depths[name] = int(name[len(stack_name) + 1 :].split(".", 1)[0]) + 1
        else:
            depths[name] = num_layers + 1 if passed or _is_input_norm(vision_model, name) else 0
    return depths, num_layers


def _is_input_norm(vision_model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to a layer norm outside of the embeddings, given that it precedes the layers."""
    owner = name.rpartition(".")[0]
    return isinstance(vision_model.get_submodule(owner), (nn.LayerNorm, nn.RMSNorm)) and "embed" not in owner


def build_optimizer_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float, vision_layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    r"""
    Parameter groups for an AdamW-like optimizer.

    The learning rate of a parameter at depth `d` of a tower with `L` layers is
    `learning_rate * vision_layer_decay ** (L + 1 - d)`, everything outside the vision tower has `learning_rate`
    (released recipe of the paper: 0.85 for the vision tower, none for the text side).

    Args:
        model (`nn.Module`): The model; its vision tower is the attribute `vision_model`.
        learning_rate (`float`): Learning rate of the projections, the text side and the tower's output.
        weight_decay (`float`): Decay of weight matrices and kernels.
        vision_layer_decay (`float`, *optional*, defaults to 1.0): Factor per layer, in (0, 1]; 1 turns it off.

    Returns:
        `list[dict]`: Groups with `params`, `lr`, `weight_decay` and, for reading, `name` and `parameter_names`.
        Highest learning rate first (the Trainer logs the rate of the first group), decayed before undecayed.

    Raises:
        ValueError: if `vision_layer_decay` is not in (0, 1] or no parameter is trainable.

    Example:
    >>> model = nn.Linear(3, 2)
    >>> [group["weight_decay"] for group in build_optimizer_groups(model, learning_rate=0.1, weight_decay=0.05)]
    [0.05, 0.0]
    """
    if not 0.0 < vision_layer_decay <= 1.0:
        raise ValueError(
            f"`vision_layer_decay` must be in (0, 1], got {vision_layer_decay}. Use 1.0 for one learning rate."
        )
    scales = _vision_scales(model, vision_layer_decay) if vision_layer_decay < 1.0 else {}

    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full_name = _WRAPPER_LEVELS.sub("", f"{prefix}.{name}" if prefix else name)
            scale, decayed = scales.get(id(parameter), 1.0), is_decayed(module, name, parameter)
            group = groups.setdefault((scale, decayed), _new_group(learning_rate, weight_decay, scale, decayed))
            group["params"].append(parameter)
            group["parameter_names"].append(full_name)
    if not groups:
        raise ValueError("No parameter of the model is trainable. Set `requires_grad` on the parts to train.")
    return [groups[key] for key in sorted(groups, key=lambda key: (-key[0], not key[1]))]


def _new_group(learning_rate: float, weight_decay: float, scale: float, decayed: bool) -> dict[str, Any]:
    return {
        "params": [],
        "lr": learning_rate * scale,
        "weight_decay": weight_decay if decayed else 0.0,
        "name": f"lr x {scale:.4g}, {'decay' if decayed else 'no decay'}",
        "parameter_names": [],
    }


def _vision_scales(model: nn.Module, vision_layer_decay: float) -> dict[int, float]:
    """Learning-rate factor by parameter identity, for the parameters of the vision tower."""
    vision_model = next((module for name, module in model.named_modules() if name.endswith("vision_model")), None)
    if vision_model is None:
        logger.warning("The model has no `vision_model`: `vision_layer_decay` is not applied.")
        return {}
    depths, num_layers = vision_layer_ids(vision_model)
    if not depths:
        logger.warning(
            "`%s` has no stack of layers: `vision_layer_decay` is not applied, the tower trains at one learning rate.",
            type(vision_model).__name__,
        )
        return {}
    logger.info("Layer-wise learning rate over %d vision layers, factor %g.", num_layers, vision_layer_decay)
    return {
        id(parameter): vision_layer_decay ** (num_layers + 1 - depths[name])
        for name, parameter in vision_model.named_parameters()
    }
