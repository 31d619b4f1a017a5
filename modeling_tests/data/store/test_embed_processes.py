# SPDX-License-Identifier: Apache-2.0
"""Several processes that fill one store, and runs that are killed or have no disk left: always the same files."""

import errno
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import time
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from process_groups import run_ranks

import llm2clip_hf.data.store.build
from llm2clip_hf.data import CaptionEmbeddingStore, embed_captions
from llm2clip_hf.data.store.build import held


FINGERPRINT = {"weights_sha256": "abc"}
# 45 captions: with ten rows per shard, five shards of which the last is shorter.
CAPTIONS = [[f"caption {number} of image {image}" + " x" * (image % 5) for number in range(3)] for image in range(15)]
FLAT = sum(CAPTIONS, [])
OPTIONS = {"fingerprint": FINGERPRINT, "rows_per_shard": 10, "max_tokens_per_batch": 30, "show_progress": False}


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
    results = LAUNCHES[launch](size, embed_one, folder)
    for rank, (seen, is_right) in enumerate(results):
        own = [text for row, text in enumerate(FLAT) if row // 10 % size == rank]
        assert sorted(seen) == sorted(own)
        assert is_right
    assert contents(folder) == reference


def test_another_number_of_processes_resumes(tmp_path, reference):
    folder = tmp_path / "store"

    with pytest.raises(KeyboardInterrupt):
        embed_captions(encode_until(25, interrupt), CAPTIONS, folder, **OPTIONS)
    seen = [texts for texts, is_right in run_ranks(3, embed_one, folder) if is_right]
    assert [len(texts) for texts in seen] == [10, 5, 10]
    assert contents(folder) == reference


def fail_on(rank, folder):
    def fail():
        # Without a group, an error from before the start of another process is an old one to it.
        while len(list(folder.glob("process-*.json"))) < 3:
            time.sleep(0.01)
        raise ValueError("the encoder broke")

    encode_or_fail = encode_until(3, fail)
    own = int(os.environ.get("RANK", -1))
    own = torch.distributed.get_rank() if own < 0 else own
    started = time.monotonic()
    result = outcome(
        lambda: embed_captions(encode_or_fail if own == rank else encode, CAPTIONS, folder, **OPTIONS, timeout=30)
    )
    return result, time.monotonic() - started


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_in_one_process_is_an_error_in_all(tmp_path, reference, launch, failing):
    folder = tmp_path / "store"
    results = LAUNCHES[launch](3, fail_on, failing, folder)
    for rank, ((kind, message), seconds) in enumerate(results):
        assert seconds < 20
        if rank == failing:
            assert (kind, message) == ("ValueError", "the encoder broke")
        else:
            assert kind == "OtherProcessFailedError"
            assert f"one failed: process {failing}: ValueError: the encoder broke" in message
    with pytest.raises(ValueError, match="is not finished"):
        CaptionEmbeddingStore.open(folder)
    # The error on disk is that of an earlier run for the next one.
    assert all(is_right for _, is_right in LAUNCHES[launch](2, embed_one, folder))
    assert contents(folder) == reference


def bad_call_on_process_1(folder, change):
    options = {**OPTIONS, "timeout": 30, "captions": CAPTIONS}
    if torch.distributed.get_rank() == 1:
        options.update(change)
    return outcome(lambda: embed_captions(encode, output_dir=folder, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": None}, "`fingerprint` is needed"),
        ({"captions": ["another"] * 15}, "`captions_sha256`"),
        ({"captions": [""]}, "is not a non-empty string"),
        ({"keys": ["a"] * 15}, "The key 'a' belongs to image 0 and to image 1"),
    ],
)
def test_a_wrong_argument_in_one_process_is_an_error_in_all(tmp_path, change, message):
    for rank, (kind, text) in enumerate(run_ranks(3, bad_call_on_process_1, tmp_path / "store", change)):
        assert kind == ("ValueError" if rank == 1 else "OtherProcessFailedError")
        assert message in text


def die_on_process_1(folder):
    if os.environ["RANK"] == "1":
        kill = partial(os.kill, os.getpid(), signal.SIGKILL)
        embed_captions(encode_until(12, kill), CAPTIONS, folder, **OPTIONS)
    # Process 0 notices first, and tells process 2.
    timeout = 3 if os.environ["RANK"] == "0" else 50
    return outcome(lambda: embed_captions(encode, CAPTIONS, folder, **OPTIONS, timeout=timeout))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_is_missed_by_name_and_the_others_end(tmp_path, reference):
    folder = tmp_path / "store"
    first, dead, third = run_without_group(3, die_on_process_1, folder, dies=[1])
    assert dead is None
    # Process 1 had shards 1 and 4 and was killed in the latter.
    assert first[0] == "TimeoutError"
    assert "waited 3 s for 1 of 5 shards (`embeddings-00004.safetensors`)" in first[1]
    assert third[0] == "OtherProcessFailedError"
    assert "one failed: process 0: TimeoutError: Process 0 of 3 waited" in third[1]
    assert not (folder / "index.json").exists()
    seen = [texts for texts, is_right in run_without_group(2, embed_one, folder) if is_right]
    assert [len(texts) for texts in seen] == [5, 0]
    assert contents(folder) == reference


def status_of_process_1(folder):
    """Its status file, which is absent for a moment when the process clears what an earlier run left."""
    try:
        return (folder / "process-00001.json").read_text()
    except FileNotFoundError:
        return ""


def fail_at_once_on_process_1(folder):
    if os.environ["RANK"] == "1":
        return outcome(lambda: embed_captions(encode_until(0, lambda: 1 / 0), CAPTIONS, folder, **OPTIONS))
    while "division" not in status_of_process_1(folder):
        time.sleep(0.01)
    return outcome(lambda: embed_captions(encode, CAPTIONS, folder, **OPTIONS, timeout=0.2))


def test_an_error_from_before_the_start_is_quoted_when_nothing_else_comes(tmp_path):
    # Process 1 needs a plan, and process 0 must not start before the error is there.
    with pytest.raises(KeyboardInterrupt):
        embed_captions(encode_until(0, interrupt), CAPTIONS, tmp_path, **OPTIONS)
    (tmp_path / "process-00001.json").write_text("")
    results = run_without_group(2, fail_at_once_on_process_1, tmp_path)
    assert results[1][0] == "ZeroDivisionError"
    kind, message = results[0]
    assert kind == "TimeoutError"
    assert "process 1: ZeroDivisionError: division by zero" in message


def test_a_process_alone_waits_in_vain_for_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TimeoutError, match=r"Process 1 of 2 waited 0 s for `build.json` of process 0 .* none"):
        embed_captions(encode, CAPTIONS, tmp_path, **OPTIONS, timeout=0.2)


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("x", "2")])
def test_a_wrong_environment_is_refused(tmp_path, monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ValueError, match=f"`RANK` '{rank}' and `WORLD_SIZE` '{size}' must be numbers"):
        embed_captions(encode, CAPTIONS, tmp_path, **OPTIONS)


