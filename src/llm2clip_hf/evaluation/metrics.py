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

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch


TIE_TOLERANCE = 1e-6


class Counts(NamedTuple):
    """Per query, `(num_queries,)` each: where the best right answer stands among the candidates."""

    above: torch.Tensor  # wrong answers with a higher score
    tied_wrong: torch.Tensor  # wrong answers with the same score
    tied_right: torch.Tensor  # right answers with the same score, itself included


class PairCounts(NamedTuple):
    """What `count_pairs` finds for `N` images and `M` captions."""

    image: Counts  # queries are images, candidates captions
    text: Counts  # queries are captions, candidates images
    caption_above: torch.Tensor  # (M,) captions, right or wrong, that the caption's image scores higher than it
    caption_tied: torch.Tensor  # (M,) captions that the image scores like it, itself included


class UnitRows:
    """Rows of an embedding matrix, normalized in float64 a block at a time; the matrix itself is not copied."""

    _BLOCK = 8192

    def __init__(self, embeds: torch.Tensor, name: str, device: torch.device | None = None) -> None:
        if embeds.ndim != 2 or not len(embeds):
            raise ValueError(f"`{name}` must have shape (N, D) with N > 0, got {tuple(embeds.shape)}.")
        device = embeds.device if device is None else device
        # MPS has no float64.
        self.embeds = embeds.detach().to("cpu" if device.type == "mps" else device)
        blocks = self.embeds.split(self._BLOCK)
        check_rows(torch.cat([~block.isfinite().all(dim=1) for block in blocks]), name, "is not finite")
        self.norms = torch.cat([block.double().norm(dim=1) for block in blocks])
        check_rows(self.norms == 0, name, "is zero and has no direction")
        check_rows(self.norms.isinf(), name, "is too long for its norm to be computed")

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        return self.embeds[rows].double() / self.norms[rows, None]


def check_rows(bad: torch.Tensor, name: str, problem: str) -> None:
    """Raise a `ValueError` that names the first row of argument `name` that `bad` `(N,)` marks."""
    rows = bad.nonzero()[:, 0]
    if len(rows):
        raise ValueError(
            f"Row {rows[0].item()} of `{name}` {problem} ({len(rows)} of {len(bad)} rows). "
            "Check the input of that row and the model that made it."
        )


def count_pairs(images: UnitRows, texts: UnitRows, owners: torch.Tensor, chunk_size: int) -> PairCounts:
    """Compare all images with all captions in tiles; `owners` `(M,)` is the image of each caption."""
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be positive, got {chunk_size}.")
    starts = range(0, len(texts), chunk_size)
    scores = torch.cat([(images[owners[s : s + chunk_size]] * texts[s : s + chunk_size]).sum(1) for s in starts])
    best, slots_between = _caption_slots(scores, owners, len(images))
    text_above, text_reach, caption_above, caption_reach = (torch.zeros_like(owners) for _ in range(4))
    shape = (min(chunk_size, len(images)), min(chunk_size, len(texts)))
    tile = _Tile(shape, images.embeds.shape[1], scores.device)
    for start in range(0, len(images), chunk_size):
        stop = min(start + chunk_size, len(images))
        queries = images[start:stop]
        groups = slots_between(start, stop)
        for first in starts:
            part = slice(first, first + chunk_size)
            tile.multiply(queries, texts[part])
            above, reach = tile.count(scores[None, part], dim=0)
            text_above[part] += above
            text_reach[part] += reach
            for rows, captions in groups:
                above, reach = tile.count(scores[captions, None], dim=1, rows=rows)
                caption_above[captions] += above
                caption_reach[captions] += reach
    # Rounding differs between a pair's own product and the tile's: what is tied with itself must stay at least that.
    caption_tied = (caption_reach - caption_above).clamp(min=1)
    level = scores >= scores[best][owners] - TIE_TOLERANCE
    tied_right = torch.bincount(owners[level], minlength=len(images))
    tied_wrong = (caption_tied[best] - tied_right).clamp(min=0)
    image = Counts(caption_above[best], tied_wrong, tied_right)
    ones = torch.ones_like(text_above)
    text = Counts(text_above, (text_reach - text_above - ones).clamp(min=0), ones)
    return PairCounts(image, text, caption_above, caption_tied)


