# SPDX-License-Identifier: Apache-2.0
"""
Embeddings on disk, found again only for the same model and the same data.

The name of a file is a digest of all that decides its content: weights, config and adapters of the model, versions of
the libraries, preprocessing, and the data themselves. So another model or changed data never meet an old file.
"""

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..data.images import ImageSource, load_image, undecoded
from ..data.store.fingerprint import digest_of, model_digest
from ..distributed import all_gather_sizes, rank, world_size
from ..files import sha256_of_file, write_atomically
from ..version import __version__
from .encoding import encode_images, encode_llm_embeds, encode_texts, longest_text


logger = logging.getLogger(__name__)
_ROWS_PER_READ = 8192


def images_digest(images: ImageSource, processor: Any, transform: Callable[[int], torch.Tensor] | None = None) -> str:
    """Digest of images as a model will see them, without preprocessing them where that can be avoided."""
    digest = hashlib.sha256()
    image_processor = getattr(processor, "image_processor", processor)
    if transform is None:
        digest.update(f"{type(image_processor).__name__}|{image_processor.to_json_string()}".encode())
    images = undecoded(images)
    for row in range(len(images)):
        content = _image_content(images, row) if transform is None else _bytes(transform(row))
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def texts_digest(texts: Sequence[str], tokenizer: Any, max_length: int) -> str:
    """Digest of texts as token ids."""
    digest = hashlib.sha256(f"{max_length}|{tokenizer.pad_token_id}|{tokenizer.padding_side}".encode())
    for ids in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]:
        digest.update(json.dumps(list(ids)).encode())
    return digest.hexdigest()


def rows_digest(read: Callable[[list[int]], torch.Tensor], num_rows: int) -> str:
    """Digest of `num_rows` stored vectors that `read` gives by row numbers."""
    digest = hashlib.sha256()
    for start in range(0, num_rows, _ROWS_PER_READ):
        digest.update(_bytes(read(list(range(start, min(start + _ROWS_PER_READ, num_rows))))))
    return digest.hexdigest()


class EmbeddingCache:
    """A folder of embeddings of one model. In a process group all processes make the same calls; rank 0 writes."""

    def __init__(self, folder: str | Path, model: torch.nn.Module) -> None:
        self.folder = Path(folder)
        versions = [__version__, importlib.metadata.version("transformers"), torch.__version__]
        self.fingerprint = digest_of([model_digest(model), *versions])
        self._device = next(model.parameters()).device

    def get(self, kind: str, data: str, num_rows: int, encode: Callable[[], torch.Tensor]) -> torch.Tensor:
        key = digest_of([kind, self.fingerprint, data])
        path = self.folder / f"{kind}-{key[:40]}.safetensors"
        found = _read(path, key, num_rows)
        # Encoding is a matter of all processes: one that misses the file makes all encode.
        if min(all_gather_sizes(int(found is not None), self._device)) and found is not None:
            logger.info("Embeddings of %d %s are read from `%s`.", num_rows, kind, path)
            return found
        embeds = encode()
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            content = {"embeddings": embeds.contiguous()}
            write_atomically(path, lambda temporary: save_file(content, temporary, metadata={"key": key}))
        if world_size() > 1:
            all_gather_sizes(0, self._device)  # the file is complete before any process looks for it again
        return embeds


def _read(path: Path, key: str, num_rows: int) -> torch.Tensor | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            embeds = file.get_tensor("embeddings")
            fits = (file.metadata() or {}).get("key") == key and embeds.ndim == 2 and len(embeds) == num_rows
    except (SafetensorError, OSError) as error:
        logger.warning("`%s` cannot be read (%s) and is made again.", path, error)
        return None
    return embeds if fits else None


def _image_content(images: ImageSource, row: int) -> bytes:
    item = images[row]
    if isinstance(item, (str, Path)) and Path(item).is_file():
        return sha256_of_file(Path(item)).encode()
    if isinstance(item, dict) and item.get("bytes") is not None:
        return bytes(item["bytes"])
    image = load_image(images, row)
    return f"{image.size}".encode() + image.tobytes()


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()


def cached_images(
    cache: EmbeddingCache | None,
    model: Any,
    images: ImageSource,
    *,
    processor: Any,
    transform: Callable[[int], torch.Tensor] | None = None,
    **options: Any,
) -> torch.Tensor:
    """`encode_images` with a cache."""

    def encode() -> torch.Tensor:
        return encode_images(model, images, processor=processor, transform=transform, **options)

    if cache is None or (processor is None and transform is None):  # without either, encoding says what is missing
        return encode()
    return cache.get("images", images_digest(images, processor, transform), len(images), encode)


def cached_texts(
    cache: EmbeddingCache | None,
    model: Any,
    texts: Sequence[str],
    *,
    processor: Any,
    max_length: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """`encode_texts` with a cache."""
    tokenizer = getattr(processor, "tokenizer", processor)

    def encode() -> torch.Tensor:
        return encode_texts(model, texts, processor=tokenizer, max_length=max_length, **options)

    if cache is None:
        return encode()
    length = longest_text(model, tokenizer) if max_length is None else max_length
    return cache.get("texts", texts_digest(texts, tokenizer, length), len(texts), encode)


def cached_llm_embeds(
    cache: EmbeddingCache | None,
    model: Any,
    read: Callable[[list[int]], torch.Tensor],
    num_rows: int,
    **options: Any,
) -> torch.Tensor:
    """`encode_llm_embeds` with a cache."""

    def encode() -> torch.Tensor:
        return encode_llm_embeds(model, read, num_rows, **options)

    return encode() if cache is None else cache.get("texts", rows_digest(read, num_rows), num_rows, encode)


__all__ = [
    "EmbeddingCache",
    "cached_images",
    "cached_llm_embeds",
    "cached_texts",
]
