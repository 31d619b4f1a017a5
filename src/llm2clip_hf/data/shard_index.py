# SPDX-License-Identifier: Apache-2.0
"""The shards that patterns stand for, how many samples they hold, and their captions, to embed them beforehand."""

import glob
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .captions import CaptionTable
from .images import undecoded_rows
from .reports import BadRows
from .shards import COMPRESSIONS, DatasetShard, ParquetShard, Shard, TarShard, UnreadableShardError
from .store.embedding_store import CaptionEmbeddingStore


logger = logging.getLogger(__name__)
_SAMPLES_TO_LOOK_AT = 64
_BRACES = re.compile(r"\{([^{}]*)\}")
SamplesPerShard = int | Sequence[int] | Mapping[str, int] | str | Path


def make_shards(shards: Any, fields: dict[str, str], image_column: str | None, key_column: str | None) -> list[Shard]:
    """The readers of all shards, in order."""
    if hasattr(shards, "num_shards") and hasattr(shards, "select_columns"):
        image_column = image_column or _find_image_column(shards)
        dataset = undecoded_rows(shards, image_column)
        return [DatasetShard(dataset, k, fields, image_column, key_column) for k in range(dataset.num_shards)]
    paths = _expand(shards)
    if not paths:
        raise ValueError("`shards` is empty. Pass at least one tar or parquet file.")
    return [_file_shard(path, fields, image_column, key_column) for path in paths]


