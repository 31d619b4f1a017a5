# SPDX-License-Identifier: Apache-2.0
"""Caption tables, caption pairs and the random choices behind them."""

import collections
import math
import pickle

import numpy as np
import pytest
from datasets import Dataset

from llm2clip_hf.data import CaptionPairDataset, CaptionTable
from llm2clip_hf.data.sampling import choose_caption, random_bits, random_uniform


CAPTIONS = {
    "real": ["a cat", ["a dog", "two dogs"], [], "a tree"],
    "dense": [["a grey cat asleep"], "a small dog", ["three birds", "birds"], []],
}
FLAT = ["a cat", "a grey cat asleep", "a dog", "two dogs", "a small dog", "three birds", "birds", "a tree"]


def test_table_numbers_captions_by_image_and_then_by_source():
    table = CaptionTable(CAPTIONS)
    assert [text for image in range(4) for text in table[image]] == FLAT
    assert table.offsets.tolist() == [0, 2, 5, 7, 8]
    assert table.source_ids.tolist() == [0, 1, 0, 0, 1, 1, 1, 0]
    assert table.source_names == ("real", "dense")
    for start in range(9):
        for stop in range(9):
            assert table.rows(start, stop) == FLAT[start:stop]


def test_table_takes_a_plain_list_and_a_column():
    rows = [["a", "b"], ["c"]]
    assert CaptionTable(rows)[0] == CaptionTable(Dataset.from_dict({"captions": rows})["captions"])[0] == ["a", "b"]
    assert CaptionTable(["a", "b"]).source_names == ("caption",)


def test_table_digest_changes_with_text_grouping_source_and_order_only():
    digest = CaptionTable([["ab", "c"], ["d"]]).sha256
    assert CaptionTable({"caption": [("ab", "c"), "d"]}).sha256 == digest
    others = [
        CaptionTable([["a", "bc"], ["d"]]),
        CaptionTable([["ab"], ["c", "d"]]),
        CaptionTable([["c", "ab"], ["d"]]),
        CaptionTable([["ab0,0,c"], ["d"]]),
        CaptionTable({"other": [["ab", "c"], ["d"]]}),
        CaptionTable({"caption": [["ab"], ["d"]], "more": [["c"], []]}),
    ]
    assert len({digest, *(other.sha256 for other in others)}) == 7


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([["a"], []], "Image 1 has no caption"),
        ([["a"], ["b", " "]], "Caption ' ' of image 1, source `caption`"),
        ([["a"], None], "Caption None of image 1"),
        ([["a"], [3]], "Caption 3 of image 1"),
        ([{"text": "a"}], "Caption {'text': 'a'} of image 0"),
        ({"real": ["a"], "dense": ["b", "c"]}, "one entry per image, got {'real': 1, 'dense': 2}"),
        ({}, "no source"),
        ([], "`captions` is empty"),
        ("a cat", "are one string"),
    ],
)
def test_table_refuses_bad_captions_and_names_the_row(captions, message):
    with pytest.raises(ValueError) as error:
        CaptionTable(captions)
    assert message in str(error.value)


def test_pairs_are_two_distinct_captions_of_the_row():
    captions = [["a", "b", "a"], ["c", "d", "e", "f"], ["g", "h"]]
    pairs = CaptionPairDataset(captions, seed=5)
    for epoch in range(30):
        pairs.set_epoch(epoch)
        for row, texts in enumerate(captions):
            drawn = pairs[row]
            assert drawn["anchor"] != drawn["positive"]
            assert {drawn["anchor"], drawn["positive"]} <= set(texts)


def test_pairs_are_uniform_over_ordered_pairs_and_change_with_the_epoch():
    pairs = CaptionPairDataset([["a", "b", "c"]] * 600, seed=1)
    counts = collections.Counter(tuple(row.values()) for row in pairs.to_dataset())
    assert len(counts) == 6
    # 600 draws over 6 outcomes: 100 each, standard deviation 9.
    assert all(60 < count < 140 for count in counts.values())
    first = list(pairs.to_dataset())
    pairs.set_epoch(1)
    second = list(pairs.to_dataset())
    same = sum(a == b for a, b in zip(first, second))
    assert 60 < same < 140


