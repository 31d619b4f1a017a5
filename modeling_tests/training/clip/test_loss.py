# SPDX-License-Identifier: Apache-2.0
"""
The loss of stage 2: without the bias where it has none, without a square of logits, alike in evaluation, and without
the negatives that are known to be false.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from clip_training import KnownPairs, Pairs, arguments, clip_text_tower, softmax_loss, stack, trainer_for
from process_groups import in_two_processes
from torch.utils._python_dispatch import TorchDispatchMode

from llm2clip_hf.data import ImageTextCollator
from llm2clip_hf.ops import contrastive_torch
from llm2clip_hf.training import LLM2CLIPTrainer, LLM2CLIPTrainingArguments


def test_softmax_objective_of_a_model_with_a_logit_bias_leaves_the_bias_alone(tmp_path):
    model = tiny_models.model("clip", text=None, logit_bias_init_value=-3.0)
    trainer = trainer_for(model, tmp_path, loss_type="softmax")
    batch = stack([Pairs()[i] for i in range(7)])
    image = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    text = model.get_text_features(llm_embeds=batch["llm_embeds"]).pooler_output
    expected = softmax_loss(image, text, model.logit_scale)
    torch.testing.assert_close(trainer.compute_loss(model, batch).double(), expected, atol=1e-5, rtol=0)
    trainer.train()
    assert model.logit_bias.item() == -3.0
    assert "logit_bias" not in {n for group in trainer.optimizer.param_groups for n in group["parameter_names"]}


@pytest.mark.parametrize("options", [{}, {"encoder_chunk_size": 4}, {"gradient_accumulation_steps": 3}])
def test_no_square_of_logits_is_made(tmp_path, options):
    squares: list[str] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and tuple(result.shape) == (67, 67):
                squares.append(str(function))
            return result

    model = tiny_models.model("clip", text=None)
    trainer = trainer_for(model, tmp_path, **options)
    trainer.contrastive_loss = lambda images, texts, scale, bias: (images * texts).sum() * scale
    trainer.contrastive_loss.loss_type = "softmax"
    batch = stack([Pairs(67)[i] for i in range(67)])
    with Watching():
        trainer.compute_loss(model, batch).backward()
    assert squares == []
    assert model.text_adapter.projection.weight.grad.abs().max() > 0
    with Watching(), torch.no_grad():
        model(pixel_values=batch["pixel_values"], llm_embeds=batch["llm_embeds"])
    assert squares  # what is not made above


def test_loss_of_the_evaluation_is_that_of_a_training_batch_by_default(tmp_path):
    model, rows = tiny_models.model("clip", text=None), Pairs(15)
    args = arguments(tmp_path, per_device_train_batch_size=15, per_device_eval_batch_size=None)
    trainer = LLM2CLIPTrainer(model, args, data_collator=stack, train_dataset=rows, eval_dataset=rows)
    expected = trainer.compute_loss(model.eval(), stack([rows[i] for i in range(15)])).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


# -------------------------------------------------------------------------------------- false negatives and weights


def known_loss(image: torch.Tensor, text: torch.Tensor, batch: dict[str, torch.Tensor], scale: Any, bias: Any) -> Any:
    """The loss in dense fp64 logits, a mean by weight without pairs that agree in an id; and the number of these."""
    image, text = (F.normalize(each.double(), dim=1) for each in (image, text))
    wrong = torch.zeros(len(image), len(image), dtype=torch.bool)
    for name in ("image_id", "text_id"):
        if name in batch:
            wrong |= batch[name][:, None] == batch[name][None]
    wrong.fill_diagonal_(False)
    logits = scale.double() * image @ text.T
    if bias is None:
        logits = logits.masked_fill(wrong, -torch.inf)
        losses = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()) / 2
    else:
        sign = 2 * torch.eye(len(image), dtype=torch.float64) - 1
        losses = -F.logsigmoid(sign * (logits + bias.double())).masked_fill(wrong, 0).sum(1)
    weight = batch.get("weight", torch.ones(len(image))).double()
    return (losses * weight).sum() / weight.sum(), int(wrong.sum())


@pytest.mark.parametrize("entries", [("image_id",), ("text_id",), ("image_id", "text_id"), ("image_id", "weight")])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_false_negatives_and_weights_are_those_of_the_dense_formula(tmp_path, entries, sigmoid):
    model = tiny_models.model("clip", **({"logit_bias_init_value": -3.0} if sigmoid else {}))
    for text, options in (
        ("llm_embeds", {}),
        ("input_ids", {"encoder_chunk_size": 4}),
        ("llm_embeds", {"loss_exchange": "ring", "loss_compute_dtype": "float32"}),
    ):
        rows = KnownPairs(17, text)
        batch = stack([rows[i] for i in range(17)])
        batch = {n: v for n, v in batch.items() if n in entries or n not in ("image_id", "text_id", "weight")}
        trainer = trainer_for(model, tmp_path, **options)
        image = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
        names = ("llm_embeds", "input_ids", "attention_mask")
        words = model.get_text_features(**{n: batch[n] for n in names if n in batch}).pooler_output
        bias = model.logit_bias if sigmoid else None
        expected, count = known_loss(image, words, batch, model.logit_scale.exp(), bias)
        parameters = [p for p in model.parameters() if p.requires_grad]
        exact = torch.autograd.grad(expected, parameters, allow_unused=True)
        loss = trainer.compute_loss(model, dict(batch))
        torch.testing.assert_close(loss.double(), expected, atol=2e-6, rtol=2e-6)
        for ours, theirs in zip(torch.autograd.grad(loss, parameters, allow_unused=True), exact):
            if theirs is not None:
                assert (ours - theirs).norm() <= 2e-5 * theirs.norm() + 1e-7
        assert count > 0 and trainer._masked == count
        blind = trainer_for(model, tmp_path, mask_false_negatives=False, **options)
        unmasked, _ = known_loss(
            image, words, {n: v for n, v in batch.items() if n == "weight"}, model.logit_scale.exp(), bias
        )
        torch.testing.assert_close(blind.compute_loss(model, dict(batch)).double(), unmasked, atol=2e-6, rtol=2e-6)
        assert abs(unmasked - expected) > 0.01 and blind._masked is None


def train_known(folder: Path, world: int, dataset: Any = KnownPairs, **options: Any) -> dict[str, torch.Tensor]:
    """Weights after steps of 16 rows on all processes together, and the false negatives that were logged."""
    sigmoid, collator = options.pop("sigmoid", False), options.pop("collator", stack)
    model = tiny_models.model("clip", None, **({"logit_bias_init_value": -3.0} if sigmoid else {}))
    accumulated, resume = options.get("gradient_accumulation_steps", 1), options.pop("resume", None)
    options = {"learning_rate": 1e-2, "optim": "sgd", "max_steps": 20, "logging_steps": 5} | options
    args = arguments(folder, per_device_train_batch_size=16 // world // accumulated, **options)
    parts = {"clip_text_model": clip_text_tower()} if args.integration != "replace" else {}
    trainer = LLM2CLIPTrainer(model, args, data_collator=collator, train_dataset=dataset(100), **parts)
    trainer.train(resume_from_checkpoint=resume)
    log = [e["false_negatives_masked"] for e in trainer.state.log_history if "false_negatives_masked" in e]
    return dict(model.state_dict()) | {"log": torch.tensor(log)}


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_chunk_size": 3, "sigmoid": True},
        {"gradient_accumulation_steps": 4, "loss_exchange": "ring"},
        {"collator": ImageTextCollator(), "gradient_accumulation_steps": 2},
    ],
    ids=["sigmoid", "ring", "collator"],
)
def test_two_processes_that_accumulate_leave_out_what_one_batch_leaves_out(tmp_path, options):
    expected = train_known(tmp_path / "one", 1, sigmoid=options.get("sigmoid", False))
    assert (expected["log"] > 100).all() and len(expected["log"]) == 4
    first, second = in_two_processes(partial(train_known, tmp_path / "two", 2, **options))
    for name, tensor in expected.items():
        assert (first[name] == second[name]).all(), name
        torch.testing.assert_close(torch.from_numpy(first[name]), tensor, atol=1e-5, rtol=0, msg=name)


def test_resumed_run_leaves_out_the_same_to_the_bit(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10, "optim": "adamw_torch"}
    whole = train_known(tmp_path, 1, **options)
    resumed = train_known(tmp_path, 1, resume=str(tmp_path / "checkpoint-5"), **options)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert whole["log"].dtype == torch.int64


class UniquePairs(KnownPairs):
    """Pairs with ids of which none is another's, and no weights."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index) | {"image_id": index, "text_id": 10**6 - index}
        del row["weight"]
        return row


