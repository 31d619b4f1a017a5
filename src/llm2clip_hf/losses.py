# SPDX-License-Identifier: Apache-2.0
r"""
The contrastive loss of stage 2 over the batch of all processes.

1. Texts travel, images stay: a rank computes its images against all texts, either gathered at once or block by block
   around a ring.
2. The log-sum-exp of a text over all images needs all ranks: two all-reduces of N floats merge the partial ones.
3. Each rank returns the part of its own pairs, so scaled that the mean over ranks is the loss of the full batch. DDP
   and FSDP take that mean of the gradients, so towers, `logit_scale` and `logit_bias` get the full batch's gradient.

Legend: `n` pairs of this rank, `N` pairs of all ranks, `W` ranks, `D` embedding width.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import distributed
from .ops import contrastive_loss, sigmoid_loss
from .ops import operators as registration
from .ops.contrastive import (
    Implementation,
    SameGroup,
    check_options,
    choose_triton,
    count_equal,
    dense_ids,
    prepare,
    refuse_forward_mode,
    weighted_sigmoid_sum,
)


__all__ = ["ClipLoss", "ContrastiveLoss", "SigLipLoss"]


class ContrastiveLoss(nn.Module):
    r"""
    Softmax (CLIP) or sigmoid (SigLIP) contrastive loss over the batches of all processes, without the logits matrix.

    With one process it equals `llm2clip_hf.ops.contrastive_loss(image_embeds, text_embeds, logit_scale)` or
    `sigmoid_loss(image_embeds, text_embeds, logit_scale, logit_bias)`. With several, the mean of the returned values
    over ranks equals that of the concatenated batch, and so do the gradients under DDP's mean, also when the ranks
    hold different numbers of pairs. A wrapper that sums gradients over ranks must divide by their number.

    Args:
        loss_type (`str`, *optional*, defaults to `"softmax"`):
            `"softmax"`: mean of the two directions' mean cross-entropies (paper section 3.2). `"sigmoid"`: sum over
            all pairs divided by the number of rows; needs `logit_bias`.
        gather_across_devices (`bool`, *optional*, defaults to `True`):
            Use the pairs of all ranks as negatives. Without it each rank has its own batch only.
        implementation (`str`, *optional*, defaults to `"auto"`):
            `"triton"`, `"torch"`, or `"auto"`: triton for large problems on CUDA, torch elsewhere.
        ring (`bool`, *optional*, defaults to `False`):
            Pass the texts around a ring instead of gathering them: O(n D) memory per rank instead of O(N D).
        same_group (`str`, *optional*, defaults to `"positive"`):
            What `group_ids` mean: `"positive"` or `"ignore"`, as in `contrastive_loss`.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Share of the target that is spread over all columns, in [0, 1], as in `contrastive_loss`; softmax only.
        process_group (*optional*):
            `torch.distributed` group over which to gather; the default group when None.

    Inputs:
        image_embeds, text_embeds (`torch.Tensor` of shape `(n, D)`): this rank's pairs, usually L2-normalized.
        logit_scale (`torch.Tensor` of shape `()` or `(1,)`): positive multiplier, not its logarithm.
        logit_bias (`torch.Tensor` of shape `()` or `(1,)`, *optional*): only for `"sigmoid"`, and needed there.
        group_ids (`torch.Tensor` of shape `(n,)`, *optional*): integer id of each pair, comparable across ranks;
            either every rank passes it or none.

    Returns:
        `torch.Tensor` of shape `()`, float32 (float64 for float64 embeddings), in nats.

    Raises:
        ValueError: for unknown options, unpaired embeddings, or a `logit_bias` that is missing or not used; on every
            rank, if the ranks differ in the dtype or width of embeddings or in having `group_ids`.
        NotImplementedError: in forward-mode differentiation.

    Example:

    >>> loss = ContrastiveLoss()
    >>> embeds = torch.eye(3)
    >>> round(loss(embeds, embeds, torch.tensor(2.0)).item(), 4)
    0.2395
    """

    def __init__(
        self,
        loss_type: Literal["softmax", "sigmoid"] = "softmax",
        gather_across_devices: bool = True,
        implementation: Implementation = "auto",
        *,
        ring: bool = False,
        same_group: SameGroup = "positive",
        label_smoothing: float = 0.0,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if loss_type not in ("softmax", "sigmoid"):
            raise ValueError(f'`loss_type` must be "softmax" or "sigmoid", got {loss_type!r}.')
        if implementation not in ("auto", "triton", "torch"):
            raise ValueError(f'`implementation` must be "auto", "triton" or "torch", got {implementation!r}.')
        if same_group not in ("positive", "ignore"):
            raise ValueError(f'`same_group` must be "positive" or "ignore", got {same_group!r}.')
        if ring and not gather_across_devices:
            raise ValueError("`ring=True` has no effect with `gather_across_devices=False`. Drop one of the two.")
        if label_smoothing and loss_type == "sigmoid":
            raise ValueError(
                f"`label_smoothing` ({label_smoothing}) has no effect on the sigmoid loss. Leave it out, or use "
                '`loss_type="softmax"`.'
            )
        self.loss_type = loss_type
        self.gather_across_devices = gather_across_devices
        self.implementation: Implementation = implementation
        self.ring = ring
        self.same_group: SameGroup = same_group
        self.label_smoothing = label_smoothing
        self.process_group = process_group

    def extra_repr(self) -> str:
        return f"{self.loss_type}, gather_across_devices={self.gather_across_devices}, ring={self.ring}"

    def forward(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        if (logit_bias is None) == (self.loss_type == "sigmoid"):
            raise ValueError(
                "`logit_bias` is needed by the sigmoid loss. Give the model one with `logit_bias_init_value`."
                if logit_bias is None
                else '`logit_bias` has no effect on the softmax loss. Pass None, or use `loss_type="sigmoid"`.'
            )
        if image_embeds.shape[:1] != text_embeds.shape[:1]:
            raise ValueError(
                f"Images ({image_embeds.shape[0]}) and texts ({text_embeds.shape[0]}) must pair one to one."
                " Check the collator, or drop rows without a caption."
            )
        if not self.gather_across_devices or distributed.world_size(self.process_group) == 1:
            groups = {"group_ids": group_ids, "same_group": self.same_group, "implementation": self.implementation}
            if logit_bias is None:
                return contrastive_loss(
                    image_embeds,
                    text_embeds,
                    logit_scale,
                    label_smoothing=self.label_smoothing,
                    **groups,  # type: ignore[arg-type]
                )
            return sigmoid_loss(image_embeds, text_embeds, logit_scale, logit_bias, **groups)  # type: ignore[arg-type]
        with torch.autocast(device_type=image_embeds.device.type, enabled=False):
            return self._across_ranks(image_embeds, text_embeds, logit_scale, logit_bias, group_ids)

    def _across_ranks(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        group_ids: Tensor | None,
    ) -> Tensor:
        check_options("mean", self.label_smoothing, self.same_group, group_ids)
        batch = prepare(
            image_embeds, text_embeds, logit_scale, group_ids=group_ids, implementation=self.implementation
        )
        x, y, scale, group = batch.x, batch.y, batch.scale, self.process_group
        alike = {"image_embeds and text_embeds": x, "group_ids": group_ids}
        sizes = distributed.all_gather_sizes(len(x), x.device, group, alike=alike)
        position, count, total = distributed.rank(group), len(sizes), sum(sizes)
        start = sum(sizes[:position])
        own = slice(start, start + len(x))
        use_triton = choose_triton(self.implementation, x, len(x) * (max(sizes) if self.ring else total))
        ids = None if group_ids is None else dense_ids(distributed.all_gather(group_ids, group, sizes))
        row_ids = None if ids is None else ids[own]
        layout = _Layout(row_ids, ids, start, self.same_group == "ignore", use_triton, sizes, group)
        y_all = None if self.ring else distributed.all_gather(y, group, sizes)
        if logit_bias is not None:
            refuse_forward_mode(logit_bias)
            bias = logit_bias.reshape(()).to(scale.dtype)
            if y_all is None:
                row_losses: Tensor = _RingSigmoid.apply(x, y, scale, bias, layout)
                return row_losses.sum() * (count / total)
            weights = torch.full((len(x),), count / total, dtype=scale.dtype, device=x.device)
            return weighted_sigmoid_sum(x, y_all, scale, bias, weights, (*layout.pairs, False))
        if y_all is None:
            row_lse, col_lse, row_pos, col_pos = _RingLsePair.apply(x, y, scale, layout)
        else:
            row_lse, col_lse, row_pos, col_pos = registration.lse_pair(x, y_all, scale, *layout.pairs, False)
        col_lse = distributed.merge_log_sum_exp(col_lse, group)[own]
        if ids is not None and row_ids is not None and not layout.ignore:
            counts = count_equal(row_ids, ids)
            row_pos = row_pos / counts
            col_pos = distributed.all_reduce_sum(col_pos, group)[own] / counts
        else:
            col_pos = col_pos[own]
        if self.label_smoothing:
            wide_x, wide_y = x.to(scale.dtype), y.to(scale.dtype)
            row_mean = scale * (wide_x @ (distributed.all_reduce_sum(wide_y.sum(0), group) / total))
            col_mean = scale * (wide_y @ (distributed.all_reduce_sum(wide_x.sum(0), group) / total))
            row_pos = torch.lerp(row_pos, row_mean, self.label_smoothing)
            col_pos = torch.lerp(col_pos, col_mean, self.label_smoothing)
        return 0.5 * ((row_lse - row_pos).sum() + (col_lse - col_pos).sum()) * (count / total)


class _Layout:
    """Which columns belong to which rank, and the pair rule of this rank's rows against all or some of them."""

    def __init__(
        self,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        row_offset: int,
        ignore: bool,
        use_triton: bool,
        sizes: list[int],
        group: Any,
    ) -> None:
        self.row_ids, self.col_ids, self.row_offset = row_ids, col_ids, row_offset
        self.ignore, self.use_triton, self.sizes, self.group = ignore, use_triton, sizes, group

    @property
    def pairs(self) -> tuple[Tensor | None, Tensor | None, int, bool, bool]:
        """Arguments of the primitives for all columns at once."""
        return self.row_ids, self.col_ids, self.row_offset, self.ignore, self.use_triton

    def blocks(
        self, y: Tensor
    ) -> Iterator[tuple[Tensor, slice, tuple[Tensor | None, Tensor | None, int, bool, bool]]]:
        """Each rank's texts in turn, starting with this rank's: the block, its columns, arguments for the block."""
        count, position = len(self.sizes), distributed.rank(self.group)
        block = y.new_zeros((max(self.sizes), y.shape[1]))
        block[: len(y)] = y
        for step in range(count):
            owner = (position - step) % count
            # The transfer of the next block runs behind the arithmetic on this one.
            received = distributed.ring_shift(block, self.group) if step + 1 < count else None
            start = sum(self.sizes[:owner])
            columns = slice(start, start + self.sizes[owner])
            col_ids = None if self.col_ids is None else self.col_ids[columns]
            arguments = (self.row_ids, col_ids, self.row_offset - start, self.ignore, self.use_triton)
            yield block[: self.sizes[owner]], columns, arguments
            if received is not None:
                block = received()


