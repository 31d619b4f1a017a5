# SPDX-License-Identifier: Apache-2.0
"""Two processes with half the batch each train exactly like one process with the whole batch, in both stages."""

import os
from pathlib import Path

import datasets
import pytest
import tiny_models
import torch
from caption_training import CAPTIONS, WORDS
from clip_training import ClipPairs, Pairs, clip_text_tower, stack
from process_groups import COMMON, in_two_processes

from llm2clip_hf.training import (
    CaptionContrastiveTrainer,
    CaptionContrastiveTrainingArguments,
    LLM2CLIPTrainer,
    LLM2CLIPTrainingArguments,
    build_caption_encoder,
)


def train_clip(folder: Path, world: int, chunk: int | None) -> dict[str, torch.Tensor]:
    model = tiny_models.model("clip", text=None)
    model.requires_grad_(True)
    args = LLM2CLIPTrainingArguments(
        str(folder), **COMMON, per_device_train_batch_size=8 // world, encoder_chunk_size=chunk
    )
    LLM2CLIPTrainer(model, args, data_collator=stack, train_dataset=Pairs(26)).train()
    return model.state_dict()


def train_clip_with_head(folder: Path, world: int, chunk: int | None) -> dict[str, torch.Tensor]:
    model = tiny_models.model("clip", text=None)
    args = LLM2CLIPTrainingArguments(
        str(folder), **COMMON, per_device_train_batch_size=8 // world, encoder_chunk_size=chunk,
        integration="concatenated",
    )  # fmt: skip
    LLM2CLIPTrainer(
        model, args, data_collator=stack, train_dataset=ClipPairs(26), clip_text_model=clip_text_tower()
    ).train()
    return model.state_dict()


def train_captions(folder: Path, world: int, mini_batch_size: int | None) -> dict[str, torch.Tensor]:
    llm = folder / f"llm{os.getpid()}"
    torch.manual_seed(5)
    from transformers import AutoModel

    AutoModel.from_config(tiny_models.text_config("llama")).save_pretrained(llm)
    tiny_models.llama3_tokenizer().save_pretrained(llm)
    encoder = build_caption_encoder(str(llm), lora=None)
    args = CaptionContrastiveTrainingArguments(
        str(folder),
        **COMMON,
        per_device_train_batch_size=6 // world,
        warmup_steps=0,
        mini_batch_size=mini_batch_size,
        activation_checkpointing=False,
    )
    columns = {"anchor": [c[0] for c in CAPTIONS], "positive": [c[1] for c in CAPTIONS]}
    columns["negative"] = [f"{WORDS[i % 14]} thing" for i in range(len(CAPTIONS))]
    CaptionContrastiveTrainer(encoder, args, datasets.Dataset.from_dict(columns)).train()
    return encoder.llm.state_dict()


@pytest.mark.parametrize(
    ("train", "chunk"),
    [(train_clip, None), (train_clip, 3), (train_clip_with_head, 3), (train_captions, None)],
)
def test_two_processes_train_like_one(tmp_path, train, chunk):
    expected = {name: tensor.clone() for name, tensor in train(tmp_path, 1, None).items()}
    first, second = in_two_processes(train, tmp_path, 2, chunk)
    for name, tensor in expected.items():
        assert (first[name] == second[name]).all(), name
        torch.testing.assert_close(torch.from_numpy(first[name]), tensor, atol=2e-5, rtol=0, msg=name)