@pytest.mark.parametrize("sigmoid", [False, True])
def test_twenty_steps_without_repetitions_are_those_without_ids(tmp_path, sigmoid):
    expected = train_known(tmp_path, 1, Pairs, sigmoid=sigmoid)
    assert len(expected.pop("log")) == 0
    found = train_known(tmp_path, 1, UniquePairs, sigmoid=sigmoid)
    assert found.pop("log").tolist() == [0] * 4
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=name)


def test_rows_of_a_data_set_are_known_by_file_and_caption(tmp_path):
    from PIL import Image

    from llm2clip_hf.data import CenterCropTransform, ImageTextDataset

    images = [Image.new("RGB", (40, 33), color) for color in ("red", "green", "blue", "red", "white", "black")]
    captions = ["a boat", "grass", "the sea", "a ship", "grass", "night"]
    dataset = ImageTextDataset(images, captions, transform=CenterCropTransform(tiny_models.IMAGE_SIZE))
    args = arguments(tmp_path, per_device_train_batch_size=6, max_steps=2)
    trainer = LLM2CLIPTrainer(
        tiny_models.model("clip"), args, train_dataset=dataset, processing_class=tiny_models.processor()
    )
    trainer.train()
    # Images 0 and 3, captions 1 and 4, each in both directions.
    assert [e["false_negatives_masked"] for e in trainer.state.log_history if "loss" in e] == [4, 4]


