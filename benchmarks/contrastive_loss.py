# SPDX-License-Identifier: Apache-2.0
r"""
Accuracy, time and memory of contrastive losses, side by side in one run: forward and backward of random unit features.

    python benchmarks/contrastive_loss.py                                   # CPU: N = 4096, 16384, D = 512, fp32
    make gpu                                                                # everything below, on a CUDA machine

(1) Kernels: loss and gradients against fp64, beside the error of eager torch on the same features. (2) `tune`: the
tile configurations. (3) Losses, and (4) where a step of ours spends its time, kernel by kernel. (5) One training step
of each trainer.

Compared are plain PyTorch (`eager`), `torch.compile` of it (GPU), open_clip's `ClipLoss` and `SigLipLoss` (where
open_clip cannot be imported, `ClipLoss`'s computation in eager torch, under a label that says so), siglip-kernel and
Inf-CL where they can be imported, and ours. Methods take turns within every repetition, so that a busy machine slows
all of them; the median is reported. There the processor time of all threads is the steadier figure. Peak memory is
what a step needs beyond features and interpreter: on the CPU the growth of a fresh process's resident set, on a GPU
that of PyTorch's allocator. Effective TFLOP/s count 8 N^2 D (softmax) or 6 N^2 D (sigmoid), whatever a method
computes; the matmul rate is that of bf16 on a GPU, of fp32 on the CPU.

Writes `contrastive_loss.md`, `.json` and `.png` to `--output`. Ends with an error if (1) finds a wrong value.
"""

import argparse
import contextlib
import datetime
import gc
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from llm2clip_hf.ops import contrastive_loss, sigmoid_loss


Loss = Callable[..., Tensor]
FLOPS = {"softmax": 8, "sigmoid": 6}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Methods that hold all logits, at 16 bytes each, are skipped where those alone exceed the memory.
DENSE_BYTES = 16
# Relative error of gradients that a kernel may have beyond three times that of eager: rounding to 16 bits.
TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 4e-3}
# A kernel of ours, or a library's product, by a part of its name, the first that fits; what remains is `other`.
PARTS = ("grad", "exact", "sigmoid", "merge", "prepare", "pack", "lse")
PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "aten::mm", "aten::addmm")
GPU = {
    "sizes": [1 << bits for bits in (10, 12, 14, 16, 18, 20)],
    "widths": [768, 512, 1280],
    "dtypes": ["bf16", "fp32"],
    "check": [1024, 1024, 2048],
    "tune": 16384,
    "kernels": [16384],
    "trainers": [4096, 16384],
    "minutes": 7.5,
    "output": Path(__file__).parent,
}
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def eager_softmax(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, wrong: Tensor | None = None) -> Tensor:
    logits = (scale * x @ y.T).to(scale.dtype)
    logits = logits if wrong is None else logits.masked_fill(wrong, -torch.inf)
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def eager_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, wrong: Tensor | None = None) -> Tensor:
    logits = (scale * x @ y.T).to(scale.dtype) + bias
    sign = 2 * torch.eye(len(x), device=x.device) - 1
    losses = -F.logsigmoid(sign * logits)
    return (losses if wrong is None else losses.masked_fill(wrong, 0)).sum() / len(x)


EAGER: dict[str, Loss] = {"softmax": eager_softmax, "sigmoid": eager_sigmoid}


def two_products_softmax(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """What open_clip's `ClipLoss` computes on one process: a product for each direction."""
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(scale * x @ y.T, target) + F.cross_entropy(scale * y @ x.T, target)) / 2


def open_clip_methods() -> dict[str, tuple[str, Loss]]:
    """By kind of loss, a label and open_clip's implementation. Without it, the same computation if `eager` differs."""
    try:
        from open_clip.loss import ClipLoss, SigLipLoss
    except ImportError:
        return {"softmax": ("open_clip's computation in eager torch", two_products_softmax)}
    clip, siglip = ClipLoss(), SigLipLoss()
    return {
        "softmax": ("open_clip ClipLoss", lambda x, y, scale, bias: clip(x, y, scale)),
        "sigmoid": ("open_clip SigLipLoss", lambda x, y, scale, bias: siglip(x, y, scale, bias)),
    }


