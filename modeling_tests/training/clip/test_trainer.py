# SPDX-License-Identifier: Apache-2.0
"""Stage 2: the objective is the formula, only what should move moves, chunks and resume are exact."""

import json
import math
import sys
import types
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from clip_training import Pairs, arguments, clip_baseline, softmax_loss, stack, trainer_for
from PIL import Image
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, CLIPModel, SiglipConfig, SiglipModel, TrainingArguments

from llm2clip_hf import LLM2CLIPModel
from llm2clip_hf.data import CenterCropTransform, ImageTextDataset
from llm2clip_hf.training import LLM2CLIPTrainer, LLM2CLIPTrainingArguments
from llm2clip_hf.training.clip.trainer import LogitScaleClamp
from llm2clip_hf.training.gradcache import split_rows


TEXTS = ["a red boat", "two dogs run", "people in a street", "green grass", "ein rotes Boot auf dem Meer"]


# ------------------------------------------------------------------------------------------------------ the objective


def test_softmax_objective_equals_the_formula(tmp_path):
    model = tiny_models.model("clip", adapter_num_layers=1)
    batch = stack([Pairs()[i] for i in range(7)])
    loss, outputs = trainer_for(model, tmp_path).compute_loss(model, batch, return_outputs=True)
    image = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    text = model.get_text_features(llm_embeds=batch["llm_embeds"]).pooler_output
    torch.testing.assert_close(loss.double(), softmax_loss(image, text, model.logit_scale), atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs["image_embeds"], F.normalize(image, dim=1))


