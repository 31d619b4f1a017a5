# SPDX-License-Identifier: Apache-2.0
"""Stage 2 on several processes: DDP and FSDP2 train like one process, evaluators share their work."""

import json
import os
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
from clip_training import ClipPairs, Pairs, arguments, clip_text_tower, stack
from PIL import Image
from process_groups import in_two_processes
from transformers import EarlyStoppingCallback, TrainerCallback

from llm2clip_hf import LLM2CLIPModel
from llm2clip_hf.evaluation import evaluate_retrieval
from llm2clip_hf.evaluation.metrics import retrieval_metrics
from llm2clip_hf.training import LLM2CLIPTrainer, LLM2CLIPTrainingArguments, load_concatenated_text_head
from llm2clip_hf.training.clip.evaluation import run_evaluators


EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
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
    "options",
    [
        {"text": "input_ids", "encoder_chunk_size": 3},
        {"gradient_accumulation_steps": 4},
        {"max_steps": 3},
        {"max_steps": 3, "integration": "concatenated", "encoder_chunk_size": 3},
    ],
)
def test_two_processes_train_like_one(tmp_path, options):
    one_pass = ("encoder_chunk_size", "gradient_accumulation_steps")
    expected = train(tmp_path, 1, **{name: value for name, value in options.items() if name not in one_pass})
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


# --------------------------------------------------------------------------------------------------------- evaluation


IMAGES = [Image.linear_gradient("L").resize((40, 33)).convert("RGB").rotate(40 * turn) for turn in range(7)]


def train_with_evaluators(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Training with an evaluator that differs between processes, and with one that shares its work among them."""
    calls: list[bool] = []
    captions = [Pairs().embeds[2 * row : 2 * row + 2] for row in range(len(IMAGES))]

    def differing(model: Any, processor: Any) -> dict[str, float]:
        calls.append(model.training or torch.is_grad_enabled())
        return {"value": 0.25 + int(os.environ.get("RANK", 0))}

    def shared(model: Any, processor: Any) -> dict[str, float]:
        # Batches that two processes share unequally.
        return evaluate_retrieval(model, IMAGES, captions, processor=processor, batch_size=3)

    model = tiny_models.model("clip", None)
    size = 8 // int(os.environ.get("WORLD_SIZE", 1))
    args = arguments(
        folder, per_device_train_batch_size=size, max_steps=3, eval_strategy="steps", eval_steps=1, eval_on_start=True,
        optim="sgd", learning_rate=1e-2, **options,
    )  # fmt: skip
    if args.fsdp:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = LLM2CLIPTrainer(
        model, args, data_collator=stack, train_dataset=Pairs(24), processing_class=tiny_models.processor(),
        evaluators={"differing": differing, "shared": shared},
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    found = run_evaluators(trainer, {"shared": shared})["shared"]  # as the verb measures after training
    logged = [entry["eval_differing_value"] for entry in trainer.state.log_history if "eval_differing_value" in entry]
    ranks = [e["eval_shared_text_to_image_mean_rank"] for e in trainer.state.log_history if "eval_shared_" in str(e)]
    return {
        "calls": torch.tensor(calls),
        "values": torch.tensor(logged),
        "ranks": torch.tensor([*ranks, found["text_to_image_mean_rank"]]),
    }


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_evaluators_run_on_all_processes_which_share_the_work_and_get_the_same_numbers(tmp_path, sharded):
    expected = train_with_evaluators(tmp_path / "one")
    results = in_two_processes(partial(train_with_evaluators, tmp_path / "two", **(FSDP if sharded else {})))
    for result in results:
        assert result["calls"].tolist() == [False] * 4
        assert result["values"].tolist() == [0.25] * 4
        assert result["ranks"].tolist() == expected["ranks"].tolist()
    assert len(expected["ranks"]) == 5
    for one, two in zip(*(LLM2CLIPModel.from_pretrained(tmp_path / n / "saved").parameters() for n in ("one", "two"))):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def fail_on_one_process(folder: Path) -> dict[str, torch.Tensor]:
    def evaluator(model: Any, processor: Any) -> dict[str, float]:
        if int(os.environ["RANK"]):
            raise OSError("no such image")
        return {"value": 1.0}

    trainer = LLM2CLIPTrainer(
        tiny_models.model("clip", None), arguments(folder), data_collator=stack, train_dataset=Pairs(24),
        evaluators={"ours": evaluator},
    )  # fmt: skip
    message = r"failed on process 1: OSError\('no such image'\)|^no such image$"
    with pytest.raises((RuntimeError, OSError), match=message):
        trainer.evaluate()
    return {}


def test_evaluator_that_fails_on_one_process_stops_all(tmp_path):
    in_two_processes(fail_on_one_process, tmp_path)


def test_callbacks_hear_of_an_evaluation_once_with_all_metrics(tmp_path):
    heard: list[set[str]] = []

    class Hearing(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            heard.append(set(metrics))

    def trainer_with(evaluation: Any, metric: str, folder: str) -> LLM2CLIPTrainer:
        args = arguments(
            tmp_path / folder, num_train_epochs=8, learning_rate=0.0, eval_strategy="epoch", save_strategy="epoch",
            load_best_model_at_end=True, metric_for_best_model=metric, greater_is_better=False, save_total_limit=1,
        )  # fmt: skip
        return LLM2CLIPTrainer(
            tiny_models.model("clip", None), args, data_collator=stack, train_dataset=Pairs(10),
            eval_dataset=evaluation, evaluators={"ours": lambda model, processor: {"value": 0.5}},
            callbacks=[EarlyStoppingCallback(early_stopping_patience=2), Hearing()],
        )  # fmt: skip

    for evaluation, metric, names in (
        (Pairs(7), "eval_loss", {"eval_loss", "eval_ours_value"}),
        (Pairs(7), "eval_ours_value", {"eval_loss", "eval_ours_value"}),
        ({"a": Pairs(7), "b": Pairs(6)}, "eval_ours_value", {"eval_a_loss", "eval_b_loss", "eval_ours_value"}),
        (None, "eval_ours_value", {"eval_ours_value"}),
    ):
        heard.clear()
        trainer = trainer_with(evaluation, metric, f"{len(names)}{metric}")
        trainer.train()
        assert trainer.state.epoch == 3  # the first is the best, and two are waited for
        assert len(heard) == 3
        assert all(names <= metrics for metrics in heard)


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
