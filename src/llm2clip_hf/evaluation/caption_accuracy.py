# SPDX-License-Identifier: Apache-2.0
"""Caption retrieval accuracy (CRA): does one caption of an image find the other one among those of all images?"""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch

from .metrics import caption_retrieval_accuracy
from .text_towers import Pooling, embed_texts


__all__ = ["evaluate_caption_retrieval"]

logger = logging.getLogger(__name__)

OnTooFew = Literal["error", "skip"]


def evaluate_caption_retrieval(
    encoder: Any,
    captions: Sequence[Sequence[str]],
    *,
    processor: Any = None,
    is_causal: bool | None = None,
    pooling: Pooling | None = None,
    ks: Sequence[int] = (1, 5, 10),
    on_too_few: OnTooFew = "error",
    batch_size: int = 32,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    show_progress: bool = False,
) -> dict[str, float]:
    """
    Caption retrieval accuracy (CRA) of any text encoder: one call per row of the paper's table.

    The first two distinct captions of each image are used (paper section 4.2: the first two captions of the 5,000
    test images of COCO, top-1, without prompt or instruction). Similarity is the cosine.

    Args:
        encoder:
            A `SentenceTransformer`; a model with CLIP's interface (`CLIPModel`, `SiglipModel`, `LLM2CLIPModel`) or
            its text tower (`CLIPTextModelWithProjection`, `SiglipTextModel`): the text's vector in the joint space;
            a raw LLM of transformers; or the name or folder of a model of transformers.
        captions (sequence of sequences of `str`): captions of each image.
        processor (*optional*): tokenizer or processor; needed with a model of transformers, loaded with a name.
        is_causal (`bool`, *optional*):
            Raw LLM only: causal (`True`) or bidirectional (`False`) attention; by default what its config says.
        pooling (`str`, *optional*): raw LLM only: `"mean"` (default) or `"last"`, see `embed_texts`.
        ks (sequence of `int`, defaults to `(1, 5, 10)`): cut-offs.
        on_too_few (`str`, defaults to `"error"`):
            What happens to an image without two distinct captions: `"error"`, or `"skip"`, which counts it.
        batch_size (`int`, defaults to 32): captions per forward pass.
        max_length (`int`, *optional*): tokens per caption; by default 512 or the encoder's own maximum, if smaller.
        device (*optional*): device to move the encoder to first; by default it stays where it is.
        show_progress (`bool`, defaults to `False`): show a progress bar.

    Returns:
        `dict[str, float]`: the keys of `caption_retrieval_accuracy` (`caption_retrieval_accuracy` itself is the
        mean of both directions at top-1), and `num_images` compared and `num_skipped`.

    Raises:
        ValueError: if an image has too few captions, a caption is not a non-empty string, or an option does not
            concern the encoder; the message names the row.

    Example:
    >>> evaluate_caption_retrieval("meta-llama/Llama-3.2-1B", captions, is_causal=False)  # doctest: +SKIP
    >>> evaluate_caption_retrieval("openai/clip-vit-large-patch14", captions)  # doctest: +SKIP
    {'caption_retrieval_accuracy': 0.252, ...}
    """
    first, second, num_skipped = first_two_captions(captions, on_too_few)
    embeds = embed_texts(
        encoder,
        [*first, *second],
        processor=processor,
        is_causal=is_causal,
        pooling=pooling,
        batch_size=batch_size,
        max_length=max_length,
        device=device,
        show_progress=show_progress,
    )
    return caption_retrieval_metrics(embeds, num_skipped, ks)


def caption_retrieval_metrics(embeds: torch.Tensor, num_skipped: int, ks: Sequence[int]) -> dict[str, float]:
    """CRA of embeddings `(2 N, D)`, first captions and then second ones, with the counts of images."""
    num_images = len(embeds) // 2
    metrics = caption_retrieval_accuracy(embeds[:num_images], embeds[num_images:], ks=ks)
    return metrics | {"num_images": float(num_images), "num_skipped": float(num_skipped)}


def first_two_captions(
    captions: Sequence[Sequence[str]], on_too_few: OnTooFew = "error"
) -> tuple[list[str], list[str], int]:
    """The first two distinct captions of each image, and how many images were skipped for having fewer."""
    if on_too_few not in ("error", "skip"):
        raise ValueError(f"`on_too_few` must be 'error' or 'skip', got {on_too_few!r}.")
    first, second = [], []
    for row, texts in enumerate(captions):
        if isinstance(texts, str):
            raise ValueError(f"Row {row} is one string, {texts!r}. Pass a list of captions per image.")
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"Row {row} has the caption {text!r}, not a non-empty string. Drop the caption.")
        distinct = list(dict.fromkeys(texts))
        if len(distinct) >= 2:
            first.append(distinct[0])
            second.append(distinct[1])
        elif on_too_few == "error":
            raise ValueError(
                f"Row {row} needs a list of at least two distinct captions, got {list(texts)!r}. Caption retrieval "
                "compares two captions of each image; drop the row, or pass `on_too_few='skip'`."
            )
    num_skipped = len(captions) - len(first)
    if not first:
        raise ValueError(
            f"`captions` is empty or holds no image with two captions ({len(captions)} images). "
            "Give at least one image with two captions."
        )
    if num_skipped:
        logger.warning("%d of %d images have fewer than two distinct captions.", num_skipped, len(captions))
    return first, second, num_skipped
