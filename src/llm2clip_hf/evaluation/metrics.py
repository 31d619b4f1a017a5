# SPDX-License-Identifier: Apache-2.0
"""
Metrics on embeddings and logits: pure functions from tensors to floats.

Ties count as what random tie-breaking gives on average, computed and not drawn. So a constant embedding, whose scores
all tie, gets the score of guessing, and no metric depends on the order of rows. Cosines closer than `TIE_TOLERANCE`
are equal, because embeddings of the same content differ by that much between batches and devices.

Scores are computed in float64: autocast and TF32, which a caller may have switched on, leave it alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


__all__ = ["caption_retrieval_accuracy", "mean_per_class_recall", "retrieval_metrics", "top_k_accuracy"]

TIE_TOLERANCE = 1e-6


def retrieval_metrics(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: torch.Tensor,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 512,
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
        chunk_size (`int`, defaults to 512): queries scored at a time; memory is `chunk_size * max(N, M)` numbers.

    Returns:
        `dict[str, float]`: for each direction, `image_to_text` and `text_to_image`: `..._recall@k` in `[0, 1]` for
        each `k`, `..._median_rank` and `..._mean_rank`.

    Raises:
        ValueError: if shapes disagree, a row is not finite or zero, an image has no caption, a value of
            `text_to_image` is out of range, or a cut-off is not positive. The message names the row.

    Example:
    >>> metrics = retrieval_metrics(torch.eye(2), torch.eye(2)[[0, 0, 1]], torch.tensor([0, 0, 1]), ks=(1,))
    >>> metrics["image_to_text_recall@1"], metrics["text_to_image_mean_rank"]
    (1.0, 1.0)
    """
    _check_cutoffs(ks)
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be positive, got {chunk_size}.")
    images = _unit_rows(image_embeds, "image_embeds")
    texts = _unit_rows(text_embeds, "text_embeds").to(images.device)
    _check_same_width(images, texts, "image_embeds", "text_embeds")
    owners = _checked_owners(text_to_image, len(images), len(texts)).to(images.device)
    image_rows = torch.arange(len(images), device=images.device)
    counts_of = {
        "image_to_text": _count(images, texts, image_rows, owners, chunk_size),
        "text_to_image": _count(texts, images, owners, image_rows, chunk_size),
    }
    metrics: dict[str, float] = {}
    for direction, counts in counts_of.items():
        metrics |= {f"{direction}_recall@{k}": _hit_rate(counts, k) for k in ks}
        rank = _expected_rank(counts)
        metrics[f"{direction}_median_rank"] = _median(rank)
        metrics[f"{direction}_mean_rank"] = rank.mean().item()
    return metrics


