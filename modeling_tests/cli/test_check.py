# SPDX-License-Identifier: Apache-2.0
"""`--check` of the verbs: what would fail later fails at once, with one line, and nothing is embedded or written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from clip_training import clip_text_tower
from shard_files import CAPTION_FIELDS, write_shards
from stub_hub import stub_hub
from tiny_data import COLOURS, write_training_files
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, CLIPTextModelWithProjection

from llm2clip_hf.cli import main as cli
from llm2clip_hf.data import CaptionEmbeddingStore, load_image_text
from llm2clip_hf.evaluation import embed_texts, encode_images, evaluate_zero_shot_classification, retrieval_metrics
from llm2clip_hf.modeling import apply_text_template, text_prefix_length
from llm2clip_hf.training import concatenated_text_embeds, load_concatenated_text_head


pytest.importorskip("sentence_transformers")

COMMON = ["--report_to", "none", "--disable_tqdm", "True", "--per_device_train_batch_size", "8", "--use_cpu", "True"]


def save_llm(folder: Path, config: Any) -> None:
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_models.llama3_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("check")
    write_training_files(path)
    write_shards(path, [9, 7])
    wide = tiny_models.text_config()
    wide.hidden_size *= 2
    save_llm(path / "wide", wide)
    save_llm(path / "other", tiny_models.text_config())
    save_llm(path / "gpt2", AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=2, vocab_size=tiny_models.VOCAB))
    shutil.copytree(path / "vision", path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(path / "llm", path / "cut")
    weights = path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    prefix = text_prefix_length(apply_text_template(tiny_models.llama3_tokenizer()))
    tiny_models.model(text=None, text_prefix_length=prefix).save_pretrained(path / "model")
    tiny_models.processor().save_pretrained(path / "model")
    for name, tower in (("mobile", "mobilenet_v2"), ("large", "clip")):
        tiny_models.model(tower, None).vision_model.save_pretrained(path / name)
        processor = tiny_models.image_processor()
        processor.crop_size = {"height": 48, "width": 48} if name == "large" else processor.crop_size
        processor.save_pretrained(path / name)
    (path / "broken.png").write_bytes(b"no image")
    (path / "broken.jsonl").write_text('{"file_name": "broken.png", "caption": "a red sea"}\n' * 1)
    # The data set of labels: the same images, classes by colour.
    import datasets

    table = datasets.Dataset.from_parquet(str(path / "train.parquet"))
    colours = [colour for colour in COLOURS for _ in range(5)]
    table.select_columns(["image"]).add_column("label_name", colours).to_parquet(path / "colours.parquet")
    run("embed-captions", "--llm", path / "llm", "--data", path / "train.parquet", "--output_dir", path / "store")
    return path


def run(*argv: object) -> None:
    assert cli.main([str(argument) for argument in argv]) == 0


def clip_options(folder: Path, **changes: Any) -> list[str]:
    options: dict[str, Any] = {
        "vision_model": folder / "vision", "text_model": folder / "llm", "data": folder / "train.parquet",
        "output_dir": folder / "out",
    }  # fmt: skip
    options |= changes
    given = [
        [f"--{name}", *map(str, value if isinstance(value, list) else [value])] for name, value in options.items()
    ]
    known = {f"--{name}" for name in options}
    common = [[COMMON[k], COMMON[k + 1]] for k in range(0, len(COMMON), 2) if COMMON[k] not in known]
    return [word for entry in [*given, *common] if entry[1] != "None" for word in entry]


CLIP_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "vision model": ({"vision_model": "nowhere"}, "`--vision_model nowhere` is no model"),
    "vision folder": ({"vision_model": "./no/where"}, "is no model that can be read: there is no such folder"),
    "text model": ({"text_model": "nowhere/at-all"}, "`--text_model nowhere/at-all` is no model"),
    "weights": ({"vision_model": "{}/empty"}, "has a config, but no weights"),
    "cut weights": ({"text_model": "{}/cut"}, "`model.safetensors` is cut off"),
    "CLIP's text encoder": ({"clip_text_model": "nowhere", "integration": "both"}, "`--clip_text_model nowhere`"),
    "causal LLM": ({"text_model": "{}/gpt2"}, "does not attend bidirectionally"),
    "width": (
        {"vision_model": None, "model": "{}/model", "text_model": "{}/wide"},
        "gives embeddings of width 64, the adaptor of `--model",
    ),
    "no LLM": ({"vision_model": None, "model": "{}/model", "text_model": None}, "holds no LLM and names none"),
    "another LLM's store": ({"text_model": "{}/other", "store": "{}/store"}, "were made by another LLM"),
    "another table's store": (
        {"store": "{}/store", "caption_columns": "raw_caption"}, "made from other captions than those of this run"
    ),
    "weights of unknown sources": ({"caption_weights": ["a=1", "b=1"]}, "`caption_weights` names ['a', 'b']"),
    "weights that are none": ({"caption_weights": ["raw_caption=x"]}, "`--caption_weights` must be numbers"),
    "column of weights": ({"weight_column": "nosuch"}, "has no column `nosuch`; it has"),
    "weights that are no numbers": ({"weight_column": "raw_caption"}, "expected a positive number"),
    "exchange": ({"loss_exchange": "star"}, "`loss_exchange` must be one of 'gather', 'ring', got 'star'"),
    "smoothed false negatives": (
        {"label_smoothing_factor": 0.1, "mask_false_negatives": True}, "`label_smoothing_factor=0.1` gives every pair"
    ),
    "columns": ({"caption_columns": "nosuch"}, "nosuch"),
    "LLM that is not used": (
        {"vision_model": None, "model": "{}/model", "text_mode": "online"}, "so `--text_model` has no effect"
    ),
    "fields of a table": ({"caption_fields": "real=txt"}, "`--caption_fields` are for `--shards`"),
    "store that is not used": ({"text_mode": "online", "store": "{}/store"}, "`--store` has no effect"),
    "crop": ({"crop_scale": [1.2, 0.5]}, "`--crop_scale` needs two numbers"),
    "epochs": ({"num_train_epochs": 0}, "`--num_train_epochs 0`"),
    "batch": ({"per_device_train_batch_size": 99}, "Lower `--per_device_train_batch_size`"),
    "batch and steps": ({"per_device_train_batch_size": 99, "max_steps": 3}, "less than one batch"),
    "output": ({"output_dir": "{}/train.parquet"}, "is no folder that can be written to"),
    "checkpoint": ({"resume_from_checkpoint": "{}/checkpoint-7"}, "checkpoint-7` is no folder"),
    "device": ({"device": "nosuch"}, "`--device nosuch` cannot be used"),
    "precision": ({"fp16": True}, "`--fp16` needs a GPU"),
    "push": ({"push_to_hub": True}, "`--push_to_hub True` cannot be used"),
    "attention": ({"attn_implementation": "nosuch"}, "nosuch"),
    "rows of a shard of the store": ({"rows_per_shard": 0}, "`--rows_per_shard` must be positive"),
    "kind of model": ({"vision_model": None, "model": "{}/vision"}, "not an LLM2CLIP model"),
    "pooling of a tower": ({"model_config": "vision_pooling=cls", "vision_model": "{}/mobile"}, "cannot be used"),
    "size of images": ({"vision_model": "{}/large"}, "Input image size"),
    "image": ({"data": "{}/broken.jsonl"}, "broken.png"),
    "image to measure": ({"test_data": "{}/broken.jsonl"}, "broken.png"),
    "LLM to bundle": (
        {"vision_model": None, "text_model": None, "model": "{}/model", "text_weights": "bundled",
         "store": "{}/store"},
        "holds no LLM and names none",
    ),
    "shards": ({"data": None, "shards": "nothere/*.tar", "caption_fields": "real=txt"}, "nothere/*.tar"),
    "weights of shards": (
        {"data": None, "shards": "{}/{{000..001}}.tar", "caption_fields": "real=txt", "weight_column": "json.nosuch"},
        "its weight is None, expected a positive number",
    ),
    "field of shards": (
        {"data": None, "shards": "{}/{{000..001}}.tar", "caption_fields": "real=nosuch"}, "no caption"
    ),
    "reporter": ({"report_to": "nosuch"}, "`--report_to nosuch` cannot be used"),
    "reporter not installed": ({"report_to": "comet_ml"}, "`--report_to comet_ml` cannot be used"),
    "optimizer not installed": ({"optim": "adamw_8bit"}, "`--optim adamw_8bit` cannot be used"),
    "test data": ({"test_data": "nowhere.parquet"}, "nowhere.parquet"),
    "labels": ({"zero_shot_data": "{}/train.parquet"}, "label"),
    "kind of labels": ({"zero_shot_data": "coco"}, "is a task of the kind retrieval"),
    "nothing to evaluate": ({"eval_strategy": "epoch"}, "Give `--test_data` or `--zero_shot_data`"),
    "early stopping alone": ({"early_stopping_patience": 2}, "`--early_stopping_patience` needs evaluations"),
    "metric": (
        {"test_data": "{}/train.parquet", "eval_strategy": "epoch", "metric_for_best_model": "test_text_to_image_R@1"},
        "is not measured; did you mean `test_text_to_image_recall@1`?",
    ),
    "metric of an absent head": (
        {
            "test_data": "{}/train.parquet", "eval_strategy": "epoch",
            "metric_for_best_model": "test_clip_text_text_to_image_recall@1",
        },
        "is not measured",
    ),
    "rank": (
        {
            "test_data": "{}/train.parquet", "eval_strategy": "epoch",
            "metric_for_best_model": "test_text_to_image_mean_rank",
        },
        "Set `--greater_is_better False`",
    ),
    "loss": ({"loss_type": "sigmoid"}, "--model_config logit_bias_init_value=-10"),
    "field of the config": ({"model_config": "vision_poling=mean"}, "did you mean `vision_pooling`?"),
    "value of the config": ({"model_config": "vision_pooling=max"}, "`vision_pooling` must be one of"),
    "width of the config twice": (
        {"model_config": "projection_dim=8", "projection_dim": 20}, "`--projection_dim` is 20 and"
    ),
    "config of a given model": (
        {"vision_model": None, "model": "{}/model", "model_config": "adapter_dropout=0.1"},
        "`--model_config` is for a new model",
    ),
    "no space for a projection": (
        {"model_config": ["vision_projection=none", "projection_dim=20"]}, "needs `projection_dim` to equal"
    ),
    "pooling without end": (
        {"model_config": "text_pooling=eos", "template": "none"}, "puts no end token after a text"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CLIP_CASES))
def test_train_clip_fails_before_anything_is_embedded(
    folder: Path, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same line with and without `--check`; the LLM is not read where its store is not there yet."""
    changes, message = CLIP_CASES[case]

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(entry) for entry in value]
        return value.format(folder) if isinstance(value, str) else value

    argv = ["train-clip", *clip_options(folder, **{name: placed(value) for name, value in changes.items()})]
    monkeypatch.delenv("LLM2CLIP_DEBUG", raising=False)
    lines = []
    for more in (["--check"], []):
        assert cli.main([*argv, *more]) == 1
        lines.append(capsys.readouterr().err.splitlines()[-1])
    assert message in lines[0] and lines[0].startswith("llm2clip train-clip: ") and lines[0] == lines[1]
    assert not (folder / "out").exists()


