# SPDX-License-Identifier: Apache-2.0
"""
Shards of image-text samples: webdataset tar files, parquet files, and the shards of a streaming `datasets` data set.

A shard is read in order. `read(wanted)` returns the samples at the wanted positions and passes over the others without
decoding, or, in tar files, without even reading them.
"""

import io
import itertools
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from .captions import as_texts, entry_of, root_column
from .images import located


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
    """The regular files of an archive, in order."""
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


IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm")
_PARQUET_ROWS = 64  # rows decoded at once; an image row is large


WEIGHT = "weight of the pair"  # in the place of a source: the field that holds it, whose value is left as it is


class RawSample(NamedTuple):
    """One sample as it lies in its shard."""

    position: int
    key: str
    image: Any
    captions: dict[str, list[str]]
    problem: str = ""


class UnreadableShardError(ValueError):
    """A shard that cannot be read, or not to its end."""


class Shard(Protocol):
    """What the stream needs of a shard."""

    name: str

    def count(self, damages: list[str] | None = None) -> int:
        """Number of samples, damaged ones included; see `TarShard.count`."""

    def read(self, wanted: Sequence[int]) -> Iterator[RawSample]:
        """The samples at the ascending positions `wanted`."""

    def read_captions(self) -> Iterator[RawSample]:
        """All samples without their images, whose bytes are not read."""


@dataclass
class TarShard:
    """
    A tar file in the webdataset layout: the members of a sample follow each other and share their name up to the dot.
    """

    name: str
    fields: dict[str, str]
    image_column: str | None = None

    def count(self, damages: list[str] | None = None) -> int:
        """Number of samples, from the headers alone."""
        count = 0
        try:
            for _ in self._samples(range(0)):
                count += 1
        except ValueError as error:
            if damages is None:
                raise
            damages.append(str(error))
        return count

    def read(self, wanted: Sequence[int]) -> Iterator[RawSample]:
        """The samples at the ascending positions `wanted`."""
        if not len(wanted):
            return
        remaining = len(wanted)
        for sample in self._samples(wanted):
            if sample is not None:
                remaining -= 1
                yield sample
            if not remaining:
                return

    def read_captions(self) -> Iterator[RawSample]:
        """All samples without their images, which are passed over."""
        return (sample for sample in self._samples(None) if sample is not None)

    def _samples(self, wanted: Sequence[int] | None) -> Iterator[RawSample | None]:
        """Every sample in order; None for those that are not wanted. Without `wanted`, all without their images."""
        chosen, seen = set(wanted or ()), set[str]()
        try:
            with open_archive(Path(self.name)) as file:
                for position, (key, group) in enumerate(itertools.groupby(_named(file), key=lambda named: named[0])):
                    repeated, parts = key in seen, [(extension, member) for _, extension, member in group]
                    seen.add(key)
                    is_wanted = wanted is None or position in chosen
                    yield self._sample(file, position, key, parts, repeated, wanted is not None) if is_wanted else None
        except (tarfile.TarError, OSError) as error:
            raise UnreadableShardError(
                f"Shard `{self.name}` cannot be read: {error}. Download or write it again, as a plain tar file."
            ) from error

    def _sample(
        self,
        file: io.FileIO,
        position: int,
        key: str,
        parts: list[tuple[str, Member]],
        repeated: bool,
        with_image: bool,
    ) -> RawSample:
        extensions = [extension for extension, _ in parts]
        images = [extension for extension in extensions if self._is_image(extension)]
        problem = ""
        if repeated:
            problem = "its key occurs before in the shard, so its members do not follow each other"
        elif len(images) != 1:
            problem = (
                f"it has {len(images)} images among its members {extensions}, expected one: name it as `image_column`"
            )
        elif len(set(extensions)) < len(extensions):
            problem = f"its members {extensions} repeat an extension"
        if problem:
            return RawSample(position, key, None, {}, problem)
        needed = {root_column(extensions, field) for field in self.fields.values()} | (
            {images[0]} if with_image else set()
        )
        contents = {extension: read_member(file, member) for extension, member in parts if extension in needed}
        captions, problem = _captions_of_members(contents, self.fields)
        return RawSample(position, key, contents.get(images[0]), captions, problem)

    def _is_image(self, extension: str) -> bool:
        if self.image_column is not None:
            return extension == self.image_column
        return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


