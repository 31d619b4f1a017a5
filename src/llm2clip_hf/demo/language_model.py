# SPDX-License-Identifier: Apache-2.0
"""
Stage 0 of the demo: a small Llama becomes an ordinary causal language model, from text alone.

It plays the part of the pretrained LLM of the paper, which knows several languages before LLM2CLIP touches it. Its
corpus is captions of all wordings and languages, one at a time, and lines of a dictionary; no image takes part.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .captions import WORDINGS, caption, dictionary_line, glossary
from .scenes import Scene


SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>")
MAX_LENGTH = 128
_DICTIONARY_SHARE = 0.3


def corpus_text(scenes: Sequence[Scene], rng: random.Random) -> str:
    """One text of the corpus: a caption of a random scene in a random wording, or a line of the dictionary."""
    if rng.random() < _DICTIONARY_SHARE:
        return dictionary_line(rng)
    return caption(rng.choice(scenes), rng.choice(WORDINGS), backwards=rng.random() < 0.5)


def build_tokenizer(scenes: Sequence[Scene]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, which wraps every text in `<s>` and `</s>`."""
    splitter = pre_tokenizers.Whitespace()
    texts = [caption(scene, wording, backwards=b) for scene in scenes for wording in WORDINGS for b in (False, True)]
    texts += [term for entry in glossary() for term in entry] + ["= ; ."]
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="right",
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_language_model(tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, num_layers: int) -> LlamaForCausalLM:
    """An untrained Llama."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Tied embeddings would make words that can stand for each other, such as two digits, nearly equal on input.
        tie_word_embeddings=False,
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config)


def pretrain_language_model(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    draw_text: Callable[[random.Random], str],
    output_dir: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Next-token training with AdamW and a one-cycle schedule; saves model and tokenizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    rng = random.Random(f"corpus-{seed}")
    progress = tqdm(range(steps), desc="language model")
    model.train()
    for _ in progress:
        batch = tokenizer([draw_text(rng) for _ in range(batch_size)], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
