# SPDX-License-Identifier: Apache-2.0
r"""
What surrounds the Triton kernels: padding, blocks of constant size, merging, matrix products.

1. Forward: log-sum-exps of row chunks, merged by `torch.logsumexp` in a fixed order; positive logits by row products.
2. Backward: for each square block, a kernel writes G = dL/ds to the workspace; two matrix products with fp32 results
   add it to dX and dY. Accumulators on the chip would not fit at the widths of CLIP, and atomics cost more.

The functions have the contract of those in `contrastive_torch`.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import contrastive_triton as kernels
from .contrastive_torch import Lse, LseGrads, Pairs, add_product


# Side of the blocks of G: 128 MiB in 16 bits, large enough for full matrix-product speed.
_BLOCK = 8192
# Partial log-sum-exps alive at a time: 64 MiB.
_PARTIALS = 1 << 24
# Rows per step of row products; bounds their fp32 temporaries.
_ROWS = 1 << 14


def operand(x: Tensor, compute: torch.dtype) -> Tensor:
    """`x` as it enters matrix products."""
    return x.to(compute)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def pad_operands(x: Tensor, y: Tensor, config: kernels.Config) -> tuple[Tensor, Tensor]:
    """
    Pad both operands to whole tiles such that logits of padding are hugely negative and all others unchanged.

    Two extra features do it: padded rows of `x` hold -B in the first, where all of `y` holds B; the second swaps the
    roles. Operands that fit already are returned as they are.
    """
    (n, d), m = x.shape, y.shape[0]
    # A tensor descriptor needs rows of whole 16 bytes; pointers read whole steps of features.
    align = 16 // x.dtype.itemsize if kernels.uses_descriptors(x) else config.bd
    aligned = x.data_ptr() % 16 == 0 and y.data_ptr() % 16 == 0
    if n % config.bm == 0 and m % config.bn == 0 and d % align == 0 and aligned:
        return x, y
    big = 2.0**15 if x.dtype == torch.float16 else 2.0**40
    width = _round_up(d + 2, align)
    wide_x = x.new_zeros((_round_up(n, config.bm), width))
    wide_y = y.new_zeros((_round_up(m, config.bn), width))
    wide_x[:n, :d], wide_y[:m, :d] = x, y
    wide_x[n:, d], wide_y[:, d] = -big, big
    wide_x[:, d + 1], wide_y[m:, d + 1] = big, -big
    return wide_x, wide_y


def _rule(pairs: Pairs) -> int:
    if pairs.row_ids is None:
        return 0
    return 2 if pairs.ignore else 1


def _sides(rows: slice, cols: slice, pairs: Pairs) -> kernels.Sides:
    row_ids = None if pairs.row_ids is None else pairs.row_ids[rows].contiguous()
    col_ids = None if pairs.col_ids is None else pairs.col_ids[cols].contiguous()
    offset = pairs.row_offset + rows.start - cols.start
    return kernels.Sides(rows.stop - rows.start, cols.stop - cols.start, offset, _rule(pairs), row_ids, col_ids)


def _spans(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _padded(span: slice, multiple: int) -> slice:
    return slice(span.start, span.start + _round_up(span.stop - span.start, multiple))


def _row_products(x: Tensor, y: Tensor, index: Callable[[slice], Tensor | slice]) -> Tensor:
    """Inner product of each row of `x` with the row of `y` that `index` gives for a span of rows, in fp32."""
    parts = [(x[span].float() * y[index(span)].float()).sum(1) for span in _spans(x.shape[0], _ROWS)]
    return torch.cat(parts) if parts else x.new_zeros((0,), dtype=torch.float32)


def _group_products(x: Tensor, y: Tensor, row_ids: Tensor, col_ids: Tensor) -> Tensor:
    """Sum over j of equal id of x_i . y_j: the product of x_i with the sum of its group, without the matrix."""
    ids, among = row_ids.flatten(), col_ids.flatten()
    ordered = among.sort().values
    label, beyond = torch.searchsorted(ordered, ids), torch.searchsorted(ordered, ids, right=True)
    sums = y.new_zeros(y.shape, dtype=torch.float32)
    # `index_put_` with accumulate sorts its indices, so unlike `index_add_` it is deterministic.
    sums.index_put_((torch.searchsorted(ordered, among),), y.float(), accumulate=True)
    index = label.clamp(max=y.shape[0] - 1)
    return torch.where(beyond > label, _row_products(x, sums, lambda span: index[span]), 0.0)


def _pair_logits(x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs) -> Tensor:
    n, m = x.shape[0], y.shape[0]
    first = max(0, -pairs.row_offset)
    last = max(first, min(n, m - pairs.row_offset))
    start = first + pairs.row_offset
    logits = scale.new_zeros(n)
    logits[first:last] = scale * _row_products(
        x[first:last], y, lambda span: slice(start + span.start, start + span.stop)
    )
    return logits


def lse_pair(x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, direction: str = "both") -> Lse:
    """The vectors of `Lse`; those of a direction that is not asked for are empty."""
    n, m = x.shape[0], y.shape[0]
    config = kernels.config_for("lse_ids" if pairs.row_ids is not None and pairs.ignore else "lse", x)
    wide_x, wide_y = pad_operands(x, y, config)
    row_lse = scale.new_empty(n if direction != "columns" else 0)
    col_lse = scale.new_full((m if direction != "rows" else 0,), -torch.inf)
    step = max(16 * config.bm, _PARTIALS // -(-m // config.bn) // config.bm * config.bm)
    for rows in _spans(n, step):
        part_x = wide_x[_padded(rows, config.bm)]
        sides = _sides(rows, slice(0, m), pairs)
        row_part, col_part = kernels.launch_lse(part_x, wide_y, scale, sides, config, direction)
        if direction != "columns":
            row_lse[rows] = torch.logsumexp(row_part, 0)
        if direction != "rows":
            col_lse = torch.logaddexp(col_lse, torch.logsumexp(col_part, 0))
    row_pos, col_pos = scale.new_empty(0), scale.new_empty(0)
    if pairs.grouped and pairs.row_ids is not None and pairs.col_ids is not None:
        row_pos = _group_products(x, y, pairs.row_ids, pairs.col_ids) * scale
        col_pos = _group_products(y, x, pairs.col_ids, pairs.row_ids) * scale
    return Lse(row_lse, col_lse, _pair_logits(x, y, scale, pairs), row_pos, col_pos)


def _workspace(x: Tensor, n: int, m: int, config: kernels.Config) -> Tensor:
    # The interpreter truncates when it stores bf16, so there G stays in fp32.
    dtype = torch.float32 if kernels.interpreted() else x.dtype
    return x.new_empty(
        (_round_up(min(n, _BLOCK), config.bm), _round_up(min(m, _BLOCK), config.bn)),
        dtype=dtype,
    )


def _headroom(vectors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Power of two by which G is multiplied before it is stored.

    G holds products of these vectors with probabilities. In fp16 it is brought just below the largest number, so that
    small probabilities stay above the smallest one.
    """
    largest = torch.stack([vector.abs().amax() for vector in vectors if len(vector)]).amax()
    if dtype != torch.float16:
        return torch.ones_like(largest)
    exponent = torch.floor(torch.log2(4096.0 / largest)).clamp(-100.0, 100.0)
    return torch.where(largest > 0, torch.exp2(exponent), 1.0)


