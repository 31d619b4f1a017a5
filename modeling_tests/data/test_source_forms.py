# SPDX-License-Identifier: Apache-2.0
"""The forms that image-caption data come in give what the same rows in plain form give; tar as `tarfile` does."""

import gzip
import io
import json
import random
import subprocess
import sys
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from shard_files import image_bytes, write_tar

from llm2clip_hf.data import ImageTextStream, load_captions, load_image_text, load_shard_captions
from llm2clip_hf.data.shards import iterate_members, open_archive, read_member


COUNT = 5
CAPTIONS = [f"caption {number}, é" for number in range(COUNT)]
KEYS = [f"{number:05d}" for number in range(COUNT)]
IMAGES = [image_bytes(number) for number in range(COUNT)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def compress(path, content: bytes):
    if path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(content)
    else:
        path.write_bytes(gzip.compress(content))
    return path


def pixels(image, generator=None):
    return np.array(image)


ORACLE = load_image_text(
    Dataset.from_dict({"image": [{"bytes": image, "path": None} for image in IMAGES], "caption": CAPTIONS})
).dataset(transform=pixels)


def check_table(source, captions=CAPTIONS, **options):
    table = load_image_text(source, **options)
    assert [table.captions[row] for row in range(COUNT)] == [[text] for text in captions]
    data = table.dataset(transform=pixels)
    assert all(np.array_equal(data[row]["pixel_values"], ORACLE[row]["pixel_values"]) for row in range(COUNT))
    assert list(table.images.sizes()) == list(map(len, IMAGES))
    return table


def check_stream(shards, field, key_column=None, image_column=None):
    columns = {"image_column": image_column, "key_column": key_column}
    stream = ImageTextStream(shards, {"real": field}, transform=pixels, shuffle_buffer=0, **columns)
    samples = list(stream)
    assert [sample["text"] for sample in samples] == CAPTIONS
    assert all(np.array_equal(got["pixel_values"], ORACLE[row]["pixel_values"]) for row, got in enumerate(samples))
    table, keys = load_shard_captions(shards, {"real": field}, **columns)
    assert table.rows(0, COUNT) == CAPTIONS
    return keys


def test_parquet_of_img2dataset(tmp_path):
    """An image column that is not `image`, keys, and statistics beside each shard."""
    columns = {"key": KEYS, "url": ["u"] * COUNT, "caption": CAPTIONS, "jpg": IMAGES, "width": [9] * COUNT}
    for start, stop in ((0, 3), (3, COUNT)):
        pq.write_table(pa.table({k: v[start:stop] for k, v in columns.items()}), tmp_path / f"{start:05d}.parquet")
        (tmp_path / f"{start:05d}_stats.json").write_text(json.dumps({"count": stop - start, "caption": "none"}))
    for source in (tmp_path, tmp_path / "*.parquet", tmp_path / "0*"):
        assert check_table(str(source), key_column="key").keys == KEYS
        assert load_captions(str(source)).rows(0, COUNT) == CAPTIONS
    for pattern in ("*.parquet", "*"):
        assert check_stream(str(tmp_path / pattern), "caption", "key") == KEYS
    assert check_stream(str(tmp_path / "*.parquet"), "caption")[3] == "00003.parquet:0"
    streaming = datasets.load_dataset(
        "parquet", data_files=sorted(map(str, tmp_path.glob("*.parquet"))), split="train", streaming=True
    )
    assert check_stream(streaming, "caption", "key") == KEYS
    two = pa.table({"jpg": IMAGES, "mask": IMAGES, "caption": CAPTIONS})
    pq.write_table(two, tmp_path / "two.parquet")
    with pytest.raises(ValueError, match=r"has 2 columns of images \['jpg', 'mask'\]"):
        check_stream(str(tmp_path / "two.parquet"), "caption")
    check_stream(str(tmp_path / "two.parquet"), "caption", image_column="jpg")


def test_tar_members_with_dotted_names(tmp_path):
    """The key ends at the first dot of the file's name, as in webdataset; the table beside an archive is no shard."""
    members = []
    for number, key in enumerate(KEYS):
        members += [
            (f"part.1/{key}.image.png", IMAGES[number]),
            (f"part.1/{key}.caption.txt", CAPTIONS[number].encode()),
            (f"part.1/{key}.meta.json", json.dumps({"a": {"b": CAPTIONS[number]}, "a.c": CAPTIONS[number]}).encode()),
        ]
    tar = write_tar(tmp_path / "0.tar", members)
    pq.write_table(pa.table({"caption": CAPTIONS}), tmp_path / "0.parquet")
    (tmp_path / "0_stats.json").write_text("{}")
    for field in ("caption.txt", "meta.json.a.b", "meta.json.a.c"):
        assert check_stream(tar, field) == [f"part.1/{key}" for key in KEYS]
    check_stream(str(tmp_path / "*"), "caption.txt")
    members.insert(1, (f"part.1/{KEYS[0]}.mask.png", IMAGES[1]))
    masked = write_tar(tmp_path / "masked.tar", members)
    with pytest.raises(ValueError, match=r"2 images among its members \['image.png', 'mask.png'.*`image_column`"):
        check_stream(masked, "caption.txt")
    check_stream(masked, "caption.txt", image_column="image.png")


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "tar.zst"])
def test_compressed_archives(tmp_path, ending):
    members = [
        member
        for number, key in enumerate(KEYS)
        for member in ((f"{key}.png", IMAGES[number]), (f"{key}.txt", CAPTIONS[number].encode()))
    ]
    plain = write_tar(tmp_path / "0.tar", members).read_bytes()
    shard = compress(tmp_path / f"packed.{ending}", plain)
    assert check_stream(shard, "txt") == KEYS
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(ValueError, match="Shard `.*packed.* cannot be read"):
        check_stream(shard, "txt")


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_compressed_tables(tmp_path, kind, ending):
    rows = [{"file_name": f"{key}.png", "caption": text} for key, text in zip(KEYS, CAPTIONS)]
    for key, image in zip(KEYS, IMAGES):
        (tmp_path / f"{key}.png").write_bytes(image)
    lines = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "json": json.dumps(rows, indent=1),
        "csv": "file_name,caption\n" + "".join(f'{row["file_name"]},"{row["caption"]}"\n' for row in rows),
    }
    path = compress(tmp_path / f"rows.{kind}.{ending}", lines[kind].encode())
    assert load_captions(path).rows(0, COUNT) == CAPTIONS
    check_table(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        load_captions(path)


@pytest.mark.skipif(subprocess.run(["which", "zstd"], capture_output=True).returncode != 0, reason="no `zstd` command")
def test_zstandard_of_the_command_line_tool(tmp_path):
    for number in range(2):  # several frames, as parallel tools write
        (tmp_path / f"{number}.jsonl").write_text(f'{{"caption": "c{number}"}}\n')
        subprocess.run(["zstd", "-q", f"{tmp_path}/{number}.jsonl"], check=True)
    both = tmp_path / "both.jsonl.zst"
    both.write_bytes((tmp_path / "0.jsonl.zst").read_bytes() + (tmp_path / "1.jsonl.zst").read_bytes())
    assert load_captions(both).rows(0, 2) == ["c0", "c1"]


CONVERSATION = [
    [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": text}] for text in CAPTIONS
]
MESSAGES = [
    [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": text}]},
    ]
    for text in CAPTIONS
]


@pytest.mark.parametrize("turns", [CONVERSATION, MESSAGES])
def test_conversations_as_llava_and_sharegpt4v_write_them(tmp_path, turns):
    column = "conversations" if turns is CONVERSATION else "messages"
    rows = [{"id": key, "image": f"{key}.png", column: talk} for key, talk in zip(KEYS, turns)]
    for key, image in zip(KEYS, IMAGES):
        (tmp_path / f"{key}.png").write_bytes(image)
    (tmp_path / "all.json").write_text(json.dumps(rows))
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "all.parquet")
    for name in ("all.json", "all.jsonl", "all.parquet"):
        assert load_captions(tmp_path / name).rows(0, COUNT) == CAPTIONS, name
        check_table(tmp_path / name)
    assert load_captions(Dataset.from_list(rows)).rows(0, COUNT) == CAPTIONS
    members = [
        member
        for key, image, row in zip(KEYS, IMAGES, rows)
        for member in ((f"{key}.png", image), (f"{key}.json", json.dumps(row).encode()))
    ]
    check_stream(write_tar(tmp_path / "0.tar", members), f"json.{column}")
    with_images = [{"jpg": image, "said": row[column]} for image, row in zip(IMAGES, rows)]
    pq.write_table(pa.Table.from_pylist(with_images), tmp_path / "shard.parquet")
    check_stream(tmp_path / "shard.parquet", "said")


def test_captions_inside_mappings(tmp_path):
    rows = [{"jpg": image, "json": {"a": {"b": text, "n": 1}}} for image, text in zip(IMAGES, CAPTIONS)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
    (tmp_path / "0.jsonl").write_text("".join(json.dumps({"json": row["json"]}) + "\n" for row in rows))
    check_table(tmp_path / "0.parquet", caption_columns="json.a.b")
    check_stream(tmp_path / "0.parquet", "json.a.b")
    for source in (tmp_path / "0.parquet", tmp_path / "0.jsonl", Dataset.from_list(rows)):
        assert load_captions(source, columns={"real": "json.a.b"}).rows(0, COUNT) == CAPTIONS
        with pytest.raises(ValueError, match=r"no column that is known .*`json.a.b` \(string\)"):
            load_captions(source)
    streaming = datasets.load_dataset("parquet", data_files=str(tmp_path / "0.parquet"), split="train", streaming=True)
    check_stream(streaming, "json.a.b")


def test_images_by_path_in_a_parquet_file(tmp_path, monkeypatch):
    """`{"bytes": None, "path": ...}`, relative to the file, to `image_root`, or absolute."""
    (tmp_path / "pictures").mkdir()
    for key, image in zip(KEYS, IMAGES):
        (tmp_path / f"pictures/{key}.png").write_bytes(image)
    monkeypatch.chdir(tmp_path.parent)
    for name, prefix, options in (
        ("near", "pictures/", {}),
        ("rooted", "", {"image_root": tmp_path / "pictures"}),
        ("absolute", f"{tmp_path}/pictures/", {}),
    ):
        rows = [
            {"image": {"bytes": None, "path": f"{prefix}{key}.png"}, "caption": t} for key, t in zip(KEYS, CAPTIONS)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        rows[0]["image"]["bytes"] = IMAGES[0]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}-mixed.parquet")
        for file in (f"{name}.parquet", f"{name}-mixed.parquet"):
            check_table(tmp_path / file, **options)
            if not options:
                check_stream(tmp_path / file, "caption")


@pytest.mark.parametrize("kind", ["string_view", "dictionary", "large_string", "list of views"])
def test_arrow_types_of_texts(tmp_path, kind):
    texts = pa.array(CAPTIONS)
    column = {
        "string_view": lambda: texts.cast(pa.string_view()),
        "dictionary": lambda: texts.dictionary_encode(),
        "large_string": lambda: texts.cast(pa.large_string()),
        "list of views": lambda: pa.array([[text] for text in CAPTIONS], pa.list_(pa.string_view())),
    }[kind]()
    images = pa.array(IMAGES, pa.binary_view() if kind == "string_view" else pa.large_binary())
    table = pa.table({"jpg": images, "caption": column, "key": pa.array(KEYS).dictionary_encode()})
    pq.write_table(table, tmp_path / "0.parquet")
    assert load_captions(tmp_path / "0.parquet").rows(0, COUNT) == CAPTIONS
    assert check_table(tmp_path / "0.parquet", key_column="key").keys == KEYS
    assert check_stream(tmp_path / "0.parquet", "caption", "key") == KEYS
    assert load_captions(Dataset(table)).rows(0, COUNT) == CAPTIONS
    assert check_table(Dataset(table), key_column="key").keys == KEYS


def test_a_saved_dataset_dict(tmp_path):
    rows = {"image": [{"bytes": image, "path": None} for image in IMAGES], "caption": CAPTIONS}
    DatasetDict({"train": Dataset.from_dict(rows), "test": Dataset.from_dict(rows).select([0])}).save_to_disk(tmp_path)
    check_table(tmp_path)
    check_table(tmp_path / "train")


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write(path, kind: str) -> None:
    source = random.Random(0)
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for number in range(40):
            folder = ["", "some/folder/", "x" * 90 + "/" + "y" * 40 + "/"][number % 3]
            member = tarfile.TarInfo(f"{folder}{number:05d}.jpg")
            member.size = source.choice([0, 1, 511, 512, 513, 5000])
            if kind == "pax":
                member.mtime = number + 0.5
            tar.addfile(member, io.BytesIO(source.randbytes(member.size)))
            if number % 7 == 0:
                special = tarfile.TarInfo(f"special{number}")
                special.type = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE][number % 3]
                special.linkname = "00000.jpg"
                tar.addfile(special)
        member = tarfile.TarInfo("caf\u00e9/\u732b.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"cat"))


@pytest.mark.parametrize("kind", FORMATS)
def test_members_are_those_of_tarfile(tmp_path, kind):
    path = tmp_path / "a.tar"
    write(path, kind)
    with tarfile.open(path) as tar:
        expected = [(member.name, tar.extractfile(member).read()) for member in tar if member.isreg()]
    assert len(expected) == 41
    with open_archive(path) as file:
        assert [(member.name, read_member(file, member)) for member in iterate_members(file)] == expected


@pytest.mark.parametrize("kind", FORMATS)
def test_no_cut_passes_silently(tmp_path, kind):
    path = tmp_path / "a.tar"
    write(path, kind)
    content = path.read_bytes()
    with open_archive(path) as file:
        end = max(member.offset + -(-member.size // 512) * 512 for member in iterate_members(file))
    for length in [0, 1, 511, *range(512, end, 1021), end - 1, end, end + 511]:
        path.write_bytes(content[:length])
        with open_archive(path) as file, pytest.raises(tarfile.TarError):
            list(iterate_members(file))
    path.write_bytes(content[: end + 512])
    with open_archive(path) as file:
        assert len(list(iterate_members(file))) == 41


def test_a_changed_header_is_refused_with_its_place(tmp_path):
    path = tmp_path / "a.tar"
    write(path, "ustar")
    content = bytearray(path.read_bytes())
    with open_archive(path) as file:
        header = [member.offset for member in iterate_members(file)][5] - 512
    content[header + 3] ^= 1
    path.write_bytes(content)
    with open_archive(path) as file, pytest.raises(tarfile.TarError, match=f"no valid header at byte {header}"):
        list(iterate_members(file))


def test_without_datasets_the_package_imports_and_says_what_to_install():
    code = """
import sys
sys.modules["datasets"] = sys.modules["pyarrow"] = None
import llm2clip_hf.data as data
try:
    from llm2clip_hf.data import load_captions
except ImportError as error:
    print(error)
print(data.CaptionTable(["a cat"])[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "`load_captions` needs `datasets`. Install it with `pip install llm2clip-hf[train]`.\n['a cat']\n"
    )
