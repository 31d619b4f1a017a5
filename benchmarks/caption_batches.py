# SPDX-License-Identifier: Apache-2.0
r"""
Step time of stage 1 with padded columns and with length-sorted passes, side by side in one run.

    python benchmarks/caption_batches.py                                    # synthetic lengths, small Llama
    python benchmarks/caption_batches.py --captions captions.parquet        # lengths of real captions
    python benchmarks/caption_batches.py --batch 512 --hidden 2048 --layers 16 --device cuda --dtype bfloat16

Compared are, forward and backward of the contrastive loss on the same batches: `columns`, each column padded to its
longest row and embedded at once (sentence-transformers); `sorted`, the default of `CaptionContrastiveTrainer`; and,
with the memory of a mini-batch, `cached rows`, sentence-transformers' `CachedMultipleNegativesRankingLoss` with a
fixed number of rows, and `cached tokens`, `mini_batch_tokens` with as many padded tokens as the largest of those.
Methods take turns within every repetition, so that a busy machine slows all of them; medians are reported, and the
processor time of all threads, which waiting does not lengthen. "padding" is padded tokens over tokens.

Lengths: `mixed` draws each text of a pair from short captions or dense ones at even odds (paper section 4.1); `short`
has short captions only; `short to dense` has short anchors and dense positives. With `--captions`, a parquet file with
a column `captions` of lists of texts, a short text is one caption and a dense one all captions of the image together,
and a token is a word or a mark; otherwise short texts have 10 to 20 tokens and dense ones 60 to 200.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from llm2clip_hf.training.captions.batches import mini_batches
from llm2clip_hf.training.captions.loss import CaptionContrastiveLoss


Batch = list[dict[str, Tensor]]
TEMPLATE_TOKENS = 6  # begin of text, role header, end of turn
TOKEN = re.compile(r"\w+|[^\w\s]")


class Encoder(nn.Sequential):
    """A Llama of random weights that attends both ways, mean-pooled, with the interface of a SentenceTransformer."""

    def __init__(self, args: argparse.Namespace) -> None:
        config = LlamaConfig(
            vocab_size=1000,
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 4,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64,
            num_key_value_heads=args.hidden // 64,
        )
        config.is_causal = False
        super().__init__(LlamaModel(config))

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        mask = features["attention_mask"]
        hidden = self[0](input_ids=features["input_ids"], attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        return {"sentence_embedding": (hidden * weights).sum(1) / weights.sum(1)}


def lengths_of_captions(path: str | None, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of short and of dense texts."""
    if path is None:
        return generator.integers(10, 21, 5000), generator.integers(60, 201, 5000)
    import pyarrow.parquet as pq

    captions = pq.read_table(path, columns=["captions"])["captions"].to_pylist()
    counts = [[len(TOKEN.findall(text)) for text in texts] for texts in captions]
    return np.array([count[0] for count in counts]), np.array([sum(count) for count in counts])


def draw_batch(kind: str, rows: int, short: np.ndarray, dense: np.ndarray, generator: np.random.Generator) -> Batch:
    columns = []
    for number in range(2):
        drawn = [generator.choice(each, rows) for each in (short, dense)]
        if kind == "mixed":
            chosen = np.where(generator.random(rows) < 0.5, *drawn)
        else:
            chosen = drawn[int(kind == "short to dense" and number == 1)]
        lengths = torch.from_numpy(chosen + TEMPLATE_TOKENS)
        mask = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()
        ids = torch.from_numpy(generator.integers(10, 1000, tuple(mask.shape)))
        columns.append({"input_ids": ids * mask, "attention_mask": mask})
    return columns


def padding(batch: Batch, method: str, limits: dict[str, int]) -> float:
    tokens = sum(int(column["attention_mask"].sum()) for column in batch)
    if method == "columns":
        padded = sum(column["input_ids"].numel() for column in batch)
    elif method == "cached rows":
        size = limits["rows"]
        padded = sum(
            len(piece) * int(piece.sum(1).max()) for column in batch for piece in column["attention_mask"].split(size)
        )
    else:
        budget = limits["tokens"] if method == "cached tokens" else None
        padded = sum(each.features["input_ids"].numel() for each in mini_batches(batch, None, budget))
    return padded / tokens


