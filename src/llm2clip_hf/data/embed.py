# SPDX-License-Identifier: Apache-2.0
"""
Embed all captions of a data set once, into a `CaptionEmbeddingStore`.

(1) Number the captions in one flat order and write the plan and the layout.
(2) Shard by shard: sort the captions by length, cut them into batches of a token budget, encode, write the shard.
(3) When every shard is there, write the index, which makes the folder a store.

A killed run leaves finished shards with their records; the next call with the same arguments does the rest.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .atomic import sha256_of_file, write_atomically, write_json_atomically
from .captions import Captions, CaptionTable
from .embedding_store import (
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_FILE,
    LAYOUT_FILE,
    PLAN_FILE,
    CaptionEmbeddingStore,
    fingerprint_differences,
    torch_dtype_of,
)
from .fingerprint import FingerprintValue
from .text_encoders import TextEncoder, as_text_encoder


__all__ = ["embed_captions", "token_budget_batches"]

logger = logging.getLogger(__name__)


def embed_captions(
    encoder: Any,
    captions: Captions | CaptionTable,
    output_dir: str | Path,
    *,
    fingerprint: Mapping[str, FingerprintValue] | None = None,
    tokenizer: Any = None,
    max_length: int = 512,
    dtype: str = "float16",
    max_tokens_per_batch: int = 16384,
    rows_per_shard: int = 32768,
    show_progress: bool = True,
) -> CaptionEmbeddingStore:
    """
    Encode every caption with the LLM and store the embeddings on disk.

    The call is idempotent: a finished store of the same captions and fingerprint is returned as it is, an unfinished
    one is resumed at the first missing shard. A folder made with anything else is refused, never overwritten.

    Args:
        encoder:
            One of: a function from a list of `n` strings to a tensor of shape `(n, dim)`; an object with an `encode`
            method, such as a `SentenceTransformer`; or an `LLM2CLIPModel` together with `tokenizer`. It must give the
            embedding that the text adapter expects: pooled, not normalized.
        captions: as for `CaptionTable`: captions per image, or a mapping from source name to captions per image.
        output_dir (`str` or `Path`): folder of the store; created if needed.
        fingerprint (mapping of JSON scalars, *optional*):
            What the embeddings depend on, see `embedding_fingerprint`. Needed unless `encoder` is an `LLM2CLIPModel`.
        tokenizer (*optional*): tokenizer of an `LLM2CLIPModel`.
        max_length (`int`, defaults to 512):
            Tokens per caption with an `LLM2CLIPModel`; the paper's value (section 4.1). Other encoders truncate for
            themselves.
        dtype (`str`, defaults to `"float16"`):
            `"float16"`, `"bfloat16"` or `"float32"`. Halves have 11 bits of precision, bfloat16 8; an embedding that
            overflows in the chosen dtype is an error.
        max_tokens_per_batch (`int`, defaults to 16384): rows times length of the longest caption in a batch.
        rows_per_shard (`int`, defaults to 32768): captions per file; also the work that a kill can cost.
        show_progress (`bool`, defaults to `True`): show a progress bar over the captions.

    Returns:
        `CaptionEmbeddingStore`: the finished store, opened.

    Raises:
        ValueError: if an argument is invalid, the folder belongs to other captions or another encoder, or the encoder
            gives a wrong shape or a value that is not finite in `dtype`.

    Example:
    >>> import tempfile
    >>> encode = lambda texts: torch.tensor([[float(len(text)), 1.0] for text in texts])
    >>> folder = tempfile.mkdtemp()
    >>> store = embed_captions(encode, ["a", "bb", "ccc"], folder, fingerprint={"llm": "length"}, show_progress=False)
    >>> store.gather([2, 0]).tolist()
    [[3.0, 1.0], [1.0, 1.0]]
    """
    torch_dtype = torch_dtype_of(dtype)
    for name, value in {"max_tokens_per_batch": max_tokens_per_batch, "rows_per_shard": rows_per_shard}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    text_encoder = as_text_encoder(encoder, tokenizer, max_length)
    fingerprint = text_encoder.fingerprint() if fingerprint is None else dict(fingerprint)
    table = captions if isinstance(captions, CaptionTable) else CaptionTable(captions)
    folder = Path(output_dir)

    # Step (1)
    plan = _plan(table, fingerprint, dtype, rows_per_shard)
    if (folder / INDEX_FILE).is_file():
        return _reopen(folder, plan)
    _start(folder, plan, table)

    # Step (2)
    with tqdm(total=table.num_captions, desc="Embedding captions", disable=not show_progress) as progress:
        for shard in range(_num_shards(plan)):
            start = shard * rows_per_shard
            stop = min(start + rows_per_shard, table.num_captions)
            if not _is_finished(folder, shard):
                texts = table.rows(start, stop)
                embeddings = _encode_shard(text_encoder, texts, start, torch_dtype, max_tokens_per_batch, progress)
                _write_shard(folder, shard, embeddings)
            else:
                progress.update(stop - start)

    # Step (3)
    return _finish(folder, plan)


def token_budget_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """
    Cut items into batches of similar length under a budget of padded tokens.

    Longest first, so that a batch that does not fit in memory fails at the start. An item longer than the budget
    makes a batch of its own.

    Args:
        lengths (sequence of `int`): tokens of each item.
        max_tokens (`int`): largest allowed number of items times the longest length in a batch.

    Returns:
        Iterator over lists of item numbers; every item is in exactly one list.

    Example:
    >>> list(token_budget_batches([2, 9, 3, 2], max_tokens=6))
    [[1], [2, 0], [3]]
    """
    batch: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _plan(
    table: CaptionTable, fingerprint: Mapping[str, FingerprintValue], dtype: str, rows_per_shard: int
) -> dict[str, Any]:
    """Everything that must agree between the runs that fill one folder."""
    plan = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "num_images": len(table),
        "num_captions": table.num_captions,
        "rows_per_shard": rows_per_shard,
        "source_names": list(table.source_names),
        "captions_sha256": table.sha256,
        "fingerprint": dict(fingerprint),
    }
    # Through JSON and back, so that a comparison with a file never fails on a tuple or a numpy number.
    return json.loads(json.dumps(plan))


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The plan with the fingerprint's keys beside its own, for messages that name single keys."""
    rest = {key: value for key, value in plan.items() if key != "fingerprint"}
    return rest | {f"fingerprint.{key}": value for key, value in plan["fingerprint"].items()}


