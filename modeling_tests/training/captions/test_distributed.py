# SPDX-License-Identifier: Apache-2.0
"""
Two processes train stage 1 like one process with the whole batch: masks, hard negatives, recomputation, sources; they
evaluate and save like one, and refuse what they could not save.
"""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_models
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from caption_training import CAPTIONS, Stream, Texts
from process_groups import COMMON, in_two_processes
from tiny_data import write_training_files
from transformers import AutoModel

from llm2clip_hf.cli import train_captions, train_clip
from llm2clip_hf.cli.train_captions import TrainCaptionsOptions, load_sources, train_and_save
from llm2clip_hf.data import CaptionPairDataset
from llm2clip_hf.training import (
    CaptionContrastiveTrainer,
    CaptionContrastiveTrainingArguments,
    LLM2CLIPTrainer,
    MNTPTrainer,
    MNTPTrainingArguments,
    build_caption_encoder,
)
from llm2clip_hf.training.run_checks import check_settings


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


# ----------------------------------------------------------------------------------------------- evaluation and saving


def evaluate(folder: Path, world: int) -> dict[str, torch.Tensor]:
    rows = datasets.Dataset.from_dict({name: repeated_captions()[name][:13] for name in ("anchor", "positive")})
    common = COMMON | {"scale": 20.0, "dataloader_drop_last": True}
    args = CaptionContrastiveTrainingArguments(str(folder), per_device_eval_batch_size=8 // world, **common)
    encoder = build_caption_encoder(str(folder / "llm"), lora=None)
    loss = CaptionContrastiveTrainer(encoder, args, eval_dataset=rows).evaluate()["eval_loss"]
    return {"loss": torch.tensor(loss)}


@pytest.mark.slow
def test_two_processes_evaluate_all_rows_like_one(tmp_path):
    write_training_files(tmp_path)
    expected = evaluate(tmp_path, 1)["loss"].item()
    for result in in_two_processes(evaluate, tmp_path, 2):
        assert result["loss"] == pytest.approx(expected, rel=1e-4)


FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}


def run_verb(folder: Path, fsdp: bool) -> dict[str, torch.Tensor]:
    """`llm2clip train-captions`, from its options on; under FSDP, what it says."""
    options = TrainCaptionsOptions(
        llm=str(folder / "llm"), captions=str(folder / "captions.jsonl"), num_test_images=4, lora_r=4,
        mntp_steps=0 if fsdp else 1,
    )  # fmt: skip
    common = COMMON | {"warmup_steps": 0} | (FSDP if fsdp else {})
    args = CaptionContrastiveTrainingArguments(str(folder / "out"), per_device_train_batch_size=3, **common)
    train, test = load_sources(options, args.seed)
    if not fsdp:
        return {"status": torch.tensor(train_and_save(options, args, train, test, None))}
    pretend_accelerators()
    with pytest.raises(ValueError) as info:
        train_and_save(options, args, train, test, None)
    return {"message": as_tensor(info.value)}


def make_mntp_trainer(folder: Path) -> dict[str, torch.Tensor]:
    names = ("report_to", "use_cpu", "disable_tqdm")
    args = MNTPTrainingArguments(str(folder / "mntp"), **{name: COMMON[name] for name in names}, **FSDP)
    pretend_accelerators()
    with pytest.raises(ValueError) as info:
        MNTPTrainer(str(folder / "llm"), args, ["a red boat on the sea"] * 9)
    return {"message": as_tensor(info.value)}


def start_without_use_cpu(folder: Path) -> dict[str, torch.Tensor]:
    """As by torchrun on a machine without a GPU: each process would be the first one, and save."""
    os.environ.pop("ACCELERATE_USE_CPU")
    with pytest.raises(ValueError) as info:
        check_settings(CaptionContrastiveTrainingArguments(str(folder / "out"), report_to="none"))
    with pytest.raises(ValueError, match=r"^2 processes were started"):
        MNTPTrainer(str(folder / "llm"), MNTPTrainingArguments(str(folder / "mntp")), ["a red boat"])
    return {"message": as_tensor(info.value)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="processes find one another on GPUs")
def test_processes_that_would_train_apart_are_refused(tmp_path):
    for result in in_two_processes(start_without_use_cpu, tmp_path):
        message = bytes(result["message"].tolist()).decode()
        assert message.startswith("2 processes were started, but on this machine each of them would train by itself")
        assert "`--use_cpu True`" in message


def pretend_accelerators() -> None:
    """accelerate gives FSDP to processes with accelerators only."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def as_tensor(error: Any) -> torch.Tensor:
    return torch.tensor(list(str(error).encode()))


class Started(Exception):
    """A run has built its model."""


def weights_at_the_start(folder: Path, verb: str) -> dict[str, torch.Tensor]:
    """The trained weights of a verb as its trainer gets them, in a process that has drawn numbers of its own."""

    def stop(self: Any, **kwargs: Any) -> None:
        raise Started({name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad})

    torch.manual_seed(os.getpid())
    trainer: Any = CaptionContrastiveTrainer if verb == "train-captions" else LLM2CLIPTrainer
    trainer.train = stop
    options = {
        "train-captions": [
            "--llm",
            f"{folder}/llm",
            "--captions",
            f"{folder}/captions.jsonl",
            "--num_test_images",
            "0",
        ],
        "train-clip": ["--vision_model", f"{folder}/vision", "--text_model", f"{folder}/llm", "--data"]
        + [f"{folder}/train.parquet", "--text_mode", "online", "--train_vision", "lora"],
    }
    common = ["--output_dir", f"{folder}/out", "--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True"]
    common += ["--per_device_train_batch_size", "3"]
    run = (train_captions if verb == "train-captions" else train_clip).run
    with pytest.raises(Started) as info:
        run([*options[verb], *common])
    return info.value.args[0]


@pytest.mark.parametrize("verb", ["train-captions", "train-clip"])
def test_two_processes_start_from_equal_weights(tmp_path, verb):
    write_training_files(tmp_path)
    first, second = in_two_processes(weights_at_the_start, tmp_path, verb)
    drawn = [name for name in first if "lora_A" in name or "text_adapter" in name]
    assert drawn
    for name in first:
        assert (first[name] == second[name]).all(), name


@pytest.mark.slow
def test_two_processes_measure_and_save(tmp_path):
    write_training_files(tmp_path)
    results = in_two_processes(run_verb, tmp_path, False)
    assert [int(result["status"]) for result in results] == [0, 0]
    measured = json.loads((tmp_path / "out" / "results.json").read_text())
    assert measured["before"].keys() == measured["after"].keys()
    assert AutoModel.from_pretrained(tmp_path / "out").config.is_causal is False


@pytest.mark.slow
@pytest.mark.parametrize(("function", "arguments"), [(run_verb, (True,)), (make_mntp_trainer, ())])
def test_fsdp_is_refused_before_the_first_step(tmp_path, function, arguments):
    write_training_files(tmp_path)
    for result in in_two_processes(function, tmp_path, *arguments):
        message = bytes(result["message"].tolist()).decode()
        assert message.startswith("FSDP spreads the weights of the LLM over processes, and ")
        assert "Start it with DistributedDataParallel" in message
    assert not list(tmp_path.glob("out/*"))
