# SPDX-License-Identifier: Apache-2.0
"""Image-text data: captions, the caption-embedding store, datasets, transforms and the collator."""

from .captions import CaptionPairDataset, CaptionTable
from .collator import ImageTextCollator
from .embed import embed_captions
from .embedding_store import CaptionEmbeddingStore
from .fingerprint import embedding_fingerprint
from .image_text import ImageTextDataset
from .transforms import CenterCropTransform, RandomResizedCropTransform


__all__ = [
    "CaptionEmbeddingStore",
    "CaptionPairDataset",
    "CaptionTable",
    "CenterCropTransform",
    "ImageTextCollator",
    "ImageTextDataset",
    "RandomResizedCropTransform",
    "embed_captions",
    "embedding_fingerprint",
]