def test_pairs_depend_on_seed_epoch_and_row_only():
    captions = [[f"{row}-{number}" for number in range(5)] for row in range(40)]
    whole = CaptionPairDataset(captions, seed=9)
    whole.set_epoch(4)
    dataset = whole.to_dataset()
    assert dataset.column_names == ["anchor", "positive"]
    assert [whole[row] for row in range(40)] == list(dataset)
    # A data set of the first rows, and a copy in another process, draw the same.
    part = CaptionPairDataset(captions[:7], seed=9)
    part.set_epoch(4)
    assert list(part.to_dataset()) == list(dataset)[:7]
    assert list(pickle.loads(pickle.dumps(whole)).to_dataset()) == list(dataset)
    assert list(CaptionPairDataset(captions, seed=10).to_dataset()) != list(dataset)


def test_pairs_refuse_an_image_with_one_distinct_caption():
    with pytest.raises(ValueError, match="Row 1 has fewer than two distinct captions"):
        CaptionPairDataset([["a", "b"], ["c", "c"]])
    with pytest.raises(IndexError, match="Row 1 is out of range"):
        CaptionPairDataset([["a", "b"]])[1]


def test_random_bits_equal_a_plain_python_computation():
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, epoch, row, stream in [(0, 0, 0, 0), (42, 3, 12345, 2), (-1, 7, 2**40, 11)]:
        state = mix((seed & mask) + golden & mask) ^ epoch
        state = mix(state + golden & mask) ^ stream
        expected = mix(mix(state + golden & mask) ^ (row * golden & mask))
        assert int(random_bits(seed, epoch, np.array([row]), stream)[0]) == expected
    # splitmix64 is published with this first output for the seed 0.
    assert mix(golden) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("vary", ["seed", "epoch", "row", "stream"])
def test_random_uniform_is_uniform_and_uncorrelated_along_every_coordinate(vary):
    count = 20000
    if vary == "row":
        draws = random_uniform(0, 0, np.arange(count), 0)
    else:
        count = 4000
        arguments = [{"seed": 0, "epoch": 0, "stream": 0} | {vary: value} for value in range(count)]
        draws = np.array([random_uniform(a["seed"], a["epoch"], np.array([3]), a["stream"])[0] for a in arguments])
    tolerance = 5 / math.sqrt(count)
    assert abs(draws.mean() - 0.5) < tolerance * math.sqrt(1 / 12)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < tolerance
    histogram = np.histogram(draws, bins=10, range=(0, 1))[0]
    assert (np.abs(histogram - count / 10) < 5 * math.sqrt(count * 0.09)).all()


def test_choose_caption_follows_the_weights_of_the_sources_that_are_present():
    source_ids = np.array([0, 2, 2, 2], dtype=np.int16)
    weights = np.array([1.0, 5.0, 3.0])
    grid = (np.arange(60) + 0.5) / 60
    chosen = collections.Counter(choose_caption(source_ids, weights, u, v) for u in grid for v in grid)
    # Source 1 is absent: 1/4 for the caption of source 0, 3/4 shared by the three of source 2.
    assert chosen == {0: 900, 1: 900, 2: 900, 3: 900}


def test_choose_caption_never_takes_a_source_of_weight_zero():
    source_ids = np.array([0, 1, 2], dtype=np.int16)
    highest = 1 - 2.0**-53
    for draw in (0.0, 0.5, highest):
        assert choose_caption(source_ids, np.array([0.0, 1.0, 0.0]), draw, draw) == 1
    assert choose_caption(source_ids, np.array([0.3, 0.0, 0.7]), highest, highest) == 2
