# SPDX-License-Identifier: Apache-2.0
"""
Rows of tables, block by block: of Arrow, and of JSON, CSV and text files.

The files are read here, not by `datasets`, because a message has to say which row of which file is broken.
"""

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from .captions import root_column, with_entries
from .columns import arrow_entry, arrow_kinds, learn_kinds, to_python
from .reports import describe_place


ROWS_PER_BLOCK = 8192
_DELIMITERS = ",;\t|"
# A row that could not be read is the text that says why.
Record = Mapping[str, Any] | str
Records = Iterator[tuple[int, Record]]


@dataclass
class Block:
    """Consecutive rows of one source."""

    columns: dict[str, Any]
    file: str
    unit: str
    numbers: Sequence[int]
    broken: list[tuple[int, str]] = field(default_factory=list)

    def values(self, column: str) -> list[Any]:
        """The values of a column, one per number."""
        values = self.columns[column]
        return to_python(values) if isinstance(values, pa.Array) else values


@dataclass
class TextSource:
    """One table of rows."""

    name: str
    kinds: dict[str, str]
    blocks: Callable[[Sequence[str]], Iterator[Block]]
    image_column: str | None = None
    # Where any rows can be read without those before them:
    num_rows: int | None = None
    part: "Callable[[int, int], TextSource] | None" = None


def dataset_source(dataset: Dataset, name: str = "", first: int = 0, last: int | None = None) -> TextSource:
    end = len(dataset) if last is None else last

    def blocks(columns: Sequence[str]) -> Iterator[Block]:
        # Slices of a memory-mapped table are views; only a shuffled or selected data set is gathered, block by block.
        roots = dict.fromkeys(root_column(dataset.column_names, column) for column in columns)
        rows = dataset.select_columns(list(roots)).with_format("arrow")
        for start in range(first, end, ROWS_PER_BLOCK):
            yield from _arrow_blocks(rows[start : min(start + ROWS_PER_BLOCK, end)], columns, name, start)

    kinds = arrow_kinds(dataset.features.arrow_schema)
    return TextSource(
        name, kinds, blocks, None, end - first, lambda start, stop: dataset_source(dataset, name, start, stop)
    )


def _read_parquet(file: Path, first: int = 0, last: int | None = None) -> TextSource:
    try:
        metadata = pq.read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"`{file}` is not a readable parquet file: {error}") from error
    end = metadata.num_rows if last is None else last

    def blocks(columns: Sequence[str]) -> Iterator[Block]:
        start = 0
        try:
            with pq.ParquetFile(file) as reader:
                roots = dict.fromkeys(root_column(schema.names, column) for column in columns)
                for group in range(metadata.num_row_groups):
                    rows = metadata.row_group(group).num_rows
                    if start + rows <= first or start >= end:
                        start += rows
                        continue
                    for batch in reader.iter_batches(ROWS_PER_BLOCK, row_groups=[group], columns=list(roots)):
                        low, high = max(first - start, 0), max(min(end - start, len(batch)), 0)
                        if low < high:
                            wanted = pa.Table.from_batches([batch.slice(low, high - low)])
                            yield from _arrow_blocks(wanted, columns, str(file), start + low)
                        start += len(batch)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"`{file}` cannot be read after row {start}: {error}.") from error

    return TextSource(
        str(file), arrow_kinds(schema), blocks, None, end - first, lambda start, stop: _read_parquet(file, start, stop)
    )


def _arrow_blocks(table: pa.Table, names: Sequence[str], name: str, start: int) -> Iterator[Block]:
    batches = table.to_batches()
    if len(batches) > max(8, len(table) // 64):
        # Gathered row by row: put together. Larger pieces stay where they are, which may be a memory-mapped file.
        batches = table.combine_chunks().to_batches()
    for batch in batches:
        columns = dict(zip(batch.schema.names, batch.columns))
        columns = {column: arrow_entry(columns, column) for column in names}
        yield Block(columns, name, "row", range(start, start + len(batch)))
        start += len(batch)


def record_source(
    name: str, unit: str, open_records: Callable[[], Records], *, has_fixed_columns: bool = False
) -> TextSource:
    def read() -> Records:
        try:
            for number, record in open_records():
                yield number, record if isinstance(record, str) else with_entries(record)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"`{name}` cannot be read to its end: {error}.") from error

    good = (record for _, record in read() if not isinstance(record, str))
    # Rows of JSON have columns of their own, so all of them are looked at.
    kinds = learn_kinds(itertools.islice(good, 1) if has_fixed_columns else good)

    def blocks(columns: Sequence[str]) -> Iterator[Block]:
        numbered = read()
        while rows := list(itertools.islice(numbered, ROWS_PER_BLOCK)):
            good = [(number, row) for number, row in rows if not isinstance(row, str)]
            broken = [(number, row) for number, row in rows if isinstance(row, str)]
            values = {column: [row.get(column) for _, row in good] for column in columns}
            yield Block(values, name, unit, [number for number, _ in good], broken)

    return TextSource(name, kinds, blocks)


