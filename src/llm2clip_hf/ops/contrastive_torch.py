# SPDX-License-Identifier: Apache-2.0
r"""
Chunked PyTorch twin of the Triton kernels: the path for CPU and MPS, the oracle of the tests, a baseline on CUDA.

Legend: `x` (n, D) images, `y` (M, D) texts, `s = scale * x @ y.T` (n, M) logits, `R` (n,) and `C` (M,) the log-sum-exp
of the rows and columns of `s` without each row's pair, `G = dL/ds`. Only `_BUFFER_ELEMENTS` logits exist at a time.
The backward recomputes them, except those of the first rows that fit `kept_rows`.

The pair of row i is `j == i + row_offset`. It stands apart from `R` and `C`: a well-fitted pair differs from the
log-sum-exp over all columns by less than its rounding. With ids, (i, j) is positive when `row_ids[i] == col_ids[j]`;
with `ignore`, it is left out of the loss instead if any of the K ids agrees, unless it is the pair.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


# 64 MiB in fp32: large enough for full GEMM speed, small enough to stay a constant next to the features.
_BUFFER_ELEMENTS = 1 << 24
# Logits kept from forward to backward, so that the fifth matrix product of a small problem is saved: 256 MiB of a
# host's memory (8192 x 8192 in fp32), 16 MiB of a device's, where beyond 2048 x 2048 the tile kernels take over.
_KEPT_LOGITS = 1 << 26
_KEPT_LOGITS_ON_DEVICE = 1 << 22
# exp(s - b) is shared by both directions of the backward while R and C lie within this many nats of b.
_MAX_SPREAD = 40.0
# A column sum below this, relative to the largest logit of the chunk, has lost digits and is computed again.
_MIN_COLUMN_SUM = 2.0**-60


class Pairs(NamedTuple):
    """Which pairs are positive and which are left out; see the module docstring."""

    row_offset: int
    row_ids: Tensor | None  # (n, K), one id unless `ignore`
    col_ids: Tensor | None  # (M, K)
    ignore: bool

    @property
    def grouped(self) -> bool:
        """Whether equal ids are positives."""
        return self.row_ids is not None and not self.ignore


class Lse(NamedTuple):
    """Log-sum-exps without the pair, logits of the pairs, sums of grouped positives; empty where not asked for."""

    row: Tensor  # (n,)
    col: Tensor  # (M,)
    pair: Tensor  # (n,), 0 where the pair is not among the columns
    row_pos: Tensor  # (n,) with `Pairs.grouped`
    col_pos: Tensor  # (M,) with `Pairs.grouped`


class LseGrads(NamedTuple):
    """What the backward of `lse_pair` needs: the gradients of its outputs and both log-sum-exps."""

    row: Tensor
    col: Tensor
    pair: Tensor
    row_pos: Tensor
    col_pos: Tensor
    row_lse: Tensor
    col_lse: Tensor


class _Rows(NamedTuple):
    """One chunk of rows: its range and what the pair rule says about it."""

    start: int
    stop: int
    diagonal: tuple[Tensor, Tensor]  # row (within the chunk) and column of the pairs j == i + row_offset
    same: Tensor | None  # (rows, M) any equal id


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _multiplies_in_16_bits(x: Tensor) -> bool:
    # Tensor cores take bf16 and return fp32. G in fp16 would need a scale of its own, so fp16 is widened instead.
    return x.is_cuda and x.dtype == torch.bfloat16


def operand(x: Tensor, compute: torch.dtype) -> Tensor:
    """`x`, rounded to `compute`, as it enters matrix products."""
    x = x.to(compute)
    return x if _multiplies_in_16_bits(x) else x.to(_accumulation_dtype(x.dtype))


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b in the dtype of `out`; `a` is brought to the dtype of the operand `b` first."""
    if b.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a.to(b.dtype), b, out_dtype=out.dtype, out=out)


