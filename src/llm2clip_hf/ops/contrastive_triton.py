# SPDX-License-Identifier: Apache-2.0
r"""
Triton kernels of the contrastive losses, their configurations and launches; the only file that imports triton.

Softmax, forward: `_lse_kernel` visits each tile of logits once. One scalar per program, the largest logit so far, is
the reference of a single exponential per logit, which serves the tile's rows and columns alike. Row sums leave with
every tile; column sums stay in registers, elementwise, while the program walks down its rows. Where a sum shows that
the common reference was too large, the program sets a flag and `_lse_exact_kernel` repeats it with separate maxima.

Softmax, backward: `_lse_grad_kernel` recomputes the logits of a block and writes their gradient G to a workspace.

Sigmoid: `_sigmoid_kernel` computes row losses and, when asked, G of a block in the same visit.

No atomics, and every sum has a fixed order: results are bitwise reproducible. Operands come padded, so that no tile
needs a mask at the edge: `contrastive_blocks.pad_operands` makes logits beyond the edge so negative that their
exponential is 0. Hopper and newer read and write tiles through tensor descriptors, older GPUs through pointers.

Legend: `x` (n, D) images, `y` (M, D) texts, `s = scale * x @ y.T` logits (log2 units in the kernels), `G = dL/ds`.
"""

# mypy: disable-error-code="no-untyped-def"

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# A sum below this, relative to the common reference, has lost digits to underflow.
_MIN_SUM = tl.constexpr(2.0**-60)
# Below this z, exp(z) < 0.01 and three terms of the series give log(1 + exp(z)), which rounding would lose.
_SMALL_Z = tl.constexpr(-4.6)
# Batch sizes change from call to call; one compiled kernel serves them all.
_SIZES = ["n", "M", "row_offset"]


