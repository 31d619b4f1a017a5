# SPDX-License-Identifier: Apache-2.0
"""
Metrics on embeddings and logits: pure functions from tensors to floats.

Ties count as what random tie-breaking gives on average, computed and not drawn. So a constant embedding, whose scores
all tie, gets the score of guessing, and no metric depends on the order of rows. Cosines closer than `TIE_TOLERANCE`
are equal, because embeddings of the same content differ by that much between batches and devices.

Counts are those of float64 scores: float32 decides only where its error cannot matter, and autocast and TF32, which a
caller may have switched on, change nothing. Scores are never all in memory: a tile of `chunk_size` by `chunk_size` is,
on the device of the embeddings.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .metrics_ranks import (
    Counts,
    PairCounts,
    UnitRows,
    caption_recall,
    check_rows,
    count_pairs,
    expected_rank,
    hit_probability,
    hit_rate,
)


__all__ = [
    "RetrievalRanks",
    "caption_retrieval_accuracy",
    "mean_per_class_recall",
    "retrieval_metrics",
    "retrieval_ranks",
    "top_k_accuracy",
]


class RetrievalRanks(NamedTuple):
    """
    Rank of the first right answer of every query; 1 is the best, ties count as the mean over their orders.

    Args:
        image_to_text (`torch.Tensor` of shape `(N,)`, float64): rank of an image's best caption among all captions.
        text_to_image (`torch.Tensor` of shape `(M,)`, float64): rank of a caption's image among all images.
    """

    image_to_text: torch.Tensor
    text_to_image: torch.Tensor


def retrieval_metrics(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: torch.Tensor,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 1024,
) -> dict[str, float]:
    """
    Image-text retrieval in both directions with any number of captions per image.

    `recall@k` is what the CLIP paper and its successors call by that name, the hit rate: the share of queries with at
    least one right answer among the first `k`. The rank of a query is the position of its first right answer, 1 being
    the best; other right answers of the same query do not push it back. Similarity is the cosine. Image to text it
    equals, up to `TIE_TOLERANCE`:

        similarity = normalize(image_embeds) @ normalize(text_embeds).T              # (N, M)
        right = text_to_image == arange(N)[:, None]                                  # (N, M)
        best = similarity.masked_fill(~right, -inf).amax(dim=1, keepdim=True)        # (N, 1)
        rank = 1 + ((similarity > best) & ~right).sum(dim=1)                         # (N,)
        recall_at_k = (rank <= k).mean()

    where no right answer ties with a wrong one, and text to image the same with both matrices transposed. Among ties,
    a query contributes the probability of a hit, and the expected rank, over all orders of the tied candidates.

    Args:
        image_embeds (`torch.Tensor` of shape `(N, D)`): one row per image; normalized here.
        text_embeds (`torch.Tensor` of shape `(M, D)`): one row per caption; normalized here.
        text_to_image (`torch.LongTensor` of shape `(M,)`):
            Row of the image each caption belongs to, e.g. `[0, 0, 1, 1]`; every image has a caption.
        ks (sequence of `int`, defaults to `(1, 5, 10)`): cut-offs; one above the number of candidates gives 1.
        chunk_size (`int`, defaults to 1024): side of a tile of similarities; memory is `chunk_size ** 2` numbers
            besides the embeddings. Larger ones suit a GPU.

    Returns:
        `dict[str, float]`: for each direction, `image_to_text` and `text_to_image`: `..._recall@k` in `[0, 1]` for
        each `k`, `..._median_rank` and `..._mean_rank`; and `image_to_text_caption_recall@k`, recall in the sense of
        information retrieval: the share of an image's captions that are among the first `k`, averaged over images.
        Text to image the two are one, as a caption has one image.

    Raises:
        ValueError: if shapes disagree, a row is not finite or zero, an image has no caption, a value of
            `text_to_image` is out of range, or a cut-off is not positive. The message names the row.

    Example:
    >>> metrics = retrieval_metrics(torch.eye(2), torch.eye(2)[[0, 0, 1]], torch.tensor([0, 0, 1]), ks=(1,))
    >>> metrics["image_to_text_recall@1"], metrics["text_to_image_mean_rank"]
    (1.0, 1.0)
    """
    _check_cutoffs(ks)
    counts, owners = _compare(image_embeds, text_embeds, text_to_image, chunk_size)
    metrics: dict[str, float] = {}
    for direction, each in (("image_to_text", counts.image), ("text_to_image", counts.text)):
        metrics |= {f"{direction}_recall@{k}": hit_rate(each, k) for k in ks}
        rank = expected_rank(each)
        metrics[f"{direction}_median_rank"] = _median(rank)
        metrics[f"{direction}_mean_rank"] = rank.mean().item()
    return metrics | {f"image_to_text_caption_recall@{k}": caption_recall(counts, owners, k) for k in ks}


def retrieval_ranks(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, text_to_image: torch.Tensor, chunk_size: int = 1024
) -> RetrievalRanks:
    """
    The rank behind every query of `retrieval_metrics`, to look at single queries.

    Args:
        image_embeds (`torch.Tensor` of shape `(N, D)`): one row per image; normalized here.
        text_embeds (`torch.Tensor` of shape `(M, D)`): one row per caption; normalized here.
        text_to_image (`torch.LongTensor` of shape `(M,)`): row of the image each caption belongs to.
        chunk_size (`int`, defaults to 1024): side of a tile of similarities.

    Returns:
        `RetrievalRanks`.

    Raises:
        ValueError: as for `retrieval_metrics`.

    Example:
    >>> retrieval_ranks(torch.eye(3), torch.eye(3)[[0, 2, 1]], torch.tensor([0, 1, 2])).text_to_image.tolist()
    [1.0, 2.5, 2.5]
    """
    counts, _ = _compare(image_embeds, text_embeds, text_to_image, chunk_size)
    return RetrievalRanks(expected_rank(counts.image), expected_rank(counts.text))


def caption_retrieval_accuracy(
    first: torch.Tensor, second: torch.Tensor, ks: Sequence[int] = (1, 5, 10), chunk_size: int = 1024
) -> dict[str, float]:
    """
    Caption-to-caption retrieval: does one caption of an image find the other one among those of all images?

    Row `i` of both tensors belongs to image `i`. The query is one caption, the candidates are the other captions of
    all images. Source: CRA of the paper (section 4.2), which reports top-1 over the 5,000 images of COCO without
    naming the direction; here both are measured.

    Args:
        first (`torch.Tensor` of shape `(N, D)`): embeddings of the first captions; normalized here.
        second (`torch.Tensor` of shape `(N, D)`): embeddings of the second captions; normalized here.
        ks (sequence of `int`, defaults to `(1, 5, 10)`): cut-offs; one above `N` gives 1.
        chunk_size (`int`, defaults to 1024): side of a tile of similarities.

    Returns:
        `dict[str, float]`: `caption_retrieval_accuracy`, the mean of both directions at top-1, in `[0, 1]`; and for
        each `k`: `first_to_second_recall@k`, `second_to_first_recall@k` and their mean `mean_recall@k`.

    Raises:
        ValueError: if the shapes differ, a row is not finite or zero, or a cut-off is not positive.

    Example:
    >>> caption_retrieval_accuracy(torch.eye(3), torch.eye(3)[[0, 2, 1]], ks=(1,))["caption_retrieval_accuracy"]
    0.3333333333333333
    """
    _check_cutoffs(ks)
    if first.shape != second.shape:
        raise ValueError(
            f"`first` {tuple(first.shape)} and `second` {tuple(second.shape)} must have the same shape: one caption "
            "each per image."
        )
    queries = UnitRows(first, "first")
    candidates = UnitRows(second, "second", queries.embeds.device)
    rows = torch.arange(len(queries), device=queries.embeds.device)
    counts = count_pairs(queries, candidates, rows, chunk_size)
    forward, backward = counts.image, counts.text
    metrics = {"caption_retrieval_accuracy": (hit_rate(forward, 1) + hit_rate(backward, 1)) / 2}
    for k in ks:
        metrics[f"first_to_second_recall@{k}"] = hit_rate(forward, k)
        metrics[f"second_to_first_recall@{k}"] = hit_rate(backward, k)
        metrics[f"mean_recall@{k}"] = (hit_rate(forward, k) + hit_rate(backward, k)) / 2
    return metrics


def top_k_accuracy(logits: torch.Tensor, labels: torch.Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """
    Share of samples whose class is among the `k` highest logits.

    Classes that tie with the right one share the places at random: two classes of the same name get half each.

    Args:
        logits (`torch.Tensor` of shape `(N, C)`): score of each class.
        labels (`torch.LongTensor` of shape `(N,)`): right class in `[0, C)`.
        ks (sequence of `int`, defaults to `(1, 5)`): cut-offs, each at most `C`.

    Returns:
        `dict[str, float]`: `top1`, `top5`, ..., in `[0, 1]`.

    Raises:
        ValueError: if shapes disagree, a row of logits is not finite, a label is out of range, or a cut-off is not
            between 1 and `C`.

    Example:
    >>> top_k_accuracy(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]]), torch.tensor([1, 2]), ks=(1, 2))
    {'top1': 0.5, 'top2': 1.0}
    """
    _check_cutoffs(ks, at_most=logits.shape[-1])
    counts = _count_classes(logits, labels)
    return {f"top{k}": hit_rate(counts, k) for k in ks}


def mean_per_class_recall(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """
    Top-1 accuracy of each class, averaged over the classes that occur in `labels`.

    Args:
        logits (`torch.Tensor` of shape `(N, C)`): score of each class.
        labels (`torch.LongTensor` of shape `(N,)`): right class in `[0, C)`.

    Returns:
        `float` in `[0, 1]`.

    Raises:
        ValueError: as for `top_k_accuracy`.

    Example:
    >>> mean_per_class_recall(torch.eye(3)[[0, 0, 0, 0]], torch.tensor([0, 0, 0, 1]))
    0.5
    """
    hits = hit_probability(_count_classes(logits, labels), k=1)
    labels = labels.to(hits.device)
    samples = torch.bincount(labels)
    hits_per_class = torch.zeros(len(samples), dtype=torch.float64, device=hits.device).index_add_(0, labels, hits)
    return (hits_per_class[samples > 0] / samples[samples > 0]).mean().item()


def _compare(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, text_to_image: torch.Tensor, chunk_size: int
) -> tuple[PairCounts, torch.Tensor]:
    """Counts of both directions, and the image of each caption on the device of the images."""
    images = UnitRows(image_embeds, "image_embeds")
    texts = UnitRows(text_embeds, "text_embeds", images.embeds.device)
    if image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            f"`image_embeds` {tuple(image_embeds.shape)} and `text_embeds` {tuple(text_embeds.shape)} must have the "
            "same width. Both must come from the joint space, after the projections."
        )
    owners = _checked_owners(text_to_image, len(images), len(texts)).to(images.embeds.device, torch.int64)
    return count_pairs(images, texts, owners, chunk_size), owners


def _count_classes(logits: torch.Tensor, labels: torch.Tensor) -> Counts:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"`logits` {tuple(logits.shape)} and `labels` {tuple(labels.shape)} must have the shapes (N, C) and (N,) "
            "with N > 0."
        )
    check_rows(~logits.isfinite().all(dim=1), "logits", "is not finite")
    labels = labels.to(logits.device)
    check_rows((labels < 0) | (labels >= logits.shape[1]), "labels", f"is not a class in [0, {logits.shape[1]})")
    right = logits.gather(1, labels[:, None])
    equal = (logits == right).sum(dim=1)
    return Counts((logits > right).sum(dim=1), equal - 1, torch.ones_like(equal))


def _checked_owners(text_to_image: torch.Tensor, num_images: int, num_texts: int) -> torch.Tensor:
    if text_to_image.shape != (num_texts,) or text_to_image.is_floating_point():
        raise ValueError(
            f"`text_to_image` must hold one integer per caption ({num_texts}), got shape "
            f"{tuple(text_to_image.shape)} and {text_to_image.dtype}."
        )
    outside = (text_to_image < 0) | (text_to_image >= num_images)
    check_rows(outside, "text_to_image", f"is not an image in [0, {num_images})")
    check_rows(torch.bincount(text_to_image, minlength=num_images) == 0, "image_embeds", "has no caption")
    return text_to_image


def _check_cutoffs(ks: Sequence[int], at_most: int | None = None) -> None:
    for k in ks:
        if k < 1 or (at_most is not None and k > at_most):
            limit = "" if at_most is None else f" and at most {at_most}, the number of classes"
            raise ValueError(f"Cut-offs in `ks` must be at least 1{limit}, got {k}.")


def _median(ranks: torch.Tensor) -> float:
    ordered = ranks.sort().values
    middle = len(ordered) // 2
    return (ordered[middle].item() + ordered[(len(ordered) - 1) // 2].item()) / 2
