# SPDX-License-Identifier: Apache-2.0
"""Shards that many processes make, each alone: always the same files, whoever is killed, late, or has no disk left."""

import errno
import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import time
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import version_1
from process_groups import run_ranks

from llm2clip_hf.data import CaptionEmbeddingStore, CaptionTable, embed_captions
from llm2clip_hf.data.store import build
from llm2clip_hf.data.store.folder import StoreFolder


FINGERPRINT = {"weights_sha256": "abc"}
# 15 images of three captions each: with four per shard, four shards of which the last is shorter.
CAPTIONS = [[f"caption {number} of image {image}" + " x" * (image % 5) for number in range(3)] for image in range(15)]
FLAT = sum(CAPTIONS, [])
OPTIONS = {"fingerprint": FINGERPRINT, "rows_per_shard": 4, "max_tokens_per_batch": 30, "show_progress": False}


def encode(texts):
    digests = [hashlib.sha256(text.encode()).digest()[:7] for text in texts]
    return torch.tensor([list(digest) for digest in digests], dtype=torch.float32) / 16


def encode_until(captions, event):
    """An encoder that calls `event` once more than `captions` captions have come."""
    count = 0

    def encode_and_count(texts):
        nonlocal count
        count += len(texts)
        if count > captions:
            event()
        return encode(texts)

    return encode_and_count


def interrupt():
    raise KeyboardInterrupt


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def reference(tmp_path):
    embed_captions(encode, CAPTIONS, tmp_path / "reference", **OPTIONS)
    return contents(tmp_path / "reference")


def embed_one(folder, options=None):
    """What every process runs; the texts that it encoded, and whether its store is right."""
    seen = []
    store = embed_captions(
        lambda texts: seen.extend(texts) or encode(texts), CAPTIONS, folder, **OPTIONS, **options or {}
    )
    return seen, torch.equal(store.gather(range(45)), encode(FLAT).half())


def outcome(function, *arguments):
    """The result, or the type and text of the error."""
    try:
        return function(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)


def _child(queue, rank, size, function, arguments):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    try:
        queue.put((rank, function(*arguments)))
    except BaseException:
        queue.put((rank, traceback.format_exc()))


