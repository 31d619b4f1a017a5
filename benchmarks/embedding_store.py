# SPDX-License-Identifier: Apache-2.0
r"""
What the caption-embedding store costs: reading, opening, and writing beside the encoder, on one CPU.

    python benchmarks/embedding_store.py

Reading is compared with plain `numpy.memmap` and with safetensors' own slices of the same files, warm in the page
cache. All of them copy into the same preallocated memory, except where rows are gathered: there each makes its result.
One thread reads, times are processor times (of user and kernel, page faults included), which other jobs on the machine
lengthen little, and methods take turns within every repetition; the best time of each counts.

Writing is compared with bare calls of the same encoder, a stand-in of a few matrix products; processor time again, so
without the wait for the disk. The time that the store adds per caption does not depend on the encoder: its share is
also given for an LLM that does 500 captions per second.

Writes `embedding_store.md` and `.json` to `--output`, and takes about a minute and 0.6 GB of disk in `--folder`.
"""

import argparse
import datetime
import json
import platform
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from llm2clip_hf.data import CaptionEmbeddingStore, embed_captions
from llm2clip_hf.data.sampling import token_budget_batches
from llm2clip_hf.data.store import build
from llm2clip_hf.data.store.folder import StoreFolder


Row = dict[str, Any]
GATHERED_ROWS = 4096
BATCH_ROWS = 4096
LLM_CAPTIONS_PER_SECOND = 500


def make_store(folder: Path, rows: int, width: int, rows_per_shard: int) -> CaptionEmbeddingStore:
    """A store of random halves."""
    values = torch.randn(1024, width, generator=torch.Generator().manual_seed(0)).half()

    def encode(texts: list[str]) -> torch.Tensor:
        return values[torch.tensor([int(text) % 1024 for text in texts])]

    captions = [str(row) for row in range(rows)]
    options: dict[str, Any] = {"fingerprint": {}, "rows_per_shard": rows_per_shard, "show_progress": False}
    return embed_captions(encode, captions, folder, max_tokens_per_batch=1 << 16, **options)


