# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification against the formula; the linear probe against a plain loop, scikit-learn and the towers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from evaluation_data import clip, siglip
from PIL import Image

from llm2clip_hf.evaluation import (
    build_zero_shot_classifier,
    encode_texts,
    evaluate_linear_probe,
    evaluate_zero_shot_classification,
    mean_per_class_recall,
    zero_shot,
)
from llm2clip_hf.evaluation.linear_probe import encode_vision_features, fit_logistic_regression, fit_sgd
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


def picture(label: int, seed: int) -> Image.Image:
    """Noise around the colour of the class."""
    noise = np.random.default_rng(seed).integers(0, 90, (32, 34, 3))
    return Image.fromarray((noise + 150 * np.eye(3)[label]).astype(np.uint8))


@pytest.fixture(scope="module")
def data():
    train_labels, test_labels = [0, 1, 2, 2, 1, 0, 0, 1, 2, 0, 1], [2, 1, 0, 0, 2]
    train = [picture(label, seed) for seed, label in enumerate(train_labels)]
    test = [picture(label, 100 + seed) for seed, label in enumerate(test_labels)]
    return train, train_labels, test, test_labels


def pixels(images):
    return tiny_models.image_processor()(images=images, return_tensors="pt")["pixel_values"]


def build(kind):
    torch.manual_seed(0)
    if kind in ("clip", "siglip"):
        return {"clip": clip, "siglip": siglip}[kind]()[0]
    return tiny_models.model(text=None, vision_projection="none" if kind == "no projection" else "linear", **{
        "projection_dim": tiny_models.VISION_WIDTH if kind == "no projection" else tiny_models.PROJECTION
    })  # fmt: skip


@pytest.mark.parametrize("kind", ["clip", "siglip", "llm2clip", "no projection"])
def test_features_are_the_pooled_output_of_the_tower(kind, data):
    model = build(kind)
    model.train()
    with torch.no_grad():
        model.eval()
        tower = model.vision_model(pixel_values=pixels(data[0])).pooler_output
        model.train()
    options = {"processor": tiny_models.image_processor(), "batch_size": 4}
    features = encode_vision_features(model, data[0], **options)
    torch.testing.assert_close(features, tower, rtol=1e-5, atol=1e-5)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["sgd", "logistic_regression"])
def test_metrics_equal_a_probe_on_the_features(method, data):
    model, (train, train_labels, test, test_labels) = build("llm2clip"), data
    metrics = evaluate_linear_probe(model, *data, processor=tiny_models.image_processor(), method=method, epochs=7)
    with torch.no_grad():
        features, held_out = (model.vision_model(pixel_values=pixels(each)).pooler_output for each in (train, test))
    if method == "sgd":
        # The recipe without torch.optim: momentum 0.9, learning rate 0.1 along a cosine; one batch holds all samples.
        targets = torch.nn.functional.one_hot(torch.tensor(train_labels)).double()
        inputs = torch.cat([features, torch.ones(len(features), 1)], 1).double()
        weight, velocity = torch.zeros(3, inputs.shape[1]).double(), 0
        for step in range(7):
            gradient = (torch.softmax(inputs @ weight.T, 1) - targets).T @ inputs / len(inputs)
            velocity = 0.9 * velocity + gradient
            weight = weight - 0.1 * (1 + math.cos(math.pi * step / 7)) / 2 * velocity
        predictions = (torch.cat([held_out, torch.ones(5, 1)], 1).double() @ weight.T).argmax(1)
        fitted = fit_sgd(features, torch.tensor(train_labels), 7, 0.1, seed=3)
        torch.testing.assert_close(
            torch.cat([fitted[0], fitted[1][:, None]], 1).double(), weight, rtol=1e-3, atol=1e-4
        )
    else:
        from sklearn.linear_model import LogisticRegression

        probe = LogisticRegression(C=0.316, max_iter=1000).fit(features.numpy(), train_labels)
        predictions = torch.from_numpy(probe.predict(held_out.numpy()))
        assert metrics["linear_probe_train_top1"] == pytest.approx(probe.score(features.numpy(), train_labels))
    right = predictions == torch.tensor(test_labels)
    assert metrics["linear_probe_top1"] == pytest.approx(right.double().mean().item())
    recalls = [right[torch.tensor(test_labels) == label].double().mean().item() for label in range(3)]
    assert metrics["linear_probe_mean_per_class_recall"] == pytest.approx(sum(recalls) / 3)
    assert "linear_probe_top5" not in metrics


def test_sgd_follows_its_seed_and_learns():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(6, (2500,), generator=generator)  # three batches per epoch
    features = 2 * torch.eye(6, 13)[targets] + torch.randn(2500, 13, generator=generator)
    first, again, other = (fit_sgd(features, targets, 5, 0.1, seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    accuracy = ((features @ first[0].T + first[1]).argmax(1) == targets).double().mean()
    weight, bias = fit_logistic_regression(features, targets, 1e3)
    best = ((features @ weight.T + bias).argmax(1) == targets).double().mean()
    assert accuracy > best - 0.02 > 0.5


def test_logistic_regression_of_two_classes_predicts_as_scikit_learn_does():
    from sklearn.linear_model import LogisticRegression

    features, targets = torch.randn(40, 3), torch.arange(40) % 2
    weight, bias = fit_logistic_regression(features, targets, 1.0)
    expected = LogisticRegression(max_iter=1000).fit(features.numpy(), targets.numpy())
    torch.testing.assert_close(
        torch.softmax(features @ weight.T + bias, 1),
        torch.from_numpy(expected.predict_proba(features.numpy())).float(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_bad_arguments_of_a_probe_are_refused(data):
    model, (train, train_labels, test, test_labels) = build("llm2clip"), data
    cases = [
        ({"train_labels": train_labels[1:]}, "one integer per image"),
        ({"train_labels": [label + (label > 0) for label in train_labels]}, "none of class 1"),
        ({"train_labels": [0] * len(train), "test_labels": [0] * len(test)}, "got 1 classes"),
        ({"test_labels": [0, 1, 2, 3, 0]}, r"Label 3 of image 3 is not a class in \[0, 3\)"),
        ({"train_labels": [-1, *train_labels[1:]]}, "Label -1 of image 0"),
        ({"method": "ridge"}, "`method` must be"),
        ({"epochs": 0}, "`epochs` must be positive"),
        ({"learning_rate": math.nan}, "`learning_rate` must be positive"),
    ]
    given = {
        "train_images": train,
        "train_labels": train_labels,
        "test_images": test,
        "test_labels": test_labels,
        "processor": tiny_models.image_processor(),
    }
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate_linear_probe(model, **(given | change))
