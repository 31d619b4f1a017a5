# SPDX-License-Identifier: Apache-2.0
"""The loss of stage 1: in-batch InfoNCE over the captions of all devices, false negatives left out."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import distributed
from ...losses import ContrastiveLoss
from .batches import embed_columns, num_rows


TEXT_ID = "text_id"
_SHOWN_ROWS = 3


class CaptionContrastiveLoss(nn.Module):
    r"""
    Each anchor picks its positive among the positives and hard negatives of all devices.

    For anchors a, positives p and hard negatives n of all N rows, c = cosine:

        logits = scale * c(a, [p; n])                         # (N, N * (1 + number of hard-negative columns))
        loss = cross_entropy(logits, arange(N))               # mean over the anchors

    which is the released stage-1 objective (`HardNegativeNLLLoss`, scale 50). With `symmetric=True` it is averaged
    with `cross_entropy(scale * c(p, a), arange(N))`. On several devices every device returns its part of the loss,
    such that the mean over devices, which DistributedDataParallel takes of the gradients, is the loss of the full
    batch; devices may have different numbers of rows. Everything after the embeddings is computed in float32, and the
    matrix of logits is never held.

    With `mask_false_negatives` a candidate is left out of the denominator of a row if it is known to be right as well:
    the rows have equal labels (the same image), or the candidate's text is the row's anchor or positive, or both rows
    have the same anchor text. Without such repetitions in a batch the objective is the one above.

    Inputs, as of the losses of sentence-transformers: columns anchor, positive and any number of hard negatives;
    labels are optional whole numbers, one per row.
    """

    def __init__(
        self,
        model: Any,
        scale: float = 50.0,
        symmetric: bool = False,
        mask_false_negatives: bool = True,
        mini_batch_size: int | None = None,
        mini_batch_tokens: int | None = None,
    ) -> None:
        super().__init__()
        check_options(scale, mini_batch_size, mini_batch_tokens)
        self.model = model
        # In the embeddings' own type, beside a language model for nothing: rounding to 16 bits would be for speed.
        self.retrieval = ContrastiveLoss(direction="rows", compute_dtype=None)
        self.scale = scale
        self.symmetric = symmetric
        self.mask_false_negatives = mask_false_negatives
        self.mini_batch_size = mini_batch_size
        self.mini_batch_tokens = mini_batch_tokens

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        names = ("scale", "symmetric", "mask_false_negatives", "mini_batch_size", "mini_batch_tokens")
        return {name: getattr(self, name) for name in names}

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch."""
        columns = [dict(features) for features in sentence_features]
        _check_columns(columns, labels)
        given = [column.pop(TEXT_ID, None) for column in columns]
        keys = None
        if self.mask_false_negatives:
            ids = [hash_token_rows(column) if text_id is None else text_id for column, text_id in zip(columns, given)]
            keys = torch.stack(ids if labels is None else [*ids, labels.to(ids[0])], dim=1)
        embeddings = embed_columns(self.model, columns, self.mini_batch_size, self.mini_batch_tokens)
        with torch.autocast(embeddings[0].device.type, enabled=False):
            loss = self.loss_of_embeddings(embeddings, keys)
        if not torch.isfinite(loss):
            raise FloatingPointError(self._describe(loss, embeddings, columns))
        return loss

    def loss_of_embeddings(self, embeddings: Sequence[Tensor], keys: Tensor | None = None) -> Tensor:
        """The loss of embeddings, see the class."""
        unit = [F.normalize(each if each.dtype == torch.float64 else each.float(), dim=-1) for each in embeddings]
        anchors, positives, *negatives = unit
        sizes = _sizes_of_all_ranks(len(anchors), len(unit), anchors.device)
        if sum(sizes) == 1 and not negatives:
            raise ValueError(
                "The batch of all devices together is one row without a hard negative, so its positive has no "
                "competitor and nothing is learned. Raise `per_device_train_batch_size` or drop the last batch."
            )
        hard = torch.cat(negatives) if negatives else None
        masks = _mask_ids(keys, 0, 1, len(unit))
        loss = self.retrieval(anchors, positives, self.scale, mask_ids=masks, hard_negatives=hard, sizes=sizes)
        if self.symmetric:
            masks = _mask_ids(keys, 1, 0, len(unit))
            loss = (loss + self.retrieval(positives, anchors, self.scale, mask_ids=masks, sizes=sizes)) / 2
        return loss

    def _describe(self, loss: Tensor, embeddings: Sequence[Tensor], columns: Sequence[dict[str, Any]]) -> str:
        names = ["anchor", "positive", *(f"negative {number}" for number in range(1, len(columns) - 1))]
        found = [
            f"{name} {row} of the batch ({self._text(column, row)!r:.100})"
            for name, column, embedding in zip(names, columns, embeddings)
            for row in (~embedding.detach().isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        ]
        if len(found) == sum(map(len, embeddings)):
            return f"The loss is {loss.item()}: no embedding of this device is finite, whatever its text."
        if not found:
            return f"The loss is {loss.item()}, but all embeddings of this device are finite."
        more = f" and {len(found) - _SHOWN_ROWS} more" if len(found) > _SHOWN_ROWS else ""
        return f"The loss is {loss.item()}: not finite are the embeddings of {', '.join(found[:_SHOWN_ROWS])}{more}."

    def _text(self, column: dict[str, Any], row: int) -> str:
        tokenizer = getattr(self.model, "tokenizer", None) or getattr(self.model, "module", self.model).tokenizer
        if "cu_seq_lens_q" in column:
            begin, end = column["cu_seq_lens_q"][row : row + 2].tolist()
            ids = column["input_ids"][0, begin:end]
        else:
            ids = column["input_ids"][row][column["attention_mask"][row].bool()]
        return str(tokenizer.decode(ids, skip_special_tokens=True))


def check_options(scale: float, mini_batch_size: int | None, mini_batch_tokens: int | None) -> None:
    """Refuses a scale or a limit that is not positive."""
    if not scale > 0:
        raise ValueError(f"`scale` must be positive, got {scale}. The paper's code uses 50.")
    for name, value in {"mini_batch_size": mini_batch_size, "mini_batch_tokens": mini_batch_tokens}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be positive or None, got {value}.")


def _check_columns(columns: Sequence[dict[str, Any]], labels: Tensor | None) -> None:
    if len(columns) < 2:
        raise ValueError(f"The loss needs the columns anchor and positive, got {len(columns)} column(s) of text.")
    rows = [num_rows(column) for column in columns]
    if labels is not None:
        if labels.is_floating_point() or labels.ndim != 1:
            raise ValueError(
                f"Labels must be whole numbers, one per row, got {labels.dtype} of shape {tuple(labels.shape)}. They "
                "say which rows belong to the same image; remove a column of scores."
            )
        rows.append(len(labels))
    if len(set(rows)) != 1:
        raise ValueError(f"All columns of a batch and the labels need the same number of rows, got {rows}.")


def _sizes_of_all_ranks(rows: int, count: int, device: torch.device) -> list[int]:
    found = distributed.all_gather_sizes((rows, count), device)
    if len({columns for _, columns in found}) > 1:
        raise ValueError(
            f"The devices have batches of {[columns for _, columns in found]} columns. All of them must draw a step's "
            "batch from the same source."
        )
    return [each for each, _ in found]


def _mask_ids(keys: Tensor | None, query: int, answer: int, count: int) -> tuple[Tensor, Tensor] | None:
    """
    Ids of rows and of candidates, of which two agree where the candidate is right: its text is the row's query or
    answer, or it answers an equal query or a row of equal label. Candidates are the answers and what follows them.
    """
    if keys is None:
        return None
    keys = keys.where(keys != -1, torch.iinfo(keys.dtype).min)  # -1 agrees with nothing
    own = torch.cat([keys[:, [query]], keys[:, count:]], dim=1)
    others = range(2, count) if query == 0 else ()
    columns = [torch.cat([keys[:, [answer, answer]], own], dim=1)]
    columns += [torch.cat([keys[:, [other, other]], torch.full_like(own, -1)], dim=1) for other in others]
    return torch.cat([keys[:, [query, answer]], own], dim=1), torch.cat(columns)


# ---------------------------------------------------------------------------------------------------- equal token rows


def hash_token_rows(column: dict[str, Any]) -> Tensor:
    """
    A 64-bit number per row of tokens, equal for equal attended tokens, wherever they are padded.

    The sum over the attended positions of a mix of token and position; two different rows agree with a chance of about
    2 to the power of -64.
    """
    ids = column["input_ids"].long()
    if "cu_seq_lens_q" in column:
        ends = column["cu_seq_lens_q"].long()
        row = torch.arange(len(ends) - 1, device=ids.device).repeat_interleave(ends.diff())
        position = torch.arange(ids.shape[1], device=ids.device) - ends[row]
        return torch.zeros(len(ends) - 1, dtype=torch.int64, device=ids.device).index_add(
            0, row, _mix(ids[0], position)
        )
    mask = column.get("attention_mask", torch.ones_like(ids)).long()
    return (_mix(ids, mask.cumsum(dim=1) - 1) * mask).sum(dim=1)


def _mix(ids: Tensor, position: Tensor) -> Tensor:
    """Scrambles pairs of whole numbers into 64 bits; multiplications wrap around."""
    value = ids * -7046029254386353131 + (position + 1) * -4658895280553007687
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        # The mask makes the shift of a signed number a logical one.
        value = (value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return value
