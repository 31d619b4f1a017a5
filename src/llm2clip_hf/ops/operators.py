# SPDX-License-Identifier: Apache-2.0
r"""
The primitives behind the losses, registered as `torch.library` operators with fakes and autograd.

- `lse_pair(x, y, ...) -> (R, C, pair, row_pos, col_pos, kept)`: log-sum-exp of the rows and columns of
  `s = scale * x @ y.T` without each row's pair, the pairs, and the sums of grouped positives. A loss is ordinary
  PyTorch on these vectors; `kept` are logits, or features in 16 bits, for the backward.
- `sigmoid_sum(x, y, ...)`: a weighted sum of sigmoid row losses. Nothing has to be normalised, so loss and gradients
  come from one visit of each tile in the forward, and the backward only multiplies them by the incoming scalar.
- `sigmoid_rows(x, y, ...)`: the row losses alone; the backward visits the tiles again with the incoming row gradients.

Whether the Triton kernels or the chunked twin run is an argument (`use_triton`), so a traced graph stays explicit.
`triton` is imported only when that argument is true. Matrix products take the features rounded to `compute`; gradients
come back in the features' own dtype. Pairs follow `contrastive_torch`: the pair of row i is `j == i + row_offset`;
equal ids are positive too, or with `ignore_same` left out.
"""

import types
from typing import Any

import torch
from torch import Tensor

from . import contrastive_torch
from .contrastive_torch import LseGrads, Pairs, kept_rows


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


def _positive(scale: Tensor, use_triton: bool) -> Tensor:
    """NaN instead of a scale that is not positive, where reading it would stall the stream; the kernels see to it."""
    return scale if use_triton or scale.device.type == "cpu" else torch.where(scale > 0, scale, torch.nan)


def _without_autocast(x: Tensor) -> torch.autocast:
    # Autocast would silently round the logits of fp32 features to bf16.
    return torch.autocast(device_type=x.device.type, enabled=False)


def _inner(x: Tensor, dx: Tensor) -> Tensor:
    """<x, dx> in the accumulation dtype."""
    spans = [slice(a, a + _INNER_ROWS) for a in range(0, x.shape[0], _INNER_ROWS)]
    parts = [(x[span] * dx[span]).sum() for span in spans]
    return sum(parts[1:], parts[0])


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


def _new_kept(x: Tensor, y: Tensor, scale: Tensor, compute: torch.dtype, use_triton: bool, keep: bool) -> Tensor:
    """What the forward keeps for the backward: logits of some rows, or for the kernels the features in 16 bits."""
    n, m = x.shape[0], y.shape[0]
    if not use_triton:
        return scale.new_empty((kept_rows(n, m, x.device) if keep else 0, m))
    rounded = keep and (x.dtype != compute or y.dtype != compute) and compute.itemsize == 2
    return x.new_empty((n + m if rounded else 0, x.shape[1]), dtype=compute)


@torch.library.custom_op("llm2clip_hf::lse_pair", mutates_args=())
def lse_pair(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_offset: int,
    ignore_same: bool,
    compute: torch.dtype,
    use_triton: bool,
    direction: str,
    keep: bool,
    check_finite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The vectors of `contrastive_torch.Lse` and kept logits; see the module docstring."""
    _check_values(x, y, scale, check_finite)
    pairs = Pairs(row_offset, row_ids, col_ids, ignore_same)
    kept = _new_kept(x, y, scale, compute, use_triton, keep)
    with _without_autocast(x):
        backend = _backend(use_triton)
        if use_triton and len(kept):
            kept[: len(x)], kept[len(x) :] = x, y
            x, y = kept[: len(x)], kept[len(x) :]
        x, y = backend.operand(x, compute), backend.operand(y, compute)
        options = (direction,) if use_triton else (direction, kept)
        return *backend.lse_pair(x, y, _positive(scale, use_triton), pairs, *options), kept


@lse_pair.register_fake
def _(  # type: ignore[no-untyped-def]
    x, y, scale, row_ids, col_ids, row_offset, ignore_same, compute, use_triton, direction, keep, check_finite
):
    n, m = x.shape[0], y.shape[0]
    grouped = row_ids is not None and not ignore_same
    sizes = (n * (direction != "columns"), m * (direction != "rows"), n, n * grouped, m * grouped)
    kept = _new_kept(x, y, scale, compute, use_triton, keep)
    return *(scale.new_empty((size,)) for size in sizes), kept


@torch.library.custom_op("llm2clip_hf::lse_pair_backward", mutates_args=())
def lse_pair_backward(
    grad_row: Tensor,
    grad_col: Tensor,
    grad_pair: Tensor,
    grad_row_pos: Tensor,
    grad_col_pos: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    kept: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_offset: int,
    ignore_same: bool,
    compute: torch.dtype,
    use_triton: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx and dy in the dtype of `scale` (empty when not needed) and d scale. At least one of the two is computed."""
    vectors = (grad_row, grad_col, grad_pair, grad_row_pos, grad_col_pos)
    grads = LseGrads(*(grad.contiguous() for grad in vectors), row_lse, col_lse)  # type: ignore[call-arg]
    pairs = Pairs(row_offset, row_ids, col_ids, ignore_same)
    need_x = need_x or not need_y
    with _without_autocast(x):
        backend = _backend(use_triton)
        if use_triton and len(kept):
            x, y = kept[: len(x)], kept[len(x) :]
        x, y = backend.operand(x, compute), backend.operand(y, compute)
        options = () if use_triton else (kept,)
        dx, dy = backend.lse_pair_backward(x, y, scale, pairs, grads, need_x, need_y, *options)
        dscale = (_inner(x, dx) if need_x else _inner(y, dy)) / scale
    return dx, dy, dscale


@lse_pair_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_row, grad_col, grad_pair, grad_row_pos, grad_col_pos, row_lse, col_lse, kept, x, y, scale, row_ids, col_ids,
    row_offset, ignore_same, compute, use_triton, need_x, need_y,
):  # fmt: skip
    dx = scale.new_empty(x.shape if need_x or not need_y else (0,))
    return dx, scale.new_empty(y.shape if need_y else (0,)), scale.new_empty(())


