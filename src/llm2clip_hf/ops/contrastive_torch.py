# SPDX-License-Identifier: Apache-2.0
r"""
Chunked PyTorch twin of the Triton kernels: the path for CPU and MPS, the oracle of the tests, a baseline on CUDA.

Legend: `x` (n, D) images, `y` (M, D) texts, `s = scale * x @ y.T` (n, M) logits, `R` (n,) and `C` (M,) the log-sum-exp
of the rows and columns of `s`, `G = dL/ds`. Only `_BUFFER_ELEMENTS` logits exist at a time. The backward recomputes
them, so nothing of size n * M is kept for autograd.

A pair (i, j) is positive when `j == i + row_offset`, or, with ids, when `row_ids[i] == col_ids[j]`. With `ignore`,
pairs of equal id other than `j == i + row_offset` are left out of the loss instead.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


# 64 MiB in fp32: large enough for full GEMM speed, small enough to stay a constant next to the features.
_BUFFER_ELEMENTS = 1 << 24
# exp(s - b) is shared by both directions of the backward while R and C lie within this many nats of b.
_MAX_SPREAD = 40.0
# A column sum below this, relative to the largest logit of the chunk, has lost digits and is computed again.
_MIN_COLUMN_SUM = 2.0**-60


class Pairs(NamedTuple):
    """Which pairs are positive and which are left out; see the module docstring."""

    row_offset: int
    row_ids: Tensor | None
    col_ids: Tensor | None
    ignore: bool


class _Rows(NamedTuple):
    """One chunk of rows: its range and what the pair rule says about it."""

    start: int
    stop: int
    diagonal: tuple[Tensor, Tensor]  # row (within the chunk) and column of the pairs j == i + row_offset
    same: Tensor | None  # (rows, M) equal ids


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _multiplies_in_16_bits(x: Tensor) -> bool:
    # Tensor cores take bf16 and return fp32. G in fp16 would need a scale of its own, so fp16 is widened instead.
    return x.is_cuda and x.dtype == torch.bfloat16


def _operand(x: Tensor) -> Tensor:
    """`x` as it enters matrix products."""
    return x if _multiplies_in_16_bits(x) else x.to(_accumulation_dtype(x.dtype))


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b in the dtype of `out`; `a` is brought to the dtype of the operand `b` first."""
    if b.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a.to(b.dtype), b, out_dtype=out.dtype, out=out)