CAPTION_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "LLM": ({"llm": "nowhere"}, "`--llm nowhere` is no model"),
    "causal LLM": ({"llm": "{}/gpt2"}, "does not attend bidirectionally"),
    "captions": ({"captions": "nowhere.jsonl"}, "nowhere.jsonl"),
    "batch": ({"per_device_train_batch_size": 99}, "less than one batch"),
    "reporter": ({"report_to": "nosuch"}, "`--report_to nosuch` cannot be used"),
    "pooling": ({"pooling": "eos", "template": "a caption: {{text}} ."}, "texts end in no end token"),
    "adapter": ({"adapter_only": True, "lora_r": 0}, "`--adapter_only` saves the LoRA adapter"),
    "nothing to evaluate": ({"eval_strategy": "epoch", "num_test_images": 0}, "Give `--test_captions`"),
    "quantization": ({"quantization": "4bit"}, "`quantization`"),
}


@pytest.mark.parametrize("case", list(CAPTION_CASES))
def test_train_captions_fails_before_the_llm_is_loaded(
    folder: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = CAPTION_CASES[case]
    if case == "quantization" and torch.cuda.is_available():
        pytest.skip("there is a GPU to quantize on")
    changes = {name: value.format(folder) if isinstance(value, str) else value for name, value in changes.items()}
    base: dict[str, Any] = {"llm": folder / "llm", "captions": folder / "captions.jsonl", "num_test_images": 4}
    options = clip_options(
        folder, **{"vision_model": None, "text_model": None, "data": None, "mntp_steps": 2, **base, **changes}
    )
    assert cli.main(["train-captions", *options, "--check"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line and line.startswith("llm2clip train-captions: ")
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llm": "nowhere"}, "`--llm nowhere` is no model"),
        ({"llm": "{}/cut"}, "is cut off"),
        ({"llm": "{}/model"}, "is a model without an LLM"),
        ({"caption_columns": "nosuch"}, "nosuch"),
        ({"output_dir": "{}/store", "caption_columns": "raw_caption"}, "holds the embeddings of other captions"),
        ({"rows_per_shard": 0}, "`--rows_per_shard` must be positive"),
    ],
)
def test_embed_captions_fails_before_the_llm_is_loaded(
    folder: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"llm": "{}/llm", "data": "{}/train.parquet", "output_dir": "{}/out", **changes}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value).format(folder))]
    assert cli.main(["embed-captions", *words, "--check"]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (folder / "out").exists()


def test_check_of_embed_captions_says_what_would_be_embedded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("embed-captions", "--llm", folder / "llm", "--data", folder / "train.parquet", "--output_dir", folder / "out",
        "--check")  # fmt: skip
    text = capsys.readouterr().out
    assert "captions  60 of 20 images, sources raw_caption, dense_caption" in text
    assert f"at width {tiny_models.TEXT_WIDTH} in float16" in text and "LlamaModel" in text
    assert not (folder / "out").exists()


def test_check_of_train_clip_tells_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = clip_options(
        folder, test_data=folder / "train.parquet", zero_shot_data=f"{folder}/colours.parquet?label_column=label_name",
        store=folder / "store", model_config=["vision_pooling=mean", "adapter_expansion=1", "projection_dim=12"],
        caption_weights=["raw_caption=3", "dense_caption=1"], gradient_accumulation_steps=2, num_train_epochs=3,
        train_vision="frozen",
    )  # fmt: skip
    run("train-clip", *options, "--check")
    text = capsys.readouterr().out
    width = tiny_models.TEXT_WIDTH
    # Per block: two linear layers of equal width, and two norms; after four of them a projection to 12 without bias.
    for expected in (
        "train.parquet, split train, or the only one: images from `image`, captions raw_caption from",
        "train     20 images, 60 captions, raw_caption, dense_caption",
        "captions  raw_caption 75%, dense_caption 25% of the draws",
        "shared    60 of 60 captions and 20 of 20 images of the test data are in the training data too",
        "zero-shot 20 images, 4 classes, 1 templates",
        "pooling mean, projection linear to 12",
        "steps     3, 16 pairs per contrastive batch on 1 device(s)",
        f"{folder}/store: finished, 60 captions",
        f"{folder}/store-zero-shot: to be made, 0.00 GiB at width {width} in float16",
    ):
        assert expected in text, expected
    trained = next(line for line in text.splitlines() if line.startswith("trained"))
    assert "vision_model" not in trained and "text_adapter" in trained and "logit_scale 1" in trained
    assert not (folder / "out").exists() and not (folder / "store-zero-shot").exists()


def test_check_of_train_clip_tells_the_weights_of_pairs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    weights = [0.5 + 0.25 * (row % 4) for row in range(20)]
    table = datasets.Dataset.from_parquet(str(folder / "train.parquet"))
    table.add_column("score", weights).to_parquet(folder / "scored.parquet")
    run("train-clip", *clip_options(folder, data=folder / "scored.parquet", weight_column="score"), "--check")
    assert "weights   of pairs from `score`, 0.5 to 1.25" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "num_train_epochs": 2},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "accumulate_negatives": False},
        {"per_device_train_batch_size": 3, "dataloader_drop_last": False, "num_train_epochs": 0.5},
        {"data": None, "shards": "{}/{{000..001}}.tar", "gradient_accumulation_steps": 2,
         "per_device_train_batch_size": 3, "caption_fields": [f"{s}={f}" for s, f in CAPTION_FIELDS.items()],
         "store": "{}/shard-store"},
    ],
)  # fmt: skip
def test_steps_that_are_told_are_those_of_the_run(
    folder: Path, changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {name: value.format(folder) if isinstance(value, str) else value for name, value in changes.items()}
    base = {"num_train_epochs": 1, "store": folder / "store", "projection_dim": 12, "adapter_num_layers": 1}
    options = clip_options(folder, **{**base, **changes, "output_dir": tmp_path / "out"})
    run("train-clip", *options, "--check")
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("steps"))
    run("train-clip", *options, "--save_strategy", "no")
    done = json.loads((tmp_path / "out" / "results.json").read_text())["training"]["steps"]
    assert int(told.split()[1].rstrip(",")) == done


