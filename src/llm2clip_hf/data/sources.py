# SPDX-License-Identifier: Apache-2.0
"""
Tables of images with any other columns, such as labels or texts in many languages; images stay undecoded.

`load_image_text` reads images with captions. What has other columns is opened here, and read column by column.
"""

import csv
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict

from .caption_entries import root_column, with_entries
from .columns import arrow_entry, arrow_kinds, describe_kinds, learn_kinds
from .images import IMAGE_ENDINGS, METADATA_FILES, PATH_COLUMNS, ImageSource, is_address
from .reports import BadRows, describe_place, text_problem
from .source_splits import choose_split, is_data_file, open_named


if TYPE_CHECKING:
    import datasets

    from .columns import TextColumn


_TABLE_ENDINGS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")


class ImageTable:
    """A table with a column of undecoded images."""

    def __init__(self, dataset: "datasets.Dataset", image_column: str, name: str) -> None:
        from datasets import Image

        if isinstance(dataset.features[image_column], Image):
            dataset = dataset.cast_column(image_column, Image(decode=False))
        self.dataset, self.image_column, self.name = dataset, image_column, name

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return list(self.dataset.column_names)

    @property
    def images(self) -> ImageSource:
        """The undecoded images, one row read per access."""
        return _Images(self.dataset.select_columns([self.image_column]), self.image_column)

    def column(self, name: str) -> list[Any]:
        """Values of the column `name`; a `ValueError` lists the columns if there is none."""
        if name not in self.columns:
            raise ValueError(f"`{self.name}` has no column `{name}`; it has {self.columns}.")
        return self.dataset[name][:]

    def class_names(self, label_column: str) -> list[str] | None:
        """Names that the type of a label column holds, if it holds any."""
        return getattr(self.dataset.features.get(label_column), "names", None)

    def select(self, rows: Sequence[int]) -> "ImageTable":
        """The table of these rows."""
        return ImageTable(self.dataset.select(rows), self.image_column, self.name)


class _Images(Sequence[Any]):
    def __init__(self, rows: "datasets.Dataset", column: str) -> None:
        self._rows, self._column = rows, column

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        return self._rows[row][self._column]


def holds_image_paths(source: str | Path) -> bool:
    """Whether `source` is a table whose rows name image files: not parquet, no saved data set, no Hub name."""
    path = Path(source)
    if path.is_dir():
        return any(found.is_file() for name in METADATA_FILES for found in (path / name, *path.glob(f"*/{name}")))
    return path.is_file() and path.suffix in _TABLE_ENDINGS and path.suffix != ".parquet"


def open_image_table(
    source: str | Path,
    *,
    image_column: str | None = None,
    image_root: str | Path | None = None,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    where: Mapping[str, str] | None = None,
) -> ImageTable:
    """Open a table of images."""
    dataset = _open(source, split, subset, revision)
    column = image_column or _find_image_column(dataset, str(source))
    if column not in dataset.column_names:
        raise ValueError(f"`{source}` has no column `{column}`; it has {dataset.column_names}.")
    for key, value in (where or {}).items():
        if key not in dataset.column_names:
            raise ValueError(f"`{source}` has no column `{key}` to select by; it has {dataset.column_names}.")
        dataset = dataset.select([row for row, entry in enumerate(dataset[key][:]) if str(entry) == value])
    if not len(dataset):
        raise ValueError(f"`{source}` has no row{f' where {dict(where)}' if where else ''}. Check path and selection.")
    if getattr(dataset.features[column], "dtype", None) in ("string", "large_string"):
        dataset = _with_full_paths(dataset, column, _root_of(source, image_root))
    return ImageTable(dataset, column, str(source))


def _open(source: str | Path, split: str | None, subset: str | None, revision: str | None) -> "datasets.Dataset":
    try:
        from .source_splits import is_data_file, metadata_files, open_named
    except ImportError as error:
        raise ImportError("Loading needs `datasets`. Install it with `pip install llm2clip-hf[eval]`.") from error
    opened = open_named(source, split, subset, default="test", revision=revision)
    if not isinstance(opened, list):
        return opened
    if not Path(source).is_dir():
        if wrong := [file for file in opened if file.suffix not in _TABLE_ENDINGS]:
            raise ValueError(f"`{wrong[0]}` has none of the known endings {list(_TABLE_ENDINGS)}.")
        return _read_files(opened)
    if metadata := metadata_files(Path(source), opened):
        return _read_image_folder(Path(source), opened, metadata)
    tables = [file for file in opened if file.suffix in _TABLE_ENDINGS and is_data_file(file)]
    if tables:
        return _read_files([file for file in tables if file.suffix == ".parquet"] or tables)
    return _read_class_folders(Path(source), [file for file in opened if file.suffix.lower() in IMAGE_ENDINGS])


