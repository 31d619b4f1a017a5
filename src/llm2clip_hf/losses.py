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

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import distributed
from .ops import contrastive_loss, operators, sigmoid_loss
from .ops.contrastive import cross_entropy, soft_target, weighted_sigmoid_sum
from .ops.inputs import (
    Batch,
    ComputeDtype,
    Direction,
    Implementation,
    PairIds,
    SameGroup,
    as_scalar,
    check_features,
    check_group_ids,
    check_mask_ids,
    check_options,
    choose_compute,
    choose_triton,
    dense_ids,
    dense_masks,
    needs_backward,
    prepare,
    refuse_forward_mode,
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
        direction (`str`, *optional*, defaults to `"both"`):
            `"rows"`: images pick their texts; `"columns"`: texts pick their images; `"both"`: the mean; softmax only.
        compute_dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`):
            What features are rounded to for matrix products, and for their way to other processes: `"auto"` makes
            float32 features float16 on CUDA devices with tensor cores, None keeps their dtype; as in
            `contrastive_loss`. Autocast has no influence.
        process_group (*optional*):
            `torch.distributed` group over which to gather; the default group when None.

    Inputs:
        image_embeds, text_embeds (`torch.Tensor` of shape `(n, D)`): this rank's pairs, usually L2-normalized.
        logit_scale (`torch.Tensor` of shape `()` or `(1,)`, or `float`): positive multiplier, not its logarithm.
        logit_bias (`torch.Tensor` of shape `()` or `(1,)`, or `float`, *optional*): only for `"sigmoid"`, and needed
            there.
        group_ids (`torch.Tensor` of shape `(n,)`, *optional*): integer id of each pair, comparable across ranks;
            either every rank passes it or none.
        weights (`torch.Tensor` of shape `(n,)`, *optional*): weight of each pair; the mean becomes the weighted mean.
        mask_ids (pair of `torch.Tensor` of shapes `(n, K)` and `(n + h, K)`, *optional*): ids of images and of texts
            with hard negatives; those that agree in any of the K are no negatives of one another, see
            `contrastive_loss`.
        hard_negatives (`torch.Tensor` of shape `(h, D)`, *optional*): further texts, negatives of all images.
        sizes (`list[int]`, *optional*): number of pairs of every rank, if known. Saves the exchange that otherwise
            makes sure that the ranks fit; with hard negatives, each rank must then have equally many per pair.

    Returns:
        `torch.Tensor` of shape `()`, float32 (float64 for float64 embeddings), in nats.

    Raises:
        ValueError: for unknown options, unpaired embeddings, or a `logit_bias` that is missing or not used; on every
            rank, if the ranks differ in options, in dtype or width of tensors, in having an optional one, or in
            whether a gradient is asked for.
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
        direction: Direction = "both",
        compute_dtype: ComputeDtype = "auto",
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if loss_type not in ("softmax", "sigmoid"):
            raise ValueError(f'`loss_type` must be "softmax" or "sigmoid", got {loss_type!r}.')
        if implementation not in ("auto", "triton", "torch"):
            raise ValueError(f'`implementation` must be "auto", "triton" or "torch", got {implementation!r}.')
        check_options("mean", label_smoothing, same_group, False, False, direction)
        choose_compute(compute_dtype, torch.empty(0))  # refuses what is no dtype
        if ring and not gather_across_devices:
            raise ValueError("`ring=True` has no effect with `gather_across_devices=False`. Drop one of the two.")
        if label_smoothing and loss_type == "sigmoid":
            raise ValueError(
                f"`label_smoothing` ({label_smoothing}) has no effect on the sigmoid loss. Leave it out, or use "
                '`loss_type="softmax"`.'
            )
        if direction != "both" and loss_type == "sigmoid":
            raise ValueError(f"`direction` ({direction!r}) has no effect on the sigmoid loss. Leave it out.")
        self.loss_type = loss_type
        self.gather_across_devices = gather_across_devices
        self.implementation: Implementation = implementation
        self.ring = ring
        self.same_group: SameGroup = same_group
        self.label_smoothing = label_smoothing
        self.direction: Direction = direction
        self.compute_dtype: ComputeDtype = compute_dtype
        self.process_group = process_group

    def extra_repr(self) -> str:
        return f"{self.loss_type}, gather_across_devices={self.gather_across_devices}, ring={self.ring}"

    def forward(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        group_ids: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        mask_ids: Sequence[Tensor] | None = None,
        hard_negatives: Tensor | None = None,
        sizes: list[int] | None = None,
    ) -> Tensor:
        if (logit_bias is None) == (self.loss_type == "sigmoid"):
            raise ValueError(
                "`logit_bias` is needed by the sigmoid loss. Give the model one with `logit_bias_init_value`."
                if logit_bias is None
                else '`logit_bias` has no effect on the softmax loss. Pass None, or use `loss_type="sigmoid"`.'
            )
        check_features(image_embeds, text_embeds)
        pairs = len(image_embeds)
        if len(text_embeds) != pairs:
            raise ValueError(
                f"Images ({pairs}) and texts ({len(text_embeds)}) must pair one to one. Check the collator, or drop"
                " rows without a caption; further texts are `hard_negatives`."
            )
        if hard_negatives is not None:
            if group_ids is not None:
                raise ValueError("`group_ids` name pairs, `hard_negatives` have none. Use `mask_ids` instead.")
            check_features(text_embeds, hard_negatives, ("text_embeds", "hard_negatives"))
            text_embeds = torch.cat([text_embeds, hard_negatives])
        alone = not self.gather_across_devices or distributed.world_size(self.process_group) == 1
        if sizes is not None and len(sizes) != (1 if alone else distributed.world_size(self.process_group)):
            raise ValueError(f"`sizes` must hold one number per process, got {sizes}.")
        if not alone:
            with torch.autocast(device_type=image_embeds.device.type, enabled=False):
                given = (group_ids, weights, mask_ids, sizes)
                return self._across_ranks(image_embeds, text_embeds, logit_scale, logit_bias, *given)
        options: dict[str, Any] = {
            "weights": weights,
            "group_ids": group_ids,
            "same_group": self.same_group,
            "mask_ids": mask_ids,
            "compute_dtype": self.compute_dtype,
            "implementation": self.implementation,
        }
        if logit_bias is not None:
            return sigmoid_loss(image_embeds, text_embeds, logit_scale, logit_bias, **options)
        options |= {"label_smoothing": self.label_smoothing, "direction": self.direction}
        return contrastive_loss(image_embeds, text_embeds, logit_scale, **options)

    def _across_ranks(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        group_ids: Tensor | None,
        weights: Tensor | None,
        mask_ids: Sequence[Tensor] | None,
        sizes: list[int] | None,
    ) -> Tensor:
        masked = mask_ids is not None
        check_options("mean", self.label_smoothing, self.same_group, group_ids is not None, masked, self.direction)
        batch = prepare(
            image_embeds, text_embeds, logit_scale, weights=weights, compute_dtype=self.compute_dtype,
            implementation=self.implementation,
        )  # fmt: skip
        x, y, scale, group = batch.x, batch.y, batch.scale, self.process_group
        if group_ids is not None:
            mask_ids = check_group_ids(group_ids, len(x), x.device)
        elif mask_ids is not None:
            mask_ids = check_mask_ids(mask_ids, len(x), len(y), x.device)
        bias = None if logit_bias is None else as_scalar(logit_bias, "logit_bias", x, scale.dtype)
        refuse_forward_mode(logit_bias)
        layout = self._layout(batch, mask_ids, masked, bias, sizes)
        if batch.weights is None:
            weights = torch.full_like(x[:, 0], len(layout.sizes) / sum(layout.sizes), dtype=scale.dtype)
        else:
            total = distributed.all_reduce_sum(batch.weights.sum(), group)
            weights = batch.weights * (len(layout.sizes) / total)
        if bias is not None:
            if self.ring:
                row_losses: Tensor = _RingSigmoid.apply(x, y, scale, bias, layout)
                return (row_losses * weights).sum()
            y_all = distributed.all_gather(y.to(scale.dtype), group, layout.columns, transfer_dtype=batch.compute)
            return weighted_sigmoid_sum(x, y_all, scale, bias, weights, (*layout.pairs, False))
        if self.ring:
            row_lse, col_lse, pair, row_pos, col_pos = _RingLsePair.apply(x, y, scale, layout)
        else:
            y_all = distributed.all_gather(y.to(scale.dtype), group, layout.columns, transfer_dtype=batch.compute)
            row_lse, col_lse, pair, row_pos, col_pos, _ = operators.lse_pair(
                x, y_all, scale, *layout.pairs, self.direction, layout.keep, False
            )
        return (self._losses(x, y, scale, row_lse, col_lse, pair, row_pos, col_pos, layout) * weights).sum()

    def _layout(
        self,
        batch: Batch,
        ids: Sequence[Tensor] | None,
        masked: bool,
        bias: Tensor | None,
        sizes: list[int] | None,
    ) -> "_Layout":
        """What all ranks need to know of one another, in one exchange unless `sizes` are given; the ids of all."""
        x, y, group = batch.x, batch.y, self.process_group
        grad = torch.is_grad_enabled()
        scalars = [batch.scale] if bias is None else [batch.scale, bias]
        if sizes is None:
            found = distributed.all_gather_sizes(
                (len(x), len(y)),
                x.device,
                group,
                alike={
                    "image_embeds and text_embeds": x,
                    "group_ids": None if masked or ids is None else ids[0],
                    "mask_ids": ids[0] if masked and ids is not None else None,
                    "weights": batch.weights,
                    "requires_grad": grad and any(each.requires_grad for each in (x, y, *scalars)),
                    "requires_grad of the texts": grad and y.requires_grad,
                    "loss_type": self.loss_type,
                    "direction": self.direction,
                    "same_group": self.same_group,
                    "label_smoothing": self.label_smoothing,
                    "ring": self.ring,
                    "compute_dtype": batch.compute,
                },
            )
            sizes, columns = [each[0] for each in found], [each[1] for each in found]
        else:
            columns = [size * len(y) // len(x) for size in sizes]
        position = distributed.rank(group)
        if sizes[position] != len(x) or columns[position] != len(y):
            raise ValueError(
                f"`sizes` gives process {position} {sizes[position]} pairs and {columns[position]} texts with hard"
                f" negatives, but it has {len(x)} and {len(y)}. Give every process the numbers of all."
            )
        start = sum(columns[:position])
        pair_ids = PairIds()
        if ids is not None:
            rows, cols = ids[0], distributed.all_gather(ids[1], group, columns)
            if masked:
                pair_ids = dense_masks(rows, cols)
            else:
                dense = dense_ids(cols)
                pair_ids = PairIds(dense[start : start + len(x)], dense, self.same_group == "ignore")
        largest = max(columns) if self.ring else sum(columns)
        use_triton = choose_triton(self.implementation, x, len(x) * largest)
        keep = needs_backward(x, y, batch.scale)
        return _Layout(pair_ids, start, batch.compute, use_triton, sizes, columns, group, self.direction, keep)

    def _losses(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        row_lse: Tensor,
        col_lse: Tensor,
        pair: Tensor,
        row_pos: Tensor,
        col_pos: Tensor,
        layout: "_Layout",
    ) -> Tensor:
        """Losses of this rank's pairs, from log-sum-exps over all columns and over this rank's rows."""
        group, smoothing = self.process_group, self.label_smoothing
        n, own = len(x), slice(layout.row_offset, layout.row_offset + len(x))
        wide_x, wide_y = x.to(scale.dtype), y.to(scale.dtype)
        counts = layout.ids.counts(layout.ids.col_ids)
        sides, targets, mean = [], [], None
        if self.direction != "columns":
            if smoothing:
                mean = scale * (wide_x @ (distributed.all_reduce_sum(wide_y.sum(0), group) / sum(layout.columns)))
            sides.append(row_lse)
            targets.append(soft_target(pair, row_pos, counts, mean, smoothing))
        if self.direction != "rows":
            if smoothing:
                mean = scale * (wide_y[:n] @ (distributed.all_reduce_sum(wide_x.sum(0), group) / sum(layout.sizes)))
            if counts is not None:
                col_pos = distributed.all_reduce_sum(col_pos, group)[own]
            sides.append(distributed.merge_log_sum_exp(col_lse, group)[own])
            targets.append(soft_target(pair, col_pos, counts, mean, smoothing))
        return cross_entropy(sides, pair, targets).mean(0)


class _Layout(NamedTuple):
    """Which columns belong to which rank, and how this rank's rows meet all or some of them."""

    ids: PairIds
    row_offset: int
    compute: torch.dtype
    use_triton: bool
    sizes: list[int]
    columns: list[int]
    group: Any
    direction: str
    keep: bool

    @property
    def pairs(self) -> tuple[Any, ...]:
        """Arguments of the operators for all columns at once."""
        ids = self.ids
        return ids.row_ids, ids.col_ids, self.row_offset, ids.ignore, self.compute, self.use_triton

    def blocks(self, y: Tensor) -> Iterator[tuple[Tensor, slice, tuple[Any, ...]]]:
        """Each rank's texts in turn, starting with this rank's: the block, its columns, arguments for the block."""
        count, position = len(self.columns), distributed.rank(self.group)
        block = y.new_zeros((max(self.columns), y.shape[1]), dtype=self.compute)
        block[: len(y)] = y
        for step in range(count):
            owner = (position - step) % count
            # The transfer of the next block runs behind the arithmetic on this one.
            received = distributed.ring_shift(block, self.group) if step + 1 < count else None
            start = sum(self.columns[:owner])
            columns = slice(start, start + self.columns[owner])
            col_ids = None if self.ids.col_ids is None else self.ids.col_ids[columns]
            part = self._replace(ids=self.ids._replace(col_ids=col_ids), row_offset=self.row_offset - start)
            yield block[: self.columns[owner]], columns, part.pairs
            if received is not None:
                block = received()


class _TravellingSum:
    """The gradient of a travelling block: each rank adds its part, then hands it on, until the owner has it back."""

    def __init__(self, y: Tensor, layout: _Layout, dtype: torch.dtype) -> None:
        self.layout = layout
        self.own_rows = len(y)
        self.total = y.new_zeros((max(layout.columns), y.shape[1]), dtype=dtype)

    def add(self, part: Tensor) -> None:
        self.total[: len(part)] += part
        self.total = distributed.ring_shift(self.total, self.layout.group)()

    def result(self) -> Tensor:
        return self.total[: self.own_rows]


class _RingLsePair(torch.autograd.Function):
    """`lse_pair` of this rank's images and all ranks' texts, which pass by; columns in rank order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, layout: _Layout) -> tuple[Tensor, ...]:
        n, total = len(x), sum(layout.columns)
        grouped = layout.ids.grouped
        row_lse = scale.new_full((n if layout.direction != "columns" else 0,), -torch.inf)
        col_lse = scale.new_empty((total if layout.direction != "rows" else 0,))
        pair = scale.new_zeros((n,))
        row_pos, col_pos = (scale.new_zeros((size if grouped else 0,)) for size in (n, total))
        for block, columns, arguments in layout.blocks(y):
            rows, col_lse[columns], pair_part, row_part, col_pos[columns], _ = operators.lse_pair(
                x, block, scale, *arguments, layout.direction, False, False
            )
            row_lse = torch.logaddexp(row_lse, rows)
            pair += pair_part
            row_pos += row_part
        ctx.layout = layout
        ctx.save_for_backward(x, y, scale, row_lse, col_lse)
        return row_lse, col_lse, pair, row_pos, col_pos

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, row_lse, col_lse = ctx.saved_tensors
        grad_row, grad_col, grad_pair, grad_row_pos, grad_col_pos = grads
        dx, dscale = torch.zeros_like(x, dtype=scale.dtype), torch.zeros_like(scale)
        dy = _TravellingSum(y, ctx.layout, scale.dtype)
        nothing = scale.new_empty((0, 0))
        for block, columns, arguments in ctx.layout.blocks(y):
            cols = (grad_row, grad_col[columns], grad_pair, grad_row_pos, grad_col_pos[columns])
            dx_part, dy_part, dscale_part = operators.lse_pair_backward(
                *cols, row_lse, col_lse[columns], nothing, x, block, scale, *arguments, True, True
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
            losses += operators.sigmoid_rows(x, block, scale, bias, *arguments, False)
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
            _, _, dx_part, dy_part, dscale_part, dbias_part = operators.sigmoid_sum(
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
