# SPDX-License-Identifier: Apache-2.0
"""Pairs of texts, and of captions from a stream: what is drawn, what is refused, and what `datasets` makes of them."""

import collections
import json
import logging
import pickle

import datasets
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node

from llm2clip_hf.data import (
    CaptionPairDataset,
    CaptionTable,
    DropoutPairDataset,
    TextPairDataset,
    stream_caption_pairs,
)


INSTRUCTION = "Given a question, retrieve passages that answer it"
TRIPLETS = [
    {"query": "capital of France?", "positive": "Paris.", "negative": "Rome."},
    {"query": "a hot drink", "positive": ["tea", "coffee"], "negative": ["ice", "bread", "snow"]},
    {"query": "capital of France?", "positive": "It is Paris.", "negative": ["Lyon."]},
]


def renamed(names: dict[str, str]) -> list[dict]:
    return [{names[key]: value for key, value in row.items()} for row in TRIPLETS]


@pytest.mark.parametrize(
    "names",
    [
        {"query": "query", "positive": "positive", "negative": "negative"},
        {"query": "anchor", "positive": "positive", "negative": "negative"},
        {"query": "query", "positive": "pos", "negative": "neg"},
        {"query": "sentence1", "positive": "sentence2", "negative": "hard_negatives"},
    ],
)
def test_triplets_are_read_under_the_usual_names(tmp_path, names):
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in renamed(names)))
    pairs = TextPairDataset(path, instruction=INSTRUCTION)
    assert pairs.instruction == INSTRUCTION
    assert pairs[0] == {"anchor": "capital of France?", "positive": "Paris.", "negative": "Rome.", "label": 0}
    # Rows 0 and 2 ask the same, so they are never each other's negatives.
    assert [pairs[row]["label"] for row in range(3)] == [0, 1, 0]
    assert pairs.to_dataset().column_names == ["anchor", "positive", "negative", "label"]
    assert list(pairs.to_dataset()) == [pairs[row] for row in range(3)] == pairs.__getitems__(range(3))
    assert (pairs.report.rows_read, pairs.report.rows_kept, pairs.report.texts_kept) == (3, 3, 12)


def test_columns_and_datasets_give_the_same_rows_as_lines():
    columns = {name: [row[name] for row in TRIPLETS] for name in TRIPLETS[0]}
    expected = list(TextPairDataset(TRIPLETS, seed=3).to_dataset())
    assert list(TextPairDataset(columns, seed=3).to_dataset()) == expected
    as_lists = {name: [[x] if isinstance(x, str) else x for x in column] for name, column in columns.items()}
    as_lists["query"] = columns["query"]
    assert list(TextPairDataset(datasets.Dataset.from_dict(as_lists), seed=3).to_dataset()) == expected
    pairs = TextPairDataset(as_lists, columns={"anchor": "query", "positive": "negative"})
    assert pairs.column_names == ("anchor", "positive", "label")
    assert set(pairs[1]) == {"anchor", "positive", "label"}


def test_one_of_several_texts_is_drawn_uniformly_from_seed_epoch_and_row():
    rows = [{"query": f"q{row}", "positive": ["a", "b"], "negative": ["x", "y", "z"]} for row in range(1200)]
    pairs = TextPairDataset(rows, seed=5)
    drawn = list(pairs.to_dataset())
    counts = collections.Counter((row["positive"], row["negative"]) for row in drawn)
    assert len(counts) == 6
    # Chi-square over 6 outcomes of 200 each: 5 degrees of freedom, 20.5 is the 99.9 % quantile.
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 20.5
    assert list(TextPairDataset(rows[:9], seed=5).to_dataset()) == drawn[:9]
    assert list(pickle.loads(pickle.dumps(pairs)).to_dataset()) == drawn
    pairs.set_epoch(1)
    assert 100 < sum(a == b for a, b in zip(drawn, pairs.to_dataset())) < 300
    assert list(TextPairDataset(rows, seed=6).to_dataset()) != drawn


