# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all: write under a temporary name, flush to disk, rename; and file digests."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


_READ_BYTES = 1 << 22


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """
    Let `write` fill a temporary file beside `path`, flush it to disk and rename it to `path`.

    A reader sees the old content or the new one. The temporary name is fixed per target, so what a killed process
    left behind is overwritten by the next attempt instead of piling up.

    Args:
        path (`Path`): the file to create or replace; its folder must exist.
        write: called once with the temporary path; must create that file.

    Raises:
        OSError: if the file cannot be written, e.g. because the disk is full; nothing of it stays behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":
            # The rename itself is durable only once the folder is flushed; elsewhere a folder cannot be opened.
            _flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        # Half of a file may be the gigabyte that is missing.
        temporary.unlink(missing_ok=True)
        raise OSError(
            getattr(error, "errno", None) or 0,
            f"`{path}` could not be written: {error}. Free space (or raise the quota) in `{path.parent}`, check that "
            "it may be written to, and call again; finished files stay valid.",
        ) from error


def write_json_atomically(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON through `write_atomically`."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
