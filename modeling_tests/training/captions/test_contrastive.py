# SPDX-License-Identifier: Apache-2.0
"""Stage 1: the caption encoder equals the model's text side, its objective the formula, its folder stands alone."""

import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import tiny_models
import torch
from caption_training import CAPTIONS, arguments, encoder_with_random_lora
from peft import LoraConfig
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2Model, TrainingArguments

from llm2clip_hf.data import CaptionPairDataset
from llm2clip_hf.modeling import apply_text_template, pool_text, text_prefix_length
from llm2clip_hf.training import (
    CaptionContrastiveTrainer,
    CaptionContrastiveTrainingArguments,
    MNTPTrainer,
    MNTPTrainingArguments,
    build_caption_encoder,
)
from llm2clip_hf.training.captions.caption_pooling import CaptionPooling
from llm2clip_hf.training.lora import lora_config, merged_llm


TEXTS = ["a red boat", "http://example.com/cat.jpg", "  two dogs run over the grass  ", "x", "", "a photo. " * 20]


# ------------------------------------------------------------------------------------------------------ the embedding


@pytest.mark.parametrize("side", ["left", "right"])
def test_embedding_equals_pool_text_of_the_bidirectional_llm(llm_dir, side):
    encoder = build_caption_encoder(llm_dir, lora=None)
    encoder.tokenizer.padding_side = side
    config = tiny_models.text_config("llama")
    config.is_causal = False
    llm = AutoModel.from_pretrained(llm_dir, config=config)
    tokenizer = apply_text_template(AutoTokenizer.from_pretrained(llm_dir))
    assert encoder.text_prefix_length == text_prefix_length(tokenizer) > 1
    for text, embedding in zip(TEXTS, encoder.encode(TEXTS, convert_to_tensor=True)):
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = llm(**batch).last_hidden_state
        expected = pool_text(hidden, batch["attention_mask"], encoder.text_prefix_length)[0]
        torch.testing.assert_close(embedding, expected, atol=1e-6, rtol=0)
    order = [4, 2, 0, 5, 1, 3]
    shuffled = encoder.encode([TEXTS[i] for i in order], batch_size=2, convert_to_tensor=True)
    torch.testing.assert_close(shuffled, encoder.encode(TEXTS, convert_to_tensor=True)[order], atol=1e-6, rtol=0)


def test_template_is_applied_once_and_urls_stay_text(llm_dir):
    encoder = build_caption_encoder(llm_dir, lora=None)
    tokenizer = tiny_models.llama3_tokenizer()
    for text in TEXTS[:2]:
        wrapped = f"<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
        assert encoder.preprocess([text])["input_ids"][0].tolist() == tokenizer(wrapped)["input_ids"]
    assert encoder.modalities == ["text"]


def test_causal_encoder_differs_and_is_marked(llm_dir):
    causal, both = (build_caption_encoder(llm_dir, lora=None, bidirectional=flag) for flag in (False, True))
    assert (causal.encode(TEXTS[:1]) - both.encode(TEXTS[:1])).any()
    assert causal.embedding_settings["is_causal"] is True
    assert both.embedding_settings == {
        "text_prefix_length": both.text_prefix_length,
        "max_length": 512,
        "pooling": "mean",
        "is_causal": False,
    }


def test_llm_that_stays_causal_is_refused(tmp_path):
    GPT2Model(GPT2Config(vocab_size=331, n_positions=64, n_embd=24, n_layer=2, n_head=3)).save_pretrained(tmp_path)
    tiny_models.llama3_tokenizer(instruct=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="GPT2Model"):
        build_caption_encoder(str(tmp_path))


def test_normalize_gives_unit_vectors(llm_dir):
    plain, unit = (build_caption_encoder(llm_dir, lora=None, normalize=flag) for flag in (False, True))
    expected = torch.nn.functional.normalize(plain.encode(TEXTS, convert_to_tensor=True), dim=-1)
    torch.testing.assert_close(unit.encode(TEXTS, convert_to_tensor=True), expected)


