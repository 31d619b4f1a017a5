# SPDX-License-Identifier: Apache-2.0
"""The encoders of `encoding`, which look in an `EmbeddingCache` first where one is given."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..data.images import ImageSource
from .embedding_cache import EmbeddingCache, images_digest, rows_digest, texts_digest
from .encoding import encode_images, encode_llm_embeds, encode_texts, longest_text


__all__ = ["cached_images", "cached_llm_embeds", "cached_texts"]


def cached_images(
    cache: EmbeddingCache | None,
    model: Any,
    images: ImageSource,
    *,
    processor: Any,
    transform: Callable[[int], torch.Tensor] | None = None,
    **options: Any,
) -> torch.Tensor:
    """
    `encode_images` with a cache.

    Args:
        cache (`EmbeddingCache`, *optional*): that of `model`; always encodes if `None`.
        model, images, processor, transform: see `encode_images`.
        options: further arguments of `encode_images`, which do not change the result.

    Returns:
        `torch.Tensor` of shape `(len(images), D)`.
    """

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
    """
    `encode_texts` with a cache.

    Args:
        cache (`EmbeddingCache`, *optional*): that of `model`; always encodes if `None`.
        model, texts, processor, max_length: see `encode_texts`.
        options: further arguments of `encode_texts`, which do not change the result.

    Returns:
        `torch.Tensor` of shape `(len(texts), D)`.
    """
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
    """
    `encode_llm_embeds` with a cache.

    Args:
        cache (`EmbeddingCache`, *optional*): that of `model`; always encodes if `None`.
        model, read, num_rows: see `encode_llm_embeds`.
        options: further arguments of `encode_llm_embeds`, which do not change the result.

    Returns:
        `torch.Tensor` of shape `(num_rows, D)`.
    """

    def encode() -> torch.Tensor:
        return encode_llm_embeds(model, read, num_rows, **options)

    return encode() if cache is None else cache.get("texts", rows_digest(read, num_rows), num_rows, encode)
