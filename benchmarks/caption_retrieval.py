# SPDX-License-Identifier: Apache-2.0
r"""
Stage 1 on real captions: caption retrieval accuracy (CRA) of an LLM before and after caption-contrastive tuning.

    python benchmarks/caption_retrieval.py --captions captions_val2017.parquet --llm path/to/a/small/llama
    python benchmarks/caption_retrieval.py --captions captions_val2017.parquet --architecture qwen3 --tokenizer gpt2

`--captions` is a table with a list column `captions`, one row per image. A seeded permutation of its rows gives the
training images; the last 1,000 are held out. With `--architecture` a small model of that family is first trained as a
causal language model on the training captions, one caption per text. `--words` (columns `name` and `captions`) and
`--stories` (column `captions`) add captions of other kinds and lengths, which the training has not seen. TF-IDF,
fitted on the texts it is measured on, is the baseline.
"""

import argparse
import random
import re
import tempfile
import time
from collections.abc import Sequence
from datetime import date

import numpy as np
import torch
import transformers
from datasets import load_dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from llm2clip_hf.data import CaptionPairDataset
from llm2clip_hf.evaluation import CaptionRetrievalEvaluator, caption_retrieval_accuracy
from llm2clip_hf.training import CaptionContrastiveTrainer, CaptionContrastiveTrainingArguments, build_caption_encoder


METRIC = "caption_retrieval_accuracy"
Pairs = list[tuple[str, str]]

FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": 128, "hidden_activation": "gelu_pytorch_tanh"},
}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    set_seed(arguments.seed)
    rows = load_dataset("parquet", data_files=arguments.captions, split="train")["captions"][:]
    order = np.random.default_rng(arguments.seed).permutation(len(rows))
    train = [rows[i] for i in order[: -arguments.num_test]]
    test = [rows[i] for i in order[-arguments.num_test :]]
    sets = evaluation_sets(test, arguments)
    baseline = {name: tfidf(pairs) for name, pairs in sets.items()}

    with tempfile.TemporaryDirectory() as folder:
        llm = arguments.llm or pretrain(train, arguments, folder)
        encoder = build_caption_encoder(
            llm, template=None, lora={"r": arguments.rank, "lora_alpha": arguments.alpha, "lora_dropout": 0.0}
        )
        trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
        raw = {name: CaptionRetrievalEvaluator(pairs)(encoder) for name, pairs in sets.items()}
        seconds = train_stage_1(encoder, train, sets, arguments, folder)
        tuned = {name: CaptionRetrievalEvaluator(pairs)(encoder) for name, pairs in sets.items()}

    total = encoder.llm.num_parameters()
    print(
        f"\n{arguments.llm and 'given LLM' or arguments.architecture}: {total:,} parameters with {trained:,} of LoRA, "
        f"{len(train)} images to train, {arguments.epochs} epochs in {seconds:.0f} s, {arguments.threads} thread(s), "
        f"torch {torch.__version__}, transformers {transformers.__version__}, {date.today()}\n"
    )
    print("| captions | images | TF-IDF | raw LLM | after stage 1 | R@5 | R@10 |\n|---|---|---|---|---|---|---|")
    for name, pairs in sets.items():
        after = tuned[name]
        print(
            f"| {name} | {len(pairs)} | {100 * baseline[name]:.1f} | {100 * raw[name][METRIC]:.1f} | "
            f"{100 * after[METRIC]:.1f} | {100 * after['mean_recall@5']:.1f} | {100 * after['mean_recall@10']:.1f} |"
        )


def evaluation_sets(test: Sequence[Sequence[str]], arguments: argparse.Namespace) -> dict[str, Pairs]:
    """Pairs of captions by name: those of the held-out images, and captions of other kinds and lengths."""
    sets = {
        "held-out images, caption 1 and 2": [(texts[0], texts[1]) for texts in test],
        "held-out images, two captions joined against three": [
            (". ".join(texts[:2]), ". ".join(texts[2:5])) for texts in test if len(texts) >= 5
        ],
    }
    if arguments.words:
        table = load_dataset("parquet", data_files=arguments.words, split="train").select_columns(["name", "captions"])
        pairs = ((row["name"], max(row["captions"], key=len)) for row in table)
        sets["names against lists of keywords"] = unique_pairs(pairs)[: arguments.num_test]
    if arguments.stories:
        table = load_dataset("parquet", data_files=arguments.stories, split="train").select_columns(["captions"])
        halves = (halves_of(row["captions"][0]) for row in table if row["captions"])
        sets["first and second half of a page of a story"] = unique_pairs(p for p in halves if p)[: arguments.num_test]
    return sets


