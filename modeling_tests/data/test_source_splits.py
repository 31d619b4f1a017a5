# SPDX-License-Identifier: Apache-2.0
"""Which split of a source is read: the oracle is what `datasets.load_dataset` says of the same files."""

import io
import json
import logging

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from shard_files import image_bytes, write_tar
from stub_hub import stub_hub

from llm2clip_hf.data import find_overlap, load_captions, load_image_text
from llm2clip_hf.data.image_sources import open_image_table


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def table(numbers) -> Dataset:
    images = [{"bytes": image_bytes(number), "path": None} for number in numbers]
    features = Features(image=ImageFeature(), caption=Value("string"))
    return Dataset.from_dict({"image": images, "caption": [f"c{number}" for number in numbers]}, features=features)


def texts(loaded) -> list[str]:
    captions = getattr(loaded, "captions", loaded)
    return captions.rows(0, captions.num_captions)


LAYOUTS = {
    "file names": ["train.parquet", "validation.parquet", "test.parquet"],
    "words in names": [
        "my-train_0.parquet",
        "my.training.1.parquet",
        "dev_a.parquet",
        "eval.parquet",
        "other.parquet",
    ],
    "shards": ["data/train-00000-of-00001.parquet", "data/unseen-00000-of-00001.parquet"],
    "folders": ["train/0.parquet", "train/1.parquet", "val/0.parquet", "testing/deep/0.parquet", "extra/0.parquet"],
    "no splits": ["a.parquet", "contest.parquet", "trainer/b.parquet", ".hidden/test.parquet"],
    "configs": ["a.parquet", "b.parquet", "test.parquet"],
}
CARD = """---
configs:
- config_name: small
  default: true
  data_files:
  - {split: train, path: a.parquet}
  - {split: unseen, path: b.parquet}
- config_name: other
  data_files: test.parquet
---
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_has_the_splits_of_datasets(tmp_path, layout, caplog):
    for number, name in enumerate(LAYOUTS[layout]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        table([2 * number, 2 * number + 1]).to_parquet(tmp_path / name)
    (tmp_path / LAYOUTS[layout][0].replace(".parquet", "_stats.json")).write_text("{}")  # as img2dataset does
    if layout == "configs":
        (tmp_path / "README.md").write_text(CARD)
    oracle = datasets.load_dataset(str(tmp_path))
    for split, rows in oracle.items():
        expected = sorted(rows["caption"])
        images = load_image_text(tmp_path, split=split)
        assert sorted(texts(images)) == expected
        assert sorted(texts(load_captions(tmp_path, split=split))) == expected
        assert sorted(open_image_table(tmp_path, split=split).column("caption")) == expected
        for row in range(len(images)):
            assert images.images[row]["bytes"] == image_bytes(int(images.captions[row][0][1:]))
    for load, default in ((load_image_text, "train"), (load_captions, "train"), (open_image_table, "test")):
        chosen = default if default in oracle else next(iter(oracle))
        if len(oracle) == 1 or default in oracle:
            assert len(load(tmp_path)) == len(oracle[chosen])
        else:
            with pytest.raises(ValueError, match=f"no split 'test' .*; it has .*{list(oracle)[-1]}"):
                load(tmp_path)
        with pytest.raises(ValueError, match="There is no split 'absent'"):
            load(tmp_path, split="absent")
    if layout == "configs":
        assert len(load_image_text(tmp_path, subset="other")) == len(load_captions(tmp_path, subset="other")) == 2
        with pytest.raises(ValueError, match=r"`configs` of the folder .* cannot be used: .*'small', 'other'"):
            load_captions(tmp_path, subset="absent")
    left_out = {"words in names": "other.parquet", "folders": "extra/0.parquet"}.get(layout)
    assert (f"{left_out}`" in caplog.text) == (left_out is not None)


def test_an_image_folder_has_the_splits_of_datasets(tmp_path, caplog):
    number = 0
    for split in ("train", "test"):
        for part in ("a", "b"):
            folder = tmp_path / split / part
            folder.mkdir(parents=True)
            rows = []
            for _ in range(2):
                (folder / f"{number}.png").write_bytes(image_bytes(number))
                rows.append({"file_name": f"{number}.png", "caption": f"c{number}"})
                number += 1
            (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    oracle = datasets.load_dataset(str(tmp_path))

    expected = {
        split: sorted(zip(rows["caption"], map(np.asarray, rows["image"])), key=lambda row: row[0])
        for split, rows in oracle.items()
    }

    def check():
        for split, rows in expected.items():
            ours = load_image_text(tmp_path, split=split)
            assert texts(ours) == open_image_table(tmp_path, split=split).column("caption") == [row[0] for row in rows]
            data = ours.dataset(transform=lambda image, generator: np.asarray(image))
            assert all(np.array_equal(data[row]["pixel_values"], rows[row][1]) for row in range(4))
        assert texts(load_image_text(tmp_path)) == ["c0", "c1", "c2", "c3"]

    check()
    for file in tmp_path.rglob("*.png"):
        (elsewhere := tmp_path.parent / "elsewhere").mkdir(exist_ok=True)
        (elsewhere / file.name).write_bytes(file.read_bytes())
    assert texts(load_image_text(tmp_path, image_root=elsewhere, split="test")) == ["c4", "c5", "c6", "c7"]
    # One table for all splits, in which a row belongs to the split of its image.
    rows = [
        {"file_name": str(file.relative_to(tmp_path)), "caption": f"c{file.stem}"}
        for file in sorted(tmp_path.rglob("*.png"))
    ]
    for file in tmp_path.rglob("metadata.jsonl"):
        file.unlink()
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check()
    assert load_image_text(tmp_path).keys == [row["file_name"] for row in rows if row["file_name"].startswith("train")]
    (tmp_path / "test/a/new.png").write_bytes(image_bytes(99))
    assert len(load_image_text(tmp_path)) == 4
    with pytest.raises(ValueError, match=r"new\.png`: the image has no row in `metadata.jsonl`"):
        load_image_text(tmp_path, split="test")


def test_tables_of_paths_beside_the_images(tmp_path, caplog):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / f"images/{number}.png").write_bytes(image_bytes(number))
    for split, numbers in (("train", (0, 1)), ("test", (2,))):
        rows = [{"image": f"images/{number}.png", "caption": f"c{number}"} for number in numbers]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts(load_image_text(tmp_path)) == ["c0", "c1"]
    assert texts(load_image_text(tmp_path, split="test")) == open_image_table(tmp_path).column("caption") == ["c2"]
    assert not caplog.records


def test_class_folders_in_splits(tmp_path):
    for number, name in enumerate(["train/cat", "train/dog", "test/dog", "test/cat", "test/cat"]):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / f"{number}.png").write_bytes(image_bytes(number))
    oracle = datasets.load_dataset(str(tmp_path))
    for split, rows in oracle.items():
        ours = open_image_table(tmp_path, split=split)
        names = rows.features["label"].names
        assert ours.class_names("label") == names == ["cat", "dog"]
        assert ours.column("label") == rows["label"][:]
    assert len(open_image_table(tmp_path)) == 3


def test_a_saved_dataset_dict_has_its_splits(tmp_path):
    both = DatasetDict({"train": table([0, 1]), "test": table([2])})
    both.save_to_disk(tmp_path / "saved")
    for source in (both, tmp_path / "saved"):
        for options, expected in [
            ({}, ["c0", "c1"]),
            ({"split": "test"}, ["c2"]),
            ({"default_split": "test"}, ["c2"]),
        ]:
            assert texts(load_image_text(source, **options)) == expected
            assert texts(load_captions(source, **options)) == expected
    assert texts(load_image_text(tmp_path / "saved/test")) == ["c2"]
    with pytest.raises(ValueError, match=r"no split 'dev' .*it has \['train', 'test'\]"):
        load_image_text(tmp_path / "saved", split="dev")


def test_real_data_with_splits(shared_dir):
    folder = shared_dir / "data/african_storybook"
    sizes = {"train": 2271, "validation": 164, "test": 216}
    for split, size in sizes.items():
        assert len(load_captions(folder, split=split)) == size
        assert len(load_image_text(folder, split=split)) == size
    assert len(load_image_text(folder)) == 2271 and len(load_image_text(folder, default_split="test")) == 216


def test_a_split_that_names_do_not_tell_is_warned_of(tmp_path, caplog):
    for name in ("train.jsonl", "more.jsonl", "metadata.jsonl"):
        (tmp_path / name).write_text('{"caption": "a"}\n')
    with caplog.at_level(logging.WARNING):
        assert len(load_captions(tmp_path)) == 1
    assert "1 files of the folder" in caplog.text and "more.jsonl`" in caplog.text


def test_what_train_and_test_share_is_found(tmp_path, caplog, monkeypatch):
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(number if number < 5 else 0))
    rows = [{"file_name": f"{number}.png", "caption": f"c{number}"} for number in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = [{"file_name": "5.png", "caption": "new"}, {"file_name": "4.png", "caption": "c4"}]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    paths, again = load_image_text(tmp_path / "rows.jsonl"), load_image_text(tmp_path / "other.jsonl")
    inside = load_image_text(table([0, 1, 2, 3, 4]))
    monkeypatch.chdir(tmp_path)
    named = Dataset.from_dict(
        {"image": [{"bytes": None, "path": f"{number}.png"} for number in range(5)], "caption": list("abcde")},
    )
    for train in (paths, inside):
        found = find_overlap(train, again)
        assert (found.captions, found.num_captions, found.images, found.num_images) == (1, 2, 2, 2)
        assert found.examples == ["c4"]
        assert not find_overlap(train, load_image_text(table([7, 8])))
        assert find_overlap(load_image_text(table([7, 8, 0])), train).images == 1
    assert find_overlap(load_image_text(named), again).images == 2
    find_overlap(paths, again).warn()
    assert "1 of 2 captions and 2 of 2 images of the test data are in the training data too" in caplog.text
    assert find_overlap(paths.captions, [["c1", "x"], ["c1"]]).captions == 2


HUB = """
import json
import datasets
import numpy as np
from llm2clip_hf.data import ImageTextStream, load_captions, load_image_text
from llm2clip_hf.data.image_sources import open_image_table

