# SPDX-License-Identifier: Apache-2.0
"""
Embed all captions of a data set once, into a `CaptionEmbeddingStore`.

(1) Number the captions in one flat order and write the plan and the layout.
(2) Shard by shard: sort the captions by length, cut them into batches of a token budget, encode, write the shard. Of
    several processes, each does every n-th shard.
(3) When every shard is there, write the index, which makes the folder a store.

A killed run leaves finished shards with their records; the next call with the same arguments does the rest, with any
number of processes.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..captions import Captions, CaptionTable
from ..sampling import token_budget_batches
from .build import StoreBuild, StoreProcesses
from .embedding_store import CaptionEmbeddingStore, torch_dtype_of
from .fingerprint import FingerprintValue
from .mapped_files import check_keys
from .text_encoders import TextEncoder, as_text_encoder


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
    keys: Sequence[str] | None = None,
    timeout: float = 1800.0,
    show_progress: bool = True,
) -> CaptionEmbeddingStore:
    """
    Encode every caption with the LLM and store the embeddings on disk.

    The call is idempotent: a finished store of the same captions and fingerprint is returned as it is, an unfinished
    one is resumed at the first missing shard. A folder made with anything else is refused, never overwritten.

    Under torchrun or `accelerate launch`, also on several machines with a shared folder, every process must make the
    call, with an encoder on its own device. Process `i` of `n` embeds the shards `i`, `i + n`, ...; all return the
    store when it is complete, and an error in one is an error in all. Without a process group, the environment
    variables `RANK` and `WORLD_SIZE` say the same.

    Args:
        encoder:
            One of: a function from a list of `n` strings to a tensor of shape `(n, dim)`; an object with an `encode`
            method, such as a `SentenceTransformer`; or an `LLM2CLIPModel` together with `tokenizer`. It must give the
            embedding that the text adapter expects: pooled, not normalized. On a GPU load it in float16: a batch that
            overflows is embedded in float32. In bfloat16, rounding moves embeddings.
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
        max_tokens_per_batch (`int`, defaults to 16384):
            Rows times length of the longest caption in a batch. With an `LLM2CLIPModel` whose LLM runs flash
            attention, captions are packed without padding and this is the sum of their lengths.
        rows_per_shard (`int`, defaults to 32768): captions per file; also the work that a kill can cost.
        keys (sequence of `str`, *optional*):
            One unique key per image for `CaptionEmbeddingStore.index_of`, e.g. the `__key__` of webdataset samples.
            Keys can be added to a finished store; that encodes nothing.
        timeout (`float`, defaults to 1800.0):
            Seconds that a process waits for others that give no sign of life. They give one after every batch.
        show_progress (`bool`, defaults to `True`):
            Show a progress bar over the captions of process 0, with captions per second and tokens per second
            (estimated from the bytes unless the encoder is an `LLM2CLIPModel`).

    Returns:
        `CaptionEmbeddingStore`: the finished store, opened.

    Raises:
        ValueError: if an argument is invalid, the folder belongs to other captions or another encoder, or the encoder
            gives a wrong shape or a value that is not finite in `dtype`.
        OSError: if a file cannot be written, e.g. because the disk is full.
        RuntimeError: if another process failed, or another run is filling the folder.
        TimeoutError: if another process gives no sign of life; names the missing shards.

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
    folder = Path(output_dir)
    processes = StoreProcesses(folder, timeout)
    with processes.working():
        text_encoder = as_text_encoder(encoder, tokenizer, max_length)
        fingerprint = text_encoder.fingerprint() if fingerprint is None else dict(fingerprint)
        table = captions if isinstance(captions, CaptionTable) else CaptionTable(captions)
        if keys is not None:
            check_keys(keys, len(table))
        build = StoreBuild(folder, processes, table, fingerprint, dtype, rows_per_shard)
        if build.has_index:
            logger.info("The embeddings in %s are complete; nothing to encode.", folder)
            return build.open(keys)
        _warn_of_encoder(encoder)
        # Step (1)
        with build.filling():
            # Step (2)
            _embed_shards(build, processes, table, text_encoder, torch_dtype, max_tokens_per_batch, show_progress)
            # Step (3)
            build.finish(keys)
        return build.open(keys)


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

    def __init__(self, processes: StoreProcesses, captions: int, finished: int, show: bool) -> None:
        self._processes = processes
        self._start = time.perf_counter()
        self.captions = self.tokens = self.paid_tokens = 0
        several = f" (process {processes.rank} of {processes.size})" if processes.size > 1 else ""
        # `initial` keeps what an earlier run finished out of the rate and the time that is left.
        self.bar: tqdm[Any] = tqdm(
            total=captions,
            initial=finished,
            desc="Embedding captions" + several,
            unit="caption",
            disable=not (show and processes.is_first),
        )

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self._start, 1e-9)

    def update(self, captions: int, tokens: int, paid_tokens: int) -> None:
        self.captions, self.tokens = self.captions + captions, self.tokens + tokens
        self.paid_tokens += paid_tokens
        self.bar.set_postfix_str(f"{self.tokens / self.seconds:.0f} tokens/s", refresh=False)
        self.bar.update(captions)
        self._processes.sign_of_life(captions)

    def log(self) -> None:
        """Log the rates of the whole run."""
        logger.info(
            "Embedded %d captions in %.1f s: %.1f captions/s, %.0f tokens/s, %.1f %% of the encoder's tokens padding.",
            self.captions,
            self.seconds,
            self.captions / self.seconds,
            self.tokens / self.seconds,
            100 * (1 - self.tokens / max(self.paid_tokens, 1)),
        )


def _embed_shards(
    build: StoreBuild,
    processes: StoreProcesses,
    table: CaptionTable,
    encoder: TextEncoder,
    dtype: torch.dtype,
    max_tokens: int,
    show_progress: bool,
) -> None:
    """Embed the unfinished shards of this process."""
    finished, unfinished = build.own_shards()
    rows = {shard: build.rows_of(shard) for shard in [*finished, *unfinished]}
    done = sum(rows[shard][1] - rows[shard][0] for shard in finished)
    progress = _Progress(processes, sum(stop - start for start, stop in rows.values()), done, show_progress)
    with progress.bar:
        for shard in unfinished:
            processes.check()
            with build.claimed(shard):
                # A run that ended between the first look and the claim may have done it.
                if not build.is_finished(shard):
                    start, stop = rows[shard]
                    build.write_shard(
                        shard, _encode_shard(encoder, table.rows(start, stop), start, dtype, max_tokens, progress)
                    )
    if unfinished:
        progress.log()


def _encode_shard(
    encoder: TextEncoder,
    texts: list[str],
    first_row: int,
    dtype: torch.dtype,
    max_tokens: int,
    progress: _Progress,
) -> torch.Tensor:
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
        tokens = sum(lengths[item] for item in batch)
        paid_tokens = len(batch) * lengths[batch[0]] if encoder.pads else tokens
        progress.update(int(repeats[batch].sum()), tokens, paid_tokens)
    assert encoded is not None, "a shard always has captions"
    return encoded[[position[text] for text in texts]]


__all__ = ["embed_captions"]
