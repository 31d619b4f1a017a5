# SPDX-License-Identifier: Apache-2.0
r"""
The primitives behind the losses, registered as `torch.library` operators with fakes and autograd.

- `lse_pair(x, y, ...) -> (R, C, row_pos, col_pos)`: log-sum-exp of the rows and columns of `s = scale * x @ y.T` and
  the sums of its positive entries. A loss is ordinary PyTorch on these vectors.
- `sigmoid_sum(x, y, ...)`: a weighted sum of sigmoid row losses. Nothing has to be normalised, so loss and gradients
  come from one visit of each tile in the forward, and the backward only multiplies them by the incoming scalar.
- `sigmoid_rows(x, y, ...)`: the row losses alone; the backward visits the tiles again with the incoming row gradients.

Whether the Triton kernels or the chunked twin run is an argument (`use_triton`), so a traced graph stays explicit.
`triton` is imported only when that argument is true. Pairs follow `contrastive_torch`: positive are
`j == i + row_offset` or equal ids; `ignore_same` leaves pairs of equal id other than `j == i + row_offset` out.
"""

import types
from typing import Any

import torch
from torch import Tensor

from . import contrastive_torch
from .contrastive_torch import LseGrads, Pairs


_DOUBLE_BACKWARD = (
    "Second derivatives of `contrastive_loss` and `sigmoid_loss` are not implemented. Take the gradient without"
    " `create_graph=True`, or write the loss with dense logits, e.g. `torch.nn.functional.cross_entropy`."
)
# Rows per step of the inner product that gives the gradient of the scale; bounds its temporary.
_INNER_ROWS = 1 << 14


def _backend(use_triton: bool) -> types.ModuleType:
    if use_triton:
        from . import contrastive_blocks

        return contrastive_blocks
    return contrastive_torch


def _without_autocast(x: Tensor) -> torch.autocast:
    # Autocast would silently round the logits of fp32 features to bf16.
    return torch.autocast(device_type=x.device.type, enabled=False)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _inner(x: Tensor, dx: Tensor) -> Tensor:
    """<x, dx> in the accumulation dtype."""
    total = dx.new_zeros(())
    for a in range(0, x.shape[0], _INNER_ROWS):
        total = total + (x[a : a + _INNER_ROWS] * dx[a : a + _INNER_ROWS]).sum()
    return total


def _check_values(x: Tensor, y: Tensor, scale: Tensor, check_finite: bool) -> None:
    """Raise on a scale that is not positive (CPU) and, when asked, on the first non-finite row of the features."""
    if scale.device.type == "cpu" and not float(scale) > 0.0 and not torch.isnan(scale):
        raise ValueError(
            f"`logit_scale` must be positive, got {float(scale)}. Pass the multiplier, e.g. `model.logit_scale.exp()`,"
            " not its logarithm."
        )
    if not check_finite:
        return
    for name, tensor in (("image_embeds", x), ("text_embeds", y)):
        bad = (~torch.isfinite(tensor)).any(1).nonzero()
        if len(bad):
            raise ValueError(
                f"`{name}` must be finite, but row {int(bad[0])} of {tensor.shape[0]} holds NaN or inf ({len(bad)}"
                " such rows in all). Look at the input of that row, or at the learning rate."
            )


def _refuse_double_backward(ctx: Any, *grads: Tensor | None) -> Any:
    raise RuntimeError(_DOUBLE_BACKWARD)


def _nothing_to_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return


@torch.library.custom_op("llm2clip_hf::lse_pair", mutates_args=())
def lse_pair(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_offset: int,
    ignore_same: bool,
    use_triton: bool,
    check_finite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and column log-sum-exp and sums of positive logits of `scale * x @ y.T`; see the module docstring."""
    _check_values(x, y, scale, check_finite)
    with _without_autocast(x):
        return _backend(use_triton).lse_pair(x, y, scale, Pairs(row_offset, row_ids, col_ids, ignore_same))


@lse_pair.register_fake
def _(x, y, scale, row_ids, col_ids, row_offset, ignore_same, use_triton, check_finite):  # type: ignore[no-untyped-def]
    rows = x.new_empty((x.shape[0],), dtype=_accumulation_dtype(x))
    cols = y.new_empty((y.shape[0],), dtype=_accumulation_dtype(x))
    return rows, cols, torch.empty_like(rows), torch.empty_like(cols)


@torch.library.custom_op("llm2clip_hf::lse_pair_backward", mutates_args=())
def lse_pair_backward(
    grad_row: Tensor,
    grad_col: Tensor,
    grad_row_pos: Tensor,
    grad_col_pos: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_offset: int,
    ignore_same: bool,
    use_triton: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx and dy in the accumulation dtype (empty when not needed) and d scale. At least one of the two is computed."""
    grads = LseGrads(
        grad_row.contiguous(),
        grad_col.contiguous(),
        grad_row_pos.contiguous(),
        grad_col_pos.contiguous(),
        # A row or column without any pair has no gradient; -inf - (-inf) would make it NaN.
        row_lse.masked_fill(torch.isneginf(row_lse), 0.0),
        col_lse.masked_fill(torch.isneginf(col_lse), 0.0),
    )
    pairs = Pairs(row_offset, row_ids, col_ids, ignore_same)
    with _without_autocast(x):
        dx, dy = _backend(use_triton).lse_pair_backward(
            x, y, scale, pairs, grads, need_x=need_x or not need_y, need_y=need_y
        )
        dscale = (_inner(x, dx) if need_x or not need_y else _inner(y, dy)) / scale
    return (dx if need_x else dx.new_zeros(0)), dy, dscale


@lse_pair_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_row, grad_col, grad_row_pos, grad_col_pos, row_lse, col_lse, x, y, scale, row_ids, col_ids, row_offset,
    ignore_same, use_triton, need_x, need_y,
):  # fmt: skip
    dtype = _accumulation_dtype(x)
    dx = x.new_empty(x.shape if need_x else (0,), dtype=dtype)
    dy = y.new_empty(y.shape if need_y else (0,), dtype=dtype)
    return dx, dy, x.new_empty((), dtype=dtype)


