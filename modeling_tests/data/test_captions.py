# SPDX-License-Identifier: Apache-2.0
"""Caption tables, caption pairs and the random choices behind them."""

import collections
import hashlib
import math
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset

from llm2clip_hf.data import CaptionPairDataset, CaptionTable, load_captions
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
        ([["a"], ["\udc80"]], "is not valid Unicode"),
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


def test_table_counts_distinct_and_shared_captions_like_a_brute_force_count():
    rng = np.random.default_rng(3)
    rows = [[f"t{number}" for number in rng.integers(0, 60, size=1 + image % 4)] for image in range(40)]
    table = CaptionTable({"one": rows, "two": [row[:1] for row in rows]})
    flat = [(text, image) for image, row in enumerate(rows) for text in [*row, row[0]]]
    shared = sum(any(other == text and j != image for other, j in flat) for text, image in flat)
    assert table.num_shared_captions == shared > 0
    assert table.distinct_counts.tolist() == [len(set(row)) for row in rows]
    assert CaptionTable([["a", "a"], ["b"]]).num_shared_captions == 0
    texts = [text for image in range(40) for text in table[image]]
    assert [table.caption(row) for row in range(table.num_captions)] == texts


def test_table_digest_is_the_published_formula():
    """Stores on disk record it, so it must never change."""
    digest = hashlib.sha256(b"real\0dense")
    for image, (real, dense) in enumerate([(["a cat"], ["b", "\u00fc"]), (["x"], [])]):
        for source, texts in enumerate((real, dense)):
            for text in texts:
                digest.update(f"{image},{source},{len(text.encode())}:{text}".encode())
    assert CaptionTable({"real": [["a cat"], "x"], "dense": [["b", "\u00fc"], []]}).sha256 == digest.hexdigest()


def test_the_digest_under_other_names_of_the_sources() -> None:
    named = CaptionTable({"real": ["a cat", "x"], "dense": [["b", "\u00fc"], []], "more": [["ab"], "c"]})
    merged = CaptionTable([named[0], named[1]])
    assert merged.sha256 != named.sha256
    assert merged.sha256_as(named.source_names, named.source_ids) == named.sha256
    assert named.sha256_as(merged.source_names, merged.source_ids) == merged.sha256
    others = [[["a cat", "b", "\u00fc"], ["ab", "x", "c"]], [named[0], ["c", "x"]]]
    for other in map(CaptionTable, others):
        assert other.sha256_as(named.source_names, named.source_ids) != named.sha256


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
    counts = collections.Counter((row["anchor"], row["positive"]) for row in pairs.to_dataset())
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
    assert dataset.column_names == ["anchor", "positive", "label"]
    assert dataset["label"][:] == list(range(40))
    assert [whole[row] for row in range(40)] == list(dataset)
    # A data set of the first rows, and a copy in another process, draw the same.
    part = CaptionPairDataset(captions[:7], seed=9)
    part.set_epoch(4)
    assert list(part.to_dataset()) == list(dataset)[:7]
    assert whole.__getitems__([31, 4, 4]) == [whole[31], whole[4], whole[4]]
    assert list(pickle.loads(pickle.dumps(whole)).to_dataset()) == list(dataset)
    assert list(CaptionPairDataset(captions, seed=10).to_dataset()) != list(dataset)


def test_pairs_refuse_an_image_with_one_distinct_caption():
    with pytest.raises(ValueError, match="Row 1 has fewer than two distinct captions"):
        CaptionPairDataset([["a", "b"], ["c", "c"]])
    with pytest.raises(IndexError, match="Row 1 is out of range"):
        CaptionPairDataset([["a", "b"]])[1]


