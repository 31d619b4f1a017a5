# SPDX-License-Identifier: Apache-2.0
"""
Embed all captions of a data set once, into a `CaptionEmbeddingStore`.

(1) Read the captions of a slice and look whether its shard is there already, and whole.
(2) If not: sort the captions by length, cut them into batches of a token budget, encode, write the shard.
(3) When every shard is there, write the index, which makes the folder a store.

Each process does its own slices and asks nobody. While one is encoded, the captions of the next are read and the shard
before is written. A killed run leaves finished shards; the next call with the same arguments does the rest.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

import torch
from tqdm.auto import tqdm

from ..captions import Captions, CaptionTable
from ..sampling import token_budget_batches
from .build import torch_dtype_of
from .embedding_store import CaptionEmbeddingStore
from .fingerprint import FingerprintValue
from .process import Job, StoreWork, own_shards
from .slices import CaptionSlices, TableSlices
from .text_encoders import TextEncoder, as_text_encoder


logger = logging.getLogger(__name__)


# The result may be None with `shard_range` only; the other options are those below.
@overload
def embed_captions(
    encoder: Any, captions: Any, output_dir: str | Path, *, shard_range: None = None, **options: Any
) -> CaptionEmbeddingStore: ...


@overload
def embed_captions(
    encoder: Any, captions: Any, output_dir: str | Path, *, shard_range: tuple[int, int] | None, **options: Any
) -> CaptionEmbeddingStore | None: ...


def embed_captions(  # type: ignore[misc]
    encoder: Any,
    captions: Captions | CaptionTable | CaptionSlices,
    output_dir: str | Path,
    *,
    fingerprint: Mapping[str, FingerprintValue] | None = None,
    tokenizer: Any = None,
    max_length: int = 512,
    dtype: str = "float16",
    max_tokens_per_batch: int = 16384,
    rows_per_shard: int = 16384,
    keys: Sequence[str] | None = None,
    shard_range: tuple[int, int] | None = None,
    repair: bool = False,
    timeout: float = 3600.0,
    show_progress: bool = True,
) -> CaptionEmbeddingStore | None:
    """
    Encode every caption with the LLM and store the embeddings.

    The call is idempotent: shards that are there, whole, and of the same captions and fingerprint are kept, the others
    are made. A folder made with anything else is refused, never overwritten.

    Under torchrun or `accelerate launch`, also on several machines with a shared folder, every process makes the
    call, with an encoder on its own device. Process `i` of `n` embeds the shards `i`, `i + n`, ...; all return the
    store when it is complete. Without a process group, the environment variables `RANK` and `WORLD_SIZE` say the same.
    Jobs that know nothing of each other name their part with `shard_range`; the last to finish makes the store.

    Args:
        encoder:
            One of: a function from a list of `n` strings to a tensor of shape `(n, dim)`; an object with an `encode`
            method, such as a `SentenceTransformer`; or an `LLM2CLIPModel` together with `tokenizer`. It must give the
            embedding that the text adapter expects: pooled, not normalized. On a GPU load it in float16: a batch that
            overflows is embedded in float32. In bfloat16, rounding moves embeddings.
        captions:
            As for `CaptionTable`: captions per image, or a mapping from source name to captions per image. Or slices
            that are read one by one, see `caption_slices`, `image_text_slices` and `DataShardSlices`.
        output_dir (`str` or `Path`):
            Folder of the store, created if needed, or an address that fsspec opens, such as `s3://bucket/store`.
        fingerprint (mapping of JSON scalars, *optional*):
            What the embeddings depend on, see `embedding_fingerprint`. Needed unless `encoder` is an `LLM2CLIPModel`.
        tokenizer (*optional*): tokenizer of an `LLM2CLIPModel`.
        max_length (`int`, defaults to 512):
            Tokens per caption with an `LLM2CLIPModel`; the paper's value (section 4.1). Other encoders truncate for
            themselves.
        dtype (`str`, defaults to `"float16"`):
            `"float16"`, `"bfloat16"`, `"float32"`, or `"int8"` with a scale per row, for half the space. Halves have
            11 bits of precision, bfloat16 8, int8 7 below the largest value of the row; an embedding that overflows in
            the chosen dtype is an error.
        max_tokens_per_batch (`int`, defaults to 16384):
            Rows times length of the longest caption in a batch. With an `LLM2CLIPModel` whose LLM runs flash
            attention, captions are packed without padding and this is the sum of their lengths.
        rows_per_shard (`int`, defaults to 16384): images per file; also the work that a kill can cost.
        keys (sequence of `str`, *optional*):
            One unique key per image for `CaptionEmbeddingStore.index_of`, e.g. the `__key__` of webdataset samples.
            Keys can be added to shards that have none; that encodes nothing.
        shard_range (`(start, stop)`, *optional*):
            Embed these shards only, and wait for nobody; of several processes, each does a part of them.
        repair (`bool`, defaults to `False`):
            Read shards of a finished store too, and embed again those that are damaged or hold other captions, which
            otherwise is an error.
        timeout (`float`, defaults to 3600.0): seconds without a new shard until a process gives up on the others.
        show_progress (`bool`, defaults to `True`):
            Show a progress bar over the captions of process 0, with captions per second and tokens per second
            (estimated from the bytes unless the encoder is an `LLM2CLIPModel`).

    Returns:
        `CaptionEmbeddingStore`: the finished store, opened; None if shards outside `shard_range` are missing.

    Raises:
        ValueError: if an argument is invalid, the folder belongs to other captions or another encoder, or the encoder
            gives a wrong shape or a value that is not finite in `dtype`.
        OSError: if a file cannot be written, e.g. because the disk is full.
        TimeoutError: if other processes finish no shard any more; names the missing ones.

    Example:
    >>> import tempfile
    >>> encode = lambda texts: torch.tensor([[float(len(text)), 1.0] for text in texts])
    >>> folder = tempfile.mkdtemp()
    >>> store = embed_captions(encode, ["a", "bb", "ccc"], folder, fingerprint={"llm": "length"}, show_progress=False)
    >>> store.gather([2, 0]).tolist()
    [[3.0, 1.0], [1.0, 1.0]]
    """
    torch_dtype_of(dtype)
    if max_tokens_per_batch < 1:
        raise ValueError(f"`max_tokens_per_batch` must be positive, got {max_tokens_per_batch}.")
    text_encoder = as_text_encoder(encoder, tokenizer, max_length)
    fingerprint = text_encoder.fingerprint() if fingerprint is None else dict(fingerprint)
    slices = _as_slices(captions, keys, rows_per_shard)
    own, rank, size = own_shards(len(slices), shard_range)
    work = StoreWork(output_dir, slices, fingerprint, dtype, repair)
    if old := work.old_store():
        return old
    progress = _Progress(slices, own, show_progress and rank == 0, f" (process {rank} of {size})" if size > 1 else "")
    with progress.bar, ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for job in _ahead(reader, work, own):
            if not job.is_missing:
                progress.skip(job)
                continue
            if progress.captions == 0:
                _warn_of_encoder(encoder)
            embeddings = _encode_slice(text_encoder, job, dtype, max_tokens_per_batch, progress)
            if written is not None:
                written.result()
            # One shard is written while the next is encoded; two are in memory.
            written = writer.submit(work.write, job, embeddings)
        if written is not None:
            written.result()
    progress.log()
    return work.finish(rank, size, timeout, waits=shard_range is None)


def _as_slices(captions: Any, keys: Sequence[str] | None, rows_per_shard: int) -> CaptionSlices:
    if hasattr(captions, "rows_of"):
        if keys is not None:
            raise ValueError("`keys` are of captions in memory; slices bring their own. Leave `keys` out.")
        slices: CaptionSlices = captions
        return slices
    if rows_per_shard < 1:
        raise ValueError(f"`rows_per_shard` must be positive, got {rows_per_shard}.")
    table = captions if isinstance(captions, CaptionTable) else CaptionTable(captions)
    return TableSlices(table, keys, rows_per_shard)


def _ahead(reader: ThreadPoolExecutor, work: "StoreWork", shards: Sequence[int]) -> Iterator[Job]:
    """The jobs of some shards, each prepared while the one before is done."""
    following = reader.submit(work.prepare, shards[0]) if shards else None
    for position in range(len(shards)):
        assert following is not None
        job = following.result()
        following = reader.submit(work.prepare, shards[position + 1]) if position + 1 < len(shards) else None
        yield job


def _warn_of_encoder(encoder: Any) -> None:
    # An `LLM2CLIPModel` may have parts on several devices; a function tells nothing of its own.
    llm = getattr(encoder, "text_model", None) or encoder
    device = getattr(llm, "device", None)
    if torch.cuda.is_available() and isinstance(device, torch.device) and device.type == "cpu":
        logger.warning(
            "The LLM is on the CPU, which takes many times as long as the GPU of this machine to embed captions. Move "
            'it there first, e.g. with `model.to("cuda")`.'
        )
    if getattr(llm, "dtype", None) == torch.bfloat16:
        logger.warning(
            "The LLM is in bfloat16, whose rounding moves embeddings by up to 0.07 in cosine, float16 by 0.0003. "
            "Load it with `dtype=torch.float16`."
        )


class _Progress:
    """Counts what has been encoded, and shows it."""

    def __init__(self, slices: CaptionSlices, own: Sequence[int], show: bool, several: str) -> None:
        self._start = time.perf_counter()
        self.captions = self.tokens = self.paid_tokens = 0
        total = None
        if isinstance(slices, TableSlices):
            offsets = slices.table.offsets
            total = sum(int(offsets[stop] - offsets[start]) for start, stop in map(slices.rows_of, own))
        self.bar: tqdm[Any] = tqdm(
            total=total, desc="Embedding captions" + several, unit="caption", disable=not show, initial=0
        )

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self._start, 1e-9)

    def update(self, captions: int, tokens: int, paid_tokens: int) -> None:
        self.captions, self.tokens = self.captions + captions, self.tokens + tokens
        self.paid_tokens += paid_tokens
        self.bar.set_postfix_str(f"{self.tokens / self.seconds:.0f} tokens/s", refresh=False)
        self.bar.update(captions)

    def skip(self, job: Job) -> None:
        """A shard that was there: as an initial value it stays out of the rate and the time that is left."""
        if not self.bar.disable:
            captions = int(job.captions.offsets()[-1])
            self.bar.initial += captions
            self.bar.n += captions

    def log(self) -> None:
        """Log the rates of the whole run."""
        if not self.captions:
            logger.info("The embeddings of all captions are there; nothing was encoded.")
            return
        logger.info(
            "Embedded %d captions in %.1f s: %.1f captions/s, %.0f tokens/s, %.1f %% of the encoder's tokens padding.",
            self.captions,
            self.seconds,
            self.captions / self.seconds,
            self.tokens / self.seconds,
            100 * (1 - self.tokens / max(self.paid_tokens, 1)),
        )


def _encode_slice(encoder: TextEncoder, job: Job, dtype: str, max_tokens: int, progress: _Progress) -> torch.Tensor:
    """Step (2): the embeddings of all captions of a slice, in flat order."""
    texts, torch_dtype = job.captions.texts(), torch_dtype_of(dtype)
    # Web captions repeat; equal texts are encoded once and then have exactly equal embeddings.
    unique = list(dict.fromkeys(texts))
    position = {text: number for number, text in enumerate(unique)}
    repeats = torch.bincount(torch.tensor([position[text] for text in texts]), minlength=len(unique))
    encoded: torch.Tensor | None = None
    lengths = encoder.token_lengths(unique)
    for batch in token_budget_batches(lengths, max_tokens, encoder.pads):
        embeddings = encoder.encode([unique[item] for item in batch])
        if embeddings.ndim != 2 or len(embeddings) != len(batch):
            raise ValueError(
                f"The encoder returned shape {tuple(embeddings.shape)} for {len(batch)} captions. "
                "It must return one row per caption, of shape (n, dim)."
            )
        converted = embeddings.detach().to("cpu", torch_dtype)
        # A row's largest value tells of all: four times as fast as to ask each.
        finite = converted.abs().amax(dim=1).isfinite()
        if not finite.all():
            text = unique[batch[int((~finite).nonzero()[0])]]
            raise ValueError(
                f"The embedding of caption {texts.index(text)} of shard {job.number} ({text[:80]!r}) is not finite "
                f'in {torch_dtype}. Use `dtype="bfloat16"` or `"float32"` if it overflows; else the encoder gives NaN.'
            )
        if encoded is None:
            encoded = torch.empty(len(unique), converted.shape[1], dtype=torch_dtype)
        encoded[batch] = converted
        tokens = sum(lengths[item] for item in batch)
        paid_tokens = len(batch) * lengths[batch[0]] if encoder.pads else tokens
        progress.update(int(repeats[batch].sum()), tokens, paid_tokens)
    assert encoded is not None, "a slice always has captions"
    return encoded if len(unique) == len(texts) else encoded[[position[text] for text in texts]]


__all__ = ["embed_captions"]
