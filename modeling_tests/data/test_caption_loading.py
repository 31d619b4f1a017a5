# SPDX-License-Identifier: Apache-2.0
"""Captions from files, folders and data sets: every form gives the same table, every bad row is named or counted."""

import csv
import gzip
import json
import logging
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2clip_hf.data import CaptionTable, load_captions
from llm2clip_hf.data.columns import TextColumn, resolve_caption_columns


# Texts that a careless reader would take for missing values, quote wrongly or cut.
ROWS = [
    {"id": 7, "raw_caption": "NA", "longSV_captions": 'a "big", grey cat\nasleep'},
    {"id": 8, "raw_caption": "null", "longSV_captions": "zwei H\u00fcnde;\t\u732b"},
    {"id": 9, "raw_caption": "1.50", "longSV_captions": "\u201cquoted\u201d \U0001f408"},
    {"id": 10, "raw_caption": "NA", "longSV_captions": "None"},
]
EXPECTED = CaptionTable({name: [row[name] for row in ROWS] for name in ("raw_caption", "longSV_captions")})


def write_csv(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_jsonl(path: Path, rows: list = ROWS) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make_source(form: str, folder: Path) -> object:
    table, dataset = pa.Table.from_pylist(ROWS), datasets.Dataset.from_list(ROWS)
    path = folder / f"captions.{form}"
    if form in ("csv", "tsv"):
        write_csv(path, "\t" if form == "tsv" else ",")
    elif form == "jsonl":
        write_jsonl(path)
    elif form == "jsonl.gz":
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in ROWS))
    elif form == "json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif form == "lines.json":  # as `Dataset.to_json` writes
        dataset.to_json(path)
    elif form == "parquet":
        pq.write_table(table, path, row_group_size=3)
    elif form == "folder":
        pq.write_table(table.slice(0, 3), folder / "part-0.parquet")
        pq.write_table(table.slice(3), folder / "part-1.parquet")
        (folder / "README.txt").write_text("about the data")
        return str(folder)
    elif form == "pattern":
        write_jsonl(folder / "part-0.jsonl", ROWS[:1])
        write_jsonl(folder / "part-1.jsonl", ROWS[1:])
        return str(folder / "part-*.jsonl")
    else:
        return {
            "rows": ROWS,
            "mapping": {name: [row[name] for row in ROWS] for name in ROWS[0]},
            "dataset": dataset,
            "dict": datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}),
            "large strings": dataset.cast_column("raw_caption", datasets.Value("large_string")),
            "shuffled back": dataset.select([3, 1, 0, 2]).select([2, 1, 3, 0]),
            "transformed": dataset.with_transform(lambda batch: {"raw_caption": ["wrong"] * len(batch["id"])}),
        }[form]
    return path