def _logits(x: Tensor, yt: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """scale * x @ yt in the dtype of `out`; 16-bit operands are scaled after the product, not rounded again."""
    return torch.mm(x * scale, yt, out=out) if x.dtype == out.dtype else _product(x, yt, out).mul_(scale)


def add_product(out: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """out += a @ b, or = for the first; 16-bit operands, which only CUDA multiplies so, add up in the dtype of out."""
    if out.is_cuda and b.dtype != out.dtype:
        torch.addmm(out, a.to(b.dtype), b, beta=0 if first else 1, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=0 if first else 1)


def _chunk_rows(num_rows: int, num_cols: int) -> int:
    return max(1, min(num_rows, _BUFFER_ELEMENTS // max(num_cols, 1)))


def _chunks(num_rows: int, num_cols: int, pairs: Pairs, device: torch.device) -> Iterator[_Rows]:
    step = _chunk_rows(num_rows, num_cols)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        first = max(start, -pairs.row_offset)
        last = max(first, min(stop, num_cols - pairs.row_offset))
        rows = torch.arange(first, last, device=device)
        same = None
        if pairs.row_ids is not None and pairs.col_ids is not None:
            for row_ids, col_ids in zip(pairs.row_ids[start:stop].unbind(1), pairs.col_ids.unbind(1)):
                equal = row_ids[:, None] == col_ids[None, :]
                same = equal if same is None else same.logical_or_(equal)
        yield _Rows(start, stop, (rows - start, rows + pairs.row_offset), same)


def _hide_ignored(s: Tensor, rows: _Rows, pairs: Pairs) -> None:
    """Set ignored logits to -inf, in place."""
    if pairs.ignore and rows.same is not None:
        hidden = rows.same.clone()
        hidden[rows.diagonal] = False
        s.masked_fill_(hidden, -torch.inf)


def _hide(s: Tensor, rows: _Rows, pairs: Pairs) -> None:
    """Set the pairs and ignored logits to -inf, in place."""
    if pairs.ignore and rows.same is not None:
        s.masked_fill_(rows.same, -torch.inf)
    s[rows.diagonal] = -torch.inf


def kept_rows(num_rows: int, num_cols: int, device: torch.device) -> int:
    """How many of the first rows' logits the forward keeps for the backward: all of a small problem."""
    limit = _KEPT_LOGITS if device.type == "cpu" else _KEPT_LOGITS_ON_DEVICE
    if num_rows * num_cols <= limit:
        return num_rows
    step = _chunk_rows(num_rows, num_cols)
    return limit // max(num_cols, 1) // step * step


def lse_pair(
    x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, direction: str = "both", kept: Tensor | None = None
) -> Lse:
    """
    R, C (natural logarithms), pairs and sums of positives; fills `kept` (k, M) with logits of the first k rows.
    """
    dtype = scale.dtype
    n, m = x.shape[0], y.shape[0]
    rows_too, cols_too = direction != "columns", direction != "rows"
    row_lse, pair = x.new_empty(n if rows_too else 0, dtype=dtype), x.new_zeros(n, dtype=dtype)
    col_lse = x.new_full((m if cols_too else 0,), -torch.inf, dtype=dtype)
    row_pos, col_pos = (x.new_zeros(size if pairs.grouped else 0, dtype=dtype) for size in (n, m))
    yt = y.t()
    buffer = x.new_empty((_chunk_rows(n, m), m), dtype=dtype)
    stored = 0 if kept is None else kept.shape[0]
    for rows in _chunks(n, m, pairs, x.device):
        part = slice(rows.start, rows.stop)
        out = buffer[: rows.stop - rows.start]
        s = _logits(x[part], yt, scale, kept[part] if kept is not None and rows.stop <= stored else out)
        pair[part][rows.diagonal[0]] = s[rows.diagonal]
        if pairs.grouped and rows.same is not None:
            positive = torch.where(rows.same, s, 0.0)
            row_pos[part] = positive.sum(1)
            col_pos += positive.sum(0)
            del positive
        _hide(s, rows, pairs)
        if x.device.type != "cpu":  # no host synchronisation; exponentials are cheap here
            if rows_too:
                row_lse[part] = torch.logsumexp(s, 1)
            if cols_too:
                col_lse = torch.logaddexp(col_lse, torch.logsumexp(s, 0))
            continue
        # One exponential serves both directions: columns add up the row-normalised values again.
        top = s.amax(1).clamp_min(torch.finfo(dtype).min)
        exp = torch.sub(s, top[:, None], out=out).exp_()
        if rows_too:
            row_lse[part] = top + exp.sum(1).log()
        if not cols_too:
            continue
        shift = top.max()
        col_sum = (top - shift).exp() @ exp
        chunk_lse = shift + col_sum.log()
        if bool((col_sum < _MIN_COLUMN_SUM).any()):
            if rows.stop > stored:
                s = _logits(x[part], yt, scale, out)
                _hide(s, rows, pairs)
            chunk_lse = torch.logsumexp(s, 0)
        col_lse = torch.logaddexp(col_lse, chunk_lse)
    return Lse(row_lse, col_lse, pair, row_pos, col_pos)


def _logit_gradient(s: Tensor, rows: _Rows, pairs: Pairs, grads: LseGrads, out: Tensor, other: Tensor) -> Tensor:
    """The gradient of one chunk of logits, in `out`, which may be `s`; `other` is a second buffer of that shape."""
    part = slice(rows.start, rows.stop)
    if len(grads.row) and len(grads.col):
        row_lse, col_lse = grads.row_lse[part, None], grads.col_lse[None, :]
        grad_row, grad_col = grads.row[part, None], grads.col[None, :]
        base = torch.maximum(row_lse.max(), col_lse.max())
        spread = base - torch.minimum(row_lse.min(), col_lse.min())
        if s.device.type == "cpu" and bool(spread < _MAX_SPREAD):
            torch.add(grad_row * (base - row_lse).exp(), grad_col * (base - col_lse).exp(), out=other)
            g = torch.sub(s, base, out=out).exp_().mul_(other)
        else:
            torch.sub(s, col_lse, out=other).exp_().mul_(grad_col)
            g = torch.sub(s, row_lse, out=out).exp_().mul_(grad_row).add_(other)
    elif len(grads.row):
        g = torch.sub(s, grads.row_lse[part, None], out=out).exp_().mul_(grads.row[part, None])
    else:
        g = torch.sub(s, grads.col_lse, out=out).exp_().mul_(grads.col)
    if pairs.grouped and rows.same is not None:
        g += torch.where(rows.same, grads.row_pos[part, None] + grads.col_pos, 0.0)
    g[rows.diagonal] += grads.pair[part][rows.diagonal[0]]
    return g


def lse_pair_backward(
    x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, grads: LseGrads, need_x: bool, need_y: bool,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `x` and `y` in the dtype of `scale`; an empty tensor for one that is not needed."""
    dtype = scale.dtype
    n, m = x.shape[0], y.shape[0]
    dx = x.new_empty(x.shape if need_x else (0,), dtype=dtype)
    dy = x.new_zeros(y.shape if need_y else (0,), dtype=dtype)
    # A row or column without any candidate has no gradient; -inf - (-inf) would make it NaN.
    row_lse, col_lse = (lse.masked_fill(torch.isneginf(lse), 0.0) for lse in (grads.row_lse, grads.col_lse))
    grads = grads._replace(row_lse=row_lse, col_lse=col_lse)
    buffers = x.new_empty((2, _chunk_rows(n, m), m), dtype=dtype)
    stored = 0 if kept is None else kept.shape[0]
    for rows in _chunks(n, m, pairs, x.device):
        part = slice(rows.start, rows.stop)
        out, other = buffers[:, : rows.stop - rows.start]
        if kept is not None and rows.stop <= stored:
            s = kept[part]
        else:
            s = _logits(x[part], y.t(), scale, out)
            _hide(s, rows, pairs)
        g = _logit_gradient(s, rows, pairs, grads, out, other)
        if need_x:
            _product(g, y, dx[part])
        if need_y:
            add_product(dy, g.t(), x[part])
    return dx.mul_(scale), dy.mul_(scale)


def sigmoid_sum(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, weights: Tensor, pairs: Pairs, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row sums of the pairwise log-sigmoid loss and the gradients of their sum weighted by `weights` (n,).

    Returns the row sums (n,), dx, dy (empty when not needed) and d bias, all in the accumulation dtype.
    """
    dtype = scale.dtype
    n, m = x.shape[0], y.shape[0]
    loss = x.new_empty(n, dtype=dtype)
    dx = x.new_zeros(x.shape if need_x else (0,), dtype=dtype)
    dy = x.new_zeros(y.shape if need_y else (0,), dtype=dtype)
    dbias = x.new_zeros((), dtype=dtype)
    buffer = x.new_empty((_chunk_rows(n, m), m), dtype=dtype)
    for rows in _chunks(n, m, pairs, x.device):
        part = slice(rows.start, rows.stop)
        z = _logits(x[part], y.t(), scale, buffer[: rows.stop - rows.start]).add_(bias)
        _flip_positives(z, rows, pairs)
        _hide_ignored(z, rows, pairs)
        loss[part] = F.softplus(z).sum(1)
        if not (need_x or need_y):
            continue
        g = z.sigmoid_().mul_(weights[part, None])
        _flip_positives(g, rows, pairs)
        dbias += g.sum()
        if need_x:
            _product(g, y, dx[part])
        if need_y:
            add_product(dy, g.t(), x[part])
    return loss, dx.mul_(scale), dy.mul_(scale), dbias


def _flip_positives(z: Tensor, rows: _Rows, pairs: Pairs) -> None:
    """Negate the entries of positive pairs, in place."""
    if rows.same is not None and not pairs.ignore:
        torch.where(rows.same, -z, z, out=z)
    else:
        z[rows.diagonal] = -z[rows.diagonal]
