# SPDX-License-Identifier: Apache-2.0
"""
Map-style image-text pairs for CLIP training: one augmented image and one caption of it per access.

Which caption is drawn and how the image is cropped is a pure function of (seed, epoch, index). A run that is resumed,
or that uses another number of workers, sees the same samples.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .captions import Captions, CaptionTable
from .embedding_store import CaptionEmbeddingStore
from .images import ImageSource, load_image
from .sampling import choose_caption, random_bits, random_uniform
from .transforms import ImageTransform


__all__ = ["ImageTextDataset"]

# Streams of `random_bits`; every kind of choice has its own number.
_SOURCE, _CAPTION, _TRANSFORM = 0, 1, 2


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
            from exactly these captions, and their texts are not returned.
        transform: called as `transform(image, generator)` with an RGB PIL image and a `torch.Generator` seeded for
            this sample; returns a float tensor, see `RandomResizedCropTransform`.
        caption_weights (mapping from source name to `float`, *optional*):
            Non-negative weights of all sources; 0 leaves a source out. Equal by default, which with a real and a
            dense source is the paper's 50 % / 50 % (section 4.1).
        seed (`int`, defaults to 0): seed of captions and crops.

    Raises:
        ValueError: if the lengths differ, the weights do not fit the sources, an image has captions only in sources
            of weight 0, or the store was made from other captions.

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
    ) -> None:
        table = CaptionTable(captions) if captions is not None and not isinstance(captions, CaptionTable) else captions
        if table is None and store is None:
            raise ValueError("Neither `captions` nor `store` is given. Pass at least one of them.")
        if table is not None and store is not None and table.sha256 != store.captions_sha256:
            raise ValueError(
                f"The store `{store.path}` was made from other captions than `captions`. "
                "Pass the captions it was made from, or embed these captions."
            )
        self.captions: CaptionTable | None = table
        self.store = store
        layout = store if store is not None else table
        if layout is None or len(images) != len(layout):
            found = 0 if layout is None else len(layout)
            raise ValueError(
                f"Images ({len(images)}) and images with captions ({found}) must agree in number. "
                "Check that both come from the same rows."
            )
        self.images = images
        self.transform = transform
        self._layout = layout
        self._seed = seed
        self._weights = _checked_weights(caption_weights, layout.source_names)
        _check_drawable(layout, self._weights)
        # In shared memory, so that the workers of a loader with `persistent_workers=True` see `set_epoch`.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self._layout)

    def set_epoch(self, epoch: int) -> None:
        """Draw the captions and crops of epoch `epoch` from the next access on, in worker processes too."""
        self._epoch.fill_(epoch)

    def caption_row(self, index: int) -> int:
        """Flat caption row (as in `CaptionTable`) that image `index` is paired with in the current epoch."""
        epoch, rows = int(self._epoch), np.array([index])
        start, stop = int(self._layout.offsets[index]), int(self._layout.offsets[index + 1])
        source_draw = float(random_uniform(self._seed, epoch, rows, _SOURCE)[0])
        caption_draw = float(random_uniform(self._seed, epoch, rows, _CAPTION)[0])
        return start + choose_caption(self._layout.source_ids[start:stop], self._weights, source_draw, caption_draw)

    def pixel_values(self, index: int) -> torch.Tensor:
        """Image `index` through `transform`, with the crop of the current epoch."""
        bits = random_bits(self._seed, int(self._epoch), np.array([index]), _TRANSFORM)
        generator = torch.Generator().manual_seed(int(bits[0]))
        return self.transform(load_image(self.images, index), generator)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Args:
            index (`int`): image number in `[0, len(self))`.

        Returns:
            `dict` with `pixel_values` (what `transform` returns), `index` (`int`), and either `llm_embeds`
            (`torch.Tensor` of shape `(embedding_dim,)`, float32) or `text` (`str`).

        Raises:
            ValueError: if the image cannot be read; the message names the row.
        """
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"Image {index} is out of range for {len(self)} images.")
        row = self.caption_row(index)
        sample: dict[str, Any] = {"pixel_values": self.pixel_values(index), "index": index}
        if self.store is not None:
            sample["llm_embeds"] = self.store.gather([row])[0].float()
        elif self.captions is not None:
            sample["text"] = self.captions[index][row - int(self.captions.offsets[index])]
        return sample


def _checked_weights(caption_weights: Mapping[str, float] | None, source_names: tuple[str, ...]) -> np.ndarray:
    if caption_weights is None:
        return np.ones(len(source_names))
    if set(caption_weights) != set(source_names):
        raise ValueError(
            f"`caption_weights` names {sorted(caption_weights)}, the captions have the sources "
            f"{sorted(source_names)}. Give every source a weight; 0 leaves it out."
        )
    weights = np.array([float(caption_weights[name]) for name in source_names])
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(
            f"`caption_weights` must be finite and non-negative with a positive sum, got {dict(caption_weights)}."
        )
    return weights


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
