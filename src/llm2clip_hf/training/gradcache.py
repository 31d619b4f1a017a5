# SPDX-License-Identifier: Apache-2.0
"""
GradCache (arXiv 2101.06983) of both stages: a batch larger than memory through the encoders, in one graph.

The loss of contrastive training needs the embeddings of all rows at once, the encoders do not. (1) The rows go through
the model in chunks, each but the last under a checkpoint that keeps nothing but its inputs; (2) the embeddings are put
together again; (3) one backward pass recomputes chunk after chunk. Gradients are those of the unchunked batch, dropout
masks included. The micro-batches of gradient accumulation are chunks like any other, which is why their rows can be
negatives of one another.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.utils.checkpoint import checkpoint


Chunk = TypeVar("Chunk")
Embeds = dict[str, torch.Tensor]


def embed_chunks(
    model: nn.Module,
    chunks: Sequence[Chunk],
    call: Callable[[Callable[..., Any], Chunk], Any],
    embeds_of: Callable[[Chunk, Any], Embeds],
    *,
    recompute: bool,
) -> Embeds:
    """
    The embeddings of all chunks: `embeds_of(chunk, call(model, chunk))`, put together.

    All of it is one forward pass of `model`, into which hooks put the chunks before the last: DistributedDataParallel
    and FSDP2 then see one forward and one backward pass, and reduce each gradient once.
    """
    core: Any = extract_model_from_parallel(model)
    parts: list[Embeds] = []

    def embed(chunk: Chunk) -> Embeds:
        return embeds_of(chunk, call(core.forward, chunk))

    def before(module: nn.Module, inputs: Any) -> None:
        for chunk in chunks[:-1]:
            parts.append(checkpoint(embed, chunk, use_reentrant=False) if recompute else embed(chunk))

    def after(module: nn.Module, inputs: Any, outputs: Any) -> Embeds:
        parts.append(embeds_of(chunks[-1], outputs))
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        # DistributedDataParallel looks for used parameters in the graph of what `forward` returns; the loss uses these
        # two outside of it.
        scales = {name: getattr(core, name, None) for name in ("logit_scale", "logit_bias")}
        return found | {name: scale.exp() for name, scale in scales.items() if isinstance(scale, nn.Parameter)}

    # Before the hook by which FSDP2 prepares the backward pass of all that `forward` returns.
    with core.register_forward_pre_hook(before), core.register_forward_hook(after, prepend=True):
        outputs = call(model, chunks[-1])
    return {name: value for name, value in outputs.items() if name in parts[0]}


def split_rows(features: dict[str, torch.Tensor], chunk_size: int) -> list[dict[str, torch.Tensor]]:
    """Cuts a batch into chunks of rows."""
    rows = {name: len(value) for name, value in features.items()}
    if len(set(rows.values())) != 1:
        raise ValueError(f"All entries of a batch must have the same number of rows, got {rows}.")
    pieces = {name: value.split(chunk_size) for name, value in features.items()}
    return [dict(zip(pieces, chunk)) for chunk in zip(*pieces.values())]