def test_hard_negatives_are_captions_of_other_images_of_the_kind_of_the_positive():
    rng = np.random.default_rng(0)
    # Texts repeat a lot across images, so that random draws often hit a text of the anchor's own image.
    sources = {
        name: [[f"{name}{number}" for number in rng.integers(0, 9, size=rng.integers(1, 4))] for _ in range(50)]
        for name in ("raw", "long", "short")
    }
    pairs = CaptionPairDataset(sources, seed=2, hard_negatives=True)
    assert pairs.to_dataset().column_names == ["anchor", "positive", "negative", "label"]
    seen = set()
    for epoch in range(6):
        pairs.set_epoch(epoch)
        drawn = [pairs[row] for row in range(50)]
        assert drawn == pairs.__getitems__(range(50)) == list(pairs.to_dataset())
        for row, pair in enumerate(drawn):
            own = {text for column in sources.values() for text in column[row]}
            kind = pair["positive"].rstrip("0123456789")
            assert pair["negative"] in {t for other in range(50) if other != row for t in sources[kind][other]} - own
            assert pair["label"] == row
        seen.add(tuple(pair["negative"] for pair in drawn))
    assert len(seen) == 6
    without = CaptionPairDataset(sources, seed=2)
    without.set_epoch(5)
    assert list(without.to_dataset()) == [{k: v for k, v in pair.items() if k != "negative"} for pair in drawn]


def test_hard_negatives_are_uniform_over_the_captions_of_the_source():
    pairs = CaptionPairDataset([[f"a{row}", f"b{row}"] for row in range(11)], seed=4, hard_negatives=True)
    counts = collections.Counter()
    for epoch in range(1000):
        pairs.set_epoch(epoch)
        counts[pairs[3]["negative"]] += 1
    assert set(counts) == {f"{letter}{row}" for letter in "ab" for row in range(11) if row != 3}
    # Chi-square over 20 outcomes: 19 degrees of freedom, 43.8 is the 99.9 % quantile.
    assert sum((count - 50) ** 2 / 50 for count in counts.values()) < 43.8


def test_hard_negative_is_found_where_nearly_all_captions_are_the_image_s_own():
    rows = [["a", "b"]] * 2000 + [["a", "c"]]
    pairs = CaptionPairDataset(rows, hard_negatives=True)
    assert {pairs[row]["negative"] for row in range(0, 2000, 97)} == {"c"}
    assert pairs[2000]["negative"] == "b"
    with pytest.raises(ValueError, match="Row 0 has no hard negative.*source `caption`"):
        CaptionPairDataset([["a", "b"], ["b", "a"]], hard_negatives=True)[0]
    with pytest.raises(ValueError, match="Only one image has captions in the source `dense`"):
        CaptionPairDataset({"raw": ["a", "b"], "dense": ["c", []]} | {"more": ["d", "e"]}, hard_negatives=True)


def test_pair_sources_toss_a_coin_for_the_direction():
    count = 4000
    sources = {
        "short_a": [f"s{row}" for row in range(count)],
        "raw": [f"r{row}" for row in range(count)],
        "long_a": [[f"l{row}", f"m{row}"] for row in range(count)],
        "long_b": [f"n{row}" for row in range(count)],
    }
    pairs = CaptionPairDataset(sources, seed=1, pair_sources=("short*", "long*"), hard_negatives=True).to_dataset()
    kinds = collections.Counter((row["anchor"][0], row["positive"][0]) for row in pairs)
    assert set(kinds) == {("s", x) for x in "lmn"} | {(x, "s") for x in "lmn"}
    # 4000 draws over 6 equal outcomes: 667 each, chi-square with 5 degrees of freedom below its 99.9 % quantile.
    assert sum((n - count / 6) ** 2 / (count / 6) for n in kinds.values()) < 20.5
    of_kind = {"s": "s", "l": "lm", "m": "lm", "n": "n"}
    for row in pairs:
        assert row["anchor"][1:] == row["positive"][1:] == str(row["label"]) != row["negative"][1:]
        assert row["negative"][0] in of_kind[row["positive"][0]]