def pixels(image, generator=None):
    return np.array(image)

def told(load, *source, **options):
    try:
        table = load(*source, **options)
    except ValueError as error:
        return str(error)
    captions = getattr(table, "captions", table)
    found = [captions[row] for row in range(len(captions))]
    if hasattr(table, "dataset"):
        data = table.dataset(transform=pixels)
        found = [[*texts, int(data[row]["pixel_values"].sum())] for row, texts in enumerate(found)]
    return found

named = {}
for name in ("org/pictures", "org/folder", "org/plain"):
    named[name] = [told(load_image_text, name), told(load_image_text, name, default_split="test")]
named["chosen"] = told(load_image_text, "org/pictures", split="test")
named["sliced"] = told(load_image_text, "org/pictures", split="train[:1]")
named["absent split"] = told(load_image_text, "org/several")
named["captions"] = told(load_captions, "org/pictures")
named["no subset"] = told(load_captions, "org/captions")
named["subset"] = told(load_captions, "org/captions", subset="b")
named["nowhere"] = told(load_image_text, "org/nowhere")
named["table"] = open_image_table("org/pictures").column("caption")
named["tar"] = told(load_image_text, "org/tar", caption_columns="json.a.b")
stream = datasets.load_dataset("org/plain", split="train", streaming=True)
stream = ImageTextStream(stream, {"real": "caption"}, transform=pixels, shuffle_buffer=0)
named["stream"] = [[sample["text"], int(sample["pixel_values"].sum())] for sample in stream]
print(json.dumps(named))
"""


def test_hub_data_sets_are_read_by_the_code_of_datasets(tmp_path):
    """From a server on the loopback interface: with and without the types of `datasets`, image folders, captions."""
    train, test = [0, 1, 2], [3]

    def parquet(numbers, plain=False) -> bytes:
        if plain:  # as img2dataset writes
            rows = [{"key": str(n), "jpg": image_bytes(n), "caption": f"c{n}"} for n in numbers]
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        else:
            table(numbers).to_parquet(tmp_path / "a.parquet")
        return (tmp_path / "a.parquet").read_bytes()

    def metadata(numbers) -> bytes:
        return "".join(["file_name,caption\n", *(f"{n}.png,c{n}\n" for n in numbers)]).encode()

    members = [
        member
        for n in train
        for member in ((f"{n}.png", image_bytes(n)), (f"{n}.json", json.dumps({"a": {"b": f"c{n}"}}).encode()))
    ]
    card = "---\nconfigs:\n- {config_name: a, data_files: a.jsonl}\n- {config_name: b, data_files: b.jsonl}\n---\n"
    repositories = {
        "pictures": {f"data/{s}-00000-of-00001.parquet": parquet(n) for s, n in (("train", train), ("test", test))},
        "plain": {"train/0.parquet": parquet(train, plain=True), "test/0.parquet": parquet(test, plain=True)},
        "folder": {f"train/{n}.png": image_bytes(n) for n in train}
        | {"test/3.png": image_bytes(3), "train/metadata.csv": metadata(train), "test/metadata.csv": metadata(test)},
        "several": {"seen/dev.parquet": parquet(test), "seen/test.parquet": parquet(test)},
        "captions": {"README.md": card.encode()} | {f"{n}.jsonl": b'{"caption": "%s"}\n' % n.encode() for n in "ab"},
        "tar": {"train-0.tar": write_tar(tmp_path / "0.tar", members).read_bytes()},
    }
    with stub_hub() as hub:
        for name, files in repositories.items():
            hub.add(f"datasets/org/{name}", files)
        named = json.loads(hub.run(HUB, tmp_path).stdout.splitlines()[-1])
    sums = {n: int(np.asarray(Image.open(io.BytesIO(image_bytes(n)))).sum()) for n in train + test}
    expected = [[[f"c{n}", sums[n]] for n in numbers] for numbers in (train, test)]
    for name in ("org/pictures", "org/plain", "org/folder"):
        assert [sorted(rows) for rows in named[name]] == expected, name
    assert named["chosen"] == expected[1] and named["sliced"] == expected[0][:1] and named["table"] == ["c3"]
    assert named["tar"] == expected[0] and named["stream"] == expected[0]
    assert named["captions"] == [["c0"], ["c1"], ["c2"]] and named["subset"] == [["b"]]
    assert "no split 'train' in the data set `org/several`; it has ['validation', 'test']" in named["absent split"]
    assert "['a', 'b']" in named["no subset"] and "`subset`" in named["no subset"]
    assert "`org/nowhere` cannot be loaded from the Hub" in named["nowhere"]
