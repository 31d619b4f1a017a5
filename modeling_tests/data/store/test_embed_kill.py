# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, at every moment at which something is on disk, or that has no disk left."""

import errno
import hashlib
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

import llm2clip_hf.data.store.build
from llm2clip_hf.data import CaptionEmbeddingStore, embed_captions


CAPTIONS = [[f"caption {number} of image {image}" for number in range(1 + image % 3)] for image in range(5)]
FLAT = sum(CAPTIONS, [])
# 9 captions in shards of 5 and 4.
OPTIONS = {
    "fingerprint": {"weights_sha256": "abc"},
    "keys": [f"image-{image}" for image in range(5)],
    "rows_per_shard": 5,
    "max_tokens_per_batch": 20,
    "show_progress": False,
}


def encode(texts):
    digests = [hashlib.sha256(text.encode()).digest()[:7] for text in texts]
    return torch.tensor([list(digest) for digest in digests], dtype=torch.float32) / 16


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


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
    embed_captions(events.encode, CAPTIONS, folder, **OPTIONS)
    queue.put(events.seen)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs SIGKILL and /proc")
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    embed_captions(encode, CAPTIONS, tmp_path / "reference", **OPTIONS)
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
            assert torch.equal(CaptionEmbeddingStore.open(folder).gather(range(9)), encode(FLAT).half())
        else:
            with pytest.raises(ValueError, match="is not finished|is no caption embedding store"):
                CaptionEmbeddingStore.open(folder)
        records = [name for name in found if name.startswith("embeddings-") and name.endswith(".json")]
        encoded = []
        store = embed_captions(
            lambda texts, to=encoded: to.extend(texts) or encode(texts), CAPTIONS, folder, **OPTIONS
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
            embed_captions(encode, CAPTIONS, tmp_path / "store", **OPTIONS)
    assert error.value.errno == errno.ENOSPC
    assert not list((tmp_path / "store").glob("*.tmp"))
    assert not (tmp_path / "store" / f"{name}.safetensors").exists()
    embed_captions(encode, CAPTIONS, tmp_path / "store", **OPTIONS).verify()


def embed_with_small_files(folder, queue):
    torch.set_num_threads(1)
    # Larger than the plan and smaller than a shard of 5 x 7000 halves.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        embed_captions(lambda texts: torch.ones(len(texts), 7000), CAPTIONS, folder, **OPTIONS)
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
