# SPDX-License-Identifier: Apache-2.0
"""Recall on real images and captions: equal to a brute-force count and to torchmetrics."""

import itertools
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from datasets import load_dataset

from llm2clip_hf.cli import main as cli
from llm2clip_hf.data.images import load_image
from llm2clip_hf.evaluation import retrieval_metrics


KS = (1, 5, 10)


def bag_of_words(texts: list[str], width: int = 61) -> torch.Tensor:
    """Hashed word counts, so that texts of one image are closer than chance; a little noise, so that none tie."""
    rows = 1e-3 * torch.randn(len(texts), width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for row, text in enumerate(texts):
        for word in re.findall(r"\w+", text.lower()) or [text]:
            rows[row, zlib.crc32(word.encode()) % width] += 1
    return rows


def pairs_of(name: str, shared_dir: Path) -> tuple[torch.Tensor, list[list[str]]]:
    """An embedding per image, and its captions."""
    if name == "coco":
        table = load_dataset("parquet", data_files=str(shared_dir / "data/coco_captions_val2017/*.parquet"))["train"]
        captions = table["captions"][:400]
        # No image is at hand: the image is its captions but the first two, the captions are those two.
        images = bag_of_words([" ".join(texts[2:]) for texts in captions])
        return images, [texts[:2] for texts in captions]
    file = {"emoji": "emoji/openmoji.parquet", "storybook": "african_storybook/test.parquet"}[name]
    table = load_dataset("parquet", data_files=str(shared_dir / "data" / file))["train"].select(range(200))
    captions = [list(dict.fromkeys(texts)) for texts in table["captions"]]
    keep = [row for row, texts in enumerate(captions) if texts]
    pixels = [np.asarray(load_image(table["image"], row).resize((6, 6))).reshape(-1) for row in keep]
    # Half pixels, half words of the first caption: neither chance nor perfect.
    words = bag_of_words([captions[row][0] for row in keep])
    pixels = torch.from_numpy(np.stack(pixels)).double()[:, : words.shape[1]]
    return words + 0.02 * (pixels - pixels.mean(dim=0)), [captions[row] for row in keep]


@pytest.mark.parametrize("name", ["storybook", "emoji", "coco"])
def test_recall_on_real_data(name: str, shared_dir: Path) -> None:
    images, captions = pairs_of(name, shared_dir)
    texts = bag_of_words(list(itertools.chain(*captions)))
    owners = torch.tensor([image for image, group in enumerate(captions) for _ in group])
    metrics = retrieval_metrics(images.float(), texts.float(), owners, ks=KS, chunk_size=57)

    unit = torch.nn.functional.normalize
    # As the metric sees them: float32 rows, products in float64.
    scores = unit(images.float().double(), dim=1) @ unit(texts.float().double(), dim=1).T
    right = owners == torch.arange(len(images))[:, None]
    torchmetrics = pytest.importorskip("torchmetrics.retrieval", reason="torchmetrics is compared with")
    for direction, matrix, mask in (("image_to_text", scores, right), ("text_to_image", scores.T, right.T)):
        ranks = [int((row > row[own].max()).sum()) + 1 for row, own in zip(matrix, mask)]
        queries = torch.arange(len(matrix))[:, None].expand_as(matrix)
        for k in KS:
            expected = sum(rank <= k for rank in ranks) / len(ranks)
            peer = torchmetrics.RetrievalHitRate(top_k=k)(matrix.flatten(), mask.flatten(), indexes=queries.flatten())
            assert metrics[f"{direction}_recall@{k}"] == pytest.approx(expected), (direction, k)
            assert metrics[f"{direction}_recall@{k}"] == pytest.approx(peer.item(), abs=1e-6), (direction, k)
    assert 0.05 < metrics["image_to_text_recall@1"] < 0.95


@pytest.mark.slow
def test_verb_on_flowers_and_emoji_of_many_languages(shared_dir: Path, tmp_path: Path) -> None:
    tiny_models.model().save_pretrained(tmp_path / "model")
    tiny_models.processor().save_pretrained(tmp_path / "model")
    data = shared_dir / "data"
    (tmp_path / "tasks.yaml").write_text(
        f"flowers: {{kind: zero-shot, path: {data / 'flower_photos/test.parquet'}, label_column: label_name}}\n"
        f"emoji: {{kind: cross-lingual, path: {data / 'emoji/twemoji.parquet'}, text_column: names}}\n"
    )
    argv = ["evaluate", "--model", tmp_path / "model", "--tasks", tmp_path / "tasks.yaml", "--max_images", "40"]
    assert cli.main([str(a) for a in [*argv, "--output_dir", tmp_path / "out"]]) == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(list((tmp_path / "out").glob("languages-*.png"))) == 1
    assert "flowers" in json.dumps(record)