def other_kernels(kind: str) -> dict[str, Loss]:
    """Kernels of other projects, where they are installed."""
    found: dict[str, Loss] = {}
    if kind == "softmax" and CUDA:
        with contextlib.suppress(ImportError):
            from inf_cl.flash import _cal_flash_loss

            def inf_cl(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
                target = torch.arange(len(x), device=x.device)
                return (_cal_flash_loss(scale * x, y, target) + _cal_flash_loss(scale * y, x, target)).mean() / 2

            found["Inf-CL"] = inf_cl
    if kind == "sigmoid" and CUDA:
        with contextlib.suppress(ImportError):
            from siglip_kernel import fused_siglip_loss

            found["siglip-kernel"] = lambda x, y, scale, bias: fused_siglip_loss(x, y, scale.log(), bias)
    return found


def ours(kind: str, implementation: str, **options: Any) -> Loss:
    """One of our implementations, with the arguments of all methods."""
    options |= {"implementation": implementation}
    if kind == "softmax":
        return lambda x, y, scale, bias: contrastive_loss(x, y, scale, **options)
    return lambda x, y, scale, bias: sigmoid_loss(x, y, scale, bias, **options)


def implementations() -> tuple[str, ...]:
    """What runs here; the interpreter of Triton takes the place of a GPU where the environment asks for it."""
    return ("torch", "triton") if CUDA or os.environ.get("TRITON_INTERPRET") == "1" else ("torch",)


def methods(kind: str, compiled: bool = False, exact: bool = False) -> dict[str, Loss]:
    """Label and implementation of everything that can run here."""
    found = {"eager": EAGER[kind]}
    if compiled and CUDA:
        found["torch.compile"] = torch.compile(EAGER[kind], dynamic=False)
    if kind in open_clip_methods():
        label, loss = open_clip_methods()[kind]
        found[label] = loss
    found |= other_kernels(kind)
    found |= {f"ours ({each})": ours(kind, each) for each in implementations()}
    if exact:
        found["ours (fp32 products)"] = ours(kind, implementations()[-1], compute_dtype=None)
    return found


def features(n: int, d: int, dtype: torch.dtype, near: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit features, whose pairs have a cosine of about `near`, and the scale and bias of a trained model."""
    generator = torch.Generator(DEVICE).manual_seed(n + d)
    x, y = (F.normalize(torch.randn(n, d, device=DEVICE, generator=generator), dim=1) for _ in range(2))
    y = F.normalize(near * x + math.sqrt(1 - near**2) * y, dim=1)
    values = (100.0, -60.0) if near else (20.0, -10.0)
    scalars = (torch.tensor(value, device=DEVICE, requires_grad=True) for value in values)
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_(), *scalars  # type: ignore[return-value]


def step(loss: Loss, inputs: tuple[Tensor, ...]) -> None:
    loss(*inputs).backward()
    for tensor in inputs:
        tensor.grad = None


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------- (1) and (2): accuracy


def accuracy(sizes: list[int], widths: list[int], dtypes: list[str]) -> list[dict[str, Any]]:
    """Errors of loss and gradients against fp64 on the same rounded features, with those of eager torch."""
    rows = []
    cells = [(d, n + odd) for d in widths for n, odd in zip(sizes, (0, -1, -27))]
    for kind, (d, n), near, name, masked in itertools.product(FLOPS, cells, (0.0, 0.6), dtypes, (False, True)):
        inputs, number = features(n, d, DTYPES[name], near), torch.arange(n, device=DEVICE)
        ids = torch.stack([number // 3, number * 7 % (n // 2 + 1)], dim=1)
        wrong = (ids[:, None] == ids[None]).any(2).fill_diagonal_(False) if masked else None
        wide = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
        exact = with_gradients(EAGER[kind], (*wide, wrong))
        plain = errors(with_gradients(EAGER[kind], (*inputs, wrong)), exact)
        for each in implementations():
            loss = ours(kind, each, mask_ids=(ids, ids) if masked else None)
            value, gradient = errors(with_gradients(loss, inputs), exact)
            right = gradient <= 3 * plain[1] + TOLERANCE[name] and value <= 3 * plain[0] + 1e-3
            case = {"loss": kind, "D": d, "N": n, "features": name, "cosine of pairs": near, "masked": masked}
            figures = {"loss error": value, "of eager": plain[0], "gradient error": gradient, "eager's": plain[1]}
            rows.append(case | {"method": f"ours ({each})"} | figures | {"right": right})
    return rows


def with_gradients(loss: Loss, inputs: tuple[Any, ...]) -> list[Tensor]:
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs[:2])]


def errors(found: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Relative error of the loss (of its absolute value where that is below 1), and of the worse gradient's norm."""
    gaps = [float((one.double() - other).norm() / other.norm()) for one, other in zip(found[1:], exact[1:])]
    return abs(float(found[0] - exact[0])) / max(1.0, abs(float(exact[0]))), max(gaps)


def tuned(n: int, widths: list[int], dtypes: list[str]) -> list[dict[str, Any]]:
    """The fastest tile configuration of each kernel, used from here on."""
    from llm2clip_hf.ops.contrastive_blocks import tune

    rows: list[dict[str, Any]] = []
    for d in widths:
        for name in dtypes:
            name = "fp16" if CUDA and name == "fp32" else name  # what float32 features are rounded to
            x, y, scale, _ = (tensor.detach() for tensor in features(n, d, DTYPES[name]))
            for kernel, config in tune(x, y, scale, timed).items():
                rows.append({"D": d, "features": name, "kernel": kernel, "configuration": str(config)})
    return rows


def timed(call: Callable[[], object], times: int = 5) -> float:
    """Shortest seconds of a call after the first."""
    found = []
    for _ in range(times + 1):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        found.append(time.perf_counter() - start)
    return min(found[1:])


# ------------------------------------------------------------------------------------------------- (3) and (4): losses


class Budget:
    """Seconds that are left of a run; what would not fit is left out and named."""

    def __init__(self, minutes: float) -> None:
        self.end, self.left_out = time.monotonic() + 60 * minutes, list[str]()

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        fits = time.monotonic() + seconds < self.end
        if not fits:
            self.left_out.append(what)
        return fits


def seconds(loss: Loss, inputs: tuple[Tensor, ...]) -> tuple[float, float, int]:
    """Elapsed time of a step, the processor time of all threads of this process, and on a GPU the extra memory."""
    before, peak = 0, 0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    synchronize()
    start, busy = time.perf_counter(), time.process_time()
    step(loss, inputs)
    synchronize()
    elapsed, busy = time.perf_counter() - start, time.process_time() - busy
    if CUDA:
        peak = torch.cuda.max_memory_allocated() - before
        if elapsed < 0.1:
            from triton.testing import do_bench

            elapsed = float(do_bench(lambda: step(loss, inputs), warmup=20, rep=100, return_mode="median")) / 1e3
    return elapsed, busy, peak


def resident(key: str) -> int:
    """A field of this process's memory status, in bytes; `VmRSS` now, `VmHWM` at its peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"`{key}` is not in /proc/self/status. Run on Linux.")


def cpu_memory(kind: str, name: str, n: int, d: int) -> int:
    """Growth of the peak resident set by one step, in bytes; for a fresh process."""
    loss = methods(kind)[name]
    step(loss, features(64, d, torch.float32))  # load what is loaded on first use
    inputs = features(n, d, torch.float32)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
    before = resident("VmRSS")
    step(loss, inputs)
    return resident("VmHWM") - before


def peak_of(kind: str, name: str, n: int, d: int) -> float:
    if n < 1024:
        return math.nan  # lost in what the interpreter needs
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(cpu_memory, kind, name, n, d).result()


def fits(name: str, n: int) -> bool:
    """Whether a method that holds all logits has a chance at this size."""
    total = torch.cuda.get_device_properties(0).total_memory if CUDA else resident_total()
    return name.startswith("ours") or name in ("Inf-CL", "siglip-kernel") or DENSE_BYTES * n * n < total


def resident_total() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def matmul_rate() -> float:
    """Measured TFLOP/s of a square matrix product: bf16 on a GPU, fp32 on the CPU."""
    n = 8192 if CUDA else 2048
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if CUDA else torch.float32) for _ in range(2))
    return 2 * n**3 / timed(lambda: a @ b, 20 if CUDA else 4) / 1e12


def measure(arguments: argparse.Namespace, budget: Budget) -> list[dict[str, Any]]:
    rate, rows, known = matmul_rate(), list[dict[str, Any]](), dict[tuple[str, ...], float]()
    print(f"matmul rate {rate:.3g} TFLOP/s")
    cells = itertools.product(arguments.sizes, arguments.widths, arguments.dtypes, arguments.losses)
    for n, d, dtype, kind in cells:
        inputs, times = features(n, d, DTYPES[dtype]), dict[str, list[tuple[float, float, int]]]()
        # A compiled graph of every shape would take longer than all else.
        compiled = (d, dtype) == (arguments.widths[0], arguments.dtypes[0])
        running = methods(kind, compiled, exact=CUDA and dtype == "fp32")
        for turn in range(-1, arguments.repeats):  # the first is to warm up
            for name in list(running):
                cost = known.get((kind, dtype, name), 0.0) * n * n * d * (arguments.repeats + 2)
                if turn < 0 and not (fits(name, n) and budget.allows(f"{kind}, {dtype}, D={d}, N={n}, {name}", cost)):
                    del running[name]
                    continue
                try:
                    found = seconds(running[name], inputs)
                except torch.cuda.OutOfMemoryError:
                    del running[name]
                    torch.cuda.empty_cache()
                    continue
                known[kind, dtype, name] = found[0] / (n * n * d)
                if turn >= 0:
                    times.setdefault(name, []).append(found)
        for name in running:
            rows.append(row_of(kind, d, n, dtype, name, times, rate))
            print({key: value for key, value in rows[-1].items() if key != "repetitions"}, flush=True)
    return rows


def row_of(kind: str, d: int, n: int, dtype: str, name: str, times: dict[str, Any], rate: float) -> dict[str, Any]:
    """The figures of a method, and their ratios to those of eager torch."""
    medians = {method: [statistics.median(each) for each in zip(*found)] for method, found in times.items()}
    median, busy, peak = medians[name]
    baseline, busy_baseline, _ = medians.get("eager", (math.nan, math.nan, 0))
    tflops = FLOPS[kind] * n * n * d / median / 1e12
    return {
        "loss": kind,
        "D": d,
        "N": n,
        "features": dtype,
        "method": name,
        "seconds": median,
        "repetitions": times[name],
        "time / eager": median / baseline,
        "CPU time / eager": busy / busy_baseline,
        "effective TFLOP/s": tflops,
        "of matmul rate": tflops / rate,
        "peak extra MiB": (peak if CUDA else peak_of(kind, name, n, d)) / 2**20,
    }


def kernel_times(kind: str, n: int, d: int, dtype: str) -> dict[str, Any]:
    """Milliseconds of one step of our fastest implementation, by kernel."""
    inputs, loss = features(n, d, DTYPES[dtype]), ours(kind, implementations()[-1])
    step(loss, inputs)
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as record:
        step(loss, inputs)
        synchronize()
    found = dict.fromkeys((*PARTS, "products", "other"), 0.0)
    for event in record.key_averages():
        name = event.key.lower()
        part = "products" if any(each in name for each in PRODUCTS) else "other"
        part = next((each for each in PARTS if name.endswith("_kernel") and each in name), part)
        found[part] += (event.self_device_time_total if CUDA else event.self_cpu_time_total) / 1e3
    return {"loss": kind, "D": d, "N": n, "features": dtype} | {part: ms for part, ms in found.items() if ms}


# ---------------------------------------------------------------------------------------------------------- the report


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Any rows as a table, numbers with four digits."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "repetitions"]
    shown = [[f"{v:.4g}" if isinstance(v := row.get(name, ""), float) else str(v) for name in names] for row in rows]
    return [f"| {' | '.join(each)} |" for each in (names, ["---"] * len(names), *shown)]


def trainer_steps(arguments: argparse.Namespace, budget: Budget) -> list[dict[str, Any]]:
    try:
        from train_step import training_step
    except ImportError as error:
        budget.left_out.append(f"trainers ({error})")
        return []
    cells = [(stage, batch) for batch in arguments.trainers for stage in (2, 1)]
    return [
        training_step(*cell, DEVICE, arguments.small)
        for cell in cells
        if budget.allows("stage {}, batch {}".format(*cell))
    ]


def report(results: dict[str, Any], repeats: int) -> str:
    name = torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU"
    lines = [f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {datetime.date.today()},"]
    lines[0] += f" median of {repeats}"
    for title in ("losses", "accuracy", "tuned", "kernels", "trainers"):
        lines += ["", f"{title.capitalize()}:", "", *table(results[title])] if results.get(title) else []
    return "\n".join([*lines, "", *(f"Left out: {each}" for each in results["left out"]), ""])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("No plot without matplotlib.")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(row["loss"], row["D"], row["features"]) for row in rows}, reverse=True)
    figure, axes = plt.subplots(2, len(panels), figsize=(4.5 * len(panels), 7), squeeze=False)
    for column, (kind, d, dtype) in enumerate(panels):
        chosen = [row for row in rows if (row["loss"], row["D"], row["features"]) == (kind, d, dtype)]
        for axis, quantity in zip(axes[:, column], ("seconds", "peak extra MiB")):
            for name in dict.fromkeys(row["method"] for row in chosen):
                points = [(row["N"], row[quantity]) for row in chosen if row["method"] == name]
                axis.loglog(*zip(*points), marker="o", label=name)
            axis.set(title=f"{kind}, D = {d}, {dtype}", xlabel="batch size N", ylabel=quantity)
            axis.grid(alpha=0.3)
        axes[0, column].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 16384], help="batch sizes N")
    parser.add_argument("--widths", type=int, nargs="+", default=[512], help="embedding widths D")
    parser.add_argument("--dtypes", nargs="+", default=["bf16"] if CUDA else ["fp32"], choices=list(DTYPES))
    parser.add_argument("--losses", nargs="+", default=["softmax", "sigmoid"], choices=["softmax", "sigmoid"])
    parser.add_argument("--repeats", type=int, default=3, help="repetitions; the median is reported")
    parser.add_argument("--check", type=int, nargs="*", default=[], help="sizes of the comparison with fp64")
    parser.add_argument("--tune", type=int, help="size at which tile configurations are chosen (GPU)")
    parser.add_argument("--kernels", type=int, nargs="*", default=[], help="sizes at which kernels are timed")
    parser.add_argument("--trainers", type=int, nargs="*", default=[], help="batch sizes of training steps")
    parser.add_argument("--small", action="store_true", help="tiny models in the trainers")
    parser.add_argument("--minutes", type=float, default=math.inf, help="what would take longer is left out")
    parser.add_argument("--output", type=Path, default=Path("benchmark"), help="folder for the results")
    parser.add_argument("--gpu", action="store_true", help="all of it at the sizes of a GPU, in eight minutes")
    if "--gpu" in sys.argv:
        if not CUDA:
            raise SystemExit("`--gpu` needs a CUDA device, and there is none. Leave it out to measure on the CPU.")
        parser.set_defaults(**GPU)
    arguments = parser.parse_args()
    budget, results = Budget(arguments.minutes), dict[str, Any]()
    if arguments.check:
        results["accuracy"] = accuracy(arguments.check, arguments.widths, arguments.dtypes)
    if arguments.tune and "triton" in implementations():
        results["tuned"] = tuned(arguments.tune, arguments.widths, arguments.dtypes)
    # Trainers and kernels first: the largest losses take what time is left.
    results["trainers"] = trainer_steps(arguments, budget) if arguments.trainers else []
    cells = [(n, d, dtype) for n in arguments.kernels for d in arguments.widths for dtype in arguments.dtypes]
    results["kernels"] = [
        kernel_times(kind, *cell) for cell in cells for kind in arguments.losses if budget.allows(f"kernels of {cell}")
    ]
    results["losses"] = measure(arguments, budget)
    results["left out"] = budget.left_out
    text = report(results, arguments.repeats)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "contrastive_loss.md").write_text(text, encoding="utf-8")
    (arguments.output / "contrastive_loss.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    plot(results["losses"], arguments.output / "contrastive_loss.png")
    print(text)
    wrong = [row for row in results.get("accuracy", []) if not row["right"]]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(results['accuracy'])} checks found a wrong value, first {wrong[0]}.")


if __name__ == "__main__":
    main()
