# SPDX-License-Identifier: Apache-2.0
"""
Encoders on a batch larger than memory: one graph, each chunk of rows recomputed in the backward pass.

The loss of contrastive training needs the embeddings of all rows at once, the encoders do not. (1) The rows go through
the model in chunks, each under a checkpoint that keeps nothing but its inputs; (2) the embeddings are put together
again; (3) one backward pass recomputes chunk after chunk. Gradients are those of the unchunked batch.

The loop runs inside the model's `forward`, not around it: DistributedDataParallel then sees one forward and one
backward pass, and reduces each gradient once. The micro-batches of gradient accumulation are chunks like any other,
which is why their rows can be negatives of one another.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .clip import clip_text
from .clip.arguments import LLM2CLIPTrainingArguments
from .clip.parameters import has_llm, is_llm2clip


_IMAGE_NAMES = ("pixel_values", "interpolate_pos_encoding", "pixel_attention_mask", "spatial_shapes")
_TEXT_NAMES = ("input_ids", "attention_mask", "position_ids", "llm_embeds")
CLIP_TEXT_NAMES = ("clip_input_ids", "clip_attention_mask")


def embed_batches(
    model: nn.Module,
    core: Any,
    batches: list[dict[str, Any]],
    args: LLM2CLIPTrainingArguments,
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, torch.Tensor]:
    """Embeddings of all rows of some batches by one forward pass of `model`, which wraps `core`."""
    chunks = []
    for features in batches:
        rows = len(features["pixel_values"])
        size = min(args.encoder_chunk_size or rows, rows)
        if "input_ids" in features and has_llm(core) and args.train_text != "lora":
            features = _with_llm_embeds(core, features, size)
        chunks.extend(split_rows(features, size))
    if len(chunks) == 1 and args.torch_compile and not hasattr(core, clip_text.NAME):
        outputs = model(**chunks[0])  # the forward pass that was compiled
        return {name: outputs[name] for name in ("image_embeds", "text_embeds")}
    embed_clip_text = None
    if CLIP_TEXT_NAMES[0] in chunks[0]:

        def embed_clip_text(*inputs: Any) -> dict[str, torch.Tensor]:
            # Only the model's own `forward` was given autocast.
            with autocast():
                return clip_text.embed_clip_text(core, *inputs)

    with chunked_forward(core, embed_clip_text):
        outputs = model(chunks=chunks)
    return {name: value for name, value in outputs.items() if name.endswith("_embeds")}


def _with_llm_embeds(model: Any, features: dict[str, Any], chunk_size: int) -> dict[str, Any]:
    """Runs the frozen LLM once, outside the graph: in its own dtype, as for stored embeddings."""
    text = {n: value for n, value in features.items() if n in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        chunks = [model.get_llm_embeds(**rows) for rows in split_rows(text, chunk_size)]
    rest = {name: value for name, value in features.items() if name not in text}
    return rest | {"llm_embeds": torch.cat(chunks)}


@contextmanager
def chunked_forward(
    model: Any, embed_clip_text: Callable[..., dict[str, torch.Tensor]] | None = None
) -> Iterator[None]:
    """
    Makes `model.forward` take a list of batches as `chunks` and return only the embeddings of all of them, for the
    duration of the context.

    With one chunk nothing is recomputed; with more, each is in the backward pass. An `LLM2CLIPModel` embeds images and
    texts in two calls, because a call with both makes logits between all of them, which no loss here needs.
    """
    forward: Callable[..., Any] = model.forward

    def embed(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        clip_text = [rows.get(name) for name in CLIP_TEXT_NAMES]
        embeds = _embed_pairs(
            forward, {name: value for name, value in rows.items() if name not in CLIP_TEXT_NAMES}, is_llm2clip(model)
        )
        if embed_clip_text is not None:
            embeds |= embed_clip_text(embeds["text_embeds"], *clip_text)
        return embeds

    def chunked(chunks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if len(chunks) > 1 and torch.is_grad_enabled():
            parts = [checkpoint(embed, rows, use_reentrant=False) for rows in chunks]
        else:
            parts = [embed(rows) for rows in chunks]
        outputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        # DistributedDataParallel looks for used parameters in the graph of what `forward` returns; the loss uses these
        # two outside of it.
        for name in ("logit_scale", "logit_bias"):
            if isinstance(getattr(model, name, None), nn.Parameter):
                outputs[name] = getattr(model, name).exp()
        return outputs

    with exchanged_forward(model, chunked):
        yield


def _embed_pairs(forward: Callable[..., Any], rows: dict[str, torch.Tensor], apart: bool) -> dict[str, torch.Tensor]:
    """Embeddings of pairs; `apart` for a model that takes one modality alone and then makes no square of logits."""
    if not apart:
        outputs = forward(**rows)
        return {name: outputs[name] for name in ("image_embeds", "text_embeds")}
    images = {name: value for name, value in rows.items() if name not in _TEXT_NAMES}
    texts = {name: value for name, value in rows.items() if name not in _IMAGE_NAMES}
    return {
        "image_embeds": forward(**images)["image_embeds"],
        "text_embeds": forward(**texts)["text_embeds"],
    }


@contextmanager
def exchanged_forward(model: Any, replacement: Callable[..., Any]) -> Iterator[None]:
    """Puts another function in place of `model.forward` for the duration of the context."""
    forward, was_patched = model.forward, "forward" in model.__dict__
    model.forward = replacement
    try:
        yield
    finally:
        if was_patched:
            model.forward = forward
        else:
            del model.forward


def split_rows(features: dict[str, torch.Tensor], chunk_size: int) -> list[dict[str, torch.Tensor]]:
    """Cuts a batch into chunks of rows."""
    rows = {name: len(value) for name, value in features.items()}
    if len(set(rows.values())) != 1:
        raise ValueError(f"All entries of a batch must have the same number of rows, got {rows}.")
    pieces = {name: value.split(chunk_size) for name, value in features.items()}
    return [dict(zip(pieces, chunk)) for chunk in zip(*pieces.values())]


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether a trained part of the model normalises with statistics of the batch, which a chunk does not know."""
    batch_norms = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm)
    return any(
        isinstance(module, batch_norms) and any(p.requires_grad for p in module.parameters())
        for module in model.modules()
    )
