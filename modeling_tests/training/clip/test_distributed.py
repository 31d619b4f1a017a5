# SPDX-License-Identifier: Apache-2.0
"""Two processes with half the batch each train exactly like one process with the whole batch, in both stages."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_models
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from modeling_tests.training.captions.test_contrastive import CAPTIONS, WORDS
from modeling_tests.training.clip.test_modes import ClipPairs, clip_text_tower
from modeling_tests.training.clip.test_trainer import Pairs, stack

from llm2clip_hf.training import (
    CaptionContrastiveTrainer,
    CaptionContrastiveTrainingArguments,
    LLM2CLIPTrainer,
    LLM2CLIPTrainingArguments,
    build_caption_encoder,
)


COMMON = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


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


def run_rank(rank: int, port: int, queue: Any, train: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()  # inherited from the parent process, where it says: one process
    try:
        weights = train(*arguments)
        queue.put((rank, {name: tensor.numpy() for name, tensor in weights.items()}))
    except BaseException:
        queue.put((rank, traceback.format_exc()))
        raise
    finally:
        torch.distributed.destroy_process_group()


def in_two_processes(train: Callable[..., Any], *arguments: Any) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=run_rank, args=(r, port, queue, train, arguments), daemon=True) for r in (0, 1)]
    for process in ranks:
        process.start()
    results = dict(queue.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=30)
    for result in results.values():
        assert not isinstance(result, str), result
    return [results[0], results[1]]


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
