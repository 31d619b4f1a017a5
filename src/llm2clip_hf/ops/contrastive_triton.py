# SPDX-License-Identifier: Apache-2.0
r"""
Triton kernels of the contrastive losses; the only file that imports triton. `contrastive_blocks` launches them.

Softmax, forward: `lse_kernel` visits each tile of logits once. One scalar per tile, its largest logit, is the
reference of a single exponential per logit, which serves the tile's rows and columns alike. Row sums leave with every
tile; column sums stay in registers, elementwise, while the program walks down its rows. The pair of each row is left
out: it stands apart from the log-sum-exps, and well separated pairs do not raise the reference. Where a sum shows that
the common reference was too large, the program sets a flag and `lse_exact_kernel` repeats it with separate maxima;
that kernel also visits the tiles which hold pairs, so that the loop of the others needs no mask. `merge_kernel` adds
the parts of rows and columns up and takes the pairs' logits.

Softmax, backward: `prepare_kernel` turns the vectors of the backward into padded factors, so that where the
log-sum-exps lie close enough one exponential serves both directions: 2^(s - b) (u_i + v_j). `lse_grad_kernel`
recomputes the logits of a block and writes their gradient G to a workspace.

Sigmoid: `sigmoid_kernel` computes row losses and, when asked, G of a block in the same visit, without a branch: a
polynomial of degree 8 stands for log(1 + e) / e.

No atomics, and every sum has a fixed order: results are bitwise reproducible. Operands are 16-bit and come padded, so
that no tile needs a mask at the edge: `pack_kernel` makes logits beyond the edge so negative that their exponential
is 0, and splits fp32 features into two halves. Hopper and newer read and write tiles through tensor descriptors, older
GPUs through pointers. On Hopper two programs share a processor, so that the exponentials of one hide behind the
products of the other.

Legend: `x` (n, D) images, `y` (M, D) texts, `s = scale * x @ y.T` logits (log2 units in the kernels), `G = dL/ds`.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# A sum below this, relative to the common reference, has lost digits to underflow.
_MIN_SUM = tl.constexpr(2.0**-60)
# Factors 2^(b - R) of the one exponential stay within this power of two.
_MAX_SPREAD = tl.constexpr(60.0)
_LOWEST = tl.constexpr(-1.0e30)
# Batch sizes change from call to call; one compiled kernel serves them all.
_SIZES = ["n", "M", "row_offset"]


@triton.jit
def _dot_tile(
    x, y, row, col, D, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DESC: tl.constexpr, UP: tl.constexpr
):  # fmt: skip
    """x[row : row + BM] @ y[col : col + BN].T in fp32; operands are descriptors (DESC) or pointers to padded rows."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if DESC:
        for k in range(0, D, BD):
            a = x.load([row, k])
            b = y.load([col, k])
            if UP:  # the interpreter multiplies the bit patterns of bf16
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b.T, acc)
    else:
        ks = tl.arange(0, BD)
        # 64-bit row offsets: n * D may pass 2**31.
        a_ptr = x + (row + tl.arange(0, BM)).to(tl.int64)[:, None] * D + ks[None, :]
        b_ptr = y + (col + tl.arange(0, BN)).to(tl.int64)[None, :] * D + ks[:, None]
        for _ in range(0, D, BD):
            a = tl.load(a_ptr)
            b = tl.load(b_ptr)
            if UP:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b, acc)
            a_ptr += BD
            b_ptr += BD
    return acc


@triton.jit
def _store_tile(g, tile, row, col, stride, BM: tl.constexpr, BN: tl.constexpr, DESC: tl.constexpr):
    """Write a tile to the workspace, whose sides are multiples of the tile's."""
    if DESC:
        g.store([row, col], tile.to(g.dtype))
    else:
        out = g + (row + tl.arange(0, BM))[:, None] * stride + (col + tl.arange(0, BN))[None, :]
        tl.store(out, tile.to(g.dtype.element_ty))


@triton.jit
def _load_scale(scale_ptr):
    """The scale; NaN unless positive."""
    scale = tl.load(scale_ptr)
    return tl.where(scale > 0.0, scale, float("nan"))


@triton.jit
def _swizzle(outer, inner, GROUP: tl.constexpr):
    """This program's place in two dimensions; GROUP places of the outer sweep the inner together, for the L2 cache."""
    per_group = GROUP * inner
    first = tl.program_id(0) // per_group * GROUP
    size = tl.minimum(outer - first, GROUP)
    within = tl.program_id(0) % per_group
    return first + within % size, within // size