@triton.jit
def _dot_tile(
    x, y, row, col, D, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr, DESC: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """x[row : row + BM] @ y[col : col + BN].T in fp32; operands are descriptors (DESC) or pointers to padded rows."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if DESC:
        for k in range(0, D, BD):
            a = x.load([row, k])
            b = y.load([col, k])
            if UP:  # the interpreter multiplies the bit patterns of bf16
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b.T, acc, input_precision=PREC)
    else:
        ks = tl.arange(0, BD)
        # 64-bit row offsets: n * D may pass 2**31.
        a_ptr = x + (row + tl.arange(0, BM)).to(tl.int64)[:, None] * D + ks[None, :]
        b_ptr = y + (col + tl.arange(0, BN)).to(tl.int64)[None, :] * D + ks[:, None]
        for _ in range(0, D, BD):
            a = tl.load(a_ptr)
            b = tl.load(b_ptr)
            if UP:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PREC)
            a_ptr += BD
            b_ptr += BD
    return acc


@triton.jit
def _store_tile(g, tile, row, col, stride, BM: tl.constexpr, BN: tl.constexpr, DESC: tl.constexpr):
    """Write a tile to the workspace, whose sides are multiples of the tile's."""
    if DESC:
        g.store([row, col], tile.to(g.dtype))
    else:
        out = g + (row + tl.arange(0, BM))[:, None] * stride + (col + tl.arange(0, BN))[None, :]
        tl.store(out, tile.to(g.dtype.element_ty))


@triton.jit
def _same_ids(row_ids, col_ids, rows, cols, n, M, K: tl.constexpr):
    """Whether any of the K ids of each row and column agree."""
    rid = tl.load(row_ids + rows * K, mask=rows < n, other=-1)
    cid = tl.load(col_ids + cols * K, mask=cols < M, other=-2)
    same = rid[:, None] == cid[None, :]
    for k in tl.static_range(1, K):
        rid = tl.load(row_ids + rows * K + k, mask=rows < n, other=-1)
        cid = tl.load(col_ids + cols * K + k, mask=cols < M, other=-2)
        same = same | (rid[:, None] == cid[None, :])
    return same


@triton.jit
def _hide(
    s, row_ids, col_ids, row, col, n, M, row_offset, PAIRS: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Set each row's pair and what is left out to -inf."""
    rows = row + tl.arange(0, BM)
    cols = col + tl.arange(0, BN)
    if PAIRS == 2:
        s = tl.where(_same_ids(row_ids, col_ids, rows, cols, n, M, K), float("-inf"), s)
    if (row + row_offset < col + BN) & (row + BM + row_offset > col):
        s = tl.where(cols[None, :] == rows[:, None] + row_offset, float("-inf"), s)
    return s


@triton.jit(do_not_specialize=_SIZES)
def _lse_kernel(
    x, y, scale_ptr, row_ids, col_ids, row_part, col_part, flags, n, M, D, row_offset,
    tiles, ROWS: tl.constexpr, COLS: tl.constexpr, PAIRS: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr, DESC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Program (c, g): columns of block c, `tiles` row tiles of group g.

    Writes row_part[c, i] and col_part[g, j], the natural log-sum-exp within the block and the group, and
    flags[g, c] = 1 where `_lse_exact_kernel` must do the work again.
    """
    block = tl.program_id(0)
    group = tl.program_id(1)
    col = block * BN
    cols = col + tl.arange(0, BN)
    scale = tl.load(scale_ptr) * _LOG2E
    reference = -1.0e30
    sums = tl.zeros((BM, BN), dtype=tl.float32)
    suspect = 0
    first = group * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(n, BM))):
        row = tile * BM
        rows = row + tl.arange(0, BM)
        acc = _dot_tile(x, y, row, col, D, BM, BN, BD, PREC, DESC, UP)
        acc = _hide(acc, row_ids, col_ids, row, col, n, M, row_offset, PAIRS, K, BM, BN)
        previous = reference
        reference = tl.maximum(previous, tl.max(acc) * scale)
        p = tl.exp2(acc * scale - reference)
        if COLS:
            sums = sums * tl.exp2(previous - reference) + p
        if ROWS:
            row_sum = tl.sum(p, axis=1)
            suspect = suspect | (tl.min(tl.where(rows < n, row_sum, 1.0)) < _MIN_SUM).to(tl.int32)
            out = row_part + block.to(tl.int64) * n + rows
            tl.store(out, (tl.log2(row_sum) + reference) * _LN2, mask=rows < n)
    if COLS:
        col_sum = tl.sum(sums, axis=0)
        suspect = suspect | (tl.min(tl.where(cols < M, col_sum, 1.0)) < _MIN_SUM).to(tl.int32)
        tl.store(col_part + group.to(tl.int64) * M + cols, (tl.log2(col_sum) + reference) * _LN2, mask=cols < M)
    tl.store(flags + group * tl.num_programs(0) + block, suspect)


@triton.jit(do_not_specialize=_SIZES)
def _lse_exact_kernel(
    x, y, scale_ptr, row_ids, col_ids, row_part, col_part, flags, n, M, D, row_offset,
    tiles, ROWS: tl.constexpr, COLS: tl.constexpr, PAIRS: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr, DESC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """As `_lse_kernel`, for flagged programs only, with a maximum of its own for every row and column."""
    block = tl.program_id(0)
    group = tl.program_id(1)
    if tl.load(flags + group * tl.num_programs(0) + block) == 0:
        return
    col = block * BN
    cols = col + tl.arange(0, BN)
    scale = tl.load(scale_ptr) * _LOG2E
    col_top = tl.full((BN,), -1.0e30, dtype=tl.float32)
    col_sum = tl.zeros((BN,), dtype=tl.float32)
    first = group * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(n, BM))):
        row = tile * BM
        rows = row + tl.arange(0, BM)
        s = _dot_tile(x, y, row, col, D, BM, BN, BD, PREC, DESC, UP) * scale
        s = _hide(s, row_ids, col_ids, row, col, n, M, row_offset, PAIRS, K, BM, BN)
        if ROWS:
            row_top = tl.maximum(tl.max(s, axis=1), -1.0e30)
            row_sum = tl.sum(tl.exp2(s - row_top[:, None]), axis=1)
            out = row_part + block.to(tl.int64) * n + rows
            tl.store(out, (tl.log2(row_sum) + row_top) * _LN2, mask=rows < n)
        if COLS:
            top = tl.maximum(col_top, tl.max(s, axis=0))
            col_sum = col_sum * tl.exp2(col_top - top) + tl.sum(tl.exp2(s - top[None, :]), axis=0)
            col_top = top
    if COLS:
        tl.store(col_part + group.to(tl.int64) * M + cols, (tl.log2(col_sum) + col_top) * _LN2, mask=cols < M)


@triton.jit
def _block_tile(n, M, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of this program's tile; GROUP row tiles sweep the columns together, for the L2 cache."""
    row_tiles = tl.cdiv(n, BM)
    per_group = GROUP * tl.cdiv(M, BN)
    first = tl.program_id(0) // per_group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = tl.program_id(0) % per_group
    return (first + within % size) * BM, within // size * BN


@triton.jit(do_not_specialize=_SIZES)
def _lse_grad_kernel(
    x, y, g, scale_ptr, row_ids, col_ids, grad_row, row_lse, row_pos, grad_col, col_lse, col_pos, pair,
    n, M, D, row_offset, stride, ROWS: tl.constexpr, COLS: tl.constexpr, PAIRS: tl.constexpr, K: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr,
    DESC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """One tile of G of the block x (n, D), y (M, D): the softmax terms and the positives, added up in fp32."""
    row, col = _block_tile(n, M, BM, BN, GROUP)
    rows = row + tl.arange(0, BM)
    cols = col + tl.arange(0, BN)
    scale = tl.load(scale_ptr) * _LOG2E
    s = _dot_tile(x, y, row, col, D, BM, BN, BD, PREC, DESC, UP) * scale
    tile = tl.zeros((BM, BN), dtype=tl.float32)
    if ROWS:
        gr = tl.load(grad_row + rows, mask=rows < n, other=0.0)
        r = tl.load(row_lse + rows, mask=rows < n, other=0.0) * _LOG2E
        tile += gr[:, None] * tl.exp2(s - r[:, None])
    if COLS:
        gc = tl.load(grad_col + cols, mask=cols < M, other=0.0)
        c = tl.load(col_lse + cols, mask=cols < M, other=0.0) * _LOG2E
        tile += gc[None, :] * tl.exp2(s - c[None, :])
    if PAIRS == 2:
        tile = tl.where(_same_ids(row_ids, col_ids, rows, cols, n, M, K), 0.0, tile)
    # The positive terms are folded in before G is rounded: kept apart, digits would cancel.
    if (row + row_offset < col + BN) & (row + BM + row_offset > col):
        gp = tl.load(pair + rows, mask=rows < n, other=0.0)
        tile = tl.where(cols[None, :] == rows[:, None] + row_offset, gp[:, None], tile)
    if PAIRS == 1:
        gp = tl.load(row_pos + rows, mask=rows < n, other=0.0)
        gq = tl.load(col_pos + cols, mask=cols < M, other=0.0)
        tile += tl.where(_same_ids(row_ids, col_ids, rows, cols, n, M, K), gp[:, None] + gq[None, :], 0.0)
    _store_tile(g, tile, row, col, stride, BM, BN, DESC)


@triton.jit
def _flip(tile, row_ids, col_ids, row, col, n, M, row_offset, PAIRS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Negate the entries of positive pairs."""
    rows = row + tl.arange(0, BM)
    cols = col + tl.arange(0, BN)
    if PAIRS == 1:
        tile = tl.where(_same_ids(row_ids, col_ids, rows, cols, n, M, 1), -tile, tile)
    else:
        if (row + row_offset < col + BN) & (row + BM + row_offset > col):
            # A padded column is nobody's pair.
            positive = (cols[None, :] == rows[:, None] + row_offset) & (cols < M)[None, :]
            tile = tl.where(positive, -tile, tile)
    return tile


@triton.jit(do_not_specialize=_SIZES)
def _sigmoid_kernel(
    x, y, g, scale_ptr, bias_ptr, row_ids, col_ids, weights, row_part, bias_part, n, M, D, row_offset, stride,
    GRAD: tl.constexpr, PAIRS: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr, DESC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """One tile of the block: row_part[c, i], the tile's row losses; with GRAD also G and its sum, bias_part[tile]."""
    row, col = _block_tile(n, M, BM, BN, GROUP)
    rows = row + tl.arange(0, BM)
    z = _dot_tile(x, y, row, col, D, BM, BN, BD, PREC, DESC, UP) * tl.load(scale_ptr) + tl.load(bias_ptr)
    # A positive pair costs softplus(-z), any other softplus(z): flip the sign here, and that of its G below.
    z = _flip(z, row_ids, col_ids, row, col, n, M, row_offset, PAIRS, BM, BN)
    if PAIRS == 2:
        cols = col + tl.arange(0, BN)
        hidden = _same_ids(row_ids, col_ids, rows, cols, n, M, K) & (cols[None, :] != rows[:, None] + row_offset)
        z = tl.where(hidden, float("-inf"), z)
    if tl.max(z) > _SMALL_Z:
        e = tl.exp2(-tl.abs(z) * _LOG2E)  # never overflows
        series = e * (1.0 - e * (0.5 - e * 0.33333334))
        loss = tl.sum(tl.where(e < 0.01, series, tl.log(1.0 + e)) + tl.maximum(z, 0.0), axis=1)
        tile = tl.where(z > 0.0, 1.0, e) / (1.0 + e)
    else:
        e = tl.exp2(z * _LOG2E)
        loss = tl.sum(e * (1.0 - e * (0.5 - e * 0.33333334)), axis=1)
        tile = e / (1.0 + e)
    tl.store(row_part + (col // BN).to(tl.int64) * n + rows, loss, mask=rows < n)
    if GRAD:
        tile = tile * tl.load(weights + rows, mask=rows < n, other=0.0)[:, None]
        tile = _flip(tile, row_ids, col_ids, row, col, n, M, row_offset, PAIRS, BM, BN)
        tl.store(bias_part + tl.program_id(0), tl.sum(tile))
        _store_tile(g, tile, row, col, stride, BM, BN, DESC)


class Config(NamedTuple):
    """Tile sides (rows of x, rows of y, features per step), warps and pipeline stages of a kernel."""

    bm: int
    bn: int
    bd: int
    warps: int
    stages: int


_KERNELS = ("lse", "lse_ids", "grad", "grad_ids", "sigmoid", "sigmoid_ids")
_HALF, _SINGLE = Config(128, 128, 64, 8, 3), Config(64, 128, 32, 8, 2)
# By kernel and GPU generation: 80 stands for all without wgmma or tcgen05. The first entry is the default, `tune` may
# choose another. Chosen by ahead-of-time compilation (registers, spills, shared memory), not by timing.
CONFIGS: dict[tuple[str, int, bool], tuple[Config, ...]] = {
    ("lse", 80, True): (_HALF,),
    ("lse", 90, True): (_HALF, Config(64, 128, 64, 4, 3)),
    ("lse", 100, True): (_HALF,),
    # Ids take registers; at 128 x 128 these kernels spill.
    ("lse_ids", 80, True): (Config(64, 128, 64, 8, 3),),
    ("lse_ids", 90, True): (Config(64, 128, 64, 8, 3),),
    ("lse_ids", 100, True): (Config(64, 128, 64, 8, 3),),
    ("grad", 80, True): (_HALF,),
    ("grad", 90, True): (_HALF,),
    ("grad", 100, True): (Config(128, 64, 64, 8, 3),),
    ("grad_ids", 80, True): (_HALF,),
    ("grad_ids", 90, True): (Config(128, 64, 64, 8, 3),),
    ("grad_ids", 100, True): (Config(128, 64, 64, 8, 3),),
    ("sigmoid", 80, True): (_HALF,),
    ("sigmoid", 90, True): (_HALF,),
    ("sigmoid", 100, True): (Config(128, 64, 64, 8, 3),),
    ("sigmoid_ids", 80, True): (_HALF,),
    ("sigmoid_ids", 90, True): (Config(128, 64, 64, 8, 3),),
    ("sigmoid_ids", 100, True): (Config(128, 64, 64, 8, 3),),
    **{(kernel, arch, False): (_SINGLE,) for kernel in _KERNELS for arch in (80, 90, 100)},
}
_TUNED: dict[tuple[str, int, int, torch.dtype], Config] = {}
GROUP = 8


def exact_warps(config: Config, arch: int) -> int:
    """Warps of `_lse_exact_kernel`, which shares the tiles of `_lse_kernel` but keeps more in registers."""
    return 16 if arch == 100 and config.bm * config.bn == 128 * 128 else config.warps


def architecture(device: torch.device) -> int:
    """Row of `CONFIGS` for this device: 80, 90 or 100."""
    if device.type != "cuda":  # the interpreter
        return 90
    major = torch.cuda.get_device_capability(device)[0]
    return {9: 90, 10: 100}.get(major, 80)


def config_for(kernel: str, x: Tensor) -> Config:
    """The tuned configuration for these features if there is one, else the table's default."""
    arch = architecture(x.device)
    return _TUNED.get((kernel, arch, x.shape[1], x.dtype)) or CONFIGS[kernel, arch, x.dtype.itemsize == 2][0]


def remember(kernel: str, x: Tensor, config: Config) -> None:
    """Use `config` for features of this width and dtype from now on, in this process."""
    _TUNED[kernel, architecture(x.device), x.shape[1], x.dtype] = config


def uses_descriptors(x: Tensor) -> bool:
    """Whether tiles move through tensor descriptors (TMA), rather than pointers."""
    return architecture(x.device) >= 90


def interpreted() -> bool:
    """Whether the kernels were decorated for the interpreter."""
    return not isinstance(_lse_kernel, triton.JITFunction)


def _operand(tensor: Tensor, block: list[int], descriptors: bool) -> Any:
    return TensorDescriptor.from_tensor(tensor, block) if descriptors else tensor


def _common(config: Config, x: Tensor, sides: "Sides", pairs: int) -> dict[str, Any]:
    return {
        "PAIRS": pairs,
        "K": 1 if sides.row_ids is None else sides.row_ids.shape[1],
        "BM": config.bm,
        "BN": config.bn,
        "BD": config.bd,
        # Three TF32 products recover fp32 accuracy on the tensor cores.
        "PREC": "tf32x3" if x.dtype == torch.float32 else "ieee",
        "DESC": uses_descriptors(x),
        "UP": interpreted() and x.dtype.itemsize == 2,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


class Sides(NamedTuple):
    """Sizes of a block and its rule: pairs (0), also equal ids (1), pairs, with other equal ids hidden (2)."""

    n: int
    m: int
    row_offset: int
    pairs: int
    row_ids: Tensor | None
    col_ids: Tensor | None


def launch_lse(
    x: Tensor, y: Tensor, scale: Tensor, sides: Sides, config: Config, direction: str
) -> tuple[Tensor, Tensor]:
    """Partial log-sum-exps of padded `x`, `y`: by column block (blocks, n) and by group of row tiles (groups, M)."""
    blocks, row_tiles = triton.cdiv(sides.m, config.bn), triton.cdiv(sides.n, config.bm)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    # Long walks save column reductions, short ones fill the device.
    tiles = max(1, min(16, row_tiles * blocks // (4 * processors), row_tiles))
    groups = triton.cdiv(row_tiles, tiles)
    row_part = scale.new_empty((blocks, sides.n))
    col_part = scale.new_empty((groups, sides.m))
    flags = torch.empty((groups, blocks), dtype=torch.int32, device=x.device)
    descriptors = uses_descriptors(x)
    arguments = (
        _operand(x, [config.bm, config.bd], descriptors),
        _operand(y, [config.bn, config.bd], descriptors),
        scale,
        sides.row_ids,
        sides.col_ids,
        row_part,
        col_part,
        flags,
        sides.n,
        sides.m,
        x.shape[1],
        sides.row_offset,
        tiles,
    )
    options = _common(config, x, sides, sides.pairs if sides.pairs == 2 else 0)
    options |= {"ROWS": direction != "columns", "COLS": direction != "rows"}
    with _on_device(x):
        _lse_kernel[(blocks, groups)](*arguments, **options)
        options["num_warps"] = exact_warps(config, architecture(x.device))
        _lse_exact_kernel[(blocks, groups)](*arguments, **options)
    return row_part, col_part


def launch_lse_grad(
    x: Tensor,
    y: Tensor,
    g: Tensor,
    scale: Tensor,
    rows: list[Tensor | None],
    cols: list[Tensor | None],
    pair: Tensor,
    sides: Sides,
    config: Config,
) -> None:
    """Write G of the padded block to `g`; rows, columns: gradient, log-sum-exp, gradient of the positives' sum."""
    descriptors = uses_descriptors(x)
    grid = (triton.cdiv(sides.n, config.bm) * triton.cdiv(sides.m, config.bn),)
    with _on_device(x):
        _lse_grad_kernel[grid](
            _operand(x, [config.bm, config.bd], descriptors),
            _operand(y, [config.bn, config.bd], descriptors),
            _operand(g, [config.bm, config.bn], descriptors),
            scale,
            sides.row_ids,
            sides.col_ids,
            *rows,
            *cols,
            pair,
            sides.n,
            sides.m,
            x.shape[1],
            sides.row_offset,
            g.shape[1],
            ROWS=rows[0] is not None,
            COLS=cols[0] is not None,
            GROUP=GROUP,
            **_common(config, x, sides, sides.pairs),
        )


def launch_sigmoid(
    x: Tensor,
    y: Tensor,
    g: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    weights: Tensor,
    sides: Sides,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """Row losses by column block (blocks, n); with a workspace `g` also G, and its sum by tile (tiles,)."""
    blocks = triton.cdiv(sides.m, config.bn)
    grid = (triton.cdiv(sides.n, config.bm) * blocks,)
    row_part = scale.new_empty((blocks, sides.n))
    bias_part = scale.new_zeros(grid)
    descriptors = uses_descriptors(x)
    with _on_device(x):
        _sigmoid_kernel[grid](
            _operand(x, [config.bm, config.bd], descriptors),
            _operand(y, [config.bn, config.bd], descriptors),
            None if g is None else _operand(g, [config.bm, config.bn], descriptors),
            scale,
            bias,
            sides.row_ids,
            sides.col_ids,
            weights,
            row_part,
            bias_part,
            sides.n,
            sides.m,
            x.shape[1],
            sides.row_offset,
            0 if g is None else g.shape[1],
            GRAD=g is not None,
            GROUP=GROUP,
            **_common(config, x, sides, sides.pairs),
        )
    return row_part, bias_part
