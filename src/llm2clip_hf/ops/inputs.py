# SPDX-License-Identifier: Apache-2.0
"""What both contrastive losses do to their arguments: checks, ids of pairs, the dtype and the implementation."""

import importlib.util
import numbers
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


Implementation = Literal["auto", "triton", "torch"]
SameGroup = Literal["positive", "ignore"]
Direction = Literal["both", "rows", "columns"]
ComputeDtype = Literal["auto"] | torch.dtype | None

# Up to this many logits a single dense chunk has fewer launches than the tile kernels.
_DENSE_LOGITS = 2048 * 2048
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_MASKS = 4


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


def has_tensor_cores(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU that multiplies in 16 bits as the kernels need it."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


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
        return installed and has_tensor_cores(x.device)
    if not installed:
        raise ImportError(
            '`implementation="triton"` needs triton. Install it with `pip install llm2clip-hf[kernels]`.'
        )
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'`implementation="triton"` needs CUDA tensors, got {x.device}. Use `implementation="auto"`, or set'
            " `TRITON_INTERPRET=1` before the first use to run the kernels in Triton's interpreter."
        )
    if x.is_cuda and not has_tensor_cores(x.device):
        raise ValueError(
            f'`implementation="triton"` needs an NVIDIA GPU of compute capability 8.0 or newer, got {x.device} ('
            f'{"ROCm" if torch.version.hip else torch.cuda.get_device_capability(x.device)}). Use "torch".'
        )
    if x.dtype not in _TRITON_DTYPES:
        raise ValueError(f'`implementation="triton"` takes 16-bit and 32-bit floats, got {x.dtype}. Use "torch".')
    return True


def choose_compute(compute_dtype: ComputeDtype, x: Tensor) -> torch.dtype:
    """The dtype that features are rounded to for matrix products."""
    if compute_dtype is None:
        return x.dtype
    if compute_dtype == "auto":
        return torch.float16 if x.dtype == torch.float32 and has_tensor_cores(x.device) else x.dtype
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
