# SPDX-License-Identifier: Apache-2.0
"""Which parts of the model stage 2 trains: `train_vision` and `train_text` of the arguments, applied to a model."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from .adapters import lora_config
from .clip_training_args import LLM2CLIPTrainingArguments
from .lora import attach_lora


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

    Args:
        model: `LLM2CLIPModel` or a model of transformers with CLIP's interface.
        args ([`LLM2CLIPTrainingArguments`]): `train_vision`, `train_text`, `vision_lora` and `text_lora`.

    Raises:
        ValueError: if a part that should be trained is not there, or nothing but the logit scale would be trained.
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
