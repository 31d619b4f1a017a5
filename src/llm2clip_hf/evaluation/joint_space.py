# SPDX-License-Identifier: Apache-2.0
"""What a cosine of the joint space means: match threshold, modality gap, alignment and uniformity; composition."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from .metrics import TIE_TOLERANCE, Counts, UnitRows, hit_probability, unit_pairs


_BINS = 20_000  # of cosines in [-1, 1], each 1e-4 wide
FEWEST_MATCHES = 100


def match_threshold(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: torch.Tensor,
    *,
    precision: float = 0.95,
    prior: float = 0.5,
    chunk_size: int = 1024,
) -> dict[str, float]:
    r"""
    The lowest cosine at which an image and a text can be called a match with a given precision.

    Cosines of contrastive models are small (0.2 to 0.3 for a good match of CLIP) and differ between models. With the
    share of matching pairs at or above a cosine, `tpr`, and that of the other pairs, `fpr`,

        precision = prior * tpr / (prior * tpr + (1 - prior) * fpr).

    Args:
        image_embeds (`torch.Tensor` of shape `(N, D)`): held-out images; normalized here.
        text_embeds (`torch.Tensor` of shape `(M, D)`): their captions; normalized here.
        text_to_image (`torch.LongTensor` of shape `(M,)`): row of the image each caption belongs to.
        precision (`float`, defaults to 0.95): wanted share of true matches among the pairs called matches, in (0, 1).
        prior (`float`, defaults to 0.5):
            Share of matching pairs among those that will be judged, in (0, 1). Lower it where most are wrong.
        chunk_size (`int`, defaults to 1024): side of a tile of similarities.

    Returns:
        `dict[str, float]`: `match_threshold`, a cosine, rounded to 1e-4; `match_precision` and `match_recall` there;
        `matching_cosine` and `other_cosine`, the means of both kinds of pairs.

    Raises:
        ValueError: for fewer than 100 captions (the recall would be off by more than 5 %), a share outside of (0, 1),
            shapes that disagree, or where no cosine reaches the precision.

    Example:
    >>> x = torch.eye(100)
    >>> match_threshold(x, x, torch.arange(100))["match_recall"]
    1.0
    """
    for name, value in {"precision": precision, "prior": prior}.items():
        if not 0 < value < 1:
            raise ValueError(f"`{name}` must lie between 0 and 1, both excluded, got {value}.")
    images, texts, owners = unit_pairs(image_embeds, text_embeds, text_to_image)
    if len(texts) < FEWEST_MATCHES or len(images) < 2:
        raise ValueError(
            f"A threshold from {len(texts)} captions of {len(images)} images would be a guess. Give at least "
            f"{FEWEST_MATCHES} captions and 2 images that the model was not trained on."
        )
    counts, sums = torch.zeros(2, _BINS, dtype=torch.int64), [0.0, 0.0]  # of all pairs, and of those that match
    for rows, first, cosines in _tiles(images, texts, chunk_size):
        right = cosines[owners[first : first + cosines.shape[1]] == rows[:, None]]
        for row, chosen in enumerate((cosines.flatten(), right)):
            sums[row] += chosen.sum().item()
            # A hair is added so that a cosine on an edge counts above it in spite of rounding.
            bins = ((chosen + (1 + TIE_TOLERANCE)) * (_BINS / 2)).long().clamp(0, _BINS - 1)
            counts[row] += torch.bincount(bins, minlength=_BINS).cpu()
    counts[0] -= counts[1]
    other_share, match_share = counts.flip(1).cumsum(1).flip(1).double() / counts.sum(1, keepdim=True)
    true, false = prior * match_share, (1 - prior) * other_share
    reached = torch.where(true > 0, true / (true + false), 0.0)
    good = (reached >= precision).nonzero()[:, 0]
    if not len(good):
        best = int(reached.argmax())
        raise ValueError(
            f"No cosine separates matches with precision {precision} at a prior of {prior}: the best is "
            f"{reached[best]:.3f}, at {2 * best / _BINS - 1:.4f}. Lower `precision`, or train the model further."
        )
    edge = int(good[0])
    return {
        "match_threshold": round(2 * edge / _BINS - 1, 4),
        "match_precision": reached[edge].item(),
        "match_recall": match_share[edge].item(),
        "matching_cosine": sums[1] / int(counts[1].sum()),
        "other_cosine": (sums[0] - sums[1]) / int(counts[0].sum()),
    }


def joint_space_statistics(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, text_to_image: torch.Tensor, chunk_size: int = 1024
) -> dict[str, float]:
    r"""
    How images and texts lie on the sphere.

    Args:
        image_embeds (`torch.Tensor` of shape `(N, D)`), text_embeds (`torch.Tensor` of shape `(M, D)`), text_to_image
            (`torch.LongTensor` of shape `(M,)`): as for `match_threshold`; at least two of each.
        chunk_size (`int`, defaults to 1024): side of a tile of similarities.

    Returns:
        `dict[str, float]`: `modality_gap`, the distance of the mean image from the mean text, in [0, 2]
        (https://huggingface.co/papers/2203.02053); `alignment`, the mean squared distance of matching pairs, in
        [0, 4]; `image_uniformity` and `text_uniformity`, `log mean exp(-2 |x - y|^2)` over pairs of distinct rows,
        at most 0, lower is more uniform (https://huggingface.co/papers/2005.10242).

    Raises:
        ValueError: if shapes disagree, a row is not finite or zero, or there are fewer than two rows.

    Example:
    >>> round(joint_space_statistics(torch.eye(2), torch.eye(2), torch.arange(2))["image_uniformity"], 6)
    -4.0
    """
    images, texts, owners = unit_pairs(image_embeds, text_embeds, text_to_image)
    if len(images) < 2 or len(texts) < 2:
        raise ValueError(f"Two images and two texts are the least, got {len(images)} and {len(texts)}.")
    starts = range(0, len(texts), chunk_size)
    squares = [(images[owners[s : s + chunk_size]] - texts[s : s + chunk_size]).square().sum() for s in starts]
    result = {"alignment": float(sum(squares)) / len(texts)}
    means: dict[str, Any] = {}
    for name, unit in (("image", images), ("text", texts)):
        means[name] = sum(unit[s : s + chunk_size].sum(0) for s in range(0, len(unit), chunk_size)) / len(unit)
        kernel = 0.0
        for _, _, cosines in _tiles(unit, unit, chunk_size):
            kernel += torch.exp(4 * (cosines - 1)).sum().item()  # |x - y|^2 = 2 - 2 cosine
        pairs = len(unit) * (len(unit) - 1)
        result[f"{name}_uniformity"] = math.log((kernel - len(unit)) / pairs)
    return {"modality_gap": float((means["image"] - means["text"]).norm()), **result}


def composition_accuracy(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, negative_embeds: torch.Tensor, owners: torch.Tensor
) -> torch.Tensor:
    """
    Whether an image is closer to its caption than to every wrong caption made from it (SugarCrepe, ARO).

    Args:
        image_embeds (`torch.Tensor` of shape `(N, D)`): images; normalized here, like all.
        text_embeds (`torch.Tensor` of shape `(N, D)`): the caption of each image.
        negative_embeds (`torch.Tensor` of shape `(K, D)`): wrong captions.
        owners (`torch.LongTensor` of shape `(K,)`): image of each wrong caption; every image has one.

    Returns:
        `torch.Tensor` of shape `(N,)`, float64: 1 or 0; a tie of `t` captions counts `1 / t`.

    Raises:
        ValueError: if shapes disagree, a row is not finite or zero, or an image has no wrong caption.

    Example:
    >>> composition_accuracy(torch.eye(2), torch.eye(2), torch.eye(2).flip(0), torch.arange(2)).tolist()
    [1.0, 1.0]
    """
    if image_embeds.shape != text_embeds.shape:
        raise ValueError(
            f"`image_embeds` {tuple(image_embeds.shape)} and `text_embeds` {tuple(text_embeds.shape)} must have the "
            "same shape: one caption per image."
        )
    images, wrong, owners = unit_pairs(image_embeds, negative_embeds, owners)
    texts = UnitRows(text_embeds, "text_embeds", images.embeds.device)
    right = (images[:] * texts[:]).sum(1)
    margin = (images[owners] * wrong[:]).sum(1) - right[owners]
    above = torch.bincount(owners, weights=(margin > TIE_TOLERANCE).double(), minlength=len(images))
    tied = torch.bincount(owners, weights=(margin.abs() <= TIE_TOLERANCE).double(), minlength=len(images))
    return hit_probability(Counts(above, tied, torch.ones_like(above)), 1)


def winoground_scores(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> dict[str, float]:
    """
    Text, image and group score of Winoground (https://huggingface.co/papers/2204.03162): two images, two captions.

    Args:
        image_embeds (`torch.Tensor` of shape `(N, 2, D)`): the two images of each item; normalized here.
        text_embeds (`torch.Tensor` of shape `(N, 2, D)`): their captions, in the same order.

    Returns:
        `dict[str, float]` in [0, 1]: `text_score`, both images prefer their caption; `image_score`, both captions
        prefer their image; `group_score`, all of that. A tie is no preference, as in the original code.

    Raises:
        ValueError: if shapes disagree, or a row is not finite or zero.

    Example:
    >>> x = torch.eye(2)[None]
    >>> winoground_scores(x, x)["group_score"]
    1.0
    """
    if image_embeds.shape != text_embeds.shape or image_embeds.ndim != 3 or image_embeds.shape[1] != 2:
        raise ValueError(
            f"`image_embeds` {tuple(image_embeds.shape)} and `text_embeds` {tuple(text_embeds.shape)} must both have "
            "the shape (N, 2, D)."
        )
    images = UnitRows(image_embeds.flatten(0, 1), "image_embeds")[:].unflatten(0, (-1, 2))
    texts = UnitRows(text_embeds.flatten(0, 1), "text_embeds", images.device)[:].unflatten(0, (-1, 2))
    cosine = images @ texts.mT
    own = cosine.diagonal(dim1=1, dim2=2)
    text = (own > cosine.flip(2).diagonal(dim1=1, dim2=2) + TIE_TOLERANCE).all(1)
    image = (own > cosine.flip(1).diagonal(dim1=1, dim2=2) + TIE_TOLERANCE).all(1)
    scores = {"text_score": text, "image_score": image, "group_score": text & image}
    return {name: each.double().mean().item() for name, each in scores.items()}


def _tiles(first: UnitRows, second: UnitRows, size: int) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """Row numbers of the first, first row of the second, and their cosines."""
    for start in range(0, len(first), size):
        queries = first[start : start + size]
        rows = torch.arange(start, start + len(queries), device=queries.device)
        for column in range(0, len(second), size):
            yield rows, column, queries @ second[column : column + size].T


__all__ = ["composition_accuracy", "joint_space_statistics", "match_threshold", "winoground_scores"]
