# SPDX-License-Identifier: Apache-2.0
"""
CLIP's own text encoder beside the LLM (LLM2CLIP, arXiv 2411.04997, tables 9 and A8).

Variant (b), `integration="both"`, trains images against the LLM and against CLIP's text encoder; variant (c),
`"aligned"`, also the two text encoders against each other. The losses are added with equal weights, as the paper
names none.

During training the text encoder is a submodule of the model, `clip_text_model`; in a saved folder it is a folder of
its own beside the model, `clip_text_model/`, which `CLIPTextModelWithProjection.from_pretrained` loads.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from ..data import ImageTextCollator
from .trained_parts import is_llm2clip


__all__ = ["ClipTextCollator"]

NAME = "clip_text_model"


def attach_clip_text_model(model: Any, clip_text_model: Any, integration: str) -> None:
    """
    Makes CLIP's text encoder part of the model that is trained.

    Args:
        model (`LLM2CLIPModel`): The model.
        clip_text_model (`CLIPTextModelWithProjection`): Or any model that takes `input_ids` and `attention_mask` and
            returns `text_embeds` as wide as the model's joint space.
        integration (`str`): The option of that name.

    Raises:
        ValueError: if it does not fit the model, or the option and it do not go together.
    """
    if integration == "replace":
        if clip_text_model is not None:
            raise ValueError(
                "`clip_text_model` has no effect with `integration='replace'`. Set 'both' or 'aligned', or leave it "
                "out."
            )
        return
    if clip_text_model is None:
        raise ValueError(
            f"`integration={integration!r}` needs CLIP's text encoder. Pass "
            "`clip_text_model=CLIPTextModelWithProjection.from_pretrained(...)` to the trainer."
        )
    if not is_llm2clip(model):
        raise ValueError(
            f"`integration={integration!r}` needs an `LLM2CLIPModel`, got {type(model).__name__}, which has a text "
            "encoder of its own."
        )
    width = getattr(getattr(clip_text_model, "config", None), "projection_dim", None)
    if width != model.config.projection_dim:
        raise ValueError(
            f"`clip_text_model` projects to width {width}, the model to {model.config.projection_dim}. Build the "
            f"model with `projection_dim={width}`, or load the text encoder with "
            f"`projection_dim={model.config.projection_dim}, ignore_mismatched_sizes=True`."
        )
    model.add_module(NAME, clip_text_model)
    keys = {f"{NAME}.{key}" for key in clip_text_model.state_dict()}
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *keys}


def embed_clip_text(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """L2-normalised text embeddings of the attached encoder, of shape `(batch, projection_dim)`, float32."""
    outputs = getattr(model, NAME)(input_ids=input_ids, attention_mask=attention_mask)
    return F.normalize(outputs.text_embeds.float(), dim=-1)


def split_state(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A state dict without the entries of the attached encoder, and those entries under the encoder's own names."""
    prefix = f"{NAME}."
    plain = {key: tensor for key, tensor in state.items() if not key.startswith(prefix)}
    return plain, {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}


def load_clip_text_state(folder: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """The encoder's entries of the state dict of a checkpoint; empty for a model without the encoder."""
    if not hasattr(model, NAME):
        return {}
    state = load_file(folder / NAME / "model.safetensors")
    return {f"{NAME}.{key}": tensor for key, tensor in state.items()}


class ClipTextCollator:
    """
    Adds the tokens of CLIP's own text encoder to the batches of another collator.

    Args:
        clip_tokenizer: Tokenizer of that encoder; texts are padded to the longest and truncated to its
            `model_max_length` (77 for CLIP).
        collator (*optional*): Makes the rest of the batch; `ImageTextCollator()` by default, for stored embeddings.

    Inputs are samples with `text`, and with `llm_embeds` where the LLM's embeddings are stored; the collator sees
    `text` only in samples without `llm_embeds`.

    Example:
    >>> collator = ClipTextCollator(clip_tokenizer, ImageTextCollator(processor))  # doctest: +SKIP
    >>> collator(samples)["clip_input_ids"].shape  # doctest: +SKIP
    torch.Size([8, 12])
    """

    def __init__(self, clip_tokenizer: Any, collator: Any = None) -> None:
        self.clip_tokenizer = clip_tokenizer
        self.collator = collator or ImageTextCollator()

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        The batch of `collator` with `clip_input_ids` and `clip_attention_mask`, int64 of shape `(batch, length)`.

        Raises:
            ValueError: if a sample has no `text`.
        """
        for position, sample in enumerate(samples):
            if "text" not in sample:
                raise ValueError(
                    f"Sample {position} has no `text` for CLIP's text encoder, only {sorted(sample)}. Let the data "
                    "set return the captions beside their embeddings."
                )
        tokens = self.clip_tokenizer(
            [sample["text"] for sample in samples], padding=True, truncation=True, return_tensors="pt"
        )
        rest = [
            {name: value for name, value in sample.items() if name != "text" or "llm_embeds" not in sample}
            for sample in samples
        ]
        added = {"clip_input_ids": tokens["input_ids"], "clip_attention_mask": tokens["attention_mask"]}
        return {**self.collator(rest), **added}
