# SPDX-License-Identifier: Apache-2.0
"""
Images per second from JPEG files to normalized batches, side by side in one run.

    python benchmarks/data_loading.py                         # 512 JPEGs of 640 x 480, to 224 x 224
    python benchmarks/data_loading.py --size 336 --workers 0 2 4 8

Compared on the same images: the bare JPEG decoding of Pillow, transformers' `CLIPImageProcessor` (Pillow backend) on
the decoded image, our `ImageTextDataset` (decoding, RandomResizedCrop 0.9-1.0, normalization, caption), the same in a
`DataLoader` with 0, 1, 2 workers, and `ImageTextStream` over tar shards of the same files. Methods take turns within
every repetition, so that a busy machine slows all of them; the median is reported. There the processor time of all
processes is the steadier figure. Also measured: how fast a resumed stream passes over what was seen, and how fast the
headers of tar shards are counted.

Writes `data_loading.md` and `.json` to `--output`, if given.
"""

import argparse
import datetime
import io
import json
import os
import platform
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from llm2clip_hf.data import (
    ImageTextCollator,
    ImageTextDataset,
    ImageTextStream,
    RandomResizedCropTransform,
    count_samples,
)


SHARDS = 4
BATCH_SIZE = 32


def picture(number: int, width: int, height: int) -> bytes:
    """A JPEG with shapes of all scales and some noise; about as large as a photo of its size."""
    random = np.random.default_rng(number)
    pixels = np.zeros((height, width, 3))
    for cells in (3, 12, 48):
        small = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        pixels += np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)) / 3
    pixels += random.normal(0, 6, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_files(folder: Path, count: int, width: int, height: int) -> list[str]:
    """JPEG files, and the same in tar shards with a caption each."""
    paths = []
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard * count // SHARDS, (shard + 1) * count // SHARDS):
                content = picture(number, width, height)
                paths.append(str(folder / f"{number:06d}.jpg"))
                Path(paths[-1]).write_bytes(content)
                for name, data in ((f"{number:06d}.jpg", content), (f"{number:06d}.txt", f"image {number}".encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return paths


def decode(path: str) -> Image.Image:
    image = Image.open(path)
    image.load()
    return image


def without_text(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Batches without a tokenizer, whose time is not what is measured."""
    return ImageTextCollator()([{**sample, "llm_embeds": torch.zeros(1)} for sample in map(drop_text, samples)])


def drop_text(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sample.items() if name != "text"}


def methods(paths: list[str], folder: Path, size: int, workers: list[int]) -> dict[str, Callable[[], int]]:
    """By label, a function that goes through all images once and returns how many it saw."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    transform = RandomResizedCropTransform(size)
    captions = [f"image {number}" for number in range(len(paths))]
    dataset = ImageTextDataset(paths, captions, transform=transform)
    in_full = ImageTextDataset(paths, captions, transform=RandomResizedCropTransform(size, draft=False))
    stream = ImageTextStream(str(folder / "*.tar"), {"real": "txt"}, transform=transform, shuffle_buffer=100)

    def process_all() -> int:
        for path in paths:
            processor(images=decode(path), return_tensors="pt")
        return len(paths)

    def loader(num_workers: int) -> Any:
        return torch.utils.data.DataLoader(
            dataset, BATCH_SIZE, shuffle=True, num_workers=num_workers, collate_fn=without_text
        )

    def rows_of(loader: Any) -> int:
        return sum(len(batch["pixel_values"]) for batch in loader)

    def decode_all() -> int:
        for path in paths:
            decode(path)
        return len(paths)

    found: dict[str, Callable[[], int]] = {
        "bare JPEG decoding": decode_all,
        "CLIPImageProcessor (PIL), decoding included": process_all,
        "ours, sample by sample": lambda: sum(1 for row in range(len(dataset)) if dataset[row]),
        "ours, decoded in full": lambda: sum(1 for row in range(len(in_full)) if in_full[row]),
    }
    for count in workers:
        found[f"ours, loader with {count} workers"] = lambda count=count: rows_of(loader(count))  # type: ignore[misc]
        found[f"ours, stream with {count} workers"] = lambda count=count: rows_of(  # type: ignore[misc]
            stream.loader(BATCH_SIZE, num_workers=count, collate_fn=without_text)
        )
    return found


def cpu_seconds() -> float:
    """Processor time of this process and of its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(run: Callable[[], int]) -> tuple[float, float]:
    """Seconds and processor seconds per image."""
    start, cpu_start = time.perf_counter(), cpu_seconds()
    count = run()
    return (time.perf_counter() - start) / count, (cpu_seconds() - cpu_start) / count


def compare(found: dict[str, Callable[[], int]], repetitions: int) -> Iterator[dict[str, Any]]:
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in found}
    for _ in range(repetitions):
        for label, run in found.items():
            times[label].append(measure(run))
    medians = {label: [statistics.median(column) for column in zip(*values)] for label, values in times.items()}
    decoding, processor = list(medians.values())[:2]
    for label, (elapsed, cpu) in medians.items():
        yield {
            "method": label,
            "images/s": round(1 / elapsed, 1),
            "CPU ms/image": round(1000 * cpu, 2),
            "speed / processor": round(processor[0] / elapsed, 2),
            "CPU / processor": round(cpu / processor[1], 2),
            "CPU / decoding": round(cpu / decoding[1], 2),
        }


def draft_error(paths: list[str], size: int) -> dict[str, float]:
    """How far pixels of drafted images are from those of images decoded in full, in levels of 0 to 255."""
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    captions = ["a"] * len(paths)
    pairs = [
        ImageTextDataset(paths, captions, transform=RandomResizedCropTransform(size, draft=draft, **plain))
        for draft in (True, False)
    ]
    differences = [255 * (pairs[0].pixel_values(row) - pairs[1].pixel_values(row)).abs() for row in range(len(paths))]
    squares = statistics.mean(float((each**2).mean()) for each in differences)
    return {
        "mean difference of pixels by draft, levels of 255": round(
            statistics.mean(float(d.mean()) for d in differences), 2
        ),
        "largest mean difference of an image": round(max(float(each.mean()) for each in differences), 2),
        "peak signal-to-noise ratio, dB": round(10 * float(np.log10(255**2 / max(squares, 1e-9))), 1),
    }


def compare_streams(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """Our stream and that of `datasets` over the same tar shards: shares of 3 ranks, resuming, rows/s undecoded."""
    import datasets
    from datasets.distributed import split_dataset_by_node

    files, middle = [str(path) for path in sorted(folder.glob("*.tar"))], count // 2

    def ours(rank: int, ranks: int) -> ImageTextStream:
        options: dict[str, Any] = {"shuffle_buffer": 50, "rank": rank, "world_size": ranks}
        return ImageTextStream(files, {"real": "txt"}, transform=lambda image, generator: torch.zeros(1), **options)

    def theirs(rank: int, ranks: int) -> Any:
        rows = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
        shuffled = rows.cast_column("jpg", datasets.Image(decode=False)).shuffle(seed=0, buffer_size=50)
        return split_dataset_by_node(shuffled, rank, ranks)

    def resumed(make: Callable[[int, int], Any], key: str) -> bool:
        whole, again = [row[key] for row in make(0, 1)], make(0, 1)
        if isinstance(again, ImageTextStream):
            again.loader(1)
            again.load_state_dict(again.state_dict(middle))
        else:
            half = make(0, 1)
            for _ in zip(range(middle), half):
                pass
            again.load_state_dict(half.state_dict())
        return [row[key] for row in again] == whole[middle:]

    shards = ours(0, 1)._shards
    readers: dict[str, Callable[[], int]] = {
        "ours": lambda: sum(1 for shard in shards for _ in shard.read(range(shard.count()))),
        "datasets": lambda: sum(1 for _ in theirs(0, 1)),
    }
    best = {name: min(measure(run)[1] for _ in range(3)) for name, run in readers.items()}
    for name, make, key in (("ours", ours, "index"), ("datasets", theirs, "__key__")):
        yield {
            "stream": name,
            "rows of 3 ranks": [sum(1 for _ in make(rank, 3)) for rank in range(3)],
            "resumed in the middle, the same rows follow": resumed(make, key),
            "undecoded rows/s of processor time": round(1 / best[name]),
        }


def skipping_rates(folder: Path, paths: list[str]) -> dict[str, float]:
    """Samples per second that are passed over by a resumed stream, and counted from headers."""
    options: dict[str, Any] = {"transform": RandomResizedCropTransform(8), "shuffle_buffer": 100}
    stream = ImageTextStream(str(folder / "*.tar"), {"real": "txt"}, **options)
    stream.loader(1)
    stream.resume_at(0, len(paths) - 1)
    start = time.perf_counter()
    count = len(list(stream))
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    counted = sum(count_samples(str(folder / "*.tar")).values())
    return {
        "passed over on resuming, samples/s": round((len(paths) - count) / seconds),
        "counted from tar headers, samples/s": round(counted / (time.perf_counter() - start)),
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=512, help="number of images")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--size", type=int, default=224, help="side of the result")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--photos", nargs="+", help="JPEG files to measure the error of drafts on, instead")
    parser.add_argument("--output", type=Path, help="folder for the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_files(folder, args.count, args.width, args.height)
        kilobytes = sum(os.path.getsize(path) for path in paths) / len(paths) / 1000
        rows = list(compare(methods(paths, folder, args.size, args.workers), args.repetitions))
        streams = list(compare_streams(folder, args.count))
        rates = skipping_rates(folder, paths) | draft_error(args.photos or paths[:64], args.size)
    setting = (
        f"{platform.machine()}, {os.cpu_count()} cores, Pillow {PIL.__version__}, torch {torch.__version__}, "
        f"{datetime.date.today()}: {args.count} JPEGs of {args.width} x {args.height} ({kilobytes:.0f} kB) to "
        f"{args.size} x {args.size}, median of {args.repetitions}"
    )
    report = "\n\n".join(
        [setting, as_table(rows), as_table(streams), *(f"{label}: {rate:g}" for label, rate in rates.items())]
    )
    print(report)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "data_loading.md").write_text(report + "\n", encoding="utf-8")
        results = {"setting": setting, "rows": rows, "streams": streams, "rates": rates}
        (args.output / "data_loading.json").write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
