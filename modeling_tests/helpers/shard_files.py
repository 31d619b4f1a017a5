# SPDX-License-Identifier: Apache-2.0
"""Small image-text shards for tests."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


CAPTION_FIELDS = {"real": "txt", "dense": "json.dense"}


def image_bytes(number: int, kind: str = "PNG") -> bytes:
    """An image whose pixels depend on its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (9 + number % 3, 11, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def captions(number: int) -> dict[str, list[str]]:
    """Captions of sample `number`: a real one, and none to two dense ones."""
    return {"real": [f"real {number}"], "dense": [f"dense {number} {k}. More." for k in range(number % 3)]}


def members(number: int) -> list[tuple[str, bytes]]:
    """The members of sample `number` in a tar shard."""
    extension, kind = [("png", "PNG"), ("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP")][number % 4]
    record = {"key": f"{number:05d}", "dense": captions(number)["dense"]}
    return [
        (f"{number:05d}.{extension}", image_bytes(number, kind)),
        (f"{number:05d}.txt", captions(number)["real"][0].encode()),
        (f"{number:05d}.json", json.dumps(record).encode()),
    ]


def write_tar(path: Path, contents: Sequence[tuple[str, bytes]]) -> Path:
    """A tar file with the given members in the given order."""
    with tarfile.open(path, "w") as tar:
        for name, content in contents:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, sizes: Sequence[int]) -> list[Path]:
    """Tar shards `000.tar`, ... with samples numbered through."""
    paths, first = [], 0
    for shard, size in enumerate(sizes):
        contents = [member for number in range(first, first + size) for member in members(number)]
        paths.append(write_tar(folder / f"{shard:03d}.tar", contents))
        first += size
    return paths