BAD_ROWS = [
    ({"query": None, "positive": "p", "negative": "n"}, "the anchor is null", (1, 1)),
    ({"query": "q", "positive": " ", "negative": "n"}, "the positive is empty", (1, 1)),
    ({"query": "q", "positive": "q", "negative": "n"}, "the positive equals the anchor", (1, 1)),
    ({"query": "q", "positive": ["p", "r"], "negative": ["r", "n"]}, "the negative equals the anchor or a", (1, 0)),
    ({"query": "q", "positive": ["p", None], "negative": ["n", "m"]}, "the positive is null", (1, 0)),
    ({"query": "q", "positive": "p", "negative": []}, "the row has no usable negative", (0, 1)),
    ({"query": "q", "positive": "p"}, "the negative is null", (1, 1)),
    ({"query": 3, "positive": "p", "negative": "n"}, "the anchor is not a string", (1, 1)),
]


@pytest.mark.parametrize(("bad", "message", "counts"), BAD_ROWS)
def test_bad_row_is_named_or_left_out(tmp_path, caplog, bad, message, counts):
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [TRIPLETS[0], bad, TRIPLETS[1]]))
    with pytest.raises(ValueError) as error:
        TextPairDataset(path)
    assert f"`{path}`, line 2: {message}" in str(error.value)
    pairs = TextPairDataset(path, on_bad_row="skip")
    assert (pairs.report.bad_texts, pairs.report.too_few_texts) == counts
    assert len(pairs) == 3 - counts[1]
    assert pairs[len(pairs) - 1]["anchor"] == "a hot drink"
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    if not counts[1]:
        seen = set()
        for epoch in range(12):
            pairs.set_epoch(epoch)
            seen |= {pairs[1]["positive"], pairs[1]["negative"]}
        assert seen == {text for key in ("positive", "negative") for text in bad[key] if text}


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"query": "q", "document": "d"}], None, "it has `query` \\(string\\), `document` \\(string\\)"),
        ([{"query": "q", "anchor": "a", "positive": "p"}], None, "several columns for one role: \\['anchor', 'query'"),
        ([{"query": "q", "positive": "p"}], {"anchor": "query"}, "names the roles \\['anchor'\\]"),
        ([{"query": "q", "positive": "p"}], {"anchor": "q", "positive": "positive"}, "has no column `q`"),
        ([{"query": ["q"], "positive": "p"}], None, "The anchor column `query` of The table holds lists"),
        ([{"query": "q", "positive": "q"}], None, "the positive equals the anchor"),
    ],
)
def test_wrong_columns_are_refused(rows, columns, message):
    with pytest.raises(ValueError, match=message):
        TextPairDataset(rows, columns=columns)


def test_no_usable_row_is_an_error_even_when_skipping():
    with pytest.raises(ValueError, match="No usable row among 1 rows.*the positive equals the anchor"):
        TextPairDataset([{"query": "q", "positive": "q"}], on_bad_row="skip")


WIKITEXT = [
    "",
    " = Valkyria Chronicles III = ",
    "",
    " Senj\u014d no Valkyria 3 is a tactical role playing game . \n",
    " = = Gameplay = = ",
    " Short line . ",
    " It was released in January 2011 in Japan . ",
    " Senj\u014d no Valkyria 3 is a tactical role playing game . ",
]
SENTENCES = [WIKITEXT[-1].strip(), "It was released in January 2011 in Japan ."]


@pytest.mark.parametrize("form", ["text", "lines", "dataset"])
def test_dropout_pairs_are_the_sentences_of_running_text(tmp_path, form):
    path = tmp_path / "wiki.txt"
    path.write_text("".join(line.rstrip("\n") + "\n" for line in WIKITEXT), encoding="utf-8")
    source = {"text": path, "lines": WIKITEXT, "dataset": datasets.Dataset.from_dict({"text": WIKITEXT})}[form]
    pairs = DropoutPairDataset(source, instruction="Retrieve semantically similar text")
    expected = [(SENTENCES[0], 0), (SENTENCES[1], 1), (SENTENCES[0], 0)]
    assert list(pairs.to_dataset()) == [{"anchor": t, "positive": t, "label": label} for t, label in expected]
    assert (pairs.report.rows_read, pairs.report.rows_kept, pairs.report.not_sentences) == (8, 3, 5)
    assert len(DropoutPairDataset(source, min_characters=5)) == 4
    assert pairs.instruction == "Retrieve semantically similar text"
    pairs.set_epoch(1)
    assert pairs[0]["anchor"] == SENTENCES[0]


