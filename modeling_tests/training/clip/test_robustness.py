# SPDX-License-Identifier: Apache-2.0
"""Stage 2 when things go wrong: kills, full disks, NaN, and data that does not belong to the model."""

import errno
import json
import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers.trainer
from clip_training import Pairs, arguments, stack
from PIL import Image
from transformers import AutoModel, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from llm2clip_hf import LLM2CLIPModel
from llm2clip_hf.cli.main import main
from llm2clip_hf.data import ImageTextDataset, RandomResizedCropTransform, embed_captions, embedding_fingerprint
from llm2clip_hf.hub import LLM2CLIPModelCardData
from llm2clip_hf.training import LLM2CLIPTrainer


COLOURS = ("red", "green", "blue", "white", "black", "gray", "brown", "pink", "navy", "olive", "teal")
CAPTIONS = {"real": [f"a {c} boat" for c in COLOURS], "dense": [f"a photo of a {c} boat on the sea" for c in COLOURS]}


def trainer_for(model: Any, folder: Path, dataset: Any = None, **kwargs: Any) -> LLM2CLIPTrainer:
    extra = {name: kwargs.pop(name) for name in ("processing_class", "eval_dataset") if name in kwargs}
    args = arguments(folder, **kwargs)
    return LLM2CLIPTrainer(model, args, data_collator=stack, train_dataset=dataset or Pairs(), **extra)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return LLM2CLIPModel.from_pretrained(folder, load_text_model=False).state_dict()


# -------------------------------------------------------------------------------------------------------------- kills


class KilledTrainer(LLM2CLIPTrainer):
    """Dies without a word in the middle of a step, or of a checkpoint whose model has been written."""

    die_in_step, die_in_save = 0, 0

    def training_step(self, *inputs: Any) -> torch.Tensor:
        if self.state.global_step + 1 == self.die_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*inputs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.state.global_step == self.die_in_save:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(output_dir)


def train_augmented(folder: Path, workers: int, die: dict[str, int], resume: bool) -> None:
    torch.set_num_threads(1)
    images = [Image.linear_gradient("L").resize((41, 37)).convert("RGB").rotate(7 * i) for i in range(11)]
    dataset = ImageTextDataset(images, CAPTIONS, transform=RandomResizedCropTransform(tiny_models.IMAGE_SIZE), seed=5)
    model = tiny_models.model("clip", adapter_dropout=0.2)
    args = arguments(
        folder, per_device_train_batch_size=4, num_train_epochs=4, save_strategy="steps", save_steps=2,
        dataloader_num_workers=workers,
    )  # fmt: skip
    trainer = KilledTrainer(model, args, train_dataset=dataset, processing_class=tiny_models.processor())
    for name, step in die.items():
        setattr(trainer, name, step)
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(str(folder / "final"))


def in_a_process(*arguments: Any) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=train_augmented, args=arguments)
    process.start()
    process.join(timeout=120)
    return process.exitcode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "die", "last"), [(0, {"die_in_step": 6}, 4), (2, {"die_in_step": 4}, 2), (0, {"die_in_save": 4}, 2)]
)
def test_killed_run_resumes_to_the_same_bits(tmp_path, workers, die, last):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_a_process(whole, workers, {}, False) == 0
    assert in_a_process(killed, workers, die, False) == -signal.SIGKILL
    assert get_last_checkpoint(str(killed)) == str(killed / f"checkpoint-{last}")
    leftovers = [path.name for path in killed.glob(".unfinished-*")]
    assert leftovers == ([".unfinished-checkpoint-4"] if "die_in_save" in die else [])
    assert in_a_process(killed, workers, {}, True) == 0
    assert not list(killed.glob(".unfinished-*"))
    expected, resumed = weights(whole / "final"), weights(killed / "final")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    start = tiny_models.model("clip").state_dict()
    assert any(not torch.equal(start[name], tensor) for name, tensor in expected.items())


# --------------------------------------------------------------------------------------------------------- full disks


def disk_full(*arguments: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["weights", "optimizer", "state", "rename"])
def test_full_disk_leaves_the_last_checkpoint_and_no_half_one(tmp_path, monkeypatch, what):
    class FullLater(LLM2CLIPTrainer):
        def _save_checkpoint(self, *inputs: Any) -> None:
            if self.state.global_step == 4:
                if what == "weights":

                    def half(tensors: Any, filename: Any, *others: Any, **kwargs: Any) -> None:
                        Path(filename).write_bytes(b"\x00" * 100)
                        disk_full()

                    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", half)
                elif what == "optimizer":
                    monkeypatch.setattr(transformers.trainer.torch, "save", disk_full)
                elif what == "state":
                    monkeypatch.setattr(type(self.state), "save_to_json", disk_full)
                else:
                    monkeypatch.setattr(os, "fsync", disk_full)
            super()._save_checkpoint(*inputs)

    def run(trainer_class: type[LLM2CLIPTrainer], resume: bool) -> LLM2CLIPModel:
        model = tiny_models.model("clip", None)
        args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=6)
        trainer = trainer_class(model, args, data_collator=stack, train_dataset=Pairs())
        trainer.train(resume_from_checkpoint=resume or None)
        return model

    with monkeypatch.context():
        with pytest.raises(OSError, match="No space left"):
            run(FullLater, False)
    monkeypatch.undo()
    last = get_last_checkpoint(str(tmp_path))
    assert last == str(tmp_path / "checkpoint-2")
    assert len(weights(last)) > 20
    resumed = run(LLM2CLIPTrainer, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in (2, 4, 6)]
    whole = tiny_models.model("clip", None)
    trainer_for(whole, tmp_path / "whole", max_steps=6).train()
    assert all(torch.equal(one, two) for one, two in zip(resumed.parameters(), whole.parameters()))