def _read_image_folder(folder: Path, files: Any, metadata: list[Path]) -> "datasets.Dataset":
    from datasets import concatenate_datasets

    others, parts = set(files.others), []
    for file in metadata:
        rows = _read_files([file])
        column = next((name for name in PATH_COLUMNS if name in rows.column_names), None)
        if column is not None and (others or file.parent != folder):
            paths = [None if name is None else file.parent / name for name in rows[column][:]]
            names = [path and os.path.relpath(path, folder) for path in paths]
            rows = rows.remove_columns([column]).add_column(column, names)
            rows = rows.select([row for row, path in enumerate(paths) if path not in others])
        parts.append(rows)
    return concatenate_datasets(parts)


def _read_class_folders(folder: Path, images: list[Path]) -> "datasets.Dataset":
    from datasets import ClassLabel, Dataset, Features, Value

    for below in (below for below in sorted(folder.iterdir()) if below.is_dir() and not below.name.startswith(".")):
        if not any(file.suffix.lower() in IMAGE_ENDINGS for file in below.rglob("*")):
            raise ValueError(f"The class folder `{below}` has no image. Fill it, or delete it.")
    classes = sorted({file.parent.name for file in images if file.parent != folder})
    if not classes:
        raise ValueError(
            f"The folder `{folder}` has neither tables, nor one of {list(METADATA_FILES)}, nor class folders."
        )
    images = [file for file in images if file.parent != folder]
    rows = {
        "image": [str(file.relative_to(folder)) for file in images],
        "label": [classes.index(file.parent.name) for file in images],
    }
    return Dataset.from_dict(rows, features=Features({"image": Value("string"), "label": ClassLabel(names=classes)}))


