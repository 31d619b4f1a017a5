# SPDX-License-Identifier: Apache-2.0
"""The forward pass of stage 2: one or several batches of pairs to embeddings, in chunks of rows if asked."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..gradcache import Embeds, embed_chunks, split_rows
from . import clip_text
from .arguments import LLM2CLIPTrainingArguments
from .parameters import has_llm, is_llm2clip


_IMAGE_NAMES = ("pixel_values", "interpolate_pos_encoding", "pixel_attention_mask", "spatial_shapes")
_LLM_NAMES = ("input_ids", "attention_mask", "position_ids")
CLIP_TEXT_NAMES = ("clip_input_ids", "clip_attention_mask")


def embed_batches(
    model: nn.Module,
    core: Any,
    batches: list[dict[str, Any]],
    args: LLM2CLIPTrainingArguments,
    autocast: Callable[[], AbstractContextManager],
) -> Embeds:
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
    # Images and texts in two calls: one with both would make logits between all of them, which no loss here needs.
    apart = is_llm2clip(core)
    later = {*CLIP_TEXT_NAMES, *((*_LLM_NAMES, "llm_embeds") if apart else ())}

    def call(forward: Callable[..., Any], rows: dict[str, Any]) -> Any:
        return forward(**{name: value for name, value in rows.items() if name not in later})

    def embeds_of(rows: dict[str, Any], outputs: Any) -> Embeds:
        embeds = {"image_embeds": outputs["image_embeds"]}
        if apart:
            others = {*_IMAGE_NAMES, *CLIP_TEXT_NAMES}
            outputs = core.forward(**{name: value for name, value in rows.items() if name not in others})
        embeds["text_embeds"] = outputs["text_embeds"]
        if CLIP_TEXT_NAMES[0] in rows:
            with autocast():  # which only the model's own `forward` was given
                tokens: list[Any] = [rows.get(name) for name in CLIP_TEXT_NAMES]
                embeds |= clip_text.embed_clip_text(core, embeds["text_embeds"], *tokens)
        return embeds

    return embed_chunks(model, chunks, call, embeds_of, recompute=torch.is_grad_enabled())


def _with_llm_embeds(model: Any, features: dict[str, Any], chunk_size: int) -> dict[str, Any]:
    """Runs the frozen LLM once, outside the graph: in its own dtype, as for stored embeddings."""
    text = {n: value for n, value in features.items() if n in _LLM_NAMES}
    with torch.no_grad():
        chunks = [model.get_llm_embeds(**rows) for rows in split_rows(text, chunk_size)]
    rest = {name: value for name, value in features.items() if name not in text}
    return rest | {"llm_embeds": torch.cat(chunks)}


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether a trained part of the model normalizes with statistics of the batch, which a chunk does not know."""
    batch_norms = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm)
    return any(
        isinstance(module, batch_norms) and any(p.requires_grad for p in module.parameters())
        for module in model.modules()
    )