FORMS = ["jsonl", "jsonl.gz", "json", "lines.json", "csv", "tsv", "parquet", "folder", "pattern", "rows", "mapping"]
FORMS += ["dataset", "dict", "large strings", "shuffled back", "transformed"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_table(tmp_path, form):
    table = load_captions(make_source(form, tmp_path), min_captions=2)
    assert table.sha256 == EXPECTED.sha256
    assert [table[row] for row in range(4)] == [EXPECTED[row] for row in range(4)]
    report = table.report
    assert (report.rows_read, report.rows_kept, report.texts_kept, report.num_bad) == (4, 4, 8, 0)
    assert report.shared_texts == 2  # "NA", twice


def test_saved_datasets_and_splits_are_read(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "disk")
    assert load_captions(tmp_path / "disk").sha256 == EXPECTED.sha256
    both = datasets.DatasetDict({"train": dataset.select([0]), "validation": dataset})
    both.save_to_disk(tmp_path / "both")
    assert load_captions(tmp_path / "both", split="validation").sha256 == EXPECTED.sha256
    with pytest.raises(ValueError, match=r"no split 'test' in `.*both`; it has \['train', 'validation'\]"):
        load_captions(tmp_path / "both", split="test")


def test_folder_with_splits_never_mixes_them(tmp_path):
    write_jsonl(tmp_path / "train-0.jsonl")
    write_jsonl(tmp_path / "test-0.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "val.jsonl", ROWS[1:2])
    assert load_captions(tmp_path).sha256 == EXPECTED.sha256
    assert load_captions(tmp_path, split="validation")[0][0] == "null"
    assert len(load_captions(tmp_path, split="test")) == 1
    (tmp_path / "train-0.jsonl").unlink()
    with pytest.raises(ValueError, match=r"no split 'train' in the folder .* has \['validation', 'test'\]"):
        load_captions(tmp_path)


def test_real_captions_agree_over_forms_and_with_the_recorded_counts(shared_dir, tmp_path):
    file = shared_dir / "data" / "coco_captions_val2017" / "captions_val2017.parquet"
    table = load_captions(file)
    assert (len(table), table.num_captions, table.source_names) == (5000, 25014, ("captions",))
    rows = pq.read_table(file, columns=["image_id", "captions"]).to_pylist()
    flat = {}
    for row in rows:
        for text in set(row["captions"]):
            flat.setdefault(text, set()).add(row["image_id"])
    assert table.report.shared_texts == sum(len(flat[t]) > 1 for row in rows for t in row["captions"]) > 50
    # COCO's own form: one annotation per caption.
    notes = [{"image_id": row["image_id"], "caption": text} for row in rows for text in row["captions"]]
    (tmp_path / "coco.json").write_text(json.dumps({"images": [], "annotations": notes}))
    for options in ({}, {"image_column": "image_id"}):  # which is what groups them if nothing is named
        long = load_captions(tmp_path / "coco.json", columns={"captions": "caption"}, min_captions=2, **options)
        assert long.sha256 == table.sha256


def test_rows_of_one_image_are_merged_in_the_order_of_first_appearance():
    rows = [("x", "a", ["p"]), ("y", "b", []), ("x", "c", ["q", "r"]), ("z", "d", []), ("y", "e", ["s"])]
    source = [{"image": i, "raw_caption": a, "long_captions": b} for i, a, b in rows]
    table = load_captions(source, image_column="image")
    merged = {"raw_caption": [["a", "c"], ["b", "e"], ["d"]], "long_captions": [["p", "q", "r"], ["s"], []]}
    expected = CaptionTable(merged)
    assert table.sha256 == expected.sha256
    assert load_captions(datasets.Dataset.from_list(source), image_column="image").sha256 == expected.sha256
    with pytest.raises(ValueError, match="no image column `key`; the table has `image`"):
        load_captions(source, image_column="key")
    with pytest.raises(ValueError, match="Row 1: the image id in column `image` is None"):
        load_captions([source[0], source[1] | {"image": None}], image_column="image")
    with pytest.raises(ValueError, match="Row 3: the image has fewer than 2 distinct captions"):
        load_captions(source, image_column="image", min_captions=2)


KINDS = {"id": "other", "url": "string", "num_captions": "other"}


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"raw_caption": "string", "shortIB_captions": "string", "longSV_captions": "list"}, 3),
        ({"captions": "list", "text": "string"}, 1),
        ({"caption": "string", "Dense_Caption": "string"}, 2),
        ({"short": "string", "long": "string"}, 2),
        ({"text": "string", "sentences": "list"}, 1),
    ],
)
def test_caption_columns_are_found_by_name(more, found):
    assert resolve_caption_columns(None, KINDS | more, "t") == {name: name for name in list(more)[:found]}


