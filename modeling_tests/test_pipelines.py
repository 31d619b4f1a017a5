# SPDX-License-Identifier: Apache-2.0
"""The pipelines of transformers give the model's own numbers."""

from pathlib import Path

import pytest
import tiny_models
import torch
from PIL import Image
from transformers import AutoModel, pipeline

from llm2clip_hf import LLM2CLIPModel, LLM2CLIPProcessor


LABELS = ["a boat", "two dogs run over the green grass", ""]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, LLM2CLIPModel, LLM2CLIPProcessor]:
    folder = tmp_path_factory.mktemp("saved")
    model, processor = tiny_models.model("siglip"), tiny_models.processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder), model, processor


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (40, 50), (200, 10, 10)), Image.new("RGB", (60, 33), (10, 90, 200))]


def test_zero_shot_image_classification(saved: tuple[str, LLM2CLIPModel, LLM2CLIPProcessor]) -> None:
    folder, model, processor = saved
    classifier = pipeline("zero-shot-image-classification", model=folder)
    results = classifier(pictures(), candidate_labels=LABELS, hypothesis_template="{}")
    with torch.no_grad():
        expected = model(**processor(images=pictures(), text=LABELS)).logits_per_image.softmax(-1)
    for result, row in zip(results, expected, strict=True):
        scores = {entry["label"]: entry["score"] for entry in result}
        torch.testing.assert_close(torch.tensor([scores[label] for label in LABELS]), row, atol=1e-5, rtol=1e-4)


def test_image_feature_extraction(saved: tuple[str, LLM2CLIPModel, LLM2CLIPProcessor]) -> None:
    folder, model, processor = saved
    features = pipeline("image-feature-extraction", model=folder)(pictures())
    with torch.no_grad():
        expected = model(**processor(images=pictures())).image_embeds
    torch.testing.assert_close(torch.tensor(features)[:, 0], expected, atol=1e-5, rtol=1e-4)


def test_auto_model_passes_our_arguments_on(
    saved: tuple[str, LLM2CLIPModel, LLM2CLIPProcessor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, model, _ = saved
    caplog.clear()
    vision = AutoModel.from_pretrained(folder, load_text_model=False)
    assert vision.text_model is None
    assert not caplog.records, "leaving the LLM out on purpose is nothing to warn of"
    images = tiny_models.images()
    torch.testing.assert_close(vision(images).image_embeds, model(images).image_embeds, atol=1e-6, rtol=1e-5)
