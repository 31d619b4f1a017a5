# SPDX-License-Identifier: Apache-2.0
"""Masked next token prediction: the loss is the formula, the masks repeat, the result starts a caption encoder."""

import json
import math
from functools import partial
from pathlib import Path

import datasets
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from llm2clip_hf.modeling import apply_text_template
from llm2clip_hf.training import MNTPTrainer, MNTPTrainingArguments, build_caption_encoder
from llm2clip_hf.training.captions.mntp import MaskedTexts, collate_masked
from llm2clip_hf.training.run_checks import gpu_supports_bf16


TEXTS = [
    "a photo of a red boat on the sea",
    "two dogs run over the green grass, one is black",
    "x",
    "ein rotes Boot auf dem Meer " * 9,
    "people in a street",
] * 3


def arguments(folder: Path, **kwargs: object) -> MNTPTrainingArguments:
    options = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 5,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "mask_token": "x",
    }
    return MNTPTrainingArguments(str(folder), **(options | kwargs))


def masked(tokenizer: object, texts: object = TEXTS, **kwargs: object) -> MaskedTexts:
    options = {"mask_token_id": 300, "mask_probability": 0.2, "max_length": 40, "seed": 7}
    return MaskedTexts(texts, tokenizer, **(options | kwargs))


# ---------------------------------------------------------------------------------------------------------- the masks


@pytest.mark.parametrize("template", [None, "llama3"])
def test_masks_repeat_and_leave_special_and_template_tokens_alone(template):
    tokenizer = tiny_models.llama3_tokenizer()
    tokenizer = apply_text_template(tokenizer, template) if template else tokenizer
    text = "a photo of a red <|eot_id|> boat on the sea " * 20
    data = masked(tokenizer, [text] * 200, max_length=90, mask_probability=0.4)
    plain = tokenizer(text, truncation=True, max_length=90, return_special_tokens_mask=True)
    ids = torch.tensor(plain["input_ids"])
    fixed = torch.tensor(plain["special_tokens_mask"]).bool() | torch.isin(ids, torch.tensor([0, 1, 2, 3, 4]))
    fixed[0] = True
    rows = [data[i] for i in range(200)]
    labels = torch.tensor([row["labels"] for row in rows])
    inputs = torch.tensor([row["input_ids"] for row in rows])
    target = labels != -100
    assert not target[:, fixed].any()
    assert torch.equal(labels[target], ids.expand(200, -1)[target])
    assert torch.equal(inputs[~target], ids.expand(200, -1)[~target])
    count = int(target.sum())
    assert target[:, ~fixed].float().mean().item() == pytest.approx(0.4, abs=0.02)
    assert (inputs[target] == 300).sum().item() / count == pytest.approx(0.8, abs=0.03)
    # A tenth stays; a random token is the same one, or the mask, now and then.
    assert (inputs[target] == labels[target]).sum().item() / count == pytest.approx(0.1, abs=0.03)
    assert len({tuple(row) for row in labels.tolist()}) == 200

    again = masked(tokenizer, [text] * 200, max_length=90, mask_probability=0.4)
    assert [again[i] for i in (150, 3)] == [rows[150], rows[3]]
    again.set_epoch(1)
    assert again[3] != rows[3]
    again.set_epoch(0)
    assert again[3] == rows[3]
    assert masked(tokenizer, [text] * 200, max_length=90, mask_probability=0.4, seed=8)[3] != rows[3]


def test_workers_that_live_on_see_the_epoch():
    tokenizer = tiny_models.llama3_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    data = masked(tokenizer)
    loader = torch.utils.data.DataLoader(
        data, 5, num_workers=1, persistent_workers=True, collate_fn=partial(collate_masked, tokenizer)
    )
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        expected = masked(tokenizer)
        expected.set_epoch(epoch)
        found = torch.cat([batch["labels"][batch["attention_mask"].bool()] for batch in loader])
        assert found.tolist() == [label for row in range(len(TEXTS)) for label in expected[row]["labels"]]


def test_first_token_is_never_a_target_without_begin_of_text():
    tokenizer = tiny_models.llama3_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    data = masked(tokenizer, ["red boat"] * 50, mask_probability=0.9)
    rows = [data[i]["labels"] for i in range(50)]
    assert {row[0] for row in rows} == {-100}
    assert any(row[1] != -100 for row in rows)