def test_max_length_is_lowered_to_the_positions_of_the_llm(llm_dir, caplog):
    encoder = build_caption_encoder(llm_dir, lora=None, max_length=10_000)
    assert encoder.max_seq_length == 640
    assert "lowered" in caplog.text
    ids = build_caption_encoder(llm_dir, lora=None, max_length=9).preprocess(["a photo " * 50])["input_ids"][0]
    assert len(ids) == 9
    assert ids[-1] == tiny_models.llama3_tokenizer().eos_token_id


# -------------------------------------------------------------------------------------------------------- the pooling


def test_pooling_excludes_prefix_then_prompt_and_never_pools_nothing():
    hidden = torch.randn(3, 6, 4)
    hidden[1, 5] = float("nan")  # padding may hold anything
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    pooling = CaptionPooling(4, prefix_length=2, prompt_overhead=1)

    def pooled(**extra: object) -> torch.Tensor:
        return pooling({"token_embeddings": hidden, "attention_mask": mask, **extra})["sentence_embedding"]

    expected = [hidden[0, 3:].mean(0), hidden[1, 2:5].mean(0), hidden[2, :2].mean(0)]
    torch.testing.assert_close(pooled(), torch.stack(expected))
    expected = [hidden[0, 4:].mean(0), hidden[1, 3:5].mean(0), hidden[2, :2].mean(0)]
    torch.testing.assert_close(pooled(prompt_length=4), torch.stack(expected))
    torch.testing.assert_close(pooled(prompt_length=torch.tensor([4])), torch.stack(expected))


def test_instruction_given_as_prompt_is_read_but_not_pooled(llm_dir):
    encoder = build_caption_encoder(llm_dir, lora=None)
    prompt = "dogs in a street: "
    batch = encoder.tokenizer(prompt + "a red boat", return_tensors="pt")
    with torch.no_grad():
        hidden = encoder.llm(**batch).last_hidden_state
    kept = len(encoder.tokenizer("a red boat", add_special_tokens=False)["input_ids"]) + 1  # and the end-of-turn token
    embedding = encoder.encode("a red boat", prompt=prompt, convert_to_tensor=True)
    ids = encoder.tokenizer(prompt.strip(), add_special_tokens=False)["input_ids"]
    # The space between both may belong to either, by the tokenizer: all splits but these two are wrong.
    candidates = [hidden[0, -n:].mean(0) for n in (kept, kept + 1)]
    assert min((embedding - candidate).abs().max() for candidate in candidates) < 1e-6
    assert batch["input_ids"].shape[1] >= encoder.text_prefix_length + len(ids) + kept


@pytest.mark.parametrize("sizes", [(0, 1, 0), (4, -1, 0), (4, 0, -1)])
def test_pooling_refuses_wrong_sizes(sizes):
    with pytest.raises(ValueError, match="must be"):
        CaptionPooling(*sizes)


# ------------------------------------------------------------------------------------------------------- the training


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("negatives", [False, True])
def test_objective_equals_the_formula(llm_dir, tmp_path, symmetric, negatives):
    encoder = build_caption_encoder(llm_dir, lora=None)
    columns = {"anchor": [c[0] for c in CAPTIONS[:6]], "positive": [c[1] for c in CAPTIONS[:6]]}
    if negatives:
        columns["negative"] = [c[2] for c in CAPTIONS[6:12]]
    args = arguments(tmp_path, symmetric=symmetric)
    trainer = CaptionContrastiveTrainer(encoder, args, datasets.Dataset.from_dict(columns))
    batch = trainer.data_collator([dict(zip(columns, row)) for row in zip(*columns.values())])
    encoder.eval()
    loss = trainer.compute_loss(encoder, batch)

    unit = {k: torch.nn.functional.normalize(encoder.encode(v, convert_to_tensor=True)) for k, v in columns.items()}
    unit = {name: value.double() for name, value in unit.items()}
    documents = torch.cat([unit[name] for name in list(columns)[1:]])
    expected = -(50 * unit["anchor"] @ documents.T).log_softmax(1).diagonal().mean()
    if symmetric:
        expected = (expected - (50 * unit["positive"] @ unit["anchor"].T).log_softmax(1).diagonal().mean()) / 2
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-5)