def caption_retrieval_accuracy(
    first: torch.Tensor, second: torch.Tensor, ks: Sequence[int] = (1, 5, 10), chunk_size: int = 512
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
        chunk_size (`int`, defaults to 512): queries scored at a time.

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
    queries = _unit_rows(first, "first")
    candidates = _unit_rows(second, "second").to(queries.device)
    rows = torch.arange(len(queries), device=queries.device)
    forward = _count(queries, candidates, rows, rows, chunk_size)
    backward = _count(candidates, queries, rows, rows, chunk_size)
    metrics = {"caption_retrieval_accuracy": (_hit_rate(forward, 1) + _hit_rate(backward, 1)) / 2}
    for k in ks:
        metrics[f"first_to_second_recall@{k}"] = _hit_rate(forward, k)
        metrics[f"second_to_first_recall@{k}"] = _hit_rate(backward, k)
        metrics[f"mean_recall@{k}"] = (_hit_rate(forward, k) + _hit_rate(backward, k)) / 2
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
    return {f"top{k}": _hit_rate(counts, k) for k in ks}


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
    hits = _hit_probability(_count_classes(logits, labels), k=1)
    labels = labels.to(hits.device)
    samples = torch.bincount(labels)
    hits_per_class = torch.zeros(len(samples), dtype=torch.float64, device=hits.device).index_add_(0, labels, hits)
    return (hits_per_class[samples > 0] / samples[samples > 0]).mean().item()


class _Counts(NamedTuple):
    """Per query, `(num_queries,)` each: where the best right answer stands among the candidates."""

    above: torch.Tensor  # wrong answers with a higher score
    tied_wrong: torch.Tensor  # wrong answers with the same score
    tied_right: torch.Tensor  # right answers with the same score, itself included


def _count(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    query_groups: torch.Tensor,
    candidate_groups: torch.Tensor,
    chunk_size: int,
) -> _Counts:
    """Compare each query with all candidates, a chunk of queries at a time; every group has a candidate."""
    chunks = []
    for start in range(0, len(queries), chunk_size):
        rows = slice(start, start + chunk_size)
        similarity = queries[rows] @ candidates.T
        right = query_groups[rows, None] == candidate_groups[None, :]
        best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        higher = similarity > best + TIE_TOLERANCE
        tied = (similarity >= best - TIE_TOLERANCE) & ~higher
        # No right answer is higher than the best one.
        chunks.append((higher.sum(dim=1), (tied & ~right).sum(dim=1), (tied & right).sum(dim=1)))
    return _Counts(*(torch.cat(parts) for parts in zip(*chunks)))


def _hit_probability(counts: _Counts, k: int) -> torch.Tensor:
    """
    Probability, per query, that a right answer is among the first `k` when ties are ordered at random.

    `places = k - above` of the `tied = tied_wrong + tied_right` candidates are among the first `k`. All of them are
    wrong with probability C(tied_wrong, places) / C(tied, places).
    """
    wrong = counts.tied_wrong.double()
    tied = wrong + counts.tied_right
    places = k - counts.above.double()
    # Clamped to where the factorials exist; the two outer cases are set below.
    inside = places.clamp(min=0).minimum(wrong)
    log_all_wrong = (
        torch.lgamma(wrong + 1)
        - torch.lgamma(wrong - inside + 1)
        - torch.lgamma(tied + 1)
        + torch.lgamma(tied - inside + 1)
    )
    hit = -torch.expm1(log_all_wrong)
    hit = torch.where(places > wrong, torch.ones_like(hit), hit)
    return torch.where(places <= 0, torch.zeros_like(hit), hit)


def _hit_rate(counts: _Counts, k: int) -> float:
    return _hit_probability(counts, k).mean().item()


def _expected_rank(counts: _Counts) -> torch.Tensor:
    """Mean position of the first right answer when ties are ordered at random; 1 is the best."""
    tied = (counts.tied_wrong + counts.tied_right).double()
    return counts.above + (tied + 1) / (counts.tied_right + 1)


def _count_classes(logits: torch.Tensor, labels: torch.Tensor) -> _Counts:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"`logits` {tuple(logits.shape)} and `labels` {tuple(labels.shape)} must have the shapes (N, C) and (N,) "
            "with N > 0."
        )
    _check_rows(~logits.isfinite().all(dim=1), "logits", "is not finite")
    labels = labels.to(logits.device)
    _check_rows((labels < 0) | (labels >= logits.shape[1]), "labels", f"is not a class in [0, {logits.shape[1]})")
    right = logits.gather(1, labels[:, None])
    equal = (logits == right).sum(dim=1)
    return _Counts((logits > right).sum(dim=1), equal - 1, torch.ones_like(equal))


def _unit_rows(embeds: torch.Tensor, name: str) -> torch.Tensor:
    if embeds.ndim != 2 or not len(embeds):
        raise ValueError(f"`{name}` must have shape (N, D) with N > 0, got {tuple(embeds.shape)}.")
    # MPS has no float64.
    embeds = embeds.detach().to("cpu" if embeds.device.type == "mps" else embeds.device).double()
    _check_rows(~embeds.isfinite().all(dim=1), name, "is not finite")
    norms = embeds.norm(dim=1, keepdim=True)
    _check_rows(norms[:, 0] == 0, name, "is zero and has no direction")
    return embeds / norms


def _check_rows(bad: torch.Tensor, name: str, problem: str) -> None:
    rows = bad.nonzero()[:, 0]
    if len(rows):
        raise ValueError(
            f"Row {rows[0].item()} of `{name}` {problem} ({len(rows)} of {len(bad)} rows). "
            "Check the input of that row and the model that made it."
        )


def _check_same_width(first: torch.Tensor, second: torch.Tensor, first_name: str, second_name: str) -> None:
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"`{first_name}` {tuple(first.shape)} and `{second_name}` {tuple(second.shape)} must have the same width. "
            "Both must come from the joint space, after the projections."
        )


def _checked_owners(text_to_image: torch.Tensor, num_images: int, num_texts: int) -> torch.Tensor:
    if text_to_image.shape != (num_texts,) or text_to_image.is_floating_point():
        raise ValueError(
            f"`text_to_image` must hold one integer per caption ({num_texts}), got shape "
            f"{tuple(text_to_image.shape)} and {text_to_image.dtype}."
        )
    outside = (text_to_image < 0) | (text_to_image >= num_images)
    _check_rows(outside, "text_to_image", f"is not an image in [0, {num_images})")
    _check_rows(torch.bincount(text_to_image, minlength=num_images) == 0, "image_embeds", "has no caption")
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