@pytest.mark.parametrize("name", ["auto", "float16", "bfloat16", "float32"])
def test_matrix_products_of_the_loss_have_the_type_of_the_option_whatever_autocast_says(tmp_path, monkeypatch, name):
    seen: list[torch.dtype] = []
    operand = contrastive_torch.operand
    monkeypatch.setattr(contrastive_torch, "operand", lambda x, compute: seen.append(compute) or operand(x, compute))
    trainer = trainer_for(tiny_models.model("clip", None), tmp_path, bf16=True, max_steps=1, loss_compute_dtype=name)
    trainer.train()
    assert set(seen) == {torch.float32 if name == "auto" else getattr(torch, name)}  # "auto" on a CPU


def test_options_of_the_loss_are_checked_and_reach_it(tmp_path):
    def made(**options: Any) -> LLM2CLIPTrainingArguments:
        return arguments(tmp_path, **options)

    assert made().mask_false_negatives and not made(label_smoothing_factor=0.1).mask_false_negatives
    with pytest.raises(ValueError, match="`label_smoothing_factor=0.1` gives every pair .* Set one of the two"):
        made(label_smoothing_factor=0.1, mask_false_negatives=True)
    with pytest.raises(ValueError, match="`loss_exchange` must be one of 'gather', 'ring', got 'star'"):
        made(loss_exchange="star")
    with pytest.raises(ValueError, match="`loss_compute_dtype` must be one of 'auto', .* got 'int8'"):
        made(loss_compute_dtype="int8")
    trainer = trainer_for(
        tiny_models.model("clip", None), tmp_path, loss_exchange="ring", loss_compute_dtype="float16"
    )
    assert (trainer.contrastive_loss.ring, trainer.contrastive_loss.compute_dtype) == (True, torch.float16)
    batch = stack([KnownPairs()[i] for i in range(5)])
    batch["weight"][3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"weights, images or .* of rows \[3\] are not finite"):
        trainer.compute_loss(trainer.model, batch)