def _expand(shards: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that brace patterns and globs stand for, in order."""
    patterns = [shards] if isinstance(shards, (str, Path)) else list(shards)
    paths = []
    for pattern in (text for entry in patterns for text in _expand_braces(str(entry))):
        found = [Path(pattern)] if Path(pattern).is_file() else _matching(pattern)
        if not found:
            raise ValueError(f"`{pattern}` matches no file. Check the paths and patterns in `shards`.")
        paths += found
    repeated = sorted({str(path) for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []
    if repeated:
        raise ValueError(f"Shards are named twice: {repeated[:3]}. Every shard is read once per epoch.")
    return paths


def _matching(pattern: str) -> list[Path]:
    """The files that a glob finds, without statistics, and tables beside tar files, both written by img2dataset."""
    found = [Path(name) for name in sorted(glob.glob(pattern)) if not name.endswith("_stats.json")]
    archives = {str(path)[: -len(".tar")] for path in found if path.suffix == ".tar"}
    return [path for path in found if path.suffix != ".parquet" or str(path)[: -len(".parquet")] not in archives]


def _expand_braces(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, dots, last = match[1].partition("..")
    if dots and first.isdigit() and last.isdigit():
        if int(first) > int(last):
            raise ValueError(f"`{pattern}` counts downwards. Write the smaller number first.")
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    elif "," in match[1]:
        choices = match[1].split(",")
    else:
        raise ValueError(f"`{pattern}` has braces that are neither `{{000..287}}` nor `{{a,b}}`.")
    return [
        text
        for choice in choices
        for text in _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def resolve_counts(
    shards: Sequence[Shard], stated: SamplesPerShard | None, damages: list[str] | None = None
) -> np.ndarray:
    """Samples per shard, as stated or counted."""
    if stated is None:
        counts = [shard.count(damages) for shard in shards]
        for shard, count in zip(shards, counts):
            if not count and damages is None:
                raise ValueError(f"Shard `{shard.name}` holds no sample. Leave it out, or write it again.")
        return np.array(counts, dtype=np.int64)
    if isinstance(stated, (str, Path)):
        stated = json.loads(Path(stated).read_text(encoding="utf-8"))
    if isinstance(stated, Mapping):
        names = [Path(shard.name).name for shard in shards]
        missing = [name for name in names if name not in stated]
        if missing:
            raise ValueError(f"`samples_per_shard` lacks {len(missing)} shards, first {missing[0]!r}.")
        stated = [stated[name] for name in names]
    numbers = [stated] * len(shards) if isinstance(stated, int) else list(stated)  # type: ignore[arg-type]
    if len(numbers) != len(shards):
        raise ValueError(f"`samples_per_shard` has {len(numbers)} numbers for {len(shards)} shards.")
    if any(not isinstance(number, (int, np.integer)) or number < 1 for number in numbers):
        raise ValueError(f"`samples_per_shard` must be positive integers, got {numbers[:5]}...")
    return np.array(numbers, dtype=np.int64)


def count_samples(shards: str | Path | Sequence[str | Path]) -> dict[str, int]:
    """
    Samples of tar or parquet shards, from their headers, for `samples_per_shard` of `ImageTextStream`.

    Args:
        shards: paths or patterns as for `ImageTextStream`.

    Returns:
        `dict[str, int]`: file name to number of samples; write it as JSON to count only once.

    Raises:
        ValueError: if a file is damaged or empty, or two have the same name in different folders.
    """
    readers = make_shards(shards, {}, None, None)
    counts = resolve_counts(readers, None).tolist()
    result = {Path(reader.name).name: count for reader, count in zip(readers, counts)}
    if len(result) < len(readers):
        raise ValueError("Shards in different folders have the same name. Count them folder by folder.")
    return result


def warn_of_absent_sources(shards: Sequence[Shard], counts: np.ndarray, fields: Mapping[str, str]) -> None:
    """A warning for each source without a caption in the first samples: a misspelt field looks like that."""
    first = int(np.flatnonzero(counts)[0]) if counts.any() else -1
    if first < 0 or not fields:
        return
    samples = list(shards[first].read(range(min(int(counts[first]), _SAMPLES_TO_LOOK_AT))))
    for source, field in fields.items():
        if not any(sample.captions.get(source) for sample in samples):
            logger.warning(
                "None of the first %d samples of `%s` has a caption of source `%s` in `%s`. Check `caption_fields`.",
                len(samples),
                shards[first].name,
                source,
                field,
            )


def source_fields(caption_fields: Mapping[str, str] | None, store: CaptionEmbeddingStore | None) -> dict[str, str]:
    """The caption fields, where there is a store in the order of its sources, by which captions are numbered."""
    if caption_fields is None and store is None:
        raise ValueError("Pass `caption_fields`, for captions as text, or `store`, for stored embeddings, or both.")
    fields = dict(caption_fields or {})
    if store is None or caption_fields is None:
        return fields
    if set(fields) != set(store.source_names):
        raise ValueError(
            f"`caption_fields` names the sources {sorted(fields)}, the store `{store.path}` has "
            f"{sorted(store.source_names)}. Pass the fields that it was made with."
        )
    return {name: fields[name] for name in store.source_names}


def _file_shard(path: Path, fields: dict[str, str], image_column: str | None, key_column: str | None) -> Shard:
    if path.suffix == ".tgz" or (path.stem if path.suffix in COMPRESSIONS else path.name).endswith(".tar"):
        return TarShard(str(path), fields, image_column)
    if path.suffix == ".parquet":
        return ParquetShard(str(path), fields, image_column, key_column)
    raise ValueError(
        f"Shard `{path}` is neither a `.tar` nor a `.parquet` file; `.tar.gz` and `.tar.zst` are read too."
    )


def _find_image_column(dataset: Any) -> str:
    """`image`, or the only column of images, by the types where they are known, otherwise by the first row."""
    from .columns import image_columns

    if dataset.features:
        names, found = list(dataset.features), image_columns(dataset.features.arrow_schema)
    else:
        row: dict[str, Any] = next(iter(dataset.take(1)), {})
        names = list(row)
        found = [n for n, v in row.items() if isinstance(v, bytes) or (isinstance(v, dict) and "bytes" in v)]
    return "image" if "image" in names or len(found) != 1 else found[0]


def load_shard_captions(
    shards: Any,
    caption_fields: Mapping[str, str],
    *,
    image_column: str | None = None,
    key_column: str | None = None,
    on_bad_row: str = "error",
) -> tuple[CaptionTable, list[str]]:
    """
    The captions of all samples of shards, and their keys, for `embed_captions(..., keys=keys)`.

    Args:
        shards: as for `ImageTextStream`.
        caption_fields (mapping from source name to `str`): as for `ImageTextStream`.
        image_column (`str`, *optional*): as for `ImageTextStream`.
        key_column (`str`, *optional*): as for `ImageTextStream`.
        on_bad_row (`"error"` or `"skip"`, defaults to `"error"`):
            What to do with a sample that is damaged, has no caption, or whose key occurred before; skipped ones are
            counted in the `report` of the table.

    Returns:
        `tuple[CaptionTable, list[str]]`: captions in the order of the shards, and one key per sample.

    Raises:
        ValueError: if no sample is left, or, with `on_bad_row="error"`, one is bad; names shard and key.

    Example:
    >>> table, keys = load_shard_captions("cc3m/{00000..00287}.tar", {"real": "json.caption"})  # doctest: +SKIP
    >>> store = embed_captions(model, table, "store", keys=keys, tokenizer=tokenizer)  # doctest: +SKIP
    """
    readers = make_shards(shards, dict(caption_fields), image_column, key_column)
    return captions_of_shards(readers, caption_fields, on_bad_row)


def captions_of_shards(
    readers: Sequence[Shard], caption_fields: Mapping[str, str], on_bad_row: str
) -> tuple[CaptionTable, list[str]]:
    """`load_shard_captions` of opened shards; image bytes are passed over."""
    bad = BadRows(on_bad_row)
    columns: dict[str, list[list[str]]] = {source: [] for source in caption_fields}
    keys: dict[str, None] = {}
    for shard in readers:
        try:
            for sample in shard.read_captions():
                bad.report.rows_read += 1
                problem = sample.problem
                if not problem and not any(sample.captions.values()):
                    problem = f"it has no caption in {list(caption_fields.values())}"
                if not problem and sample.key in keys:
                    problem = "its key occurs before"
                if problem:
                    bad.add("bad_rows", f"Sample `{sample.key}` of `{shard.name}`", f"cannot be used: {problem}.")
                    continue
                keys[sample.key] = None
                for source, texts in columns.items():
                    texts.append(sample.captions.get(source, []))
        except UnreadableShardError as error:
            # What comes before the damage is used.
            bad.add("bad_rows", str(error), "What is behind is lost.")
    if not keys:
        raise ValueError(
            f"The shards hold no sample with a caption in {list(caption_fields.values())}. Check the fields."
        )
    table = CaptionTable(columns)
    table.report = bad.finish("the shards", len(keys), table.num_captions, table.num_shared_captions)
    return table, list(keys)


__all__ = [
    "SamplesPerShard",
    "captions_of_shards",
    "count_samples",
    "load_shard_captions",
    "make_shards",
    "resolve_counts",
    "source_fields",
    "warn_of_absent_sources",
]
