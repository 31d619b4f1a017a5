# SPDX-License-Identifier: Apache-2.0
"""Caption pairs from data sets that are larger than a disk: streamed, and still the same for any number of workers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .caption_columns import learn_kinds, resolve_caption_columns
from .pair_draws import resolve_sides


if TYPE_CHECKING:
    import datasets

    from .caption_stream import CaptionPairStream


__all__ = ["stream_caption_pairs"]

_ROWS_PER_BATCH = 64
_ROWS_TO_LEARN_COLUMNS = 100


def stream_caption_pairs(
    dataset: "datasets.IterableDataset",
    columns: str | Sequence[str] | Mapping[str, str] | None = None,
    *,
    id_column: str | None = None,
    id_from_content: bool = False,
    seed: int = 0,
    pair_sources: tuple[str, str] | None = None,
    instruction: str | None = None,
    on_bad_row: str = "error",
) -> "CaptionPairStream":
    """
    Two distinct captions per image from a stream: `CaptionPairDataset` for data that are not on this machine.

    A row is identified by `id_column` (an integer as it is; a string by its hash), by the text of its captions, or by
    its position in the stream. The identifier is the `label`, and takes the place of the row number in the draw: the
    pair is a pure function of `(seed, epoch, identifier)`. So with the row number as identifier the pairs equal those
    of `CaptionPairDataset` of the same rows. The position only identifies a row in a stream of a single shard:
    workers and ranks that share several shards count each from zero. Shuffle the returned stream, not `dataset`,
    whose positions would no longer be those of its rows. Hard negatives need access to all rows, so a stream has none.

    Args:
        dataset (`datasets.IterableDataset`): rows with captions, for example `load_dataset(..., streaming=True)`.
        columns (*optional*):
            Caption columns, as for `load_captions`; of a stream without declared features, found in its first rows.
        id_column (`str`, *optional*):
            Column with a unique, non-negative integer or a unique string per image, such as its key or URL. Needed
            with several shards unless `id_from_content` is set.
        id_from_content (`bool`, defaults to `False`):
            Identify a row by its captions; images with equal captions then share a label, so they are never each
            other's negatives.
        seed (`int`, defaults to 0): seed of the draws.
        pair_sources (two name patterns, *optional*): as for `CaptionPairDataset`.
        instruction (`str`, *optional*): as for `CaptionPairDataset`.
        on_bad_row (`str`, defaults to `"error"`):
            `"error"` raises at a caption that is null, empty or no valid text, an image without two distinct captions,
            and a bad id. `"skip"` leaves them out; the stream's `report` counts them, and the first in each process is
            logged.

    Returns:
        `datasets.IterableDataset` of `{"anchor": str, "positive": str, "label": int}` with `set_epoch(epoch)`,
        `instruction`, and `report` (`LoadReport`). Streams made by its methods, such as `shuffle`, have these too and
        draw with it: the epoch set on either counts. `split_dataset_by_node` of `datasets` gives a plain stream, which
        draws the pairs of the epoch that is set here.

    Raises:
        ValueError: if the columns do not fit, or the rows cannot be identified.

    Example:
    >>> import datasets
    >>> rows = datasets.Dataset.from_dict({"captions": [["a cat", "a grey cat"], ["a dog", "two dogs"]]})
    >>> stream = stream_caption_pairs(rows.to_iterable_dataset(), seed=1)
    >>> stream.set_epoch(2)
    >>> [row["label"] for row in stream], stream.report.rows_kept
    ([0, 1], 2)
    """
    try:
        import datasets

        from .caption_stream import FEATURES, CaptionPairStream, PairDraw
    except ImportError as error:
        raise ImportError(
            "`stream_caption_pairs` needs `datasets`. Install it with `pip install llm2clip-hf[train]`."
        ) from error
    if not isinstance(dataset, datasets.IterableDataset):
        raise ValueError(
            f"`dataset` must be a `datasets.IterableDataset`, got {type(dataset).__name__}. Use `CaptionPairDataset` "
            "for data with random access."
        )
    kinds = _column_kinds(dataset)
    chosen = resolve_caption_columns(columns, kinds, "")
    _check_identity(dataset, kinds, id_column, id_from_content)
    sides = None if pair_sources is None else resolve_sides(pair_sources, tuple(chosen))
    draw = PairDraw(tuple(chosen.values()), id_column, id_from_content, seed, sides, on_bad_row)
    needed = list(dict.fromkeys([*chosen.values(), *([id_column] if id_column else [])]))
    mapped = dataset.select_columns(needed).map(
        draw,
        with_indices=True,
        batched=True,
        batch_size=_ROWS_PER_BATCH,
        remove_columns=needed,
        features=datasets.Features({name: datasets.Value(kind) for name, kind in FEATURES.items()}),
    )
    return CaptionPairStream(mapped, draw, instruction)


def _check_identity(
    dataset: "datasets.IterableDataset", kinds: Mapping[str, str], id_column: str | None, id_from_content: bool
) -> None:
    if id_column is not None and id_from_content:
        raise ValueError("`id_column` and `id_from_content` exclude each other. Give one of them.")
    if id_column is not None and id_column not in kinds:
        raise ValueError(f"There is no id column `{id_column}`; the stream has {sorted(kinds)}.")
    if id_column is None and not id_from_content and dataset.num_shards > 1:
        raise ValueError(
            f"The stream has {dataset.num_shards} shards, so the position of a row depends on who reads them. Name a "
            "column that identifies each image with `id_column`, or set `id_from_content=True`."
        )


def _column_kinds(dataset: "datasets.IterableDataset") -> dict[str, str]:
    from .text_columns import column_kind

    if dataset.features is not None:
        return {column.name: column_kind(column.type) for column in dataset.features.arrow_schema}
    kinds = learn_kinds(dataset.take(_ROWS_TO_LEARN_COLUMNS), of_null="string")
    if not kinds:
        raise ValueError("The stream has no row.")
    return kinds