def _refuse_differences(folder: Path, found: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    differences = fingerprint_differences(_flat(found), _flat(plan))
    if differences:
        raise ValueError(
            f"`{folder}` holds embeddings made in another way: {differences}. "
            "Choose another `output_dir`, or delete the folder to embed again."
        )


def _reopen(folder: Path, plan: Mapping[str, Any]) -> CaptionEmbeddingStore:
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    _refuse_differences(folder, {key: index.get(key) for key in plan}, plan)
    logger.info("The embeddings in %s are complete; nothing to do.", folder)
    return CaptionEmbeddingStore.open(folder)


def _start(folder: Path, plan: dict[str, Any], table: CaptionTable) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plan_file = folder / PLAN_FILE
    if plan_file.is_file():
        _refuse_differences(folder, json.loads(plan_file.read_text(encoding="utf-8")), plan)
        finished = sum(_is_finished(folder, shard) for shard in range(_num_shards(plan)))
        logger.info("Resuming in %s: %d of %d shards are finished.", folder, finished, _num_shards(plan))
    elif leftovers := sorted(file.name for file in folder.glob("embeddings-*")):
        raise ValueError(
            f"`{folder}` holds {leftovers[:3]} of an unknown run, but no `{PLAN_FILE}` and no `{INDEX_FILE}`. "
            "Choose another `output_dir`, or delete the folder."
        )
    layout = {"offsets": torch.from_numpy(table.offsets), "source_ids": torch.from_numpy(table.source_ids)}
    write_atomically(folder / LAYOUT_FILE, lambda temporary: save_file(layout, temporary))
    write_json_atomically(plan_file, plan)


def _encode_shard(
    encoder: TextEncoder,
    texts: list[str],
    first_row: int,
    dtype: torch.dtype,
    max_tokens: int,
    progress: "tqdm[Any]",
) -> torch.Tensor:
    # Web captions repeat; equal texts are encoded once and then have exactly equal embeddings.
    unique = list(dict.fromkeys(texts))
    position = {text: number for number, text in enumerate(unique)}
    repeats = torch.bincount(torch.tensor([position[text] for text in texts]), minlength=len(unique))
    encoded: torch.Tensor | None = None
    for batch in token_budget_batches(encoder.token_lengths(unique), max_tokens):
        embeddings = encoder.encode([unique[item] for item in batch])
        if embeddings.ndim != 2 or len(embeddings) != len(batch):
            raise ValueError(
                f"The encoder returned shape {tuple(embeddings.shape)} for {len(batch)} captions. "
                "It must return one row per caption, of shape (n, dim)."
            )
        converted = embeddings.detach().to("cpu", dtype)
        finite = converted.isfinite().all(dim=1)
        if not finite.all():
            text = unique[batch[int((~finite).nonzero()[0])]]
            row = first_row + texts.index(text)
            raise ValueError(
                f"The embedding of caption row {row} ({text[:80]!r}) is not finite in {dtype}. "
                'Use `dtype="bfloat16"` or `"float32"` if it overflows; otherwise the encoder gives NaN.'
            )
        if encoded is None:
            encoded = torch.empty(len(unique), converted.shape[1], dtype=dtype)
        encoded[batch] = converted
        progress.update(int(repeats[batch].sum()))
    assert encoded is not None, "a shard always has captions"
    return encoded[[position[text] for text in texts]]


def _write_shard(folder: Path, shard: int, embeddings: torch.Tensor) -> None:
    file = folder / _shard_name(shard)
    write_atomically(file, lambda temporary: save_file({"embeddings": embeddings}, temporary))
    record = {
        "file": file.name,
        "rows": embeddings.shape[0],
        "dim": embeddings.shape[1],
        "bytes": file.stat().st_size,
        "sha256": sha256_of_file(file),
    }
    # The record comes last: a shard without one is done again.
    write_json_atomically(folder / _record_name(shard), record)


def _is_finished(folder: Path, shard: int) -> bool:
    record, file = folder / _record_name(shard), folder / _shard_name(shard)
    if not record.is_file() or not file.is_file():
        return False
    return file.stat().st_size == json.loads(record.read_text(encoding="utf-8"))["bytes"]


def _finish(folder: Path, plan: dict[str, Any]) -> CaptionEmbeddingStore:
    names = [_record_name(shard) for shard in range(_num_shards(plan))]
    records = [json.loads((folder / name).read_text(encoding="utf-8")) for name in names]
    dims = {record.pop("dim") for record in records}
    if len(dims) > 1:
        raise ValueError(
            f"The shards in `{folder}` have different embedding widths {sorted(dims)}: the encoder changed between "
            "runs with the same fingerprint. Delete the folder and embed again."
        )
    layout = folder / LAYOUT_FILE
    layout_entry = {"file": layout.name, "bytes": layout.stat().st_size, "sha256": sha256_of_file(layout)}
    index = plan | {"embedding_dim": dims.pop(), "layout": layout_entry, "shards": records}
    write_json_atomically(folder / INDEX_FILE, index)
    for name in [PLAN_FILE, *names]:
        (folder / name).unlink(missing_ok=True)
    return CaptionEmbeddingStore.open(folder)


def _num_shards(plan: Mapping[str, Any]) -> int:
    return -(-plan["num_captions"] // plan["rows_per_shard"])


def _shard_name(shard: int) -> str:
    return f"embeddings-{shard:05d}.safetensors"


def _record_name(shard: int) -> str:
    return f"embeddings-{shard:05d}.json"
