# SPDX-License-Identifier: Apache-2.0
r"""
What surrounds the Triton kernels: configurations, padding, launches, blocks of constant size, matrix products.

1. Forward: log-sum-exps of tiles, merged by one kernel in a fixed order, which also takes the pairs' logits.
2. Backward: for each square block, a kernel writes G = dL/ds to the workspace; two matrix products with fp32 results
   add it to dX and dY. Accumulators on the chip would not fit at the widths of CLIP, and atomics cost more.

The functions have the contract of those in `contrastive_torch`. Tiles multiply in 16 bits: fp32 features that are not
to be rounded enter as fp16 halves along D, (high, low, high) . (high, high, low), and their G stays in fp32.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import contrastive_triton as kernels
from .contrastive_torch import Lse, LseGrads, Pairs, add_product


# Side of the blocks of G: at most 160 MB in 16 bits, large enough for full matrix-product speed.
_BLOCK = 8960
# Partial log-sum-exps alive at a time: 64 MiB.
_PARTIALS = 1 << 24
# Rows per step of row products; bounds their fp32 temporaries.
_ROWS = 1 << 14
# Places of the outer dimension that sweep the inner one together, for the L2 cache: row tiles of a block of G; column
# blocks of the forward, where so 16 x 16 programs share 16 blocks of each operand.
GROUP, LSE_GROUP = 8, 16


class Config(NamedTuple):
    """Tile sides (rows of x, rows of y, features per step), warps and pipeline stages of a kernel; register limit."""

    bm: int
    bn: int
    bd: int
    warps: int
    stages: int
    registers: int | None = None


_FULL, _FLAT, _NARROW = Config(128, 128, 64, 8, 3), Config(64, 128, 64, 8, 3), Config(128, 64, 64, 8, 3)
# By kernel and GPU generation: 80 stands for all without wgmma or tcgen05. The first entry is the default, `tune` may
# choose another. Chosen by ahead-of-time compilation (registers, spills, shared memory), not by timing: on 90 two
# programs of the default share a processor. Ids take registers, so those kernels have smaller tiles.
CONFIGS: dict[tuple[str, int], tuple[Config, ...]] = {
    ("lse", 80): (_FULL, _FLAT),
    ("lse", 90): (_FULL._replace(registers=128), Config(64, 128, 64, 4, 3), _FULL._replace(stages=4, registers=128)),
    ("lse", 100): (_FULL, _FLAT),
    ("lse_ids", 80): (_FLAT,),
    ("lse_ids", 90): (_FLAT,),
    ("lse_ids", 100): (_FLAT,),
    ("grad", 80): (_FULL, _NARROW),
    ("grad", 90): (_FULL, Config(128, 256, 64, 8, 3), _NARROW),
    ("grad", 100): (_NARROW, _FULL),
    ("grad_ids", 80): (_NARROW,),
    ("grad_ids", 90): (_NARROW,),
    ("grad_ids", 100): (_NARROW,),
    ("sigmoid", 80): (_FULL, _NARROW),
    ("sigmoid", 90): (_NARROW, _FULL, Config(128, 64, 64, 4, 3)),
    ("sigmoid", 100): (_NARROW, _FULL),
    ("sigmoid_ids", 80): (_NARROW,),
    ("sigmoid_ids", 90): (_NARROW,),
    ("sigmoid_ids", 100): (_NARROW,),
}
_TUNED: dict[tuple[str, int, int, torch.dtype], Config] = {}


def architecture(device: torch.device) -> int:
    """Row of `CONFIGS` for this device: 80, 90 or 100."""
    if device.type != "cuda":  # the interpreter
        return 90
    major = torch.cuda.get_device_capability(device)[0]
    return {9: 90, 10: 100}.get(major, 80)


def exact_warps(config: Config, arch: int) -> int:
    """Warps of `_lse_exact_kernel`, which shares the tiles of `_lse_kernel` but keeps more in registers."""
    return 16 if arch == 100 and config.bm * config.bn == 128 * 128 else config.warps


def two_exponentials(config: Config) -> Config:
    """The tile where `lse_grad_kernel` needs two exponentials per logit: half as wide if the other fills a program."""
    return config._replace(bn=min(config.bn, 128))


def config_for(kernel: str, x: Tensor) -> Config:
    """The tuned configuration for these features if there is one, else the table's default."""
    arch = architecture(x.device)
    return _TUNED.get((kernel, arch, x.shape[1], x.dtype)) or CONFIGS[kernel, arch][0]


