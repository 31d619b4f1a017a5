# SPDX-License-Identifier: Apache-2.0
"""Process groups as the rest of the package sees them: rank and size at call time, collectives that carry gradients.

Everything works without `torch.distributed` being initialised and then behaves as one process. `group=None` means the
default group.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


__all__ = [
    "all_gather",
    "all_gather_sizes",
    "all_reduce_sum",
    "is_initialized",
    "merge_log_sum_exp",
    "rank",
    "ring_shift",
    "world_size",
]

Group = Any  # dist.ProcessGroup | None; not every build of torch has the class


def is_initialized() -> bool:
    """Whether a default process group exists at this moment."""
    return dist.is_available() and dist.is_initialized()


def rank(group: Group = None) -> int:
    """Rank of this process in `group`; 0 without a process group."""
    return int(dist.get_rank(group)) if is_initialized() else 0


def world_size(group: Group = None) -> int:
    """Number of processes in `group`; 1 without a process group."""
    return int(dist.get_world_size(group)) if is_initialized() else 1


def _gather_into(output: Tensor, tensor: Tensor, group: Group) -> None:
    # torch 2.13 renames the collective and warns about the old name. Remove when 2.13 is the oldest supported torch.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(output, tensor, group=group)


def _reduce_scatter_into(output: Tensor, tensor: Tensor, group: Group) -> None:
    # As above: `reduce_scatter_single` from torch 2.13 on.
    collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    collective(output, tensor, group=group)


# Equal on all ranks, which run one torch.
_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


def all_gather_sizes(
    size: Any, device: torch.device, group: Group = None, *, alike: Mapping[str, Any] | None = None
) -> list[Any]:
    """
    `size` of every rank of `group`, in rank order, in one exchange. Waits for the device.

    Args:
        size (`int` or `tuple[int, ...]`): Numbers of this rank; every rank passes equally many.
        device (`torch.device`): Where the exchange takes place.
        group (*optional*): Process group; the default group when None.
        alike (mapping from `str`, *optional*):
            Tensors by name whose dtype and trailing sizes must be those of all ranks, `None` where a rank has none;
            and options (`bool`, `int`, `float`, `str` or `torch.dtype`), which must be equal on all ranks.

    Returns:
        `list`: the sizes, each `int` or `tuple` as given.

    Raises:
        ValueError: on every rank, if the ranks differ in an entry of `alike`; other bytes would be taken for numbers.
    """
    count = world_size(group)
    if count == 1:
        return [size]
    alike = alike or {}
    numbers = size if isinstance(size, tuple) else (size,)
    own = [*numbers, *(number for value in alike.values() for number in _layout(value))]
    gathered = torch.empty(count * len(own), dtype=torch.int64, device=device)
    _gather_into(gathered, torch.tensor(own, dtype=torch.int64, device=device), group)
    table = gathered.view(count, -1).tolist()
    for number, name in enumerate(alike):
        first = len(numbers) + 2 * number
        kinds = [tuple(row[first : first + 2]) for row in table]
        other = next((position for position, kind in enumerate(kinds) if kind != kinds[0]), None)
        if other is not None:
            mine, theirs = (_layout_text(*kinds[position]) for position in (0, other))
            raise ValueError(
                f"`{name}` must be alike on all processes, but process 0 has {mine} and process {other} has {theirs}."
                " Give every process the same."
            )
    return [tuple(row[: len(numbers)]) if isinstance(size, tuple) else row[0] for row in table]


def _layout(value: Any) -> tuple[int, int]:
    """Two numbers that tell values apart: dtype and elements per row of a tensor, or a negative kind and an option."""
    if value is None:
        return -1, 0
    if isinstance(value, Tensor):
        return _DTYPES.index(value.dtype), value.shape[1:].numel()
    if isinstance(value, torch.dtype):
        return -2, _DTYPES.index(value)
    if isinstance(value, float):
        return -3, int.from_bytes(struct.pack(">d", value), "big", signed=True)
    if isinstance(value, str):
        return -4, int.from_bytes(value.encode("ascii")[:8], "big")
    return (-5 if isinstance(value, bool) else -6), value


def _layout_text(kind: int, number: int) -> str:
    if kind >= 0:
        return f"{_DTYPES[kind]} of width {number}"
    if kind == -2:
        return str(_DTYPES[number])
    if kind == -3:
        return str(struct.unpack(">d", number.to_bytes(8, "big", signed=True))[0])
    if kind == -4:
        return repr(number.to_bytes(8, "big").lstrip(b"\0").decode())
    return "none" if kind == -1 else str(bool(number) if kind == -5 else number)


class _AllGather(torch.autograd.Function):
    """Equal blocks of rows, concatenated in rank order; the gradient is summed over ranks and scattered back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, transfer_dtype: torch.dtype | None) -> Tensor:
        ctx.group = group
        sent = tensor.to(transfer_dtype or tensor.dtype).contiguous()
        output = sent.new_empty((world_size(group) * tensor.shape[0], *tensor.shape[1:]))
        _gather_into(output, sent, group)
        return output.to(tensor.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0]
        # Partial gradients of many ranks are added in fp32: each sum in 16 bits would round once more per rank.
        wide = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
        output = wide.new_empty((grad.shape[0] // world_size(ctx.group), *grad.shape[1:]))
        _reduce_scatter_into(output, wide.contiguous(), ctx.group)
        return output.to(grad.dtype), None, None


def all_gather(
    tensor: Tensor,
    group: Group = None,
    sizes: list[int] | None = None,
    *,
    transfer_dtype: torch.dtype | None = None,
) -> Tensor:
    """
    Concatenate the rows of all ranks, in rank order, with gradient.

    The gradient of a rank's rows is the sum over ranks of the gradients of its block, so that the mean over ranks
    which DDP takes of the parameter gradients is the gradient of the mean of the ranks' losses.

    Args:
        tensor (`torch.Tensor` of shape `(n, ...)`):
            Rows of this rank; every rank calls with the same dtype and trailing shape.
        group (*optional*):
            Process group; the default group when None.
        sizes (`list[int]`, *optional*):
            Number of rows of each rank if known, e.g. from `all_gather_sizes`; otherwise asked for. Ranks may differ.
        transfer_dtype (`torch.dtype`, *optional*):
            Dtype in which rows travel; result and gradient keep that of `tensor`.

    Returns:
        `torch.Tensor` of shape `(sum of sizes, ...)`; `tensor` itself when there is one process.

    Raises:
        ValueError: on every rank, if the ranks differ in dtype or width and `sizes` is not given.

    Example:

    >>> all_gather(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """
    if world_size(group) == 1:
        return tensor
    if sizes is None:
        sizes = all_gather_sizes(tensor.shape[0], tensor.device, group, alike={"tensor": tensor})
    longest = max(sizes)
    if tensor.shape[0] < longest:
        padding = tensor.new_zeros((longest - tensor.shape[0], *tensor.shape[1:]))
        tensor = torch.cat([tensor, padding])
    gathered: Tensor = _AllGather.apply(tensor, group, transfer_dtype)
    if min(sizes) == longest:
        return gathered
    return torch.cat([block[:size] for block, size in zip(gathered.split(longest), sizes)])


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        output = tensor.clone()
        dist.all_reduce(output, group=group)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def all_reduce_sum(tensor: Tensor, group: Group = None) -> Tensor:
    """Sum over ranks, with gradient (the sum over ranks of their gradients). One process: `tensor` itself."""
    if world_size(group) == 1:
        return tensor
    result: Tensor = _AllReduceSum.apply(tensor, group)
    return result


class _MergeLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Group) -> Tensor:
        top = partial.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        # -inf everywhere stays -inf; the shift must be finite for it.
        shift = top.masked_fill(torch.isneginf(top), 0.0)
        total = (partial - shift).exp()
        dist.all_reduce(total, group=group)
        merged = shift + total.log()
        ctx.group = group
        ctx.save_for_backward(partial, merged)
        return merged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        partial, merged = ctx.saved_tensors
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad * (partial - merged).exp().nan_to_num(0.0), None


def merge_log_sum_exp(partial: Tensor, group: Group = None) -> Tensor:
    """Elementwise log of the sum over ranks of `exp(partial)`, with gradient. One process: `partial` itself."""
    if world_size(group) == 1:
        return partial
    result: Tensor = _MergeLogSumExp.apply(partial, group)
    return result


def ring_shift(tensor: Tensor, group: Group = None) -> Callable[[], Tensor]:
    """
    Start sending `tensor` to the next rank of `group` and receiving the previous rank's, without gradient.

    Args:
        tensor (`torch.Tensor`):
            Same shape and dtype on every rank; must not change until the transfer is complete.
        group (*optional*):
            Process group; the default group when None.

    Returns:
        A function that waits for the transfer and returns the received tensor.
    """
    count, position = world_size(group), rank(group)
    if count == 1:
        return lambda: tensor
    scope: Any = dist.group.WORLD if group is None else group
    following = dist.get_global_rank(scope, (position + 1) % count)
    preceding = dist.get_global_rank(scope, (position - 1) % count)
    tensor = tensor.contiguous()
    received = torch.empty_like(tensor)
    transfers = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, tensor, following, group),
            dist.P2POp(dist.irecv, received, preceding, group),
        ]
    )

    def wait() -> Tensor:
        for transfer in transfers:
            transfer.wait()
        return received

    return wait
