# SPDX-License-Identifier: Apache-2.0
"""Stage 2: what each mode trains, that accumulated micro-batches are one batch, the paper's integration variants."""

import json
import math
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from clip_training import ClipPairs, Pairs, arguments, clip_baseline, clip_text_tower, softmax_loss, stack, trainer_for
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, CLIPTextModelWithProjection, HfArgumentParser

from llm2clip_hf import LLM2CLIPModel
from llm2clip_hf.data import ImageTextCollator
from llm2clip_hf.training import (
    LLM2CLIPTrainer,
    LLM2CLIPTrainingArguments,
    concatenated_text_embeds,
    load_concatenated_text_head,
)
from llm2clip_hf.training.clip.clip_text import ClipTextCollator
from llm2clip_hf.training.lora import has_adapters, merge_lora, merged_state


def copies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --------------------------------------------------------------------------------------------------- what is trained

VISION_SIDE, TEXT_SIDE = ("vision_model.", "visual_projection."), ("text_adapter.",)
MODES = [
    ({"train_vision": "projection"}, ("visual_projection.", *TEXT_SIDE)),
    ({"train_vision": "frozen"}, TEXT_SIDE),
    ({"train_text": "frozen"}, VISION_SIDE),
    ({"train_vision": "projection", "train_text": "frozen"}, ("visual_projection.",)),
]


@pytest.mark.parametrize(("options", "trained"), MODES)
def test_mode_trains_its_parts_and_no_other(tmp_path, options, trained):
    model = tiny_models.model("clip", None)
    before = copies(model)
    trainer = trainer_for(model, tmp_path, num_train_epochs=3, learning_rate=1e-2, **options)
    trainer.train()
    for name, parameter in model.named_parameters():
        expected = name.startswith((*trained, "logit_scale"))
        if not name.endswith("k_proj.bias"):  # attention ignores a shift common to all keys
            assert bool((parameter != before[name]).any()) == expected, name
    listed = {name for group in trainer.optimizer.param_groups for name in group["parameter_names"]}
    assert listed == {name for name in before if name.startswith((*trained, "logit_scale"))}
    assert model.vision_model.training == ("vision_model." in trained)


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2", "eva02"])
def test_lora_of_the_vision_tower_is_on_queries_keys_and_values(tmp_path, vision):
    model = tiny_models.model(vision, None)
    trainer = trainer_for(model, tmp_path, train_vision="lora")
    adapted = {name.rpartition(".lora_A")[0] for name, p in model.named_parameters() if ".lora_A" in name}
    linear = {name.removesuffix(".base_layer") for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    expected = {name for name in linear if name.endswith(("q_proj", "k_proj", "v_proj")) and "lora" not in name}
    assert adapted == expected
    layer = model.get_submodule(sorted(adapted)[0])
    assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (32, 1.0, 0.1)
    groups = {name: g for g in trainer.create_optimizer().param_groups for name in g["parameter_names"]}
    for name, group in groups.items():
        if ".lora_" in name:
            depth = int(next(part for part in name.split(".") if part.isdigit()))
            assert math.isclose(group["lr"], 1e-3 * 0.85 ** (2 - depth))
            assert group["weight_decay"] == 0.05


def test_lora_is_drawn_from_the_seed_of_the_run(tmp_path):
    def drawn(start: int, seed: int) -> torch.Tensor:
        model = tiny_models.model("clip")
        torch.manual_seed(start)
        trainer_for(model, tmp_path, train_vision="lora", seed=seed)
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    assert torch.equal(drawn(1, 7), drawn(2, 7))
    assert not torch.equal(drawn(1, 7), drawn(1, 8))


@pytest.mark.parametrize("side", ["vision", "text"])
def test_lora_has_the_gradients_of_peft_and_saves_a_plain_model(tmp_path, side):
    text = "input_ids"
    options = {f"train_{side}": "lora", f"{side}_lora": {"r": 3, "lora_dropout": 0.0}}
    model = tiny_models.model("clip")
    trainer = trainer_for(model, tmp_path, Pairs(text=text), learning_rate=1e-2, num_train_epochs=3, **options)
    tower = model.get_submodule(f"{side}_model")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in tower.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    batch = stack([Pairs(text=text)[i] for i in range(6)])
    trainer.compute_loss(model.train(), batch).backward()

    # The same adapters through PEFT's own wrapper.
    reference = tiny_models.model("clip")
    reference.requires_grad_(False)
    targets = r".*\.(q_proj|k_proj|v_proj)" if side == "vision" else "all-linear"
    alpha = {"vision": 32, "text": 32}[side]
    wrapped = get_peft_model(
        reference.get_submodule(f"{side}_model"), LoraConfig(r=3, lora_alpha=alpha, target_modules=targets)
    )
    names = {f"base_model.model.{name}": p for name, p in tower.named_parameters() if ".lora_" in name}
    assert wrapped.load_state_dict({k: p.detach() for k, p in names.items()}, strict=False).unexpected_keys == []
    setattr(reference, f"{side}_model", wrapped.base_model.model)
    image = reference.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    softmax_loss(image, reference.get_text_features(**ids).pooler_output, reference.logit_scale).backward()
    other = dict(reference.get_submodule(f"{side}_model").named_parameters())
    checked = 0
    for name, parameter in tower.named_parameters():
        if ".lora_" in name:
            grad = other[name].grad  # float32 sums in another order
            torch.testing.assert_close(parameter.grad, grad, atol=5e-6 * grad.abs().max().item(), rtol=1e-4, msg=name)
            checked += bool(parameter.grad.abs().max() > 0)
        else:
            assert parameter.grad is None, name
    assert checked

    model.zero_grad()
    before = copies(model)
    trainer.train()
    moved = {name for name, p in model.named_parameters() if (p != before[name]).any()}
    assert {name for name in moved if name.startswith(f"{side}_model.")} == {
        name for name in before if ".lora_" in name
    }
    model.eval()
    with pytest.raises(ValueError, match=r"carries an adapter.*merge_lora.*save_model"):
        model.save_pretrained(tmp_path / "unmerged")
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = LLM2CLIPModel.from_pretrained(tmp_path / "saved")
    if side == "vision":
        assert reloaded.config.text_weights == "none"
        batch["llm_embeds"] = model.get_llm_embeds(**{name: batch.pop(name) for name in ids})
    batch.pop("index")
    with torch.no_grad():
        expected = model(**batch).logits_per_image
        torch.testing.assert_close(reloaded(**batch).logits_per_image, expected, atol=1e-4, rtol=1e-4)
        merge_lora(model)
        assert not has_adapters(model)
        torch.testing.assert_close(model(**batch).logits_per_image, expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "merged")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "merged"))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