def _read_files(files: list[Path]) -> "datasets.Dataset":
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    from .source_splits import open_parquet

    names = [str(file) for file in files]
    try:
        if files[0].suffix == ".parquet":
            return open_parquet(files)
        if files[0].suffix in (".csv", ".tsv"):
            return Dataset.from_csv(names, **({"sep": "\t"} if files[0].suffix == ".tsv" else {}))
        return Dataset.from_json(names)
    except (DatasetGenerationError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{', '.join(f'`{name}`' for name in names)} cannot be read: {cause}") from error


def _find_image_column(dataset: "datasets.Dataset", name: str) -> str:
    from datasets import Image

    def holds_images(feature: Any) -> bool:
        if isinstance(feature, Image) or (isinstance(feature, dict) and "bytes" in feature):
            return True
        return getattr(feature, "dtype", None) in ("binary", "large_binary")

    found = [column for column, feature in dataset.features.items() if holds_images(feature)]
    if not found:
        found = [column for column in PATH_COLUMNS if getattr(dataset.features.get(column), "dtype", None) == "string"]
    if "image" in found:
        return "image"
    if len(found) != 1:
        raise ValueError(
            f"`{name}` has {len(found)} image columns {found} among {dataset.column_names}. Name one as "
            "`image_column`."
        )
    return found[0]


def _root_of(source: str | Path, image_root: str | Path | None) -> Path:
    if image_root is not None:
        return Path(image_root)
    return Path(source) if Path(source).is_dir() else Path(source).parent


def _with_full_paths(dataset: "datasets.Dataset", column: str, root: Path) -> "datasets.Dataset":
    names = dataset[column][:]
    if addresses := [row for row, name in enumerate(names) if is_address(name)]:
        raise ValueError(
            f"Row {addresses[0]} names the image `{names[addresses[0]]}`, which is an address ({len(addresses)} of "
            f"{len(names)} are), and nothing is fetched. Download the images and give their paths."
        )
    paths = [None if name is None else os.path.join(root, name) for name in names]
    missing = [row for row, path in enumerate(paths) if path is None or not os.path.isfile(path)]
    if missing:
        raise ValueError(
            f"Row {missing[0]} names the image `{paths[missing[0]]}`, which does not exist ({len(missing)} of "
            f"{len(paths)} images are missing). Complete the folder, or set `image_root`."
        )
    return dataset.remove_columns([column]).add_column(column, paths)


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


@dataclass
class TextSource:
    """One table of rows."""

    name: str
    kinds: dict[str, str]
    blocks: Callable[[Sequence[str]], Iterator[Block]]
    image_column: str | None = None


def open_source(
    source: Any, split: str | None = None, subset: str | None = None, default_split: str = "train"
) -> list[TextSource]:
    """The tables behind a source; several if it is a folder or a pattern of several files."""
    if isinstance(source, (str, Path)):
        opened = open_named(source, split, subset, default=default_split)
        return [_dataset_source(opened, str(source))] if isinstance(opened, Dataset) else open_files(source, opened)
    if isinstance(source, DatasetDict):
        source, split = source[choose_split(source, split, default_split, "the data set")], None
    if split is not None or subset is not None:
        raise ValueError(
            f"`split` ({split}) and `subset` ({subset}) choose a part of a data set; `source` is a "
            f"{type(source).__name__}, which is one table. Leave them out."
        )
    if isinstance(source, Dataset):
        return [_dataset_source(source)]
    if isinstance(source, Mapping):
        return [_record_source("", "row", _rows_of_columns(source))]
    if isinstance(source, Sequence):
        return [_record_source("", "row", lambda: enumerate(_checked_rows(source)))]
    raise ValueError(
        f"`source` is a {type(source).__name__}. Pass a path, the name of a Hub data set, a `datasets.Dataset`, a "
        "mapping of columns, or a sequence of rows."
    )


def open_files(source: str | Path, files: list[Path]) -> list[TextSource]:
    """The tables in the files of `source`, all of one kind."""
    if Path(source).is_dir():
        tables = [file for file in files if is_data_file(file) and _format_of(file)]
        # Text files that describe the data beside them are no data.
        files = [file for file in tables if _format_of(file) != ".txt"] or tables
        if not files:
            raise ValueError(f"The folder `{source}` has no file that ends in one of {sorted(_READERS)}.")
    formats = {_format_of(file) for file in files}
    if "" in formats:
        raise ValueError(f"`{source}` has none of the known endings {sorted(_READERS)} (or these with `.gz`, `.zst`).")
    if len(formats) > 1:
        raise ValueError(
            f"`{source}` mixes files of the kinds {sorted(formats)}: {[file.name for file in files[:5]]}. Pass one "
            "kind, for example by a pattern such as `folder/*.parquet`."
        )
    return [_READERS[_format_of(file)](file) for file in files]


def _format_of(file: Path) -> str:
    name = re.sub(r"\.(gz|zst)$", "", file.name.lower())
    ending = name[name.rfind(".") :] if "." in name else ""
    return ending if ending in _READERS and (ending != ".parquet" or name == file.name.lower()) else ""


# ------------------------------------------------------------------------------------------------------------- Arrow


def _dataset_source(dataset: Dataset, name: str = "") -> TextSource:
    def blocks(columns: Sequence[str]) -> Iterator[Block]:
        # Slices of a memory-mapped table are views; only a shuffled or selected data set is gathered, block by block.
        roots = dict.fromkeys(root_column(dataset.column_names, column) for column in columns)
        rows = dataset.select_columns(list(roots)).with_format("arrow")
        for start in range(0, len(dataset), ROWS_PER_BLOCK):
            yield from _arrow_blocks(rows[start : start + ROWS_PER_BLOCK], columns, name, start)

    return TextSource(name, arrow_kinds(dataset.features.arrow_schema), blocks)


def _read_parquet(file: Path) -> TextSource:
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"`{file}` is not a readable parquet file: {error}") from error

    def blocks(columns: Sequence[str]) -> Iterator[Block]:
        start = 0
        try:
            with pq.ParquetFile(file) as reader:
                roots = dict.fromkeys(root_column(schema.names, column) for column in columns)
                for batch in reader.iter_batches(ROWS_PER_BLOCK, columns=list(roots)):
                    yield from _arrow_blocks(pa.Table.from_batches([batch]), columns, str(file), start)
                    start += len(batch)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"`{file}` cannot be read after row {start}: {error}.") from error

    return TextSource(str(file), arrow_kinds(schema), blocks)


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


