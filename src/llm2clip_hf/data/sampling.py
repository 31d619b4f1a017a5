# SPDX-License-Identifier: Apache-2.0
"""
Random choices that are a pure function of (seed, epoch, row).

A resumed run, another number of workers or another batch order must see the same captions and the same crops, so no
choice may depend on a random stream that others also consume. Each choice hashes its own coordinates instead, with the
finalizer of splitmix64 (Steele, Lea and Flood, 2014), vectorized over rows.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
import torch


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def random_bits(seed: int, epoch: int, rows: np.ndarray, stream: int) -> np.ndarray:
    """64 random bits per row, a pure function of the arguments."""
    with np.errstate(over="ignore"):
        state = np.array([seed & _MASK], dtype=np.uint64)
        for coordinate in (epoch, stream):
            state = _mix(state + _GOLDEN) ^ np.uint64(coordinate & _MASK)
        return _mix(_mix(state + _GOLDEN) ^ (np.asarray(rows).astype(np.uint64) * _GOLDEN))


def random_uniform(seed: int, epoch: int, rows: np.ndarray, stream: int) -> np.ndarray:
    """Float64 values in `[0, 1)` per row, from the upper 53 bits of `random_bits`."""
    return (random_bits(seed, epoch, rows, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choose_caption(source_ids: np.ndarray, weights: np.ndarray, source_draw: float, caption_draw: float) -> int:
    """
    Choose one caption of an image: first its source by weight, then uniformly among the captions of that source.

    Sources that the image lacks do not take part; the weights of the others are renormalized.
    """
    present = np.bincount(source_ids, minlength=len(weights)) > 0
    cumulative = np.cumsum(weights * present)
    # The right side never lands on a source of weight zero, whose interval is empty.
    source = int(np.searchsorted(cumulative, source_draw * cumulative[-1], side="right"))
    members = np.flatnonzero(source_ids == source)
    return int(members[int(caption_draw * len(members))])


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * _MULTIPLIER_1
    state = (state ^ (state >> np.uint64(27))) * _MULTIPLIER_2
    return state ^ (state >> np.uint64(31))


# After the end of a sentence and the blank behind it; CJK texts have no blank there.
_SENTENCE_END = re.compile("(?<=[.!?])[\"')\\]]*\\s+|(?<=[\u3002\uff01\uff1f])\\s*")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, by their closing punctuation; abbreviations inside a sentence end it too."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def split_sub_captions(captions: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """
    The single sentences of long captions, as a caption source of their own.

    Stored embeddings need the sub-captions as captions that were embedded: pass the result as a further source to
    `embed_captions`, e.g. `{"dense": dense, "sentence": split_sub_captions(dense)}`.

    Args:
        captions (sequence): one caption or a list of captions per image.

    Returns:
        `list[list[str]]`: per image the distinct sentences of its captions, in order. An image whose captions have
        only one sentence each keeps those.

    Source: DreamLIP (arXiv 2403.17007).

    Example:
    >>> split_sub_captions(["A cat. It sleeps.", ["A dog", "Grass. A dog"]])
    [['A cat.', 'It sleeps.'], ['A dog', 'Grass.']]
    """
    if isinstance(captions, str):
        raise ValueError("`captions` is one string. Pass one caption or one list of captions per image.")
    result = []
    for entry in captions:
        texts = [entry] if isinstance(entry, str) else entry
        result.append(list(dict.fromkeys(sentence for text in texts for sentence in split_sentences(text))))
    return result


def choose_sub_caption(text: str, probability: float, draws: Sequence[float]) -> str:
    """
    With some probability a contiguous run of sentences of `text`, else `text`.

    The length of the run is uniform in 1 to `n - 1` of the `n` sentences, its position uniform given the length.
    """
    if draws[0] >= probability:
        return text
    sentences = split_sentences(text)
    if len(sentences) < 2:
        return text
    length = 1 + int(draws[1] * (len(sentences) - 1))
    start = int(draws[2] * (len(sentences) - length + 1))
    return " ".join(sentences[start : start + length])


# Streams of `random_bits`; every kind of choice has its own number. Substitutes count upwards from theirs.
_SOURCE, _CAPTION, _TRANSFORM, _SUB_CAPTION, _SUBSTITUTE = 0, 1, 2, 3, 1000
_FIRST_CAPTION, _SECOND_CAPTION, _DIRECTION, _SHARD_ORDER, _BUFFER = 10, 11, 12, 20, 21


class SampleDraws:
    """The random choices of a run, the same for map-style and streaming data sets."""

    def __init__(self, seed: int, weights: np.ndarray, sub_captions: float = 0.0) -> None:
        if not 0 <= sub_captions <= 1:
            raise ValueError(f"`sub_captions` must be a probability in [0, 1], got {sub_captions}. 0 switches it off.")
        self.seed, self.weights, self.sub_captions = seed, weights, sub_captions

    def caption(self, epoch: int, index: int, source_ids: np.ndarray) -> int:
        """Which of the captions of sample `index` is drawn, given the source of each."""
        rows = np.array([index])
        source_draw = float(random_uniform(self.seed, epoch, rows, _SOURCE)[0])
        caption_draw = float(random_uniform(self.seed, epoch, rows, _CAPTION)[0])
        return choose_caption(source_ids, self.weights, source_draw, caption_draw)

    def sub_caption(self, epoch: int, index: int, text: str) -> str:
        """A part of the drawn caption of sample `index`, or all of it."""
        if not self.sub_captions:
            return text
        rows = np.array([index])
        draws = [float(random_uniform(self.seed, epoch, rows, _SUB_CAPTION + k)[0]) for k in range(3)]
        return choose_sub_caption(text, self.sub_captions, draws)

    def generator(self, epoch: int, index: int) -> torch.Generator:
        """The source of randomness of the transform of sample `index`."""
        bits = random_bits(self.seed, epoch, np.array([index]), _TRANSFORM)
        return torch.Generator().manual_seed(int(bits[0]))

    def substitute(self, epoch: int, index: int, attempt: int, count: int) -> int:
        """A uniform number below `count`, for the sample that stands in for an unreadable one."""
        return int(random_bits(self.seed, epoch, np.array([index]), _SUBSTITUTE + attempt)[0] % np.uint64(count))


Sides = tuple[frozenset[int], frozenset[int]]
"""The source numbers of the two sides of a pair."""


def resolve_sides(patterns: Sequence[str], source_names: Sequence[str]) -> Sides:
    """The sources that two name patterns stand for."""
    if isinstance(patterns, str) or len(patterns) != 2:
        raise ValueError(f'`pair_sources` must be two name patterns such as ("short*", "long*"), got {patterns!r}.')
    first, second = (
        frozenset(number for number, name in enumerate(source_names) if fnmatchcase(name, pattern))
        for pattern in patterns
    )
    for pattern, side in zip(patterns, (first, second)):
        if not side:
            raise ValueError(f"`pair_sources`: the pattern {pattern!r} fits none of the sources {list(source_names)}.")
    if first & second:
        both = [source_names[number] for number in sorted(first & second)]
        raise ValueError(f"`pair_sources`: both patterns {tuple(patterns)} fit {both}. Each source has one side.")
    return first, second


def pair_bits(seed: int, epoch: int, rows: np.ndarray) -> list[list[int]]:
    """The three random numbers per row that `draw_pair` takes."""
    streams = (_FIRST_CAPTION, _SECOND_CAPTION, _DIRECTION)
    return [random_bits(seed, epoch, rows, stream).tolist() for stream in streams]


def draw_pair(
    texts: Sequence[str], source_ids: Sequence[int], sides: Sides | None, first: int, second: int, direction: int
) -> tuple[str, str, int]:
    """Anchor, positive, and the source of the positive."""
    if sides is not None:
        pairs = side_pairs(texts, source_ids, sides)
        pair = pairs[first % len(pairs)]
        (anchor, _), (positive, source) = pair if direction >> 63 else pair[::-1]
        return anchor, positive, source
    distinct = _first_sources(texts, source_ids)
    names = list(distinct)
    anchor_position = first % len(names)
    # A step of 1 to n - 1 around the circle: uniform over the other captions.
    positive = names[(anchor_position + 1 + second % (len(names) - 1)) % len(names)]
    return names[anchor_position], positive, distinct[positive]


def side_pairs(
    texts: Sequence[str], source_ids: Sequence[int], sides: Sides
) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    """All pairs of distinct texts, one of each side, each text with its source."""
    one, two = (
        _first_sources(
            [text for text, source in zip(texts, source_ids) if source in side],
            [source for source in source_ids if source in side],
        )
        for side in sides
    )
    return [(left, right) for left in one.items() for right in two.items() if left[0] != right[0]]


def _first_sources(texts: Sequence[str], source_ids: Sequence[int]) -> dict[str, int]:
    first: dict[str, int] = {}
    for text, source in zip(texts, source_ids):
        first.setdefault(text, source)
    return first


def checked_weights(caption_weights: Mapping[str, float] | None, source_names: tuple[str, ...]) -> np.ndarray:
    """Weights of the sources in their order; equal where none are given."""
    if caption_weights is None:
        return np.ones(len(source_names))
    if set(caption_weights) != set(source_names):
        raise ValueError(
            f"`caption_weights` names {sorted(caption_weights)}, the captions have the sources "
            f"{sorted(source_names)}. Give every source a weight; 0 leaves it out."
        )
    weights = np.array([float(caption_weights[name]) for name in source_names])
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(
            f"`caption_weights` must be finite and non-negative with a positive sum, got {dict(caption_weights)}."
        )
    return weights


def check_sub_captions(sub_captions: float, is_stored: bool) -> None:
    """ValueError for sub-captions of captions that are stored embeddings."""
    if is_stored and sub_captions:
        raise ValueError(
            f"`sub_captions` is {sub_captions}, but the captions are stored embeddings, which cannot be cut. Embed "
            "the sentences as a source of their own, see `split_sub_captions`, and give it a weight."
        )


# Padded tokens that one more pass through the LLM is worth: its launches, and matrices too small to fill a device.
_TOKENS_PER_PASS = 1024


def length_groups(lengths: Sequence[int], tokens_per_pass: int = _TOKENS_PER_PASS) -> list[list[int]]:
    """
    The partition of rows into passes with the lowest cost: padded tokens, and a constant for each pass.

    Exact, by dynamic programming over the distinct lengths: some best partition is a cut of the sorted rows, since
    sorting the rows into passes of the same sizes makes no pass longer.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    distinct, counts = np.unique(np.asarray(lengths), return_counts=True)
    distinct, ends = distinct[::-1], np.concatenate([[0], np.cumsum(counts[::-1])])
    cost = np.zeros(len(ends))
    first = np.zeros(len(ends), dtype=np.int64)  # where the last pass of the best partition of a prefix begins
    for end in range(1, len(ends)):
        options = cost[:end] + (ends[end] - ends[:end]) * distinct[:end] + tokens_per_pass
        first[end] = options.argmin()
        cost[end] = options[first[end]]
    groups, end = [], len(ends) - 1
    while end > 0:
        groups.append(order[ends[first[end]] : ends[end]])
        end = int(first[end])
    return groups[::-1]


