# SPDX-License-Identifier: Apache-2.0
"""
The concatenated head of variant (d), `integration="concatenated"`: one text vector from both text encoders.

Table A8 of LLM2CLIP (arXiv 2411.04997) lists it as "+ concatenated head" and says no more. Here it is one linear layer
without bias over the concatenation of the two L2-normalised text embeddings, as wide as the joint space:

    concatenated_text_embeds = normalize(concat([clip_text_embeds, text_embeds]) @ head.weight.T)

It starts as the sum of the two, `head.weight = [I, I]`, so that it needs no random numbers and is of use from the
first step on. Gradients flow through it into both text encoders.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


__all__ = ["concatenated_text_embeds", "load_concatenated_text_head"]

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


def save_head(folder: Path, weight: torch.Tensor) -> None:
    """Writes the head into the folder of a model; the file appears whole or not at all."""
    file = folder / HEAD_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    save_file({"weight": weight.detach().contiguous().cpu()}, temporary)
    os.replace(temporary, file)


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