# ----------------------------------------------------------------------------------------------------------- records


def _record_source(
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


def _checked_rows(rows: Sequence[Any]) -> Iterator[Record]:
    for row in rows:
        if isinstance(row, Mapping):
            yield row
        elif isinstance(row, str) or (isinstance(row, Sequence) and not isinstance(row, bytes)):
            yield {"captions": row}
        else:
            yield f"is a {type(row).__name__}, not a mapping from column to text"


def _rows_of_columns(columns: Mapping[str, Sequence[Any]]) -> Callable[[], Records]:
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

    return _record_source(str(file), "line", records, has_fixed_columns=True)


def _undecodable(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 (byte {error.object[error.start]:#04x} at position {error.start}); save the file as UTF-8"


def _read_json_lines(file: Path) -> TextSource:
    def records() -> Records:
        with _open_bytes(file) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, _parse_json_line(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)

    return _record_source(str(file), "line", records)


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
    source = _record_source(str(file), "row", lambda: enumerate(_checked_rows(loaded)))
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

    return _record_source(str(file), "line", records, has_fixed_columns=True)


def _delimiter_of(line: bytes, file: Path) -> str:
    """What separates the names in the first line: what the ending says, or the one other character that can."""
    try:
        header = re.sub(r'"(?:[^"]|"")*"', "", line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{describe_place(str(file), 'line', 1)} {_undecodable(error)}.") from error
    usual = "\t" if _format_of(file) == ".tsv" else ","
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


_READERS: dict[str, Callable[[Path], TextSource]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_lines,
}


def open_text_source(
    source: Any, split: str | None, subset: str | None, default_split: str = "train"
) -> "list[TextSource]":
    """`open_source`, with a readable message where `datasets` is not installed."""
    try:
        pass
    except ImportError as error:
        raise ImportError(
            "Loading texts needs `datasets`. Install it with `pip install llm2clip-hf[train]`."
        ) from error
    return open_source(source, split, subset, default_split)


def good_blocks(sources: "list[TextSource]", columns: Sequence[str], bad: BadRows) -> "Iterator[Block]":
    """The blocks of all tables, without their unreadable rows, which are counted."""
    for source in sources:
        if absent := [column for column in columns if column not in source.kinds]:
            raise ValueError(
                f"`{source.name}` has no column {absent}, which other files have or `columns` names; it has "
                f"{describe_kinds(source.kinds)}."
            )
        for block in source.blocks(columns):
            bad.report.rows_read += len(block.numbers) + len(block.broken)
            for number, problem in block.broken:
                bad.add("bad_rows", describe_place(block.file, block.unit, number), f"the row {problem}")
            yield block


def _clean(block: "Block", columns: list[str], bad: BadRows) -> "list[TextColumn]":
    """The columns of a block without their bad captions; one entry per row, which may be empty."""
    import pyarrow as pa

    from .columns import TextColumn, is_surely_clean, texts_to_array, to_python

    arrays = [block.columns[column] for column in columns]
    if all(isinstance(array, pa.Array) and is_surely_clean(array) for array in arrays):
        return [TextColumn([array]) for array in arrays]
    cleaned = []
    for column, array in zip(columns, arrays):
        values = to_python(array) if isinstance(array, pa.Array) else array
        rows = []
        for number, value in zip(block.numbers, values):
            rows.append(value if _is_clean(value) else _clean_entry(value, column, block, number, bad))
        cleaned.append(TextColumn([texts_to_array(rows)]))
    return cleaned


def _is_clean(value: Any) -> bool:
    if isinstance(value, str):
        return text_problem(value) is None
    return isinstance(value, (list, tuple)) and all(text_problem(text) is None for text in value)


def _clean_entry(value: Any, column: str, block: "Block", number: int, bad: BadRows) -> list[str]:
    texts = value if isinstance(value, (list, tuple)) else [value]
    kept = []
    for text in texts:
        if problem := text_problem(text):
            where = describe_place(block.file, block.unit, number)
            bad.add("bad_texts", where, f"a caption in column `{column}` {problem}: {str(text)[:60]!r}")
        else:
            kept.append(text)
    return kept


__all__ = ["ImageTable", "holds_image_paths", "open_image_table"]
