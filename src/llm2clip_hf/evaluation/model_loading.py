# SPDX-License-Identifier: Apache-2.0
"""Load any model of CLIP's interface with its processor, for evaluation."""

from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

from ..modeling.loading_llm2clip import find_adapters, load_pretrained_text


__all__ = ["describe_model", "load_model_and_processor"]


def load_model_and_processor(
    name: str,
    *,
    processor: str | None = None,
    text_model: str | None = None,
    load_text_model: bool = True,
    revision: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model with its processor, from a folder or a repository."""
    remote = {"trust_remote_code": trust_remote_code, "revision": revision}
    if find_adapters(name, remote) is not None:
        raise ValueError(
            f"`{name}` holds the adapters of an LLM, which alone has no joint space of images and texts. Give a model "
            "that was trained with it, and these as `text_model` where the model does not name them."
        )
    config = AutoConfig.from_pretrained(name, **remote)
    extra: dict[str, Any] = {}
    if config.model_type == "llm2clip":
        extra["load_text_model"] = load_text_model
        if text_model is not None:
            if not load_text_model:
                raise ValueError(
                    f"The LLM `{text_model}` is named, but texts are to be stored embeddings, without an LLM. Give "
                    "one of `text_model` and `text_embeddings`."
                )
            extra["text_model"] = load_pretrained_text(text_model, None, {"dtype": _dtype(dtype)})
    elif text_model is not None or not load_text_model:
        raise ValueError(f"`{name}` is a {config.model_type} model, which has a text encoder of its own.")
    model = AutoModel.from_pretrained(name, dtype=_dtype(dtype), **extra, **remote).eval()
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise ValueError(
            f"`{name}` is a {type(model).__name__}, which has no joint space of images and texts "
            "(`get_image_features`, `get_text_features`)."
        )
    return model, _load_processor(
        processor or name, load_text_model, {**remote, "revision": None if processor else revision}
    )


def describe_model(
    model: Any, name: str, revision: str | None = None, *, processor: Any = None, text_model: str | None = None
) -> dict[str, Any]:
    """What a result says of its model."""
    config = model.config
    described = {
        "name": name,
        "revision": revision,
        "class": type(model).__name__,
        "model_type": config.model_type,
        "dtype": _dtypes_of(model, inside=False),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if getattr(config, "text_base_model", None):
        described["text_base_model"] = config.text_base_model
        described["text_base_revision"] = config.text_base_revision
    if getattr(model, "text_model", None) is not None:
        described["text_dtype"] = _dtypes_of(model, inside=True)
    if text_model is not None:
        described["text_model"] = text_model
    image_processor = getattr(processor, "image_processor", processor)
    if image_processor is not None:
        described["image_processor"] = type(image_processor).__name__
        described["image_processor_backend"] = getattr(image_processor, "backend", None)
    return described


def _dtypes_of(model: Any, inside: bool) -> str:
    """Types of the weights in or outside the text tower, e.g. `"bfloat16"`, joined by `+` where there are several."""
    found = {
        str(parameter.dtype).removeprefix("torch.")
        for name, parameter in model.named_parameters()
        if name.startswith("text_model.") == inside
    }
    return "+".join(sorted(found))


def _dtype(name: str | None) -> torch.dtype:
    return getattr(torch, name or "float32")


def _load_processor(name: str, needs_tokenizer: bool, remote: dict[str, Any]) -> Any:
    try:
        processor = AutoProcessor.from_pretrained(name, **remote)
        if hasattr(processor, "image_processor") or not needs_tokenizer:
            return processor
        found = type(processor).__name__
    except (OSError, ValueError, KeyError, ImportError) as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not needs_tokenizer:
        try:
            return _ImageProcessorOnly(AutoImageProcessor.from_pretrained(name, **remote))
        except (OSError, ValueError, ImportError) as error:
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise ValueError(
        f"`{name}` has no processor with an image processor and a tokenizer ({found}). Save one beside the model with "
        "`processor.save_pretrained`, or name one with `processor`."
    )


class _ImageProcessorOnly:
    """An image processor where a processor is expected; there is no tokenizer."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, None
