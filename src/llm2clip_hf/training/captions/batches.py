# SPDX-License-Identifier: Apache-2.0
"""
Batches of captions through the LLM with little padding and, if asked, in the memory of one mini-batch.

(1) The rows of all columns (anchors, positives, negatives) are put together and sorted by length.
(2) They are cut into mini-batches, each trimmed to its longest row, and embedded one after the other.
(3) With a limit on the size of a mini-batch, they are recomputed in the backward pass, see `gradcache`.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import distributed
from ...data.sampling import length_groups, token_budget_batches
from ..gradcache import embed_chunks


Features = dict[str, Any]
SENTENCE_EMBEDDING = "sentence_embedding"
# What FlashAttention is told about a batch of rows laid end to end; rebuilt for every mini-batch.
_BOUNDARY_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def embed_columns(
    model: nn.Module,
    columns: Sequence[Features],
    mini_batch_size: int | None = None,
    mini_batch_tokens: int | None = None,
) -> list[Tensor]:
    """
    The sentence embeddings of all columns, with one graph over all of them.

    Equal to `[model(column)["sentence_embedding"] for column in columns]`, up to rounding and the draws of dropout.
    """
    sizes = [num_rows(column) for column in columns]
    parts = mini_batches(columns, mini_batch_size, mini_batch_tokens)
    limited = mini_batch_size is not None or mini_batch_tokens is not None
    embeddings = embed_chunks(
        model,
        parts,
        lambda forward, part: forward(part.features),
        lambda part, outputs: {SENTENCE_EMBEDDING: outputs[SENTENCE_EMBEDDING]},
        recompute=limited and torch.is_grad_enabled(),
    )[SENTENCE_EMBEDDING]
    order = torch.tensor([row for part in parts for row in part.rows], device=embeddings.device)
    return list(embeddings[order.argsort()].split(sizes))


# ------------------------------------------------------------------------------------------------- cutting into passes


def mini_batches(
    columns: Sequence[Features], mini_batch_size: int | None = None, mini_batch_tokens: int | None = None
) -> "list[MiniBatch]":
    """
    Cuts the rows of all columns into mini-batches of similar length.

    Without a limit the cut is the one that costs least, see `length_groups`; flattened rows, which have no padding,
    are then not cut. Columns with different instructions are not mixed, because pooling knows one length of
    instruction per mini-batch. Every process makes equally many, which models sharded over processes need.
    """
    offsets = np.cumsum([0, *(num_rows(column) for column in columns)])
    kinds: dict[str, list[int]] = {}
    for number, column in enumerate(columns):
        kinds.setdefault(repr(sorted(_shared_values(column).items())), []).append(number)
    parts: list[MiniBatch] = []
    for members in kinds.values():
        group = _Group.of([columns[number] for number in members])
        numbers = np.concatenate([np.arange(offsets[n], offsets[n + 1]) for n in members])
        if mini_batch_size is None and mini_batch_tokens is None:
            cut = [list(range(len(numbers)))] if group.is_flat else length_groups(group.lengths)
        else:
            limit = mini_batch_size or len(numbers)
            budgets = token_budget_batches(group.lengths, mini_batch_tokens or sys.maxsize)
            cut = [rows[i : i + limit] for rows in budgets for i in range(0, len(rows), limit)]
        parts += [MiniBatch(group, rows, numbers[rows].tolist()) for rows in cut]
    _cut_into(parts, max(distributed.all_gather_sizes(len(parts), columns[0]["input_ids"].device)))
    return parts


def _cut_into(parts: "list[MiniBatch]", count: int) -> None:
    """Halves the part of most rows until there are `count` parts, or nothing is left to halve."""
    while len(parts) < count:
        largest = max(range(len(parts)), key=lambda number: len(parts[number].rows))
        group, places, rows = parts[largest]
        half = len(rows) // 2
        if not half:
            return
        halves = [MiniBatch(group, places[cut], rows[cut]) for cut in (slice(half), slice(half, None))]
        parts[largest : largest + 1] = halves


# ----------------------------------------------------------------------------------------------------- rows of columns


def num_rows(column: Features) -> int:
    """Rows of a padded or flattened column."""
    return len(column["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in column else len(column["input_ids"])


class _Group(NamedTuple):
    """Columns of the same kind as one: padded to one width, on the side that they were padded on, or end to end."""

    features: Features
    token_keys: list[str]  # features of shape (rows, width), or (1, tokens) when flat
    lengths: list[int]
    is_flat: bool
    is_left_padded: bool

    @classmethod
    def of(cls, columns: list[Features]) -> "_Group":
        first = columns[0]
        keys = [name for name, value in first.items() if _is_per_token(first, value) and name not in _BOUNDARY_KEYS]
        merged = _shared_values(first)
        if "cu_seq_lens_q" in first:
            merged |= {name: torch.cat([column[name] for column in columns], dim=1) for name in keys}
            merged |= {name: first[name] for name in _BOUNDARY_KEYS if name in first}
            lengths = torch.cat([column["cu_seq_lens_q"].diff() for column in columns]).tolist()
            return cls(merged, keys, lengths, is_flat=True, is_left_padded=False)
        width = max(column["input_ids"].shape[1] for column in columns)
        masks = [column["attention_mask"] for column in columns if "attention_mask" in column]
        left = bool(masks) and not bool(torch.stack([mask[:, 0].all() for mask in masks]).all())
        for name in keys:
            missing = [width - column[name].shape[1] for column in columns]
            padding = [(n, 0) if left else (0, n) for n in missing]
            merged[name] = torch.cat([F.pad(column[name], pad) for column, pad in zip(columns, padding)])
        mask = merged.get("attention_mask", torch.ones_like(merged["input_ids"]))
        return cls(merged, keys, mask.sum(dim=1).tolist(), is_flat=False, is_left_padded=left)

    def select(self, rows: list[int]) -> Features:
        """Some rows, trimmed to the longest of them."""
        lengths = [self.lengths[row] for row in rows]
        device = self.features["input_ids"].device
        if self.is_flat:
            starts = np.concatenate([[0], np.cumsum(self.lengths)])
            spans = [np.arange(starts[row], starts[row + 1]) for row in rows]
            tokens = torch.from_numpy(np.concatenate(spans)).to(device)
            return (
                self.features
                | {name: self.features[name][:, tokens] for name in self.token_keys}
                | _boundaries(lengths, self.features)
            )
        width = self.features["input_ids"].shape[1]
        longest = max(1, *lengths)
        kept = slice(width - longest, width) if self.is_left_padded else slice(longest)
        index = torch.tensor(rows, device=device)
        return self.features | {name: self.features[name][index][:, kept] for name in self.token_keys}


class MiniBatch(NamedTuple):
    """Some rows of columns of one kind."""

    group: _Group
    places: list[int]  # within the group
    rows: list[int]  # their numbers in all columns laid one behind the other

    @property
    def features(self) -> Features:
        """What the model takes; made anew each time, because modules write their results into it."""
        return self.group.select(self.places)


def _is_per_token(column: Features, value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.shape == column["input_ids"].shape


def _shared_values(column: Features) -> Features:
    """What holds for all rows of a column, such as the length of its instruction."""
    shared = {}
    for name, value in column.items():
        if name in _BOUNDARY_KEYS or _is_per_token(column, value):
            continue
        if isinstance(value, Tensor):
            if len(value.reshape(-1).unique()) != 1:
                raise ValueError(
                    f"The feature `{name}` of a column has shape {tuple(value.shape)}, which is neither one value per "
                    f"token, {tuple(column['input_ids'].shape)}, nor one value for all rows. Leave it out."
                )
            value = value.reshape(-1)[0].item()
        shared[name] = value
    return shared


def _boundaries(lengths: list[int], like: Features) -> Features:
    """The boundary keys that `like` has, for rows of these lengths laid end to end."""
    device = like["cu_seq_lens_q"].device
    counts = torch.tensor(lengths, device=device)
    ends = F.pad(counts.cumsum(0), (1, 0)).to(like["cu_seq_lens_q"].dtype)
    values: Features = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    values |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    if "seq_idx" in like:
        rows = torch.arange(len(lengths), device=device, dtype=like["seq_idx"].dtype)
        values["seq_idx"] = rows.repeat_interleave(counts)[None]
    return {name: value for name, value in values.items() if name in like}
