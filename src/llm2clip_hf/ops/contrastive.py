# SPDX-License-Identifier: Apache-2.0
r"""
Contrastive losses of image and text embeddings that never hold the matrix of all logits.

1. Check the input, choose the implementation and the dtype of matrix products.
2. One visit of each tile of logits: log-sum-exp of rows and columns (softmax) or row losses (sigmoid); `operators`.
3. Combine vectors of length N with weights, smoothing and reduction in plain PyTorch.

Legend: `N` images, `M` texts, `D` embedding width.
"""

import importlib.util
import numbers
import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import operators


__all__ = ["contrastive_loss", "sigmoid_loss"]

Implementation = Literal["auto", "triton", "torch"]
Reduction = Literal["mean", "sum", "none"]
SameGroup = Literal["positive", "ignore"]
Direction = Literal["both", "rows", "columns"]
ComputeDtype = Literal["auto"] | torch.dtype | None

# Up to this many logits a single dense chunk has fewer launches than the tile kernels.
_DENSE_LOGITS = 2048 * 2048
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_MASKS = 4


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

    Memory: O((N + M) D) and a constant workspace. Work: 8 N M D, forward and backward. Source: the loss of stage 2,
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


class PairIds(NamedTuple):
    """Ids of rows (N, K) and columns (M, K), numbered from 0 or negative for none; what equal ones mean."""

    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    ignore: bool = False

    @property
    def grouped(self) -> bool:
        """Whether equal ids are positives."""
        return self.row_ids is not None and not self.ignore

    def counts(self, among: Tensor | None) -> Tensor | None:
        """How many of `among` have each row's id, where equal ids are positives."""
        return count_equal(self.row_ids, among) if self.grouped else None  # type: ignore[arg-type]


class Batch(NamedTuple):
    """Checked input: features, fp32 (fp64) scale and weights, the pair rule, the way to compute."""

    x: Tensor
    y: Tensor
    scale: Tensor
    weights: Tensor | None
    row_offset: int
    ids: PairIds
    compute: torch.dtype
    use_triton: bool

    @property
    def pairs(self) -> tuple[Tensor | None, Tensor | None, int, bool, torch.dtype, bool]:
        """Arguments that the operators share."""
        return self.ids.row_ids, self.ids.col_ids, self.row_offset, self.ids.ignore, self.compute, self.use_triton


def prepare(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    row_offset: int = 0,
    weights: Tensor | None = None,
    implementation: Implementation = "auto",
    compute_dtype: ComputeDtype = "auto",
    ids: PairIds | None = None,
) -> Batch:
    """Check the arguments that both losses share and bring them into the form of the operators."""
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
    scale = as_scalar(logit_scale, "logit_scale", x, wide)
    if weights is not None:
        _check_vector(weights, "weights", n, "image", x.device)
        if not weights.dtype.is_floating_point:
            raise ValueError(f"`weights` must be floating point, got {weights.dtype}. Use `weights.float()`.")
        weights = weights.to(wide)
    compute = choose_compute(compute_dtype, x)
    return Batch(x, y, scale, weights, row_offset, ids or PairIds(), compute, choose_triton(implementation, x, n * m))


def pair_ids(
    group_ids: Tensor | None,
    same_group: str,
    mask_ids: Sequence[Tensor] | None,
    image_embeds: Tensor,
    text_embeds: Tensor,
    row_offset: int,
) -> PairIds:
    """The pair rule of the public arguments; raises `ValueError` for ids of another shape, dtype or device."""
    if group_ids is None and mask_ids is None:
        return PairIds()
    check_features(image_embeds, text_embeds)
    (n, _), m, device = image_embeds.shape, text_embeds.shape[0], image_embeds.device
    if group_ids is not None:
        ids = dense_ids(check_group_ids(group_ids, m, device)[1])
        return PairIds(ids[max(row_offset, 0) : row_offset + n], ids, same_group == "ignore")
    return dense_masks(*check_mask_ids(mask_ids, n, m, device))


