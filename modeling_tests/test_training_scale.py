# SPDX-License-Identifier: Apache-2.0
"""Stage 2 on several processes: DDP and FSDP2 train like one process, streams are read once, evaluators run once."""

import io
import json
import multiprocessing
import os
import socket
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from PIL import Image
from test_training_clip_modes import ClipPairs, clip_text_tower
from test_training_clip_trainer import Pairs, arguments, stack
from test_training_distributed import in_two_processes, run_rank

from llm2clip_hf import LLM2CLIPModel
from llm2clip_hf.data import ImageTextStream, RandomResizedCropTransform
from llm2clip_hf.evaluation import evaluate_retrieval
from llm2clip_hf.evaluation.metrics import retrieval_metrics
from llm2clip_hf.training import LLM2CLIPTrainer, LLM2CLIPTrainingArguments, load_concatenated_text_head
from llm2clip_hf.training.streams import EndlessStream


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}


def train(folder: Path, world: int, text: str = "llm_embeds", **options: Any) -> dict[str, torch.Tensor]:
    """Weights after steps of 16 rows on all processes together."""
    accumulated = options.get("gradient_accumulation_steps", 1)
    model = tiny_models.model("clip", "llama" if text == "input_ids" else None)
    resume = options.pop("resume", None)
    options = {"learning_rate": 1e-2, "optim": "sgd", "max_steps": 20} | options
    args = arguments(folder, per_device_train_batch_size=16 // world // accumulated, **options)
    if args.fsdp:
        # accelerate gives FSDP to processes with accelerators only.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    parts: dict[str, Any] = {"train_dataset": Pairs(100, text=text)}
    if args.integration != "replace":
        parts = {"train_dataset": ClipPairs(100), "clip_text_model": clip_text_tower()}
    trainer = LLM2CLIPTrainer(model, args, data_collator=stack, **parts)
    trainer.train(resume_from_checkpoint=resume)
    if not args.fsdp:
        return model.state_dict()
    assert type(trainer.model).__name__.startswith("FSDP")
    state = trainer.accelerator.get_state_dict(trainer.model)
    return state or {"no weights on this process": torch.zeros(())}


@pytest.mark.parametrize(
    "options", [{"text": "input_ids", "encoder_chunk_size": 3}, {"gradient_accumulation_steps": 4}]
)
def test_two_processes_train_like_one_for_twenty_steps(tmp_path, options):
    expected = train(tmp_path, 1, text=options.get("text", "llm_embeds"))
    first, second = in_two_processes(partial(train, tmp_path, 2, **options))
    for name, tensor in expected.items():
        assert (first[name] == second[name]).all(), name
        torch.testing.assert_close(torch.from_numpy(first[name]), tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "train_vision": "lora", "vision_lora": {"lora_dropout": 0.0}},
        {"text": "input_ids", "encoder_chunk_size": 3},
        {"integration": "concatenated"},
    ],
)
def test_fsdp2_trains_like_one_process_and_saves_and_resumes(tmp_path, options):
    # A large epsilon, so that rounding in gradients next to zero does not become the size of a step.
    steps: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    steps |= {"adam_epsilon": 0.1}
    single = {name: value for name, value in options.items() if name != "gradient_accumulation_steps"}
    expected = {name: tensor.clone() for name, tensor in train(tmp_path / "one", 1, **steps, **single).items()}
    first, _ = in_two_processes(partial(train, tmp_path / "two", 2, **steps, **options, **FSDP))
    for name, tensor in expected.items():
        torch.testing.assert_close(torch.from_numpy(first[name]), tensor, atol=1e-5, rtol=0, msg=name)
    folder = tmp_path / "two" / "checkpoint-4"
    assert (folder / "modeling_llm2clip.py").is_file()
    saved, plain = (LLM2CLIPModel.from_pretrained(f) for f in (folder, tmp_path / "one" / "checkpoint-4"))
    for (name, one), two in zip(saved.named_parameters(), plain.parameters()):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0, msg=name)
    if "integration" in options:
        trained = torch.from_numpy(first["concatenated_text_head.weight"])
        torch.testing.assert_close(load_concatenated_text_head(folder).weight, trained, atol=0, rtol=0)
    again = {"resume": str(tmp_path / "two" / "checkpoint-2")}
    resumed, _ = in_two_processes(partial(train, tmp_path / "again", 2, **steps, **options, **FSDP, **again))
    for name in expected:
        torch.testing.assert_close(torch.from_numpy(resumed[name]), torch.from_numpy(first[name]), msg=name)


# ------------------------------------------------------------------------------------------------------------ streams


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