def _logits(x: Tensor, yt: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """scale * x @ yt in the dtype of `out`; 16-bit operands are scaled after the product, not rounded again."""
    return torch.mm(x * scale, yt, out=out) if x.dtype == out.dtype else _product(x, yt, out).mul_(scale)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b; 16-bit operands, which only CUDA multiplies so, give sums in the dtype of `out`."""
    if out.is_cuda and b.dtype != out.dtype:
        torch.addmm(out, a.to(b.dtype), b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


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
            same = pairs.row_ids[start:stop, None] == pairs.col_ids[None, :]
        yield _Rows(start, stop, (rows - start, rows + pairs.row_offset), same)


def _hide_ignored(s: Tensor, rows: _Rows, pairs: Pairs) -> None:
    """Set ignored logits to -inf, in place."""
    if pairs.ignore and rows.same is not None:
        hidden = rows.same.clone()
        hidden[rows.diagonal] = False
        s.masked_fill_(hidden, -torch.inf)


def lse_pair(x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R, C (natural logarithms) and the sums of the positive logits of each row and of each column."""
    dtype = _accumulation_dtype(x.dtype)
    n, m = x.shape[0], y.shape[0]
    row_lse, row_pos = x.new_empty(n, dtype=dtype), x.new_zeros(n, dtype=dtype)
    col_lse, col_pos = x.new_full((m,), -torch.inf, dtype=dtype), x.new_zeros(m, dtype=dtype)
    x_wide, yt = _operand(x), _operand(y).t()
    buffer = x.new_empty((_chunk_rows(n, m), m), dtype=dtype)
    for rows in _chunks(n, m, pairs, x.device):
        part = slice(rows.start, rows.stop)
        s = _logits(x_wide[part], yt, scale, buffer[: rows.stop - rows.start])
        if rows.same is not None and not pairs.ignore:
            positive = torch.where(rows.same, s, 0.0)
            row_pos[part] = positive.sum(1)
            col_pos += positive.sum(0)
            del positive
        else:
            row_pos[part][rows.diagonal[0]] = s[rows.diagonal]
            col_pos[rows.diagonal[1]] = s[rows.diagonal]
        _hide_ignored(s, rows, pairs)
        if x.device.type != "cpu":  # no host synchronisation; exponentials are cheap here
            row_lse[part] = torch.logsumexp(s, 1)
            col_lse = torch.logaddexp(col_lse, torch.logsumexp(s, 0))
            continue
        # One exponential serves both directions: columns add up the row-normalised values again.
        top = s.amax(1).clamp_min(torch.finfo(dtype).min)
        shift = top.max()
        exp = s.sub_(top[:, None]).exp_()
        row_lse[part] = top + exp.sum(1).log()
        col_sum = (top - shift).exp() @ exp
        chunk_lse = shift + col_sum.log()
        if bool((col_sum < _MIN_COLUMN_SUM).any()):
            s = _logits(x_wide[part], yt, scale, buffer[: rows.stop - rows.start])
            _hide_ignored(s, rows, pairs)
            chunk_lse = torch.logsumexp(s, 0)
        col_lse = torch.logaddexp(col_lse, chunk_lse)
    return row_lse, col_lse, row_pos, col_pos


class LseGrads(NamedTuple):
    """What the backward of `lse_pair` needs: gradients of its four outputs and the two log-sum-exps."""

    grad_row: Tensor
    grad_col: Tensor
    grad_row_pos: Tensor
    grad_col_pos: Tensor
    row_lse: Tensor
    col_lse: Tensor


def _logit_gradient(s: Tensor, rows: _Rows, pairs: Pairs, grads: LseGrads, other: Tensor) -> Tensor:
    """Overwrite the logits of one chunk by their gradient; `other` is a second buffer of the same shape."""
    part = slice(rows.start, rows.stop)
    row_lse, col_lse = grads.row_lse[part, None], grads.col_lse[None, :]
    grad_row, grad_col = grads.grad_row[part, None], grads.grad_col[None, :]
    _hide_ignored(s, rows, pairs)
    base = torch.maximum(row_lse.max(), col_lse.max())
    spread = base - torch.minimum(row_lse.min(), col_lse.min())
    if s.device.type == "cpu" and bool(spread < _MAX_SPREAD):
        torch.add(grad_row * (base - row_lse).exp(), grad_col * (base - col_lse).exp(), out=other)
        s.sub_(base).exp_().mul_(other)
    else:
        torch.sub(s, col_lse, out=other).exp_().mul_(grad_col)
        s.sub_(row_lse).exp_().mul_(grad_row).add_(other)
    if rows.same is not None and not pairs.ignore:
        s += torch.where(rows.same, grads.grad_row_pos[part, None] + grads.grad_col_pos[None, :], 0.0)
    else:
        i, j = rows.diagonal
        s[i, j] += grads.grad_row_pos[part][i] + grads.grad_col_pos[j]
    return s


def lse_pair_backward(
    x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, grads: LseGrads, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and `y` in the accumulation dtype; an empty tensor for one that is not needed."""
    dtype = _accumulation_dtype(x.dtype)
    n, m = x.shape[0], y.shape[0]
    dx = x.new_zeros(x.shape if need_x else (0,), dtype=dtype)
    dy = x.new_zeros(y.shape if need_y else (0,), dtype=dtype)
    x_wide, y_wide = _operand(x), _operand(y)
    buffers = x.new_empty((2, _chunk_rows(n, m), m), dtype=dtype)
    for rows in _chunks(n, m, pairs, x.device):
        part = slice(rows.start, rows.stop)
        length = rows.stop - rows.start
        s = _logits(x_wide[part], y_wide.t(), scale, buffers[0, :length])
        g = _logit_gradient(s, rows, pairs, grads, buffers[1, :length])
        if need_x:
            _product(g, y_wide, dx[part])
        if need_y:
            add_product(dy, g.t(), x_wide[part])
    return dx.mul_(scale), dy.mul_(scale)


def sigmoid_sum(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, weights: Tensor, pairs: Pairs, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row sums of the pairwise log-sigmoid loss and the gradients of their sum weighted by `weights` (n,).

    Returns the row sums (n,), dx, dy (empty when not needed) and d bias, all in the accumulation dtype.
    """
    dtype = _accumulation_dtype(x.dtype)
    n, m = x.shape[0], y.shape[0]
    loss = x.new_empty(n, dtype=dtype)
    dx = x.new_zeros(x.shape if need_x else (0,), dtype=dtype)
    dy = x.new_zeros(y.shape if need_y else (0,), dtype=dtype)
    dbias = x.new_zeros((), dtype=dtype)
    x_wide, y_wide = _operand(x), _operand(y)
    buffer = x.new_empty((_chunk_rows(n, m), m), dtype=dtype)
    for rows in _chunks(n, m, pairs, x.device):
        part = slice(rows.start, rows.stop)
        z = _logits(x_wide[part], y_wide.t(), scale, buffer[: rows.stop - rows.start]).add_(bias)
        _flip_positives(z, rows, pairs)
        _hide_ignored(z, rows, pairs)
        loss[part] = F.softplus(z).sum(1)
        if not (need_x or need_y):
            continue
        g = z.sigmoid_().mul_(weights[part, None])
        _flip_positives(g, rows, pairs)
        dbias += g.sum()
        if need_x:
            _product(g, y_wide, dx[part])
        if need_y:
            add_product(dy, g.t(), x_wide[part])
    return loss, dx.mul_(scale), dy.mul_(scale), dbias


def _flip_positives(z: Tensor, rows: _Rows, pairs: Pairs) -> None:
    """Negate the entries of positive pairs, in place."""
    if rows.same is not None and not pairs.ignore:
        torch.where(rows.same, -z, z, out=z)
    else:
        z[rows.diagonal] = -z[rows.diagonal]