@triton.jit
def _same_ids(row_ids, col_ids, rows, cols, n, M, K: tl.constexpr):
    """Whether any of the K ids of each row and column agree."""
    rid = tl.load(row_ids + rows * K, mask=rows < n, other=-1)
    cid = tl.load(col_ids + cols * K, mask=cols < M, other=-2)
    same = rid[:, None] == cid[None, :]
    for k in tl.static_range(1, K):
        rid = tl.load(row_ids + rows * K + k, mask=rows < n, other=-1)
        cid = tl.load(col_ids + cols * K + k, mask=cols < M, other=-2)
        same = same | (rid[:, None] == cid[None, :])
    return same


@triton.jit
def _hide(
    s, row_ids, col_ids, row, col, n, M, row_offset, DIAGONAL: tl.constexpr, PAIRS: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Set what is left out to -inf; with DIAGONAL also each row's pair."""
    rows = row + tl.arange(0, BM)
    cols = col + tl.arange(0, BN)
    if PAIRS == 2:
        s = tl.where(_same_ids(row_ids, col_ids, rows, cols, n, M, K), float("-inf"), s)
    if DIAGONAL:
        s = tl.where(cols[None, :] == rows[:, None] + row_offset, float("-inf"), s)
    return s


@triton.jit
def _paired_tiles(col, n, row_offset, first, stop, BM: tl.constexpr, BN: tl.constexpr):
    """The row tiles between `first` and `stop` that may hold pairs of the BN columns from `col` on: from, to."""
    low = tl.maximum(col - row_offset, 0) // BM
    high = tl.cdiv(tl.maximum(tl.minimum(col + BN - row_offset, n), 0), BM)
    low = tl.minimum(tl.maximum(low, first), stop)
    return low, tl.minimum(tl.maximum(high, low), stop)


@triton.jit(do_not_specialize=_SIZES)
def lse_kernel(
    x, y, scale_ptr, row_ids, col_ids, row_part, col_part, flags, n, M, D, row_offset,
    tiles, groups, ROWS: tl.constexpr, COLS: tl.constexpr, PRESUM: tl.constexpr, GROUP: tl.constexpr,
    PAIRS: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DESC: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """Columns of one block, `tiles` row tiles of one group, but for tiles that may hold pairs.

    Writes row_part[block, i] and col_part[group, j], the base-2 log-sum-exp within the block and the group, and
    flags[group, block] = 1 where `lse_exact_kernel` must do the work again.
    """
    blocks = tl.cdiv(M, BN)
    block, group = _swizzle(blocks, groups, GROUP)
    col = block * BN
    cols = col + tl.arange(0, BN)
    scale = _load_scale(scale_ptr) * _LOG2E
    reference = _LOWEST
    # Rows 8 apart are held by one thread: adding them first halves the registers of the column sums.
    sums = tl.zeros((BM // 16, 8, BN) if PRESUM else (BM, BN), dtype=tl.float32)
    suspect = 0
    first = group * tiles
    stop = tl.minimum(first + tiles, tl.cdiv(n, BM))
    low, high = _paired_tiles(col, n, row_offset, first, stop, BM, BN)
    for step in range(first, stop - (high - low)):
        row = tl.where(step < low, step, step + high - low) * BM
        rows = row + tl.arange(0, BM)
        acc = _dot_tile(x, y, row, col, D, BM, BN, BD, DESC, UP)
        acc = _hide(acc, row_ids, col_ids, row, col, n, M, row_offset, False, PAIRS, K, BM, BN)
        top = tl.maximum(tl.max(acc) * scale, _LOWEST)
        p = tl.exp2(acc * scale - top)
        if COLS:
            higher = tl.maximum(reference, top)
            if PRESUM:
                part = tl.sum(tl.reshape(p, (BM // 16, 2, 8, BN)), axis=1)
            else:
                part = p
            sums = sums * tl.exp2(reference - higher) + part * tl.exp2(top - higher)
            reference = higher
        if ROWS:
            row_sum = tl.sum(p, axis=1)
            suspect = suspect | (tl.min(tl.where(rows < n, row_sum, 1.0)) < _MIN_SUM).to(tl.int32)
            tl.store(row_part + block.to(tl.int64) * n + rows, tl.log2(row_sum) + top, mask=rows < n)
    if COLS:
        if PRESUM:
            col_sum = tl.sum(tl.sum(sums, axis=0), axis=0)
        else:
            col_sum = tl.sum(sums, axis=0)
        visited = high - low < stop - first
        suspect = suspect | (visited & (tl.min(tl.where(cols < M, col_sum, 1.0)) < _MIN_SUM)).to(tl.int32)
        tl.store(col_part + group.to(tl.int64) * M + cols, tl.log2(col_sum) + reference, mask=cols < M)
    tl.store(flags + group * blocks + block, suspect)


@triton.jit(do_not_specialize=_SIZES)
def lse_exact_kernel(
    x, y, scale_ptr, row_ids, col_ids, row_part, col_part, flags, n, M, D, row_offset,
    tiles, groups, ROWS: tl.constexpr, COLS: tl.constexpr, PRESUM: tl.constexpr, GROUP: tl.constexpr,
    PAIRS: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DESC: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """
    With a maximum of its own for every row and column: the work of flagged programs, and, as one more group, the tiles
    that may hold pairs.
    """
    blocks = tl.cdiv(M, BN)
    block, group = _swizzle(blocks, groups + 1, GROUP)
    paired = group == groups
    if (not paired) & (tl.load(flags + group * blocks + block, mask=group < groups, other=1) == 0):
        return
    col = block * BN
    cols = col + tl.arange(0, BN)
    scale = _load_scale(scale_ptr) * _LOG2E
    col_top = tl.full((BN,), _LOWEST, dtype=tl.float32)
    col_sum = tl.zeros((BN,), dtype=tl.float32)
    row_tiles = tl.cdiv(n, BM)
    first = tl.where(paired, 0, group * tiles)
    stop = tl.where(paired, row_tiles, tl.minimum(first + tiles, row_tiles))
    low, high = _paired_tiles(col, n, row_offset, first, stop, BM, BN)
    skip = tl.where(paired, 0, high - low)
    for step in range(tl.where(paired, low, first), tl.where(paired, high, stop - skip)):
        row = tl.where(step < low, step, step + skip) * BM
        rows = row + tl.arange(0, BM)
        s = _dot_tile(x, y, row, col, D, BM, BN, BD, DESC, UP) * scale
        s = _hide(s, row_ids, col_ids, row, col, n, M, row_offset, True, PAIRS, K, BM, BN)
        if ROWS:
            row_top = tl.maximum(tl.max(s, axis=1), _LOWEST)
            row_sum = tl.sum(tl.exp2(s - row_top[:, None]), axis=1)
            tl.store(row_part + block.to(tl.int64) * n + rows, tl.log2(row_sum) + row_top, mask=rows < n)
        if COLS:
            top = tl.maximum(col_top, tl.max(s, axis=0))
            col_sum = col_sum * tl.exp2(col_top - top) + tl.sum(tl.exp2(s - top[None, :]), axis=0)
            col_top = top
    if COLS:
        tl.store(col_part + group.to(tl.int64) * M + cols, tl.log2(col_sum) + col_top, mask=cols < M)


@triton.jit
def _merge_parts(part, out, index, size, parts, MORE: tl.constexpr, P: tl.constexpr, B: tl.constexpr):
    """Natural log-sum-exp over the base-2 parts of B rows or columns; with MORE also over what `out` holds."""
    inside = index < size
    if MORE:
        top = tl.maximum(tl.load(out + index, mask=inside, other=0.0) / _LN2, _LOWEST)
        total = tl.where(top > _LOWEST, 1.0, 0.0)
    else:
        top = tl.full((B,), _LOWEST, dtype=tl.float32)
        total = tl.zeros((B,), dtype=tl.float32)
    for first in range(0, parts, P):
        number = first + tl.arange(0, P)
        mask = (number < parts)[:, None] & inside[None, :]
        values = tl.load(part + number.to(tl.int64)[:, None] * size + index[None, :], mask=mask, other=float("-inf"))
        higher = tl.maximum(top, tl.max(values, axis=0))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(values - higher[None, :]), axis=0)
        top = higher
    tl.store(out + index, (tl.log2(total) + top) * _LN2, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def merge_kernel(
    x, y, scale_ptr, row_part, col_part, row_out, col_out, pair_out, n, M, D, row_offset, blocks, groups,
    ROWS: tl.constexpr, COLS: tl.constexpr, MORE: tl.constexpr, P: tl.constexpr, B: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of n rows from their blocks, of M columns from their groups, and the pairs of the rows, in fp32."""
    program = tl.program_id(0)
    row_programs = tl.cdiv(n, B)
    if program < row_programs:
        rows = program * B + tl.arange(0, B)
        if ROWS:
            _merge_parts(row_part, row_out, rows, n, blocks, False, P, B)
        cols = rows + row_offset
        paired = (rows < n) & (cols >= 0) & (cols < M)
        dot = tl.zeros((B, BD), dtype=tl.float32)
        for k in range(0, D, BD):
            ks = k + tl.arange(0, BD)
            mask = paired[:, None] & (ks < D)[None, :]
            a = tl.load(x + rows.to(tl.int64)[:, None] * D + ks[None, :], mask=mask, other=0.0)
            b = tl.load(y + cols.to(tl.int64)[:, None] * D + ks[None, :], mask=mask, other=0.0)
            dot += a.to(tl.float32) * b.to(tl.float32)
        tl.store(pair_out + rows, tl.sum(dot, axis=1) * _load_scale(scale_ptr), mask=rows < n)
    else:
        if COLS:
            cols = (program - row_programs) * B + tl.arange(0, B)
            _merge_parts(col_part, col_out, cols, M, groups, MORE, P, B)


@triton.jit
def _range_of(grad, lse, lift, size, B: tl.constexpr):
    """Lowest and highest log-sum-exp (base 2), and the largest gradient of a side."""
    low = tl.full((B,), 1.0e30, dtype=tl.float32)
    high = tl.full((B,), -1.0e30, dtype=tl.float32)
    for first in range(0, size, B):
        index = first + tl.arange(0, B)
        value = tl.load(lse + index, mask=index < size, other=float("-inf")) * _LOG2E
        finite = value > -1.0e30  # a row or column without any candidate has no gradient
        low = tl.where(finite, tl.minimum(low, value), low)
        high = tl.where(finite, tl.maximum(high, value), high)
        lift = tl.maximum(lift, tl.abs(tl.load(grad + index, mask=index < size, other=0.0)))
    return tl.min(low), tl.max(high), lift


@triton.jit
def _write_side(grad, lse, out, base, one, lift, size, padded, B: tl.constexpr):
    """out[0] = lift * gradient * (2^(base - lse) where one exponential serves both sides), out[1] = lse (base 2)."""
    for first in range(0, padded, B):
        index = first + tl.arange(0, B)
        value = tl.load(lse + index, mask=index < size, other=float("-inf")) * _LOG2E
        none = value <= -1.0e30
        value = tl.where(none, 0.0, value)
        factor = tl.where(none, 0.0, tl.load(grad + index, mask=index < size, other=0.0) * lift)
        factor = tl.where(one > 0.0, factor * tl.exp2(tl.where(none, 0.0, base - value)), factor)
        tl.store(out + index, factor, mask=index < padded)
        tl.store(out + padded + index, value, mask=index < padded)


@triton.jit
def _write_lifted(source, out, lift, size, padded, B: tl.constexpr):
    for first in range(0, padded, B):
        index = first + tl.arange(0, B)
        tl.store(out + index, tl.load(source + index, mask=index < size, other=0.0) * lift, mask=index < padded)


@triton.jit
def _largest(source, largest, size, B: tl.constexpr):
    for first in range(0, size, B):
        index = first + tl.arange(0, B)
        largest = tl.maximum(largest, tl.abs(tl.load(source + index, mask=index < size, other=0.0)))
    return largest


@triton.jit(do_not_specialize=["n", "M", "padded_n", "padded_m"])
def prepare_kernel(
    grad_row, row_lse, grad_col, col_lse, pair, row_pos, col_pos, scale_ptr, rows, cols, scalars, n, M, padded_n,
    padded_m, ROWS: tl.constexpr, COLS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """
    One program: what `lse_grad_kernel` reads. rows (4, padded n): factors, log-sum-exps, gradients of pairs and of
    grouped positives; cols (3, padded M): factors, log-sum-exps, gradients of grouped positives. scalars: the base b,
    whether one exponential serves both sides, and what turns products with G into gradients.

    G in fp16 is brought just below the largest number by a power of two; small entries stay above the smallest.
    """
    largest = _largest(pair, tl.zeros((B,), dtype=tl.float32), n, B)
    low = 1.0e30
    high = -1.0e30
    if ROWS:
        low, high, largest = _range_of(grad_row, row_lse, largest, n, B)
    if COLS:
        col_low, col_high, largest = _range_of(grad_col, col_lse, largest, M, B)
        low = tl.minimum(low, col_low)
        high = tl.maximum(high, col_high)
    if PAIRS == 1:
        largest = _largest(col_pos, _largest(row_pos, largest, n, B), M, B)
    lift = 1.0
    if HALF:
        peak = tl.max(largest)
        exponent = tl.floor(tl.log2(4096.0 / tl.maximum(peak, 1.0e-35)))
        lift = tl.exp2(tl.minimum(tl.maximum(exponent, -100.0), 100.0))
    one = 0.0
    if ROWS and COLS:
        one = tl.where(high - low < _MAX_SPREAD, 1.0, 0.0)
    if ROWS:
        _write_side(grad_row, row_lse, rows, high, one, lift, n, padded_n, B)
    if COLS:
        _write_side(grad_col, col_lse, cols, high, one, lift, M, padded_m, B)
    _write_lifted(pair, rows + 2 * padded_n, lift, n, padded_n, B)
    if PAIRS == 1:
        _write_lifted(row_pos, rows + 3 * padded_n, lift, n, padded_n, B)
        _write_lifted(col_pos, cols + 2 * padded_m, lift, M, padded_m, B)
    tl.store(scalars, high)
    tl.store(scalars + 1, one)
    tl.store(scalars + 2, _load_scale(scale_ptr) / lift)


@triton.jit(do_not_specialize=_SIZES)
def lse_grad_kernel(
    x, y, g, scale_ptr, scalars, row_ids, col_ids, row_vectors, col_vectors, n, M, D, row_offset, stride, row_stride,
    col_stride, ONE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PAIRS: tl.constexpr, K: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DESC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """
    One tile of G of the block x (n, D), y (M, D): the softmax terms and the positives, added up in fp32. Two launches,
    one of which returns at once: ONE if a single exponential serves rows and columns.
    """
    if (tl.load(scalars + 1) > 0.0) != ONE:
        return
    row_tile, col_tile = _swizzle(tl.cdiv(n, BM), tl.cdiv(M, BN), GROUP)
    row = row_tile * BM
    col = col_tile * BN
    rows = row + tl.arange(0, BM)
    cols = col + tl.arange(0, BN)
    scale = tl.load(scale_ptr) * _LOG2E
    tile = _dot_tile(x, y, row, col, D, BM, BN, BD, DESC, UP)
    if ROWS and COLS:
        u = tl.load(row_vectors + rows)
        v = tl.load(col_vectors + cols)
        if ONE:
            tile = tl.exp2(tile * scale - tl.load(scalars)) * (u[:, None] + v[None, :])
        else:
            r = tl.load(row_vectors + row_stride + rows)
            c = tl.load(col_vectors + col_stride + cols)
            s = tile * scale
            tile = u[:, None] * tl.exp2(s - r[:, None]) + v[None, :] * tl.exp2(s - c[None, :])
    elif ROWS:
        r = tl.load(row_vectors + row_stride + rows)
        tile = tl.load(row_vectors + rows)[:, None] * tl.exp2(tile * scale - r[:, None])
    else:
        c = tl.load(col_vectors + col_stride + cols)
        tile = tl.load(col_vectors + cols)[None, :] * tl.exp2(tile * scale - c[None, :])
    if PAIRS == 2:
        tile = tl.where(_same_ids(row_ids, col_ids, rows, cols, n, M, K), 0.0, tile)
    # The positive terms are folded in before G is rounded: kept apart, digits would cancel.
    if (row + row_offset < col + BN) & (row + BM + row_offset > col):
        gp = tl.load(row_vectors + 2 * row_stride + rows)
        tile = tl.where(cols[None, :] == rows[:, None] + row_offset, gp[:, None], tile)
    if PAIRS == 1:
        gp = tl.load(row_vectors + 3 * row_stride + rows)
        gq = tl.load(col_vectors + 2 * col_stride + cols)
        tile += tl.where(_same_ids(row_ids, col_ids, rows, cols, n, M, K), gp[:, None] + gq[None, :], 0.0)
    _store_tile(g, tile, row, col, stride, BM, BN, DESC)


@triton.jit
def _flip(tile, row_ids, col_ids, row, col, n, M, row_offset, PAIRS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Negate the entries of positive pairs."""
    rows = row + tl.arange(0, BM)
    cols = col + tl.arange(0, BN)
    if PAIRS == 1:
        tile = tl.where(_same_ids(row_ids, col_ids, rows, cols, n, M, 1), -tile, tile)
    else:
        if (row + row_offset < col + BN) & (row + BM + row_offset > col):
            # A padded column is nobody's pair.
            positive = (cols[None, :] == rows[:, None] + row_offset) & (cols < M)[None, :]
            tile = tl.where(positive, -tile, tile)
    return tile


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1], to 2e-7 of its value; where log would lose the digits of a small e."""
    q = 0.005253457929939032 * e - 0.02958850748836994
    q = q * e + 0.07836166769266129
    q = q * e - 0.13674770295619965
    q = q * e + 0.19111430644989014
    q = q * e - 0.24844369292259216
    q = q * e + 0.33319270610809326
    q = q * e - 0.49999502301216125
    return (q * e + 1.0) * e


@triton.jit(do_not_specialize=_SIZES)
def sigmoid_kernel(
    x, y, g, scale_ptr, bias_ptr, row_ids, col_ids, weights, row_part, bias_part, n, M, D, row_offset, stride,
    GRAD: tl.constexpr, PAIRS: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, DESC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """One tile of the block: row_part[c, i], the tile's row losses; with GRAD also G and its sum, bias_part[tile]."""
    row_tile, col_tile = _swizzle(tl.cdiv(n, BM), tl.cdiv(M, BN), GROUP)
    row = row_tile * BM
    col = col_tile * BN
    rows = row + tl.arange(0, BM)
    z = _dot_tile(x, y, row, col, D, BM, BN, BD, DESC, UP) * _load_scale(scale_ptr) + tl.load(bias_ptr)
    # A positive pair costs softplus(-z), any other softplus(z): flip the sign here, and that of its G below.
    z = _flip(z, row_ids, col_ids, row, col, n, M, row_offset, PAIRS, BM, BN)
    if PAIRS == 2:
        cols = col + tl.arange(0, BN)
        hidden = _same_ids(row_ids, col_ids, rows, cols, n, M, K) & (cols[None, :] != rows[:, None] + row_offset)
        z = tl.where(hidden, float("-inf"), z)
    e = tl.exp2(-tl.abs(z) * _LOG2E)  # never overflows
    loss = tl.sum(_log1p(e) + tl.maximum(z, 0.0), axis=1)
    tl.store(row_part + col_tile.to(tl.int64) * n + rows, loss, mask=rows < n)
    if GRAD:
        root = tl.rsqrt(1.0 + e)  # one instruction, where a division takes many
        tile = tl.where(z > 0.0, 1.0, e) * (root * root)
        tile = tile * tl.load(weights + rows, mask=rows < n, other=0.0)[:, None]
        tile = _flip(tile, row_ids, col_ids, row, col, n, M, row_offset, PAIRS, BM, BN)
        tl.store(bias_part + tl.program_id(0), tl.sum(tile))
        _store_tile(g, tile, row, col, stride, BM, BN, DESC)


@triton.jit(do_not_specialize=["n", "padded"])
def pack_kernel(
    source, out, lift_ptr, n, padded, D, width, PARTS: tl.constexpr, SECOND: tl.constexpr, BIG: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """
    Copy (n, D) features into (padded, width) such that logits of padding are hugely negative, all others unchanged.

    Two extra features do it: padded rows of `x` hold -BIG in the first, where all of `y` holds BIG; the second swaps
    the roles. With PARTS = 3, fp32 features times a power of two become halves (high, low, high) of `x` and (high,
    high, low) of `y`: all products but that of both low halves, which is below fp32's rounding.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ks = tl.program_id(1) * BD + tl.arange(0, BD)
    part = ks // D
    at = rows.to(tl.int64)[:, None] * D + (ks - part * D)[None, :]
    value = tl.load(source + at, mask=(rows < n)[:, None] & (part < PARTS)[None, :], other=0.0)
    if PARTS == 3:
        value *= tl.load(lift_ptr)
        high = value.to(tl.float16).to(tl.float32)
        value = tl.where((part == (2 if SECOND else 1))[None, :], value - high, high)
    last = PARTS * D
    value = tl.where((ks == (last if SECOND else last + 1))[None, :], BIG, value)
    value = tl.where((rows >= n)[:, None] & (ks == (last + 1 if SECOND else last))[None, :], -BIG, value)
    mask = (rows < padded)[:, None] & (ks < width)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * width + ks[None, :], value.to(out.dtype.element_ty), mask=mask)


def describe(tensor: Any, block: list[int]) -> Any:
    """A tensor descriptor, through which tiles of this shape are read and written."""
    return TensorDescriptor.from_tensor(tensor, block)


def interpreted() -> bool:
    """Whether the kernels were decorated for the interpreter."""
    return not isinstance(lse_kernel, triton.JITFunction)