def test_sigmoid_objective_follows_the_config_and_equals_the_formula(tmp_path):
    model = tiny_models.model("clip", text=None, logit_bias_init_value=-3.0)
    trainer = trainer_for(model, tmp_path)
    batch = stack([Pairs()[i] for i in range(7)])
    image = F.normalize(model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output.double(), dim=1)
    text = F.normalize(model.get_text_features(llm_embeds=batch["llm_embeds"]).pooler_output.double(), dim=1)
    logits = model.logit_scale.exp() * image @ text.T + model.logit_bias
    signs = 2 * torch.eye(7) - 1
    expected = (1 + (-signs * logits).exp()).log().sum() / 7
    torch.testing.assert_close(trainer.compute_loss(model, batch).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_any_model_with_the_interface_trains(tmp_path, kind):
    model = clip_baseline()
    if kind == "siglip":
        text = {"hidden_size": 24, "intermediate_size": 33, "num_hidden_layers": 2, "num_attention_heads": 3}
        text |= {"vocab_size": 99, "projection_size": 24}
        model = SiglipModel(SiglipConfig(vision_config=tiny_models.VISION["siglip"], text_config=text))
    dataset = Pairs(10, text="input_ids")
    if kind == "clip":
        dataset.ids[:, -1] = 98
        dataset.ids[:, 4] = 98
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_for(model, tmp_path, dataset, num_train_epochs=3)
    trainer.train()
    assert trainer.contrastive_loss.loss_type == {"clip": "softmax", "siglip": "sigmoid"}[kind]
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert all(name.endswith("k_proj.bias") for name in still)  # attention ignores a shift common to all keys


def test_online_llm_gives_the_loss_of_stored_embeddings(tmp_path):
    model = tiny_models.model("clip")
    ids = stack([Pairs(text="input_ids")[i] for i in range(7)])
    stored = {"pixel_values": ids["pixel_values"]}
    stored["llm_embeds"] = model.get_llm_embeds(ids["input_ids"], ids["attention_mask"])
    for chunk in (None, 3):
        trainer = trainer_for(model, tmp_path, encoder_chunk_size=chunk)
        model.train()
        torch.testing.assert_close(trainer.compute_loss(model, ids), trainer.compute_loss(model, stored))


# ------------------------------------------------------------------------------------------------- what moves and how


@pytest.mark.parametrize("text", ["llm_embeds", "input_ids"])
def test_trainable_parameters_move_and_the_llm_does_not(tmp_path, text):
    model = tiny_models.model("clip")
    model.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_for(model, tmp_path, Pairs(text=text), num_train_epochs=4, learning_rate=1e-2)
    trainer.train()
    assert not model.text_model.training
    for name, parameter in model.named_parameters():
        moved = bool((parameter != before[name]).any())
        if not name.endswith("k_proj.bias"):
            assert moved == (not name.startswith("text_model.")), name
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert trainer.state.log_history[0]["logit_scale"] == pytest.approx(math.exp(2.6592), rel=1e-2)


@pytest.mark.parametrize("chunk", [None, 2])
def test_bf16_autocast_keeps_weights_and_embeddings_in_float32(tmp_path, chunk):
    losses = []
    for bf16 in (False, True):
        model = tiny_models.model("clip", text=None)
        trainer = trainer_for(model, tmp_path, bf16=bf16, max_steps=2, encoder_chunk_size=chunk)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_accumulation_without_its_negatives_is_the_mean_of_the_losses_of_its_micro_batches(tmp_path):
    dataset = Pairs(8)
    model = tiny_models.model("clip", text=None)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_for(
        model, tmp_path, dataset, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1,
        optim="sgd", max_grad_norm=0.0, weight_decay=0.0, vision_layer_decay=1.0, lr_scheduler_type="constant",
        accumulate_negatives=False,
    )  # fmt: skip
    batches: list[dict[str, torch.Tensor]] = []
    trainer.data_collator = lambda rows: batches.append(stack(rows)) or batches[-1]
    trainer.train()
    assert [len(batch["index"]) for batch in batches] == [2, 2, 2, 2]

    reference = tiny_models.model("clip", text=None).train()
    for batch in batches:
        image = reference.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
        text = reference.get_text_features(llm_embeds=batch["llm_embeds"]).pooler_output
        (softmax_loss(image, text, reference.logit_scale) / 4).backward()
    for (name, moved), parameter in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close((start[name] - moved) / 1e-3, parameter.grad, atol=5e-3, rtol=1e-2, msg=name)


@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_chunked_gradients_equal_unchunked_ones_with_dropout(tmp_path, chunk):
    batch = stack([Pairs(text="input_ids")[i] for i in range(7)])
    gradients, losses = [], []
    for size in (None, chunk):
        model = clip_baseline().train()
        loss = trainer_for(model, tmp_path, encoder_chunk_size=size).compute_loss(model, batch)
        assert model.forward.__func__ is CLIPModel.forward
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=0)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_chunk_is_recomputed_with_the_dropout_of_its_forward_pass(tmp_path):
    model = tiny_models.model("clip", text=None, adapter_dropout=0.4).train()
    batch = stack([Pairs()[i] for i in range(7)])
    trainer = trainer_for(model, tmp_path, encoder_chunk_size=3)
    torch.manual_seed(11)
    trainer.compute_loss(model, batch).backward()
    chunked = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    torch.manual_seed(11)
    parts = [model(**rows) for rows in split_rows({k: v for k, v in batch.items() if k != "index"}, 3)]
    image, text = (torch.cat([part[name] for part in parts]) for name in ("image_embeds", "text_embeds"))
    softmax_loss(image, text, model.logit_scale).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(chunked[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_logit_scale_is_clamped_after_the_step(tmp_path):
    model = tiny_models.model("clip", text=None, max_logit_scale=20.0)
    trainer = trainer_for(model, tmp_path)
    clamps = [c for c in trainer.callback_handler.callbacks if isinstance(c, LogitScaleClamp)]
    assert [clamp.max_log for clamp in clamps] == [math.log(20.0)]
    trainer.train()
    for start, end in ((10.0, math.log(20.0)), (-1.0, 0.0), (2.0, 2.0)):
        model.logit_scale.data.fill_(start)
        trainer.callback_handler.on_optimizer_step(trainer.args, trainer.state, trainer.control)
        assert model.logit_scale.item() == pytest.approx(end)


def test_clamp_reaches_the_float32_copy_of_deepspeed(tmp_path, monkeypatch):
    copies: dict[int, torch.Tensor] = {}  # as ZeRO keeps them, apart from the model

    def set_copy(parameter: nn.Parameter, value: torch.Tensor) -> None:
        copies[id(parameter)] = value.clone()

    utils = types.ModuleType("deepspeed.utils")
    utils.safe_get_full_fp32_param = lambda parameter: copies.get(id(parameter))
    utils.safe_set_full_fp32_param = set_copy
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)
    model = tiny_models.model("clip", text=None).to(torch.bfloat16)
    clamp = LogitScaleClamp(20.0, deepspeed=True)
    for start, end in ((10.0, math.log(20.0)), (-1.0, 0.0), (2.03, 2.03)):
        model.logit_scale.data.fill_(start)
        copies[id(model.logit_scale)] = torch.tensor([start])
        clamp.on_optimizer_step(None, None, None, model=model)
        assert copies[id(model.logit_scale)].item() == pytest.approx(end)  # not rounded to bfloat16
        assert model.logit_scale.item() == pytest.approx(end, rel=1e-2)
    copies.clear()
    with pytest.raises(RuntimeError, match="out of reach without ZeRO"):
        clamp.on_optimizer_step(None, None, None, model=model)
    clamp.on_optimizer_step(None, None, None, model=model.float())  # no copy: trained itself
    monkeypatch.delitem(sys.modules, "deepspeed")  # accelerate looks for the real one
    create = LLM2CLIPTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(
        LLM2CLIPTrainer, "create_accelerator_and_postprocess",
        lambda self: (create(self), setattr(self, "is_deepspeed_enabled", True)),
    )  # fmt: skip
    trainer = trainer_for(tiny_models.model("clip", text=None), tmp_path)
    assert [c.deepspeed for c in trainer.callback_handler.callbacks if isinstance(c, LogitScaleClamp)] == [True]


def test_last_batch_of_one_row_is_refused_in_training_and_left_out_of_the_evaluation_loss(tmp_path):
    model = tiny_models.model("clip", text=None)
    options = {"dataloader_drop_last": False, "num_train_epochs": 1}
    with pytest.raises(ValueError, match="with 16 rows leaves one row for the last batch"):
        trainer_for(model, tmp_path, Pairs(16), **options).train()
    with pytest.raises(ValueError, match="with 21 rows leaves one row"):
        trainer_for(model, tmp_path, Pairs(21), gradient_accumulation_steps=4, **options).train()
    with pytest.raises(ValueError, match="with 21 rows leaves one row"):
        trainer_for(
            model, tmp_path, Pairs(21), gradient_accumulation_steps=2, accumulate_negatives=False, **options
        ).train()
    # 16 rows in steps of 10 and 6; 17 rows; a run that ends before.
    assert trainer_for(model, tmp_path, Pairs(16), gradient_accumulation_steps=2, **options).train().global_step == 2
    assert trainer_for(model, tmp_path, Pairs(17), **options).train().global_step == 4
    assert trainer_for(model, tmp_path, Pairs(16), max_steps=2, **options).train().global_step == 2
    batch = stack([Pairs(1)[0]])
    trainer = trainer_for(model, tmp_path, Pairs(17), Pairs(5))
    with pytest.raises(ValueError, match="one row, which has no negatives"):
        trainer.compute_loss(model, batch)
    first = stack([Pairs(5)[i] for i in range(4)])
    with torch.no_grad():
        expected = trainer.compute_loss(model.eval(), first).item()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert "eval_image_to_text_recall@1" in metrics
    assert "eval_loss" not in trainer.evaluate(Pairs(1))


def test_rows_that_would_be_their_own_negatives_are_refused_on_several_processes(tmp_path, monkeypatch):
    trainer = trainer_for(tiny_models.model("clip", text=None), tmp_path, Pairs(17), dataloader_drop_last=False)
    monkeypatch.setattr(LLM2CLIPTrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(
        ValueError, match="the last batch of 2 processes would be filled up to 10 with rows of the first"
    ):
        trainer.get_train_dataloader()


def test_every_epoch_is_announced_and_the_last_batch_left_out_in_training_only(tmp_path):
    train, evaluation = Pairs(19), Pairs(11)
    trainer = trainer_for(tiny_models.model("clip", text=None), tmp_path, train, evaluation, num_train_epochs=3)
    result = trainer.train()
    assert result.global_step == 9
    assert sorted(set(train.epochs)) == [0, 1, 2]
    assert train.epochs == sorted(train.epochs)
    assert trainer.predict(evaluation).label_ids.tolist() == list(range(11))
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), "evaluation", prediction_loss_only=False)
    assert output.label_ids.tolist() == list(range(11))