def test_dropout_pairs_refuse_bad_lines(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_bytes(SENTENCES[0].encode() + b"\n\xff" + SENTENCES[1].encode() + b"\n" + SENTENCES[1].encode())
    with pytest.raises(ValueError, match="line 2: the row is not UTF-8 \\(byte 0xff at position 0\\)"):
        DropoutPairDataset(path)
    pairs = DropoutPairDataset(path, on_bad_row="skip")
    assert (len(pairs), pairs.report.bad_rows) == (2, 1)
    with pytest.raises(ValueError, match="Row 1: the line is null"):
        DropoutPairDataset(datasets.Dataset.from_dict({"text": [SENTENCES[0], None]}))
    with pytest.raises(ValueError, match="No usable row among 2 rows \\(2 blank, short or heading lines\\)"):
        DropoutPairDataset(["= Title =", "short"])
    with pytest.raises(ValueError, match="has no column `line`; it has `text`"):
        DropoutPairDataset(path, column="line")


def test_column_of_negatives_that_begins_late_is_used():
    rows = [{"query": f"q {row}", "positive": f"p {row}"} for row in range(200)]
    pairs = TextPairDataset([*rows, rows[0] | {"negative": "n"}], on_bad_row="skip")
    assert (len(pairs), pairs[0]["negative"], pairs.report.too_few_texts) == (1, "n", 200)


def test_anchor_that_is_a_list_is_a_bad_row():
    rows = [{"query": "q", "positive": "p"}, {"query": ["x", "y"], "positive": "p"}]
    with pytest.raises(ValueError, match="Row 1: the anchor is not a string"):
        TextPairDataset(rows)
    assert len(TextPairDataset(rows, on_bad_row="skip")) == 1


rng = np.random.default_rng(7)
ROWS = [
    {
        "key": row,
        "url": f"https://host/{row}",
        "raw_caption": f"raw {row}",
        "long_captions": [f"long {row} {number}" for number in range(rng.integers(1, 4))],
        "width": 3,
    }
    for row in range(150)
]
SOURCES = {name: [row[name] for row in ROWS] for name in ("raw_caption", "long_captions")}


def stream_of(rows: list[dict] = ROWS, num_shards: int = 1) -> datasets.IterableDataset:
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards)


def by_label(rows) -> dict[int, dict]:
    found = {}
    for row in rows:
        row = {"anchor": row["anchor"], "positive": row["positive"], "label": int(row["label"])}
        assert row["label"] not in found
        found[row["label"]] = row
    return found


@pytest.mark.parametrize("pair_sources", [None, ("raw*", "long*")])
@pytest.mark.parametrize("id_column", [None, "key"])
def test_stream_equals_the_map_style_dataset(id_column, pair_sources):
    pairs = CaptionPairDataset(CaptionTable(SOURCES), seed=4, pair_sources=pair_sources)
    stream = stream_caption_pairs(
        stream_of(), id_column=id_column, seed=4, pair_sources=pair_sources, instruction="Given a caption"
    )
    assert stream.instruction == "Given a caption"
    assert stream.column_names == ["anchor", "positive", "label"]
    assert isinstance(stream, datasets.IterableDataset)
    seen = []
    for epoch in (0, 1, 5):
        pairs.set_epoch(epoch)
        stream.set_epoch(epoch)
        assert list(stream) == [pairs[row] for row in range(150)]
        seen.append([row["anchor"] for row in stream])
    assert seen[0] != seen[1] != seen[2]
    assert (stream.report.rows_read, stream.report.rows_kept) == (900, 900)


