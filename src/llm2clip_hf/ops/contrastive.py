# SPDX-License-Identifier: Apache-2.0
r"""
Contrastive losses of image and text embeddings that never hold the matrix of all logits.

1. Check the input and choose the implementation.
2. One visit of each tile of logits: log-sum-exp of rows and columns (softmax) or row losses (sigmoid); `registration`.
3. Combine vectors of length N with weights, smoothing and reduction in plain PyTorch.

Legend: `N` images, `M` texts, `D` embedding width.
"""

import importlib.util
import os
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import operators as registration


__all__ = ["contrastive_loss", "sigmoid_loss"]

Implementation = Literal["auto", "triton", "torch"]
Reduction = Literal["mean", "sum", "none"]
SameGroup = Literal["positive", "ignore"]

# Up to this many logits a single dense chunk has fewer launches than the tile kernels.
_DENSE_LOGITS = 2048 * 2048
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    row_offset: int = 0,
    weights: Tensor | None = None,
    group_ids: Tensor | None = None,
    same_group: SameGroup = "positive",
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    check_finite: bool = False,
    implementation: Implementation = "auto",
) -> Tensor:
    r"""
    Symmetric image-text InfoNCE without materializing the similarity matrix.

    Equal, up to rounding, to (for `N == M`):

        logits = logit_scale * image_embeds @ text_embeds.T
        loss = (cross_entropy(logits, arange(N)) + cross_entropy(logits.T, arange(N))) / 2

    Image `i` pairs with text `row_offset + i`; the text-to-image direction is taken over these N texts, the other
    `M - N` texts are negatives of the images.

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
        weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Weight of each pair, used in both directions. With `reduction="mean"` the sum is divided by
            `weights.sum()`.
        group_ids (`torch.Tensor` of shape `(M,)`, *optional*):
            Integer id of each text and of the image paired with it, e.g. the index of the image a caption describes.
        same_group (`str`, *optional*, defaults to `"positive"`):
            What pairs of equal id mean. `"positive"`: each row's target is uniform over all columns of its id (and
            each column's over all rows). `"ignore"`: equal ids outside the pair are left out as false negatives.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            As in `torch.nn.functional.cross_entropy`, in `[0, 1]`; uniform part over all M texts or all N images.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"`, `"sum"` or `"none"`; the last returns the N pair losses without `weights` applied.
        check_finite (`bool`, *optional*, defaults to `False`):
            Raise on NaN or inf in the embeddings, naming the first bad row. Without it they propagate to the loss.
        implementation (`str`, *optional*, defaults to `"auto"`):
            `"triton"` (CUDA), `"torch"` (any device), or `"auto"`: triton for large problems on CUDA, torch elsewhere.

    Returns:
        `torch.Tensor`, float32 (float64 for float64 embeddings): of shape `()`, the mean over pairs of the mean of
        both directions, in nats; of shape `(N,)` for `reduction="none"`.

    Raises:
        ValueError: if shapes, dtypes, devices or options do not fit, naming the argument.
        ImportError: if `implementation="triton"` and triton is not installed.
        NotImplementedError: in forward-mode differentiation (`torch.func.jvp`, `jacfwd`); backward is there.

    Memory: O((N + M) D) and a constant workspace. Work: 8 N M D, forward and backward. Source: the loss of stage 2,
    paper section 3.2 (CLIP's loss, https://huggingface.co/papers/2103.00020).

    Example:

    >>> x = torch.eye(4)
    >>> contrastive_loss(x, x, torch.tensor(10.0)).item() < 1e-3
    True
    """
    check_options(reduction, label_smoothing, same_group, group_ids)
    batch = prepare(image_embeds, text_embeds, logit_scale, row_offset, weights, group_ids, implementation)
    x, y, scale = batch.x, batch.y, batch.scale
    stop = row_offset + x.shape[0]
    with torch.autocast(device_type=x.device.type, enabled=False):
        row_ids = None if batch.ids is None else batch.ids[row_offset:stop]
        row_lse, col_lse, row_pos, col_pos = registration.lse_pair(
            x, y, scale, row_ids, batch.ids, row_offset, same_group == "ignore", batch.use_triton, check_finite
        )
        col_lse, col_pos = col_lse[row_offset:stop], col_pos[row_offset:stop]
        if batch.ids is not None and row_ids is not None and same_group == "positive":
            row_pos = row_pos / count_equal(row_ids, batch.ids)
            col_pos = col_pos / count_equal(row_ids, row_ids)
        if label_smoothing:
            wide_x, wide_y = x.to(scale.dtype), y.to(scale.dtype)
            row_mean = scale * (wide_x @ wide_y.mean(0))
            col_mean = scale * (wide_y[row_offset:stop] @ wide_x.mean(0))
            row_pos = torch.lerp(row_pos, row_mean, label_smoothing)
            col_pos = torch.lerp(col_pos, col_mean, label_smoothing)
        losses = 0.5 * ((row_lse - row_pos) + (col_lse - col_pos))
        if reduction == "none":
            return losses
        if batch.weights is None:
            return losses.mean() if reduction == "mean" else losses.sum()
        total = (losses * batch.weights).sum()
        return total / batch.weights.sum() if reduction == "mean" else total


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
    reduction: Reduction = "mean",
    check_finite: bool = False,
    implementation: Implementation = "auto",
) -> Tensor:
    r"""
    Pairwise sigmoid loss (SigLIP) without materializing the similarity matrix.

    Equal, up to rounding, to (for `N == M`):

        logits = logit_scale * image_embeds @ text_embeds.T + logit_bias
        loss = -logsigmoid((2 * eye(N) - 1) * logits).sum() / N

    Args:
        image_embeds (`torch.Tensor` of shape `(N, D)`):
            Image embeddings, usually L2-normalized; float16, bfloat16, float32 or float64. Different dtypes of images
            and texts are promoted to the wider one.
        text_embeds (`torch.Tensor` of shape `(M, D)`):
            Text embeddings, `M >= row_offset + N`; image `i` pairs with text `row_offset + i`.
        logit_scale (`torch.Tensor` of shape `()` or `(1,)`, or `float`):
            Positive multiplier, e.g. 10.0; not its logarithm. A value that is not positive raises on the CPU and gives
            NaN on a GPU, where reading it would stall the stream.
        logit_bias (`torch.Tensor` of shape `()` or `(1,)`, or `float`):
            Added to every logit, e.g. -10.0.
        row_offset (`int`, *optional*, defaults to 0):
            Column of the text that pairs with image 0, for local rows against gathered columns.
        weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Weight of each image's row. With `reduction="mean"` the sum is divided by `weights.sum()` instead of N.
        group_ids (`torch.Tensor` of shape `(M,)`, *optional*):
            Integer id of each text and of the image paired with it.
        same_group (`str`, *optional*, defaults to `"positive"`):
            `"positive"`: all pairs of equal id are positives. `"ignore"`: equal ids outside the pair are left out.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"`, `"sum"` or `"none"`; the last returns the N row sums without `weights` applied.
        check_finite (`bool`, *optional*, defaults to `False`):
            Raise on NaN or inf in the embeddings, naming the first bad row. Without it they propagate to the loss.
        implementation (`str`, *optional*, defaults to `"auto"`):
            `"triton"` (CUDA), `"torch"` (any device), or `"auto"`: triton for large problems on CUDA, torch elsewhere.

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
    check_options(reduction, 0.0, same_group, group_ids)
    batch = prepare(image_embeds, text_embeds, logit_scale, row_offset, weights, group_ids, implementation)
    x, y, scale = batch.x, batch.y, batch.scale
    refuse_forward_mode(logit_bias)
    bias = _scalar(logit_bias, "logit_bias", x, scale.dtype)
    row_ids = None if batch.ids is None else batch.ids[row_offset : row_offset + x.shape[0]]
    pairs = (row_ids, batch.ids, row_offset, same_group == "ignore", batch.use_triton, check_finite)
    if reduction == "none":
        return registration.sigmoid_rows(x, y, scale, bias, *pairs)
    with torch.autocast(device_type=x.device.type, enabled=False):
        row_weights = torch.ones_like(x[:, 0], dtype=scale.dtype) if batch.weights is None else batch.weights
        if reduction == "mean":
            row_weights = row_weights / (x.shape[0] if batch.weights is None else row_weights.sum())
    return weighted_sigmoid_sum(x, y, scale, bias, row_weights, pairs)


class Batch(NamedTuple):
    """Checked input: features of one dtype, fp32 (fp64) scale and weights, ids as small integers, the path to take."""

    x: Tensor
    y: Tensor
    scale: Tensor
    weights: Tensor | None
    ids: Tensor | None
    use_triton: bool


def prepare(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    row_offset: int = 0,
    weights: Tensor | None = None,
    group_ids: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Batch:
    """Check the arguments that both losses share and bring them into the form of the primitives."""
    check_features(image_embeds, text_embeds)
    refuse_forward_mode(image_embeds, text_embeds, logit_scale, weights)
    n, m = image_embeds.shape[0], text_embeds.shape[0]
    if row_offset < 0 or row_offset + n > m:
        raise ValueError(
            f"`row_offset` ({row_offset}) plus the number of images ({n}) must lie within the number of texts ({m}):"
            " each image needs its text. Images and texts must pair one to one, or more texts be gathered."
        )
    dtype = torch.promote_types(image_embeds.dtype, text_embeds.dtype)
    x, y = image_embeds.to(dtype).contiguous(), text_embeds.to(dtype).contiguous()
    wide = torch.promote_types(dtype, torch.float32)
    scale = _scalar(logit_scale, "logit_scale", x, wide)
    if x.device.type != "cpu":
        scale = torch.where(scale > 0, scale, torch.nan)
    if weights is not None:
        _check_vector(weights, "weights", n, "image", x.device)
        if not weights.dtype.is_floating_point:
            raise ValueError(f"`weights` must be floating point, got {weights.dtype}. Use `weights.float()`.")
        weights = weights.to(wide)
    ids = None
    if group_ids is not None:
        _check_vector(group_ids, "group_ids", m, "text", x.device)
        if group_ids.dtype.is_floating_point or group_ids.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise ValueError(f"`group_ids` must be integers, got {group_ids.dtype}. Number the groups.")
        ids = dense_ids(group_ids)
    return Batch(x, y, scale, weights, ids, choose_triton(implementation, x, n * m))


def dense_ids(ids: Tensor) -> Tensor:
    """Renumber integer ids to int32 values below their count, equal exactly where the ids are; never waits."""
    ordered, order = ids.sort()
    changes = torch.cat([torch.zeros_like(order[:1]), (ordered[1:] != ordered[:-1]).to(order.dtype)])
    return torch.zeros_like(order).scatter(0, order, changes.cumsum(0)).to(torch.int32)


def count_equal(ids: Tensor, among: Tensor) -> Tensor:
    """How many entries of `among` equal each entry of `ids`, as int64."""
    ordered = among.sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


def weighted_sigmoid_sum(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    weights: Tensor,
    pairs: tuple[Tensor | None, Tensor | None, int, bool, bool, bool],
) -> Tensor:
    """`weights @ row losses`, with the gradients computed in the same visit when any is going to be asked for."""
    grad = torch.is_grad_enabled()
    need_x, need_y = grad and x.requires_grad, grad and y.requires_grad
    if grad and (scale.requires_grad or bias.requires_grad) and not need_y:
        need_x = True
    return registration.sigmoid_sum(x, y, scale, bias, weights, *pairs, need_x, need_y)[0]


def refuse_forward_mode(*inputs: Tensor | float | None) -> None:
    """Raise `NotImplementedError` for a tangent: the operators would pass it over, and the derivative be 0."""
    if forward_ad._current_level < 0:  # outside of forward mode
        return
    if any(isinstance(each, Tensor) and forward_ad.unpack_dual(each).tangent is not None for each in inputs):
        raise NotImplementedError(
            "Forward-mode derivatives of `contrastive_loss` and `sigmoid_loss` are not implemented. Use `backward()`"
            " or `torch.autograd.grad`, or write the loss with dense logits, e.g. `torch.nn.functional.cross_entropy`."
        )


def check_features(image_embeds: Tensor, text_embeds: Tensor) -> None:
    """Raise `ValueError` unless both are floating-point matrices of one width on one device, neither of them empty."""
    for name, tensor in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise ValueError(
                f"`{name}` must be a matrix of at least one row and column, got shape {tuple(tensor.shape)}."
                " Pass one embedding per row."
            )
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise ValueError(
                f"`{name}` must be float16, bfloat16, float32 or float64, got {tensor.dtype}."
                " Convert it, e.g. with `.float()`."
            )
    if image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            f"`image_embeds` (width {image_embeds.shape[1]}) and `text_embeds` (width {text_embeds.shape[1]}) must"
            " have one width. Project both to the same space."
        )
    if image_embeds.device != text_embeds.device:
        raise ValueError(
            f"`image_embeds` ({image_embeds.device}) and `text_embeds` ({text_embeds.device}) must be on one device."
            " Move one of them."
        )


def choose_triton(implementation: str, x: Tensor, num_logits: int) -> bool:
    """Whether the Triton kernels serve these features; raises if they are requested and cannot."""
    if implementation not in ("auto", "triton", "torch"):
        raise ValueError(f'`implementation` must be "auto", "triton" or "torch", got {implementation!r}.')
    if implementation == "torch":
        return False
    if implementation == "auto" and (not x.is_cuda or x.dtype not in _TRITON_DTYPES or num_logits <= _DENSE_LOGITS):
        return False
    installed = importlib.util.find_spec("triton") is not None
    if implementation == "auto":
        return installed and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (8, 0)
    if not installed:
        raise ImportError(
            '`implementation="triton"` needs triton. Install it with `pip install llm2clip-hf[kernels]`.'
        )
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'`implementation="triton"` needs CUDA tensors, got {x.device}. Use `implementation="auto"`, or set'
            " `TRITON_INTERPRET=1` before the first use to run the kernels in Triton's interpreter."
        )
    if x.dtype not in _TRITON_DTYPES:
        raise ValueError(f'`implementation="triton"` takes 16-bit and 32-bit floats, got {x.dtype}. Use "torch".')
    return True


def _scalar(value: Tensor | float, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"`{name}` must be a number or a tensor of one element, got {value!r}.")
        return torch.full((), float(value), dtype=dtype, device=x.device)
    if value.shape not in ((), (1,)) or not value.dtype.is_floating_point:
        raise ValueError(
            f"`{name}` must be one floating-point number of shape () or (1,), got shape {tuple(value.shape)} and"
            f" {value.dtype}. Pass a single scalar for the whole batch."
        )
    if value.device != x.device:
        raise ValueError(f"`{name}` ({value.device}) and the embeddings ({x.device}) must be on one device. Move it.")
    return value.reshape(()).to(dtype)


def _check_vector(vector: Tensor, name: str, length: int, each: str, device: torch.device) -> None:
    if vector.shape != (length,):
        raise ValueError(f"`{name}` must have shape ({length},), one per {each}, got {tuple(vector.shape)}.")
    if vector.device != device:
        raise ValueError(f"`{name}` ({vector.device}) and the embeddings ({device}) must be on one device. Move it.")


def check_options(reduction: str, label_smoothing: float, same_group: str, group_ids: Tensor | None) -> None:
    """Raise `ValueError` for options that are unknown, out of range or at odds with one another."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'`reduction` must be "mean", "sum" or "none", got {reduction!r}.')
    if same_group not in ("positive", "ignore"):
        raise ValueError(f'`same_group` must be "positive" or "ignore", got {same_group!r}.')
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"`label_smoothing` must lie in [0, 1], got {label_smoothing}.")
    if label_smoothing and same_group == "ignore" and group_ids is not None:
        raise ValueError(
            f"`label_smoothing` ({label_smoothing}) gives every column a share of the target, so it cannot go with"
            ' `same_group="ignore"`. Use one of the two.'
        )