def test_evaluation_reports_retrieval_and_keeps_the_best_model(tmp_path):
    model = tiny_models.model("clip", text=None)
    trainer = trainer_for(
        model, tmp_path, Pairs(10), Pairs(7), eval_strategy="epoch", save_strategy="epoch", num_train_epochs=3,
        metric_for_best_model="image_to_text_recall@1", load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    history = [entry["eval_image_to_text_recall@1"] for entry in trainer.state.log_history if "eval_loss" in entry]
    metrics = trainer.evaluate()
    assert metrics["eval_image_to_text_recall@1"] == max(history)
    batch = stack([Pairs(7)[i] for i in range(7)])
    with torch.no_grad():
        outputs = model.eval()(pixel_values=batch["pixel_values"], llm_embeds=batch["llm_embeds"])
    hits = (outputs.logits_per_image.argmax(1) == torch.arange(7)).float().mean().item()
    assert metrics["eval_image_to_text_recall@1"] == pytest.approx(hits)


def test_default_collator_makes_the_batches_of_the_dataset(tmp_path):
    model = tiny_models.model("clip")
    images = [Image.new("RGB", (40, 33), color) for color in ("red", "green", "blue", "white", "black", "gray")]
    transform = CenterCropTransform(tiny_models.IMAGE_SIZE)
    dataset = ImageTextDataset(
        images, ["a red boat", "a dog", "the sea", "x", "grass", "a photo"], transform=transform
    )
    args = arguments(tmp_path, per_device_train_batch_size=3, num_train_epochs=1)
    trainer = LLM2CLIPTrainer(
        model, args, train_dataset=dataset, eval_dataset=dataset, processing_class=tiny_models.processor()
    )
    assert trainer.train().global_step == 2
    assert 0 <= trainer.evaluate()["eval_text_to_image_recall@1"] <= 1


# ------------------------------------------------------------------------------------------------- resume and folders


@pytest.mark.parametrize("stop", [2, 3])  # within an epoch of three steps, and at its end
def test_resume_gives_the_same_weights_bit_for_bit(tmp_path, stop):
    def run(folder: str, resume: str | None = None, **kwargs: Any) -> LLM2CLIPModel:
        model = tiny_models.model("clip", adapter_dropout=0.2)
        model.config.text_base_model = "some/llm"
        dataset = Pairs(17, text="input_ids")
        trainer = trainer_for(model, tmp_path / folder, dataset, save_strategy="steps", save_steps=stop, **kwargs)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run("whole")
    resumed = run("resumed", resume=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    for (name, one), two in zip(whole.named_parameters(), resumed.parameters()):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("named", [True, False])
def test_checkpoint_leaves_the_llm_out_and_loads(tmp_path, named):
    llm = AutoModel.from_config(tiny_models.text_config("llama"))
    llm.config.is_causal = False
    llm.save_pretrained(tmp_path / "llm")
    model = tiny_models.model("clip")
    model.text_model.load_state_dict(llm.state_dict())
    model.config.text_base_model = str(tmp_path / "llm") if named else None
    trainer = trainer_for(
        model, tmp_path, Pairs(text="input_ids"), save_strategy="steps", save_steps=2, max_steps=2,
        processing_class=tiny_models.processor(),
    )  # fmt: skip
    token_ids = model.config.text_config.eos_token_id
    trainer.train()
    assert model.config.text_weights == "bundled"
    assert model.config.text_config.eos_token_id == token_ids
    folder = tmp_path / "checkpoint-2"
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if name.startswith("text_model.")]
    assert json.loads((folder / "config.json").read_text())["text_weights"] == ("external" if named else "none")
    assert {"processor_config.json", "tokenizer.json", "modeling_llm2clip.py"} <= {p.name for p in folder.iterdir()}

    reloaded = LLM2CLIPModel.from_pretrained(folder)
    batch = stack([Pairs(text="input_ids")[i] for i in range(4)])
    text = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if not named:
        text = {"llm_embeds": model.get_llm_embeds(**text)}
    with torch.no_grad():
        expected = model.eval()(pixel_values=batch["pixel_values"], **text).logits_per_image
        torch.testing.assert_close(reloaded(pixel_values=batch["pixel_values"], **text).logits_per_image, expected)


def test_checkpoint_that_does_not_fit_is_refused(tmp_path):
    trainer_for(
        tiny_models.model("clip", text=None), tmp_path, save_strategy="steps", save_steps=1, max_steps=1
    ).train()
    other = tiny_models.model("clip", text=None, adapter_num_layers=3)
    with pytest.raises(ValueError, match=r"does not fit the model: missing \['text_adapter.blocks.2"):
        trainer_for(other, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# ----------------------------------------------------------------------------------------------------------- bad input


def test_nan_stops_with_step_and_row_named_and_weights_intact(tmp_path):
    dataset, model = Pairs(15), tiny_models.model("clip", text=None)
    dataset.broken = 9
    trainer = trainer_for(model, tmp_path, dataset, num_train_epochs=1, save_strategy="steps", save_steps=1)
    with pytest.raises(FloatingPointError, match=r"The loss is nan at step \d .*rows \[9\] are not finite"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_host_waits_for_the_loss_only_before_the_update(tmp_path):
    read: list[str] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten._local_scalar_dense.default:
                read.append("read")
            return function(*args, **(kwargs or {}))

    class Watched(LLM2CLIPTrainer):
        def training_step(self, *inputs: Any) -> torch.Tensor:
            with Watching():
                return super().training_step(*inputs)

    args = arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2, accumulate_negatives=False)
    trainer = Watched(tiny_models.model("clip", text=None), args, data_collator=stack, train_dataset=Pairs(31))
    assert not args.logging_nan_inf_filter  # it reads every loss
    trainer.train()
    assert read == []
    with Watching():
        trainer.compute_loss(trainer.model, stack([Pairs()[i] for i in range(5)]))
    assert len(read) == 1  # called by itself it stops at once


def test_loss_is_looked_at_before_a_backward_pass_that_updates(tmp_path):
    model, batch = tiny_models.model("clip", text=None), stack([Pairs()[i] for i in range(5)])
    batch["pixel_values"][3] = float("nan")
    for deepspeed in (False, True):
        trainer = trainer_for(model, tmp_path)
        trainer.is_deepspeed_enabled, trainer.current_gradient_accumulation_steps = deepspeed, 1
        trainer._prepare_input = lambda data: data  # of DeepSpeed's type
        if deepspeed:
            with pytest.raises(FloatingPointError, match=r"rows \[3\] are not finite"):
                trainer.training_step(model, batch)
        else:
            trainer.training_step(model, batch)
            with pytest.raises(FloatingPointError, match=r"rows \[3\] are not finite"):
                trainer._get_grad_norm(model)
        assert (model.logit_scale.grad is None) == deepspeed
        model.zero_grad()


def test_diverged_run_blames_the_weights_and_not_the_rows(tmp_path):
    model = tiny_models.model("clip", text=None)
    trainer = trainer_for(model, tmp_path, Pairs(15))
    batch = stack([Pairs()[i] for i in range(5)])
    model.train()
    weight = model.visual_projection.weight
    saved = weight.detach().clone()

    def message() -> str:
        with pytest.raises(FloatingPointError) as error:
            trainer.compute_loss(model, batch)
        return str(error.value)

    weight.data[0, 0] = float("nan")
    found = message()
    assert "1 trained parameters are not finite, first `visual_projection.weight`: the run has diverged" in found
    assert "rows" not in found
    weight.data.copy_(saved / saved.abs().max() * 3e38)  # finite, and products overflow
    found = message()
    assert "No embedding is finite, though inputs and weights are" in found
    assert "up to 3.0e+38 in `visual_projection.weight`" in found
    assert "rows" not in found
    weight.data.copy_(saved)
    # One bad image is the cause of all embeddings where the batch is normalized as a whole.
    batch["pixel_values"][2, 0, 0, 0] = float("inf")
    assert "stored embeddings of rows [2] are not finite" in message()
    batch = stack([Pairs()[i] for i in range(5)])
    model.vision_model.requires_grad_(False)
    first = next(model.vision_model.parameters())
    before, first.data = first.data, first.data * float("inf")
    assert "1 frozen parameters are not finite" in message()
    first.data = before
    batch["pixel_values"][4] *= 3e37  # finite, but not its sums
    assert "The embeddings of rows [4] are not finite, though what they were made of is" in message()


def test_run_with_an_absurd_learning_rate_is_told_to_lower_it(tmp_path):
    model = tiny_models.model("clip", text=None)
    trainer = trainer_for(model, tmp_path, learning_rate=1e36, lr_scheduler_type="constant")
    with pytest.raises(
        FloatingPointError, match="diverged.*Lower `learning_rate`|gradient norm.*Lower `learning_rate`"
    ):
        trainer.train()


def test_infinite_gradient_stops_before_the_step(tmp_path):
    model = tiny_models.model("clip", text=None)
    model.text_adapter.projection.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="The gradient norm is (inf|nan) at step 1"):
        trainer_for(model, tmp_path).train()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_settings_that_cannot_work_are_refused(tmp_path, monkeypatch):
    model = tiny_models.model("clip", text=None)
    with pytest.raises(ValueError, match="needs a logit bias"):
        trainer_for(model, tmp_path, loss_type="sigmoid")
    with pytest.raises(ValueError, match="no parameter `logit_scale`"):
        trainer_for(nn.Linear(2, 2), tmp_path)
    half = tiny_models.model("clip", text=None)
    half.vision_model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="first `vision_model"):
        trainer_for(half, tmp_path)
    with pytest.raises(ValueError, match="neither `model_init` nor `hyperparameter_search`"):
        LLM2CLIPTrainer(None, arguments(tmp_path), model_init=lambda: model, train_dataset=Pairs())
    with pytest.raises(ValueError, match="batch norms"):
        trainer_for(tiny_models.model("mobilenet_v2", text=None), tmp_path, encoder_chunk_size=2)
    with pytest.raises(ValueError, match="less than one batch of 5 rows"):
        trainer_for(model, tmp_path, Pairs(4)).train()
    with pytest.raises(ValueError, match="no `pixel_values`, only"):
        trainer_for(model, tmp_path).compute_loss(model, {"llm_embeds": torch.ones(2, 32)})
    with pytest.raises(ValueError, match="same number of rows"):
        split_rows({"a": torch.ones(2), "b": torch.ones(3)}, 1)
    monkeypatch.setattr(LLM2CLIPTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="accelerate launch"):
        trainer_for(model, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "hinge"}, "`loss_type` must be one of"),
        ({"train_vision": "some"}, "`train_vision` must be one of 'full', 'lora', 'projection', 'frozen'"),
        ({"train_text": "some"}, "`train_text` must be one of"),
        ({"integration": "some"}, "`integration` must be one of"),
        ({"vision_lora": {"r": 2}}, "`vision_lora` has no effect with `train_vision='full'`"),
        ({"text_lora": {"r": 2}}, "`text_lora` has no effect"),
        ({"vision_layer_decay": 0.0}, "`vision_layer_decay`"),
        ({"encoder_chunk_size": 0}, "`encoder_chunk_size`"),
        ({"remove_unused_columns": True}, "`remove_unused_columns=True`"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_defaults_are_the_recipe_of_the_paper(tmp_path):
    args = LLM2CLIPTrainingArguments(str(tmp_path), use_cpu=True)
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm, args.warmup_steps) == (1e-5, 0.05, 5.0, 0)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (args.lr_scheduler_type, args.num_train_epochs, args.vision_layer_decay) == ("cosine", 4, 0.85)
    assert (args.remove_unused_columns, args.bf16) == (False, False)
    assert args.per_device_eval_batch_size == args.per_device_train_batch_size == 512
    assert LLM2CLIPTrainingArguments(str(tmp_path), use_cpu=True, per_device_eval_batch_size=3).eval_batch_size == 3


OWN_OPTIONS = set(LLM2CLIPTrainingArguments.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)


@pytest.mark.parametrize("name", sorted(OWN_OPTIONS))
def test_help_of_an_option_is_its_docstring(name):
    help_text = LLM2CLIPTrainingArguments.__dataclass_fields__[name].metadata["help"]
    assert " ".join(help_text.split()) in " ".join(LLM2CLIPTrainingArguments.__doc__.split())
