# SPDX-License-Identifier: Apache-2.0
"""Image-text retrieval with a model: encode every image and caption once, then the metrics."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import CaptionEmbeddingStore, CaptionTable
from ..data.captions import Captions
from ..data.image_text import ImageTextDataset
from ..data.images import ImageSource
from ..data.store.fingerprint import require_text_encoder
from .embedding_cache import EmbeddingCache, cached_images, cached_llm_embeds, cached_texts
from .metrics import retrieval_metrics


def check_store(model: Any, store: CaptionEmbeddingStore, processor: Any = None) -> None:
    """Checks that stored embeddings are of the text encoder of a model."""
    if getattr(getattr(model, "config", None), "model_type", None) != "llm2clip":
        raise ValueError(
            f"`{store.path}` holds embeddings of an LLM, which a {type(model).__name__} does not take. Leave it out."
        )
    store.check_compatible(model)
    remedy = "Embed the captions with the LLM and processor of this model, or leave the store out."
    require_text_encoder(store, model, processor, remedy, by_sample=True)


def evaluate_retrieval(
    model: Any,
    images: ImageSource | ImageTextDataset,
    captions: Captions | CaptionTable | CaptionEmbeddingStore | Sequence[torch.Tensor] | None = None,
    *,
    processor: Any = None,
    batch_size: int = 64,
    max_length: int | None = None,
    ks: Sequence[int] = (1, 5, 10),
    device: str | torch.device | None = None,
    show_progress: bool = False,
    gather_across_devices: bool = True,
    cache_dir: str | Path | None = None,
) -> dict[str, float]:
    """
    Recall and ranks of image-to-text and text-to-image retrieval.

    All captions of all images are candidates and queries (paper section 4.1); no prompt is added. Every image and
    every distinct caption is encoded once.

    Args:
        model: `LLM2CLIPModel`, or a model of transformers with CLIP's interface; kept in its train or eval mode.
        images:
            One entry per image: PIL images, paths, or an image column of a `datasets.Dataset`. Or an
            `ImageTextDataset`, whose transform, and whose captions or store, are used; the transform should be
            deterministic, e.g. `CenterCropTransform`.
        captions:
            What belongs to each image: captions as for `CaptionTable`; or LLM embeddings, as a
            `CaptionEmbeddingStore`, whose fingerprint must be that of the model's text encoder, or as one tensor of
            shape `(num_captions, llm_hidden_size)` per image. `None` with an `ImageTextDataset`.
        processor: processor of the model; only what is needed of it is used, the image processor and the tokenizer.
        batch_size (`int`, defaults to 64): images or texts per forward pass.
        max_length (`int`, *optional*): tokens per caption, see `encode_texts`.
        ks (sequence of `int`, defaults to `(1, 5, 10)`): cut-offs of recall.
        device (*optional*): device to move the model to first; by default the model stays where it is.
        show_progress (`bool`, defaults to `False`): show progress bars.
        gather_across_devices (`bool`, defaults to `True`): in a process group, share the work among the processes, all
            of which make this call and get the result; `False` does all of it here.
        cache_dir (`str` or `Path`, *optional*):
            Folder to keep embeddings in. They are used again for the same model (weights, config, adapters), data and
            preprocessing only. Finding that out reads all of them, which takes seconds where encoding takes minutes.

    Returns:
        `dict[str, float]`: the keys of `retrieval_metrics`, e.g. `image_to_text_recall@1`.

    Raises:
        ValueError: if images and captions differ in number, an image has no caption or cannot be read, a processor is
            missing, or a store was made by another text encoder; the message names the row.

    Example:
    >>> evaluate_retrieval(model, images, captions, processor=processor)["image_to_text_recall@1"]  # doctest: +SKIP
    0.953
    """
    transform = None
    if isinstance(images, ImageTextDataset):
        if captions is not None:
            raise ValueError("An `ImageTextDataset` brings its own captions. Leave `captions` out.")
        captions = images.store if images.store is not None else images.captions
        transform, images = images.pixel_values, images.images
    texts = _resolve(captions)
    if len(images) != len(texts):
        raise ValueError(
            f"Images ({len(images)}) and images with captions ({len(texts)}) must agree in number. "
            "Check that both come from the same rows."
        )
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "show_progress": show_progress}
    options["gather_across_devices"] = gather_across_devices
    cache = None
    if device is not None:
        model.to(device)
    if cache_dir is not None:
        if not gather_across_devices:
            raise ValueError("`cache_dir` needs `gather_across_devices=True`. Leave one of them out.")
        cache = EmbeddingCache(cache_dir, model)
    text_embeds, offsets = _encode_captions(model, texts, processor, max_length, options, cache)
    image_embeds = cached_images(cache, model, images, processor=processor, transform=transform, **options)
    text_to_image = np.repeat(np.arange(len(images)), np.diff(offsets))
    # On the device of the model, where the large products are fast.
    target = next(model.parameters()).device
    return retrieval_metrics(image_embeds.to(target), text_embeds.to(target), torch.from_numpy(text_to_image), ks=ks)


def _resolve(captions: Any) -> CaptionTable | CaptionEmbeddingStore | list[torch.Tensor]:
    if captions is None:
        raise ValueError("`captions` is missing. Pass captions or LLM embeddings for every image.")
    if isinstance(captions, (CaptionTable, CaptionEmbeddingStore)):
        return captions
    if not isinstance(captions, Mapping) and len(captions) and isinstance(captions[0], torch.Tensor):
        for row, embeds in enumerate(captions):
            if embeds.ndim != 2 or not len(embeds):
                raise ValueError(
                    f"The LLM embeddings of image {row} must have shape (num_captions, llm_hidden_size) with at least "
                    f"one caption, got {tuple(embeds.shape)}."
                )
        return list(captions)
    return CaptionTable(captions)


def _encode_captions(
    model: Any,
    captions: CaptionTable | CaptionEmbeddingStore | list[torch.Tensor],
    processor: Any,
    max_length: int | None,
    options: dict[str, Any],
    cache: EmbeddingCache | None,
) -> tuple[torch.Tensor, np.ndarray]:
    """Embeddings of all captions, image by image, and the offsets of the images."""
    if isinstance(captions, CaptionTable):
        if processor is None:
            raise ValueError("Captions need a `processor` with a tokenizer. Pass the processor of the model.")
        texts = captions.rows(0, captions.num_captions)
        embeds = cached_texts(cache, model, texts, processor=processor, max_length=max_length, **options)
        return embeds, captions.offsets
    read: Callable[[list[int]], torch.Tensor]
    if isinstance(captions, CaptionEmbeddingStore):
        check_store(model, captions, processor)
        read, offsets = captions.gather, captions.offsets
    else:
        rows = torch.cat(captions)
        read, offsets = rows.__getitem__, np.concatenate([[0], np.cumsum([len(embeds) for embeds in captions])])
    return cached_llm_embeds(cache, model, read, int(offsets[-1]), **options), offsets


__all__ = ["check_store", "evaluate_retrieval"]
