# SPDX-License-Identifier: Apache-2.0
"""The same rows from every source; rows without an image, images without a row, and what is said about them."""

import json

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from llm2clip_hf.data import CenterCropTransform, load_image_text


COUNT = 4
TRANSFORM = CenterCropTransform(6)
ROWS = [
    {"file_name": f"images/{number}.png", "caption": f"real {number}", "dense": [f"dense {number} {k}" for k in "ab"]}
    for number in range(COUNT)
]
CHOSEN = {"real": "caption", "dense": "dense"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number}.png")
    write_jsonl(tmp_path / "metadata.jsonl", ROWS)
    return tmp_path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_dataset(folder, with_bytes: bool = True) -> Dataset:
    images = []
    for row in ROWS:
        path = str(folder / row["file_name"])
        with open(path, "rb") as file:
            images.append({"bytes": file.read(), "path": None} if with_bytes else {"bytes": None, "path": path})
    features = Features(
        image=ImageFeature(), caption=Value("string"), dense=List(Value("string")), file_name=Value("string")
    )
    columns = {name: [row[name] for row in ROWS] for name in ("caption", "dense", "file_name")}
    return Dataset.from_dict({"image": images, **columns}, features=features)


def sources(folder):
    dataset = as_dataset(folder)
    elsewhere = folder.parent / f"{folder.name}-elsewhere"
    elsewhere.mkdir()
    yield folder, {}
    yield str(folder / "metadata.jsonl"), {}
    yield write_jsonl(elsewhere / "table.jsonl", ROWS), {"image_root": folder}
    renamed = [{"img": row["file_name"], **{name: row[name] for name in ("caption", "dense")}} for row in ROWS]
    yield write_jsonl(elsewhere / "renamed.jsonl", renamed), {"image_root": folder, "image_column": "img"}
    yield dataset, {"key_column": "file_name"}
    yield as_dataset(folder, with_bytes=False), {"key_column": "file_name"}
    yield DatasetDict({"train": dataset.select([0]), "test": dataset}), {"split": "test", "key_column": "file_name"}
    dataset.to_parquet(elsewhere / "parquet/0.parquet")
    yield elsewhere / "parquet/0.parquet", {"key_column": "file_name"}
    yield str(elsewhere / "parquet"), {"key_column": "file_name"}
    yield str(elsewhere / "parquet/*.parquet"), {"key_column": "file_name"}
    dataset.save_to_disk(elsewhere / "saved")
    yield elsewhere / "saved", {"key_column": "file_name"}
    dataset.remove_columns("image").to_parquet(elsewhere / "paths/0.parquet")
    yield elsewhere / "paths/0.parquet", {"image_root": folder}


def test_every_source_gives_the_same_images_captions_and_keys(folder):
    oracle = [np.asarray(Image.open(folder / row["file_name"])) for row in ROWS]
    tables = [load_image_text(source, caption_columns=CHOSEN, **options) for source, options in sources(folder)]
    assert len(tables) == 12
    for table in tables:
        assert table.captions.source_names == ("real", "dense")
        assert table.captions.sha256 == tables[0].captions.sha256
        assert [table.captions[row] for row in range(COUNT)] == [[r["caption"], *r["dense"]] for r in ROWS]
        assert table.keys == [row["file_name"] for row in ROWS]
        assert table.report.rows_kept == len(table) == len(table.images) == COUNT
        assert table.report.num_bad == 0
        dataset = table.dataset(transform=lambda image, generator: np.array(image), seed=1)
        for row in range(COUNT):
            sample = dataset[row]
            assert np.array_equal(sample["pixel_values"], oracle[row])
            assert sample["text"] in table.captions[row]


def test_a_csv_and_an_image_folder_with_csv(folder):
    (folder / "metadata.jsonl").unlink()
    lines = ["file_name,caption", *(f'{row["file_name"]},"{row["caption"]}, NA"' for row in ROWS)]
    (folder / "metadata.csv").write_text("\n".join(lines))
    for source in (folder, folder / "metadata.csv"):
        table = load_image_text(source)
        assert [table.captions[row] for row in range(COUNT)] == [[f"real {row}, NA"] for row in range(COUNT)]


def test_rows_of_the_same_path_become_one_image(folder):
    rows = [{"file_name": f"images/{n}.png", "caption": f"c{k}"} for k, n in enumerate([2, 0, 2, 1, 3, 0, 2])]
    table = load_image_text(write_jsonl(folder / "metadata.jsonl", rows))
    assert table.keys == [f"images/{n}.png" for n in (2, 0, 1, 3)]
    assert [table.captions[row] for row in range(4)] == [["c0", "c2", "c6"], ["c1", "c5"], ["c3"], ["c4"]]


def test_images_are_not_decoded_while_loading(folder):
    (folder / "images/1.png").write_bytes(b"no image")
    table = load_image_text(folder)
    assert len(table) == COUNT
    with pytest.raises(ValueError, match=r"Image 1 \(`.*1.png`\) cannot be read"):
        table.dataset(transform=TRANSFORM)[1]


