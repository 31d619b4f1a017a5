# SPDX-License-Identifier: Apache-2.0
"""The pipelines of transformers give the model's own numbers."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from PIL import Image
from transformers import AutoModel, pipeline

from llm2clip_hf import LLM2CLIPModel, LLM2CLIPProcessor
from llm2clip_hf.modeling.modeling_llm2clip import LLM2CLIPZeroShotImageClassificationPipeline


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


def sigmoid_model(folder: Path) -> tuple[LLM2CLIPModel, LLM2CLIPProcessor]:
    model, processor = tiny_models.model("siglip", logit_bias_init_value=-1.5), tiny_models.processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("batch_size", [1, 2])
def test_zero_shot_probabilities_of_a_sigmoid_model(tmp_path: Path, batch_size: int) -> None:
    model, processor = sigmoid_model(tmp_path)
    classifier = pipeline("zero-shot-image-classification", model=str(tmp_path), trust_remote_code=True)
    results = classifier(pictures(), candidate_labels=LABELS, hypothesis_template="{}", batch_size=batch_size)
    with torch.no_grad():
        expected = model(**processor(images=pictures(), text=LABELS)).logits_per_image.sigmoid()
    for result, row in zip(results, expected, strict=True):
        assert [entry["score"] for entry in result] == sorted((entry["score"] for entry in result), reverse=True)
        scores = {entry["label"]: entry["score"] for entry in result}
        torch.testing.assert_close(torch.tensor([scores[label] for label in LABELS]), row, atol=1e-5, rtol=1e-4)
    # One label is no certainty, as it is for a softmax.
    (alone,) = classifier(pictures()[0], candidate_labels=LABELS[:1], hypothesis_template="{}")
    torch.testing.assert_close(torch.tensor(alone["score"]), expected[0, 0], atol=1e-5, rtol=1e-4)
    # What the pipeline was made from can be saved again.
    classifier.model.save_pretrained(tmp_path / "again")
    entries = json.loads((tmp_path / "again" / "config.json").read_text())["custom_pipelines"]
    assert entries == json.loads((tmp_path / "config.json").read_text())["custom_pipelines"]


def test_sigmoid_pipeline_asks_for_trust_and_is_a_softmax_for_other_models(
    saved: tuple[str, LLM2CLIPModel, LLM2CLIPProcessor], tmp_path: Path
) -> None:
    sigmoid_model(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("zero-shot-image-classification", model=str(tmp_path))
    folder = saved[0]
    assert "custom_pipelines" not in json.loads((Path(folder) / "config.json").read_text())
    options = {"candidate_labels": LABELS, "hypothesis_template": "{}"}
    plain = pipeline("zero-shot-image-classification", model=folder)(pictures(), **options)
    ours = pipeline(
        "zero-shot-image-classification", model=folder, pipeline_class=LLM2CLIPZeroShotImageClassificationPipeline
    )(pictures(), **options)
    assert ours == plain


def test_text_feature_extraction(saved: tuple[str, LLM2CLIPModel, LLM2CLIPProcessor]) -> None:
    folder, model, processor = saved
    extractor = pipeline("feature-extraction", model=folder)
    features = [torch.tensor(rows) for rows in extractor(LABELS[:2], batch_size=2)]
    with torch.no_grad():
        expected = model(**processor(text=LABELS[:2])).text_embeds
    torch.testing.assert_close(torch.cat(features), expected, atol=1e-5, rtol=1e-4)


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
