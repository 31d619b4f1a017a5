# SPDX-License-Identifier: Apache-2.0
r"""
Time and peak memory of retrieval metrics: all ranks in both directions, embeddings included.

    python benchmarks/ranks.py                                # 5,000 images x 25,000 captions, D = 1280 (COCO's size)
    python benchmarks/ranks.py --large 100000                 # also 100,000 x 1,000,000 at D = 64, and what that says
                                                              # of 1,000,000 x 1,000,000
    python benchmarks/ranks.py --images 1000000 --captions 1000000 --width 64     # the full one

Each size runs in a fresh process, whose peak resident set is reported, interpreter and torch included; on a GPU the
peak of PyTorch's allocator. The time of a size grows with images times captions, which the extrapolation uses. On a
busy machine the processor time of all threads is the steadier figure; with `OMP_NUM_THREADS=1` no thread waits in it.
"""

import argparse
import datetime
import multiprocessing
import platform
import resource
import time
from typing import Any

import torch

from llm2clip_hf.evaluation import retrieval_metrics


TARGET = 1_000_000


def measure(num_images: int, num_captions: int, width: int, chunk_size: int, queue: Any) -> None:
    """Put seconds and peak memory in bytes of one size into `queue`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(num_images, width, device=device, generator=generator)
    owners = torch.arange(num_captions, device=device) % num_images
    # A caption is its image and noise, so that ranks are neither all right nor all wrong.
    texts = torch.randn(num_captions, width, device=device, generator=generator)
    for start in range(0, num_captions, 65536):
        texts[start : start + 65536] += images[owners[start : start + 65536]]
    start_time, start_busy = time.perf_counter(), time.process_time()
    metrics = retrieval_metrics(images, texts, owners, chunk_size=chunk_size)
    seconds, busy = time.perf_counter() - start_time, time.process_time() - start_busy
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    queue.put((seconds, busy, peak, metrics["image_to_text_recall@1"], metrics["text_to_image_median_rank"]))


def run(num_images: int, num_captions: int, width: int, chunk_size: int) -> tuple[float, float]:
    """Measure one size in a process of its own, print the row, return elapsed and processor seconds."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(num_images, num_captions, width, chunk_size, queue))
    process.start()
    seconds, busy, peak, recall, median = queue.get()
    process.join()
    nanoseconds = 1e9 * busy / (num_images * num_captions)
    row = f"| {num_images:,} | {num_captions:,} | {width} | {seconds:.1f} | {busy:.1f} | {nanoseconds:.1f} |"
    print(f"{row} {peak / 2**20:.0f} | {recall:.3f} | {median:.1f} |", flush=True)
    return seconds, busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="number of images")
    parser.add_argument("--captions", type=int, default=25000, help="number of captions")
    parser.add_argument("--width", type=int, default=1280, help="embedding width D")
    parser.add_argument("--chunk-size", type=int, default=1024, help="side of a tile")
    parser.add_argument("--large", type=int, metavar="IMAGES", help="also so many images x 1,000,000 at D = 64")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {datetime.date.today()}\n")
    print("| images | captions | D | s | CPU s | CPU ns per pair | peak MiB | I2T R@1 | T2I median rank |")
    print("|---|---|---|---|---|---|---|---|---|")
    run(arguments.images, arguments.captions, arguments.width, arguments.chunk_size)
    if arguments.large:
        elapsed, busy = run(arguments.large, TARGET, 64, arguments.chunk_size)
        factor = TARGET / arguments.large
        print(
            f"\n{TARGET:,} x {TARGET:,} at D = 64, extrapolated from the last row: {elapsed * factor:.0f} s elapsed, "
            f"{busy * factor:.0f} s of processor time"
        )


if __name__ == "__main__":
    main()
