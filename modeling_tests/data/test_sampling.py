# SPDX-License-Identifier: Apache-2.0
"""Seeded choices: who reads what and when, and parts of long captions."""

import collections

import numpy as np
import pytest

from llm2clip_hf.data import split_sub_captions
from llm2clip_hf.data.sampling import (
    Layout,
    batches_of_worker,
    buffer_order,
    choose_sub_caption,
    plan_worker,
    split_sentences,
    worker_range,
)


COUNTS = np.array([5, 1, 7, 3, 11, 2])


def plans(world_size: int, num_workers: int, batch_size: int, **options):
    return {
        (rank, worker): plan_worker(COUNTS, Layout(rank, world_size, worker, num_workers, batch_size), **options)
        for rank in range(world_size)
        for worker in range(num_workers)
    }


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 29])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_sample_is_read_at_most_once_and_all_ranks_read_alike(world_size, num_workers, batch_size):
    total = int(COUNTS.sum())
    for buffer in (0, 1, 4, 100):
        found = plans(world_size, num_workers, batch_size, seed=1, epoch=2, buffer=buffer)
        positions = np.concatenate([plan.order for plan in found.values()])
        assert len(set(positions.tolist())) == len(positions) == total // world_size * world_size
        assert positions.min() >= 0
        assert positions.max() < total
        for rank in range(world_size):
            assert sum(len(found[rank, worker].order) for worker in range(num_workers)) == total // world_size


@pytest.mark.parametrize("per_rank", [0, 1, 5, 8, 9, 23])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_workers_that_take_turns_give_full_batches_up_to_the_last(per_rank, num_workers):
    batch_size = 4
    ranges = [worker_range(per_rank, Layout(0, 1, worker, num_workers, batch_size)) for worker in range(num_workers)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == per_rank
    assert all(before[1] == after[0] for before, after in zip(ranges, ranges[1:]))
    # The loader: each worker in turn gives its next batch, until none has any.
    left, sizes, of_worker = [end - begin for begin, end in ranges], [], [0] * num_workers
    while any(left):
        for worker in range(num_workers):
            if left[worker]:
                sizes.append(min(batch_size, left[worker]))
                left[worker] -= sizes[-1]
                of_worker[worker] += 1
                expected = [batches_of_worker(len(sizes), k, num_workers) for k in range(num_workers)]
                assert of_worker == expected
    assert sizes == [batch_size] * (per_rank // batch_size) + [per_rank % batch_size] * (per_rank % batch_size > 0)


@pytest.mark.parametrize(("count", "buffer"), [(0, 3), (1, 3), (7, 1), (7, 3), (7, 7), (7, 50), (400, 16)])
def test_the_order_is_one_that_a_buffer_can_give(count, buffer):
    order = buffer_order(count, buffer, np.random.default_rng(0)).tolist()
    assert sorted(order) == list(range(count))
    held, incoming = [], iter(range(count))
    for sample in order:
        while len(held) < buffer and (entering := next(incoming, None)) is not None:
            held.append(entering)
        held.remove(sample)


def test_a_buffer_picks_uniformly():
    first = [int(buffer_order(20, 5, np.random.default_rng(seed))[0]) for seed in range(2000)]
    assert set(first) == set(range(5))
    # Each with probability 1/5, standard deviation 18.
    assert all(300 < first.count(k) < 500 for k in range(5))


def test_the_order_changes_with_seed_and_epoch_only():
    def order(**options):
        return np.concatenate([plan.order for plan in plans(2, 2, 2, **options).values()]).tolist()

    def shards(**options):
        return plans(1, 1, 1, **options)[0, 0].shards.tolist()

    options = {"seed": 3, "epoch": 4, "buffer": 5}
    assert order(**options) == order(**options)
    assert order(**options) != order(**{**options, "seed": 4})
    assert order(**options) != order(**{**options, "epoch": 5})
    assert shards(**options) != shards(**{**options, "epoch": 5})
    assert order(seed=3, epoch=4, buffer=0) == order(seed=9, epoch=5, buffer=0) == list(range(28))


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A cat.", ["A cat."]),
        ("A cat sleeps", ["A cat sleeps"]),
        ("A cat. A dog!  A bird?\nA 3.5 m tree", ["A cat.", "A dog!", "A bird?", "A 3.5 m tree"]),
        ("\u4e00\u53ea\u732b\u3002\u4e00\u53ea\u72d7\u3002", ["\u4e00\u53ea\u732b\u3002", "\u4e00\u53ea\u72d7\u3002"]),
        (" ", []),
    ],
)
def test_sentences_end_at_their_punctuation(text, sentences):
    assert split_sentences(text) == sentences


def test_splitting_keeps_the_images_and_drops_repetitions():
    captions = ["A. B.", ["A. B. A.", "C"], "D"]
    assert split_sub_captions(captions) == [["A.", "B."], ["A.", "B.", "C"], ["D"]]
    with pytest.raises(ValueError, match="is one string"):
        split_sub_captions("A. B.")


def test_runs_are_contiguous_shorter_than_the_caption_and_uniform():
    text = "A. B. C. D."
    steps = [(k + 0.5) / 60 for k in range(60)]
    counts = collections.Counter(
        choose_sub_caption(text, 1.0, (0.5, length, start)) for length in steps for start in steps
    )
    runs = ["A.", "B.", "C.", "D.", "A. B.", "B. C.", "C. D.", "A. B. C.", "B. C. D."]
    expected = {run: 3600 / 3 / (5 - len(run.split())) for run in runs}
    assert counts == pytest.approx(expected)


def test_the_probability_decides_and_one_sentence_stays_whole():
    text = "A. B."
    assert choose_sub_caption(text, 0.3, (0.3, 0, 0)) == text
    assert choose_sub_caption(text, 0.3, (0.29, 0, 0)) == "A."
    assert choose_sub_caption("One sentence", 1.0, (0, 0, 0)) == "One sentence"
