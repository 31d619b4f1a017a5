# SPDX-License-Identifier: Apache-2.0
r"""
Time and memory of contrastive losses, side by side in one run: forward and backward of random unit features.

    python benchmarks/contrastive_loss.py                                   # CPU: N = 4096, 16384, D = 512, fp32
    python benchmarks/contrastive_loss.py --sizes 4096 32768 1048576 --widths 768 1280 --largest    # GPU, bf16

Compared are plain PyTorch (`eager`), `torch.compile` of it (GPU), open_clip's `ClipLoss` and `SigLipLoss` (where
open_clip cannot be imported, `ClipLoss`'s computation in eager torch, under a label that says so), Inf-CL where
`inf_cl` can be imported, and ours. Methods take turns within every repetition, so that a busy machine slows all of
them; the median is reported. There the processor time of all threads is the steadier figure. Peak memory is what a
step needs beyond features and interpreter: on the CPU the growth of a fresh process's resident set, on a GPU that of
PyTorch's allocator. Effective TFLOP/s count 8 N^2 D (softmax) or 6 N^2 D (sigmoid), whatever a method computes.

Writes `contrastive_loss.md`, `.json` and `.png` to `--output`.
"""

import argparse
import contextlib
import datetime
import gc
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_hf.ops import contrastive_loss, sigmoid_loss


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
FLOPS = {"softmax": 8, "sigmoid": 6}
# Methods that hold all logits, at 16 bytes each, are skipped where those alone exceed the memory.
DENSE_BYTES = 16


