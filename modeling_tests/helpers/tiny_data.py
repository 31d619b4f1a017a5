# SPDX-License-Identifier: Apache-2.0
"""Tiny data and model folders on disk, as a user has them: captions, a parquet file, an LLM, a vision tower."""

import json
from pathlib import Path

import datasets
import tiny_models
import torch
from PIL import Image
from transformers import AutoModelForCausalLM


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 220), "white": (250, 250, 250)}
PLACES = ["sea", "grass", "street", "boat", "photo"]


def write_training_files(folder: Path) -> list[str]:
    """
    Writes `llm/`, `vision/`, `captions.jsonl` and `train.parquet` (image, raw_caption, dense_caption).

    Returns:
        `list[str]`: the image files.
    """
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_models.text_config()).save_pretrained(folder / "llm")
    tiny_models.llama3_tokenizer().save_pretrained(folder / "llm")
    tiny_models.model("clip", None).vision_model.save_pretrained(folder / "vision")
    tiny_models.image_processor().save_pretrained(folder / "vision")
    pairs = [(colour, place) for colour in COLOURS for place in PLACES]
    captions = [[f"a {c} {p}", f"a photo of a {p}, it is {c}", f"the {p} is {c}"] for c, p in pairs]
    (folder / "captions.jsonl").write_text("".join(json.dumps({"captions": row}) + "\n" for row in captions))
    images = []
    for number, (colour, _) in enumerate(pairs):
        images.append(str(folder / f"{number}.png"))
        Image.new("RGB", (40, 36), COLOURS[colour]).save(images[-1])
    rows = {"image": images, "raw_caption": [c[0] for c in captions], "dense_caption": [c[1:] for c in captions]}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "raw_caption": datasets.Value("string"),
            "dense_caption": datasets.List(datasets.Value("string")),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return images