@dataclass
class ParquetShard:
    """A parquet file with an image column, of `{"bytes": ..., "path": ...}` or of bytes."""

    name: str
    fields: dict[str, str]
    image_column: str | None
    key_column: str | None

    def count(self, damages: list[str] | None = None) -> int:
        """Number of rows, from the file's metadata; a file without its metadata cannot be read at all."""
        try:
            with self._open() as file:
                return int(file.metadata.num_rows)
        except ValueError as error:
            if damages is None:
                raise
            damages.append(str(error))
            return 0

    def read(self, wanted: Sequence[int]) -> Iterator[RawSample]:
        """The rows at the ascending positions `wanted`."""
        positions = np.asarray(wanted, dtype=np.int64)
        with self._open() as file:
            present = file.schema_arrow.names
            image = self.image_column or _find_image_column(self.name, file.schema_arrow)
            columns = _columns_of(self.name, self.fields, image, self.key_column, present)
            first = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if np.any((positions >= first) & (positions < first + rows)):
                    yield from self._read_group(file, group, first, columns, image, positions)
                first += rows

    def read_captions(self) -> Iterator[RawSample]:
        """All rows without their images, whose column is not read."""
        with self._open() as file:
            present = file.schema_arrow.names
            columns = _columns_of(self.name, self.fields, None, self.key_column, present)
            position = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS * 16, columns=columns):
                for row in batch.to_pylist():
                    yield _row_sample(position, row, self.fields, None, self.key_column, Path(self.name).name)
                    position += 1

    def _read_group(
        self, file: Any, group: int, first: int, columns: list[str], image: str, wanted: np.ndarray
    ) -> Iterator[RawSample]:
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=[group], columns=columns):
            chosen = wanted[(wanted >= first) & (wanted < first + batch.num_rows)]
            for position in chosen.tolist():
                row = {name: batch.column(name)[position - first].as_py() for name in columns}
                row[image] = located(row[image], Path(self.name).parent)
                yield _row_sample(position, row, self.fields, image, self.key_column, Path(self.name).name)
            first += batch.num_rows

    def _open(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self.name)
        except (pyarrow.ArrowException, OSError) as error:
            raise UnreadableShardError(
                f"Shard `{self.name}` cannot be read: {error}. Download or write it again."
            ) from error


@dataclass
class DatasetShard:
    """One shard of a `datasets.IterableDataset`."""

    dataset: Any
    number: int
    fields: dict[str, str]
    image_column: str
    key_column: str | None

    def __post_init__(self) -> None:
        self.name = f"shard {self.number} of {self.dataset.num_shards}"

    def count(self, damages: list[str] | None = None) -> int:
        """Number of rows, by reading one column of captions or keys."""
        names = [root_column(self.dataset.column_names or [], field) for field in self.fields.values()]
        return sum(1 for _ in self._rows().select_columns([*names, self.key_column or self.image_column][:1]))

    def read(self, wanted: Sequence[int]) -> Iterator[RawSample]:
        """The rows at the ascending positions `wanted`."""
        if not len(wanted):
            return
        first = int(wanted[0])
        chosen, last = set(np.asarray(wanted).tolist()), int(wanted[-1])
        for position, row in enumerate(self._rows().skip(first), start=first):
            if position == first:
                _columns_of(self.name, self.fields, self.image_column, self.key_column, list(row))  # checks them
            if position in chosen:
                yield _row_sample(position, row, self.fields, self.image_column, self.key_column, self.name)
            if position >= last:
                return

    def read_captions(self) -> Iterator[RawSample]:
        """All rows without their images."""
        present = self.dataset.column_names or list(next(iter(self._rows().take(1)), {}))
        columns = _columns_of(self.name, self.fields, None, self.key_column, present)
        for position, row in enumerate(self._rows().select_columns(columns)):
            yield _row_sample(position, row, self.fields, None, self.key_column, self.name)

    def _rows(self) -> Any:
        return self.dataset.shard(num_shards=self.dataset.num_shards, index=self.number)