def test_lora_of_a_mixture_of_experts_saves_a_plain_model(tmp_path):
    model = tiny_models.model("clip", "deepseek_v3")
    dataset = Pairs(text="input_ids")
    trainer = trainer_for(
        model, tmp_path, dataset, max_steps=1, learning_rate=0.1, train_text="lora", text_lora={"r": 2}
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    ids = dataset[0]["input_ids"][None]
    expected = model.eval().get_text_features(input_ids=ids).pooler_output
    saved = LLM2CLIPModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(saved.get_text_features(input_ids=ids).pooler_output, expected, atol=1e-5, rtol=0)
    text_lora = {"target_parameters": ["mlp.experts.down_proj"]}
    with pytest.raises(ValueError, match="is a ParamWrapper on a DeepseekV3.*cannot be merged"):
        trainer_for(tiny_models.model("clip", "deepseek_v3"), tmp_path, train_text="lora", text_lora=text_lora)


def test_merged_weights_of_a_half_precision_llm_are_rounded_once():
    llm = AutoModel.from_config(tiny_models.text_config(), dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in llm.named_parameters()}
    llm.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    layer = llm.layers[1].self_attn.q_proj
    layer.lora_B["default"].weight.data = torch.randn(32, 2)
    layer.lora_A["default"].weight.data = torch.randn(2, 32)
    exact = before["layers.1.self_attn.q_proj.weight"].double()
    exact = exact + 3 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    merged = merged_state(llm)
    assert merged.keys() == before.keys()
    difference = (merged["layers.1.self_attn.q_proj.weight"].double() - exact).abs()
    assert (difference <= exact.abs() * 2**-8).all()
    assert torch.equal(merged["layers.0.mlp.up_proj.weight"], before["layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("side", ["vision", "text"])
def test_lora_run_resumes_bit_for_bit(tmp_path, side):
    def run(folder: str, resume: str | None = None) -> LLM2CLIPModel:
        model = tiny_models.model("clip", adapter_dropout=0.2)
        options = {f"train_{side}": "lora", "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
        trainer = trainer_for(model, tmp_path / folder, Pairs(17, text="input_ids"), **options)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run("whole")
    folder = tmp_path / "whole" / "checkpoint-2"
    resumed = run("resumed", str(folder))
    for (name, one), two in zip(whole.named_parameters(), resumed.parameters()):
        assert torch.equal(one, two), name
    saved = json.loads((folder / "config.json").read_text())
    assert saved["text_weights"] == {"vision": "none", "text": "bundled"}[side]
    (folder / "lora.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lora.safetensors` does not exist"):
        run("third", str(folder))


def test_text_lora_in_chunks_and_accumulated_equals_one_batch(tmp_path):
    batch = [Pairs(text="input_ids")[i] for i in range(6)]
    batches = [[stack(batch)], [stack(batch[:3]), stack(batch[3:])]]
    gradients = []
    for micro_batches, chunk in zip(batches, (None, 2)):
        model = tiny_models.model("clip")
        trainer = trainer_for(model, tmp_path, train_text="lora", encoder_chunk_size=chunk, text_lora={"r": 2})
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        *trainer._held_batches, last = micro_batches
        trainer.compute_loss(model.eval(), last).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any("text_model" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        error = (gradients[1][name] - gradient).abs().max()
        # Float32, in other shapes of matrix products: processors differ in the order of their sums.
        assert error <= 5e-5 * gradient.abs().max() + 1e-7, name


# ------------------------------------------------------------------------------------------------------- accumulation


class InOrder(LLM2CLIPTrainer):
    """Reads rows in their order, so that runs with different micro-batches see the same rows per step."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("text", ["llm_embeds", "input_ids"])
def test_four_micro_batches_of_sixteen_train_like_one_batch_of_sixty_four(tmp_path, text):
    weights, losses = [], []
    for size, steps in ((64, 1), (16, 4)):
        model = tiny_models.model("clip", adapter_num_layers=1)
        args = arguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, num_train_epochs=2,
            optim="sgd", learning_rate=1e-2, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = InOrder(model, args, data_collator=stack, train_dataset=Pairs(130, text=text))
        assert (args.contrastive_batch_size, args.rows_per_step) == (64, 64)
        trainer.train()
        weights.append(copies(model))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][:2])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_every_accumulated_batch_is_whole(tmp_path, strategy):
    sizes: list[int] = []

    class Noting(LLM2CLIPTrainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *others: Any, **kwargs: Any) -> Any:
            sizes.append(sum(len(batch["index"]) for batch in [*self._held_batches, inputs]))
            return super().compute_loss(model, inputs, *others, **kwargs)

    args = arguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, train_sampling_strategy=strategy
    )
    Noting(tiny_models.model("clip", None), args, data_collator=stack, train_dataset=Pairs(17)).train()
    assert sizes == [6] * 4


def test_accumulated_texts_of_different_lengths_are_not_mixed_up(tmp_path):
    rows = [Pairs(text="input_ids")[i] for i in range(6)]
    for row in rows[3:]:
        row["input_ids"], row["attention_mask"] = row["input_ids"][:5], row["attention_mask"][:5]
    model = tiny_models.model("clip")
    trainer = trainer_for(model, tmp_path)
    halves = [stack(rows[:3]), stack(rows[3:])]
    *trainer._held_batches, last = halves
    loss, outputs = trainer.compute_loss(model, last, return_outputs=True)
    parts = []
    for half in halves:
        half.pop("index")
        parts.append(model(**half))
    image, text = (torch.cat([part[name] for part in parts]) for name in ("image_embeds", "text_embeds"))
    torch.testing.assert_close(outputs["text_embeds"], text, atol=1e-6, rtol=0)
    torch.testing.assert_close(loss.double(), softmax_loss(image, text, model.logit_scale), atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------------------- integration


def test_integration_adds_the_losses_of_the_clip_text_tower(tmp_path):
    batch = stack([ClipPairs()[i] for i in range(7)])
    for integration in ("both", "aligned", "concatenated"):
        model, tower = tiny_models.model("clip", None), clip_text_tower()
        trainer = trainer_for(model, tmp_path, integration=integration, clip_text_model=tower)
        with_head = integration == "concatenated"
        assert hasattr(model, "concatenated_text_head") == with_head
        if with_head:
            start = model.concatenated_text_head.weight
            assert torch.equal(start, torch.cat([torch.eye(20), torch.eye(20)], dim=1))
            start.data += 0.1 * torch.randn(start.shape, generator=torch.Generator().manual_seed(2))
        loss = trainer.compute_loss(model, batch)
        image = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
        llm = model.get_text_features(llm_embeds=batch["llm_embeds"]).pooler_output
        clip = tower(input_ids=batch["clip_input_ids"]).text_embeds
        pairs = [(image, llm), (image, clip), *([(clip, llm)] if integration != "both" else [])]
        if with_head:
            rows = torch.cat([clip / clip.norm(dim=1, keepdim=True), llm / llm.norm(dim=1, keepdim=True)], dim=1)
            pairs.append((image, rows @ model.concatenated_text_head.weight.T))
        expected = sum(softmax_loss(one, other, model.logit_scale) for one, other in pairs)
        torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=0)
        loss.backward()
        chunked = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        expected.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(chunked[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("integration", ["aligned", "concatenated"])
def test_integration_trains_saves_and_resumes_both_text_encoders(tmp_path, integration):
    def run(folder: str, resume: str | None = None) -> tuple[LLM2CLIPModel, CLIPTextModelWithProjection]:
        model, tower = tiny_models.model("clip", None), clip_text_tower()
        trainer = trainer_for(
            model, tmp_path / folder, ClipPairs(10), integration=integration, clip_text_model=tower, save_steps=2,
            save_strategy="steps", encoder_chunk_size=3, eval_dataset=ClipPairs(7), eval_strategy="epoch",
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        metrics = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
        assert {"eval_image_to_text_recall@1", "eval_clip_text_image_to_text_recall@1"} <= metrics.keys()
        with_head = integration == "concatenated"
        assert ("eval_concatenated_text_image_to_text_recall@1" in metrics) == with_head
        listed = {name for group in trainer.optimizer.param_groups for name in group["parameter_names"]}
        assert ("concatenated_text_head.weight" in listed) == with_head
        return model, tower

    start = copies(clip_text_tower())
    model, tower = run("whole")
    assert sum(bool((p != start[name]).any()) for name, p in tower.named_parameters()) > 20
    resumed, resumed_tower = run("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    for one, two in zip([*model.parameters(), *tower.parameters()], [*resumed.parameters(), *tower.parameters()]):
        assert torch.equal(one, two)
    assert all(torch.equal(p, q) for p, q in zip(tower.parameters(), resumed_tower.parameters()))

    folder = tmp_path / "whole" / "checkpoint-4"
    reloaded = LLM2CLIPModel.from_pretrained(folder)
    reloaded_tower = CLIPTextModelWithProjection.from_pretrained(folder / "clip_text_model")
    batch = stack([ClipPairs()[i] for i in range(5)])
    with torch.no_grad():
        texts = reloaded_tower(input_ids=batch["clip_input_ids"]).text_embeds
        torch.testing.assert_close(texts, tower.eval()(input_ids=batch["clip_input_ids"]).text_embeds)
        if integration == "concatenated":
            head, trained = load_concatenated_text_head(folder), model.concatenated_text_head.weight
            assert torch.equal(head.weight, trained)
            assert (trained != torch.eye(20).repeat(1, 2)).any()
            llm = reloaded.get_text_features(llm_embeds=batch["llm_embeds"]).pooler_output
            expected = F.normalize(torch.cat([F.normalize(texts), F.normalize(llm)], 1) @ trained.T)
            torch.testing.assert_close(concatenated_text_embeds(head, 3 * texts, llm), expected)
        else:
            with pytest.raises(ValueError, match="concatenated_text_head.safetensors` does not exist"):
                load_concatenated_text_head(folder)
        one, two = (
            m.eval()(pixel_values=batch["pixel_values"], llm_embeds=batch["llm_embeds"]).logits_per_image
            for m in (model, reloaded)
        )
    torch.testing.assert_close(one, two)
    model.save_pretrained(tmp_path / "direct")
    assert LLM2CLIPModel.from_pretrained(tmp_path / "direct").config.projection_dim == tiny_models.PROJECTION


def test_both_text_encoders_compute_in_the_precision_of_the_run(tmp_path):
    model, tower = tiny_models.model("clip", None), clip_text_tower()
    trainer = trainer_for(
        model, tmp_path, ClipPairs(10), integration="concatenated", clip_text_model=tower, bf16=True, max_steps=1,
        encoder_chunk_size=3,
    )  # fmt: skip
    seen: dict[str, set[torch.dtype]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: seen.setdefault(name, set()).add(output.dtype)
            )
    trainer.train()
    assert {"clip_text_model.text_projection", "concatenated_text_head", "visual_projection"} <= seen.keys()
    assert set.union(*seen.values()) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_clip_text_collator_adds_tokens_and_keeps_the_rest():
    tokenizer = tiny_models.processor().tokenizer
    image = torch.zeros(3, 4, 4)
    stored = [{"pixel_values": image, "llm_embeds": torch.ones(5), "text": text} for text in ("a boat", "a dog runs")]
    batch = ClipTextCollator(tokenizer)(stored)
    expected = tokenizer(["a boat", "a dog runs"], padding=True, return_tensors="pt")
    assert torch.equal(batch["clip_input_ids"], expected["input_ids"])
    assert torch.equal(batch["clip_attention_mask"], expected["attention_mask"])
    assert batch["llm_embeds"].shape == (2, 5)
    texts = [{"pixel_values": image, "text": sample["text"]} for sample in stored]
    both = ClipTextCollator(tokenizer, ImageTextCollator(tiny_models.processor()))(texts)
    assert {"input_ids", "clip_input_ids"} <= both.keys()
    with pytest.raises(ValueError, match="Sample 0 has no `text`"):
        ClipTextCollator(tokenizer)([{"pixel_values": image, "llm_embeds": torch.ones(5)}])


# ---------------------------------------------------------------------------------------------------------- bad input


def test_modes_without_their_parts_are_refused(tmp_path):
    model = tiny_models.model("clip", None)
    for options, message in (
        ({"train_text": "lora"}, "needs the LLM, which the model does not hold"),
        ({"train_vision": "frozen", "train_text": "frozen"}, "leaves nothing to train but the logit scale"),
        ({"integration": "both"}, "needs CLIP's text encoder"),
        ({"clip_text_model": clip_text_tower()}, "no effect with `integration='replace'`"),
        ({"clip_text_model": clip_text_tower(6), "integration": "both"}, "projects to width 6, the model to 20"),
        ({"train_vision": "lora", "vision_lora": {"use_dora": True}}, "LoRA with `use_dora=True` cannot be merged"),
        ({"train_vision": "lora", "vision_lora": {"rank": 3}}, "Name fields of `peft.LoraConfig`"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_for(tiny_models.model("clip", None), tmp_path, **options)
    plain = tiny_models.model("siglip", None, vision_projection="none", projection_dim=tiny_models.VISION_WIDTH)
    with pytest.raises(ValueError, match="needs a vision projection"):
        trainer_for(plain, tmp_path, train_vision="projection")
    with pytest.raises(ValueError, match="needs an `LLM2CLIPModel`"):
        trainer_for(clip_baseline(), tmp_path, integration="both", clip_text_model=clip_text_tower(17))
    trainer = trainer_for(model, tmp_path, integration="both", clip_text_model=clip_text_tower())
    with pytest.raises(ValueError, match="needs `clip_input_ids`"):
        trainer.train()
    with pytest.raises(ValueError, match="`train_text='lora'` trains the LLM, but the batch has stored embeddings"):
        trainer_for(tiny_models.model("clip"), tmp_path, train_text="lora").train()


def test_frozen_parts_of_any_model_with_the_interface(tmp_path):
    model = clip_baseline()
    dataset = Pairs(10, text="input_ids")
    dataset.ids[:, 4:] = 98
    before = copies(model)
    trainer_for(model, tmp_path, dataset, train_vision="projection", learning_rate=1e-2).train()
    moved = {name for name, p in model.named_parameters() if (p != before[name]).any()}
    assert not {name for name in moved if name.startswith("vision_model.")}
    assert {"visual_projection.weight", "text_projection.weight", "logit_scale"} <= moved
    assert F.cosine_similarity(model.logit_scale.detach(), before["logit_scale"], dim=0) > 0


def test_lora_fields_parse_from_a_command_line(tmp_path):
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--train_vision", "lora", "--vision_lora", '{"r": 8}']
    args = HfArgumentParser(LLM2CLIPTrainingArguments).parse_args_into_dataclasses(line)[0]
    assert (args.vision_lora, args.accumulate_negatives, args.train_text) == ({"r": 8}, True, "adapter")