def test_training_moves_the_adapters_only_and_lowers_the_loss(llm_dir, tmp_path):
    encoder = encoder_with_random_lora(llm_dir)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    args = arguments(tmp_path, num_train_epochs=6, save_strategy="no")
    trainer = CaptionContrastiveTrainer(encoder, args, CaptionPairDataset(CAPTIONS))
    trainer.train()
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert bool((parameter != before[name]).any()) == parameter.requires_grad, name
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_processes_that_are_not_to_write_write_nothing(llm_dir, tmp_path, monkeypatch):
    """`Trainer.save_model` calls `_save` on every process; a second writer would replace the first one's files."""
    trainer = CaptionContrastiveTrainer(
        build_caption_encoder(llm_dir), arguments(tmp_path), CaptionPairDataset(CAPTIONS)
    )
    lm_dir = tiny_models.save_llm(tmp_path / "lm", head=AutoModelForCausalLM)
    mntp = MNTPTrainer(lm_dir, MNTPTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), ["a", "b"])
    monkeypatch.setattr(TrainingArguments, "should_save", property(lambda self: False))
    for each in (trainer, mntp):
        each.save_model(str(tmp_path / "out"))
    assert not list(tmp_path.glob("out/*"))


def test_pairs_are_drawn_anew_each_epoch(llm_dir, tmp_path):
    pairs = CaptionPairDataset(CAPTIONS, seed=3)
    args = arguments(tmp_path, per_device_train_batch_size=23, num_train_epochs=3, save_strategy="no")
    trainer = CaptionContrastiveTrainer(build_caption_encoder(llm_dir), args, pairs)
    seen: list[set[tuple[str, str]]] = []
    collate = trainer.data_collator

    def record(rows: list[dict[str, str]]) -> dict:
        seen.append({(row["anchor"], row["positive"]) for row in rows})
        return collate(rows)

    trainer.data_collator = record
    record.valid_label_columns = collate.valid_label_columns
    trainer.train()
    expected = []
    for epoch in range(3):
        pairs.set_epoch(epoch)
        expected.append({(row["anchor"], row["positive"]) for row in (pairs[i] for i in range(len(pairs)))})
    assert seen == expected
    assert seen[0] != seen[1]


def test_resume_of_all_weights_continues_the_same_trajectory(llm_dir, tmp_path):
    def run(folder: Path, resume: str | None = None, **kwargs: object):
        encoder = build_caption_encoder(llm_dir, lora=None)
        args = arguments(folder, **({"save_steps": 3} | kwargs))
        trainer = CaptionContrastiveTrainer(encoder, args, CaptionPairDataset(CAPTIONS))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    assert whole.state.global_step == 8
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, one), two in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(one, two), name


def test_checkpoint_of_another_encoder_is_refused(llm_dir, tmp_path):
    args = arguments(tmp_path / "a", max_steps=3)
    CaptionContrastiveTrainer(build_caption_encoder(llm_dir), args, CaptionPairDataset(CAPTIONS)).train()
    encoder = build_caption_encoder(llm_dir, lora=LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = CaptionContrastiveTrainer(encoder, args, CaptionPairDataset(CAPTIONS))
    with pytest.raises((ValueError, RuntimeError), match="does not fit|size mismatch"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))