@pytest.mark.parametrize("num_shards", [1, 6])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_stream_is_the_same_over_workers_ranks_and_order(num_shards, num_workers):
    pairs = CaptionPairDataset(SOURCES, seed=4)
    stream = stream_caption_pairs(stream_of(num_shards=num_shards), id_column="key", seed=4)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=num_workers, persistent_workers=True)
    for epoch in (0, 2):
        pairs.set_epoch(epoch)
        stream.set_epoch(epoch)
        expected = {row: pairs[row] for row in range(150)}
        assert by_label(loader) == expected
        ranks = [list(split_dataset_by_node(stream, rank, 3)) for rank in range(3)]
        assert by_label(row for rank in ranks for row in rank) == expected
        assert {len(rank) for rank in ranks} == {50}
        shuffled = list(stream.shuffle(seed=1, buffer_size=40))
        assert by_label(shuffled) == expected
        assert [row["label"] for row in shuffled] != list(range(150))
    # The counts of the workers arrive in this process. Ranks that share one shard read it all and keep a third.
    assert stream.report.rows_kept == 2 * 150 * (2 + (3 if num_shards == 1 else 1))


@pytest.mark.parametrize(
    "derive",
    [
        lambda stream: stream.shuffle(buffer_size=40),
        lambda stream: stream.shuffle(seed=3, buffer_size=40).take(150),
        lambda stream: stream.filter(lambda row: row["label"] >= 0).with_format("torch").shuffle(None, None, 40),
        lambda stream: stream.skip(0).repeat(1).map(lambda row: row),
        lambda stream: stream.shard(1, 0).select_columns(["anchor", "positive", "label"]),
    ],
)
def test_streams_made_by_methods_keep_instruction_and_draw_by_their_epoch(derive):
    def make():
        stream = stream_caption_pairs(stream_of(), id_column="key", seed=4, instruction="Find it.")
        return derive(stream)

    pairs, (stream, again) = CaptionPairDataset(SOURCES, seed=4), (make(), make())
    orders = []
    for epoch in (0, 1, 2):
        pairs.set_epoch(epoch)
        for each in (stream, again):
            each.set_epoch(epoch)
        rows = list(stream)
        assert by_label(rows) == {row: pairs[row] for row in range(150)}
        orders.append([int(row["label"]) for row in rows])
        assert [int(row["label"]) for row in again] == orders[-1]
    assert stream.instruction == "Find it."
    assert stream.report.rows_kept == 450
    if "shuffle" in derive.__code__.co_names:
        assert orders[0] != orders[1] != orders[2] != list(range(150))


def test_shuffled_stream_resumes_in_a_later_pass():
    def make():
        return stream_caption_pairs(stream_of(num_shards=3), id_column="key", seed=2).shuffle(buffer_size=20)

    stream = make()
    stream.set_epoch(3)
    whole, iterator = list(stream), iter(stream)
    head = [next(iterator) for _ in range(64)]
    fresh = make()
    fresh.set_epoch(3)
    assert head == whole[:64]
    assert list(fresh)[64:] == whole[64:]


def test_single_shard_without_id_is_the_same_over_ranks():
    stream = stream_caption_pairs(stream_of(), seed=4)
    pairs = CaptionPairDataset(SOURCES, seed=4)
    ranks = [row for rank in range(2) for row in split_dataset_by_node(stream, rank, 2)]
    assert by_label(ranks) == {row: pairs[row] for row in range(150)}
    with pytest.raises(ValueError, match="The stream has 6 shards.*`id_column`.*`id_from_content=True`"):
        stream_caption_pairs(stream_of(num_shards=6))


@pytest.mark.parametrize("options", [{"id_column": "url"}, {"id_from_content": True}])
def test_text_identifies_rows_wherever_they_are(options):
    one = by_label(stream_caption_pairs(stream_of(), **options))
    other = by_label(stream_caption_pairs(stream_of(ROWS[::-1], num_shards=5), **options))
    assert one == other
    assert len(one) == 150
    texts = [tuple(sorted((row["raw_caption"], *row["long_captions"]))) for row in ROWS]
    for label, row in one.items():
        assert 0 <= label < 2**63
        assert any({row["anchor"], row["positive"]} <= set(own) for own in texts)


