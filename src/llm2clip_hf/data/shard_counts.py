# SPDX-License-Identifier: Apache-2.0
"""Shards from what a user names, and how many samples each of them holds."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .shards import DatasetShard, ParquetShard, Shard, TarShard, expand_shard_paths
from .tar_members import COMPRESSIONS


__all__ = ["SamplesPerShard", "count_samples", "make_shards", "resolve_counts", "warn_of_absent_sources"]

logger = logging.getLogger(__name__)

_SAMPLES_TO_LOOK_AT = 64

SamplesPerShard = int | Sequence[int] | Mapping[str, int] | str | Path


def make_shards(shards: Any, fields: dict[str, str], image_column: str | None, key_column: str | None) -> list[Shard]:
    """
    The readers of all shards, in order.

    Args:
        shards: paths and patterns, or a `datasets.IterableDataset`.
        fields, image_column, key_column: as for `ImageTextStream`.

    Returns:
        list of shards.

    Raises:
        ValueError: if nothing is found, or a file is neither a tar nor a parquet file by its name.
    """
    if hasattr(shards, "num_shards") and hasattr(shards, "select_columns"):
        image_column = image_column or _find_image_column(shards)
        dataset = _undecoded(shards, image_column)
        return [DatasetShard(dataset, k, fields, image_column, key_column) for k in range(dataset.num_shards)]
    paths = expand_shard_paths(shards)
    if not paths:
        raise ValueError("`shards` is empty. Pass at least one tar or parquet file.")
    return [_file_shard(path, fields, image_column, key_column) for path in paths]


def resolve_counts(
    shards: Sequence[Shard], stated: SamplesPerShard | None, damages: list[str] | None = None
) -> np.ndarray:
    """
    Samples per shard, as stated or counted.

    Args:
        shards: the shards.
        stated (*optional*): one number, one per shard, a mapping from file name, or the path of a JSON file with one.
        damages (`list[str]`, *optional*):
            With a list, damaged shards count as far as they can be read, and their messages are appended.

    Returns:
        `np.ndarray` of shape `(num_shards,)`, int64.

    Raises:
        ValueError: if numbers are missing or not positive, or without `damages` if a shard is empty or damaged.
    """
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


def _file_shard(path: Path, fields: dict[str, str], image_column: str | None, key_column: str | None) -> Shard:
    if path.suffix == ".tgz" or (path.stem if path.suffix in COMPRESSIONS else path.name).endswith(".tar"):
        return TarShard(path, fields, image_column)
    if path.suffix == ".parquet":
        return ParquetShard(path, fields, image_column, key_column)
    raise ValueError(
        f"Shard `{path}` is neither a `.tar` nor a `.parquet` file; `.tar.gz` and `.tar.zst` are read too."
    )


def _find_image_column(dataset: Any) -> str:
    """`image`, or the only column of images, by the types where they are known, otherwise by the first row."""
    from datasets import Image

    def holds_image(value: Any) -> bool:
        return isinstance(value, (Image, bytes)) or (isinstance(value, dict) and "bytes" in value)

    columns: dict[str, Any] = dataset.features or next(iter(dataset.take(1)), {})
    kinds = {name: getattr(kind, "dtype", "") for name, kind in columns.items()}
    found = [name for name, kind in columns.items() if holds_image(kind) or kinds[name] in ("binary", "large_binary")]
    if "image" in columns or len(found) != 1:
        return "image"
    return found[0]


def _undecoded(dataset: Any, image_column: str) -> Any:
    from datasets import Image

    features = dataset.features or {}
    if isinstance(features.get(image_column), Image):
        return dataset.cast_column(image_column, Image(decode=False))
    return dataset
