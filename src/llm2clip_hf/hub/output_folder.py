# SPDX-License-Identifier: Apache-2.0
"""Folders that appear whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .conversion_card import MARKER


def check_output(output: Path, source: Path) -> None:
    """
    Refuses a target that a conversion must not replace.

    Raises:
        ValueError: if it is the source, a file, or a folder that holds anything but what a conversion wrote.
    """
    if output.exists() and source.exists() and output.resolve() == source.resolve():
        raise ValueError(f"`output_dir` {str(output)!r} is the source. Give another folder.")
    if output.is_dir() and any(output.iterdir()):
        # Modules of sentence-transformers are the only folders that a conversion writes.
        foreign = sorted(each.name for each in output.iterdir() if each.is_dir() and not each.name[0].isdigit())
        if foreign or not _holds(output / "README.md", MARKER):
            named = f", such as {foreign[0]!r}" if foreign else ""
            raise ValueError(f"`output_dir` {str(output)!r} holds other files{named}. Give a new or empty folder.")
    elif output.exists() and not output.is_dir():
        raise ValueError(f"`output_dir` {str(output)!r} is a file. Give a folder.")


def _holds(path: Path, text: str) -> bool:
    try:
        return text in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


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


__all__ = ["check_output", "temporary_folder"]