def test_columns_are_named_and_sources_renamed():
    table = load_captions(ROWS, columns={"dense": "longSV_captions"})
    assert table.source_names == ("dense",)
    assert table[3] == ["None"]
    assert load_captions(ROWS, columns="raw_caption").source_names == ("raw_caption",)
    order = ["longSV_captions", "raw_caption"]
    assert load_captions(ROWS, columns=order).source_names == tuple(order)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, "it has `id` \\(no text\\), `url` \\(string\\). Name the caption columns with `columns`"),
        ("caption", "has no column `caption`; it has `id` \\(no text\\), `url` \\(string\\)"),
        (["id"], "Column `id` of .*c.jsonl` holds neither strings nor lists of strings"),
        ([], "`columns` is empty"),
    ],
)
def test_wrong_columns_are_refused_with_the_ones_that_exist(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        load_captions(write_jsonl(tmp_path / "c.jsonl", [{"id": 1, "url": "u"}]), columns=columns)


@pytest.mark.parametrize("early", [{}, {"long_caption": None}])
@pytest.mark.parametrize("form", ["jsonl", "json", "rows", "pattern"])
def test_column_that_begins_late_is_used_and_its_gaps_are_bad_rows(tmp_path, form, early):
    rows = [{"caption": f"a {row}"} | early for row in range(9000)]
    rows += [{"caption": f"a {row}", "long_caption": [f"b {row}"]} for row in range(9000, 9005)]
    if form == "rows":
        source = rows
    elif form == "json":
        source = tmp_path / "c.json"
        source.write_text(json.dumps(rows))
    elif form == "jsonl":
        source = write_jsonl(tmp_path / "c.jsonl", rows)
    else:
        write_jsonl(tmp_path / "0.jsonl", rows[:9000])
        write_jsonl(tmp_path / "1.jsonl", rows[9000:])
        source = tmp_path / "*.jsonl"
        if not early:  # which a file has to have
            with pytest.raises(ValueError, match=r"0.jsonl` has no column \['long_caption'\]"):
                load_captions(source)
            return
    with pytest.raises(ValueError, match="a caption in column `long_caption` is null"):
        load_captions(source)
    table = load_captions(source, on_bad_row="skip")
    assert (len(table), table.source_names, table.report.bad_texts) == (9005, ("caption", "long_caption"), 9000)
    assert table[9004] == ["a 9004", "b 9004"]
    assert load_captions(source, columns="long_caption", on_bad_row="skip")[0] == ["b 9000"]


def test_rows_of_another_type_are_named(tmp_path):
    rows = [{"caption": value} for value in (7, None, "a", ["b", 3], {"en": "c"})]
    table = load_captions(write_jsonl(tmp_path / "c.jsonl", rows), on_bad_row="skip")
    assert [table[row] for row in range(len(table))] == [["a"], ["b"]]
    told = [example.split("c.jsonl`, ")[1].split(": ")[0] for example in table.report.examples]
    assert [line.split(":")[0] for line in told] == ["line 1", "line 2", "line 4", "line 5", "line 1"]


NEGATIVES = ["negative_caption", "hard_negative_captions", "neg_caption", "captions_neg_caption", "Negative_Captions"]
NEGATIVES += ["neg1_caption", "hardNegative_caption", "foil_caption", "false_caption", "hn_caption"]


@pytest.mark.parametrize("column", NEGATIVES)
def test_negatives_are_captions_only_if_named(column, caplog):
    rows = [{"caption": "a cat", column: "a dog"}]
    table = load_captions(rows)
    assert (table.source_names, table[0]) == (("caption",), ["a cat"])
    assert column in caplog.text
    assert load_captions(rows, columns=["caption", column])[0] == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="no column that is known to hold captions"):
        load_captions([{column: "a dog"}])
    assert load_captions([{"negation_caption": "b", "shard_caption": "c"}]).num_captions == 2


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz"])
def test_delimiter_is_that_of_the_header(tmp_path, delimiter, mark, ending):
    rows = [["id", "raw_caption", "long_caption"], ["1", "a; b, c | d", 'tab\t"and"\nline'], ["2", "x", "y;z"]]
    text = mark + "".join(
        delimiter.join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row) + "\r\n" for row in rows
    )
    raw = text.encode()
    (tmp_path / f"c.{ending}").write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    table = load_captions(tmp_path / f"c.{ending}")
    assert table.source_names == ("raw_caption", "long_caption")
    assert [table[0], table[1]] == [rows[1][1:], rows[2][1:]]


