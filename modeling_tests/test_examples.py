# SPDX-License-Identifier: Apache-2.0
"""Every example runs, on tiny models and data, in the order a user would run them."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from original_models import make
from PIL import Image
from tiny_data import write_training_files
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from llm2clip_hf import LLM2CLIPModel


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_in_the_readme_and_tested() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    readme, tests = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    assert names == {name for name in names if f"`{name}`" in readme and f'"{name}"' in tests}


def test_every_example_that_trains_can_be_resumed() -> None:
    trained = {}
    for path in EXAMPLES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "train":
                trained[path.name] = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    assert set(trained) == {"train_clip.py", "train_caption_contrastive.py"}
    for name, given in trained.items():
        assert given == {"resume_from_checkpoint": "training_args.resume_from_checkpoint"}, name


@pytest.mark.parametrize("name", ["train_caption_contrastive.py", "train_clip.py"])
def test_training_examples_seed_before_they_build(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    builders = ("= build_caption_encoder(", ".from_vision_text_pretrained(", "Trainer(")
    assert 0 < text.index("\nset_seed(training_args.seed)") < min(text.find(b) % len(text) for b in builders)


@pytest.mark.slow
def test_examples_from_captions_to_similarities(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    images = write_training_files(tmp_path)
    common = ["--report_to", "none", "--disable_tqdm", "True", "--per_device_train_batch_size", "8"]

    output = run(
        str(EXAMPLES / "train_caption_contrastive.py"), "--llm", str(tmp_path / "llm"), "--captions",
        str(tmp_path / "captions.jsonl"), "--num_test_images", "4", "--output_dir", str(tmp_path / "cc"),
        "--warmup_steps", "0", *common,
    )  # fmt: skip
    assert "before:" in output
    assert "after:" in output

    run(
        str(EXAMPLES / "train_clip.py"), "--vision", str(tmp_path / "vision"), "--llm", str(tmp_path / "cc"), "--data",
        str(tmp_path / "train.parquet"), "--projection_dim", "20", "--output_dir", str(tmp_path / "clip"),
        "--num_train_epochs", "1", "--save_strategy", "no", *common,
    )  # fmt: skip
    clip = [
        str(EXAMPLES / "train_clip.py"), "--vision", str(tmp_path / "vision"), "--llm", str(tmp_path / "cc"), "--data",
        str(tmp_path / "train.parquet"), "--projection_dim", "20", "--output_dir", str(tmp_path / "resumed"),
        "--num_train_epochs", "2", "--save_strategy", "epoch", "--logging_steps", "1", *common,
    ]  # fmt: skip
    run(*clip)
    states = [json.loads((tmp_path / "resumed" / "model" / "trainer_state.json").read_text())]
    checkpoint = tmp_path / "resumed" / f"checkpoint-{states[0]['global_step'] // 2}"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())
    saved["log_history"].append({"of": "the checkpoint"})
    (checkpoint / "trainer_state.json").write_text(json.dumps(saved))
    run(*clip, "--resume_from_checkpoint", str(checkpoint))
    states.append(json.loads((tmp_path / "resumed" / "model" / "trainer_state.json").read_text()))
    losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in states]
    assert losses[0] == losses[1]
    assert {"of": "the checkpoint"} in states[1]["log_history"]
    model = LLM2CLIPModel.from_pretrained(tmp_path / "clip" / "model")
    assert model.config.text_base_model == str(tmp_path / "cc")
    assert (tmp_path / "clip" / "caption_embeddings" / "index.json").is_file()

    output = run(
        str(EXAMPLES / "encode_images_and_texts.py"), "--model", str(tmp_path / "clip" / "model"), "--images",
        *images[:2], "--texts", "a red sea", "a blue boat",
    )  # fmt: skip
    assert [line.split("  ")[1:] for line in output.splitlines()] == [
        [image, text] for image in images[:2] for text in ("a red sea", "a blue boat")
    ]
    assert all(-1.0 <= float(line.split("  ")[0]) <= 1.0 for line in output.splitlines())

    output = run(
        str(EXAMPLES / "zero_shot.py"), "--model", str(tmp_path / "clip" / "model"), "--classes", "red sea", "boat",
        "--images", *images[:3], "--device", "cpu",
    )  # fmt: skip
    rows = [line.split("  ") for line in output.splitlines()]
    assert [row[0] for row in rows] == images[:3]
    assert all(row[1] in ("red sea", "boat") and 0.5 <= float(row[2]) <= 1.0 for row in rows)

    output = run(
        str(EXAMPLES / "evaluate.py"), "--models", str(tmp_path / "clip" / "model"), "--tasks",
        str(tmp_path / "train.parquet"), "--output_dir", str(tmp_path / "results"),
    )  # fmt: skip
    assert output.count("R@1 image to text") == 1
    assert (tmp_path / "results" / "model" / "recall.png").is_file()


@pytest.mark.slow
def test_conversion_of_an_original_checkpoint(tmp_path: Path) -> None:
    torch.save(make("eva02").weights, tmp_path / "LLM2CLIP-EVA02-tiny.pt")
    for name, colour in (("a.png", (200, 10, 10)), ("b.png", (10, 10, 200))):
        Image.new("RGB", (40, 30), colour).save(tmp_path / name)
    output = run(
        str(EXAMPLES / "convert_checkpoint.py"), "--source", str(tmp_path / "LLM2CLIP-EVA02-tiny.pt"), "--output_dir",
        str(tmp_path / "converted"), "--images", str(tmp_path / "a.png"), str(tmp_path / "b.png"),
    )  # fmt: skip
    assert "largest difference after reloading" in output
    assert "1.0000" in output.splitlines()[1]


@pytest.mark.slow
@pytest.mark.parametrize("vision", ["clip", "eva02"])
def test_llava_around_the_tower(tmp_path: Path, vision: str) -> None:
    model = tiny_models.model(vision)
    model.save_pretrained(tmp_path / "clip")
    AutoModelForCausalLM.from_config(tiny_models.text_config()).save_pretrained(tmp_path / "llm")
    output = run(
        str(EXAMPLES / "llava.py"), "--model", str(tmp_path / "clip"), "--llm", str(tmp_path / "llm"), "--output_dir",
        str(tmp_path / "out"),
    )  # fmt: skip
    assert f"25 image tokens from {type(model.vision_model).__name__}" in output
    assert f"(1, 29, {tiny_models.VOCAB + 1})" in output
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out" / "llava")
    images = tiny_models.images(2)
    with torch.no_grad():
        given = llava.model.vision_tower(images).last_hidden_state
        torch.testing.assert_close(given, model.vision_model(images).last_hidden_state, atol=1e-6, rtol=1e-5)


def test_search_app_tells_what_is_missing(tmp_path: Path) -> None:
    """That its page works is tested in a browser, in `test_app.py`."""
    pytest.importorskip("gradio", reason="the app needs gradio")
    tiny_models.model().save_pretrained(tmp_path / "model")
    tiny_models.processor().save_pretrained(tmp_path / "model")
    command = [str(EXAMPLES / "app.py"), "--model", str(tmp_path / "model"), "--images", str(tmp_path / "photos")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 1
    assert "photos` does not exist. Give a folder of images." in done.stderr


@pytest.mark.slow
def test_gpu_benchmark_runs_small_in_the_interpreter(tmp_path, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    sizes = {
        "sizes": 32,
        "widths": 16,
        "check": 24,
        "tune": 24,
        "kernels": 24,
        "trainers": 8,
        "repeats": 1,
        "minutes": 9,
    }
    script = str(EXAMPLES.parent / "benchmarks" / "contrastive_loss.py")
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    run(script, *flags, "--dtypes", "fp32", "bf16", "--small", "--output", str(tmp_path))
    found = json.loads((tmp_path / "contrastive_loss.json").read_text())
    assert found["left out"] == []
    assert {(row["loss"], row["features"], row["method"]) for row in found["losses"]} > {
        (loss, features, f"ours ({implementation})")
        for loss in ("softmax", "sigmoid")
        for features in ("fp32", "bf16")
        for implementation in ("torch", "triton")
    }
    assert all(row["right"] for row in found["accuracy"]) and len(found["accuracy"]) == 32
    assert {row["kernel"] for row in found["tuned"]} >= {"lse", "grad", "sigmoid"}
    assert [(row["stage"], row["batch"]) for row in found["trainers"]] == [(2, 8), (1, 8)]
    assert len(found["kernels"]) == 4
    assert (tmp_path / "contrastive_loss.png").stat().st_size > 10_000
    with pytest.raises(AssertionError, match="`--gpu` needs a CUDA device"):
        run(script, "--gpu")
