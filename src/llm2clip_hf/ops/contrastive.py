# SPDX-License-Identifier: Apache-2.0
r"""
Contrastive losses of image and text embeddings that never hold the matrix of all logits.

1. Check the input, choose the implementation and the dtype of matrix products.
2. One visit of each tile of logits: log-sum-exp of rows and columns (softmax) or row losses (sigmoid); `operators`.
3. Combine vectors of length N with weights, smoothing and reduction in plain PyTorch.

Legend: `N` images, `M` texts, `D` embedding width.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import operators
from .inputs import (
    ComputeDtype,
    Direction,
    Implementation,
    SameGroup,
    as_scalar,
    check_options,
    needs_backward,
    pair_ids,
    prepare,
    refuse_forward_mode,
)


__all__ = ["contrastive_loss", "sigmoid_loss"]

Reduction = Literal["mean", "sum", "none"]


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    row_offset: int = 0,
    direction: Direction = "both",
    weights: Tensor | None = None,
    group_ids: Tensor | None = None,
    same_group: SameGroup = "positive",
    mask_ids: Sequence[Tensor] | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    compute_dtype: ComputeDtype = "auto",
    check_finite: bool = False,
    implementation: Implementation = "auto",
) -> Tensor:
    r"""
    Image-text InfoNCE, in both directions or one, without materializing the similarity matrix.

    Equal, up to rounding, to (for `N == M`):

        logits = logit_scale * image_embeds @ text_embeds.T
        loss = (cross_entropy(logits, arange(N)) + cross_entropy(logits.T, arange(N))) / 2

    Image `i` pairs with text `row_offset + i`; the text-to-image direction is taken over these N texts, the other
    `M - N` texts (of other processes, or hard negatives) are negatives of the images. Rows and columns may be any two
    sides, e.g. anchors and candidates of a retrieval loss.

    Args:
        image_embeds (`torch.Tensor` of shape `(N, D)`):
            Image embeddings, usually L2-normalized; float16, bfloat16, float32 or float64. Different dtypes of images
            and texts are promoted to the wider one.
        text_embeds (`torch.Tensor` of shape `(M, D)`):
            Text embeddings, `M >= row_offset + N`.
        logit_scale (`torch.Tensor` of shape `()` or `(1,)`, or `float`):
            Positive multiplier (inverse temperature), e.g. 100.0; not its logarithm. A value that is not positive
            raises on the CPU and gives NaN on a GPU, where reading it would stall the stream.
        row_offset (`int`, *optional*, defaults to 0):
            Column of the text that pairs with image 0, for local rows against gathered columns.
        direction (`str`, *optional*, defaults to `"both"`):
            `"rows"`: only the cross-entropy of each image over the M texts. `"columns"`: only that of each paired text
            over the N images. `"both"`: their mean.
        weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Weight of each pair, used in both directions. With `reduction="mean"` the sum is divided by
            `weights.sum()`.
        group_ids (`torch.Tensor` of shape `(M,)`, *optional*):
            Integer id of each text and of the image paired with it, e.g. the index of the image a caption describes.
        same_group (`str`, *optional*, defaults to `"positive"`):
            What pairs of equal id mean. `"positive"`: each row's target is uniform over all columns of its id (and
            each column's over all rows). `"ignore"`: equal ids outside the pair are left out as false negatives.
        mask_ids (pair of `torch.Tensor` of shapes `(N, K)` and `(M, K)`, *optional*):
            Integer ids of images and texts, `K <= 4`. Text `j` is no negative of image `i`, nor `i` of `j`, if they
            agree in any of the K ids; the pair itself always stays. The id -1 agrees with nothing. Not together with
            `group_ids`.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            As in `torch.nn.functional.cross_entropy`, in `[0, 1]`; uniform part over all M texts or all N images.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"`, `"sum"` or `"none"`; the last returns the N pair losses without `weights` applied.
        compute_dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`):
            What features are rounded to for matrix products, all of which add up in float32: `torch.float16`,
            `torch.bfloat16` or `torch.float32`; None: the features' own. `"auto"`: float16 for float32 features on
            CUDA devices of compute capability 8.0 or newer, else the features' own. float16 suits features of a norm
            near 1; their gradients are then off by about 1e-3 of their norm (bfloat16: 1e-2). Loss and gradients keep
            the dtype that they have without it.
        check_finite (`bool`, *optional*, defaults to `False`):
            Raise on NaN or inf in the embeddings, naming the first bad row. Without it they propagate to the loss.
        implementation (`str`, *optional*, defaults to `"auto"`):
            `"triton"` (CUDA), `"torch"` (any device), or `"auto"`: triton for large problems on CUDA, torch elsewhere.

    Returns:
        `torch.Tensor`, float32 (float64 for float64 embeddings): of shape `()`, the mean over pairs of the mean of
        the directions, in nats; of shape `(N,)` for `reduction="none"`.

    Raises:
        ValueError: if shapes, dtypes, devices or options do not fit, naming the argument.
        ImportError: if `implementation="triton"` and triton is not installed.
        NotImplementedError: in forward-mode differentiation (`torch.func.jvp`, `jacfwd`); backward is there.

    Memory: O((N + M) D) and a constant workspace, on the CPU with up to 2^26 logits that spare the backward a product.
    Work: 8 N M D, forward and backward; 6 N M D where all logits are kept. Source: the loss of stage 2,
    paper section 3.2 (CLIP's loss, https://huggingface.co/papers/2103.00020).

    Example:

    >>> x = torch.eye(4)
    >>> contrastive_loss(x, x, torch.tensor(10.0)).item() < 1e-3
    True
    """
    check_options(reduction, label_smoothing, same_group, group_ids is not None, mask_ids is not None, direction)
    batch = prepare(
        image_embeds, text_embeds, logit_scale, row_offset, weights, implementation, compute_dtype,
        pair_ids(group_ids, same_group, mask_ids, image_embeds, text_embeds, row_offset),
    )  # fmt: skip
    x, y, scale = batch.x, batch.y, batch.scale
    own = slice(row_offset, row_offset + len(x))
    with torch.autocast(device_type=x.device.type, enabled=False):
        row_lse, col_lse, pair, row_pos, col_pos, _ = operators.lse_pair(
            x, y, scale, *batch.pairs, direction, needs_backward(x, y, scale), check_finite
        )
        every = row_offset == 0 and len(x) == len(y)  # spares a slice and its backward
        sides, targets = [], []
        if direction != "columns":
            mean = scale * (x.to(scale.dtype) @ y.to(scale.dtype).mean(0)) if label_smoothing else None
            sides.append(row_lse)
            targets.append(soft_target(pair, row_pos, batch.ids.counts(batch.ids.col_ids), mean, label_smoothing))
        if direction != "rows":
            mean = scale * (y[own].to(scale.dtype) @ x.to(scale.dtype).mean(0)) if label_smoothing else None
            sides.append(col_lse if every else col_lse[own])
            positive = col_pos[own] if batch.ids.grouped else col_pos
            targets.append(soft_target(pair, positive, batch.ids.counts(batch.ids.row_ids), mean, label_smoothing))
        losses = cross_entropy(sides, pair, targets)
        if batch.weights is None and reduction == "mean":
            return losses.mean()
        losses = losses.mean(0)
        if reduction == "none":
            return losses
        if batch.weights is None:
            return losses.sum()
        total = (losses * batch.weights).sum()
        return total / batch.weights.sum() if reduction == "mean" else total


def soft_target(
    pair: Tensor, positive: Tensor, counts: Tensor | None, mean: Tensor | None, smoothing: float
) -> Tensor | None:
    """The logit that a target distribution expects: of several positives, smoothed; None where it is the pair's."""
    target = pair if counts is None else positive / counts
    if mean is not None:
        target = torch.lerp(target, mean, smoothing)
    return None if target is pair else target


def cross_entropy(sides: list[Tensor], pair: Tensor, targets: list[Tensor | None]) -> Tensor:
    """Cross-entropies (directions, N) from log-sum-exps without the pair and the expected logits of the targets."""
    # What the log-sum-exp with the pair is above the pair. Past the threshold, exp(-40) is below fp64's rounding.
    above = torch.stack(sides) - pair if len(sides) > 1 else (sides[0] - pair)[None]
    losses = torch.nn.functional.softplus(above, threshold=40.0)
    known = [target for target in targets if target is not None]
    return losses + (pair - torch.stack(known)) if known else losses


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    row_offset: int = 0,
    weights: Tensor | None = None,
    group_ids: Tensor | None = None,
    same_group: SameGroup = "positive",
    mask_ids: Sequence[Tensor] | None = None,
    reduction: Reduction = "mean",
    compute_dtype: ComputeDtype = "auto",
    check_finite: bool = False,
    implementation: Implementation = "auto",
) -> Tensor:
    r"""
    Pairwise sigmoid loss (SigLIP) without materializing the similarity matrix.

    Equal, up to rounding, to (for `N == M`):

        logits = logit_scale * image_embeds @ text_embeds.T + logit_bias
        loss = -logsigmoid((2 * eye(N) - 1) * logits).sum() / N

    Args:
        image_embeds (`torch.Tensor` of shape `(N, D)`): As in `contrastive_loss`.
        text_embeds (`torch.Tensor` of shape `(M, D)`): As there; image `i` pairs with `row_offset + i`.
        logit_scale (`torch.Tensor` of shape `()` or `(1,)`, or `float`):
            Positive multiplier, e.g. 10.0; not its logarithm. Not positive: as in `contrastive_loss`.
        logit_bias (`torch.Tensor` of shape `()` or `(1,)`, or `float`): Added to every logit, e.g. -10.0.
        row_offset (`int`, *optional*, defaults to 0): As in `contrastive_loss`.
        weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Weight of each image's row. With `reduction="mean"` the sum is divided by `weights.sum()` instead of N.
        group_ids (`torch.Tensor` of shape `(M,)`, *optional*): As in `contrastive_loss`.
        same_group (`str`, *optional*, defaults to `"positive"`):
            `"positive"`: all pairs of equal id are positives. `"ignore"`: equal ids outside the pair are left out.
        mask_ids (pair of `torch.Tensor` of shapes `(N, K)` and `(M, K)`, *optional*):
            Image `i` and text `j` are left out if they agree in any id other than -1; the pair itself always stays.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"`, `"sum"` or `"none"`; the last returns the N row sums without `weights` applied.
        compute_dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`): As in `contrastive_loss`.
        check_finite (`bool`, *optional*, defaults to `False`): As in `contrastive_loss`.
        implementation (`str`, *optional*, defaults to `"auto"`): As in `contrastive_loss`.

    Returns:
        `torch.Tensor`, float32 (float64 for float64 embeddings): of shape `()`, the sum over all pairs divided by the
        number of rows, in nats; of shape `(N,)` for `reduction="none"`.

    Raises:
        ValueError: if shapes, dtypes, devices or options do not fit, naming the argument.
        ImportError: if `implementation="triton"` and triton is not installed.
        NotImplementedError: in forward-mode differentiation (`torch.func.jvp`, `jacfwd`); backward is there.

    Memory: O((N + M) D) and a constant workspace. Work: 6 N M D, forward and backward (8 N M D for
    `reduction="none"`). Source: SigLIP, https://huggingface.co/papers/2303.15343, equation 1.

    Example:

    >>> x = torch.eye(4)
    >>> round(sigmoid_loss(x, x, 10.0, -5.0).item(), 4)
    0.0269
    """
    check_options(reduction, 0.0, same_group, group_ids is not None, mask_ids is not None)
    batch = prepare(
        image_embeds, text_embeds, logit_scale, row_offset, weights, implementation, compute_dtype,
        pair_ids(group_ids, same_group, mask_ids, image_embeds, text_embeds, row_offset),
    )  # fmt: skip
    x, y, scale = batch.x, batch.y, batch.scale
    refuse_forward_mode(logit_bias)
    bias = as_scalar(logit_bias, "logit_bias", x, scale.dtype)
    if reduction == "none":
        return operators.sigmoid_rows(x, y, scale, bias, *batch.pairs, check_finite)
    with torch.autocast(device_type=x.device.type, enabled=False):
        row_weights = torch.ones_like(x[:, 0], dtype=scale.dtype) if batch.weights is None else batch.weights
        if reduction == "mean":
            row_weights = row_weights / (x.shape[0] if batch.weights is None else row_weights.sum())
    return weighted_sigmoid_sum(x, y, scale, bias, row_weights, (*batch.pairs, check_finite))


def weighted_sigmoid_sum(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    weights: Tensor,
    pairs: tuple[Any, ...],
) -> Tensor:
    """`weights @ row losses`, with the gradients computed in the same visit when any is going to be asked for."""
    grad = torch.is_grad_enabled()
    need_x, need_y = grad and x.requires_grad, grad and y.requires_grad
    if grad and (scale.requires_grad or bias.requires_grad) and not need_y:
        need_x = True
    return operators.sigmoid_sum(x, y, scale, bias, weights, *pairs, need_x, need_y)[0]