def check_group_ids(group_ids: Tensor, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """As ids (M, 1) of rows and columns; raises `ValueError` unless these are m integers."""
    _check_vector(group_ids, "group_ids", m, "text", device)
    _check_integers(group_ids, "group_ids")
    return group_ids[:, None], group_ids[:, None]


def check_mask_ids(mask_ids: Sequence[Tensor] | None, n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """As int64; raises `ValueError` unless these are integer ids of n rows and m columns."""
    if not isinstance(mask_ids, Sequence) or len(mask_ids) != 2 or not all(isinstance(e, Tensor) for e in mask_ids):
        raise ValueError(
            "`mask_ids` must be two tensors, ids of the images (N, K) and of the texts (M, K), got"
            f" {type(mask_ids).__name__}. For one id per text pass `group_ids`."
        )
    width = mask_ids[0].shape[1] if mask_ids[0].dim() == 2 else 0
    for ids, rows, each in zip(mask_ids, (n, m), ("image", "text")):
        if ids.shape != (rows, width) or not 1 <= width <= _MAX_MASKS:
            raise ValueError(
                f"`mask_ids` must have shape ({rows}, K), 1 <= K <= {_MAX_MASKS}, one row per {each}, got"
                f" {tuple(ids.shape)}."
            )
        _check_integers(ids, "mask_ids")
        if ids.device != device:
            raise ValueError(
                f"`mask_ids` ({ids.device}) and the embeddings ({device}) must be on one device. Move it."
            )
    return mask_ids[0].long(), mask_ids[1].long()


def dense_masks(row_ids: Tensor, col_ids: Tensor) -> PairIds:
    """Ids that agree are left out; -1, in rows or columns, agrees with nothing."""
    both = torch.cat([row_ids, col_ids])
    dense = dense_ids(both)
    rows, cols = dense.masked_fill(both == -1, -1).split([len(row_ids), len(col_ids)])
    return PairIds(rows, cols.masked_fill(cols == -1, -2), True)


def dense_ids(ids: Tensor) -> Tensor:
    """Renumber integer ids, by column, to int32 values below their count, equal where the ids are; never waits."""
    ordered, order = ids.sort(0)
    changes = torch.cat([torch.zeros_like(order[:1]), (ordered[1:] != ordered[:-1]).to(order.dtype)])
    return torch.zeros_like(order).scatter(0, order, changes.cumsum(0)).to(torch.int32)


def count_equal(ids: Tensor, among: Tensor) -> Tensor:
    """How many entries of `among` equal each entry of `ids`, as int64."""
    ids, ordered = ids.flatten(), among.flatten().sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


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


def needs_backward(*inputs: Tensor) -> bool:
    """Whether a backward is going to come, for which the forward keeps what would be computed again."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def refuse_forward_mode(*inputs: Tensor | float | None) -> None:
    """Raise `NotImplementedError` for a tangent: the operators would pass it over, and the derivative be 0."""
    if forward_ad._current_level < 0:  # outside of forward mode
        return
    if any(isinstance(each, Tensor) and forward_ad.unpack_dual(each).tangent is not None for each in inputs):
        raise NotImplementedError(
            "Forward-mode derivatives of `contrastive_loss` and `sigmoid_loss` are not implemented. Use `backward()`"
            " or `torch.autograd.grad`, or write the loss with dense logits, e.g. `torch.nn.functional.cross_entropy`."
        )


def check_features(
    image_embeds: Tensor, text_embeds: Tensor, names: tuple[str, str] = ("image_embeds", "text_embeds")
) -> None:
    """Raise `ValueError` unless both are floating-point matrices of one width on one device, neither of them empty."""
    for name, tensor in zip(names, (image_embeds, text_embeds)):
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"`{name}` must be a tensor, got {type(tensor).__name__}. Convert it, e.g. with `torch.as_tensor`."
            )
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
            f"`{names[0]}` (width {image_embeds.shape[1]}) and `{names[1]}` (width {text_embeds.shape[1]}) must"
            " have one width. Project both to the same space."
        )
    if image_embeds.device != text_embeds.device:
        raise ValueError(
            f"`{names[0]}` ({image_embeds.device}) and `{names[1]}` ({text_embeds.device}) must be on one device."
            " Move one of them."
        )
    if image_embeds.device.type == "meta":
        raise ValueError(f"`{names[0]}` and `{names[1]}` are on the meta device, which holds no values. Load them.")


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


def choose_compute(compute_dtype: ComputeDtype, x: Tensor) -> torch.dtype:
    """The dtype that features are rounded to for matrix products."""
    if compute_dtype is None:
        return x.dtype
    if compute_dtype == "auto":
        tensor_cores = x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (8, 0)
        return torch.float16 if tensor_cores and x.dtype == torch.float32 else x.dtype
    if compute_dtype not in _TRITON_DTYPES:
        raise ValueError(
            '`compute_dtype` must be "auto", None, torch.float16, torch.bfloat16 or torch.float32, got'
            f" {compute_dtype!r}."
        )
    return compute_dtype


def as_scalar(value: Tensor | float, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A number or a tensor of one element as a 0-d tensor beside `x`."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
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


def _check_integers(ids: Tensor, name: str) -> None:
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"`{name}` must be integers, got {ids.dtype}. Number the groups.")


def check_options(
    reduction: str,
    label_smoothing: float,
    same_group: str,
    grouped: bool,
    masked: bool,
    direction: str = "both",
) -> None:
    """Raise `ValueError` for options that are unknown, out of range or at odds with one another."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'`reduction` must be "mean", "sum" or "none", got {reduction!r}.')
    if same_group not in ("positive", "ignore"):
        raise ValueError(f'`same_group` must be "positive" or "ignore", got {same_group!r}.')
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"`label_smoothing` must lie in [0, 1], got {label_smoothing}.")
    if direction not in ("both", "rows", "columns"):
        raise ValueError(f'`direction` must be "both", "rows" or "columns", got {direction!r}.')
    if grouped and masked:
        raise ValueError("`group_ids` and `mask_ids` cannot go together. Ignored groups can be one of the `mask_ids`.")
    if label_smoothing and (masked or (grouped and same_group == "ignore")):
        raise ValueError(
            f"`label_smoothing` ({label_smoothing}) gives every column a share of the target, so it cannot go with"
            ' `mask_ids` or `same_group="ignore"`. Use one of the two.'
        )
