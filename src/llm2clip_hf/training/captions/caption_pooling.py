# SPDX-License-Identifier: Apache-2.0
"""Pooling of a caption encoder for sentence-transformers: the template's leading tokens are read, not pooled.

This file travels: every saved caption encoder carries a copy in its root folder, so that
`SentenceTransformer(folder, trust_remote_code=True)` works where `llm2clip_hf` is not installed. It therefore imports
nothing but the standard library, torch and sentence-transformers.
"""

import os
import shutil
from typing import Any

import torch
from sentence_transformers.base.modules import Module


class CaptionPooling(Module):
    r"""
    The mean over a text's own tokens, or the state of its last token, in float32.

    Equal to `pool_text(last_hidden_state, attention_mask, prefix_length, pooling)` of `llm2clip_hf.modeling`: the mean
    is over what follows the template's header (caption and end-of-turn token); the header (begin-of-text, role) is
    left out. A row with nothing after the header is the mean of all its attended tokens. Left padding, right padding
    and the unpadded batches of FlashAttention give the same vector.
    """

    config_keys = ["embedding_dimension", "prefix_length", "prompt_overhead", "pooling"]

    def __init__(
        self, embedding_dimension: int, prefix_length: int, prompt_overhead: int = 0, pooling: str = "mean"
    ) -> None:
        super().__init__()
        if embedding_dimension < 1:
            raise ValueError(f"`embedding_dimension` must be positive, got {embedding_dimension}.")
        if prefix_length < 0 or prompt_overhead < 0:
            raise ValueError(
                f"`prefix_length` and `prompt_overhead` must be 0 or more, got {prefix_length} and {prompt_overhead}."
            )
        if pooling not in ("mean", "eos", "last"):
            raise ValueError(f"`pooling` must be 'mean', 'eos' or 'last', got {pooling!r}.")
        self.embedding_dimension = embedding_dimension
        self.prefix_length = prefix_length
        self.prompt_overhead = prompt_overhead
        self.pooling = pooling

    def get_embedding_dimension(self) -> int:
        """Width of the embedding."""
        return self.embedding_dimension

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` of shape `(batch, embedding_dimension)`, float32, to the features."""
        hidden = features["token_embeddings"]
        excluded = self.prefix_length
        if features.get("prompt_length") is not None:
            # An int at inference, a tensor of one or of batch equal values in training.
            prompt_length = int(torch.as_tensor(features["prompt_length"]).reshape(-1)[0])
            excluded = max(excluded, prompt_length - self.prompt_overhead)
        if "cu_seq_lens_q" in features:
            features["sentence_embedding"] = self._pool_flattened(hidden[0], features["cu_seq_lens_q"], excluded)
        else:
            mask = features.get("attention_mask")
            mask = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask
            features["sentence_embedding"] = self._pool_padded(hidden, mask.to(hidden.device), excluded)
        return features

    def _pool_padded(self, hidden: torch.Tensor, mask: torch.Tensor, excluded: int) -> torch.Tensor:
        attended = mask.bool()  # (batch, length)
        order = attended.long().cumsum(dim=1)
        if self.pooling == "mean":
            pooled = attended & (order > excluded)
            pooled = torch.where(pooled.any(dim=1, keepdim=True), pooled, attended)
        else:
            pooled = attended & (order == order[:, -1:])
        # where() instead of a product: a padded position may hold inf or NaN, and 0 * inf is NaN.
        kept = torch.where(pooled.unsqueeze(-1), hidden.float(), 0.0)
        return kept.sum(dim=1) / pooled.sum(dim=1, keepdim=True).clamp(min=1)

    def _pool_flattened(self, hidden: torch.Tensor, boundaries: torch.Tensor, excluded: int) -> torch.Tensor:
        if self.pooling != "mean":
            return hidden[boundaries[1:].long() - 1].float()
        lengths = boundaries[1:] - boundaries[:-1]  # (batch,)
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)
        positions = torch.arange(hidden.shape[0], device=hidden.device) - boundaries[:-1][rows]
        skipped = torch.where(lengths > excluded, excluded, 0)
        weights = (positions >= skipped[rows]).float().unsqueeze(-1)  # (tokens, 1)
        sums = torch.zeros(len(lengths), hidden.shape[1], device=hidden.device)
        sums = sums.index_add(0, rows, hidden.float() * weights)
        return sums / (lengths - skipped).clamp(min=1).unsqueeze(-1)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Writes the configuration, and this file into the root of the saved encoder (beside `modules.json`)."""
        self.save_config(output_path)
        target = os.path.join(os.path.dirname(os.path.normpath(output_path)), os.path.basename(__file__))
        if os.path.abspath(target) != os.path.abspath(__file__):
            shutil.copyfile(__file__, target)