def lse_pair_backward(
    x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, grads: LseGrads, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and `y` in fp32; an empty tensor for one that is not needed."""
    n, m = x.shape[0], y.shape[0]
    config = kernels.config_for("grad" if pairs.row_ids is None else "grad_ids", x)
    wide_x, wide_y = pad_operands(x, y, config)
    dx = x.new_zeros(x.shape if need_x else (0,), dtype=torch.float32)
    dy = x.new_zeros(y.shape if need_y else (0,), dtype=torch.float32)
    lift = _headroom(grads[:5], x.dtype)
    grad_row, grad_col, pair, row_pos, col_pos = (grad * lift for grad in grads[:5])
    g = _workspace(x, n, m, config)
    for rows in _spans(n, _BLOCK):
        for cols in _spans(m, _BLOCK):
            kernels.launch_lse_grad(
                wide_x[_padded(rows, config.bm)],
                wide_y[_padded(cols, config.bn)],
                g,
                scale,
                # Each of rows and columns: gradient, log-sum-exp, gradient of positives; None where nothing is asked.
                [each[rows] if len(each) else None for each in (grad_row, grads.row_lse, row_pos)],
                [each[cols] if len(each) else None for each in (grad_col, grads.col_lse, col_pos)],
                pair[rows],
                _sides(rows, cols, pairs),
                config,
            )
            block = g[: rows.stop - rows.start, : cols.stop - cols.start]
            if need_x:
                add_product(dx[rows], block, y[cols])
            if need_y:
                add_product(dy[cols], block.t(), x[rows])
    factor = scale / lift
    return dx.mul_(factor), dy.mul_(factor)


def sigmoid_sum(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, weights: Tensor, pairs: Pairs, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row sums of the pairwise log-sigmoid loss, and dx, dy (empty when not needed), d bias of their weighted sum."""
    n, m = x.shape[0], y.shape[0]
    config = kernels.config_for("sigmoid" if pairs.row_ids is None else "sigmoid_ids", x)
    wide_x, wide_y = pad_operands(x, y, config)
    loss, dbias = scale.new_zeros(n), scale.new_zeros(())
    dx = x.new_zeros(x.shape if need_x else (0,), dtype=torch.float32)
    dy = x.new_zeros(y.shape if need_y else (0,), dtype=torch.float32)
    lift = _headroom((weights,), x.dtype)
    lifted = weights * lift
    g = _workspace(x, n, m, config) if need_x or need_y else None
    for rows in _spans(n, _BLOCK):
        for cols in _spans(m, _BLOCK):
            row_part, bias_part = kernels.launch_sigmoid(
                wide_x[_padded(rows, config.bm)],
                wide_y[_padded(cols, config.bn)],
                g,
                scale,
                bias,
                lifted[rows],
                _sides(rows, cols, pairs),
                config,
            )
            loss[rows] += row_part.sum(0)
            dbias += bias_part.sum()
            if g is None:
                continue
            block = g[: rows.stop - rows.start, : cols.stop - cols.start]
            if need_x:
                add_product(dx[rows], block, y[cols])
            if need_y:
                add_product(dy[cols], block.t(), x[rows])
    factor = scale / lift
    return loss, dx.mul_(factor), dy.mul_(factor), dbias / lift


def tune(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, timer: Callable[[Callable[[], object]], float]
) -> dict[str, kernels.Config]:
    """
    Time the shipped configurations of each kernel on these features and use the fastest for their width and dtype.
    """
    x, y, scale = image_embeds, text_embeds, logit_scale
    pairs = Pairs(0, None, None, False)
    row, col, pair, row_pos, col_pos = lse_pair(x, y, scale, pairs)
    grads = LseGrads(torch.ones_like(row), torch.ones_like(col), -pair, row_pos, col_pos, row, col)
    calls: dict[str, Callable[[], object]] = {
        "lse": lambda: lse_pair(x, y, scale, pairs),
        "grad": lambda: lse_pair_backward(x, y, scale, pairs, grads, True, True),
        "sigmoid": lambda: sigmoid_sum(x, y, scale, -scale, torch.ones_like(row), pairs, True, True),
    }
    chosen = {}
    for kernel, call in calls.items():
        times = {}
        for config in kernels.CONFIGS[kernel, kernels.architecture(x.device), x.dtype.itemsize == 2]:
            kernels.remember(kernel, x, config)
            times[config] = timer(call)
        chosen[kernel] = min(times, key=times.__getitem__)
        kernels.remember(kernel, x, chosen[kernel])
    return chosen