def eager_softmax(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = (scale * x @ y.T).float()
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def eager_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = (scale * x @ y.T).float() + bias
    sign = 2 * torch.eye(len(x), device=x.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(x)


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


def methods(kind: str, device: str) -> dict[str, Loss]:
    """Label and implementation of everything that can run here."""
    eager = {"softmax": eager_softmax, "sigmoid": eager_sigmoid}[kind]
    found: dict[str, Loss] = {"eager": eager}
    if device == "cuda":
        found["torch.compile"] = torch.compile(eager, dynamic=False)
    if kind in open_clip_methods():
        label, loss = open_clip_methods()[kind]
        found[label] = loss
    if kind == "softmax" and device == "cuda":
        with contextlib.suppress(ImportError):
            from inf_cl.flash import _cal_flash_loss

            def inf_cl(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
                target = torch.arange(len(x), device=x.device)
                return (_cal_flash_loss(scale * x, y, target) + _cal_flash_loss(scale * y, x, target)).mean() / 2

            found["Inf-CL"] = inf_cl
    for implementation in ("torch", "triton") if device == "cuda" else ("torch",):
        ours: Loss
        if kind == "softmax":
            ours = lambda x, y, scale, bias, i=implementation: contrastive_loss(x, y, scale, implementation=i)  # type: ignore[misc] # noqa: E731
        else:
            ours = lambda x, y, scale, bias, i=implementation: sigmoid_loss(x, y, scale, bias, implementation=i)  # type: ignore[misc] # noqa: E731
        found[f"ours ({implementation})"] = ours
    return found


def features(n: int, d: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(n + d)
    x, y = (
        F.normalize(torch.randn(n, d, device=device, generator=generator), dim=1).to(dtype).requires_grad_()
        for _ in range(2)
    )
    scale, bias = (torch.tensor(value, device=device, requires_grad=True) for value in (20.0, -10.0))
    return x, y, scale, bias


def step(loss: Loss, inputs: tuple[Tensor, ...]) -> None:
    loss(*inputs).backward()
    for tensor in inputs:
        tensor.grad = None


def seconds(loss: Loss, inputs: tuple[Tensor, ...], device: str) -> tuple[float, float]:
    """Elapsed time of a step and, on the CPU, the processor time of all threads."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(lambda: step(loss, inputs), warmup=50, rep=300, return_mode="median")) / 1e3, math.nan
    start, busy = time.perf_counter(), time.process_time()
    step(loss, inputs)
    return time.perf_counter() - start, time.process_time() - busy


def resident(key: str) -> int:
    """A field of this process's memory status, in bytes; `VmRSS` now, `VmHWM` at its peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"`{key}` is not in /proc/self/status. Run on Linux.")


def cpu_memory(kind: str, name: str, n: int, d: int, queue: Any) -> None:
    """In a fresh process: growth of the peak resident set by one step, in bytes."""
    loss = methods(kind, "cpu")[name]
    step(loss, features(64, d, "cpu", torch.float32))  # load what is loaded on first use
    inputs = features(n, d, "cpu", torch.float32)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
    before = resident("VmRSS")
    step(loss, inputs)
    queue.put(resident("VmHWM") - before)


def memory(kind: str, name: str, loss: Loss, n: int, d: int, device: str, dtype: torch.dtype) -> int:
    """Peak extra memory of one step, in bytes."""
    if device == "cuda":
        inputs = features(n, d, device, dtype)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, inputs)
        return torch.cuda.max_memory_allocated() - before
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=cpu_memory, args=(kind, name, n, d, queue))
    process.start()
    result = int(queue.get())
    process.join()
    return result


def fits(name: str, n: int, device: str) -> bool:
    """Whether a method that holds all logits has a chance at this size."""
    if name.startswith("ours") or name == "Inf-CL":
        return True
    total = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else resident_total()
    return DENSE_BYTES * n * n < total


def resident_total() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def largest(loss: Loss, d: int, dtype: torch.dtype, limit: int = 1 << 20) -> int:
    """Largest power-of-two batch, up to `limit`, whose step runs on the GPU."""
    best, n = 0, 4096
    while n <= limit:
        try:
            step(loss, features(n, d, "cuda", dtype))
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            torch.cuda.empty_cache()
        best, n = n, 2 * n
    return best


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Measured TFLOP/s of a square matrix product."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    if device == "cuda":
        from triton.testing import do_bench

        return 2 * n**3 / float(do_bench(lambda: a @ b, return_mode="median")) / 1e9
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times) / 1e12


def measure(arguments: argparse.Namespace, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    rate = matmul_rate(device, dtype)
    rows = []
    for kind in arguments.losses:
        available = methods(kind, device)
        for d in arguments.widths:
            for n in arguments.sizes:
                inputs = features(n, d, device, dtype)
                running = {name: loss for name, loss in available.items() if fits(name, n, device)}
                for loss in running.values():
                    step(loss, features(64, d, device, dtype))
                times: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
                for _ in range(arguments.repeats):
                    for name, loss in running.items():
                        times[name].append(seconds(loss, inputs, device))
                medians = {name: [statistics.median(each) for each in zip(*pairs)] for name, pairs in times.items()}
                baseline, busy_baseline = medians.get("eager", (math.nan, math.nan))
                for name, loss in running.items():
                    median, busy = medians[name]
                    tflops = FLOPS[kind] * n * n * d / median / 1e12
                    row = {
                        "loss": kind,
                        "D": d,
                        "N": n,
                        "method": name,
                        "seconds": median,
                        "repetitions": times[name],
                        "time / eager": median / baseline,
                        "CPU time / eager": busy / busy_baseline,
                        "TFLOP/s": tflops,
                        "of matmul rate": tflops / rate,
                        "peak MiB": memory(kind, name, loss, n, d, device, dtype) / 2**20,
                    }
                    rows.append(row)
                    print(line(row), flush=True)
            if arguments.largest and device == "cuda":
                for name, loss in available.items():
                    print(f"| {kind} | {d} | largest N | {name} | {largest(loss, d, dtype)} |", flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    figures = (
        f"{row['seconds']:.4g}",
        f"{row['time / eager']:.2f}",
        f"{row['CPU time / eager']:.2f}",
        f"{row['peak MiB']:.0f}",
        f"{row['TFLOP/s']:.3g}",
        f"{row['of matmul rate']:.2f}",
    )
    return "| " + " | ".join([row["loss"], str(row["D"]), str(row["N"]), row["method"], *figures]) + " |"


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace, device: str, dtype: torch.dtype) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    return "\n".join(
        [
            f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}, {datetime.date.today()},"
            f" median of {arguments.repeats}",
            "",
            "| loss | D | N | method | s | time / eager | CPU time / eager | peak extra MiB | effective TFLOP/s"
            " | of matmul rate |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *map(line, rows),
            "",
        ]
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(row["loss"], row["D"]) for row in rows}, reverse=True)
    figure, axes = plt.subplots(2, len(panels), figsize=(4.5 * len(panels), 7), squeeze=False)
    for column, (kind, d) in enumerate(panels):
        chosen = [row for row in rows if (row["loss"], row["D"]) == (kind, d)]
        for axis, quantity in zip(axes[:, column], ("seconds", "peak MiB")):
            for name in dict.fromkeys(row["method"] for row in chosen):
                points = [(row["N"], row[quantity]) for row in chosen if row["method"] == name]
                axis.loglog(*zip(*points), marker="o", label=name)
            axis.set(title=f"{kind}, D = {d}", xlabel="batch size N", ylabel=quantity)
            axis.grid(alpha=0.3)
        axes[0, column].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 16384], help="batch sizes N")
    parser.add_argument("--widths", type=int, nargs="+", default=[512], help="embedding widths D")
    parser.add_argument("--losses", nargs="+", default=["softmax", "sigmoid"], choices=["softmax", "sigmoid"])
    parser.add_argument("--repeats", type=int, default=3, help="repetitions; the median is reported")
    parser.add_argument("--largest", action="store_true", help="also find the largest N that runs (GPU only)")
    parser.add_argument("--output", type=Path, default=Path("benchmark"), help="folder for the results")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = measure(arguments, device, dtype)
    text = report(rows, arguments, device, dtype)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "contrastive_loss.md").write_text(text, encoding="utf-8")
    (arguments.output / "contrastive_loss.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    plot(rows, arguments.output / "contrastive_loss.png")
    print(text)


if __name__ == "__main__":
    main()