def token_budget_batches(lengths: Sequence[int], max_tokens: int, pads: bool = True) -> Iterator[list[int]]:
    """
    Cut items into batches of similar length under a budget of tokens.

    Longest first, so that a batch that does not fit in memory fails at the start. An item longer than the budget
    makes a batch of its own.
    """
    batch: list[int] = []
    tokens = 0
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        cost = (len(batch) + 1) * lengths[batch[0]] if batch and pads else tokens + lengths[item]
        if batch and cost > max_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(item)
        tokens += lengths[item]
    if batch:
        yield batch


class Layout(NamedTuple):
    """How many readers share the samples: `rank` of `world_size`, `worker` of `num_workers`, and the batch size."""

    rank: int
    world_size: int
    worker: int
    num_workers: int
    batch_size: int


class WorkerPlan(NamedTuple):
    """The samples of one worker."""

    epoch: int
    order: np.ndarray
    shards: np.ndarray
    starts: np.ndarray


def plan_worker(counts: np.ndarray, layout: Layout, *, seed: int, epoch: int, buffer: int) -> WorkerPlan:
    """The samples of one worker in one epoch, in order."""
    shards = np.arange(len(counts))
    if buffer:
        shards = _generator(seed, epoch, _SHARD_ORDER).permutation(shards)
    starts = np.concatenate([[0], np.cumsum(counts[shards])]).astype(np.int64)
    per_rank = int(starts[-1]) // layout.world_size
    begin, end = worker_range(per_rank, layout)
    positions = np.arange(begin, end, dtype=np.int64) + layout.rank * per_rank
    if buffer:
        # One stream per range, whatever the layout that made it.
        random = _generator(seed, epoch, _BUFFER, layout.rank, layout.worker)
        positions = positions[buffer_order(len(positions), buffer, random)]
    return WorkerPlan(epoch, positions, shards, starts)