def test_fields_of_the_config_reach_the_model(folder: Path, tmp_path: Path) -> None:
    fields = {
        "vision_pooling": "mean", "vision_projection": "linear_bias", "projection_dim": 12, "adapter_num_layers": 1,
        "adapter_expansion": 3, "adapter_dropout": 0.25, "logit_bias_init_value": -10, "text_pooling": "eos",
        "logit_scale_init_value": 1.5, "normalize_llm_embeds": False,
    }  # fmt: skip
    given = [f"{name}={json.dumps(value).strip(chr(34))}" for name, value in fields.items()]
    options = clip_options(folder, model_config=given, output_dir=tmp_path / "out", max_steps=1, learning_rate=0)
    run("train-clip", *options)
    model = AutoModel.from_pretrained(tmp_path / "out", load_text_model=False)
    assert {name: getattr(model.config, name) for name in fields} == fields
    assert model.logit_bias.item() == -10 and model.logit_scale.item() == pytest.approx(1.5)
    # Embedded with the pooling that the model was told.
    assert CaptionEmbeddingStore.open(tmp_path / "out" / "store").fingerprint["pooling"] == "eos"
    # The same from a config file.
    config = tmp_path / "run.yaml"
    config.write_text("model_config: {projection_dim: 12, vision_pooling: mean}\n")
    check = clip_options(folder, config=config, output_dir=tmp_path / "none")
    run("train-clip", *check, "--check")