lse_pair_backward.register_autograd(_refuse_double_backward, setup_context=_nothing_to_save)


def _lse_pair_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, scale, row_ids, col_ids, *ctx.options, _direction, _keep, _check = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y, scale, row_ids, col_ids, *output)


def _lse_pair_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    x, y, scale, row_ids, col_ids, *vectors, kept = ctx.saved_tensors
    filled = [torch.zeros_like(like) if grad is None else grad for grad, like in zip(grads, vectors)]
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    dx, dy, dscale = lse_pair_backward(
        *filled, *vectors[:2], kept, x, y, scale, row_ids, col_ids, *ctx.options, need_x, need_y
    )
    return (
        dx.to(x.dtype) if need_x else None,
        dy.to(y.dtype) if need_y else None,
        dscale if need_scale else None,
        *([None] * 9),
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
    compute: torch.dtype,
    use_triton: bool,
    check_finite: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`weights @ row losses`, the row losses, and its gradients dx, dy (empty unless needed), d scale, d bias."""
    _check_values(x, y, scale, check_finite)
    pairs = Pairs(row_offset, row_ids, col_ids, ignore_same)
    with _without_autocast(x):
        backend = _backend(use_triton)
        x, y = backend.operand(x, compute), backend.operand(y, compute)
        rows, dx, dy, dbias = backend.sigmoid_sum(
            x, y, _positive(scale, use_triton), bias, weights, pairs, need_x, need_y
        )
        dscale = torch.zeros_like(dbias)
        if need_x or need_y:
            dscale = (_inner(x, dx) if need_x else _inner(y, dy)) / scale
        total = (weights * rows).sum()
    return total, rows, dx, dy, dscale, dbias


@sigmoid_sum.register_fake
def _(  # type: ignore[no-untyped-def]
    x, y, scale, bias, weights, row_ids, col_ids, row_offset, ignore_same, compute, use_triton, check_finite, need_x,
    need_y,
):  # fmt: skip
    sizes = ((), x.shape[:1], x.shape if need_x else (0,), y.shape if need_y else (0,), (), ())
    return tuple(scale.new_empty(size) for size in sizes)


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
        return (None,) * 14
    scaled = [
        (grads[0] * partial).to(dtype) if needed else None
        for partial, dtype, needed in zip((dx, dy, dscale, dbias, rows), ctx.dtypes, need)
    ]
    return (*scaled, *([None] * 9))


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
    compute: torch.dtype,
    use_triton: bool,
    check_finite: bool,
) -> Tensor:
    """Row sums of the pairwise sigmoid loss; see the module docstring."""
    _check_values(x, y, scale, check_finite)
    pairs = Pairs(row_offset, row_ids, col_ids, ignore_same)
    with _without_autocast(x):
        backend = _backend(use_triton)
        x, y = backend.operand(x, compute), backend.operand(y, compute)
        rows: Tensor = backend.sigmoid_sum(
            x, y, _positive(scale, use_triton), bias, scale.new_zeros(len(x)), pairs, False, False
        )[0]
    return rows


@sigmoid_rows.register_fake
def _(x, y, scale, bias, row_ids, col_ids, row_offset, ignore_same, compute, use_triton, check_finite):  # type: ignore[no-untyped-def]
    return scale.new_empty((x.shape[0],))


def _sigmoid_rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.row_offset, ctx.ignore_same, ctx.compute, ctx.use_triton, _check = inputs
    ctx.save_for_backward(*tensors)


def _sigmoid_rows_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, y, scale, bias, row_ids, col_ids = ctx.saved_tensors
    need = ctx.needs_input_grad
    need_x, need_y = need[0] or not need[1], need[1]
    options = (ctx.row_offset, ctx.ignore_same, ctx.compute, ctx.use_triton, False, need_x, need_y)
    _, _, dx, dy, dscale, dbias = sigmoid_sum(x, y, scale, bias, grad, row_ids, col_ids, *options)
    partials = zip((dx, dy, dscale, dbias), (x, y, scale, bias), need)
    return (*(partial.to(like.dtype) if needed else None for partial, like, needed in partials), *([None] * 7))


sigmoid_rows.register_autograd(_sigmoid_rows_autograd, setup_context=_sigmoid_rows_setup)
