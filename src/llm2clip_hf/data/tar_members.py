# SPDX-License-Identifier: Apache-2.0
"""
The files in a tar archive, by their headers alone: names, sizes and places, without reading what is in them.

`tarfile` parses every header in full, which takes minutes for the shards of a large data set. Here the common kind, a
short name and a size in octal digits, is read directly, and `tarfile` is asked for the others.
"""

import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


__all__ = ["COMPRESSIONS", "Member", "iterate_members", "open_archive", "read_member"]

COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}
_CHUNK = 1 << 24
_BLOCK = 512
_END = bytes(_BLOCK)
_CHECKSUM = slice(148, 156)
_TYPE, _PREFIX, _SIZE = 156, 345, 124
_FILES = (b"0"[0], 0)


class Member(NamedTuple):
    """A file in an archive: its name, and where its content lies."""

    name: str
    offset: int
    size: int


def iterate_members(file: io.FileIO) -> Iterator[Member]:
    """
    The regular files of an archive, in order.

    Args:
        file (`io.FileIO`): the archive, unbuffered; it may be read elsewhere between two members.

    Yields:
        `Member`.

    Raises:
        tarfile.ReadError: if the archive is empty, cut off, or has anything but a header where one should be.
    """
    length, offset = os.fstat(file.fileno()).st_size, 0
    if not length:
        raise tarfile.ReadError("empty file")
    if length < _BLOCK:
        raise tarfile.ReadError("truncated header")
    while True:
        file.seek(offset)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            raise tarfile.ReadError("it has no end mark, so the end is missing")
        if header == _END:
            return
        member, following = _plain_member(header, offset) or _any_member(file, offset)
        if following > length:
            raise tarfile.ReadError(f"unexpected end of data in `{member.name if member else 'a member'}`")
        if member is not None:
            yield member
        offset = following


def read_member(file: io.FileIO, member: Member) -> bytes:
    """The content of a member."""
    file.seek(member.offset)
    content = file.read(member.size)
    while len(content) < member.size and (more := file.read(member.size - len(content))):
        content += more
    return content


def open_archive(path: Path) -> io.FileIO:
    """The archive, as `iterate_members` wants it; a compressed one is unpacked into a file that goes with its end."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return io.FileIO(path, "r")
    import pyarrow

    unpacked = tempfile.TemporaryFile(buffering=0)
    with pyarrow.input_stream(str(path), compression=compression) as stream:
        while chunk := stream.read(_CHUNK):
            unpacked.write(chunk)
    return unpacked  # type: ignore[return-value]


def _plain_member(header: bytes, offset: int) -> tuple[Member, int] | None:
    """The member of a header of the common kind and the place of the next header; None for any other."""
    if header[_TYPE] not in _FILES or header[_PREFIX] or header[_SIZE] & 0x80 or header[257:262] != b"ustar":
        return None
    try:
        checksum = int(header[_CHECKSUM].strip(b"\0 "), 8)
        size = int(header[_SIZE : _SIZE + 12].strip(b"\0 ") or b"0", 8)
        name = header[:100].rstrip(b"\0").decode("utf-8")
    except ValueError:
        return None
    if checksum != sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" ") or "\0" in name or name.endswith("/"):
        return None
    return Member(name, offset + _BLOCK, size), offset + _BLOCK + -(-size // _BLOCK) * _BLOCK


def _any_member(file: io.FileIO, offset: int) -> tuple[Member | None, int]:
    """As `_plain_member`, for long names, folders, links and the like; the member is None where it is no file."""
    file.seek(offset)
    try:
        with tarfile.TarFile(fileobj=file) as archive:
            found = archive.next()
            following = archive.offset
    except tarfile.TarError as error:
        raise tarfile.ReadError(f"there is no valid header at byte {offset}: {error}") from error
    if found is None:
        raise tarfile.ReadError(f"there is no valid header at byte {offset}")
    member = Member(found.name, found.offset_data, found.size) if found.isreg() and not found.issparse() else None
    return member, following
