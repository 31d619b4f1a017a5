# SPDX-License-Identifier: Apache-2.0
"""The folder of a store: on this machine, where its files are mapped, or at any address that fsspec opens."""

import os
import re
import tempfile
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO


_LOST_SLASH = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")
_LOCAL = re.compile(r"^(?:file|local)://")


class StoreFolder:
    """
    The files of one folder, read whole or in part and written whole or not at all.

    Args:
        path (`str` or `Path`): a folder, or an address such as `s3://bucket/store` or `hf://datasets/name/store`.

    Raises:
        ValueError: if the address has no file system, or its package is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        text = os.fspath(path)
        if _LOST_SLASH.match(text):
            raise ValueError(f"`{text}` is an address that has lost a slash in a `Path`. Pass it as a string.")
        text = _LOCAL.sub("", text)
        self._system: Any = None
        self.root = text
        if "://" in text:
            self._system, self.root = _open_system(text)
        self.path: Any = text if self.is_remote else Path(text)

    @property
    def is_remote(self) -> bool:
        """Whether files have to be copied here before they can be mapped."""
        return self._system is not None

    def place(self, name: str) -> str:
        """A file as messages name it."""
        return f"{str(self.path).rstrip('/')}/{name}"

    def names(self, start: str = "") -> set[str]:
        """Names of the files that begin with `start`, in one listing."""
        if self._system is None:
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root) as entries:
                return {entry.name for entry in entries if entry.name.startswith(start)}
            return set()
        self._system.invalidate_cache(self.root)
        try:
            found = self._system.ls(self.root, detail=False)
        except FileNotFoundError:
            return set()
        return {name for name in (path.rstrip("/").rpartition("/")[2] for path in found) if name.startswith(start)}

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where it is absent."""
        try:
            if self._system is None:
                return os.stat(f"{self.root}/{name}").st_size
            return int(self._system.size(f"{self.root}/{name}"))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sizes(self) -> dict[str, int]:
        """Bytes of all files by name, in one listing where they are far."""
        if self._system is None:
            return {name: size for name in self.names() if (size := self.size(name)) is not None}
        self._system.invalidate_cache(self.root)
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in self._system.ls(self.root, detail=True)}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """A file, or some of its bytes."""
        if self._system is None:
            with open(f"{self.root}/{name}", "rb") as file:
                file.seek(start)
                return file.read() if stop is None else file.read(stop - start)
        content: bytes = self._system.cat_file(f"{self.root}/{name}", start, stop)
        return content

    def open(self, name: str) -> BinaryIO:
        """A file, to be read in order."""
        opened: BinaryIO = (
            open(f"{self.root}/{name}", "rb") if self._system is None else self._system.open(f"{self.root}/{name}")
        )
        return opened

    def write(self, name: str, parts: Iterable[Any]) -> None:
        """
        Write a file: a reader finds the old content or the new one, and a kill leaves no part of it under its name.

        Of two that write the same file at once, one wins; both write the same bytes here.
        """
        try:
            if self._system is None:
                self._write_here(name, parts)
            else:
                # What is written through fsspec itself would be published up to the byte where it failed.
                with tempfile.NamedTemporaryFile() as file:
                    _write_parts(file, parts)
                    file.flush()
                    self._system.makedirs(self.root, exist_ok=True)
                    self._system.put_file(file.name, f"{self.root}/{name}")
        except OSError as error:
            raise OSError(
                error.errno or 0,
                f"`{self.place(name)}` could not be written: {error}. Free space (or raise the quota), check that "
                "the folder may be written to, and call again; finished files stay valid.",
            ) from error

    def _write_here(self, name: str, parts: Iterable[Any]) -> None:
        os.makedirs(self.root, exist_ok=True)
        # A name of its own: another process may be writing the same file. `open` gives the mode that umask says.
        temporary = f"{self.root}/.{name}.{uuid.uuid4().hex[:12]}.tmp"
        try:
            with open(temporary, "xb") as file:
                _write_parts(file, parts)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.replace(temporary, f"{self.root}/{name}")
            except FileNotFoundError:
                if self.size(name) is None:  # else another process wrote it meanwhile, and cleaned up
                    raise
        except BaseException:
            # Half of a file may be the gigabyte that is missing.
            with suppress(OSError):
                os.unlink(temporary)
            raise
        if os.name == "posix":
            # The rename itself is durable only once the folder is flushed; elsewhere a folder cannot be opened.
            folder = os.open(self.root, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def remove(self, name: str) -> None:
        """Remove a file that may be absent."""
        with suppress(FileNotFoundError):
            if self._system is None:
                os.unlink(f"{self.root}/{name}")
            else:
                self._system.rm_file(f"{self.root}/{name}")

    def remove_unfinished(self, names: Iterable[str]) -> None:
        """Remove what killed writers of some files left; only where no other process is writing them."""
        wanted = set(names)
        for path in [] if self._system is not None else self.names("."):
            if path.endswith(".tmp") and path[1:].rpartition(".")[0].rpartition(".")[0] in wanted:
                self.remove(path)

    def local_copy(self, name: str, digest: str) -> Path:
        """The file on this machine: itself, or a copy in the cache, which is found again by its digest."""
        if self._system is None:
            return Path(self.root) / name
        from huggingface_hub import constants

        cache = StoreFolder(Path(constants.HF_HOME) / "llm2clip_hf" / "stores")
        cached = f"{digest}-{name}"
        if cache.size(cached) is None:
            with self.open(name) as source:
                cache.write(cached, iter(lambda: source.read(1 << 22), b""))
        return Path(cache.root) / cached


def _write_parts(file: Any, parts: Iterable[Any]) -> None:
    for part in parts:
        file.write(part)


def _open_system(address: str) -> tuple[Any, str]:
    import fsspec.core

    scheme = address.partition("://")[0]
    try:
        system, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise ValueError(f"`{address}` needs a package that opens `{scheme}://` addresses: {error}.") from error
    except ValueError as error:
        raise ValueError(f"`{address}` cannot be opened: {error}. Check the scheme `{scheme}://`.") from error
    return system, root.rstrip("/")


__all__ = ["StoreFolder"]