def open_with_keys(folder, keys):
    store = embed_captions(encode, CAPTIONS, folder, **OPTIONS, keys=keys)
    return [store.index_of(key) for key in keys]


@pytest.mark.parametrize("is_finished", [False, True])
def test_all_processes_get_the_keys(tmp_path, is_finished):
    if is_finished:
        embed_captions(encode, CAPTIONS, tmp_path, **OPTIONS)
    keys = [f"key-{image * 7 % 15}" for image in range(15)]
    assert run_ranks(3, open_with_keys, tmp_path, keys) == [list(range(15))] * 3


@pytest.mark.skipif(os.name != "posix", reason="needs file locks")
def test_two_runs_never_write_the_same_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        embed_captions(encode_until(0, interrupt), CAPTIONS, tmp_path, **OPTIONS)
    seen = []
    for name in (".build.lock", ".embeddings-00000.safetensors.lock"):
        with held(tmp_path / name):
            with pytest.raises(RuntimeError, match=rf"Another run \(host .*, process {os.getpid()}\) is embedding"):
                embed_captions(seen.append, CAPTIONS, tmp_path, **OPTIONS)
    assert seen == []
    assert not list(tmp_path.glob("embeddings-*"))
    embed_captions(encode, CAPTIONS, tmp_path, **OPTIONS).verify()


