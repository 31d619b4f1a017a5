# SPDX-License-Identifier: Apache-2.0
"""Batches of image-text samples."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


__all__ = ["PLACEHOLDER", "ImageTextCollator"]

PLACEHOLDER: dict[str, Any] = {}
"""Stands in for a sample of a batch that a resumed loop reads and drops; a batch of them becomes `{}`."""

_KNOWN_KEYS = {"pixel_values", "llm_embeds", "text", "index", "key"}


class ImageTextCollator:
    """
    Stack samples of an `ImageTextDataset` into a batch for `LLM2CLIPModel`.

    Args:
        processor (*optional*):
            Processor with a `tokenizer`, e.g. `LLM2CLIPProcessor`; needed for samples with `text`.
        max_length (`int`, defaults to 512): tokens a text is truncated to; the paper's value (section 4.1).

    Example:
    >>> sample = {"pixel_values": torch.zeros(3, 2, 2), "llm_embeds": torch.ones(4), "index": 7}
    >>> batch = ImageTextCollator()([sample, sample])
    >>> {name: tuple(value.shape) for name, value in batch.items()}
    {'pixel_values': (2, 3, 2, 2), 'index': (2,), 'llm_embeds': (2, 4)}
    """

    def __init__(self, processor: Any = None, max_length: int = 512) -> None:
        self.processor = processor
        self.max_length = max_length

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Args:
            samples: dictionaries with `pixel_values`, one of `llm_embeds` and `text`, and optionally `index` and
                `key`; all with the same keys.

        Returns:
            `dict`: `pixel_values` `(batch, 3, height, width)`; `index` `(batch,)` int64 and `key`, a list of `str`,
            if the samples have them; and `llm_embeds` `(batch, dim)`, or `input_ids` and `attention_mask`
            `(batch, length)`, padded to the longest text on the side of the tokenizer. Nothing else, in particular no
            labels. `{}` for a batch of empty samples, which a resumed `ImageTextStream` yields for batches that are
            dropped.

        Raises:
            ValueError: if the keys are missing, unknown or differ between samples, shapes differ, or texts come
                without a processor.
        """
        if samples and not any(samples):
            return {}
        keys = _common_keys(samples)
        batch: dict[str, Any] = {"pixel_values": _stack(samples, "pixel_values")}
        if "index" in keys:
            batch["index"] = torch.tensor([int(sample["index"]) for sample in samples])
        if "key" in keys:
            batch["key"] = [str(sample["key"]) for sample in samples]
        if "llm_embeds" in keys:
            return batch | {"llm_embeds": _stack(samples, "llm_embeds")}
        return batch | self._tokenize([sample["text"] for sample in samples])

    def _tokenize(self, texts: list[str]) -> dict[str, torch.Tensor]:
        if self.processor is None:
            raise ValueError(
                "The samples have `text`, but the collator has no processor. "
                "Construct it as `ImageTextCollator(processor)`, or use a `CaptionEmbeddingStore` in the data set."
            )
        encoded = self.processor.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _common_keys(samples: Sequence[Mapping[str, Any]]) -> set[str]:
    if not samples:
        raise ValueError("The batch is empty. Give the collator at least one sample.")
    keys = set(samples[0])
    for position, sample in enumerate(samples):
        if set(sample) != keys:
            raise ValueError(
                f"Sample {position} has the keys {sorted(sample)}, sample 0 has {sorted(keys)}. "
                "All samples of a batch need the same keys."
            )
    unknown = keys - _KNOWN_KEYS
    if unknown or "pixel_values" not in keys or len(keys & {"llm_embeds", "text"}) != 1:
        raise ValueError(
            f"Samples have the keys {sorted(keys)}. They need `pixel_values`, one of `llm_embeds` and `text`, and may "
            "have `index` and `key`. With the Trainer, set `remove_unused_columns=False`."
        )
    return keys


def _stack(samples: Sequence[Mapping[str, Any]], name: str) -> torch.Tensor:
    shape = samples[0][name].shape
    for position, sample in enumerate(samples):
        if sample[name].shape != shape:
            raise ValueError(
                f"`{name}` of sample {position} has shape {tuple(sample[name].shape)}, of sample 0 {tuple(shape)}. "
                "All samples of a batch need the same shape; resize images in the transform."
            )
    return torch.stack([sample[name] for sample in samples])
