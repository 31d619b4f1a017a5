# SPDX-License-Identifier: Apache-2.0
"""Captions and keys of image-text shards, to embed them before the images are streamed."""

from collections.abc import Mapping
from typing import Any

from .captions import CaptionTable
from .load_report import BadRows
from .shard_counts import make_shards


__all__ = ["load_shard_captions"]


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
    bad = BadRows(on_bad_row)
    fields = dict(caption_fields)
    columns: dict[str, list[list[str]]] = {source: [] for source in fields}
    keys: dict[str, None] = {}
    for shard in make_shards(shards, fields, image_column, key_column):
        for sample in shard.read(range(shard.count())):
            bad.report.rows_read += 1
            captions = {source: sample.captions.get(source, []) for source in fields}
            problem = sample.problem
            if not problem and not any(captions.values()):
                problem = f"it has no caption in {list(fields.values())}"
            if not problem and sample.key in keys:
                problem = "its key occurs before"
            if problem:
                bad.add("bad_rows", f"Sample `{sample.key}` of `{shard.name}`", f"cannot be used: {problem}.")
                continue
            keys[sample.key] = None
            for source, texts in captions.items():
                columns[source].append(texts)
    if not keys:
        raise ValueError(f"The shards hold no sample with a caption in {list(fields.values())}. Check the fields.")
    table = CaptionTable(columns)
    bad.report.rows_kept = len(keys)
    bad.report.texts_kept = table.num_captions
    bad.report.shared_texts = table.num_shared_captions
    bad.report.log("the shards")
    table.report = bad.report
    return table, list(keys)
