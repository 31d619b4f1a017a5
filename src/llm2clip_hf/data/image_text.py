# SPDX-License-Identifier: Apache-2.0
"""
Map-style image-text pairs for CLIP training: one augmented image and one caption of it per access.

Which caption is drawn and how the image is cropped is a pure function of (seed, epoch, index). A run that is resumed,
or that uses another number of workers, sees the same samples.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from .captions import Captions, CaptionTable
from .images import ImageSource, ImageTransform, content_id, decode_for, image_id, raw_image, undecoded
from .reports import SkipLog, SkipReport, check_choice
from .sampling import SampleDraws, check_sub_captions, checked_weights
from .store.embedding_store import CaptionEmbeddingStore


# So many unreadable images in a row are no accident of the hash: the images as a whole cannot be read.
_MAX_ATTEMPTS = 32


class ImageTextDataset(torch.utils.data.Dataset):
    """
    Images with several captions each, as text or as stored LLM embeddings.

    Every access draws one caption: first the source by `caption_weights` among those the image has, then uniformly
    among its captions in that source.

    Args:
        images: a sequence of PIL images, paths or `{"bytes": ..., "path": ...}`, or an image column of a
            `datasets.Dataset`.
        captions (*optional*): as for `CaptionTable`; gives samples with `text`.
        store (`CaptionEmbeddingStore`, *optional*):
            Gives samples with `llm_embeds` instead. With `captions` as well, the store is checked to have been made
            from exactly these captions, whose texts are returned only on request.
        transform: called as `transform(image, generator)` with an RGB PIL image and a `torch.Generator` seeded for
            this sample; returns a float tensor, see `RandomResizedCropTransform`.
        caption_weights (mapping from source name to `float`, *optional*):
            Non-negative weights of all sources; 0 leaves a source out. Equal by default, which with a real and a
            dense source is the paper's 50 % / 50 % (section 4.1).
        seed (`int`, defaults to 0): seed of captions and crops.
        sub_captions (`float`, defaults to 0):
            Probability of returning a random run of sentences of the drawn caption instead of all of it, an option of
            long-caption training (DreamLIP, arXiv 2403.17007); for `text` only, see `split_sub_captions` for stores.
        with_text (`bool`, defaults to `False`):
            Also return the `text` whose embedding is returned, with `captions` and `store`: for a second text encoder,
            see `ClipTextCollator`. Without a store samples have the text anyway.
        weights (sequence of `float`, *optional*):
            Positive weight of each image, of the loss of its pair; gives samples with `weight`.
        on_bad_image (`"error"` or `"skip"`, defaults to `"error"`):
            What to do with an image that cannot be read. `"skip"` returns another row in its place, chosen by a hash
            of (seed, epoch, index), so that batches keep their size; `skipped` counts and names them.

    Samples also hold `image_id`, the same number for equal image files, and where the texts are known `text_id`, the
    same for equal captions, by which the loss tells false negatives.

    Raises:
        ValueError: if the lengths differ, `with_text` is set without captions, the weights do not fit the sources, an
            image has captions only in sources of weight 0, or the store was made from other captions.

    Example:
    >>> from PIL import Image
    >>> from llm2clip_hf.data import CenterCropTransform
    >>> images = [Image.new("RGB", (10, 12)), Image.new("RGB", (12, 10))]
    >>> captions = {"real": ["a cat", "a dog"], "dense": ["a black cat on a sofa", "a small dog"]}
    >>> weights = {"real": 1, "dense": 0}
    >>> dataset = ImageTextDataset(images, captions, transform=CenterCropTransform(8), caption_weights=weights)
    >>> dataset[1]["text"], dataset[1]["pixel_values"].shape
    ('a dog', torch.Size([3, 8, 8]))
    """

    def __init__(
        self,
        images: ImageSource,
        captions: Captions | CaptionTable | None = None,
        *,
        store: CaptionEmbeddingStore | None = None,
        transform: ImageTransform,
        caption_weights: Mapping[str, float] | None = None,
        seed: int = 0,
        sub_captions: float = 0.0,
        with_text: bool = False,
        weights: Sequence[float] | np.ndarray | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
    ) -> None:
        table = CaptionTable(captions) if captions is not None and not isinstance(captions, CaptionTable) else captions
        if table is None and store is None:
            raise ValueError("Neither `captions` nor `store` is given. Pass at least one of them.")
        if table is not None and store is not None and not store.holds(table):
            raise ValueError(
                f"The store `{store.path}` was made from other captions than `captions`. "
                "Pass the captions it was made from, or embed these captions."
            )
        if with_text and table is None:
            raise ValueError("`with_text=True` needs the texts, which a store does not hold. Pass `captions` as well.")
        self.captions: CaptionTable | None = table
        self.store = store
        layout = store if store is not None else table
        if layout is None or len(images) != len(layout):
            found = 0 if layout is None else len(layout)
            raise ValueError(
                f"Images ({len(images)}) and images with captions ({found}) must agree in number. "
                "Check that both come from the same rows."
            )
        check_choice("on_bad_image", on_bad_image)
        check_sub_captions(sub_captions, store is not None)
        self._weights = None if weights is None else checked_pair_weights(weights, len(images))
        self.images = undecoded(images)
        self.transform = transform
        self._with_text = with_text or store is None
        self._layout = layout
        self._draws = SampleDraws(seed, checked_weights(caption_weights, layout.source_names), sub_captions)
        # In shared memory, so that the workers of a loader with `persistent_workers=True` see `set_epoch`.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._on_bad_image = on_bad_image
        self._skips = SkipLog()
        _check_drawable(layout, self._draws.weights)

    def __len__(self) -> int:
        return len(self._layout)

    @property
    def skipped(self) -> SkipReport:
        """Unreadable images that were replaced so far, in worker processes too."""
        return self._skips.report()

    def set_epoch(self, epoch: int) -> None:
        """Draw the captions and crops of epoch `epoch` from the next access on, in worker processes too."""
        self._epoch.fill_(epoch)

    def caption_row(self, index: int) -> int:
        """Flat caption row (as in `CaptionTable`) that image `index` is paired with in the current epoch."""
        start, stop = int(self._layout.offsets[index]), int(self._layout.offsets[index + 1])
        return start + self._draws.caption(int(self._epoch), index, self._layout.source_ids[start:stop])

    def pixel_values(self, index: int) -> torch.Tensor:
        """Image `index` through `transform`, with the crop of the current epoch."""
        transform = decode_for(self.transform, *raw_image(self.images, index))
        return transform(self._draws.generator(int(self._epoch), index))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """"""
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"Image {index} is out of range for {len(self)} images.")
        transform, item, index = self._readable_image(index)
        row = self.caption_row(index)
        sample: dict[str, Any] = {
            "pixel_values": transform(self._draws.generator(int(self._epoch), index)),
            "index": index,
            "image_id": image_id(item),
        }
        if self._weights is not None:
            sample["weight"] = float(self._weights[index])
        if self.store is not None:
            sample["llm_embeds"] = self.store.gather([row])[0].float()
        if self.captions is not None:
            text = self.captions[index][row - int(self.captions.offsets[index])]
            text = self._draws.sub_caption(int(self._epoch), index, text)
            sample |= {"text": text} if self._with_text else {}
            sample["text_id"] = content_id(text.encode())
        return sample

    def _readable_image(self, wanted: int) -> tuple[Callable[[torch.Generator], torch.Tensor], Any, int]:
        """The transform of an image that can be read, the image as it comes, and its number."""
        index = wanted
        for attempt in range(_MAX_ATTEMPTS + 1):
            try:
                item, name = raw_image(self.images, index)
                return decode_for(self.transform, item, name), item, index
            except ValueError as error:
                if self._on_bad_image == "error":
                    raise
                if attempt == 0:
                    # The others are counted when their own turn comes.
                    self._skips.add(str(error))
                last_error = error
            index = self._draws.substitute(int(self._epoch), wanted, attempt, len(self))
        raise ValueError(
            f"Image {wanted} and {_MAX_ATTEMPTS} images chosen in its place cannot be read; the last: {last_error}"
        ) from last_error


def checked_pair_weights(weights: Sequence[float] | np.ndarray, images: int) -> np.ndarray:
    """Weights of pairs as float64, one positive number per image."""
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (images,):
        raise ValueError(f"`weights` has shape {array.shape} for {images} images. Give one weight per image.")
    if len(bad := np.flatnonzero(~(array > 0) | ~np.isfinite(array))):
        raise ValueError(
            f"The weight of image {bad[0]} is {array[bad[0]]} ({len(bad)} such images), expected a positive number. "
            "Drop images that should not be learned from."
        )
    return array


def _check_drawable(layout: CaptionTable | CaptionEmbeddingStore, weights: np.ndarray) -> None:
    """Every image needs a caption in a source of positive weight; only weights of zero can take it away."""
    if weights.all():
        return
    drawable = np.concatenate([[0], np.cumsum(weights[layout.source_ids] > 0)])
    empty = np.flatnonzero(np.diff(drawable[layout.offsets]) == 0)
    if empty.size:
        raise ValueError(
            f"Image {empty[0]} has captions only in sources of weight 0 ({empty.size} such images). "
            "Raise the weight of another source in `caption_weights`, or drop these images."
        )


PLACEHOLDER: dict[str, Any] = {}
"""Stands in for a sample of a batch that a resumed loop reads and drops; a batch of them becomes `{}`."""
_NUMBERS = {"index": torch.int64, "image_id": torch.int64, "text_id": torch.int64, "weight": torch.float32}
_KNOWN_KEYS = {"pixel_values", "llm_embeds", "text", "key", *_NUMBERS}


class ImageTextCollator:
    """
    Stack samples of an `ImageTextDataset` into a batch for `LLM2CLIPModel`.

    Args:
        processor (*optional*):
            Processor with a `tokenizer`, e.g. `LLM2CLIPProcessor`; needed for samples with `text`.
        max_length (`int`, defaults to 512): tokens a text is truncated to; the paper's value (section 4.1).

    Batches have a `text_id`, of the samples or made from their texts, or else from their stored embeddings.

    Example:
    >>> sample = {"pixel_values": torch.zeros(3, 2, 2), "llm_embeds": torch.ones(4), "index": 7}
    >>> batch = ImageTextCollator()([sample, sample])
    >>> {name: tuple(value.shape) for name, value in batch.items()}
    {'pixel_values': (2, 3, 2, 2), 'index': (2,), 'text_id': (2,), 'llm_embeds': (2, 4)}
    """

    def __init__(self, processor: Any = None, max_length: int = 512) -> None:
        self.processor = processor
        self.max_length = max_length

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """"""
        if samples and not any(samples):
            return {}
        keys = _common_keys(samples)
        batch: dict[str, Any] = {"pixel_values": _stack(samples, "pixel_values")}
        if "text_id" not in keys:
            samples = [{**sample, "text_id": _text_id(sample)} for sample in samples]
        for name in _NUMBERS:
            if name in samples[0]:
                batch[name] = torch.tensor([sample[name] for sample in samples], dtype=_NUMBERS[name])
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
            f"have `key` and {sorted(_NUMBERS)}. With the Trainer, set `remove_unused_columns=False`."
        )
    return keys


def _text_id(sample: Mapping[str, Any]) -> int:
    """Equal texts of one shard of a store have exactly equal embeddings; those of others may differ in rounding."""
    return content_id(sample["text"].encode() if "text" in sample else sample["llm_embeds"].float().numpy().tobytes())


def _stack(samples: Sequence[Mapping[str, Any]], name: str) -> torch.Tensor:
    shape = samples[0][name].shape
    for position, sample in enumerate(samples):
        if sample[name].shape != shape:
            raise ValueError(
                f"`{name}` of sample {position} has shape {tuple(sample[name].shape)}, of sample 0 {tuple(shape)}. "
                "All samples of a batch need the same shape; resize images in the transform."
            )
    return torch.stack([sample[name] for sample in samples])


__all__ = ["PLACEHOLDER", "ImageTextCollator", "ImageTextDataset"]