def checked_rows(rows: Sequence[Any]) -> Iterator[Record]:
    for row in rows:
        if isinstance(row, Mapping):
            yield row
        elif isinstance(row, str) or (isinstance(row, Sequence) and not isinstance(row, bytes)):
            yield {"captions": row}
        else:
            yield f"is a {type(row).__name__}, not a mapping from column to text"


def rows_of_columns(columns: Mapping[str, Sequence[Any]]) -> Callable[[], Records]:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"All columns need the same number of rows, got {lengths}.")
    return lambda: enumerate(dict(zip(columns, row)) for row in zip(*columns.values()))


def _open_bytes(file: Path) -> IO[bytes]:
    if file.suffix.lower() == ".zst":
        return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))
    return gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")  # type: ignore[return-value]


def _read_lines(file: Path) -> TextSource:
    def records() -> Records:
        with _open_bytes(file) as stream:
            for number, line in enumerate(stream, 1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                try:
                    yield number, {"text": text.decode("utf-8").rstrip("\r\n")}
                except UnicodeDecodeError as error:
                    yield number, _undecodable(error)

    return record_source(str(file), "line", records, has_fixed_columns=True)


def _undecodable(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 (byte {error.object[error.start]:#04x} at position {error.start}); save the file as UTF-8"


def _read_json_lines(file: Path) -> TextSource:
    def records() -> Records:
        with _open_bytes(file) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, _parse_json_line(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)

    return record_source(str(file), "line", records)


def _parse_json_line(line: bytes) -> Record:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _undecodable(error)
    except ValueError as error:
        return f"is not JSON ({error})"
    return record if isinstance(record, dict) else f"is a JSON {type(record).__name__}, not an object"


def _read_json(file: Path) -> TextSource:
    with _open_bytes(file) as stream:
        # Undecodable bytes become lone surrogates, which the check of the single texts refuses with their row.
        try:
            content = stream.read().decode("utf-8-sig", errors="surrogateescape").strip()
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"`{file}` cannot be read to its end: {error}.") from error
    try:
        loaded = json.loads(content)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _read_json_lines(file)  # `Dataset.to_json` writes JSON lines under this ending
        raise ValueError(f"`{file}` is not a JSON file: {error}.") from error
    is_coco = isinstance(loaded, dict) and isinstance(loaded.get("annotations"), list)
    if is_coco:
        loaded = loaded["annotations"]
    elif isinstance(loaded, dict) and "\n" not in content:
        return _read_json_lines(file)
    if not isinstance(loaded, list):
        raise ValueError(f"`{file}` holds a JSON {type(loaded).__name__}. Expected a list with one object per row.")
    source = record_source(str(file), "row", lambda: enumerate(checked_rows(loaded)))
    if is_coco and "image_id" in source.kinds:
        source.image_column = "image_id"
    return source


def _read_csv(file: Path) -> TextSource:
    def records() -> Records:
        # Undecodable bytes come as lone surrogates, which no valid file can hold, so they mark their row.
        with _open_bytes(file) as stream:
            first = stream.readline().removeprefix(b"\xef\xbb\xbf")
            delimiter = _delimiter_of(first, file)
            lines = (line.decode("utf-8", errors="surrogateescape") for line in itertools.chain([first], stream))
            reader = csv.reader(lines, delimiter=delimiter)
            try:
                header = next(reader, [])
                if len(set(header)) < len(header) or not header:
                    raise ValueError(f"`{file}` needs a first line with one distinct name per column, got {header}.")
                start = reader.line_num + 1
                for row in reader:
                    if row:
                        yield start, _csv_record(header, row)
                    start = reader.line_num + 1
            except csv.Error as error:
                where = describe_place(str(file), "line", reader.line_num)
                raise ValueError(f"{where} the file cannot be read as CSV from here on: {error}.") from error

    return record_source(str(file), "line", records, has_fixed_columns=True)


def _delimiter_of(line: bytes, file: Path) -> str:
    """What separates the names in the first line: what the ending says, or the one other character that can."""
    try:
        header = re.sub(r'"(?:[^"]|"")*"', "", line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{describe_place(str(file), 'line', 1)} {_undecodable(error)}.") from error
    usual = "\t" if format_of(file) == ".tsv" else ","
    found = [character for character in _DELIMITERS if character in header]
    if usual in found or not found:
        return usual
    if len(found) > 1:
        raise ValueError(
            f"`{file}` has no {usual!r} in its first line but {found}, so what separates its columns is not clear: "
            f"{line.decode().strip()[:80]!r}. Separate them by {usual!r}."
        )
    return found[0]


def _csv_record(header: Sequence[str], row: Sequence[str]) -> Record:
    if len(row) != len(header):
        return f"has {len(row)} fields, the header has {len(header)}"
    if not all(map(str.isascii, row)):
        try:
            "".join(row).encode("utf-8", errors="surrogateescape").decode("utf-8")
        except UnicodeDecodeError as error:
            return _undecodable(error)
    return dict(zip(header, row))


READERS: dict[str, Callable[[Path], TextSource]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_lines,
}


def format_of(file: Path) -> str:
    name = re.sub(r"\.(gz|zst)$", "", file.name.lower())
    ending = name[name.rfind(".") :] if "." in name else ""
    return ending if ending in READERS and (ending != ".parquet" or name == file.name.lower()) else ""