def history(output: Path) -> list[dict[str, float]]:
    """The evaluations of the last checkpoint of a run."""
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    logs = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [log for log in logs if any(name.startswith("eval_") for name in log)]


@pytest.mark.parametrize("mode", ["stored", "online"])
def test_zero_shot_accuracy_is_measured_during_training(folder: Path, tmp_path: Path, mode: str) -> None:
    task = f"zero-shot:{folder}/colours.parquet?label_column=label_name"
    options = clip_options(
        folder, output_dir=tmp_path / "out", zero_shot_data=task, num_train_epochs=3, eval_strategy="epoch",
        save_strategy="epoch", metric_for_best_model="zero_shot_top1", load_best_model_at_end=True, text_mode=mode,
        projection_dim=12, adapter_num_layers=1, store_dtype="float32", learning_rate=1e-3, dtype="float32",
    )  # fmt: skip
    run("train-clip", *options)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["zero_shot"]
    measured = [log["eval_zero_shot_top1"] for log in history(tmp_path / "out") if "eval_zero_shot_top1" in log]
    assert len(measured) == 3 and max(measured) == found["top1"]  # the best one is what is saved
    model = AutoModel.from_pretrained(tmp_path / "out")
    images = [str(folder / f"{number}.png") for number in range(20)]
    names = sorted(COLOURS)
    labels = [names.index(colour) for colour in COLOURS for _ in range(5)]
    expected = evaluate_zero_shot_classification(
        model, images, labels, names, processor=AutoProcessor.from_pretrained(tmp_path / "out")
    )
    assert found["top1"] == pytest.approx(expected["zero_shot_top1"])
    assert found["mean_per_class_recall"] == pytest.approx(expected["zero_shot_mean_per_class_recall"])


