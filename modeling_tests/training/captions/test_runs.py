# SPDX-License-Identifier: Apache-2.0
"""Runs of the stage-1 trainer: mixed sources, streams, resuming after a kill, evaluation, and what stops a run."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import datasets
import pytest
import torch
from caption_training import CAPTIONS, Stream, Texts, arguments, encoder_with_random_lora
from transformers import TrainerCallback

from llm2clip_hf.data import CaptionPairDataset, stream_caption_pairs
from llm2clip_hf.evaluation import CaptionRetrievalEvaluator
from llm2clip_hf.training import CaptionContrastiveTrainer, build_caption_encoder


def training_set(kind: str):
    if kind == "pairs":
        return CaptionPairDataset(CAPTIONS, seed=3)
    if kind == "mixed":
        return {
            "captions": CaptionPairDataset(CAPTIONS, seed=3),
            "texts": Texts("text", 12, "find the text: ", negatives=True),
        }
    if kind == "shuffled":
        rows = datasets.Dataset.from_dict({"key": list(range(len(CAPTIONS))), "captions": CAPTIONS})
        pairs = stream_caption_pairs(rows.to_iterable_dataset(), id_column="key", seed=3, instruction="find it: ")
        return pairs.shuffle(buffer_size=9)
    return Stream(13)


def record_batches(trainer: CaptionContrastiveTrainer) -> list[dict]:
    batches, collate = [], trainer.data_collator

    def record(rows: list[dict]) -> dict:
        batch = collate(rows)
        batches.append({"rows": rows, "batch": batch})
        return batch

    trainer.data_collator = record
    return batches


# -------------------------------------------------------------------------------------------------------- the sources


def test_every_batch_of_a_mapping_has_one_source_and_its_instruction(llm_dir, tmp_path):
    sources = training_set("mixed")
    args = arguments(tmp_path, num_train_epochs=2, save_strategy="no")
    trainer = CaptionContrastiveTrainer(encoder_with_random_lora(llm_dir), args, sources)
    batches = record_batches(trainer)
    trainer.train()
    assert trainer.state.global_step == len(batches) == 2 * (23 // 5 + 12 // 5)
    seen: dict[str, list[set[str]]] = {"captions": [set(), set()], "texts": [set(), set()]}
    for number, each in enumerate(batches):
        (source,) = {row["dataset_name"] for row in each["rows"]}
        assert ("anchor_prompt_length" in each["batch"]) == (source == "texts")
        assert ("negative_input_ids" in each["batch"]) == (source == "texts")
        seen[source][number // 6] |= {row["positive"] for row in each["rows"]}
    for epoch in range(2):
        for source in sources.values():
            source.set_epoch(epoch)
        for name, source in sources.items():
            assert seen[name][epoch] < {source[row]["positive"] for row in range(len(source))}
            assert len(seen[name][epoch]) == len(source) // 5 * 5


def test_equal_captions_are_not_negatives_behind_an_instruction(llm_dir, tmp_path):
    class Waves(Texts):
        def __getitem__(self, row):
            texts = [("a wave", "a man on a wave"), ("the sea", "a wave")][row % 2]
            return dict(zip(("anchor", "positive"), texts))

    losses = []
    for masked in (True, False):
        encoder = encoder_with_random_lora(llm_dir).eval()
        args = arguments(tmp_path, per_device_train_batch_size=2, mask_false_negatives=masked)
        trainer = CaptionContrastiveTrainer(encoder, args, Waves("", 2, "find it: "))
        batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
        losses.append(trainer.compute_loss(encoder, batch).item())
    anchors = encoder.encode(
        ["a wave", "the sea"], prompt="find it: ", convert_to_tensor=True, normalize_embeddings=True
    )
    positives = encoder.encode(["a man on a wave", "a wave"], convert_to_tensor=True, normalize_embeddings=True)
    logits = 50 * anchors.double() @ positives.double().T
    plain = -logits.log_softmax(1).diagonal()
    assert losses[1] == pytest.approx(plain.mean().item(), rel=1e-4)
    assert losses[0] == pytest.approx(plain[1].item() / 2, rel=1e-4)  # the first row has no negative left


def test_labels_of_a_plain_dataset_keep_captions_of_an_image_apart(llm_dir, tmp_path):
    columns = {"label": [7, 8, 7], "positive": ["red", "blue", "green"], "anchor": ["boat", "tree", "dog"]}
    encoder = encoder_with_random_lora(llm_dir).eval()
    args = arguments(tmp_path, per_device_train_batch_size=3)
    trainer = CaptionContrastiveTrainer(encoder, args, datasets.Dataset.from_dict(columns))
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(3)])
    loss = trainer.compute_loss(encoder, batch).item()
    anchors, positives = (
        encoder.encode(columns[name], convert_to_tensor=True, normalize_embeddings=True).double()
        for name in ("anchor", "positive")
    )
    logits = 50 * anchors @ positives.T
    logits[0, 2] = logits[2, 0] = -torch.inf
    assert loss == pytest.approx(-logits.log_softmax(1).diagonal().mean().item(), rel=1e-4)


def test_stream_trains_for_max_steps_over_its_end(llm_dir, tmp_path):
    rows = [{"anchor": f"a {i}", "positive": f"b {i}", "label": i} for i in range(7)]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    args = arguments(tmp_path, max_steps=4, save_strategy="no")
    trainer = CaptionContrastiveTrainer(encoder_with_random_lora(llm_dir), args, stream)
    batches = record_batches(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    read = [row["anchor"] for each in batches for row in each["rows"]]
    assert read[:20] == [f"a {number % 7}" for number in range(20)]


def test_shuffled_stream_keeps_its_instruction_and_draws_anew_in_every_pass(llm_dir, tmp_path):
    args = arguments(tmp_path, max_steps=14, save_strategy="no")  # three passes and a bit
    trainer = CaptionContrastiveTrainer(encoder_with_random_lora(llm_dir), args, training_set("shuffled"))
    batches = record_batches(trainer)
    trainer.train()
    assert all("anchor_prompt_length" in each["batch"] for each in batches)
    read = [row for each in batches for row in each["rows"]]
    pairs, size = CaptionPairDataset(CAPTIONS, seed=3), len(CAPTIONS)
    orders = []
    for epoch in range(3):
        pairs.set_epoch(epoch)
        drawn = read[epoch * size : (epoch + 1) * size]
        orders.append([row["label"] for row in drawn])
        assert sorted(orders[-1]) == list(range(size))
        assert all(row["anchor"] == pairs[row["label"]]["anchor"] for row in drawn)
    assert orders[0] != orders[1] != orders[2]


# ----------------------------------------------------------------------------------------------------------- resuming


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(llm_dir, folder: Path, kind: str, resume: bool = False, kill: int | None = None, **kwargs):
    encoder = encoder_with_random_lora(llm_dir, lora={"lora_dropout": 0.3})
    args = arguments(folder, save_steps=3, max_steps=9, **kwargs)
    trainer = CaptionContrastiveTrainer(encoder, args, training_set(kind), callbacks=[Kill(kill)] if kill else None)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("kind", "kill", "kwargs"),
    [
        ("pairs", 8, {"mini_batch_tokens": 60}),  # within the second epoch
        ("mixed", 5, {"gradient_accumulation_steps": 2}),  # at the end of the first
        ("stream", 4, {}),
        ("shuffled", 8, {}),  # within the second pass
    ],
)
def test_killed_run_goes_on_with_the_same_weights(llm_dir, tmp_path, kind, kill, kwargs):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = run(llm_dir, tmp_path / "whole", kind, **kwargs)
        arguments_of_run = (llm_dir, tmp_path / "killed", kind, False, kill)
        killed = multiprocessing.get_context("fork").Process(target=run, args=arguments_of_run, kwargs=kwargs)
        killed.start()
        killed.join(timeout=100)
        assert killed.exitcode == -signal.SIGKILL
        last = (kill - 1) // 3 * 3 if kill % 3 == 0 else kill // 3 * 3
        saved = sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*"))
        assert saved[-1] == f"checkpoint-{last}"
        assert (tmp_path / "killed" / saved[-1] / "adapter" / "adapter_model.safetensors").is_file()
        assert not (tmp_path / "killed" / saved[-1] / "model.safetensors").exists()
        resumed = run(llm_dir, tmp_path / "killed", kind, resume=True, **kwargs)
    finally:
        torch.set_num_threads(threads)
    assert resumed.state.global_step == whole.state.global_step == 9
    for (name, one), two in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(one, two), name
    losses = [{e["step"]: e["loss"] for e in t.state.log_history if "loss" in e} for t in (whole, resumed)]
    assert losses[0] == losses[1]
    if kind == "stream":
        return
    changed = [name for name, p in whole.model.named_parameters() if p.requires_grad]
    fresh = dict(encoder_with_random_lora(llm_dir, lora={"lora_dropout": 0.3}).named_parameters())
    assert all((dict(whole.model.named_parameters())[name] != fresh[name]).any() for name in changed)


# --------------------------------------------------------------------------------------------------------- evaluation


def test_evaluator_runs_before_during_and_alone_and_the_best_model_is_loaded(llm_dir, tmp_path):
    evaluator = CaptionRetrievalEvaluator([captions[:2] for captions in CAPTIONS], name="held-out")
    options = {
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "max_steps": 6,
        "load_best_model_at_end": True,
        "metric_for_best_model": f"eval_{evaluator.primary_metric}",
        "learning_rate": 0.3,  # high enough to make the last weights worse than earlier ones
    }
    encoder = encoder_with_random_lora(llm_dir)
    trainer = CaptionContrastiveTrainer(
        encoder, arguments(tmp_path, **options), training_set("pairs"), evaluator=evaluator
    )
    before = evaluator(encoder)[evaluator.primary_metric]
    key = options["metric_for_best_model"]
    assert trainer.evaluate()[key] == before
    trainer.train()
    scores = {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}
    assert scores[0] == before
    assert list(scores) == [0, 2, 4, 6]
    best = max((2, 4, 6), key=lambda step: scores[step])
    assert trainer.state.best_global_step == best
    assert evaluator(encoder)[evaluator.primary_metric] == scores[best]
    assert trainer.evaluate()[key] == scores[best]
    stored = tmp_path / f"checkpoint-{best}" / "adapter" / "adapter_model.safetensors"
    stored.unlink()
    with pytest.raises(ValueError, match="holds no `adapter/`"):
        trainer._load_best_model()


def test_loss_of_evaluation_sets_is_the_formula_by_name(llm_dir, tmp_path):
    encoder = encoder_with_random_lora(llm_dir)
    pairs = CaptionPairDataset(CAPTIONS[:5])
    plain = datasets.Dataset.from_dict({"positive": ["red", "blue"] * 5, "anchor": [f"{i} boats" for i in range(10)]})
    args = arguments(tmp_path, per_device_eval_batch_size=5, scale=20.0)
    trainer = CaptionContrastiveTrainer(encoder, args, pairs, {"pairs": pairs, "plain": plain})
    metrics = trainer.evaluate()
    rows = [pairs[row] for row in range(5)]
    anchors, positives = (
        encoder.encode([row[name] for row in rows], convert_to_tensor=True, normalize_embeddings=True).double()
        for name in ("anchor", "positive")
    )
    expected = -(20 * anchors @ positives.T).log_softmax(1).diagonal().mean().item()
    assert metrics["eval_pairs_loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["eval_plain_loss"] > 0
    assert trainer.evaluate()["eval_plain_loss"] == metrics["eval_plain_loss"]
    assert trainer.evaluate(plain.select(range(4)))["eval_loss"] > 0  # fewer rows than a batch


def test_evaluation_drops_no_rows(llm_dir, tmp_path):
    encoder = encoder_with_random_lora(llm_dir)
    columns = {"anchor": [f"{i} boats" for i in range(12)], "positive": [f"the boats {i}" for i in range(12)]}
    rows = datasets.Dataset.from_dict({**columns, "label": range(12)})
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    args = arguments(tmp_path, per_device_eval_batch_size=8, scale=20.0, **workers)
    trainer = CaptionContrastiveTrainer(encoder, args, training_set("pairs"), rows)
    batches = [batch["label"].tolist() for batch in trainer.get_eval_dataloader()]
    assert sorted(sum(batches, [])) == list(range(12))
    assert [len(batch) for batch in batches] == [6, 6]
    assert trainer.get_eval_dataloader() is trainer.get_eval_dataloader()  # its workers live on
    anchors, positives = (
        encoder.encode(list(rows[name]), convert_to_tensor=True, normalize_embeddings=True).double()
        for name in ("anchor", "positive")
    )
    losses = [-(20 * anchors[b] @ positives[b].T).log_softmax(1).diagonal().mean().item() for b in batches]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)


# ------------------------------------------------------------------------------------------------- what stops a run


def test_wrong_training_sets_are_refused(llm_dir, tmp_path, caplog):
    encoder = encoder_with_random_lora(llm_dir)

    def trainer(dataset: object, **kwargs: object) -> CaptionContrastiveTrainer:
        return CaptionContrastiveTrainer(encoder, arguments(tmp_path, **kwargs), dataset)

    with pytest.raises(ValueError, match="is a stream, whose length is not known.*Set `max_steps`"):
        trainer(Stream(5))
    with pytest.raises(ValueError, match="`dataloader_num_workers` is 2, but a stream"):
        trainer(Stream(5), max_steps=3, dataloader_num_workers=2)
    with pytest.raises(ValueError, match="`train_dataset` is int"):
        trainer(3)
    with pytest.raises(ValueError, match=r"`train` has the unknown columns \['score'\]"):
        trainer(datasets.Dataset.from_dict({"anchor": ["a"], "positive": ["b"], "score": [0.5]}))
    with pytest.raises(ValueError, match="`batch_sampler` is .*mask_false_negatives"):
        trainer(training_set("pairs"), batch_sampler="no_duplicates")
    with pytest.raises(ValueError, match="`multi_dataset_batch_sampler` is .*ROUND_ROBIN.*draws batches itself"):
        trainer(training_set("mixed"), multi_dataset_batch_sampler="round_robin")
    with pytest.raises(ValueError, match="`train_sampling_strategy` is 'group_by_length'.*`mini_batch_tokens` sorts"):
        trainer(Stream(5), max_steps=3, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="`prompts` is set"):
        trainer(training_set("mixed"), prompts={"anchor": "find: "})
    with pytest.raises(
        ValueError, match="less than one batch of 5 pairs per device: its sources have \\[4, 3\\] rows"
    ):
        trainer({"a": Texts("a", 4), "b": Texts("b", 3)}).train()
    with pytest.raises(ValueError, match="needs a `train_dataset`"):
        trainer(None).train()
    with pytest.raises(ValueError, match="use_reentrant"):
        arguments(tmp_path, mini_batch_size=2, gradient_checkpointing_kwargs={"use_reentrant": True})
    trainer({"a": Texts("a", 4), "b": Texts("b", 6)}, max_steps=1, save_strategy="no").train()
    assert "The source `a` of 4 rows holds less than one batch of 5 pairs per device" in caplog.text


def test_weights_in_half_precision_are_not_trained(llm_dir, tmp_path):
    pairs = training_set("pairs")
    encoder = build_caption_encoder(llm_dir, lora=None, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"trained parameters are in half precision, first `0\.model.*torch\.bfloat16.*`dtype=torch"
    ):
        CaptionContrastiveTrainer(encoder, arguments(tmp_path), pairs)
    # Without training it is an encoder like any other, and LoRA on it is float32.
    assert CaptionContrastiveTrainer(encoder, arguments(tmp_path), None, pairs).evaluate()["eval_loss"] > 0
    assert encoder.llm.dtype == torch.bfloat16
    CaptionContrastiveTrainer(build_caption_encoder(llm_dir, dtype=torch.bfloat16), arguments(tmp_path), pairs)


@pytest.mark.parametrize("kind", ["pairs", "stream"])
def test_batch_size_is_lowered_where_memory_ends(llm_dir, tmp_path, kind):
    tried = []

    class SmallMemory(CaptionContrastiveTrainer):
        def training_step(self, model, inputs, *others):
            tried.append(len(inputs["anchor_input_ids"]))
            if tried[-1] > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *others)

    options = {"auto_find_batch_size": True, "save_strategy": "no", "max_steps": 2}
    trainer = SmallMemory(encoder_with_random_lora(llm_dir), arguments(tmp_path, **options), training_set(kind))
    assert trainer.train().global_step == 2
    assert (tried[0], tried[-2:]) == (5, [4, 4])


def test_one_row_without_a_negative_is_refused(llm_dir, tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=1, max_steps=1, save_strategy="no")
    encoder = encoder_with_random_lora(llm_dir)
    with pytest.raises(ValueError, match="one row without a hard negative"):
        CaptionContrastiveTrainer(encoder, args, Texts("a", 3)).train()
    CaptionContrastiveTrainer(encoder, args, Texts("a", 3, negatives=True)).train()


def test_finished_run_records_how_it_was_trained_in_text(llm_dir, tmp_path):
    args = arguments(tmp_path / "run", max_steps=2, save_strategy="no", learning_rate=3e-4, seed=11)
    trainer = CaptionContrastiveTrainer(encoder_with_random_lora(llm_dir), args, training_set("pairs"))
    trainer.train()
    trainer.save_model(str(tmp_path / "merged"))
    trainer.model.save_adapter(str(tmp_path / "adapter"))
    trainer.save_record(str(tmp_path / "adapter"))
    for folder in (tmp_path / "merged", tmp_path / "adapter"):
        card = (folder / "README.md").read_text()
        for row in ("`learning_rate` | 0.0003", "`seed` | 11", "`scale` | 50", "`steps` | 2", "`max_steps` | 2"):
            assert f"| {row} |" in card
        options = json.loads((folder / "training_args.json").read_text())
        assert (options["learning_rate"], options["seed"], options["mask_false_negatives"]) == (3e-4, 11, True)
        assert options["batch_sampler"] == "batch_sampler"
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2
        assert str(tmp_path) not in json.dumps(options)


def test_text_whose_embedding_is_not_finite_is_named_with_its_step(llm_dir, tmp_path):
    encoder = encoder_with_random_lora(llm_dir)
    bad = encoder.tokenizer("7", add_special_tokens=False)["input_ids"][-1]
    table = encoder.llm.get_input_embeddings().weight
    with torch.no_grad():
        table[bad] = float("inf")
    rows = {"anchor": [f"boat {i}" for i in range(6)], "positive": ["a", "b", "c", "d", "dog 7", "e"]}
    args = arguments(tmp_path, per_device_train_batch_size=3, save_strategy="no", learning_rate=1e-4, seed=1)
    trainer = CaptionContrastiveTrainer(encoder, args, datasets.Dataset.from_dict(rows))
    with pytest.raises(
        FloatingPointError, match=r"Step \d: The loss is nan.*positive \d of the batch \('.*dog 7"
    ) as info:
        trainer.train()
    where = f"The weights are those of step {trainer.state.global_step}; "
    assert f"{where}1 frozen parameters are not finite, first `0.model.embed_tokens.weight`" in str(info.value)
    with torch.no_grad():
        next(p for p in encoder.parameters() if p.requires_grad).fill_(float("nan"))
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(
        FloatingPointError, match="no embedding of this device is finite.*the run has diverged"
    ) as info:
        trainer.compute_loss(encoder, batch)
    assert "boat" not in str(info.value)  # no text is to blame


def test_gradient_that_is_not_finite_stops_before_the_weights_are_touched(llm_dir, tmp_path):
    encoder = encoder_with_random_lora(llm_dir)
    trained = next(p for p in encoder.parameters() if p.requires_grad)
    trained.register_hook(lambda gradient: gradient * float("nan"))
    trainer = CaptionContrastiveTrainer(encoder, arguments(tmp_path), training_set("pairs"))
    with pytest.raises(FloatingPointError, match="The gradient norm is nan at step 1"):
        trainer.train()
    assert all(p.isfinite().all() for p in encoder.parameters())