def test_one_caption_of_each_image_is_drawn_per_epoch():
    tokenizer = tiny_models.llama3_tokenizer()
    captions = ["a photo", "two dogs run over the grass", "ein rotes Boot"]
    data = masked(tokenizer, [captions] * 40, mask_probability=1e-9)
    drawn = [tokenizer.decode(data[i]["input_ids"], skip_special_tokens=True) for i in range(40)]
    assert set(drawn) == set(captions)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_pads_ids_and_labels_together(side):
    tokenizer = tiny_models.llama3_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, side
    rows = [{"input_ids": [1, 8, 9], "labels": [-100, 5, -100]}, {"input_ids": [1], "labels": [-100]}]
    batch = partial(collate_masked, tokenizer)(rows)
    pad = [tokenizer.eos_token_id] * 2
    second, mask = ([*pad, 1], [0, 0, 1]) if side == "left" else ([1, *pad], [1, 0, 0])
    assert batch["input_ids"].tolist() == [[1, 8, 9], second]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], mask]
    assert batch["labels"].tolist() == [[-100, 5, -100], [-100] * 3]


def test_wrong_data_is_named(lm_dir, tmp_path):
    tokenizer = tiny_models.llama3_tokenizer()
    with pytest.raises(ValueError, match=r"Row 1 must be a string or a list of strings, got 3"):
        masked(tokenizer, ["a", 3])[1]
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="Text 0 gives no token"):
        masked(tokenizer, [""])[0]
    with pytest.raises(ValueError, match="A sequence of texts is needed"):
        masked(tokenizer, [])
    table = datasets.Dataset.from_dict({"caption": TEXTS, "id": list(range(len(TEXTS)))})
    with pytest.raises(ValueError, match=r"Pass one of them: `dataset\['caption'\]`"):
        MNTPTrainer(lm_dir, arguments(tmp_path), table)
    assert len(MNTPTrainer(lm_dir, arguments(tmp_path), table["caption"]).train_dataset) == len(TEXTS)