def _caption_slots(
    scores: torch.Tensor, owners: torch.Tensor, num_images: int
) -> tuple[torch.Tensor, Callable[[int, int], list[tuple[torch.Tensor, torch.Tensor]]]]:
    """The best caption of each image; and, for some images, which have a first, a second, ... best one, and these."""
    order = scores.argsort(descending=True, stable=True)
    order = order[owners[order].argsort(stable=True)]
    counts = torch.bincount(owners, minlength=num_images)
    first = counts.cumsum(0) - counts

    def between(start: int, stop: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        groups = []
        for slot in range(int(counts[start:stop].max())):
            rows = (counts[start:stop] > slot).nonzero()[:, 0]
            groups.append((rows, order[first[start:stop][rows] + slot]))
        return groups

    return order[first], between


class _Tile:
    """
    A tile of similarities, counted in float32 where that decides and in float64 where it does not.

    A float32 product of unit rows is off by at most `(D + 4) * 2**-24`: rounding of the rows (2), of the sum of `D`
    products (`D`), and of the threshold (2). Entries further than that from a threshold are on the same side of it in
    float64; the few others are computed again. On a CPU this halves the time, on a GPU without fast float64 far more.
    """

    # Above this share of undecided entries, e.g. where all embeddings are equal, the whole tile is done in float64;
    # an entry on its own costs some tens of those in a product.
    _MOST_UNDECIDED = 1 / 512
    # How many undecided entries are computed at a time: what they need of the rows stays in a cache.
    _ENTRIES = 512

    def __init__(self, shape: tuple[int, int], width: int, device: torch.device) -> None:
        size = shape[0] * shape[1]
        self._products, self._mask = (torch.empty(size, dtype=torch.float32, device=device) for _ in range(2))
        self._exact_products: torch.Tensor | None = None
        self._error = (width + 4) * 2.0**-24
        self._screen = self._keeps_float32(shape, width)

    def multiply(self, queries: torch.Tensor, candidates: torch.Tensor) -> None:
        """Take float64 unit rows `(R, D)` and `(C, D)`."""
        self._queries, self._candidates = queries, candidates
        self._in_float64: torch.Tensor | None = None
        if self._screen:
            self._in_float32 = self._product(self._products, queries.float(), candidates.float())

    def count(
        self, threshold: torch.Tensor, dim: int, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries above the float64 threshold, and entries not below it, along `dim`; of all rows or of some."""
        if rows is not None and len(rows) == len(self._queries):
            rows = None
        if self._screen and self._in_float64 is None:
            chosen = self._in_float32 if rows is None else self._in_float32[rows]
            margin = TIE_TOLERANCE + self._error
            low, high = (threshold - margin).float(), (threshold + margin).float()
            above = self._number(torch.gt, chosen, high, dim)
            undecided = self._number(torch.ge, chosen, low, dim) - above
            if undecided.sum() <= chosen.numel() * self._MOST_UNDECIDED:
                lines = undecided.nonzero()[:, 0]
                # The very comparisons that were counted, so that none is lost in rounding.
                near = (chosen if dim == 1 else chosen.T).index_select(0, lines)
                near = (near >= low.reshape(-1)[lines, None]) & ~(near > high.reshape(-1)[lines, None])
                return self._decide(near, lines, threshold.reshape(-1), dim, rows, above)
        if self._in_float64 is None:
            if self._exact_products is None:
                self._exact_products = torch.empty_like(self._products, dtype=torch.float64)
            self._in_float64 = self._product(self._exact_products, self._queries, self._candidates)
        chosen = self._in_float64 if rows is None else self._in_float64[rows]
        above = self._number(torch.gt, chosen, threshold + TIE_TOLERANCE, dim)
        return above, self._number(torch.ge, chosen, threshold - TIE_TOLERANCE, dim)

    def _decide(
        self,
        near: torch.Tensor,
        lines: torch.Tensor,
        threshold: torch.Tensor,
        dim: int,
        rows: torch.Tensor | None,
        above: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add to `above` the entries that `near` marks, computed in float64; row `i` of it is line `lines[i]`."""
        reach = above.clone()
        queries = self._queries if rows is None else self._queries[rows]
        of_lines, others = (self._candidates, queries) if dim == 0 else (queries, self._candidates)
        for entries in near.nonzero().split(self._ENTRIES):
            line, other = lines[entries[:, 0]], entries[:, 1]
            distance = (of_lines[line] * others[other]).sum(dim=1) - threshold[line]
            above.index_add_(0, line, (distance > TIE_TOLERANCE).to(above.dtype))
            reach.index_add_(0, line, (distance >= -TIE_TOLERANCE).to(reach.dtype))
        return above, reach

    def _number(
        self, compare: Callable[..., torch.Tensor], chosen: torch.Tensor, threshold: torch.Tensor, dim: int
    ) -> torch.Tensor:
        """How many entries along `dim` satisfy the comparison."""
        if chosen.dtype == torch.float32:
            # As float32: several times faster on a CPU than a boolean result; a count below 2**24 is exact in it.
            mask = self._mask[: chosen.numel()].view(chosen.shape)
            return compare(chosen, threshold, out=mask).sum(dim).to(torch.int32)
        return compare(chosen, threshold).view(torch.uint8).sum(dim, dtype=torch.int32)

    def _product(self, buffer: torch.Tensor, queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        shape = (len(queries), len(candidates))
        # Autocast would turn float32 rows into bfloat16.
        with torch.autocast(buffer.device.type, enabled=False):
            return torch.mm(queries, candidates.T, out=buffer[: shape[0] * shape[1]].view(shape))

    def _keeps_float32(self, shape: tuple[int, int], width: int) -> bool:
        """Whether a product is done in float32, seen on one, as TF32 and the like can be switched on in many ways."""
        device = self._products.device
        queries, candidates = (torch.zeros(length, width, dtype=torch.float32, device=device) for length in shape)
        # Of 22 bits with no zeros between them: a sum of a few shorter numbers does not hold it.
        queries[:, 0] = value = 1 + (2**21 - 1) * 2.0**-23
        candidates[:, 0] = 1
        return bool((self._product(self._products, queries, candidates) == value).all())


def hit_probability(counts: Counts, k: int) -> torch.Tensor:
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


def hit_rate(counts: Counts, k: int) -> float:
    """Mean over queries of `hit_probability`."""
    return hit_probability(counts, k).mean().item()


def expected_rank(counts: Counts) -> torch.Tensor:
    """Mean position of the first right answer when ties are ordered at random; 1 is the best."""
    tied = (counts.tied_wrong + counts.tied_right).double()
    return counts.above + (tied + 1) / (counts.tied_right + 1)


def caption_recall(counts: PairCounts, owners: torch.Tensor, k: int) -> float:
    """Share of an image's captions among its first `k` when ties are ordered at random, mean over images."""
    inside = ((k - counts.caption_above).double() / counts.caption_tied).clamp(0, 1)
    per_image = torch.bincount(owners)
    share = torch.zeros(len(per_image), dtype=torch.float64, device=owners.device).index_add_(0, owners, inside)
    return (share / per_image).mean().item()


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
    check_cutoffs(ks)
    images, texts, owners = unit_pairs(image_embeds, text_embeds, text_to_image)
    counts = count_pairs(images, texts, owners, chunk_size)
    metrics: dict[str, float] = {}
    for direction, each in (("image_to_text", counts.image), ("text_to_image", counts.text)):
        metrics |= {f"{direction}_recall@{k}": hit_rate(each, k) for k in ks}
        rank = expected_rank(each)
        metrics[f"{direction}_median_rank"] = float(np.median(rank.cpu().numpy()))
        metrics[f"{direction}_mean_rank"] = rank.mean().item()
    return metrics | {f"image_to_text_caption_recall@{k}": caption_recall(counts, owners, k) for k in ks}


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
    check_cutoffs(ks)
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
        first_hits, second_hits = hit_rate(forward, k), hit_rate(backward, k)
        metrics |= {f"first_to_second_recall@{k}": first_hits, f"second_to_first_recall@{k}": second_hits}
        metrics[f"mean_recall@{k}"] = (first_hits + second_hits) / 2
    return metrics


def unit_pairs(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, text_to_image: torch.Tensor
) -> tuple[UnitRows, UnitRows, torch.Tensor]:
    """Checked images and captions, and the image of each caption, all on the device of the images."""
    images = UnitRows(image_embeds, "image_embeds")
    texts = UnitRows(text_embeds, "text_embeds", images.embeds.device)
    if image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            f"`image_embeds` {tuple(image_embeds.shape)} and `text_embeds` {tuple(text_embeds.shape)} must have the "
            "same width. Both must come from the joint space, after the projections."
        )
    owners = _checked_owners(text_to_image, len(images), len(texts)).to(images.embeds.device, torch.int64)
    return images, texts, owners


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


def check_cutoffs(ks: Sequence[int], at_most: int | None = None) -> None:
    for k in ks:
        if k < 1 or (at_most is not None and k > at_most):
            limit = "" if at_most is None else f" and at most {at_most}, the number of classes"
            raise ValueError(f"Cut-offs in `ks` must be at least 1{limit}, got {k}.")


__all__ = [
    "TIE_TOLERANCE",
    "caption_retrieval_accuracy",
    "retrieval_metrics",
]