class _TravellingSum:
    """The gradient of a travelling block: each rank adds its part, then hands it on, until the owner has it back."""

    def __init__(self, y: Tensor, layout: _Layout, dtype: torch.dtype) -> None:
        self.layout = layout
        self.own_rows = len(y)
        self.total = y.new_zeros((max(layout.sizes), y.shape[1]), dtype=dtype)

    def add(self, part: Tensor) -> None:
        self.total[: len(part)] += part
        self.total = distributed.ring_shift(self.total, self.layout.group)()

    def result(self) -> Tensor:
        return self.total[: self.own_rows]


class _RingLsePair(torch.autograd.Function):
    """`lse_pair` of this rank's images and all ranks' texts, which pass by; columns in rank order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, layout: _Layout) -> tuple[Tensor, ...]:
        row_lse = x.new_full((len(x),), -torch.inf, dtype=scale.dtype)
        row_pos = torch.zeros_like(row_lse)
        col_lse = x.new_empty((sum(layout.sizes),), dtype=scale.dtype)
        col_pos = torch.empty_like(col_lse)
        for block, columns, arguments in layout.blocks(y):
            rows, col_lse[columns], positives, col_pos[columns] = registration.lse_pair(
                x, block, scale, *arguments, False
            )
            row_lse = torch.logaddexp(row_lse, rows)
            row_pos += positives
        ctx.layout = layout
        ctx.save_for_backward(x, y, scale, row_lse, col_lse)
        return row_lse, col_lse, row_pos, col_pos

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, row_lse, col_lse = ctx.saved_tensors
        grad_row, grad_col, grad_row_pos, grad_col_pos = grads
        dx, dscale = torch.zeros_like(x, dtype=scale.dtype), torch.zeros_like(scale)
        dy = _TravellingSum(y, ctx.layout, scale.dtype)
        for block, columns, arguments in ctx.layout.blocks(y):
            dx_part, dy_part, dscale_part = registration.lse_pair_backward(
                grad_row,
                grad_col[columns],
                grad_row_pos,
                grad_col_pos[columns],
                row_lse,
                col_lse[columns],
                x,
                block,
                scale,
                *arguments,
                True,
                True,
            )
            dx += dx_part
            dscale += dscale_part
            dy.add(dy_part)
        return dx.to(x.dtype), dy.result().to(y.dtype), dscale, None


class _RingSigmoid(torch.autograd.Function):
    """`sigmoid_rows` of this rank's images and all ranks' texts, which pass by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, layout: _Layout) -> Tensor:
        losses = x.new_zeros((len(x),), dtype=scale.dtype)
        for block, _, arguments in layout.blocks(y):
            losses += registration.sigmoid_rows(x, block, scale, bias, *arguments, False)
        ctx.layout = layout
        ctx.save_for_backward(x, y, scale, bias)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, bias = ctx.saved_tensors
        dx = torch.zeros_like(x, dtype=scale.dtype)
        dscale, dbias = torch.zeros_like(scale), torch.zeros_like(bias)
        dy = _TravellingSum(y, ctx.layout, scale.dtype)
        for block, _, arguments in ctx.layout.blocks(y):
            _, _, dx_part, dy_part, dscale_part, dbias_part = registration.sigmoid_sum(
                x, block, scale, bias, grads[0].contiguous(), *arguments, False, True, True
            )
            dx += dx_part
            dscale += dscale_part
            dbias += dbias_part
            dy.add(dy_part)
        return dx.to(x.dtype), dy.result().to(y.dtype), dscale, dbias, None


