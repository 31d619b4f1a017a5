# SPDX-License-Identifier: Apache-2.0
"""Every example runs, on tiny models and data, in the order a user would run them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from llm2clip_hf import LLM2CLIPModel


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 220), "white": (250, 250, 250)}
PLACES = ["sea", "grass", "street", "boat", "photo"]


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_in_the_readme_and_tested() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    readme, tests = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    assert names == {name for name in names if f"`{name}`" in readme and f'"{name}"' in tests}


@pytest.mark.slow
def test_examples_from_captions_to_similarities(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_models.text_config()).save_pretrained(tmp_path / "llm")
    tiny_models.llama3_tokenizer().save_pretrained(tmp_path / "llm")
    tiny_models.model("clip", None).vision_model.save_pretrained(tmp_path / "vision")
    tiny_models.image_processor().save_pretrained(tmp_path / "vision")
    pairs = [(colour, place) for colour in COLOURS for place in PLACES]
    captions = [[f"a {c} {p}", f"a photo of a {p}, it is {c}", f"the {p} is {c}"] for c, p in pairs]
    lines = "".join(json.dumps({"captions": row}) + "\n" for row in captions)
    (tmp_path / "captions.jsonl").write_text(lines)
    images = []
    for number, (colour, _) in enumerate(pairs):
        images.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (40, 36), COLOURS[colour]).save(images[-1])
    rows = {"image": images, "raw_caption": [c[0] for c in captions], "dense_caption": [c[1:] for c in captions]}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "raw_caption": datasets.Value("string"),
            "dense_caption": datasets.List(datasets.Value("string")),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
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
    model = LLM2CLIPModel.from_pretrained(tmp_path / "clip" / "model")
    assert model.config.text_weights == "bundled"
    assert (tmp_path / "clip" / "caption_embeddings" / "index.json").is_file()

    output = run(
        str(EXAMPLES / "encode_images_and_texts.py"), "--model", str(tmp_path / "clip" / "model"), "--images",
        *images[:2], "--texts", "a red sea", "a blue boat",
    )  # fmt: skip
    assert [line.split("  ")[1:] for line in output.splitlines()] == [
        [image, text] for image in images[:2] for text in ("a red sea", "a blue boat")
    ]
    assert all(-1.0 <= float(line.split("  ")[0]) <= 1.0 for line in output.splitlines())