def methods_of(encoder: Encoder, limits: dict[str, int]) -> dict[str, Callable[[Batch], Tensor]]:
    plain = CaptionContrastiveLoss(encoder, mask_false_negatives=False)
    tokens = CaptionContrastiveLoss(encoder, mask_false_negatives=False, mini_batch_tokens=limits["tokens"])
    model: Any = encoder
    rows = CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=limits["rows"])

    def columns(batch: Batch) -> Tensor:
        return plain.loss_of_embeddings([encoder(column)["sentence_embedding"] for column in batch])

    return {
        "columns": columns,
        "sorted": lambda batch: plain(batch),
        "cached rows": lambda batch: rows(batch, None),
        "cached tokens": lambda batch: tokens(batch),
    }


def timed(step: Callable[[Batch], Tensor], batch: Batch, args: argparse.Namespace) -> tuple[float, float, float]:
    def wait() -> None:
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()

    copied = [{name: value.to(args.device) for name, value in column.items()} for column in batch]
    wait()
    start, processor = time.perf_counter(), time.process_time()
    with torch.autocast(args.device.partition(":")[0], torch.bfloat16, enabled=args.dtype == "bfloat16"):
        loss = step(copied)
    loss.backward()
    wait()
    return time.perf_counter() - start, time.process_time() - processor, loss.item()


def measure(
    kind: str, encoder: Encoder, lengths: tuple[np.ndarray, np.ndarray], args: argparse.Namespace
) -> list[dict]:
    generator = np.random.default_rng(args.seed)
    batches = [draw_batch(kind, args.batch, *lengths, generator) for _ in range(args.repetitions)]
    longest = max(column["input_ids"].shape[1] for batch in batches for column in batch)
    limits = {"rows": args.mini_batch, "tokens": args.mini_batch * longest}
    methods = methods_of(encoder, limits)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for step in methods.values():
        timed(step, batches[0], args)  # warm-up
    for number, batch in enumerate(batches):
        losses = []
        order = list(methods)[number % 4 :] + list(methods)[: number % 4]
        for name in order:
            encoder.zero_grad()
            elapsed, processor, loss = timed(methods[name], batch, args)
            times[name].append((elapsed, processor))
            losses.append(loss)
        if max(losses) - min(losses) > 0.02 * max(losses) + 1e-3:
            raise RuntimeError(f"The methods disagree about the loss of a batch: {losses}.")
    rows = []
    for name, measured in times.items():
        against = times["cached rows" if name.startswith("cached") else "columns"]
        rows.append(
            {
                "lengths": kind,
                "method": name,
                "padding": statistics.mean(padding(batch, name, limits) for batch in batches),
                "seconds": statistics.median(t for t, _ in measured),
                # Step by step: both have had the same batch, a moment apart.
                "time_ratio": statistics.median(a / b for (a, _), (b, _) in zip(measured, against)),
                "cpu_time_ratio": statistics.median(a / b for (_, a), (_, b) in zip(measured, against)),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", help="Parquet file with a column `captions` of lists of texts.")
    parser.add_argument("--batch", type=int, default=64, help="Pairs per batch.")
    parser.add_argument("--mini-batch", type=int, default=16, help="Rows per mini-batch of `cached rows`.")
    parser.add_argument("--hidden", type=int, default=256, help="Width of the Llama, a multiple of 64.")
    parser.add_argument("--layers", type=int, default=4, help="Layers of the Llama.")
    parser.add_argument("--repetitions", type=int, default=8, help="Batches per kind of lengths.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file for the results.")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    encoder = Encoder(args).to(args.device).train()
    lengths = lengths_of_captions(args.captions, np.random.default_rng(args.seed))
    results = [row for kind in ("mixed", "short", "short to dense") for row in measure(kind, encoder, lengths, args)]
    source = args.captions and Path(args.captions).name
    print(f"{source or 'synthetic'} lengths, {args.batch} pairs, Llama {args.layers} x {args.hidden}, {args.device},")
    print(
        f"{args.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}, median of {args.repetitions}\n"
    )
    print("| lengths | method | padding | s per step | time ratio | CPU time ratio |\n|---|---|---|---|---|---|")
    for row in results:
        print(
            f"| {row['lengths']} | {row['method']} | {row['padding']:.2f} | {row['seconds']:.3g} "
            f"| {row['time_ratio']:.2f} | {row['cpu_time_ratio']:.2f} |"
        )
    if args.output:
        Path(args.output).write_text(json.dumps({"arguments": vars(args), "results": results}, indent=2))


if __name__ == "__main__":
    main()
