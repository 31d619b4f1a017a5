# SPDX-License-Identifier: Apache-2.0
"""Text pairs, triplets and dropout pairs: which rows are read, what is drawn of them, what is refused."""

import collections
import json
import pickle

import datasets
import pytest

from llm2clip_hf.data import DropoutPairDataset, TextPairDataset


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
