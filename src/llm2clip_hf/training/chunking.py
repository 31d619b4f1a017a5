# SPDX-License-Identifier: Apache-2.0
"""
Encoders on a batch larger than memory: one graph, each chunk of rows recomputed in the backward pass.

The loss of contrastive training needs the embeddings of all rows at once, the encoders do not. (1) The rows go through
the model in chunks, each under a checkpoint that keeps nothing but its inputs; (2) the embeddings are put together
again; (3) one backward pass recomputes chunk after chunk. Gradients are those of the unchunked batch.

The loop runs inside the model's `forward`, not around it: DistributedDataParallel then sees one forward and one
backward pass, and reduces each gradient once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def chunked_forward(model: nn.Module, chunk_size: int) -> Iterator[None]:
    """
    Makes `model.forward` run in chunks of rows and return only the embeddings, for the duration of the context.

    Args:
        model (`nn.Module`): A model whose `forward` returns `image_embeds` and `text_embeds`, without a wrapper.
        chunk_size (`int`): Rows per chunk.
    """
    forward: Callable[..., Any] = model.forward
    was_patched = "forward" in model.__dict__

    def embed(rows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = forward(**rows)
        return outputs["image_embeds"], outputs["text_embeds"]

    def chunked(**features: torch.Tensor) -> dict[str, torch.Tensor]:
        chunks = split_rows(features, chunk_size)
        if torch.is_grad_enabled():
            parts = [checkpoint(embed, rows, use_reentrant=False) for rows in chunks]
        else:
            parts = [embed(rows) for rows in chunks]
        image_embeds, text_embeds = zip(*parts)
        outputs = {"image_embeds": torch.cat(image_embeds), "text_embeds": torch.cat(text_embeds)}
        # DistributedDataParallel looks for used parameters in the graph of what `forward` returns; the loss uses these
        # two outside of it.
        for name in ("logit_scale", "logit_bias"):
            if isinstance(getattr(model, name, None), nn.Parameter):
                outputs[name] = getattr(model, name).exp()
        return outputs

    model.forward = chunked  # type: ignore[method-assign]
    try:
        yield
    finally:
        if was_patched:
            model.forward = forward  # type: ignore[method-assign]
        else:
            del model.forward


def split_rows(features: dict[str, torch.Tensor], chunk_size: int) -> list[dict[str, torch.Tensor]]:
    """
    Cuts a batch into chunks of rows.

    Args:
        features (`dict[str, torch.Tensor]`): Tensors with the same number of rows.
        chunk_size (`int`): Rows per chunk; the last chunk may have fewer.

    Returns:
        `list[dict[str, torch.Tensor]]`: The chunks, in order.

    Raises:
        ValueError: if the tensors differ in their number of rows.
    """
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