def test_status_files_say_who_did_how_much(tmp_path, monkeypatch):
    statuses = []

    def encode_and_look(texts):
        statuses.append(json.loads((tmp_path / "process-00000.json").read_text()))
        return encode(texts)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("llm2clip_hf.data.store.build._SECONDS_BETWEEN_SIGNS", 0.0)
    with pytest.raises(TimeoutError, match=r"2 of 5 shards \(`embeddings-00001.safetensors`, `embeddings-00003"):
        embed_captions(encode_and_look, CAPTIONS, tmp_path, **OPTIONS, timeout=0.1)
    counts = [status["captions"] for status in statuses]
    assert counts[0] == 0
    assert counts == sorted(set(counts))
    assert statuses[-1]["pid"] == os.getpid()


FEW_CAPTIONS = [[f"caption {number} of image {image}" for number in range(1 + image % 3)] for image in range(5)]
FEW_FLAT = sum(FEW_CAPTIONS, [])
# 9 captions in shards of 5 and 4.
FEW_OPTIONS = {
    "fingerprint": {"weights_sha256": "abc"},
    "keys": [f"image-{image}" for image in range(5)],
    "rows_per_shard": 5,
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

    def unlink(self, path, missing_ok=False, unlink=Path.unlink):
        self()
        unlink(path, missing_ok)


def run_until(folder, last, queue):
    torch.set_num_threads(1)
    events = Events(last)
    os.fsync, os.replace = events.fsync, events.replace
    Path.unlink = lambda path, missing_ok=False: events.unlink(path, missing_ok)
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
        records = [name for name in found if name.startswith("embeddings-") and name.endswith(".json")]
        encoded = []
        store = embed_captions(
            lambda texts, to=encoded: to.extend(texts) or encode(texts), FEW_CAPTIONS, folder, **FEW_OPTIONS
        )
        assert contents(folder) == reference, last
        assert len(encoded) == (0 if "index.json" in found else 9 - sum([5, 4][: len(records)]))
        assert [store.index_of(f"image-{image}") for image in range(5)] == list(range(5))
    # Eight files are written at three events each; batches and removals come on top.
    assert last == queue.get() > 26
    wanted = [
        {"build.json", ".embeddings-00000.safetensors.tmp"},  # in the middle of a shard
        {"embeddings-00001.safetensors", "embeddings-00000.json"},  # between a shard and its record
        {"embeddings-00001.json", "keys.safetensors"},  # before the index
        {"embeddings-00001.json", "build.json", "index.json"},  # before the clean-up
    ]
    for names in wanted:
        assert any(names <= set(state) for state in states)
    assert any("embeddings-00001.safetensors" in state and "embeddings-00001.json" not in state for state in states)


@pytest.mark.parametrize("name", ["layout", "embeddings-00001", "keys"])
def test_a_full_disk_is_told_and_leaves_nothing_half_written(tmp_path, monkeypatch, name):
    def save_half_then_fail(tensors, path, save=llm2clip_hf.data.store.build.save_file):
        save(tensors, path)
        if name in path.name:
            path.write_bytes(path.read_bytes()[:20])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        for module in ("store.build", "store.mapped_files"):
            patched.setattr(f"llm2clip_hf.data.{module}.save_file", save_half_then_fail)
        with pytest.raises(
            OSError, match=rf"{name}.safetensors` could not be written: .*No space left.* Free"
        ) as error:
            embed_captions(encode, FEW_CAPTIONS, tmp_path / "store", **FEW_OPTIONS)
    assert error.value.errno == errno.ENOSPC
    assert not list((tmp_path / "store").glob("*.tmp"))
    assert not (tmp_path / "store" / f"{name}.safetensors").exists()
    embed_captions(encode, FEW_CAPTIONS, tmp_path / "store", **FEW_OPTIONS).verify()


def embed_with_small_files(folder, queue):
    torch.set_num_threads(1)
    # Larger than the plan and smaller than a shard of 5 x 7000 halves.
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
    names = {file.name for file in (tmp_path / "store").iterdir()}
    assert names == {"build.json", "layout.safetensors", ".build.lock", ".embeddings-00000.safetensors.lock"}