def test_header_with_several_or_quoted_delimiters(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("id;caption|note\n1;a|b\n")
    with pytest.raises(ValueError, match=r"no ',' in its first line but \[';', '\|'\]"):
        load_captions(path)
    path.write_text('"caption"\n"one; column, of | text"\n')
    assert load_captions(path)[0] == ["one; column, of | text"]
    path.write_text('"a; caption"\n"x; y"\n')
    assert load_captions(path, columns="a; caption")[0] == ["x; y"]
    path.write_text("id,caption;en\n1,x;y\n")
    assert load_captions(path, columns="caption;en")[0] == ["x;y"]
    path.write_bytes("id;l\xe9gende_caption\n1;a\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"c.csv`, line 1: is not UTF-8 \(byte 0xe9 at position 4\); save the file"):
        load_captions(path)


# By file name: the content, of whose three rows the second is unreadable, and where and how.
BAD_FILES = {
    "bytes.jsonl": (b'{"captions":["a"]}\n{"captions":["\xff"]}\n{"captions":["b"]}', "line 2: the row is not UTF-8"),
    "json.jsonl": (b'{"captions":["a"]}\n\n{"captions":\n{"captions":["b"]}\n', "line 3: the row is not JSON"),
    "list.jsonl": (b'{"captions":["a"]}\n["x"]\n{"captions":["b"]}\n', "line 2: the row is a JSON list"),
    "bytes.csv": (b"id,caption\n1,a\n2,\xe9t\xe9\n3,b\n", "line 3: the row is not UTF-8 (byte 0xe9"),
    "fields.csv": (b'id,caption\n1,a\n2,x,"y\nz"\n3,b\n', "line 3: the row has 3 fields, the header has 2"),
    "fields.tsv": (b"\xef\xbb\xbfid\tcaption\n1\ta\n2\n3\tb\n", "line 3: the row has 1 fields, the header has 2"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unreadable_row_is_named_or_skipped_and_counted(tmp_path, caplog, name):
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_captions(path)
    assert f"`{path}`, {message}" in str(error.value)
    with caplog.at_level(logging.WARNING):
        table = load_captions(path, on_bad_row="skip")
    assert [table[row] for row in range(len(table))] == [["a"], ["b"]]
    assert (table.report.rows_read, table.report.bad_rows, table.report.num_bad) == (3, 1, 1)
    assert len(caplog.records) == 1
    assert "1 unreadable rows" in caplog.text
    assert message in caplog.text


BAD_ROWS = [
    ({"raw_caption": None, "long_captions": ["p", "q"]}, "column `raw_caption` is null"),
    ({"raw_caption": "x", "long_captions": ["p", " \t"]}, "column `long_captions` is empty"),
    ({"raw_caption": "", "long_captions": ["p"]}, "column `raw_caption` is empty"),
    ({"raw_caption": "\x1c", "long_captions": ["p", "q"]}, "column `raw_caption` is empty"),
    ({"raw_caption": "\u3000", "long_captions": ["p", "q"]}, "column `raw_caption` is empty"),
    ({"raw_caption": "x", "long_captions": None}, "column `long_captions` is null"),
    ({"raw_caption": "x", "long_captions": ["p", None]}, "column `long_captions` is null"),
]


@pytest.mark.parametrize("form", ["rows", "dataset", "parquet", "jsonl"])
@pytest.mark.parametrize("case", range(len(BAD_ROWS)))
def test_bad_caption_is_named_or_left_out(tmp_path, form, case):
    bad, message = BAD_ROWS[case]
    good = {"raw_caption": "a", "long_captions": ["b", "c"]}
    rows = [good, bad, good]
    schema = pa.schema({"raw_caption": pa.string(), "long_captions": pa.list_(pa.string())})
    source, place = {
        "rows": lambda: (rows, "Row 1:"),
        "dataset": lambda: (datasets.Dataset(pa.Table.from_pylist(rows, schema)), "Row 1:"),
        "parquet": lambda: (tmp_path / "c.parquet", f"`{tmp_path / 'c.parquet'}`, row 1:"),
        "jsonl": lambda: (write_jsonl(tmp_path / "c.jsonl", rows), f"`{tmp_path / 'c.jsonl'}`, line 2:"),
    }[form]()
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows, schema), source)
    with pytest.raises(ValueError) as error:
        load_captions(source)
    assert str(error.value).startswith(f"{place} a caption in {message}")
    table = load_captions(source, on_bad_row="skip")
    texts = [[bad["raw_caption"]], bad["long_captions"] or []]
    texts = [[text for text in entry if text and text.strip()] for entry in texts]
    expected = CaptionTable({"raw_caption": ["a", texts[0], "a"], "long_captions": [["b", "c"], texts[1], ["b", "c"]]})
    assert table.sha256 == expected.sha256
    assert (table.report.bad_texts, table.report.num_bad, table.report.rows_kept) == (1, 1, 3)
    # With two distinct captions asked for, the rows that have one left go as well.
    too_few = len(texts[0] + texts[1]) < 2
    assert load_captions(source, on_bad_row="skip", min_captions=2).report.too_few_texts == too_few


def test_bytes_that_are_not_utf8_in_arrow_columns_are_found(tmp_path):
    binary = pa.array([b"a", b"caf\xe9", b"b"])
    texts = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), texts)
    for column in (texts, lists):
        file = tmp_path / "c.parquet"
        pq.write_table(pa.table({"caption": column}), file)
        for source in (file, datasets.Dataset(pa.table({"caption": column}))):
            with pytest.raises(ValueError, match="ow 1: a caption in column `caption` is not UTF-8"):
                load_captions(source)
            table = load_captions(source, on_bad_row="skip")
            assert [table[row] for row in range(len(table))] == [["a"], ["b"]]
            assert (table.report.bad_texts, table.report.too_few_texts) == (1, 1)


def test_images_with_too_few_distinct_captions_are_named_or_left_out(tmp_path):
    rows = [["a", "b"], ["c", "c"], [], ["d", "e", "d"]]
    path = write_jsonl(tmp_path / "c.jsonl", [{"captions": row} for row in rows])
    with pytest.raises(ValueError, match="line 3: the image has fewer than 1 distinct captions"):
        load_captions(path)
    with pytest.raises(ValueError, match="line 3: the image has fewer than 2 distinct captions"):
        load_captions(path, min_captions=2)
    table = load_captions(path, on_bad_row="skip", min_captions=2)
    assert table.sha256 == CaptionTable({"captions": [rows[0], rows[3]]}).sha256
    assert (table.report.too_few_texts, table.report.rows_kept, table.report.texts_kept) == (2, 2, 5)
    assert table.report.examples[1] == f"`{path}`, line 2: the image has fewer than 2 distinct captions"
    with pytest.raises(ValueError, match="No image is left of 4 rows read"):
        load_captions(path, on_bad_row="skip", min_captions=3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "There is no file or folder"),
        ("/no/such/folder", "There is no file or folder"),
        ("part-*.jsonl", "No file matches the pattern"),
        (3, "`source` is a int"),
        ([], "no column"),
        ([{"captions": ["a"]}, 3], "Row 1: the row is a int, not a mapping"),
        ({"captions": ["a"], "raw_caption": []}, "same number of rows, got {'captions': 1, 'raw_caption': 0}"),
    ],
)
def test_wrong_source_is_refused(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        load_captions(source)
    assert message in str(error.value)


def test_wrong_files_are_refused(tmp_path):
    def error_of(source: Path) -> str:
        with pytest.raises(ValueError) as error:
            load_captions(source)
        return str(error.value)

    for name, content, message in [
        ("a.xyz", b"x", "none of the known endings"),
        ("b.json", b"{", "is not a JSON file"),
        ("c.json", b"3", "holds a JSON int"),
        ("d.csv", b"caption,caption\na,b\n", "one distinct name per column, got ['caption', 'caption']"),
        ("e.csv", b"", "one distinct name per column, got []"),
        ("f.parquet", b"PAR1", "is not a readable parquet file"),
        ("g.jsonl.gz", gzip.compress(b'{"caption": "a"}\n' * 9)[:-9], "cannot be read to its end"),
        ("h.csv", b'caption\n"' + b"a" * 200000 + b'"\n', "cannot be read as CSV from here on"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert message in error_of(tmp_path / name), name
    assert "mixes files of the kinds" in error_of(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "has no file that ends in one of" in error_of(tmp_path / "empty")
    with pytest.raises(ValueError, match="`on_bad_row` must be"):
        load_captions(ROWS, on_bad_row="drop")
    with pytest.raises(ValueError, match="`min_captions` must be positive"):
        load_captions(ROWS, min_captions=0)


def test_later_file_without_the_column_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"caption": "x"}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "y"}])
    with pytest.raises(ValueError, match=r"b.jsonl` has no column \['caption'\], .*; it has `text`"):
        load_captions(tmp_path)


def test_dataset_stays_memory_mapped(tmp_path):
    texts = [f"{row} " + "x" * 2000 for row in range(4000)]
    datasets.Dataset.from_dict({"caption": texts}).save_to_disk(tmp_path / "disk")
    dataset = datasets.load_from_disk(tmp_path / "disk")
    before = pa.total_allocated_bytes()
    table = load_captions(dataset)
    assert table[3999] == [texts[3999]]
    assert pa.total_allocated_bytes() - before < 1_000_000  # of 8 MB


def test_text_column_is_a_sequence():
    chunks = [pa.array(["a", "b"]), pa.array([], pa.string()), pa.array([["c", "d"], []]), pa.array(["e"])]
    column, plain = TextColumn(chunks), ["a", "b", ["c", "d"], [], "e"]
    assert list(column) == plain == [column[row] for row in range(5)]
    assert column.lengths().tolist() == [1, 1, 2, 0, 1]
    for cut in (slice(None), slice(1, 4), slice(0, 5, 2), slice(-2, None), slice(4, 2)):
        assert list(column[cut]) == plain[cut]
    with pytest.raises(IndexError):
        column[5]