def test_pair_sources_draw_distinct_texts_and_refuse_rows_without_any():
    pairs = CaptionPairDataset({"short": [["x", "y"]], "long": ["x"]}, pair_sources=("short", "long"))
    for epoch in range(20):
        pairs.set_epoch(epoch)
        assert {pairs[0]["anchor"], pairs[0]["positive"]} == {"x", "y"}
    rest = {"raw": ["q", "r"]}
    for wrong in ({"short": ["a", "x"], "long": ["b", "x"]}, {"short": ["a", "x"], "long": ["b", []]}):
        with pytest.raises(ValueError, match="Row 1 has no two distinct captions in the two `pair_sources`"):
            CaptionPairDataset(wrong | rest, pair_sources=("short", "long"))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("short", "dense*"), "the pattern 'dense\\*' fits none of the sources"),
        (("*", "long"), "fit \\['long'\\]"),
        (("short",), "must be two name patterns"),
        ("sl", "must be two name patterns"),
    ],
)
def test_wrong_pair_sources_are_refused(patterns, message):
    with pytest.raises(ValueError, match=message):
        CaptionPairDataset({"short": ["a"], "long": ["b"]}, pair_sources=patterns)


def test_instruction_is_kept_and_does_not_touch_the_texts():
    pairs = CaptionPairDataset([["a", "b"]], instruction="Given a caption, retrieve a similar relevant caption.")
    assert pairs.instruction == "Given a caption, retrieve a similar relevant caption."
    assert CaptionPairDataset([["a", "b"]]).instruction is None
    assert pairs[0] == CaptionPairDataset([["a", "b"]])[0]


def test_workers_draw_what_one_process_draws_and_see_the_epoch():
    captions = [[f"{row}-{number}" for number in range(5)] for row in range(30)]
    pairs = CaptionPairDataset(captions, seed=6, hard_negatives=True)
    loader = torch.utils.data.DataLoader(
        pairs, batch_size=7, num_workers=2, persistent_workers=True, collate_fn=lambda rows: rows
    )
    for epoch in (0, 3):
        pairs.set_epoch(epoch)
        assert [row for batch in loader for row in batch] == [pairs[row] for row in range(30)]


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


def test_selected_images_are_the_table_of_their_captions() -> None:
    columns = {"real": ["a", "b", "c"], "dense": [["d", "e"], [], ["f"]]}
    table = CaptionTable(columns)
    expected = CaptionTable({"real": ["c", "a"], "dense": [["f"], ["d", "e"]]})
    selected = table.select([2, 0])
    assert [selected[0], selected[1]] == [["c", "f"], ["a", "d", "e"]]
    assert selected.sha256 == expected.sha256
    assert table.select(range(1, 3))[1] == ["c", "f"]
    with pytest.raises(IndexError, match="Image 3 is out of range for 3 images"):
        table.select([3])


@pytest.mark.parametrize("as_arrow", [False, True])
def test_texts_that_differ_in_any_one_byte_are_told_apart(as_arrow):
    base = "a rather long text, of which some bytes are looked at first and the others if they agree"
    texts = [base, *(base[:place] + "#" + base[place + 1 :] for place in range(len(base))), base, "x", "x", "xx", "é"]
    rows = [[text] for text in texts]
    table = load_captions(Dataset.from_dict({"captions": rows})) if as_arrow else CaptionTable(rows)
    assert table.num_shared_captions == 4
    several = CaptionTable([texts, [base, base, texts[3], "é"]])
    assert several.distinct_counts.tolist() == [len(texts) - 2, 3]


def test_digest_of_a_part_is_that_of_a_table_of_the_part():
    table = CaptionTable(CAPTIONS)
    for start in range(4):
        for stop in range(start + 1, 5):
            part = CaptionTable({name: column[start:stop] for name, column in CAPTIONS.items()})
            assert table.digest(start, stop) == part.digest()
    # The formula, which stores record: numbers of captions, sizes and bytes, in flat order, whatever the sources.
    encoded = [text.encode() for text in FLAT]
    parts = [
        np.array([2, 3, 2, 1], "<i8").tobytes(),
        np.array([len(t) for t in encoded], "<i8").tobytes(),
        b"".join(encoded),
    ]
    expected = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    assert table.digest() == CaptionTable([table[image] for image in range(4)]).digest() == expected
    assert CaptionTable([["ab", "c"]]).digest() != CaptionTable([["a", "bc"]]).digest()
    assert CaptionTable([["a"], ["b"]]).digest() != CaptionTable([["a", "b"]]).digest()