def halves_of(text: str) -> tuple[str, str] | None:
    """A text cut between two sentences near its middle; nothing for a single sentence."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    middle = len(sentences) // 2
    return (" ".join(sentences[:middle]), " ".join(sentences[middle:])) if middle else None


def unique_pairs(pairs: Sequence[tuple[str, str]]) -> Pairs:
    """The pairs whose texts have not occurred before and differ."""
    seen: set[str] = set()
    kept = []
    for first, second in pairs:
        if first != second and first not in seen and second not in seen:
            seen |= {first, second}
            kept.append((first, second))
    return kept


def tfidf(pairs: Pairs) -> float:
    """CRA of cosine similarity of TF-IDF vectors of words."""
    vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b")
    vectors = vectorizer.fit_transform([text for column in zip(*pairs) for text in column]).toarray()
    # One more, tiny coordinate: a text without any word has a direction then, which nothing else shares.
    embeds = torch.nn.functional.pad(torch.from_numpy(vectors).float(), (0, 1), value=1e-6)
    return caption_retrieval_accuracy(embeds[: len(pairs)], embeds[len(pairs) :])[METRIC]


def pretrain(train: Sequence[Sequence[str]], arguments: argparse.Namespace, folder: str) -> str:
    """A small causal language model of the family, trained on single captions; the folder it is saved in."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    config = AutoConfig.for_model(
        arguments.architecture,
        vocab_size=len(tokenizer),
        hidden_size=arguments.width,
        intermediate_size=3 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **FAMILIES[arguments.architecture],
    )
    model = AutoModelForCausalLM.from_config(config)
    texts = [text for captions in train for text in captions]
    rng = random.Random(arguments.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=arguments.lm_steps, pct_start=0.1)
    model.train()
    for step in range(arguments.lm_steps):
        batch = tokenizer(
            [f"{tokenizer.eos_token}{text}{tokenizer.eos_token}" for text in rng.sample(texts, 64)],
            padding=True,
            return_tensors="pt",
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == arguments.lm_steps - 1:
            print(f"language model, step {step}: {loss.item():.2f} nats per token", flush=True)
    model.save_pretrained(f"{folder}/llm")
    tokenizer.save_pretrained(f"{folder}/llm")
    return f"{folder}/llm"


def train_stage_1(
    encoder: object,
    train: Sequence[Sequence[str]],
    sets: dict[str, Pairs],
    arguments: argparse.Namespace,
    folder: str,
) -> float:
    """Stage 1 with the recipe of the paper, its rates and lengths scaled to a model of this size; the seconds."""
    args = CaptionContrastiveTrainingArguments(
        f"{folder}/stage1",
        learning_rate=arguments.learning_rate,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size,
        warmup_steps=0.05,
        scale=arguments.scale,
        symmetric=arguments.symmetric,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        eval_strategy="epoch",
        logging_strategy="epoch",
        disable_tqdm=True,
        use_cpu=True,
        seed=arguments.seed,
    )
    pairs = CaptionPairDataset(train, seed=arguments.seed)
    evaluator = CaptionRetrievalEvaluator(next(iter(sets.values())))
    start = time.perf_counter()
    CaptionContrastiveTrainer(encoder, args, train_dataset=pairs, evaluator=evaluator).train()
    return time.perf_counter() - start


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--llm", help="folder of a trained LLM")
    source.add_argument("--architecture", choices=FAMILIES, help="family of a small LLM to train here first")
    parser.add_argument("--tokenizer", help="folder of the tokenizer, with --architecture")
    parser.add_argument("--words", help="table with the columns `name` and `captions`")
    parser.add_argument("--stories", help="table with the column `captions`")
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lm-steps", type=int, default=400)
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--scale", type=float, default=50.0)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.architecture and not arguments.tokenizer:
        parser.error("--architecture needs --tokenizer")
    return arguments


if __name__ == "__main__":
    main()