# ----------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3"])
def test_loss_is_the_formula(tmp_path, architecture, side):
    llm = AutoModelForCausalLM.from_config(tiny_models.text_config(architecture)).eval()
    tokenizer = tiny_models.llama3_tokenizer()
    tokenizer.padding_side = side
    trainer = MNTPTrainer(llm, arguments(tmp_path), TEXTS, processing_class=tokenizer, lora=None)
    rows = [trainer.train_dataset[i] for i in range(5)]
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(llm, batch)

    oracle = AutoModelForCausalLM.from_config(llm.config).eval().double()
    oracle.load_state_dict(llm.state_dict())
    terms = []
    for row in rows:
        with torch.no_grad():
            logits = oracle(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        terms += [-logits[i - 1].log_softmax(0)[label] for i, label in enumerate(row["labels"]) if label != -100]
    assert len(terms) > 10
    assert loss.item() == pytest.approx((sum(terms) / len(terms)).item(), abs=1e-5)
    assert trainer.compute_loss(llm, batch, num_items_in_batch=torch.tensor(40)).item() == pytest.approx(
        (sum(terms) / 40).item(), abs=1e-5
    )


def test_batch_without_masks_has_no_loss_and_no_gradient(lm_dir, tmp_path):
    trainer = MNTPTrainer(lm_dir, arguments(tmp_path), ["x"] * 5)
    batch = trainer.data_collator([{"input_ids": [1, 9], "labels": [-100, -100]}])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_accumulated_steps_have_the_gradient_of_the_whole_batch(lm_dir, tmp_path):
    weights = []
    for options in ({"per_device_train_batch_size": 15}, {"gradient_accumulation_steps": 3}):
        torch.manual_seed(0)
        args = arguments(tmp_path, max_steps=1, optim="sgd", max_grad_norm=0.0, save_strategy="no", **options)
        trainer = MNTPTrainer(lm_dir, args, TEXTS, lora=None)
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    start = AutoModelForCausalLM.from_pretrained(lm_dir).state_dict()
    for name, whole in weights[0].items():
        step = (whole - start[name]).abs().max()
        assert (weights[1][name] - whole).abs().max() <= 1e-3 * step + 1e-9, name


def train_processes(folder: Path, llm: str, world: int) -> dict[str, torch.Tensor]:
    args = arguments(
        folder,
        max_steps=2,
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        per_device_train_batch_size=6 // world,
        activation_checkpointing=False,
    )
    trainer = MNTPTrainer(llm, args, TEXTS, lora=None)
    trainer.train()
    return trainer.model.state_dict()


def test_two_processes_train_like_one(lm_dir, tmp_path):
    from process_groups import in_two_processes

    expected = {name: tensor.clone() for name, tensor in train_processes(tmp_path, lm_dir, 1).items()}
    start = AutoModelForCausalLM.from_pretrained(lm_dir).state_dict()
    first, second = in_two_processes(train_processes, tmp_path, lm_dir, 2)
    for name, tensor in expected.items():
        assert (first[name] == second[name]).all(), name
        step = (tensor - start[name]).abs().max()
        assert (torch.from_numpy(first[name]) - tensor).abs().max() <= 1e-3 * step + 1e-9, name


# ------------------------------------------------------------------------------------------------------- the training


def test_resume_continues_the_same_trajectory(lm_dir, tmp_path):
    def run(folder: Path, resume: str | None = None) -> MNTPTrainer:
        torch.manual_seed(0)
        trainer = MNTPTrainer(lm_dir, arguments(folder), TEXTS)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    assert whole.state.global_step == 6
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert not (checkpoint / "model.safetensors").exists()
    resumed = run(tmp_path / "resumed", str(checkpoint))
    for (name, one), two in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(one, two), name
    start = AutoModelForCausalLM.from_pretrained(lm_dir).state_dict()
    base = {name.replace(".base_layer", ""): p for name, p in whole.model.named_parameters() if "lora_" not in name}
    assert all(torch.equal(p, start[name]) for name, p in base.items())
    assert all(p.any() for name, p in whole.model.named_parameters() if "lora_B" in name)


def test_best_adapters_are_loaded_at_the_end(lm_dir, tmp_path):
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    options = evaluation | {"metric_for_best_model": "loss", "greater_is_better": True, "max_steps": 4}
    trainer = MNTPTrainer(lm_dir, arguments(tmp_path, **options), TEXTS, TEXTS)
    trainer.train()
    assert trainer.state.best_global_step == 2  # the loss falls
    stored = load_file(tmp_path / "checkpoint-2" / "adapter" / "adapter_model.safetensors")
    found = {name: p for name, p in trainer.model.named_parameters() if "lora_" in name}
    assert len(found) == len(stored)
    for name, parameter in found.items():
        assert torch.equal(parameter, stored[f"base_model.model.{name.replace('.default', '')}"]), name


def test_real_model_learns_and_becomes_a_caption_encoder(shared_dir, tmp_path):
    source = str(shared_dir / "data" / "llama_stories260k")
    names = ["Tim", "Lily", "Sam", "Mia"]
    things = ["ball", "boat", "cat", "dog", "tree", "car", "hat", "cake"]
    texts = [f"{n} had a big {t}. {n} was very happy." for n in names for t in things]
    args = arguments(tmp_path / "run", num_train_epochs=6, per_device_train_batch_size=16, mask_token="<unk>")
    torch.manual_seed(0)
    trainer = MNTPTrainer(source, args, texts, texts[::7])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.6 * before < math.log(512)

    trainer.save_model(str(tmp_path / "lm"))
    names = sorted(path.name for path in (tmp_path / "lm").iterdir())
    assert names == [
        *("README.md", "config.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("trainer_state.json", "training_args.json"),
    ]
    recorded = json.loads((tmp_path / "lm" / "training_args.json").read_text())
    assert (recorded["num_train_epochs"], recorded["mask_probability"], recorded["mask_token"]) == (6, 0.2, "<unk>")
    assert json.loads((tmp_path / "lm" / "config.json").read_text())["is_causal"] is False
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(3)])
    batch.pop("labels")
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        logits = merged(**batch).logits
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[kept], expected[kept], atol=1e-3, rtol=0)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight

    encoder = build_caption_encoder(str(tmp_path / "lm"), lora=None)
    tokens = AutoTokenizer.from_pretrained(source)("a red boat", return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(tmp_path / "lm")(**tokens).last_hidden_state[0, 1:]
    torch.testing.assert_close(encoder.encode("a red boat", convert_to_tensor=True), hidden.mean(0))


def test_lora_is_drawn_from_the_seed_of_the_run(lm_dir, tmp_path):
    def drawn(start: int, seed: int) -> torch.Tensor:
        torch.manual_seed(start)
        trainer = MNTPTrainer(lm_dir, arguments(tmp_path, seed=seed), TEXTS)
        return next(p for name, p in trainer.model.named_parameters() if "lora_A" in name)

    assert torch.equal(drawn(1, 7), drawn(2, 7))
    assert not torch.equal(drawn(1, 7), drawn(1, 8))


def test_all_weights_can_be_trained_and_resumed(lm_dir, tmp_path):
    trainer = MNTPTrainer(lm_dir, arguments(tmp_path, max_steps=2), TEXTS, lora=None)
    trainer.train()
    assert all(p.requires_grad for p in trainer.model.parameters())
    again = MNTPTrainer(lm_dir, arguments(tmp_path, max_steps=2), TEXTS, lora=None)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), again.model.parameters()))


