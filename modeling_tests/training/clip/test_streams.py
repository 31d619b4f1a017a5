# SPDX-License-Identifier: Apache-2.0
"""Stage 2 on streams of shards: read once by all processes, resumed in their order or not at all, whole batches."""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from clip_training import Pairs, arguments, stack
from PIL import Image
from process_groups import in_two_processes

from llm2clip_hf.data import ImageTextCollator, ImageTextStream, RandomResizedCropTransform
from llm2clip_hf.training import LLM2CLIPTrainer
from llm2clip_hf.training.streams import EndlessStream


class Shards(torch.utils.data.IterableDataset):
    """Rows in five shards, which it shares out among processes and workers; notes what each process reads."""

    shards_itself = True

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.rows, self.folder, self.rank, self.world, self.epoch = Pairs(40), folder, rank, world, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for shard in range(5)[self.rank * workers + number :: self.world * workers]:
            for row in range(8 * shard, 8 * shard + 8):
                with open(self.folder / f"read-{self.rank}-{number}", "a") as file:
                    file.write(f"{self.epoch} {row}\n")
                yield self.rows[row]


def train_on_stream(folder: Path, workers: int) -> dict[str, torch.Tensor]:
    stream = Shards(folder, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    trained: list[int] = []

    class Noting(LLM2CLIPTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *others: Any) -> torch.Tensor:
            trained.extend(inputs["index"].tolist())
            return super().training_step(model, inputs, *others)

    args = arguments(folder, per_device_train_batch_size=4, max_steps=8, dataloader_num_workers=workers)
    Noting(tiny_models.model("clip", None), args, data_collator=stack, train_dataset=stream).train()
    return {"trained": torch.tensor(trained)}


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_that_shards_itself_is_read_once_by_its_own_processes(tmp_path, workers):
    results = in_two_processes(train_on_stream, tmp_path, workers)
    first_pass: list[int] = []
    for rank, result in enumerate(results):
        rows = [
            [int(n) for n in line.split()]
            for file in tmp_path.glob(f"read-{rank}-*")
            for line in file.read_text().splitlines()
        ]
        mine = [row for epoch, row in rows if epoch == 0]
        first_pass += mine
        # One process has 24 rows and the other 16, which goes on with its next pass earlier: nobody waits.
        trained = result["trained"].tolist()
        assert len(trained) == 32
        assert set(trained) <= set(mine)
        if workers == 0:
            assert sorted(trained[: len(mine)]) == sorted(mine)
    assert sorted(first_pass) == list(range(40))


def test_endless_stream_announces_each_pass_and_ends_without_rows(tmp_path):
    stream = Shards(tmp_path, 0, 1)
    rows = iter(EndlessStream(stream))
    seen = [next(rows)["index"] for _ in range(90)]
    assert seen == [*range(40), *range(40), *range(10)]
    assert stream.epoch == 2
    assert list(EndlessStream(Shards(tmp_path, 7, 8))) == []
    args = arguments(tmp_path, max_steps=1)
    trainer = LLM2CLIPTrainer(
        tiny_models.model("clip", None), args, data_collator=stack, train_dataset=Shards(tmp_path, 7, 8)
    )
    with pytest.raises(ValueError, match="gave process 0 no rows"):
        trainer.train()
    with pytest.raises(ValueError, match="cannot be evaluated on"):
        trainer.evaluate(Shards(tmp_path, 0, 1))


class StrictCollator(ImageTextCollator):
    """A collator as users write them, which expects samples."""

    def __call__(self, samples: Any) -> dict[str, Any]:
        assert all("text" in sample for sample in samples)
        return super().__call__(samples)


def write_shards(folder: Path) -> str:
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for row in range(9):
                image = io.BytesIO()
                Image.linear_gradient("L").resize((40, 37)).rotate(9 * row + 90 * shard).save(image, "PNG")
                for name, content in (("png", image.getvalue()), ("txt", f"a {row} boat {shard}".encode())):
                    member = tarfile.TarInfo(f"{shard}{row}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "{0..1}.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_of_the_package_trains_by_epochs_and_resumes_without_decoding_again(tmp_path, workers):
    shards = write_shards(tmp_path / "shards")
    decoded: list[int] = []
    crop = RandomResizedCropTransform(tiny_models.IMAGE_SIZE)

    def transform(image: Any, generator: torch.Generator) -> torch.Tensor:
        decoded.append(1)
        return crop(image, generator)

    def run(folder: str, resume: str | None = None) -> list[torch.Tensor]:
        decoded.clear()
        stream = ImageTextStream(shards, {"real": "txt"}, transform=transform, shuffle_buffer=4)
        args = arguments(
            tmp_path / folder, per_device_train_batch_size=4, num_train_epochs=2, save_strategy="steps", save_steps=6,
            dataloader_num_workers=workers,
        )  # fmt: skip
        model = tiny_models.model("clip", adapter_dropout=0.2)
        collator = StrictCollator(tiny_models.processor())
        trainer = LLM2CLIPTrainer(model, args, data_collator=collator, train_dataset=stream)
        assert trainer.train(resume_from_checkpoint=resume).global_step == 8
        return list(model.parameters())

    whole = run("whole")
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-6"))  # after two of the four steps of an epoch
    assert all(torch.equal(one, two) for one, two in zip(whole, resumed))
    assert workers or len(decoded) <= 10


def stream_trainer(folder: Path, shards: str, batches: list[list[int]], **options: Any) -> LLM2CLIPTrainer:
    """A trainer on a stream that notes the rows of each contrastive batch."""

    class Noting(LLM2CLIPTrainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *others: Any, **kwargs: Any) -> Any:
            parts = [*self._held_batches, inputs]
            batches.append([row for part in parts for row in part["index"].tolist()])
            return super().compute_loss(model, inputs, *others, **kwargs)

    stream_options = {name: options.pop(name) for name in ("seed", "shuffle_buffer") if name in options}
    crop = RandomResizedCropTransform(tiny_models.IMAGE_SIZE)
    stream = ImageTextStream(shards, {"real": "txt"}, transform=crop, **({"shuffle_buffer": 4} | stream_options))
    options = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2} | options
    args = arguments(folder, **options)
    processor = tiny_models.processor()
    return Noting(tiny_models.model("clip"), args, train_dataset=stream, processing_class=processor)


def test_stream_is_not_resumed_in_another_order(tmp_path):
    shards = write_shards(tmp_path / "shards")
    seen: list[list[int]] = []
    stream_trainer(tmp_path / "run", shards, seen).train()  # two epochs of four steps
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    for changed, message in (
        ({"dataloader_num_workers": 2}, "`dataloader_num_workers` was 1 and is 2"),
        ({"per_device_train_batch_size": 3}, "`per_device_train_batch_size` was 4 and is 3"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` was 1 and is 2"),
        ({"seed": 3}, "'seed': .0, 3."),
        ({"shuffle_buffer": 5}, "'shuffle_buffer': .4, 5."),
    ):
        with pytest.raises(ValueError, match=message):
            stream_trainer(tmp_path / "a", shards, [], **changed).train(resume_from_checkpoint=checkpoint)
    saved = json.loads((Path(checkpoint) / "stream_state.json").read_text())
    assert saved["processes"] == 1
    (Path(checkpoint) / "stream_state.json").write_text(json.dumps(saved | {"processes": 2}))
    with pytest.raises(ValueError, match="`processes` was 2 and is 1.*`ignore_data_skip=True`"):
        stream_trainer(tmp_path / "a", shards, []).train(resume_from_checkpoint=checkpoint)
    # Not where nothing is left to go on with, and not between epochs.
    stream_trainer(tmp_path / "a", shards, [], ignore_data_skip=True).train(resume_from_checkpoint=checkpoint)
    again: list[list[int]] = []
    between = str(tmp_path / "run" / "checkpoint-4")
    stream_trainer(tmp_path / "a", shards, again, dataloader_num_workers=2).train(resume_from_checkpoint=between)
    assert len({row for batch in again for row in batch}) == 16


def test_every_contrastive_batch_of_a_stream_is_whole(tmp_path):
    shards = write_shards(tmp_path / "shards")  # 18 rows
    options = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}
    batches: list[list[int]] = []
    trainer = stream_trainer(tmp_path / "a", shards, batches, num_train_epochs=3, **options)
    assert trainer.train().global_step == 9
    assert [len(batch) for batch in batches] == [6] * 9
    batches.clear()
    options |= {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}
    trainer = stream_trainer(tmp_path / "b", shards, batches, num_train_epochs=2, **options)
    assert trainer.train().global_step == 2
    assert [len(set(batch)) for batch in batches] == [10, 10]
    assert trainer.state.log_history[-1]["epoch"] == 2


def test_batch_size_is_found_for_a_stream_and_for_a_table(tmp_path):
    sizes: list[int] = []

    class Small(LLM2CLIPTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *others: Any) -> torch.Tensor:
            sizes.append(len(inputs["index"]))
            if len(inputs["index"]) > 5:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().training_step(model, inputs, *others)

    crop = RandomResizedCropTransform(tiny_models.IMAGE_SIZE)
    stream = ImageTextStream(write_shards(tmp_path / "shards"), {"real": "txt"}, transform=crop, shuffle_buffer=4)
    args = arguments(
        tmp_path, per_device_train_batch_size=7, auto_find_batch_size=True, num_train_epochs=1,
        gradient_accumulation_steps=2, accumulate_negatives=False,
    )  # fmt: skip
    model = tiny_models.model("clip")
    Small(model, args, train_dataset=stream, processing_class=tiny_models.processor()).train()
    assert sizes == [7, 6, 5, 5, 5]
    sizes.clear()
    args.accumulate_negatives = True
    trainer = Small(tiny_models.model("clip", None), args, data_collator=stack, train_dataset=Pairs(21))
    trainer._train_batch_size = 5
    assert trainer.set_initial_training_values(args, trainer.get_train_dataloader())[1] == 2  # 4 batches of 5


def test_plain_streams_are_not_dispatched_by_the_first_process(tmp_path):
    assert arguments(tmp_path).accelerator_config.dispatch_batches is False
    given = arguments(tmp_path, accelerator_config={"dispatch_batches": True})
    assert given.accelerator_config.dispatch_batches is True
