# SPDX-License-Identifier: Apache-2.0
"""Metrics against brute force over all orders of ties, hand-made matrices and transformed inputs."""

import itertools
import math
import statistics
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llm2clip_hf.evaluation import (
    caption_retrieval_accuracy,
    mean_per_class_recall,
    retrieval_metrics,
    top_k_accuracy,
)
from llm2clip_hf.evaluation.metrics import UnitRows, count_pairs, expected_rank


def first_hit_positions(scores: list[float], right: list[bool]) -> list[int]:
    """Position of the first right answer in every order that sorts the scores, equal scores in every permutation."""
    positions = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            positions.append(1 + next(place for place, item in enumerate(order) if right[item]))
    return positions


def brute_force(similarity: torch.Tensor, right: torch.Tensor, ks: tuple[int, ...]) -> dict[str, float]:
    positions = [first_hit_positions(row, mask) for row, mask in zip(similarity.tolist(), right.tolist())]
    ranks = [statistics.mean(found) for found in positions]
    recalls = {
        f"recall@{k}": statistics.mean(statistics.mean(p <= k for p in found) for found in positions) for k in ks
    }
    return recalls | {"mean_rank": statistics.mean(ranks), "median_rank": statistics.median(ranks)}


def cosines(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    # Rounded, so that equal vectors tie exactly in the oracle as well.
    unit = torch.nn.functional.normalize
    return (unit(first.double(), dim=1) @ unit(second.double(), dim=1).T).round(decimals=9)


def test_retrieval_metrics_equal_brute_force_over_all_orders_of_ties():
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        num_images, num_texts, ks = 4, 6, (1, 2, 3)
        # Two prototypes for all rows make many ties, within and across images.
        prototypes = torch.randn(3, 5, generator=generator)
        images = prototypes[torch.randint(3, (num_images,), generator=generator)]
        texts = prototypes[torch.randint(3, (num_texts,), generator=generator)]
        extra = torch.randint(num_images, (num_texts - num_images,), generator=generator)
        owners = torch.cat([torch.arange(num_images), extra])[torch.randperm(num_texts, generator=generator)]
        metrics = retrieval_metrics(images, texts, owners, ks=ks, chunk_size=3)
        right = owners[None, :] == torch.arange(num_images)[:, None]
        similarity = cosines(images, texts)
        for direction, scores, mask in (
            ("image_to_text", similarity, right),
            ("text_to_image", similarity.T, right.T),
        ):
            for name, value in brute_force(scores, mask, ks).items():
                assert metrics[f"{direction}_{name}"] == pytest.approx(value, abs=1e-12), (direction, name)


@pytest.mark.parametrize("chunk_size", [1, 3, 11, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_retrieval_metrics_equal_the_full_matrix_for_every_chunk_size(chunk_size, dtype):
    owners = torch.randint(11, (23,))
    owners[:11] = torch.randperm(11)
    images, texts = torch.randn(11, 7).to(dtype), torch.randn(23, 7).to(dtype)
    similarity = cosines(images, texts)
    right = owners == torch.arange(11)[:, None]
    best = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)
    ranks = 1 + ((similarity > best) & ~right).sum(1).double()
    metrics = retrieval_metrics(images, texts, owners, ks=(1, 5), chunk_size=chunk_size)
    for k in (1, 5):
        assert metrics[f"image_to_text_recall@{k}"] == pytest.approx((ranks <= k).double().mean().item())
    assert metrics["image_to_text_mean_rank"] == pytest.approx(ranks.mean().item())
    assert metrics["image_to_text_median_rank"] == ranks.quantile(0.5).item()


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_retrieval_metrics_never_hold_more_than_a_tile_of_similarities():
    images, texts, owners = torch.randn(200, 4), torch.randn(300, 4), torch.arange(300) % 200
    with LargestTensor() as largest:
        retrieval_metrics(images, texts, owners, chunk_size=51)
    assert largest.numel == 51 * 51
    with LargestTensor() as largest:
        caption_retrieval_accuracy(images, images + 1, chunk_size=51)
    assert largest.numel == 51 * 51


def test_caption_recall_equals_brute_force_over_all_orders_of_ties():
    generator = torch.Generator().manual_seed(5)
    for _ in range(10):
        prototypes = torch.randn(3, 5, generator=generator)
        images = prototypes[torch.randint(3, (3,), generator=generator)]
        texts = prototypes[torch.randint(3, (6,), generator=generator)]
        owners = torch.tensor([2, 0, 1, 1, 0, 1])
        metrics = retrieval_metrics(images, texts, owners, ks=(1, 2, 4), chunk_size=4)
        for k in (1, 2, 4):
            shares = []
            for image, scores in enumerate(cosines(images, texts).tolist()):
                orders = [
                    order
                    for order in itertools.permutations(range(6))
                    if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
                ]
                own = int((owners == image).sum())
                shares.append(statistics.mean(sum(owners[t] == image for t in o[:k]).item() / own for o in orders))
            assert metrics[f"image_to_text_caption_recall@{k}"] == pytest.approx(statistics.mean(shares)), k


def ranks_of(images: torch.Tensor, texts: torch.Tensor, owners: torch.Tensor, chunk_size: int = 1024) -> Any:
    """The rank behind every query of `retrieval_metrics`: image to text, and text to image."""
    counts = count_pairs(UnitRows(images, "images"), UnitRows(texts, "texts"), owners, chunk_size)
    return expected_rank(counts.image), expected_rank(counts.text)


def test_rows_after_the_first_block_are_checked_and_named():
    images = torch.ones(9000, 2)
    images[8500] = math.nan
    with pytest.raises(ValueError, match="Row 8500 of `second` is not finite"):
        caption_retrieval_accuracy(torch.ones(9000, 2), images)


@pytest.mark.parametrize("chunk_size", [2, 5, 512])
def test_retrieval_metrics_of_a_constant_embedding_are_those_of_guessing(chunk_size):
    constant = torch.full((13, 37), 0.1)
    metrics = retrieval_metrics(constant, constant, torch.arange(13), ks=(1, 5, 13), chunk_size=chunk_size)
    for direction in ("image_to_text", "text_to_image"):
        assert metrics[f"{direction}_recall@1"] == pytest.approx(1 / 13)
        assert metrics[f"{direction}_recall@5"] == pytest.approx(5 / 13)
        assert metrics[f"{direction}_recall@13"] == pytest.approx(1)
        assert metrics[f"{direction}_mean_rank"] == pytest.approx(7)


def test_retrieval_metrics_do_not_depend_on_the_order_of_rows_or_the_scale():
    images, owners = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 5, 5, 2])
    texts = images[owners] + torch.randn(8, 5)
    metrics = retrieval_metrics(images, texts, owners)
    order, text_order = torch.randperm(6), torch.randperm(8)
    moved = retrieval_metrics(
        images[order] * 7, texts[text_order] * torch.rand(8, 1).add(0.1), order.argsort()[owners[text_order]]
    )
    assert moved == pytest.approx(metrics)


