# SPDX-License-Identifier: Apache-2.0
"""
CLIP's own text encoder beside the LLM (LLM2CLIP, arXiv 2411.04997, tables 9 and A8).

Variant (b), `integration="both"`, trains images against the LLM and against CLIP's text encoder; variant (c),
`"aligned"`, also the two text encoders against each other; variant (d), `"concatenated"`, also images against a
trained head over both, see `clip_text_head`. The losses are added with equal weights, as the paper names none.

During training the text encoder is a submodule of the model, `clip_text_model`; in a saved folder it is a folder of
its own beside the model, `clip_text_model/`, which `CLIPTextModelWithProjection.from_pretrained` loads. The head lies
in that folder too; `load_concatenated_text_head` loads it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ...data import ImageTextCollator
from .parameters import is_llm2clip


HEAD_NAME = "concatenated_text_head"
# Beside the text encoder of CLIP, without which it is of no use.
HEAD_FILE = "clip_text_model/concatenated_text_head.safetensors"


def build_head(projection_dim: int) -> nn.Linear:
    """The head before training: the sum of the two text embeddings."""
    head = nn.Linear(2 * projection_dim, projection_dim, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(projection_dim).repeat(1, 2))
    return head


def concatenated_text_embeds(
    head: nn.Linear, clip_text_embeds: torch.Tensor, text_embeds: torch.Tensor
) -> torch.Tensor:
    """
    Text embeddings of the concatenated head.

    Args:
        head (`nn.Linear`): The head, as of `load_concatenated_text_head`.
        clip_text_embeds (`torch.Tensor` of shape `(batch, projection_dim)`):
            Embeddings of the texts by CLIP's own text encoder; normalised here.
        text_embeds (`torch.Tensor` of shape `(batch, projection_dim)`):
            Embeddings of the same texts by the LLM and its adaptor; normalised here.

    Returns:
        `torch.Tensor` of shape `(batch, projection_dim)`, float32, L2-normalised, in the joint space of the images.

    Raises:
        ValueError: if the two differ in shape, or their width is not that of the head.

    Example:
    >>> head = torch.nn.Linear(4, 2, bias=False)
    >>> concatenated_text_embeds(head, torch.randn(3, 2), torch.randn(3, 2)).shape
    torch.Size([3, 2])
    """
    if clip_text_embeds.shape != text_embeds.shape or 2 * text_embeds.shape[-1] != head.in_features:
        raise ValueError(
            f"`clip_text_embeds` and `text_embeds` have the shapes {tuple(clip_text_embeds.shape)} and "
            f"{tuple(text_embeds.shape)}; the head takes two of width {head.in_features // 2}. Embed the same texts "
            "with the two text encoders that were saved with it."
        )
    both = [F.normalize(embeds.float(), dim=-1) for embeds in (clip_text_embeds, text_embeds)]
    return F.normalize(head(torch.cat(both, dim=-1)).float(), dim=-1)


def load_concatenated_text_head(folder: str | Path) -> nn.Linear:
    """
    The head that a run with `integration="concatenated"` has saved.

    Args:
        folder (`str` or `Path`): Folder of the model or of a checkpoint; it holds `clip_text_model/`.

    Returns:
        `nn.Linear`: from `2 * projection_dim` to `projection_dim`, without bias, on the CPU, not to be trained.

    Raises:
        ValueError: if the folder holds no such head, or its file is damaged.

    Example:
    >>> clip_text_model = CLIPTextModelWithProjection.from_pretrained("out/clip_text_model")  # doctest: +SKIP
    >>> text_embeds = concatenated_text_embeds(  # doctest: +SKIP
    ...     load_concatenated_text_head("out"),
    ...     embed_texts(clip_text_model, texts, processor=clip_tokenizer),
    ...     embed_texts(model, texts, processor=processor),
    ... )
    """
    file = Path(folder) / HEAD_FILE
    if not file.is_file():
        raise ValueError(
            f"`{file}` does not exist. Name the folder of a run with `integration='concatenated'`; other runs train "
            "no concatenated head."
        )
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"`{file}` cannot be read: {error}. Copy it again from where it was trained.") from error
    weight = state.get("weight")
    if len(state) != 1 or weight is None or weight.ndim != 2 or weight.shape[1] != 2 * weight.shape[0]:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        raise ValueError(
            f"`{file}` holds {shapes}, expected `weight` of shape (projection_dim, 2 * projection_dim). Use the file "
            "that the trainer wrote."
        )
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
    head.load_state_dict(state)
    return head.requires_grad_(False).eval()


NAME = "clip_text_model"


def attach_clip_text_model(model: Any, clip_text_model: Any, integration: str) -> None:
    """Makes CLIP's text encoder, and for variant (d) the concatenated head, part of the model that is trained."""
    if integration == "replace":
        if clip_text_model is not None:
            raise ValueError(
                "`clip_text_model` has no effect with `integration='replace'`. Set 'both', 'aligned' or "
                "'concatenated', or leave it out."
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
    if integration != "concatenated":
        # Of an earlier run on this model; it would be left without a gradient.
        model._modules.pop(HEAD_NAME, None)
    elif not hasattr(model, HEAD_NAME):
        model.add_module(HEAD_NAME, build_head(width))
    keys = {f"{NAME}.{key}" for key in clip_text_model.state_dict()} | {f"{HEAD_NAME}.weight"}
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *keys}