def remember(kernel: str, x: Tensor, config: Config) -> None:
    """Use `config` for features of this width and dtype from now on, in this process."""
    _TUNED[kernel, architecture(x.device), x.shape[1], x.dtype] = config


def operand(x: Tensor, compute: torch.dtype) -> Tensor:
    """`x` as it enters matrix products."""
    return x.to(compute)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _lift(x: Tensor, scale: Tensor) -> Tensor:
    """Power of two that brings the largest feature just below 32, so that its lower half is no subnormal fp16."""
    largest = torch.nan_to_num(x, 0.0, 0.0, 0.0).abs().amax().clamp_min(2.0**-40)
    # At most so large that logits of padding, -2^30 before they are scaled back, stay below -256.
    return torch.exp2(
        torch.minimum(5.0 - torch.ceil(torch.log2(largest)), torch.floor(11.0 + 0.5 * torch.log2(scale)))
    )


def pack(x: Tensor, y: Tensor, scale: Tensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Operands of whole tiles in 16 bits, see `_pack_kernel`, and their scale; returned as they are if they fit."""
    (n, d), m = x.shape, y.shape[0]
    # A tensor descriptor needs rows of whole 16 bytes; pointers read whole steps of features.
    align = 8 if architecture(x.device) >= 90 else config.bd
    split = x.dtype == torch.float32
    aligned = x.data_ptr() % 16 == 0 and y.data_ptr() % 16 == 0
    if not split and n % config.bm == 0 and m % config.bn == 0 and d % align == 0 and aligned:
        return x, y, scale
    lifts = (_lift(x, scale), _lift(y, scale)) if split else (scale, scale)
    parts = 3 if split else 1
    width = _round_up(parts * d + 2, align)
    packed = []
    for second, (side, tile, lift) in enumerate(((x, config.bm, lifts[0]), (y, config.bn, lifts[1]))):
        padded = _round_up(len(side), tile)
        out = side.new_empty((padded, width), dtype=torch.float16 if split else side.dtype)
        with _on_device(x):
            kernels.pack_kernel[(-(-padded // 32), -(-width // 128))](
                side, out, lift, len(side), padded, d, width, PARTS=parts, SECOND=bool(second),
                BIG=2.0**15 if out.dtype == torch.float16 else 2.0**40, BM=32, BD=128,
            )  # fmt: skip
        packed.append(out)
    return packed[0], packed[1], scale / (lifts[0] * lifts[1]) if split else scale


class _Sides(NamedTuple):
    """Sizes of a block and its rule: pairs (0), also equal ids (1), pairs, with other equal ids hidden (2)."""

    n: int
    m: int
    row_offset: int
    rule: int
    row_ids: Tensor | None
    col_ids: Tensor | None


def _sides(rows: slice, cols: slice, pairs: Pairs) -> _Sides:
    row_ids = None if pairs.row_ids is None else pairs.row_ids[rows].contiguous()
    col_ids = None if pairs.col_ids is None else pairs.col_ids[cols].contiguous()
    rule = 0 if pairs.row_ids is None else 1 if pairs.grouped else 2
    offset = pairs.row_offset + rows.start - cols.start
    return _Sides(rows.stop - rows.start, cols.stop - cols.start, offset, rule, row_ids, col_ids)


def _spans(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _padded(span: slice, multiple: int) -> slice:
    return slice(span.start, span.start + _round_up(span.stop - span.start, multiple))


def _tile_operands(config: Config, *tensors: Tensor | None) -> list[Any]:
    """x, y and G as tensor descriptors, or as they are for pointers."""
    blocks = ([config.bm, config.bd], [config.bn, config.bd], [config.bm, config.bn])
    first = tensors[0]
    if first is None or architecture(first.device) < 90:
        return list(tensors)
    return [None if each is None else kernels.describe(each, block) for each, block in zip(tensors, blocks)]


def _options(config: Config, x: Tensor, sides: _Sides, group: int) -> dict[str, Any]:
    return {
        "PAIRS": sides.rule,
        "K": 1 if sides.row_ids is None else sides.row_ids.shape[1],
        "GROUP": group,
        "BM": config.bm,
        "BN": config.bn,
        "BD": config.bd,
        "DESC": architecture(x.device) >= 90,
        "UP": kernels.interpreted() and x.dtype == torch.bfloat16,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "maxnreg": config.registers,
    }


def lse_pair(x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, direction: str = "both") -> Lse:
    """The vectors of `Lse`; those of a direction that is not asked for are empty."""
    n, m = len(x), len(y)
    config = config_for("lse_ids" if pairs.row_ids is not None and pairs.ignore else "lse", x)
    wide_x, wide_y, wide_scale = pack(x, y, scale, config)
    sides = {"ROWS": direction != "columns", "COLS": direction != "rows"}
    row_lse, col_lse = scale.new_empty(n * sides["ROWS"]), scale.new_empty(m * sides["COLS"])
    pair = scale.new_empty(n)
    blocks = -(-m // config.bn)
    step = max(16 * config.bm, _PARTIALS // blocks // config.bm * config.bm)
    for rows in _spans(n, step):
        size = rows.stop - rows.start
        row_part, col_part = _launch_lse(
            wide_x[_padded(rows, config.bm)], wide_y, wide_scale, _sides(rows, slice(0, m), pairs), config, sides
        )
        with _on_device(x):
            kernels.merge_kernel[(-(-size // 64) + (-(-m // 64) if sides["COLS"] else 0),)](
                x[rows], y, scale, row_part, col_part, row_lse[rows] if sides["ROWS"] else row_lse, col_lse,
                pair[rows], size, m, x.shape[1], pairs.row_offset + rows.start, blocks, len(col_part),
                **sides, MORE=rows.start > 0, P=16, B=64, BD=64, num_warps=4,
            )  # fmt: skip
    row_pos, col_pos = scale.new_empty(0), scale.new_empty(0)
    if pairs.grouped and pairs.row_ids is not None and pairs.col_ids is not None:
        row_pos = _group_products(x, y, pairs.row_ids, pairs.col_ids) * scale
        col_pos = _group_products(y, x, pairs.col_ids, pairs.row_ids) * scale
    return Lse(row_lse, col_lse, pair, row_pos, col_pos)


def _launch_lse(
    x: Tensor, y: Tensor, scale: Tensor, sides: _Sides, config: Config, directions: dict[str, bool]
) -> tuple[Tensor, Tensor]:
    """Parts of log-sum-exps: by column block (blocks, n); by group of row tiles, and of the pairs' tiles (.., M)."""
    blocks, row_tiles = -(-sides.m // config.bn), -(-sides.n // config.bm)
    # Long walks save column reductions, short ones fill the device.
    tiles = max(1, min(16, row_tiles * blocks // (4 * _processors(x)), row_tiles))
    groups = -(-row_tiles // tiles)
    row_part = scale.new_empty((blocks, sides.n * directions["ROWS"]))
    col_part = scale.new_empty((groups + 1, sides.m * directions["COLS"]))
    flags = torch.empty((groups, blocks), dtype=torch.int32, device=x.device)
    arguments = (
        *_tile_operands(config, x, y), scale, sides.row_ids, sides.col_ids, row_part, col_part, flags, sides.n,
        sides.m, x.shape[1], sides.row_offset, tiles, groups,
    )  # fmt: skip
    arch = architecture(x.device)
    options = _options(config, x, sides, LSE_GROUP) | directions
    # Adding rows of one thread first crashes the compiler for 100 and gains nothing on 80.
    options |= {"PRESUM": arch == 90, "PAIRS": sides.rule if sides.rule == 2 else 0}
    with _on_device(x):
        kernels.lse_kernel[(blocks * groups,)](*arguments, **options)
        options |= {"num_warps": exact_warps(config, arch), "maxnreg": None}
        kernels.lse_exact_kernel[(blocks * (groups + 1),)](*arguments, **options)
    return row_part, col_part


def _row_products(x: Tensor, y: Tensor, index: Callable[[slice], Tensor]) -> Tensor:
    """Inner product of each row of `x` with the row of `y` that `index` gives for a span of rows, in fp32."""
    return torch.cat([(x[span].float() * y[index(span)].float()).sum(1) for span in _spans(len(x), _ROWS)])


def _group_products(x: Tensor, y: Tensor, row_ids: Tensor, col_ids: Tensor) -> Tensor:
    """Sum over j of equal id of x_i . y_j: the product of x_i with the sum of its group, without the matrix."""
    ids, among = row_ids.flatten(), col_ids.flatten()
    ordered = among.sort().values
    label, beyond = torch.searchsorted(ordered, ids), torch.searchsorted(ordered, ids, right=True)
    sums = y.new_zeros(y.shape, dtype=torch.float32)
    # `index_put_` with accumulate sorts its indices, so unlike `index_add_` it is deterministic.
    sums.index_put_((torch.searchsorted(ordered, among),), y.float(), accumulate=True)
    index = label.clamp(max=len(y) - 1)
    return torch.where(beyond > label, _row_products(x, sums, lambda span: index[span]), 0.0)


def _block_side(x: Tensor) -> int:
    """Side of the blocks of G: the largest whose products, in tiles of 128 x 256, fill whole waves of processors."""
    if not x.is_cuda:
        return _BLOCK
    wide, processors = -(-x.shape[1] // 256), _processors(x)
    waves = max(1, _BLOCK // 128 * wide // processors)
    return min(_BLOCK, max(1, waves * processors // wide) * 128)


def _add_products(
    x: Tensor, y: Tensor, config: Config, need_x: bool, need_y: bool, fill: Callable[[slice, slice, Tensor], None]
) -> tuple[Tensor, Tensor]:
    """G @ y and G.T @ x, as needed, block by block; `fill` writes G of some rows and columns to the workspace."""
    n, m, side = len(x), len(y), _block_side(x)
    # The interpreter truncates when it stores bf16, so there G stays in fp32.
    dtype = torch.float32 if kernels.interpreted() and x.dtype == torch.bfloat16 else x.dtype
    g = x.new_empty((_round_up(min(n, side), config.bm), _round_up(min(m, side), config.bn)), dtype=dtype)
    dx, dy = (z.new_empty(z.shape if need else (0,), dtype=torch.float32) for z, need in ((x, need_x), (y, need_y)))
    for rows in _spans(n, side):
        for cols in _spans(m, side):
            fill(rows, cols, g)
            block = g[: rows.stop - rows.start, : cols.stop - cols.start]
            if need_x:
                add_product(dx[rows], block, y[cols], first=cols.start == 0)
            if need_y:
                add_product(dy[cols], block.t(), x[rows], first=rows.start == 0)
    return dx, dy


def lse_pair_backward(
    x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, grads: LseGrads, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and `y` in fp32; an empty tensor for one that is not needed."""
    n, m = len(x), len(y)
    config = config_for("grad" if pairs.row_ids is None else "grad_ids", x)
    wide_x, wide_y, wide_scale = pack(x, y, scale, config)
    sides = {"ROWS": len(grads.row) > 0, "COLS": len(grads.col) > 0}
    row_vectors = scale.new_empty((4, _round_up(n, config.bm)))
    col_vectors = scale.new_empty((3, _round_up(m, config.bn)))
    scalars = scale.new_empty(3)
    rule = 0 if pairs.row_ids is None else 1 if pairs.grouped else 2
    with _on_device(x):
        kernels.prepare_kernel[(1,)](
            grads.row, grads.row_lse, grads.col, grads.col_lse, grads.pair, grads.row_pos, grads.col_pos, scale,
            row_vectors, col_vectors, scalars, n, m, row_vectors.shape[1], col_vectors.shape[1], **sides, PAIRS=rule,
            HALF=x.dtype == torch.float16, B=1024, num_warps=8,
        )  # fmt: skip

    def fill(rows: slice, cols: slice, g: Tensor) -> None:
        tall, wide = _padded(rows, config.bm), _padded(cols, config.bn)
        block = _sides(rows, cols, pairs)
        for one in (True, False) if all(sides.values()) else (False,):
            tile = config if one else two_exponentials(config)
            operands = _tile_operands(tile, wide_x[tall], wide_y[wide], g)
            grid = ((tall.stop - tall.start) // tile.bm * ((wide.stop - wide.start) // tile.bn),)
            with _on_device(x):
                kernels.lse_grad_kernel[grid](
                    *operands, wide_scale, scalars, block.row_ids, block.col_ids, row_vectors[:, rows.start :],
                    col_vectors[:, cols.start :], block.n, block.m, wide_x.shape[1], block.row_offset, g.shape[1],
                    row_vectors.shape[1], col_vectors.shape[1], ONE=one, **sides,
                    **_options(tile, wide_x, block, GROUP),
                )  # fmt: skip

    dx, dy = _add_products(x, y, config, need_x, need_y, fill)
    torch._foreach_mul_([each for each, need in ((dx, need_x), (dy, need_y)) if need], scalars[2])
    return dx, dy


def _headroom(weights: Tensor, dtype: torch.dtype) -> Tensor | float:
    """Power of two that brings the sigmoid's G in fp16 just below the largest number, as `_prepare_kernel` does."""
    if dtype != torch.float16:
        return 1.0
    largest = weights.abs().amax().clamp_min(1e-35)
    return torch.exp2(torch.floor(torch.log2(4096.0 / largest)).clamp(-100.0, 100.0))


def sigmoid_sum(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, weights: Tensor, pairs: Pairs, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row sums of the pairwise log-sigmoid loss, and dx, dy (empty when not needed), d bias of their weighted sum."""
    config = config_for("sigmoid" if pairs.row_ids is None else "sigmoid_ids", x)
    wide_x, wide_y, wide_scale = pack(x, y, scale, config)
    loss, dbias = scale.new_zeros(len(x)), scale.new_zeros(())
    lift = _headroom(weights, x.dtype)
    lifted = weights * lift

    def fill(rows: slice, cols: slice, g: Tensor | None) -> None:
        block = _sides(rows, cols, pairs)
        tall, wide = _padded(rows, config.bm), _padded(cols, config.bn)
        blocks = (wide.stop - wide.start) // config.bn
        grid = ((tall.stop - tall.start) // config.bm * blocks,)
        row_part, bias_part = scale.new_empty((blocks, block.n)), scale.new_empty(grid if g is not None else (0,))
        with _on_device(x):
            kernels.sigmoid_kernel[grid](
                *_tile_operands(config, wide_x[tall], wide_y[wide], g), wide_scale, bias, block.row_ids, block.col_ids,
                lifted[rows], row_part, bias_part, block.n, block.m, wide_x.shape[1], block.row_offset,
                0 if g is None else g.shape[1], GRAD=g is not None, **_options(config, wide_x, block, GROUP),
            )  # fmt: skip
        loss[rows] += row_part.sum(0)
        dbias.add_(bias_part.sum())

    if not (need_x or need_y):
        for rows in _spans(len(x), _block_side(x)):
            for cols in _spans(len(y), _block_side(x)):
                fill(rows, cols, None)
        return loss, scale.new_empty(0), scale.new_empty(0), dbias
    dx, dy = _add_products(x, y, config, need_x, need_y, fill)
    factor = scale / lift
    return loss, dx.mul_(factor), dy.mul_(factor), dbias / lift


def tune(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, timer: Callable[[Callable[[], object]], float]
) -> dict[str, Config]:
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
        for config in CONFIGS[kernel, architecture(x.device)]:
            remember(kernel, x, config)
            times[config] = timer(call)
        chosen[kernel] = min(times, key=times.__getitem__)
        remember(kernel, x, chosen[kernel])
    return chosen
