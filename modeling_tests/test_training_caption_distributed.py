# SPDX-License-Identifier: Apache-2.0
"""Two processes train stage 1 like one process with the whole batch: masks, hard negatives, recomputation, sources."""

import os
from pathlib import Path

import datasets
import pytest
import tiny_models
import torch
from test_training_caption_contrastive import CAPTIONS
from test_training_distributed import COMMON, in_two_processes
from test_training_single_source import Stream, Texts
from transformers import AutoModel

from llm2clip_hf.data import CaptionPairDataset
from llm2clip_hf.training import (
    CaptionContrastiveTrainer,
    CaptionContrastiveTrainingArguments,
    build_caption_encoder,
)


def repeated_captions() -> datasets.Dataset:
    """Captions with repeated texts, images with several rows, and negatives that are someone's positive."""
    return datasets.Dataset.from_dict(
        {
            "anchor": [CAPTIONS[i % 9][0] for i in range(24)],
            "positive": [CAPTIONS[(i * 5) % 7][1] + " by the sea" * (i % 4) for i in range(24)],
            "negative": [CAPTIONS[(i * 3) % 7][1] for i in range(24)],
            "label": [i % 5 for i in range(24)],
        }
    )


def mixed_sources() -> dict:
    return {
        "captions": CaptionPairDataset(CAPTIONS, seed=1),
        "texts": Texts("text", 13, "find the text: ", negatives=True),
        "small": Texts("small", 7),
    }


SETS = {"repeated": repeated_captions, "mixed": mixed_sources, "stream": lambda: Stream(17)}


def train(folder: Path, world: int, kind: str, options: dict) -> dict[str, torch.Tensor]:
    llm = folder / f"llm{os.getpid()}"
    torch.manual_seed(5)
    AutoModel.from_config(tiny_models.text_config("llama")).save_pretrained(llm)
    tiny_models.llama3_tokenizer().save_pretrained(llm)
    encoder = build_caption_encoder(str(llm), lora=None)
    common = COMMON | {"max_steps": 4, "warmup_steps": 0, "scale": 20.0, "activation_checkpointing": False}
    args = CaptionContrastiveTrainingArguments(
        str(folder), per_device_train_batch_size=6 // world, **(common | options)
    )
    CaptionContrastiveTrainer(encoder, args, SETS[kind]()).train()
    return encoder.llm.state_dict()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("repeated", {"symmetric": True}),
        ("repeated", {"mini_batch_tokens": 50, "activation_checkpointing": True}),
        ("mixed", {}),
        ("stream", {"mini_batch_size": 2}),
    ],
)
def test_two_processes_train_like_one(tmp_path, kind, options):
    whole = {name: tensor.clone() for name, tensor in train(tmp_path, 1, kind, options).items()}
    first, second = in_two_processes(train, tmp_path, 2, kind, options)
    untrained = AutoModel.from_pretrained(next(tmp_path.glob("llm*"))).state_dict()
    moved = max((whole[name] - tensor).abs().max().item() for name, tensor in untrained.items())
    assert moved > 1e-3
    for name, tensor in whole.items():
        assert (first[name] == second[name]).all(), name
        torch.testing.assert_close(torch.from_numpy(first[name]), tensor, atol=2e-3 * moved, rtol=0, msg=name)