def embed_clip_text(
    model: Any, text_embeds: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Text embeddings that the attached parts add to those of the LLM."""
    outputs = getattr(model, NAME)(input_ids=input_ids, attention_mask=attention_mask)
    embeds = {"clip_text_embeds": F.normalize(outputs.text_embeds.float(), dim=-1)}
    if hasattr(model, HEAD_NAME):
        head = getattr(model, HEAD_NAME)
        embeds["concatenated_text_embeds"] = concatenated_text_embeds(head, embeds["clip_text_embeds"], text_embeds)
    return embeds


def loss_pairs(embeds: Mapping[str, torch.Tensor], integration: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The pairs of embeddings whose losses are added."""
    pairs = [("image_embeds", "text_embeds")]
    if integration != "replace":
        pairs.append(("image_embeds", "clip_text_embeds"))
    if integration in ("aligned", "concatenated"):
        pairs.append(("clip_text_embeds", "text_embeds"))
    if integration == "concatenated":
        pairs.append(("image_embeds", "concatenated_text_embeds"))
    return [(embeds[one], embeds[other]) for one, other in pairs]


def split_state(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A state dict without the entries of the attached parts, and those entries."""
    attached = (f"{NAME}.", f"{HEAD_NAME}.")
    plain = {key: tensor for key, tensor in state.items() if not key.startswith(attached)}
    return plain, {key: tensor for key, tensor in state.items() if key.startswith(attached)}


def save_attached(folder: Path, model: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Writes the attached parts beside a model, given their entries of its state dict."""
    prefix = f"{NAME}."
    own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    getattr(model, NAME).save_pretrained(folder / NAME, state_dict=own)
    if hasattr(model, HEAD_NAME):
        weight = state[f"{HEAD_NAME}.weight"]
        save_file({"weight": weight.detach().contiguous().cpu()}, folder / HEAD_FILE)


def load_attached_state(folder: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """The entries of the attached parts of the state dict of a checkpoint; empty for a model without them."""
    if not hasattr(model, NAME):
        return {}
    state = load_file(folder / NAME / "model.safetensors")
    entries = {f"{NAME}.{key}": tensor for key, tensor in state.items()}
    if hasattr(model, HEAD_NAME):
        entries[f"{HEAD_NAME}.weight"] = load_concatenated_text_head(folder).weight
    elif (folder / HEAD_FILE).exists():
        raise ValueError(
            f"`{folder}` holds a concatenated head. Resume with `integration='concatenated'`, as the run began."
        )
    return entries


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
        """
        for position, sample in enumerate(samples):
            if "text" not in sample:
                raise ValueError(
                    f"Sample {position} has no `text` for CLIP's text encoder, only {sorted(sample)}. Make the "
                    "data set with `captions`, `store` and `with_text=True`."
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


__all__ = ["ClipTextCollator", "concatenated_text_embeds", "load_concatenated_text_head"]