def test_training_stops_when_the_metric_gets_no_better(folder: Path, tmp_path: Path) -> None:
    options = clip_options(
        folder, output_dir=tmp_path / "out", store=folder / "early", test_data=folder / "train.parquet",
        num_train_epochs=9, eval_strategy="epoch", metric_for_best_model="test_text_to_image_recall@1",
        early_stopping_patience=2, learning_rate=0, projection_dim=12, adapter_num_layers=1,
    )  # fmt: skip
    run("train-clip", *options)
    # Two steps per epoch: the first evaluation is the best, and two more are no better.
    assert json.loads((tmp_path / "out" / "results.json").read_text())["training"]["steps"] == 6


@pytest.mark.parametrize("mode", ["stored", "online"])
@pytest.mark.parametrize("integration", ["both", "concatenated"])
def test_all_text_encoders_of_an_integration_are_measured(
    folder: Path, tmp_path: Path, mode: str, integration: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    tokenizer = tiny_models.llama3_tokenizer()
    tokenizer.pad_token, tokenizer.model_max_length = tokenizer.eos_token, 77
    # Another width than the joint space: the projection starts anew, the rest as it was.
    config = clip_text_tower(width=11).config
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    CLIPTextModelWithProjection(config).save_pretrained(tmp_path / "clip-text")
    tokenizer.save_pretrained(tmp_path / "clip-text")
    options = clip_options(
        folder, output_dir=tmp_path / "out", test_data=folder / "train.parquet", max_steps=2, projection_dim=12,
        adapter_num_layers=1, integration=integration, clip_text_model=tmp_path / "clip-text", text_mode=mode,
        store_dtype="float32", learning_rate=1e-2, eval_strategy="steps", eval_steps=1, save_steps=2, dtype="float32",
        metric_for_best_model="test_clip_text_text_to_image_recall@1",
    )  # fmt: skip
    run("train-clip", *options)
    output = tmp_path / "out"
    found = json.loads((output / "results.json").read_text())["test"]
    assert "clip_text_image_to_text_recall@1" in capsys.readouterr().out
    assert any("eval_test_clip_text_text_to_image_recall@1" in log for log in history(output))
    # From the saved folders, by the recipe of the documentation.
    table = load_image_text(folder / "train.parquet")
    model, processor = AutoModel.from_pretrained(output), AutoProcessor.from_pretrained(output)
    texts = table.captions.rows(0, table.captions.num_captions)
    start, clip = (
        CLIPTextModelWithProjection.from_pretrained(path)
        for path in (tmp_path / "clip-text", output / "clip_text_model")
    )
    assert clip.text_projection.weight.shape == (12, start.text_projection.weight.shape[1])
    moved = (clip.get_input_embeddings().weight - start.get_input_embeddings().weight).abs().amax()
    assert 0 < moved < 0.1  # trained from what was given, two steps of 0.01 and less
    heads = {"": embed_texts(model, texts, processor=processor)}
    heads["clip_text_"] = embed_texts(clip, texts, processor=tokenizer)
    if integration == "concatenated":
        head = load_concatenated_text_head(output)
        heads["concatenated_text_"] = concatenated_text_embeds(head, *reversed(heads.values()))
    owners = torch.tensor([table.captions.image_of(row) for row in range(len(texts))])
    images = encode_images(model, table.images, processor=processor)
    expected = {
        f"{name}{key}": value
        for name, embeds in heads.items()
        for key, value in retrieval_metrics(images, embeds, owners).items()
    }
    assert found.keys() == expected.keys()
    assert {key: pytest.approx(value, abs=1e-6) for key, value in expected.items()} == found


@pytest.mark.parametrize("mode", ["stored", "online"])
@pytest.mark.parametrize("text_weights", ["external", "bundled"])
def test_model_that_holds_its_llm_is_trained_on_and_saved_with_it(
    folder: Path, tmp_path: Path, mode: str, text_weights: str
) -> None:
    model = tiny_models.model(seed=3)
    model.save_pretrained(tmp_path / "whole")
    tiny_models.processor().save_pretrained(tmp_path / "whole")
    options = clip_options(
        folder, vision_model=None, text_model=None, model=tmp_path / "whole", output_dir=tmp_path / "out",
        max_steps=1, text_weights=text_weights, text_mode=mode, learning_rate=1e-2,
    )  # fmt: skip
    run("train-clip", *options)
    shutil.move(tmp_path / "whole", tmp_path / "elsewhere")
    trained = AutoModel.from_pretrained(tmp_path / "out")
    assert trained.config.text_weights == "bundled"
    expected, found = model.text_model.state_dict(), trained.text_model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(trained.logit_scale, model.logit_scale)


def test_adaptor_trained_on_stored_embeddings_gets_the_llm_that_made_them(folder: Path, tmp_path: Path) -> None:
    options = clip_options(
        folder, vision_model=None, model=folder / "model", store=folder / "store", output_dir=tmp_path / "out",
        max_steps=1,
    )  # fmt: skip
    run("train-clip", *options)
    trained = AutoModel.from_pretrained(tmp_path / "out")
    assert (trained.config.text_weights, trained.config.text_base_model) == ("external", str(folder / "llm"))


def test_models_of_the_hub_are_looked_up_and_not_fetched(folder: Path, tmp_path: Path) -> None:
    code = """
import sys
from llm2clip_hf.training.model_checks import find_model
print(find_model("org/llm", "llm").model_type)
for name in ("org/empty", "org/absent"):
    try:
        find_model(name, "llm")
    except ValueError as error:
        print(str(error).split(": ")[0])
"""
    with stub_hub() as hub:
        for name in ("llm", "empty"):
            files = {file.name: file.read_bytes() for file in (folder / "llm").iterdir()}
            if name == "empty":
                del files["model.safetensors"]
            hub.add(f"org/{name}", files)
        lines = hub.run(code, tmp_path).stdout.splitlines()
        assert lines == [
            "llama",
            "`--llm org/empty` has a config, but no weights",
            "`--llm org/absent` is no model that can be read",
        ]
        assert not any("safetensors" in request and "resolve" in request for request in hub.requests)


def test_stores_that_are_there_are_used_and_the_others_made(folder: Path, tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_parquet(str(folder / "train.parquet"))
    table.select(range(7)).to_parquet(tmp_path / "test.parquet")
    options = clip_options(
        folder, store=tmp_path / "my-test", test_data=tmp_path / "test.parquet", max_steps=1, projection_dim=12,
        adapter_num_layers=1, seed=3,
    )  # fmt: skip
    found = []
    for output in ("first", "second"):
        run("train-clip", *options, "--output_dir", tmp_path / output)
        found.append(json.loads((tmp_path / output / "results.json").read_text())["test"])
        shutil.rmtree(tmp_path / "my-test")
    assert found[0] == found[1]
    made = CaptionEmbeddingStore.open(tmp_path / "my-test-test")
    assert made.num_images == 7