def test_checkpoint_is_that_of_the_trainer_and_replaces_an_older_one(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "save_total_limit": 1}
    for seed in (0, 1):  # a second run into the same folder
        model = tiny_models.model("clip", None, seed=seed)
        trainer_for(model, tmp_path, processing_class=tiny_models.processor(), **options).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    folder = tmp_path / "checkpoint-4"
    assert torch.equal(weights(folder)["logit_scale"], model.logit_scale)
    assert {
        *("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
        *("training_args.bin", "processor_config.json", "tokenizer.json", "modeling_llm2clip.py"),
    } <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 4


def test_folder_without_its_pickles_is_a_complete_model(tmp_path):
    model = tiny_models.model("clip")
    model.config.text_base_model = "some/llm"
    dataset = Pairs(text="input_ids")
    trainer_for(model, tmp_path, dataset, save_strategy="steps", save_steps=2, max_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    for pattern in ("*.pt", "*.pth", "*.bin"):
        for file in folder.glob(pattern):
            file.unlink()
    reloaded = AutoModel.from_pretrained(folder, load_text_model=False)
    assert reloaded.text_model is None
    batch = {"pixel_values": dataset.images[:3], "llm_embeds": dataset.embeds[:3]}
    with torch.no_grad():
        expected = model.eval()(**batch).logits_per_image
        torch.testing.assert_close(reloaded.eval()(**batch).logits_per_image, expected)


def test_finished_run_records_how_it_was_trained_in_text(tmp_path):
    model = tiny_models.model("clip", None)
    trainer = trainer_for(
        model, tmp_path / "run", Pairs(20), learning_rate=3e-4, seed=11, num_train_epochs=2, hub_token="hf_secret",
        save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True, vision_layer_decay=0.7,
        eval_dataset=Pairs(6), gradient_accumulation_steps=2, per_device_train_batch_size=5, run_name="private-name",
    )  # fmt: skip
    trainer.save_model(str(tmp_path / "untrained"))
    assert not (tmp_path / "untrained" / "trainer_state.json").exists()
    trainer.train()
    folder = tmp_path / "model"
    trainer.save_model(str(folder))
    texts = [(folder / name).read_text() for name in ("trainer_state.json", "training_args.json")]
    state, options = map(json.loads, texts)
    assert options["learning_rate"] == 3e-4
    assert (options["seed"], options["vision_layer_decay"], options["num_train_epochs"]) == (11, 0.7, 2)
    assert options["lr_scheduler_type"] == "cosine"
    rows = options["per_device_train_batch_size"], options["gradient_accumulation_steps"], options["world_size"]
    assert rows == (5, 2, 1)
    assert state["global_step"] == 4
    assert re.fullmatch(r"checkpoint-\d", state["best_model_checkpoint"])
    for text in texts:
        assert not any(word in text for word in (str(tmp_path), "hf_secret", "private-name", "cpu"))
    assert TrainerState.load_from_json(str(folder / "trainer_state.json")).log_history == trainer.state.log_history
    # The card from the folder has the training section of the card from the trainer.
    card = str(LLM2CLIPModelCardData.from_folder(folder))
    expected = str(LLM2CLIPModelCardData.from_trainer(trainer, model.config))
    section = re.search(r"## Training\n.*?(?=\n## )", expected, re.DOTALL)
    assert section.group() in card
    for row in ("| `learning_rate` | 0.0003 |", "| `seed` | 11 |", "| `rows per step` | 10 |", "| `steps` | 4 |"):
        assert row in section.group()
    assert main(["card", str(folder)]) == 0
    assert "| `vision_layer_decay` | 0.7 |" in (folder / "README.md").read_text()


def test_nan_names_step_and_keys_and_leaves_a_loadable_checkpoint(tmp_path):
    class Keyed(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            row = super().__getitem__(index)
            row["key"] = f"shard-{row.pop('index')}"
            return row

    dataset, model = Keyed(20), tiny_models.model("clip", None)
    args = arguments(
        tmp_path, save_strategy="steps", save_steps=1, train_sampling_strategy="sequential",
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    dataset.broken = 11
    trainer = LLM2CLIPTrainer(model, args, train_dataset=dataset)
    with pytest.raises(FloatingPointError, match=r"at step 3 .*rows \['shard-11'\] are not finite.*those of step 2"):
        trainer.train()
    last = get_last_checkpoint(str(tmp_path))
    assert last == str(tmp_path / "checkpoint-2")
    saved = weights(last)
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


# ----------------------------------------------------------------------------------------------------------- the data


def store_of(folder: Path, width: int = tiny_models.TEXT_WIDTH, fingerprint: dict[str, Any] | None = None) -> Any:
    return embed_captions(
        lambda texts: torch.ones(len(texts), width), CAPTIONS, folder, fingerprint=fingerprint or {"llm": "ones"},
        show_progress=False,
    )  # fmt: skip


def dataset_of(store: Any) -> ImageTextDataset:
    images = [Image.new("RGB", (40, 33), colour) for colour in COLOURS]
    return ImageTextDataset(images, store=store, transform=RandomResizedCropTransform(tiny_models.IMAGE_SIZE))


def test_stores_that_do_not_belong_to_the_model_are_refused(tmp_path):
    fitting = dataset_of(store_of(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"have width 7, the model takes 32"):
        trainer_for(tiny_models.model("clip", None), tmp_path, dataset_of(store_of(tmp_path / "b", 7)))
    evaluation = {"one": dataset_of(store_of(tmp_path / "b", 7))}
    with pytest.raises(ValueError, match=r"have width 7"):
        trainer_for(tiny_models.model("clip", None), tmp_path, fitting, eval_dataset=evaluation)
    other = dataset_of(store_of(tmp_path / "c", fingerprint={"llm": "twos"}))
    mixed = torch.utils.data.ConcatDataset([fitting, torch.utils.data.Subset(other, [0, 1])])
    with pytest.raises(ValueError, match=r"`llm`: store 'twos', expected 'ones'.*Embed all captions with one LLM"):
        trainer_for(tiny_models.model("clip", None), tmp_path, mixed)


def test_what_made_the_embeddings_is_recorded_and_compared_later(tmp_path):
    model = tiny_models.model("clip", None)
    trainer = trainer_for(model, tmp_path / "one", dataset_of(store_of(tmp_path / "a")), max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = LLM2CLIPModel.from_pretrained(tmp_path / "saved")
    other = dataset_of(store_of(tmp_path / "b", fingerprint={"llm": "twos", "max_length": 7}))
    with pytest.raises(ValueError, match=r"than the one that the model was trained with .*: `llm`"):
        trainer_for(again, tmp_path, other)
    trainer_for(again, tmp_path, dataset_of(store_of(tmp_path / "a")))
    again.config.text_fingerprint = None
    trainer_for(again, tmp_path, other)
    assert again.config.text_fingerprint == {"llm": "twos", "max_length": 7}


def test_store_of_another_llm_or_template_than_the_model_holds_is_refused(tmp_path):
    model, processor = tiny_models.model("clip"), tiny_models.processor()
    prefix = model.config.text_prefix_length

    def dataset(name: str, llm: Any, tokenizer: Any, text_prefix_length: int) -> ImageTextDataset:
        fingerprint = embedding_fingerprint(llm, tokenizer, text_prefix_length=text_prefix_length, max_length=9)
        return dataset_of(store_of(tmp_path / name, fingerprint=fingerprint))

    right = dataset("a", model.text_model, processor.tokenizer, prefix)
    trainer_for(model, tmp_path, right, processing_class=processor)
    model.config.text_fingerprint = None
    other = tiny_models.model("clip", seed=3).text_model
    for name, case, key in (
        ("b", (other, processor.tokenizer, prefix), "weights_sha256"),
        ("c", (model.text_model, tiny_models.llama3_tokenizer(), prefix), "tokenizer_sha256"),
        ("d", (model.text_model, processor.tokenizer, prefix + 1), "text_prefix_length"),
    ):
        with pytest.raises(ValueError, match=rf"another text encoder than the model: `{key}`"):
            trainer_for(model, tmp_path, dataset(name, *case), processing_class=processor)


def test_batches_that_cannot_train_are_refused_before_the_first_step(tmp_path):
    model = tiny_models.model("clip", None)
    with pytest.raises(ValueError, match="A contrastive batch of one row has no negatives"):
        trainer_for(model, tmp_path, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="no negatives"):
        trainer_for(
            model, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, accumulate_negatives=False
        )
    trainer_for(model, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="The batch has token ids, but the model holds no LLM"):
        trainer_for(model, tmp_path, Pairs(text="input_ids")).train()
    narrow = Pairs()
    narrow.embeds = narrow.embeds[:, :5]
    with pytest.raises(ValueError, match="`llm_embeds` has width 5, the model takes 32"):
        trainer_for(model, tmp_path, narrow).train()
    trainer = trainer_for(model, tmp_path)
    with pytest.raises(ValueError, match="either `llm_embeds` or `input_ids`"):
        trainer.compute_loss(model, {"pixel_values": torch.ones(2, 3, 30, 30)})
    batch_norms = tiny_models.model("mobilenet_v2", text=None)
    with pytest.raises(ValueError, match="`gradient_accumulation_steps` cannot be used with trained batch norms"):
        trainer_for(batch_norms, tmp_path, gradient_accumulation_steps=2)
    trainer_for(batch_norms, tmp_path, gradient_accumulation_steps=2, accumulate_negatives=False)