def worker_range(per_rank: int, layout: Layout) -> tuple[int, int]:
    """
    The part of a rank's `per_rank` samples that a worker reads.

    A loader takes batch `i` from worker `i % num_workers`; the one batch that is not full is the last of all.
    """
    num_batches = -(-per_rank // layout.batch_size)
    ends = [0]
    for worker in range(layout.num_workers):
        batches = batches_of_worker(num_batches, worker, layout.num_workers)
        size = batches * layout.batch_size
        if num_batches and worker == (num_batches - 1) % layout.num_workers:
            size -= num_batches * layout.batch_size - per_rank
        ends.append(ends[-1] + size)
    return ends[layout.worker], ends[layout.worker + 1]


def batches_of_worker(num_batches: int, worker: int, num_workers: int) -> int:
    """How many of the first `num_batches` batches come from `worker`, when the workers take turns."""
    return max(0, -(-(num_batches - worker) // num_workers))


def buffer_order(count: int, buffer: int, random: np.random.Generator) -> np.ndarray:
    """
    The order in which a shuffle buffer returns the samples 0 to `count - 1` that flow through it.

    The buffer is filled; then, again and again, a random sample leaves it and the next one enters. Sample `k` never
    leaves before `k - buffer + 1` others have.
    """
    size = min(buffer, count)
    held = list(range(size))
    draws = random.random(count).tolist()
    order = np.empty(count, dtype=np.int64)
    for position in range(count):
        slot = int(draws[position] * len(held))
        order[position] = held[slot]
        incoming = position + size
        if incoming < count:
            held[slot] = incoming
        else:
            held[slot] = held[-1]
            held.pop()
    return order


def _generator(*coordinates: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([value & (2**64 - 1) for value in coordinates]))


__all__ = ["choose_sub_caption", "split_sentences", "split_sub_captions", "token_budget_batches"]