# ---------------------------------------------------------------------------------------------------------- bad input


def test_defaults_are_the_released_recipe(tmp_path):
    args = MNTPTrainingArguments(str(tmp_path), use_cpu=True)
    recipe = (args.learning_rate, args.per_device_train_batch_size, args.num_train_epochs, args.max_length)
    assert recipe == (5e-5, 32, 1.0, 512)
    assert args.mask_probability == 0.2
    assert args.gradient_checkpointing is True
    assert args.bf16 is False


@pytest.mark.parametrize(("capability", "computes"), [(7, False), (8, True)])
def test_bf16_is_chosen_where_the_hardware_computes_in_it(monkeypatch, capability, computes):
    properties = type("Properties", (), {"major": capability, "minor": 5})()
    monkeypatch.setattr(torch.version, "hip", None)
    for name, value in {"is_available": True, "current_device": 0, "get_device_properties": properties}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    # An older GPU emulates bfloat16.
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert gpu_supports_bf16() is computes


def test_weights_in_half_precision_are_not_trained(lm_dir, tmp_path):
    half = {"dtype": torch.bfloat16}
    with pytest.raises(ValueError, match="half precision, first `model.embed.*model_kwargs={'dtype': torch.float32}"):
        MNTPTrainer(lm_dir, arguments(tmp_path), TEXTS, lora=None, model_kwargs=half)
    assert MNTPTrainer(lm_dir, arguments(tmp_path), None, TEXTS, lora=None, model_kwargs=half).evaluate()
    MNTPTrainer(lm_dir, arguments(tmp_path), TEXTS, model_kwargs=half)


@pytest.mark.parametrize(
    ("options", "message"), [({"mask_probability": 1.0}, "`mask_probability`"), ({"max_length": 1}, "`max_length`")]
)
def test_wrong_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        MNTPTrainingArguments(str(tmp_path), **options)
    # What has no effect in stage 1 has one here.
    assert MNTPTrainingArguments(str(tmp_path), label_smoothing_factor=0.1, neftune_noise_alpha=5.0, use_cpu=True)


def test_wrong_models_and_tokens_are_refused(lm_dir, tmp_path):
    AutoModel.from_pretrained(lm_dir).save_pretrained(tmp_path / "headless")
    tiny_models.llama3_tokenizer().save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"holds no weights for \['lm_head.weight'\]"):
        MNTPTrainer(str(tmp_path / "headless"), arguments(tmp_path), TEXTS)
    with pytest.raises(ValueError, match="has no LM head"):
        MNTPTrainer(
            AutoModel.from_pretrained(lm_dir),
            arguments(tmp_path),
            TEXTS,
            processing_class=tiny_models.llama3_tokenizer(),
        )
    with pytest.raises(ValueError, match="`processing_class` is missing"):
        MNTPTrainer(AutoModelForCausalLM.from_pretrained(lm_dir), arguments(tmp_path), TEXTS)
    with pytest.raises(ValueError, match="`mask_token` 'red boat' is not one token"):
        MNTPTrainer(lm_dir, arguments(tmp_path, mask_token="red boat"), TEXTS)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=331, n_positions=64, n_embd=24, n_layer=2, n_head=3))
    with pytest.raises(ValueError, match="GPT2Model"):
        MNTPTrainer(gpt2, arguments(tmp_path), TEXTS, processing_class=tiny_models.llama3_tokenizer())
    with pytest.raises(ValueError, match="'no_proj', which no layer of LlamaForCausalLM"):
        MNTPTrainer(lm_dir, arguments(tmp_path), TEXTS, lora={"target_modules": ["no_proj"]})


def test_pad_token_is_the_end_token_on_a_copy(lm_dir, tmp_path):
    tokenizer = tiny_models.llama3_tokenizer()
    trainer = MNTPTrainer(lm_dir, arguments(tmp_path), TEXTS, processing_class=tokenizer)
    assert tokenizer.pad_token is None
    assert trainer.processing_class.pad_token == tokenizer.eos_token
    assert trainer.model.get_input_embeddings().weight.shape[0] == tiny_models.VOCAB
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad nor an end-of-sequence token"):
        MNTPTrainer(lm_dir, arguments(tmp_path), TEXTS, processing_class=tokenizer)
