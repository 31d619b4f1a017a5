# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification against the formula, with a model whose features are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from llm2clip_hf.evaluation import (
    build_zero_shot_classifier,
    encode_texts,
    evaluate_zero_shot_classification,
    mean_per_class_recall,
    zero_shot,
)
from llm2clip_hf.evaluation.zero_shot import fill_template


CLASSES = ["rose", "red tulip", "daisy {x}", "oak", "elm", "fir"]
TEMPLATES = ["a photo of a {}.", "{} and {} in a garden", "a much longer drawing of the {} by a child"]


class ColourModel(torch.nn.Module):
    """Image features: mean colour. Text features: the ids, one text per class, seen as a colour."""

    def __init__(self, colours: torch.Tensor) -> None:
        super().__init__()
        self.colours = torch.nn.Parameter(colours)

    def get_image_features(self, pixel_values):
        return SimpleNamespace(pooler_output=pixel_values.mean((2, 3)))

    def get_text_features(self, input_ids, attention_mask):
        return SimpleNamespace(pooler_output=5 * self.colours[input_ids[:, 0]])


def colour_tokenizer(texts, **kwargs):
    ids = torch.tensor([[int(text.split()[-1])] for text in texts])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


colour_tokenizer.model_max_length = 77


def colour_image_processor(images, return_tensors):
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images]
    return {"pixel_values": torch.stack(pixels)}


def colour_processor():
    return SimpleNamespace(tokenizer=colour_tokenizer, image_processor=colour_image_processor)


def test_classifier_is_the_normalized_mean_of_normalized_templates():
    model, processor = tiny_models.model(), tiny_models.processor()
    classifier = build_zero_shot_classifier(model, CLASSES, TEMPLATES, processor=processor, batch_size=4)
    for position, name in enumerate(CLASSES):
        rows = []
        for template in TEMPLATES:
            batch = processor.tokenizer([fill_template(template, name)], return_tensors="pt")
            with torch.no_grad():
                features = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output[0]
            rows.append(features.double() / features.double().norm())
        mean = torch.stack(rows).mean(0)
        torch.testing.assert_close(classifier[position].double(), mean / mean.norm(), rtol=0, atol=1e-6)


def test_single_template_is_the_default():
    model, processor = tiny_models.model(), tiny_models.processor()
    classifier = build_zero_shot_classifier(model, CLASSES, processor=processor)
    texts = [f"a photo of the {name}" for name in CLASSES]
    torch.testing.assert_close(classifier, encode_texts(model, texts, processor=processor))


@pytest.mark.parametrize("num_classes", [3, 6])
def test_metrics_of_known_colours(num_classes):
    colours = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]]).float()[:num_classes]
    shown = [0, 0, 0, 1, 2, 2]
    images = [Image.fromarray((np.ones((4, 4, 3)) * 200 * colours[c].numpy()).astype(np.uint8)) for c in shown]
    # Image 3 and image 5 are mislabelled: recalls 3/4 of class 0, 0/1 of class 1, 1/1 of class 2.
    labels = [0, 0, 0, 0, 2, 1]
    metrics = evaluate_zero_shot_classification(
        ColourModel(colours),
        images,
        labels,
        [str(number) for number in range(num_classes)],
        ["class {}"],
        processor=colour_processor(),
        batch_size=4,
    )
    expected = {"zero_shot_top1": 4 / 6, "zero_shot_mean_per_class_recall": (3 / 4 + 0 + 1) / 3}
    if num_classes >= 5:
        logits = torch.nn.functional.normalize(colours[shown], dim=1) @ torch.nn.functional.normalize(colours, dim=1).T
        assert metrics["zero_shot_mean_per_class_recall"] == pytest.approx(
            mean_per_class_recall(logits, torch.tensor(labels))
        )
        above = (logits > logits.gather(1, torch.tensor(labels)[:, None])).sum(1)
        tied = (logits == logits.gather(1, torch.tensor(labels)[:, None])).sum(1)
        expected["zero_shot_top5"] = ((5 - above) / tied).clamp(0, 1).mean().item()
    assert metrics == pytest.approx(expected)


def test_classes_of_the_same_name_are_refused_or_share_their_hits():
    colours = torch.eye(3)
    images = [Image.fromarray((np.ones((4, 4, 3)) * 200 * colours[c].numpy()).astype(np.uint8)) for c in (0, 0, 2)]
    arguments = (ColourModel(colours), images, [0, 1, 2], ["0", "0", "2"], ["class {}"])
    with pytest.raises(ValueError, match=r"Classes \[0, 1\] are all named '0'"):
        evaluate_zero_shot_classification(*arguments, processor=colour_processor())
    metrics = evaluate_zero_shot_classification(*arguments, processor=colour_processor(), allow_duplicates=True)
    assert metrics["zero_shot_top1"] == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_bad_arguments_are_refused():
    model, processor = ColourModel(torch.eye(3)), colour_processor()
    images = [Image.new("RGB", (4, 4), "red")] * 2

    def evaluate(labels=(0, 1), class_names=("0", "1"), templates=("class {}",)):
        return evaluate_zero_shot_classification(
            model, images, list(labels), list(class_names), list(templates), processor=processor
        )

    cases = [
        ({"labels": (0, 1, 1)}, "one integer per image"),
        ({"labels": (0.0, 1.0)}, "one integer per image"),
        ({"labels": (0, 2)}, r"Label 2 of image 1 is not a class in \[0, 2\)"),
        ({"labels": (0, -1)}, r"Label -1 of image 1"),
        ({"class_names": ("0", " ")}, "Class 1 is named ' '"),
        ({"templates": ()}, "at least one class and one template"),
        ({"class_names": (), "labels": ()}, "at least one class and one template"),
        ({"templates": ("a photo",)}, "has no `{}`"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate(**change)
    with pytest.raises(ValueError, match="`class_names` is one string"):
        build_zero_shot_classifier(model, "cat", processor=processor)
    with pytest.raises(ValueError, match="`classifier` must have one row per class"):
        evaluate_zero_shot_classification(
            model, images, [0, 1], ["0", "1"], processor=processor, classifier=torch.eye(3)
        )


def test_a_classifier_does_not_depend_on_how_classes_are_grouped(monkeypatch):
    model, processor = tiny_models.model(), tiny_models.processor()
    whole = build_zero_shot_classifier(model, CLASSES, TEMPLATES, processor=processor)
    monkeypatch.setattr(zero_shot, "_TEXTS_PER_BLOCK", 7)
    grouped = build_zero_shot_classifier(model, CLASSES, TEMPLATES, processor=processor)
    torch.testing.assert_close(grouped, whole, rtol=0, atol=1e-6)
