# SPDX-License-Identifier: Apache-2.0
"""Which parts of the model stage 2 trains: `train_vision` and `train_text` of the arguments, applied to a model."""

import logging
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..lora import attach_lora, lora_config
from .arguments import LLM2CLIPTrainingArguments


# Released code of the paper (`--lora`): rank 32, alpha 32, dropout 0.1 on queries, keys and values.
VISION_LORA = {
    "r": 32,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "target_modules": r".*\.(q_proj|k_proj|v_proj|query|key|value|qkv)",
}
_VISION_HEADS = ("visual_projection",)
_TEXT_HEADS = ("text_adapter", "text_projection")


def has_llm(model: Any) -> bool:
    """Whether the model is an `LLM2CLIPModel` that holds its LLM."""
    return is_llm2clip(model) and model.text_model is not None


def is_llm2clip(model: Any) -> bool:
    """Whether the model is an `LLM2CLIPModel`, also one loaded as remote code."""
    return getattr(getattr(model, "config", None), "model_type", None) == "llm2clip"


def prepare_trained_parts(model: Any, args: LLM2CLIPTrainingArguments) -> None:
    """
    Freezes parts of the model, or adds LoRA to them, as the arguments say.

    Parts that are to be trained keep the `requires_grad` that they have, so what was frozen by hand stays frozen. The
    LLM of an `LLM2CLIPModel` is frozen unless it gets LoRA.
    """
    vision_model: Any = getattr(model, "vision_model", None)
    text_model: Any = getattr(model, "text_model", None)
    if args.train_vision != "full" and vision_model is None:
        raise ValueError(f"`train_vision={args.train_vision!r}` needs `model.vision_model`, which the model has not.")
    if args.train_vision == "lora":
        attach_lora(vision_model, lora_config({**VISION_LORA, **_fields("vision_lora", args.vision_lora)}))
    elif args.train_vision == "projection":
        if not any(True for head in _parts(model, _VISION_HEADS) for _ in head.parameters()):
            raise ValueError(
                "`train_vision='projection'` needs a vision projection, and this model has none. Use 'frozen', or "
                "'full' or 'lora' to train the tower."
            )
        vision_model.requires_grad_(False)
    elif args.train_vision == "frozen":
        for part in [vision_model, *_parts(model, _VISION_HEADS)]:
            part.requires_grad_(False)

    if args.train_text == "lora":
        if text_model is None:
            raise ValueError(
                "`train_text='lora'` needs the LLM, which the model does not hold. Load it with "
                "`load_text_model=True`, or attach it with `model.attach_text_model(...)`."
            )
        attach_lora(text_model, lora_config(_fields("text_lora", args.text_lora)))
    elif has_llm(model):
        model.freeze_text_model()
    if args.train_text == "frozen":
        for part in [*([text_model] if text_model is not None else []), *_parts(model, _TEXT_HEADS)]:
            part.requires_grad_(False)
    _check_something_trains(model, args)


def frozen_towers(model: Any) -> list[nn.Module]:
    """The towers without a trained parameter; they stay in evaluation mode."""
    towers = _parts(model, ("vision_model", "text_model"))
    return [tower for tower in towers if not any(p.requires_grad for p in tower.parameters())]


def _parts(model: Any, names: Iterable[str]) -> list[nn.Module]:
    return [part for part in (getattr(model, name, None) for name in names) if isinstance(part, nn.Module)]


def _fields(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must hold fields of `peft.LoraConfig`, e.g. {{'r': 8}}, got {value!r}.")
    return value


def _check_something_trains(model: nn.Module, args: LLM2CLIPTrainingArguments) -> None:
    if not any(p.requires_grad for n, p in model.named_parameters() if n not in ("logit_scale", "logit_bias")):
        raise ValueError(
            f"`train_vision={args.train_vision!r}` with `train_text={args.train_text!r}` leaves nothing to train but "
            "the logit scale. Train at least one side."
        )


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


class LogitScaleClamp(TrainerCallback):
    """Keeps the logit scale in `[1, max_logit_scale]` after each optimizer step (CLIP, arXiv 2103.00020, 2.5)."""

    def __init__(self, max_logit_scale: float, deepspeed: bool = False) -> None:
        self.max_log = math.log(max_logit_scale)
        self.deepspeed = deepspeed

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called right after the optimizer's step."""
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, self.max_log)
            if self.deepspeed:
                self._clamp_copy(model.logit_scale)

    def _clamp_copy(self, parameter: torch.Tensor) -> None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        copy = safe_get_full_fp32_param(parameter)  # on all processes, each of which may hold a part
        if copy is not None:
            safe_set_full_fp32_param(parameter, copy.clamp(0.0, self.max_log))
        elif parameter.dtype != torch.float32:
            raise RuntimeError(
                f"DeepSpeed trains `logit_scale` in {parameter.dtype}, and its float32 copy, which has to be clamped, "
                "is out of reach without ZeRO. Set `zero_optimization.stage` to 1 or 2 in the DeepSpeed config."
            )
