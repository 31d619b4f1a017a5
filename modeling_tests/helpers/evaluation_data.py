# SPDX-License-Identifier: Apache-2.0
"""A tiny CLIP and tiny benchmarks on disk, in the layouts that a user may have."""

import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import tiny_models
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)


CAPTIONS = [
    ["a red boat", "the boat is red", "red"],
    ["a green dog", "dog", "the dog runs"],
    ["two blue people", "people in a street", "blue"],
    ["the sea", "a photo of the sea", "sea and grass"],
    ["the grass", "green grass in a photo", "a photo"],
]
COLOURS = [(220, 30, 30), (30, 200, 40), (40, 40, 220), (90, 160, 200), (60, 120, 10)]


def picture(number: int) -> Image.Image:
    """A picture unlike the others."""
    image = Image.new("RGB", (40, 34), COLOURS[number])
    image.paste((255, 255, 255), (3 * number, 5, 3 * number + 9, 20))
    return image


def clip() -> tuple[CLIPModel, CLIPProcessor]:
    """A random CLIP of transformers with the tokenizer of the tiny LLM."""
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            "vocab_size": tiny_models.VOCAB, "hidden_size": 18, "intermediate_size": 37, "num_hidden_layers": 2,
            "num_attention_heads": 3, "max_position_embeddings": 64, "eos_token_id": 4, "bos_token_id": 0,
            "pad_token_id": 1, "projection_dim": 20,
        },
        vision_config={
            "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": tiny_models.IMAGE_SIZE, "patch_size": 6,
        },
        projection_dim=20,
    )  # fmt: skip
    tokenizer = tiny_models.processor().tokenizer  # its last token is the end of the turn, which CLIP pools at
    tokenizer.model_max_length = 64
    return CLIPModel(config).eval(), CLIPProcessor(tiny_models.image_processor(), tokenizer)


def siglip() -> tuple[SiglipModel, SiglipProcessor]:
    """A random SigLIP of transformers with the same tokenizer."""
    torch.manual_seed(0)
    tower = {"intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 3, "hidden_size": 24}
    config = SiglipConfig(
        text_config={"vocab_size": tiny_models.VOCAB, "max_position_embeddings": 32, "pad_token_id": 4, **tower},
        vision_config={"image_size": tiny_models.IMAGE_SIZE, "patch_size": 6, **tower},
    )
    tokenizer = tiny_models.processor().tokenizer
    tokenizer.model_max_length = 32
    size = {"height": tiny_models.IMAGE_SIZE, "width": tiny_models.IMAGE_SIZE}
    return SiglipModel(config).eval(), SiglipProcessor(SiglipImageProcessorPil(size=size), tokenizer)


def write_images(folder: Path, count: int = len(CAPTIONS)) -> list[str]:
    """Writes `0.png`, `1.png`, ...; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{number}.png") for number in range(count)]
    for number, path in enumerate(paths):
        picture(number).save(path)
    return paths


def write_parquet(path: Path, columns: dict[str, Sequence], image_folder: Path) -> Path:
    """Writes a table with a column `image` of pictures and `columns`."""
    count = len(next(iter(columns.values())))
    rows = {"image": write_images(image_folder, max(count, 1))[:count], **columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path)
    return path


def write_image_folder(folder: Path, captions: Sequence[Sequence[str]] = CAPTIONS) -> Path:
    """Writes images with a `metadata.jsonl`."""
    write_images(folder, len(captions))
    rows = [{"file_name": f"{number}.png", "captions": texts} for number, texts in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