def test_stream_resumes_where_it_stopped():
    stream = stream_caption_pairs(stream_of(num_shards=3), id_column="key", seed=2)
    whole = list(stream)
    iterator = iter(stream)
    head = [next(iterator) for _ in range(70)]
    state = stream.state_dict()
    fresh = stream_caption_pairs(stream_of(num_shards=3), id_column="key", seed=2)
    fresh.load_state_dict(state)
    assert head + list(fresh) == whole


BAD = [
    ({"raw_caption": None}, "a caption in column `raw_caption` is null", ("bad_texts", 1, 0)),
    ({"raw_caption": " ", "long_captions": ["x"]}, "a caption in column `raw_caption` is empty", ("bad_texts", 1, 1)),
    ({"long_captions": ["raw 1"]}, "the image has no two distinct captions", ("too_few_texts", 1, 1)),
    ({"key": -1}, "the id is neither", ("bad_rows", 1, 1)),
    ({"key": None}, "the id is neither", ("bad_rows", 1, 1)),
]


@pytest.mark.parametrize(("change", "message", "counts"), BAD)
def test_bad_row_stops_the_stream_or_is_counted(caplog, change, message, counts):
    rows = [ROWS[0], ROWS[1] | {"long_captions": ["x", "y"]} | change, *ROWS[2:9]]
    with pytest.raises(ValueError) as error:
        list(stream_caption_pairs(stream_of(rows), id_column="key"))
    assert f"Row 1 of the stream (`key` {rows[1]['key']!r}): {message}" in str(error.value)
    stream = stream_caption_pairs(stream_of(rows), id_column="key", on_bad_row="skip")
    with caplog.at_level(logging.WARNING):
        drawn = by_label(stream)
        list(stream)
    name, count, dropped = counts
    assert set(drawn) == {row["key"] for row in rows} - ({rows[1]["key"]} if dropped else set())
    assert getattr(stream.report, name) == 2 * count
    assert stream.report.rows_kept == 2 * (9 - dropped)
    assert stream.report.rows_read == 18
    warnings = [record for record in caplog.records if "Bad rows are left out" in record.getMessage()]
    assert len(warnings) == 1
    assert message in warnings[0].getMessage()


def test_columns_are_found_without_declared_features():
    pairs = CaptionPairDataset({name: column[:4] for name, column in SOURCES.items()})
    stream = stream_of(ROWS[:4]).map(lambda row: row)
    assert stream.features is None
    assert list(stream_caption_pairs(stream)) == list(pairs.to_dataset())
    # A column that is null at first is read all the same, and its gaps are named.
    late = stream_of([ROWS[0] | {"long_captions": None}, *ROWS[1:4]]).map(lambda row: row)
    with pytest.raises(ValueError, match="Row 0 of the stream.* `long_captions` is null"):
        list(stream_caption_pairs(late))
    only = stream_caption_pairs(stream_of(ROWS[2:3]), columns="long_captions", id_column="key")
    assert all(row["anchor"].startswith("long 2") for row in only)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": "caption"}, "has no column `caption`; it has `key` \\(no text\\)"),
        ({"id_column": "id"}, "no id column `id`; the stream has \\['key'"),
        ({"id_column": "key", "id_from_content": True}, "exclude each other"),
        ({"on_bad_row": "drop"}, "`on_bad_row` must be"),
        ({"pair_sources": ("a", "b")}, "fits none of the sources"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stream_caption_pairs(stream_of(), **options)


def test_wrong_streams_are_refused():
    with pytest.raises(ValueError, match="must be a `datasets.IterableDataset`, got Dataset"):
        stream_caption_pairs(datasets.Dataset.from_list(ROWS))
    with pytest.raises(ValueError, match="The stream has no row"):
        stream_caption_pairs(stream_of().filter(lambda row: False).map(lambda row: row))