# ----------------------------------------------------------------------------------------------- open_clip's own names


class ClipLoss(nn.Module):
    r"""
    `ContrastiveLoss("softmax")` with the constructor and the call of open_clip's `ClipLoss`.

    Loss and gradients are those of open_clip's with `gather_with_grad=True`, also where processes hold different
    numbers of pairs.

    Args:
        local_loss (`bool`, *optional*, defaults to `False`):
            Return this process's part of the loss, whose mean over processes is the loss, and not the loss itself.
            Gradients under DDP are the same.
        gather_with_grad (`bool`, *optional*, defaults to `False`):
            Must be `True` for `world_size > 1`: the gradient is that of the full batch.
        cache_labels (`bool`, *optional*, defaults to `False`): Without effect; there are no labels to keep.
        rank, world_size (`int`, *optional*, default to 0 and 1):
            Those of the default process group; with `world_size=1` nothing is exchanged.
        use_horovod (`bool`, *optional*, defaults to `False`): Must be `False`.

    Inputs:
        image_features, text_features (`torch.Tensor` of shape `(n, D)`): this process's pairs, L2-normalized.
        logit_scale (`torch.Tensor` of shape `()` or `(1,)`): positive multiplier, not its logarithm.
        logit_bias (`torch.Tensor`, *optional*): cancels in the softmax; its gradient is 0.
        output_dict (`bool`, *optional*, defaults to `False`): Return `{"contrastive_loss": loss}`.

    Raises:
        ValueError: for options that cannot be honoured, or a process group of another size.

    Example:

    >>> embeds = torch.eye(3)
    >>> loss = ClipLoss()(embeds, embeds, torch.tensor(2.0), output_dict=True)
    >>> {name: round(value.item(), 4) for name, value in loss.items()}
    {'contrastive_loss': 0.2395}
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("`use_horovod=True` is not supported. Use `torch.distributed`, and leave it out.")
        if world_size > 1 and not gather_with_grad:
            raise ValueError(
                f"`gather_with_grad=False` with `world_size={world_size}` leaves out the gradient that the other"
                " processes' losses give this one's features, which this loss always has. Set it to `True`."
            )
        self.local_loss, self.rank, self.world_size = local_loss, rank, world_size
        self.loss = ContrastiveLoss("softmax", gather_across_devices=world_size > 1)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        _check_group(self.rank, self.world_size)
        loss = self.loss(image_features, text_features, logit_scale)
        if self.world_size > 1 and not self.local_loss:
            part = loss.detach()
            loss = loss + (distributed.all_reduce_sum(part) / self.world_size - part)
        if logit_bias is not None:
            loss = loss + 0.0 * logit_bias.sum()  # a parameter without a gradient would stop DDP
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    r"""
    `ContrastiveLoss("sigmoid")` with the constructor and the call of open_clip's `SigLipLoss`.

    Args:
        cache_labels (`bool`, *optional*, defaults to `False`): Without effect; there are no labels to keep.
        rank, world_size (`int`, *optional*, default to 0 and 1):
            Those of the default process group; with `world_size=1` nothing is exchanged.
        dist_impl (`str`, *optional*, defaults to `"bidir"`):
            `"bidir"` and `"shift"` pass the texts around a ring, `"gather"` and `"reduce"` gather them.

    Inputs:
        image_features, text_features, logit_scale, output_dict: as of `ClipLoss`.
        logit_bias (`torch.Tensor` of shape `()` or `(1,)`): added to every logit.

    Returns:
        The sum over this process's images and all texts divided by the number of these images, in nats.

    Raises:
        ValueError: for an unknown `dist_impl`, or a process group of another size.

    Example:

    >>> embeds = torch.eye(4)
    >>> round(SigLipLoss()(embeds, embeds, torch.tensor(10.0), torch.tensor(-5.0)).item(), 4)
    0.0269
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "gather", "reduce"):
            raise ValueError(f'`dist_impl` must be "bidir", "shift", "gather" or "reduce", got {dist_impl!r}.')
        self.rank, self.world_size = rank, world_size
        ring = world_size > 1 and dist_impl not in ("gather", "reduce")
        self.loss = ContrastiveLoss("sigmoid", gather_across_devices=world_size > 1, ring=ring)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        _check_group(self.rank, self.world_size)
        loss = self.loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


def _check_group(rank: int, world_size: int) -> None:
    """Refuse numbers that are not those of the default process group; one process alone may be part of any."""
    found = distributed.rank(), distributed.world_size()
    if world_size > 1 and (rank, world_size) != found:
        raise ValueError(
            f"`rank` and `world_size` are {rank} and {world_size}, but this is process {found[0]} of {found[1]}. Pass"
            " those of the default process group."
        )
