# SPDX-License-Identifier: Apache-2.0
"""Threshold, gap, uniformity and composition against loops over single pairs."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from llm2clip_hf.evaluation.joint_space import (
    composition_accuracy,
    joint_space_statistics,
    match_threshold,
    winoground_scores,
)


def pairs(noise: float, num: int = 120, captions: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num, 8, generator=generator) + 1
    owners = torch.arange(num).repeat_interleave(captions)
    return images, images[owners] + noise * torch.randn(num * captions, 8, generator=generator), owners


def cosine_lists(images: Any, texts: Any, owners: Any) -> tuple[np.ndarray, np.ndarray]:
    unit = [torch.nn.functional.normalize(each.double(), dim=1) for each in (images, texts)]
    cosines = (unit[0] @ unit[1].T).numpy()
    right = owners.numpy()[None] == np.arange(len(images))[:, None]
    return cosines[right], cosines[~right]


@pytest.mark.parametrize("precision", [0.8, 0.95])
@pytest.mark.parametrize("prior", [0.5, 0.1])
def test_threshold_is_the_lowest_that_reaches_the_precision(precision: float, prior: float) -> None:
    images, texts, owners = pairs(noise=1.0)
    found = match_threshold(images, texts, owners, precision=precision, prior=prior, chunk_size=50)
    true, false = cosine_lists(images, texts, owners)

    def precision_at(cosine: float) -> float:
        tpr, fpr = (true >= cosine - 1e-6).mean(), (false >= cosine - 1e-6).mean()
        return prior * tpr / (prior * tpr + (1 - prior) * fpr)

    edges = np.round(np.arange(-10_000, 10_000) / 10_000, 4)
    lowest = next(edge for edge in edges if precision_at(edge) >= precision)
    assert found["match_threshold"] == lowest
    assert found["match_precision"] == pytest.approx(precision_at(lowest))
    assert found["match_recall"] == pytest.approx((true >= lowest).mean())
    assert found["matching_cosine"] == pytest.approx(true.mean())
    assert found["other_cosine"] == pytest.approx(false.mean())


def test_threshold_that_would_be_a_guess_is_refused() -> None:
    images, texts, owners = pairs(noise=1.0, num=49)
    with pytest.raises(ValueError, match="98 captions of 49 images would be a guess. Give at least 100 captions"):
        match_threshold(images, texts, owners)
    images, texts, owners = pairs(noise=0.1)
    with pytest.raises(ValueError, match=r"`precision` must lie between 0 and 1, both excluded, got 95"):
        match_threshold(images, texts, owners, precision=95)
    constant = torch.ones(120, 8)
    with pytest.raises(ValueError, match=r"No cosine separates .* the best is 0.500, at -1.0000"):
        match_threshold(constant, constant[owners], owners)


def test_statistics_are_those_of_single_pairs() -> None:
    images, texts, owners = pairs(noise=0.7, num=31)
    found = joint_space_statistics(images, texts, owners, chunk_size=7)
    unit_images, unit_texts = (torch.nn.functional.normalize(each.double(), dim=1) for each in (images, texts))
    for name, rows in (("image", unit_images), ("text", unit_texts)):
        kernels = [math.exp(-2 * float((a - b).square().sum())) for a, b in itertools.combinations(rows, 2)]
        assert found[f"{name}_uniformity"] == pytest.approx(math.log(sum(kernels) / len(kernels)))
    assert found["alignment"] == pytest.approx(float((unit_images[owners] - unit_texts).square().sum(1).mean()))
    assert found["modality_gap"] == pytest.approx(float((unit_images.mean(0) - unit_texts.mean(0)).norm()))


def test_composition_counts_ties_as_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts, wrong = (torch.randn(n, 4, generator=generator) for n in (20, 20, 57))
    owners = torch.cat([torch.arange(20), torch.randint(20, (37,), generator=generator)])
    wrong[0] = texts[0]  # the wrong caption is the caption
    found = composition_accuracy(images, texts, wrong, owners)
    for row in range(20):
        own = torch.cosine_similarity(images[row].double(), texts[row].double(), dim=0)
        others = torch.cosine_similarity(images[row][None].double(), wrong[owners == row].double())
        tied = int(((others - own).abs() < 1e-9).sum())
        assert found[row] == (0 if (others > own + 1e-9).any() else 1 / (1 + tied))
    with pytest.raises(ValueError, match="Row 19 of `image_embeds` has no caption"):
        composition_accuracy(images, texts, wrong[:19], owners[:19])


def test_winoground_by_the_rules_of_its_paper() -> None:
    generator = torch.Generator().manual_seed(1)
    images, texts = (torch.randn(200, 2, 3, generator=generator) for _ in range(2))
    hits = {"text_score": 0, "image_score": 0, "group_score": 0}
    for image, text in zip(images.double(), texts.double()):
        c = [[float(torch.cosine_similarity(i, t, dim=0)) for t in text] for i in image]
        by_text = c[0][0] > c[0][1] and c[1][1] > c[1][0]
        by_image = c[0][0] > c[1][0] and c[1][1] > c[0][1]
        hits["text_score"] += by_text
        hits["image_score"] += by_image
        hits["group_score"] += by_text and by_image
    assert winoground_scores(images, texts) == {name: pytest.approx(n / 200) for name, n in hits.items()}
    assert hits["group_score"] < hits["image_score"] != hits["text_score"]
    assert set(winoground_scores(images[:, :1].expand(-1, 2, -1), texts).values()) != {1.0}
