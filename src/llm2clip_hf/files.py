# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all: write under a temporary name, flush to disk, rename; and file digests."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


_READ_BYTES = 1 << 22


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """
    Let `write` fill a temporary file beside `path`, flush it to disk and rename it to `path`.

    A reader sees the old content or the new one. The temporary name is fixed per target, so what a killed process
    left behind is overwritten by the next attempt instead of piling up.
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
    write_text_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The content of a JSON file that a user names or may have edited; `remedy` ends the message of an error."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"`{path}` does not exist. {remedy}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"`{path}` is no valid JSON: {error}. {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` holds {type(content).__name__}, expected an object. {remedy}")
    return content


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file through `write_atomically`."""

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


UNFINISHED = ".unfinished-"
REPLACED = ".replaced-"


def publish_folder(staging: Path, target: Path) -> None:
    """Flushes all files of a folder to disk and renames it; an older folder of that name is replaced."""
    for file in staging.rglob("*"):
        if file.is_file():
            with file.open("r+b") as opened:
                os.fsync(opened.fileno())
    if target.exists():
        replaced = target.with_name(f"{REPLACED}{target.name}")
        os.replace(target, replaced)
        os.replace(staging, target)
        shutil.rmtree(replaced)
    else:
        os.replace(staging, target)


@contextmanager
def temporary_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place when the block ends, and is removed when it fails."""
    output = output.absolute()
    temporary, old = (output.with_name(f".{output.name}.{suffix}") for suffix in ("tmp", "old"))
    created = [parent for parent in output.parents if not parent.exists()]
    for leftover in (temporary, old):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if output.exists():
            output.rename(old)
        temporary.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in created:
            parent.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def written_into(target: Path, last: str, replaced: Sequence[str] = ()) -> Iterator[Path]:
    """
    A temporary folder whose files are moved into `target`, which keeps its other files, when the block ends.

    `last` is the file by which a folder counts as finished: it is removed first and moved last, so that a folder that
    is half replaced never passes for a finished one. `replaced` are patterns of files that must not be left over.
    """
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
        yield Path(name)
        files = [file for file in Path(name).rglob("*") if file.is_file()]
        for old in (target / last, *(file for pattern in replaced for file in target.glob(pattern))):
            old.unlink(missing_ok=True)
        for file in sorted(files, key=lambda file: (file == Path(name) / last, file)):
            destination = target / file.relative_to(name)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, destination)