def best_times(methods: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Processor seconds of the fastest of `repetitions` runs of each method, taking turns after one warm-up."""
    best = dict.fromkeys(methods, float("inf"))
    for repetition in range(repetitions + 1):
        for name, method in methods.items():
            start = time.process_time()
            method()
            if repetition:
                best[name] = min(best[name], time.process_time() - start)
    return best


def shards_as_memmaps(store: CaptionEmbeddingStore) -> list[np.ndarray]:
    """The shards as plain numpy maps of the files."""
    maps = []
    for file in sorted(store.path.glob("embeddings-*.safetensors")):
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            entry = json.loads(opened.read(size))["embeddings"]
        offset = 8 + size + entry["data_offsets"][0]
        maps.append(np.asarray(np.memmap(file, dtype=np.int16, mode="r", offset=offset, shape=tuple(entry["shape"]))))
    return maps


def gather_rows(store: CaptionEmbeddingStore, repetitions: int) -> Iterator[Row]:
    """Random rows of the whole store, and of its first shard alone, where plain numpy can do the same."""
    shards = shards_as_memmaps(store)
    generator = np.random.default_rng(0)
    everywhere = generator.integers(0, store.num_captions, GATHERED_ROWS)
    in_first = generator.integers(0, len(shards[0]), GATHERED_ROWS)
    one_by_one = in_first[:256].tolist()
    with safe_open(next(store.path.glob("embeddings-00000.*")), framework="pt") as file:
        lazy = file.get_slice("embeddings")
        times = best_times(
            {
                "ours, all shards": lambda: store.gather(everywhere),
                "ours, one shard": lambda: store.gather(in_first),
                "numpy.memmap, one shard": lambda: shards[0][in_first],
                "ours, row by row": lambda: [store.gather([row]) for row in one_by_one],
                "safetensors, row by row": lambda: [lazy[row : row + 1] for row in one_by_one],
            },
            repetitions,
        )
    for name, seconds in times.items():
        count = len(one_by_one) if "row by row" in name else GATHERED_ROWS
        baseline = times["safetensors, row by row"] / len(one_by_one)
        if "row by row" not in name:
            baseline = times["numpy.memmap, one shard"] / GATHERED_ROWS
        yield {
            "what": "gather",
            "width": store.embedding_dim,
            "method": name,
            "rows/s": round(count / seconds),
            "GB/s": round(count * store.embedding_dim * 2 / seconds / 1e9, 2),
            "rate / plain": round(baseline * count / seconds, 2),
        }


def read_in_order(store: CaptionEmbeddingStore, repetitions: int) -> Iterator[Row]:
    """All rows in batches, into the same memory."""
    integers = np.empty((BATCH_ROWS, store.embedding_dim), dtype=np.int16)

    def ours() -> None:
        for batch in store.iter_batches(BATCH_ROWS):
            integers[: len(batch)] = batch.view(torch.int16).numpy()

    def ours_without_copy() -> None:
        for _ in store.iter_batches(BATCH_ROWS):
            pass

    def memmap() -> None:
        for shard in shards_as_memmaps(store):
            for start in range(0, len(shard), BATCH_ROWS):
                part = shard[start : start + BATCH_ROWS]
                integers[: len(part)] = part

    def safetensors_slices() -> None:
        for path in sorted(store.path.glob("embeddings-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                lazy = file.get_slice("embeddings")
                for start in range(0, lazy.get_shape()[0], BATCH_ROWS):
                    part = lazy[start : start + BATCH_ROWS]
                    integers[: len(part)] = part.view(torch.int16).numpy()

    methods = {
        "ours": ours,
        "numpy.memmap": memmap,
        "safetensors": safetensors_slices,
        "ours, rows not looked at": ours_without_copy,
    }
    times = best_times(methods, repetitions)
    for name, seconds in times.items():
        yield {
            "what": "in order",
            "width": store.embedding_dim,
            "method": name,
            "rows/s": round(store.num_captions / seconds),
            "GB/s": round(store.num_captions * store.embedding_dim * 2 / seconds / 1e9, 2),
            "rate / plain": round(times["numpy.memmap"] / seconds, 2),
        }


def open_stores(folder: Path, repetitions: int) -> Iterator[Row]:
    """Opening of a small store, of one of many shards, and of one of a billion rows, whose shards are empty space."""
    small = make_store(folder / "small", 10_000, 4, 16_384)
    for rows, rows_per_shard in [(10_000, 16_384), (1_000_000, 16_384), (1_000_000_000, 32_768)]:
        path = folder / f"open-{rows}"
        shards = -(-rows // rows_per_shard)
        as_if(small, path, shards, rows_per_shard)
        tracemalloc.start()
        store = CaptionEmbeddingStore.open(path)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        seconds = best_times({"open": partial(CaptionEmbeddingStore.open, path)}, repetitions)["open"]
        yield {
            "rows": store.num_captions,
            "shards": shards,
            "index MB": round((path / "index.json").stat().st_size / 1e6, 2),
            "open ms": round(seconds * 1e3, 1),
            "peak MB": round(memory / 1e6, 1),
        }


def as_if(store: CaptionEmbeddingStore, path: Path, shards: int, rows_per_shard: int) -> None:
    """The index of a store of so many shards, and files of the right sizes without content."""
    path.mkdir()
    index = build.read_index(StoreFolder(store.path))
    assert index is not None
    first = index["shards"][0] | {"rows": rows_per_shard, "images": rows_per_shard}
    index["shards"] = [first | {"file": build.shard_name(number)} for number in range(shards)]
    index["num_images"] = index["num_captions"] = rows_per_shard * shards
    for entry in [index["layout"], *index["shards"]]:
        with (path / entry["file"]).open("wb") as file:
            file.truncate(entry["bytes"])
    build.write_index(StoreFolder(path), index)


def write_beside_encoder(folder: Path, shards: int, rows: int, width: int) -> Row:
    """Elapsed time with an encoder that waits for a device as long as writing takes, which writing may overlap."""
    captions = [str(row) for row in range(shards * rows)]
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).half()
    seconds = 0.0

    def encode(texts: list[str]) -> torch.Tensor:
        time.sleep(seconds)
        return values[: len(texts)]

    options: dict[str, Any] = {"fingerprint": {}, "rows_per_shard": rows, "max_tokens_per_batch": rows * 8}
    numbers = iter(range(1000))

    def elapsed() -> float:
        start = time.perf_counter()
        embed_captions(encode, captions, folder / f"overlap-{next(numbers)}", show_progress=False, **options)
        return time.perf_counter() - start

    elapsed()
    writing = min(elapsed() for _ in range(2))
    seconds = writing / shards
    together = min(elapsed() for _ in range(2))
    return {
        "shards": shards,
        "MB each": round(rows * width * 2 / 1e6),
        "encode s": round(seconds * shards, 2),
        "write s": round(writing, 2),
        "both s": round(together, 2),
        "both / one after the other": round(together / (writing + seconds * shards), 2),
    }


def embed_beside_encoder(folder: Path, rows: int, width: int, repetitions: int) -> Row:
    """Time of `embed_captions` against bare calls of the encoder on the same batches."""
    weights = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    drawn = random.Random(0)
    captions = [f"{row} " + "word " * drawn.randint(5, 60) for row in range(rows)]

    def encode(texts: list[str]) -> torch.Tensor:
        hidden = torch.tensor([[len(text) % 7 + 1.0] for text in texts]).expand(-1, width)
        for _ in range(2):
            hidden = torch.tanh(hidden @ weights)
        return hidden

    lengths = [1 + len(text) // 4 for text in captions]
    batches = [[captions[item] for item in batch] for batch in token_budget_batches(lengths, 16384)]
    number = iter(range(1000))

    def with_store() -> None:
        options: dict[str, Any] = {"fingerprint": {}, "show_progress": False}
        embed_captions(encode, captions, folder / f"embedded-{next(number)}", **options)

    times = best_times({"bare": lambda: [encode(batch) for batch in batches], "store": with_store}, repetitions)
    added = (times["store"] - times["bare"]) / rows
    return {
        "captions": rows,
        "width": width,
        "bare captions/s": round(rows / times["bare"]),
        "embed_captions captions/s": round(rows / times["store"]),
        "added microseconds per caption": round(added * 1e6, 1),
        f"share beside {LLM_CAPTIONS_PER_SECOND} captions/s": f"{100 * added * LLM_CAPTIONS_PER_SECOND:.2f} %",
    }


def padding(captions: int, max_tokens: int) -> Iterator[Row]:
    """Share of padded tokens; half of the captions short as alt texts, half long as those of a multimodal LLM."""
    generator = np.random.default_rng(0)
    short = generator.lognormal(np.log(14), 0.5, captions // 2)
    long = generator.lognormal(np.log(110), 0.35, captions - captions // 2)
    lengths = np.minimum(generator.permutation(np.concatenate([short, long])) + 6, 512).astype(int).tolist()
    in_order = [list(range(start, min(start + 64, captions))) for start in range(0, captions, 64)]
    layouts = {
        "64 captions as they come, padded": (in_order, True),
        "sorted by length, padded (sdpa, eager)": (list(token_budget_batches(lengths, max_tokens)), True),
        "packed (flash attention)": (list(token_budget_batches(lengths, max_tokens, pads=False)), False),
    }
    for name, (batches, pads) in layouts.items():
        paid = sum(
            len(batch) * max(lengths[item] for item in batch) if pads else sum(lengths[item] for item in batch)
            for batch in batches
        )
        share = f"{100 * (1 - sum(lengths) / paid):.2f} %"
        yield {"layout": name, "batches": len(batches), "padded tokens": share}


def as_table(rows: list[Row]) -> str:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[2048, 4096], help="widths of the embeddings")
    parser.add_argument("--megabytes", type=int, default=192, help="size of the stores that are read")
    parser.add_argument("--repetitions", type=int, default=5, help="runs of each method")
    parser.add_argument("--folder", type=Path, default=None, help="where the stores are made; a temporary folder")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reading: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for width in arguments.widths:
            # Two shards of whole batches, as those of the default size are.
            rows_per_shard = BATCH_ROWS * max(1, arguments.megabytes * 1_000_000 // (4 * width * BATCH_ROWS))
            store = make_store(folder / f"width-{width}", 2 * rows_per_shard, width, rows_per_shard)
            reading += gather_rows(store, arguments.repetitions)
            reading += read_in_order(store, arguments.repetitions)
        opening = list(open_stores(folder, arguments.repetitions))
        overlap = [write_beside_encoder(folder, 8, 2048, max(arguments.widths))]
        embedding = [embed_beside_encoder(folder, 4096, min(arguments.widths), min(3, arguments.repetitions))]
    tables = {
        "Reading": reading,
        "Opening": opening,
        "Writing": overlap,
        "Embedding": embedding,
        "Padding": list(padding(32768, 16384)),
    }
    facts = (
        f"{platform.machine()} CPU, one thread, torch {torch.__version__}, float16, processor time, "
        f"{datetime.date.today()}, best of {arguments.repetitions}"
    )
    text = facts + "\n\n" + "\n".join(f"{title}\n\n{as_table(rows)}" for title, rows in tables.items())
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "embedding_store.md").write_text(text, encoding="utf-8")
    (arguments.output / "embedding_store.json").write_text(json.dumps({"machine": facts, **tables}, indent=2))


if __name__ == "__main__":
    main()