def _find_image_column(shard: str, schema: Any) -> str:
    """`image`, or the only column of images."""
    from .columns import image_columns

    found = ["image"] if "image" in schema.names else image_columns(schema)
    if len(found) != 1:
        raise ValueError(
            f"Shard `{shard}` has {len(found)} columns of images {found} among {schema.names}. Name one as "
            "`image_column`."
        )
    return found[0]


def _columns_of(
    shard: str, fields: dict[str, str], image_column: str | None, key_column: str | None, present: Sequence[str]
) -> list[str]:
    """The columns that a sample is made of."""
    roots = [root_column(present, field) for field in fields.values()]
    names = [name for name in (image_column, *roots, key_column) if name is not None]
    if missing := sorted(set(names) - set(present)):
        raise ValueError(
            f"Shard `{shard}` has no columns {missing}, it has {sorted(present)}. Name the columns in "
            "`caption_fields`, `image_column` and `key_column`."
        )
    return list(dict.fromkeys(names))


def _named(file: io.FileIO) -> Iterator[tuple[str, str, Member]]:
    """Key, extension and place of every file of an archive that belongs to a sample."""
    for member in iterate_members(file):
        folder, slash, base = member.name.rpartition("/")
        if not base.startswith(".") and "." in base:
            stem, _, extension = base.partition(".")
            yield folder + slash + stem, extension.lower(), member


def _captions_of_members(contents: dict[str, bytes], fields: dict[str, str]) -> tuple[dict[str, list[str]], str]:
    captions: dict[str, list[str]] = {}
    records: dict[str, Any] = {}
    for source, field in fields.items():
        extension = root_column(contents, field)
        if extension not in contents:
            captions[source] = []
            continue
        value: Any
        try:
            value = contents[extension].decode("utf-8").strip()
            if extension != field:
                records.setdefault(extension, json.loads(value))
                value = entry_of(records[extension], field[len(extension) + 1 :])
        except ValueError as error:
            return {}, f"its `{extension}` member cannot be read: {error}"
        captions[source], problem = caption_list(value, source)
        if problem:
            return {}, problem
    return captions, ""


def caption_list(value: Any, source: str) -> tuple[list[str], str]:
    """The captions in a field, where empty ones count as missing, and what is wrong with it, if anything."""
    if source == WEIGHT:
        return [value], ""
    value = as_texts(value)
    if value is None:
        return [], ""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) or text is None for text in texts):
        return [], f"its captions of source `{source}` are {value!r:.80}, expected a string or a list of strings"
    return [text for text in texts if text and text.strip()], ""


def _row_sample(
    position: int,
    row: dict[str, Any],
    fields: dict[str, str],
    image_column: str | None,
    key_column: str | None,
    shard: str,
) -> RawSample:
    key = f"{shard}:{position}" if key_column is None else str(row[key_column])
    captions: dict[str, list[str]] = {}
    problem = ""
    for source, column in fields.items():
        captions[source], wrong = caption_list(entry_of(row, column), source)
        problem = problem or wrong
    if image_column is None:
        return RawSample(position, key, None, captions, problem)
    image = row.get(image_column)
    if image is None or (isinstance(image, dict) and image.get("bytes") is None and image.get("path") is None):
        problem = problem or f"it has no image in the column `{image_column}`"
    return RawSample(position, key, image, captions, problem)


__all__ = [
    "COMPRESSIONS",
    "WEIGHT",
    "DatasetShard",
    "Member",
    "ParquetShard",
    "RawSample",
    "Shard",
    "TarShard",
    "UnreadableShardError",
    "iterate_members",
    "open_archive",
    "read_member",
]