def in_two_processes_with_workers(function: Any, *arguments: Any) -> list[dict[str, Any]]:
    """As `in_two_processes`; its processes are daemons, which cannot start the workers of a loader."""
    port, context = free_port(), multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=run_rank, args=(rank, port, queue, function, arguments)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    results = dict(queue.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=30)
    assert not [result for result in results.values() if isinstance(result, str)], results
    return [results[0], results[1]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_that_shards_itself_is_read_once_by_its_own_processes(tmp_path, workers):
    results = in_two_processes_with_workers(train_on_stream, tmp_path, workers)
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
        trainer = LLM2CLIPTrainer(model, args, train_dataset=stream, processing_class=tiny_models.processor())
        assert trainer.train(resume_from_checkpoint=resume).global_step == 8
        return list(model.parameters())

    whole = run("whole")
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-6"))  # after two of the four steps of an epoch
    assert all(torch.equal(one, two) for one, two in zip(whole, resumed))
    assert workers or len(decoded) <= 10


def test_plain_streams_are_not_dispatched_by_the_first_process(tmp_path):
    assert arguments(tmp_path).accelerator_config.dispatch_batches is False
    given = arguments(tmp_path, accelerator_config={"dispatch_batches": True})
    assert given.accelerator_config.dispatch_batches is True


# --------------------------------------------------------------------------------------------------------- evaluation


def train_with_evaluators(folder: Path) -> dict[str, torch.Tensor]:
    calls: list[bool] = []

    def evaluator(model: Any, processor: Any) -> dict[str, float]:
        calls.append(model.training or torch.is_grad_enabled())
        return {"value": 0.25 + int(os.environ["RANK"])}

    model = tiny_models.model("clip", None)
    args = arguments(folder, per_device_train_batch_size=4, max_steps=3, eval_strategy="steps", eval_steps=1)
    trainer = LLM2CLIPTrainer(
        model, args, data_collator=stack, train_dataset=Pairs(24), evaluators={"ours": evaluator}
    )
    trainer.train()
    logged = [entry["eval_ours_value"] for entry in trainer.state.log_history if "eval_ours_value" in entry]
    metric = trainer.evaluate()["eval_ours_value"]
    return {"calls": torch.tensor(calls), "values": torch.tensor([*logged, metric])}


def test_evaluators_run_on_one_process_and_all_get_the_numbers(tmp_path):
    first, second = in_two_processes(train_with_evaluators, tmp_path)
    assert first["calls"].tolist() == [False] * 4
    assert second["calls"].size == 0
    assert first["values"].tolist() == second["values"].tolist() == [0.25] * 4


def test_best_model_is_that_of_an_evaluator_on_a_set_with_several_captions(tmp_path):
    data = Pairs(24)
    captions = [data.embeds[2 * i : 2 * i + 2] for i in range(6)]
    calls: list[dict[str, float]] = []

    def evaluator(model: Any, processor: Any) -> dict[str, float]:
        assert processor == "processor"
        with torch.no_grad():
            images = model(pixel_values=data.images[:6]).image_embeds
            texts = model(llm_embeds=torch.cat(captions)).text_embeds
        owners = torch.arange(12) // 2
        margin = (images @ texts.T)[owners, torch.arange(12)].mean() - (images @ texts.T).mean()
        calls.append(retrieval_metrics(images, texts, owners) | {"margin": float(margin) * len(calls)})
        return calls[-1]

    class Processor(str):
        def save_pretrained(self, folder: Any) -> None: ...

    model = tiny_models.model("clip", None)
    args = arguments(
        tmp_path, eval_strategy="epoch", save_strategy="epoch", num_train_epochs=4, load_best_model_at_end=True,
        metric_for_best_model="multi_margin", learning_rate=1e-2,
    )  # fmt: skip
    trainer = LLM2CLIPTrainer(
        model, args, data_collator=stack, train_dataset=data, eval_dataset=Pairs(7), evaluators={"multi": evaluator},
        processing_class=Processor("processor"),
    )  # fmt: skip
    trainer.train()
    best = max(range(4), key=lambda call: calls[call]["margin"])
    assert trainer.state.best_metric == calls[best]["margin"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{4 * (best + 1)}")
    reloaded = LLM2CLIPModel.from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), reloaded.parameters()))
    metrics = trainer.evaluate()
    assert metrics["eval_multi_image_to_text_recall@1"] == calls[best]["image_to_text_recall@1"]
    assert {"eval_image_to_text_recall@1", "eval_loss"} <= metrics.keys()
    assert "eval_multi_margin" not in trainer.evaluate(Pairs(7))


def test_evaluator_measures_retrieval_on_real_images_and_refuses_other_results(tmp_path):
    model, processor = tiny_models.model("clip"), tiny_models.processor()
    images = [Image.new("RGB", (40, 33), color) for color in ("red", "green", "blue")]
    captions = [["a red boat", "it is red"], ["grass"], ["the sea", "a blue sea", "water"]]
    flickr = partial(measure, images=images, captions=captions)
    trainer = LLM2CLIPTrainer(
        model, arguments(tmp_path), train_dataset=Pairs(), processing_class=processor, evaluators={"flickr": flickr}
    )
    expected = evaluate_retrieval(model.eval(), images, captions, processor=processor)
    assert trainer.evaluate() == {f"eval_flickr_{name}": value for name, value in expected.items()}
    trainer.evaluators = {"flickr": lambda model, processor: 0.5}
    with pytest.raises(ValueError, match="must return a mapping from names to numbers"):
        trainer.evaluate()


def measure(model: Any, processor: Any, images: Any, captions: Any) -> dict[str, float]:
    return evaluate_retrieval(model, images, captions, processor=processor)


def test_launcher_configs_are_valid():
    for name in ("accelerate_ddp.yaml", "accelerate_fsdp2.yaml"):
        content = yaml.safe_load((EXAMPLES / name).read_text())
        config = load_config_from_file(str(EXAMPLES / name))
        assert config.num_processes == content["num_processes"]
    fsdp = yaml.safe_load((EXAMPLES / "accelerate_fsdp2.yaml").read_text())["fsdp_config"]
    assert fsdp["fsdp_version"] == 2
    zero = json.loads((EXAMPLES / "deepspeed_zero2.json").read_text())
    assert zero["zero_optimization"]["stage"] == 2
    defaults = LLM2CLIPTrainingArguments.__dataclass_fields__
    assert zero["gradient_clipping"] in ("auto", defaults["max_grad_norm"].default)
    assert "optimizer" not in zero and "scheduler" not in zero  # the trainer makes its own groups