lse_pair_backward.register_autograd(_refuse_double_backward, setup_context=_nothing_to_save)


def _lse_pair_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, scale, row_ids, col_ids, *ctx.options, _check = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y, scale, row_ids, col_ids, output[0], output[1])


def _lse_pair_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    x, y, scale, row_ids, col_ids, row_lse, col_lse = ctx.saved_tensors
    filled = [
        torch.zeros_like(like) if grad is None else grad
        for grad, like in zip(grads, (row_lse, col_lse, row_lse, col_lse))
    ]
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    dx, dy, dscale = lse_pair_backward(
        *filled, row_lse, col_lse, x, y, scale, row_ids, col_ids, *ctx.options, need_x, need_y
    )
    return (
        dx.to(x.dtype) if need_x else None,
        dy.to(y.dtype) if need_y else None,
        dscale.to(scale.dtype) if need_scale else None,
        *([None] * 6),
    )


lse_pair.register_autograd(_lse_pair_autograd, setup_context=_lse_pair_setup)


@torch.library.custom_op("llm2clip_hf::sigmoid_sum", mutates_args=())
def sigmoid_sum(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    weights: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_offset: int,
    ignore_same: bool,
    use_triton: bool,
    check_finite: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`weights @ row losses`, the row losses, and its gradients dx, dy (empty unless needed), d scale, d bias."""
    _check_values(x, y, scale, check_finite)
    pairs = Pairs(row_offset, row_ids, col_ids, ignore_same)
    with _without_autocast(x):
        rows, dx, dy, dbias = _backend(use_triton).sigmoid_sum(x, y, scale, bias, weights, pairs, need_x, need_y)
        dscale = torch.zeros_like(dbias)
        if need_x or need_y:
            dscale = (_inner(x, dx) if need_x else _inner(y, dy)) / scale
        total = (weights * rows).sum()
    return total, rows, dx, dy, dscale, dbias


@sigmoid_sum.register_fake
def _(x, y, scale, bias, weights, row_ids, col_ids, row_offset, ignore_same, use_triton, check_finite, need_x, need_y):  # type: ignore[no-untyped-def]
    dtype = _accumulation_dtype(x)
    scalar = x.new_empty((), dtype=dtype)
    dx = x.new_empty(x.shape if need_x else (0,), dtype=dtype)
    dy = y.new_empty(y.shape if need_y else (0,), dtype=dtype)
    rows = x.new_empty((x.shape[0],), dtype=dtype)
    return scalar, rows, dx, dy, torch.empty_like(scalar), torch.empty_like(scalar)


def _sigmoid_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = tuple(tensor.dtype for tensor in inputs[:5])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _sigmoid_sum_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    if any(grad is not None for grad in grads[1:]):
        raise RuntimeError(_DOUBLE_BACKWARD)
    rows, dx, dy, dscale, dbias = ctx.saved_tensors
    need = ctx.needs_input_grad
    if grads[0] is None:
        return (None,) * 13
    scaled = [
        (grads[0] * partial).to(dtype) if needed else None
        for partial, dtype, needed in zip((dx, dy, dscale, dbias, rows), ctx.dtypes, need)
    ]
    return (*scaled, *([None] * 8))


sigmoid_sum.register_autograd(_sigmoid_sum_autograd, setup_context=_sigmoid_sum_setup)


@torch.library.custom_op("llm2clip_hf::sigmoid_rows", mutates_args=())
def sigmoid_rows(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_offset: int,
    ignore_same: bool,
    use_triton: bool,
    check_finite: bool,
) -> Tensor:
    """Row sums of the pairwise sigmoid loss; see the module docstring."""
    _check_values(x, y, scale, check_finite)
    pairs = Pairs(row_offset, row_ids, col_ids, ignore_same)
    weights = x.new_zeros((x.shape[0],), dtype=_accumulation_dtype(x))
    with _without_autocast(x):
        rows: Tensor = _backend(use_triton).sigmoid_sum(x, y, scale, bias, weights, pairs, False, False)[0]
    return rows


@sigmoid_rows.register_fake
def _(x, y, scale, bias, row_ids, col_ids, row_offset, ignore_same, use_triton, check_finite):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0],), dtype=_accumulation_dtype(x))


def _sigmoid_rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.row_offset, ctx.ignore_same, ctx.use_triton, _check = inputs
    ctx.save_for_backward(*tensors)


def _sigmoid_rows_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, y, scale, bias, row_ids, col_ids = ctx.saved_tensors
    need = ctx.needs_input_grad
    need_x, need_y = need[0] or not need[1], need[1]
    options = (ctx.row_offset, ctx.ignore_same, ctx.use_triton, False, need_x, need_y)
    _, _, dx, dy, dscale, dbias = sigmoid_sum(x, y, scale, bias, grad, row_ids, col_ids, *options)
    partials = zip((dx, dy, dscale, dbias), (x, y, scale, bias), need)
    return (*(partial.to(like.dtype) if needed else None for partial, like, needed in partials), *([None] * 6))


sigmoid_rows.register_autograd(_sigmoid_rows_autograd, setup_context=_sigmoid_rows_setup)