@pytest.mark.parametrize(
    ("change", "message", "left"),
    [
        (lambda folder, rows: (folder / "images/2.png").unlink(), r"line 3: the image `.*2\.png` does not exist", 3),
        (lambda folder, rows: rows.pop(1), r"1\.png`: the image has no row in `metadata.jsonl`", 3),
        (lambda folder, rows: rows[0].update(caption=None, dense=[]), "line 1: a text in column `caption` is null", 3),
        (lambda folder, rows: rows[0].update(caption=[], dense=[]), "line 1: the image has no caption", 3),
        (lambda folder, rows: rows[3].update(caption="  "), "line 4: a text in column `caption` is empty", 4),
        (lambda folder, rows: rows[3].update(file_name=None), "line 4: a text in column `file_name` is null", 3),
    ],
)
def test_rows_and_images_that_do_not_match_are_refused_or_counted(folder, change, message, left):
    rows = [dict(row) for row in ROWS]
    change(folder, rows)
    write_jsonl(folder / "metadata.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_image_text(folder, caption_columns=CHOSEN)
    table = load_image_text(folder, caption_columns=CHOSEN, on_bad_row="skip")
    assert len(table) == len(table.images) == len(table.keys) == left == table.report.rows_kept
    assert table.report.num_bad >= 1
    for row, key in enumerate(table.keys):
        number = key.split("/")[1].removesuffix(".png")
        assert all(caption.split()[1] == number for caption in table.captions[row])
        assert np.array_equal(
            table.dataset(transform=lambda image, generator: np.array(image))[row]["pixel_values"],
            np.asarray(Image.open(folder / key)),
        )


def test_rows_without_an_image_are_refused_or_counted(folder):
    dataset = as_dataset(folder)
    values = dataset.cast_column("image", ImageFeature(decode=False))["image"][:]
    for missing in (None, {"bytes": None, "path": None}, {"bytes": None, "path": str(folder / "absent.png")}):
        images = [values[0], missing, values[2], values[3]]
        broken = dataset.remove_columns("image").add_column("image", images, feature=ImageFeature())
        with pytest.raises(ValueError, match="Row 1: there is no image in column `image`"):
            load_image_text(broken)
        table = load_image_text(broken, on_bad_row="skip", key_column="file_name")
        assert table.keys == [ROWS[row]["file_name"] for row in (0, 2, 3)]
        assert len(table.dataset(transform=TRANSFORM)) == 3
        assert [table.images[row]["bytes"] for row in range(3)] == [values[row]["bytes"] for row in (0, 2, 3)]


def test_sources_that_cannot_be_understood_are_refused(folder, tmp_path):
    dataset = as_dataset(folder)
    two = dataset.add_column(
        "other", dataset.cast_column("image", ImageFeature(decode=False))["image"][:], feature=ImageFeature()
    )
    cases = [
        (folder / "images", {}, "has none of .*metadata.jsonl"),
        (folder / "absent.jsonl", {}, "no folder|no file"),
        (folder / "metadata.jsonl", {"image_column": "path"}, "has no column `path`; it has"),
        (folder / "metadata.jsonl", {"caption_columns": "absent"}, "no column `absent`"),
        (folder / "metadata.jsonl", {"image_root": folder / "absent"}, "`image_root` .* is no folder"),
        (folder / "metadata.jsonl", {"key_column": "absent"}, "no column `absent`"),
        (dataset.remove_columns("image"), {}, r"has 0 image columns"),
        (two, {}, r"has 2 image columns \['image', 'other'\]"),
        (DatasetDict({"test": dataset, "validation": dataset}), {}, "There is no split 'train'"),
        (dataset, {"split": "test"}, "`split` .test. .* is one table"),
        (folder / "metadata.jsonl", {"split": "test"}, "no split 'test' in .* is one table; it has .'train'."),
        (folder / "metadata.jsonl", {"subset": "a"}, "`subset` .a. is for Hub data sets"),
        (3, {}, "`source` is a int"),
        (dataset.map(lambda row: {"key": "same"}), {"key_column": "key"}, "Row 1: the key 'same' occurs before"),
    ]
    for source, options, message in cases:
        with pytest.raises(ValueError, match=message):
            load_image_text(source, **options)
    assert load_image_text(two, image_column="other").captions[0] == ["real 0"]


def test_weights_come_from_a_column_of_any_form_and_bad_ones_are_refused_or_skipped(folder):
    weights = [0.5, 2.0, 1.0, 3.5]
    rows = [row | {"score": weight} for row, weight in zip(ROWS, weights)]
    write_jsonl(folder / "metadata.jsonl", rows)
    plain = as_dataset(folder)
    header = "file_name,caption,score\n"
    lines = [f"{row['file_name']},{row['caption']},{row['score']}\n" for row in [*rows, rows[0] | {"score": 9}]]
    (folder / "table.csv").write_text(header + "".join(lines))  # a second row of the first image
    for source in (folder, plain.add_column("score", weights), folder / "table.csv"):
        table = load_image_text(source, caption_columns="caption", weight_column="score")
        np.testing.assert_array_equal(table.weights, weights)
        assert [sample["weight"] for sample in table.dataset(transform=TRANSFORM)] == weights
    assert load_image_text(folder).weights is None
    with pytest.raises(ValueError, match="has no column `quality`; it has .*`score`"):
        load_image_text(folder, weight_column="quality")
    for wrong in (0, -1, None, "heavy", float("inf"), [1]):
        write_jsonl(folder / "metadata.jsonl", [*rows[:2], rows[2] | {"score": wrong}, rows[3]])
        with pytest.raises(ValueError, match="(row 2|line 3).*weight in column `score` is .*expected a positive"):
            load_image_text(folder, weight_column="score")
        table = load_image_text(folder, weight_column="score", on_bad_row="skip")
        assert (table.weights.tolist(), table.report.bad_rows) == ([0.5, 2.0, 3.5], 1)
        assert table.captions[2] == ["real 3"]