def run_without_group(size, function, *arguments, dies=()):
    """`function(*arguments)` in `size` processes that know `RANK` and `WORLD_SIZE` only; None for those that die."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_child, args=(queue, rank, size, function, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        results = dict(queue.get(timeout=60) for _ in range(size - len(dies)))
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    return [results.get(rank) for rank in range(size)]


LAUNCHES = {"group": run_ranks, "environment": run_without_group}


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("size", [2, 3, 7])
def test_processes_share_the_shards_and_write_the_same_files(tmp_path, reference, launch, size):
    folder = tmp_path / "store"
    for rank, (seen, is_right) in enumerate(LAUNCHES[launch](size, embed_one, folder)):
        assert sorted(seen) == sorted(text for row, text in enumerate(FLAT) if row // 12 % size == rank)
        assert is_right
    assert contents(folder) == reference


def test_another_number_of_processes_resumes(tmp_path, reference):
    folder = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        embed_captions(encode_until(25, interrupt), CAPTIONS, folder, **OPTIONS)
    seen = [texts for texts, is_right in run_ranks(3, embed_one, folder) if is_right]
    assert [len(texts) for texts in seen] == [9, 0, 12]
    assert contents(folder) == reference


def test_slices_are_embedded_in_any_order_and_place_and_merged(tmp_path, reference):
    one, two = tmp_path / "one", tmp_path / "two"
    seen = []
    note = lambda texts: seen.extend(texts) or encode(texts)  # noqa: E731
    assert embed_captions(note, CAPTIONS, two, **OPTIONS, shard_range=(2, 3)) is None
    assert seen and set(seen) == set(FLAT[24:36])
    assert embed_captions(encode, CAPTIONS, one, **OPTIONS, shard_range=(3, 4)) is None
    assert embed_captions(encode, CAPTIONS, two, **OPTIONS, shard_range=(0, 2)) is None
    store = CaptionEmbeddingStore.merge(one, [two])
    assert torch.equal(store.gather(range(45)), encode(FLAT).half())
    assert contents(one) == reference
    # The last of those who share a folder makes the store.
    assert embed_captions(encode, CAPTIONS, two, **OPTIONS, shard_range=(2, 4)).num_captions == 45
    assert contents(two) == reference
    for wrong in ((0, 5), (2, 2), (-1, 2)):
        with pytest.raises(
            ValueError, match=f"`shard_range` {wrong[0]}:{wrong[1]} must be a range within the 4 shards"
        ):
            embed_captions(encode, CAPTIONS, tmp_path / "three", **OPTIONS, shard_range=wrong)


def make_parts(folder, **changes):
    """The shards of two runs, of which the second may do some things differently; the folder of each."""
    embed_captions(encode, CAPTIONS, folder / "one", **OPTIONS, shard_range=(0, 2))
    options = {**OPTIONS, "shard_range": (2, 4), "captions": CAPTIONS, "encoder": encode, **changes}
    embed_captions(output_dir=folder / "two", **options)
    return folder / "one", folder / "two"


def flip(name, place):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (folder / name).write_bytes(content)

    return damage


def cut_index(folder):
    (folder / "index.json").write_text((folder / "index.json").read_text()[:300])


@pytest.mark.parametrize(
    ("changes", "damage", "message"),
    [
        ({"fingerprint": {"weights_sha256": "xyz"}}, None, "two ways: `fingerprint.weights_sha256`: store 'abc'"),
        ({"fingerprint": FINGERPRINT | {"template": "x"}}, None, "00002.safetensors` .* ways: `fingerprint.template`"),
        ({"dtype": "float32"}, None, "two ways: `dtype`: store 'float16', expected 'float32'"),
        ({"keys": [str(image) for image in range(15)]}, None, "two ways: `has_keys`"),
        ({"encoder": lambda texts: encode(texts)[:, :3]}, None, "two ways: `embedding_dim`: store 7, expected 3"),
        ({"shard_range": (3, 4)}, None, r"Rows 8 to 12 of 15 are missing in .*finished shards are kept"),
        ({"shard_range": (2, 3)}, None, r"Rows 12 to 15 of 15 are missing"),
        ({"rows_per_shard": 3}, None, "00001.safetensors` and `embeddings-00002.safetensors` .* overlap: .* row 6"),
        ({}, flip("embeddings-00001.safetensors", 20), "00001.safetensors` has (no readable|a) header.*store repair"),
        ({}, flip("embeddings-00001.safetensors", 200), "00001.safetensors` has a header that was changed"),
        ({}, lambda folder: (folder / "embeddings-00003.safetensors").write_bytes(b""), "00003.* no readable header"),
        ({}, flip("index.json", 30), "index.json` (is not valid JSON|has format|was changed)|merge"),
        ({}, flip("index.json", 300), "index.json` (is not valid JSON|was changed after).*`llm2clip store merge`"),
        ({}, cut_index, "not valid JSON.*store merge"),
    ],
)  # fmt: skip
def test_shards_that_are_no_store_are_told_in_one_line(tmp_path, changes, damage, message):
    one, two = make_parts(tmp_path, **changes)
    if damage is not None:
        CaptionEmbeddingStore.merge(one, [two])
        damage(one)
    with pytest.raises(ValueError, match=message) as error:
        CaptionEmbeddingStore.open(one) if "merge" in message else CaptionEmbeddingStore.merge(one, [two])
    assert len(str(error.value).splitlines()) == 1
    if "merge" in message:
        assert torch.equal(CaptionEmbeddingStore.merge(one).gather(range(45)), encode(FLAT).half())


@pytest.mark.parametrize("place", [20, 200, -1])
def test_a_damaged_shard_is_embedded_again_and_the_others_are_kept(tmp_path, reference, place):
    folder = tmp_path / "store"
    embed_captions(encode, CAPTIONS, folder, **OPTIONS)
    flip("embeddings-00001.safetensors", place)(folder)
    seen = []
    embed_captions(lambda texts: seen.extend(texts) or encode(texts), CAPTIONS, folder, **OPTIONS, repair=True)
    assert sorted(seen) == sorted(FLAT[12:24])
    assert contents(folder) == reference
    # Without an index, a shard counts by its digest; the store need not be named for repair.
    (folder / "index.json").unlink()
    flip("embeddings-00003.safetensors", place)(folder)
    embed_captions(encode, CAPTIONS, folder, **OPTIONS)
    assert contents(folder) == reference


def test_other_captions_are_refused_and_embedded_again_on_request(tmp_path):
    embed_captions(encode, CAPTIONS, tmp_path, **OPTIONS)
    changed = [*CAPTIONS[:9], ["another"], *CAPTIONS[10:]]
    with pytest.raises(ValueError, match="other captions in `embeddings-00002.safetensors`. Choose .*store repair"):
        embed_captions(encode, changed, tmp_path, **OPTIONS)
    seen = []
    note = lambda texts: seen.extend(texts) or encode(texts)  # noqa: E731
    store = embed_captions(note, changed, tmp_path, **OPTIONS, repair=True)
    assert "another" in seen and len(seen) == 10
    assert torch.equal(store.gather(range(store.num_captions)), encode(sum(changed, [])).half())
    with pytest.raises(ValueError, match="holds shards of further captions, such as `embeddings-00002.safetensors`"):
        embed_captions(encode, CAPTIONS[:8], tmp_path, **OPTIONS)


def test_a_store_grows_by_the_rows_that_came_after_it(tmp_path):
    embed_captions(encode, CAPTIONS[:8], tmp_path / "grown", **OPTIONS)
    seen = []
    note = lambda texts: seen.extend(texts) or encode(texts)  # noqa: E731
    store = embed_captions(note, CAPTIONS, tmp_path / "grown", **OPTIONS)
    assert sorted(seen) == sorted(FLAT[24:])
    assert torch.equal(store.gather(range(45)), encode(FLAT).half())
    # Or by another store, whose slices are its own.
    for name, part in (("a", CAPTIONS[:6]), ("b", CAPTIONS[6:7]), ("c", CAPTIONS[7:])):
        embed_captions(encode, part, tmp_path / name, **OPTIONS)
    build.append(StoreFolder(tmp_path / "a"), [StoreFolder(tmp_path / name) for name in "bc"])
    appended = CaptionEmbeddingStore.open(tmp_path / "a")
    appended.verify()
    assert appended.holds(CaptionTable(CAPTIONS))
    assert torch.equal(appended.gather(range(45)), store.gather(range(45)))
    other = embed_captions(encode, ["x"], tmp_path / "d", **{**OPTIONS, "fingerprint": {"weights_sha256": "xyz"}})
    with pytest.raises(ValueError, match="d` was made in another way than .*a`: `fingerprint.weights_sha256`"):
        build.append(StoreFolder(tmp_path / "a"), [StoreFolder(other.path)])
    CaptionEmbeddingStore.open(tmp_path / "a").verify()


def test_keys_of_merged_slices_must_be_unique(tmp_path):
    for number, part in enumerate((CAPTIONS[:4], CAPTIONS[4:])):
        CaptionEmbeddingStore.write_shard(
            tmp_path, number, encode(sum(part, [])), part, rows=(number, number + 1), num_rows=2,
            fingerprint=FINGERPRINT, keys=[f"image-{image}" for image in range(len(part))],
        )  # fmt: skip
    with pytest.raises(ValueError, match="The key 'image-0' belongs to image 0 and to image 4"):
        CaptionEmbeddingStore.merge(tmp_path)


def test_the_public_writer_refuses_what_does_not_fit(tmp_path):
    arguments = {"rows": (0, 1), "num_rows": 1, "fingerprint": {}}
    for embeddings, more, message in [
        (torch.ones(1, 3), {}, r"shape \(1, 3\) for 2 captions"),
        (torch.full((2, 3), 1e6), {}, "not finite in float16"),
        (torch.ones(2, 3), {"keys": ["a", "b"]}, "2 entries for 1 images"),
        (torch.ones(2, 3), {"rows": (0, 2)}, "must be a range within the `num_rows` 1"),
        (torch.ones(2, 3), {"dtype": "int4"}, "`dtype` must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            CaptionEmbeddingStore.write_shard(tmp_path, 0, embeddings, [["a", "b"]], **{**arguments, **more})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("with_keys", [False, True])
def test_a_store_of_the_first_format_opens_and_trains_and_is_not_written_into(tmp_path, with_keys):
    captions = {"real": CAPTIONS, "dense": [[f"dense {image}"][: image % 2] for image in range(15)]}
    keys = [f"image-{image}" for image in range(15)] if with_keys else None
    new = embed_captions(encode, captions, tmp_path / "new", **OPTIONS, keys=keys)
    version_1.write(tmp_path / "old", new, captions, keys=keys)
    before = contents(tmp_path / "old")
    old = CaptionEmbeddingStore.open(tmp_path / "old")
    old.verify()
    rows = torch.randint(new.num_captions, (99,))
    assert torch.equal(old.gather(rows), new.gather(rows))
    assert torch.equal(torch.cat(list(old.iter_batches(7))), torch.cat(list(new.iter_batches(7))))
    assert [old.sources(image) for image in range(15)] == [new.sources(image) for image in range(15)]
    assert old.holds(CaptionTable(captions)) and not old.holds(CaptionTable(CAPTIONS))
    merged = CaptionTable([CaptionTable(captions)[image] for image in range(15)])
    assert old.holds(merged, any_sources=True) and not old.holds(merged)
    assert new.holds(merged, any_sources=True) and not new.holds(merged)
    if with_keys:
        assert [old.index_of(key) for key in keys] == list(range(15))
    again = embed_captions(lambda texts: pytest.fail("encoded"), captions, tmp_path / "old", **OPTIONS, keys=keys)
    assert torch.equal(again.gather(rows), new.gather(rows))
    with pytest.raises(ValueError, match="other captions, made by an earlier release"):
        embed_captions(encode, CAPTIONS, tmp_path / "old", **OPTIONS)
    with pytest.raises(ValueError, match="has no record of what made it: it is of an earlier release"):
        CaptionEmbeddingStore.merge(tmp_path / "old")
    (tmp_path / "old" / "index.json").rename(tmp_path / "old" / "build.json")
    with pytest.raises(ValueError, match="unfinished store of an earlier release"):
        embed_captions(encode, captions, tmp_path / "old", **OPTIONS)
    (tmp_path / "old" / "build.json").rename(tmp_path / "old" / "index.json")
    assert contents(tmp_path / "old") == before


def die_on_process_1(folder):
    if os.environ["RANK"] == "1":
        kill = partial(os.kill, os.getpid(), signal.SIGKILL)
        embed_captions(encode_until(4, kill), CAPTIONS, folder, **OPTIONS)
    return outcome(lambda: embed_captions(encode, CAPTIONS, folder, **OPTIONS, timeout=3))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_is_missed_by_its_shard_and_the_others_end(tmp_path, reference):
    folder = tmp_path / "store"
    first, dead, third = run_without_group(3, die_on_process_1, folder, dies=[1])
    assert dead is None
    assert first[0] == third[0] == "TimeoutError"
    assert "waited 3 s for 1 files" in first[1] and "(`embeddings-00001.safetensors`)" in first[1]
    assert "(`index.json`, `embeddings-00001.safetensors`)" in third[1]
    assert not (folder / "index.json").exists()
    embed_captions(encode, CAPTIONS, folder, **OPTIONS, shard_range=(1, 2))
    assert contents(folder) == reference


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("x", "2")])
def test_a_wrong_environment_is_refused(tmp_path, monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ValueError, match=f"`RANK` '{rank}' and `WORLD_SIZE` '{size}' must be numbers"):
        embed_captions(encode, CAPTIONS, tmp_path, **OPTIONS)


def open_with_keys(folder, keys, pause=0.0):
    time.sleep(pause * dist.get_rank())
    store = embed_captions(encode, CAPTIONS, folder, **OPTIONS, keys=keys)
    return [store.index_of(key) for key in keys]


@pytest.mark.parametrize("is_finished", [False, True])
def test_all_processes_get_the_keys(tmp_path, is_finished):
    if is_finished:
        embed_captions(encode, CAPTIONS, tmp_path, **OPTIONS)
    keys = [f"key-{image * 7 % 15}" for image in range(15)]
    # The first process is done with its shards when the others begin with theirs.
    assert run_ranks(3, open_with_keys, tmp_path, keys, 0.5 * is_finished) == [list(range(15))] * 3


FEW_CAPTIONS = [[f"caption {number} of image {image}" for number in range(1 + image % 3)] for image in range(5)]
FEW_FLAT = sum(FEW_CAPTIONS, [])
# 9 captions of five images, in shards of 6, 3.
FEW_OPTIONS = {
    "fingerprint": {"weights_sha256": "abc"},
    "keys": [f"image-{image}" for image in range(5)],
    "rows_per_shard": 3,
    "max_tokens_per_batch": 20,
    "show_progress": False,
}


class Events:
    """Counts what a run does, and kills the process, really, at event number `last`."""

    def __init__(self, last):
        self.last, self.seen = last, 0

    def __call__(self):
        if self.seen == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1

    def encode(self, texts):
        self()
        return encode(texts)

    def fsync(self, descriptor):
        # A file that is only half written when the kill comes. Flushing matters for a power cut, not for a kill.
        size = os.fstat(descriptor).st_size
        if self.seen == self.last and Path(f"/proc/self/fd/{descriptor}").resolve().is_file():
            os.ftruncate(descriptor, size // 2)
        self()

    def replace(self, source, target, replace=os.replace):
        self()
        replace(source, target)
        self()

    def unlink(self, path, unlink=os.unlink):
        self()
        unlink(path)


def run_until(folder, last, queue):
    torch.set_num_threads(1)
    events = Events(last)
    os.fsync, os.replace = events.fsync, events.replace
    os.unlink = events.unlink
    embed_captions(events.encode, FEW_CAPTIONS, folder, **FEW_OPTIONS)
    queue.put(events.seen)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs SIGKILL and /proc")
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    embed_captions(encode, FEW_CAPTIONS, tmp_path / "reference", **FEW_OPTIONS)
    reference = contents(tmp_path / "reference")
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    states = set()
    for last in range(1000):
        folder = tmp_path / f"killed-{last}"
        process = context.Process(target=run_until, args=(folder, last, queue))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        found = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
        states.add(tuple(found))
        if "index.json" in found:
            assert torch.equal(CaptionEmbeddingStore.open(folder).gather(range(9)), encode(FEW_FLAT).half())
        else:
            with pytest.raises(ValueError, match="is not finished|is no caption embedding store"):
                CaptionEmbeddingStore.open(folder)
        shards = {name for name in found if name.startswith("embeddings-")}
        encoded = []
        store = embed_captions(
            lambda texts, to=encoded: to.extend(texts) or encode(texts), FEW_CAPTIONS, folder, **FEW_OPTIONS
        )
        assert contents(folder) == reference, last
        sizes = {"embeddings-00000.safetensors": 6, "embeddings-00001.safetensors": 3}
        assert len(encoded) == 9 - sum(sizes[name] for name in shards)
        assert [store.index_of(f"image-{image}") for image in range(5)] == list(range(5))
    # Five files are written at four events each; batches come on top.
    assert last == queue.get() > 20
    wanted = [
        {"embeddings-00001.safetensors"},  # after the last shard
        {"embeddings-00001.safetensors", "layout.safetensors", "keys.safetensors"},  # before the index
        {"index.json"},
    ]
    for names in wanted:
        assert any(names <= set(state) for state in states)
    for name in ("embeddings-00000", "layout", "keys", "index"):  # in the middle of a file
        assert any(file.startswith(f".{name}.") for state in states for file in state)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_workers_killed_at_random_moments_leave_the_same_store(tmp_path, reference):
    """Twenty builds of three processes, each killed at random moments and started again until the store is there."""
    context = multiprocessing.get_context("fork")
    draws = random.Random(0)
    kills = 0

    def work(folder, rank):
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE="3")
        embed_captions(lambda texts: time.sleep(0.01) or encode(texts), CAPTIONS, folder, **OPTIONS, timeout=60)

    for number in range(20):
        folder = tmp_path / f"build-{number}"
        workers = {rank: context.Process(target=work, args=(folder, rank)) for rank in range(3)}
        for worker in workers.values():
            worker.start()
        for _ in range(draws.randint(1, 6)):
            time.sleep(draws.random() * 0.15)
            rank = draws.randrange(3)
            if workers[rank].is_alive():
                os.kill(workers[rank].pid, signal.SIGKILL)
                kills += 1
            workers[rank].join()
            workers[rank] = context.Process(target=work, args=(folder, rank))
            workers[rank].start()
        for worker in workers.values():
            worker.join(60)
            assert worker.exitcode == 0
        assert contents(folder) == reference, number
        shutil.rmtree(folder)
    assert kills > 20


@pytest.mark.parametrize(
    "name", ["embeddings-00001.safetensors", "layout.safetensors", "keys.safetensors", "index.json"]
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_file_that_cannot_be_written_is_told_and_leaves_nothing_half_written(tmp_path, monkeypatch, name, code):
    def replace(source, target, replace=os.replace):
        if target.endswith(name):
            raise OSError(code, os.strerror(code))
        replace(source, target)

    folder = tmp_path / "store"
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(
            OSError, match=rf"{name}` could not be written: .*Free space .*finished files stay"
        ) as error:
            embed_captions(encode, FEW_CAPTIONS, folder, **FEW_OPTIONS)
    assert error.value.errno == code and os.strerror(code) in str(error.value)
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*")) and not (folder / name).exists()
    encoded = []
    embed_captions(lambda texts: encoded.extend(texts) or encode(texts), FEW_CAPTIONS, folder, **FEW_OPTIONS).verify()
    assert len(encoded) == (3 if name.startswith("embeddings") else 0)


def test_files_have_the_mode_that_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        embed_captions(encode, FEW_CAPTIONS, tmp_path / "store", **FEW_OPTIONS)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "store").iterdir()} == {0o640}


def embed_with_small_files(folder, queue):
    torch.set_num_threads(1)
    # Smaller than a shard of 6 x 7000 halves.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        embed_captions(lambda texts: torch.ones(len(texts), 7000), FEW_CAPTIONS, folder, **FEW_OPTIONS)
    except OSError as error:
        queue.put(str(error))


def test_a_write_that_the_system_refuses_names_the_file(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=embed_with_small_files, args=(tmp_path / "store", queue))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    message = queue.get()
    assert "embeddings-00000.safetensors` could not be written" in message
    assert "too large" in message.lower()
    assert not list((tmp_path / "store").iterdir())