def test_nan_loss_stops_before_the_weights_are_touched(llm_dir, tmp_path):
    encoder = encoder_with_random_lora(llm_dir)
    trainer = CaptionContrastiveTrainer(encoder, arguments(tmp_path), CaptionPairDataset(CAPTIONS))
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    compute_loss, calls = trainer.compute_loss, []

    def breaks(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        return compute_loss(*args, **kwargs) * (1.0 if len(calls) < 3 else float("nan"))

    trainer.compute_loss = breaks
    with pytest.raises(FloatingPointError, match="nan at step 3"):
        trainer.train()
    assert all(p.isfinite().all() for p in encoder.parameters())
    assert any((p != before[name]).any() for name, p in encoder.named_parameters())


def test_defaults_are_the_recipe_of_the_paper(tmp_path):
    args = CaptionContrastiveTrainingArguments(str(tmp_path), use_cpu=True)
    assert (args.learning_rate, args.warmup_steps, args.num_train_epochs, args.scale) == (2e-4, 300, 1.0, 50.0)
    assert args.gradient_checkpointing is True
    assert args.bf16 is False
    lora = lora_config({})
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (16, 32, 0.05, "all-linear")


def test_lora_fields_can_be_changed_one_by_one(llm_dir):
    lora = lora_config({"r": 3, "lora_dropout": 0.0})
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (3, 32, 0.0, "all-linear")
    encoder = build_caption_encoder(llm_dir, lora={"r": 3, "target_modules": ["v_proj"]})
    shapes = {name: tuple(p.shape) for name, p in encoder.named_parameters() if p.requires_grad}
    assert all("v_proj" in name for name in shapes)
    assert {min(shape) for shape in shapes.values()} == {3}
    with pytest.raises(ValueError, match="`lora` is {'rank': 3}, but .*rank.*Name fields of `peft.LoraConfig`"):
        lora_config({"rank": 3})


@pytest.mark.parametrize(
    ("options", "message"), [({"scale": 0}, "`scale` must be positive"), ({"mini_batch_size": 0}, "`mini_batch_size`")]
)
def test_wrong_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CaptionContrastiveTrainingArguments(str(tmp_path), **options)


def test_wrong_model_and_too_little_data_are_refused(llm_dir, tmp_path):
    with pytest.raises(ValueError, match="build_caption_encoder"):
        CaptionContrastiveTrainer(torch.nn.Linear(2, 2), arguments(tmp_path), CaptionPairDataset(CAPTIONS))
    trainer = CaptionContrastiveTrainer(
        build_caption_encoder(llm_dir), arguments(tmp_path), CaptionPairDataset(CAPTIONS[:4])
    )
    with pytest.raises(ValueError, match="less than one batch of 5 pairs"):
        trainer.train()


def test_long_warm_up_is_said(llm_dir, tmp_path, caplog):
    trainer = CaptionContrastiveTrainer(
        build_caption_encoder(llm_dir),
        arguments(tmp_path, warmup_steps=300, max_steps=1),
        CaptionPairDataset(CAPTIONS),
    )
    trainer.train()
    assert "takes the whole run" in caplog.text


# --------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_llm_equals_the_one_with_adapters(llm_dir, dtype):
    encoder = encoder_with_random_lora(llm_dir, dtype=dtype).eval()
    assert {p.dtype for p in encoder.parameters() if p.requires_grad} == {torch.float32}
    attached = encoder.encode(TEXTS, convert_to_tensor=True)
    merged = merged_llm(encoder.llm)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert not any("lora" in name for name in merged.state_dict())
    encoder[0].model = merged
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(encoder.encode(TEXTS, convert_to_tensor=True), attached, atol=tolerance, rtol=0)


def test_saving_merges_the_copy_only_and_a_second_save_replaces_the_first(llm_dir, tmp_path):
    encoder = encoder_with_random_lora(llm_dir).eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encoder.save_pretrained(str(tmp_path / "encoder"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    (tmp_path / "encoder" / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    encoder.save_pretrained(str(tmp_path / "encoder"))
    assert sorted(path.name for path in (tmp_path / "encoder").iterdir()) == [
        *("1_CaptionPooling", "README.md", "caption_pooling.py", "config.json", "config_sentence_transformers.json"),
        *("model.safetensors", "modules.json", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    reopened = build_caption_encoder(str(tmp_path / "encoder"), lora=None)
    torch.testing.assert_close(reopened.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5, rtol=0)
    assert reopened.fingerprint() == encoder.fingerprint()
    assert encoder.fingerprint() != build_caption_encoder(llm_dir).fingerprint()
    with pytest.raises(ValueError, match="safetensors only"):
        encoder.save_pretrained(str(tmp_path / "encoder"), safe_serialization=False)


def test_missing_extra_is_named():
    code = "import sys; sys.modules['peft'] = None\nimport llm2clip_hf.training"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip().splitlines()[-1] == (
        "ImportError: `llm2clip_hf.training` needs `peft`. Install it with `pip install llm2clip-hf[train]`."
    )