def test_retrieval_metrics_ignore_autocast():
    images, texts = torch.randn(40, 6), torch.randn(40, 6)
    expected = retrieval_metrics(images, texts, torch.arange(40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert retrieval_metrics(images, texts, torch.arange(40)) == expected


def close_calls(width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with twins that score a caption a few millionths higher or lower: apart in float64, not in float32."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(400, width, generator=generator, dtype=torch.float64)
    texts = images + torch.randn(400, width, generator=generator, dtype=torch.float64)
    unit = torch.nn.functional.normalize(images, dim=1)
    texts = torch.nn.functional.normalize(texts, dim=1)
    for row in range(40):
        # Moved along the caption's part that is orthogonal to the image, the cosine changes in proportion.
        aside = texts[row] - (texts[row] @ unit[row]) * unit[row]
        step = (row - 19.5) * 2e-7
        unit[399 - row] = unit[row] + aside / aside.norm() ** 2 * step
    return unit, texts


def float64_counts(images: torch.Tensor, texts: torch.Tensor, tolerance: float = 1e-6) -> tuple[torch.Tensor, ...]:
    unit = torch.nn.functional.normalize
    similarity = unit(images.double(), dim=1) @ unit(texts.double(), dim=1).T
    distance = torch.cat([similarity - similarity.diag()[:, None], (similarity - similarity.diag()[None]).T])
    above, level = (distance > tolerance).sum(1), (distance.abs() <= tolerance).sum(1)
    return (above + (level + 1) / 2).double().chunk(2)


@pytest.mark.parametrize("chunk_size", [64, 170, 1024])
def test_ranks_are_those_of_float64_where_float32_cannot_tell(chunk_size):
    images, texts = close_calls()
    ranks = ranks_of(images, texts, torch.arange(400), chunk_size=chunk_size)
    to_text, to_image = float64_counts(images, texts)
    assert torch.equal(ranks[0], to_text)
    assert torch.equal(ranks[1], to_image)
    # The case is a hard one: in float32 alone the ranks would be others.
    near = images.float() @ texts.float().T
    assert ((near > near.diag()[None]).sum(0) + 1 != to_image).any()


def test_ranks_of_many_near_ties_are_those_of_float64():
    generator = torch.Generator().manual_seed(6)
    prototypes = torch.randn(300, 24, generator=generator)
    # Twins within a few millionths of each other, in a space where other scores are close as well.
    images, texts = (prototypes[torch.randint(300, (1400,), generator=generator)] for _ in range(2))
    images = images + 3e-6 * torch.randn(images.shape, generator=generator)
    ranks = ranks_of(images, texts, torch.arange(1400), chunk_size=512)
    to_text, to_image = float64_counts(images, texts)
    assert torch.equal(ranks[0], to_text)
    assert torch.equal(ranks[1], to_image)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_ranks_do_not_depend_on_the_default_dtype(dtype):
    images, texts = torch.randn(30, 6), torch.randn(30, 6)
    expected = retrieval_metrics(images, texts, torch.arange(30))
    torch.set_default_dtype(dtype)
    try:
        assert retrieval_metrics(images, texts, torch.arange(30)) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_rows_whose_norm_overflows_are_refused():
    images = torch.randn(5, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="Row 3 of `image_embeds` is too long"):
        retrieval_metrics(
            images * torch.tensor([1, 1, 1, 1e200, 1], dtype=torch.float64)[:, None], images, torch.arange(5)
        )


def test_ranks_do_not_rely_on_the_precision_that_float32_products_are_set_to(monkeypatch):
    images, texts = close_calls()
    expected = ranks_of(images, texts, torch.arange(400))
    multiply = torch.mm

    def rounding(first: torch.Tensor, second: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if first.dtype == torch.float32:  # as TF32 and its like do
            first, second = first.bfloat16().float(), second.bfloat16().float()
        return multiply(first, second, out=out)

    monkeypatch.setattr(torch, "mm", rounding)
    ranks = ranks_of(images, texts, torch.arange(400))
    assert torch.equal(ranks[0], expected[0])
    assert torch.equal(ranks[1], expected[1])


def test_retrieval_metrics_refuse_bad_input_and_name_the_row():
    images, texts, owners = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 2, 1])

    def spoiled(embeds: torch.Tensor, row: int, value: float) -> torch.Tensor:
        embeds = embeds.clone()
        embeds[row] = value
        return embeds

    cases = [
        ((spoiled(images, 1, math.nan), texts, owners), "Row 1 of `image_embeds` is not finite"),
        ((images, spoiled(texts, 4, math.inf), owners), "Row 4 of `text_embeds` is not finite"),
        ((images, spoiled(texts, 3, 0.0), owners), "Row 3 of `text_embeds` is zero"),
        ((images, texts[:, :3], owners), "same width"),
        ((images, texts, owners[:4]), "one integer per caption"),
        ((images, texts, owners.float()), "one integer per caption"),
        ((images, texts, torch.tensor([0, 1, 2, 3, 1])), "Row 3 of `text_to_image` is not an image"),
        ((images, texts, torch.tensor([0, 1, 1, 1, -1])), "Row 4 of `text_to_image` is not an image"),
        ((images, texts, torch.tensor([0, 2, 2, 2, 0])), "Row 1 of `image_embeds` has no caption"),
        ((images[:0], texts, owners), "N > 0"),
        ((images[0], texts, owners), "shape"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            retrieval_metrics(*arguments)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        retrieval_metrics(images, texts, owners, ks=(1, 0))
    with pytest.raises(ValueError, match="chunk_size"):
        retrieval_metrics(images, texts, owners, chunk_size=0)


def test_caption_retrieval_accuracy_averages_both_directions():
    first = torch.eye(4)
    # The directions differ: 4 of 4 one way, 3 of 4 the other way.
    second = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0.3], [0, 0.9, 0, 0.4]])
    metrics = caption_retrieval_accuracy(first, second, ks=(1, 2))
    similarity = cosines(first, second)
    for name, scores in (("first_to_second", similarity), ("second_to_first", similarity.T)):
        for label, value in brute_force(scores, torch.eye(4, dtype=torch.bool), (1, 2)).items():
            if label.startswith("recall"):
                assert metrics[f"{name}_{label}"] == pytest.approx(value)
    for k in (1, 2):
        mean = (metrics[f"first_to_second_recall@{k}"] + metrics[f"second_to_first_recall@{k}"]) / 2
        assert metrics[f"mean_recall@{k}"] == pytest.approx(mean)
    assert metrics["first_to_second_recall@1"] == 1
    assert metrics["caption_retrieval_accuracy"] == metrics["mean_recall@1"] == 7 / 8


def test_caption_retrieval_accuracy_of_a_constant_embedding_is_that_of_guessing():
    metrics = caption_retrieval_accuracy(torch.ones(8, 3), torch.ones(8, 3), ks=(5,))
    assert metrics["caption_retrieval_accuracy"] == pytest.approx(1 / 8)
    assert metrics["mean_recall@5"] == pytest.approx(5 / 8)
    with pytest.raises(ValueError, match="same shape"):
        caption_retrieval_accuracy(torch.ones(8, 3), torch.ones(7, 3))


def test_top_k_accuracy_equals_torch_topk_without_ties():
    logits, labels = torch.randn(31, 7), torch.randint(7, (31,))
    metrics = top_k_accuracy(logits, labels, ks=(1, 3, 7))
    for k in (1, 3, 7):
        hits = (logits.topk(k).indices == labels[:, None]).any(1)
        assert metrics[f"top{k}"] == pytest.approx(hits.double().mean().item())


def test_top_k_accuracy_shares_ties_among_equal_classes():
    logits, labels = torch.tensor([[2.0, 2.0, 1.0, 0.0]] * 3), torch.tensor([0, 1, 2])
    metrics = top_k_accuracy(logits, labels, ks=(1, 2, 3))
    assert metrics == pytest.approx({"top1": 1 / 3, "top2": 2 / 3, "top3": 1.0})
    assert top_k_accuracy(torch.zeros(5, 4), torch.tensor([0, 1, 2, 3, 0]), ks=(1,)) == {"top1": pytest.approx(1 / 4)}


def test_mean_per_class_recall_equals_the_mean_over_present_classes():
    logits, labels = torch.randn(50, 6), torch.randint(5, (50,))
    labels[labels == 2] = 0
    predictions = logits.argmax(1)
    recalls = [(predictions[labels == c] == c).double().mean().item() for c in labels.unique().tolist()]
    assert mean_per_class_recall(logits, labels) == pytest.approx(statistics.mean(recalls))


def test_class_metrics_refuse_bad_input():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    with pytest.raises(ValueError, match="at most 3, the number of classes, got 5"):
        top_k_accuracy(logits, labels)
    with pytest.raises(ValueError, match=r"Row 2 of `labels` is not a class in \[0, 3\)"):
        mean_per_class_recall(logits, torch.tensor([0, 1, 3, 2]))
    with pytest.raises(ValueError, match="Row 0 of `logits` is not finite"):
        top_k_accuracy(logits.index_fill(0, torch.tensor([0]), math.nan), labels, ks=(1,))
    with pytest.raises(ValueError, match="shapes"):
        mean_per_class_recall(logits, labels[:3])
