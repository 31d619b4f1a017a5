# SPDX-License-Identifier: Apache-2.0
"""Image-text data: captions, the caption-embedding store, datasets, transforms and the collator."""

from .caption_loading import load_captions
from .captions import CaptionPairDataset, CaptionTable
from .collator import ImageTextCollator
from .embed import embed_captions
from .embedding_store import CaptionEmbeddingStore
from .fingerprint import embedding_fingerprint
from .image_text import ImageTextDataset
from .image_text_loading import ImageTextTable, load_image_text
from .image_text_streaming import ImageTextStream
from .load_report import LoadReport
from .overlap import Overlap, find_overlap
from .shard_captions import load_shard_captions
from .shard_counts import count_samples
from .skips import SkipReport
from .streaming import stream_caption_pairs
from .sub_captions import split_sub_captions
from .text_pairs import DropoutPairDataset, TextPairDataset
from .transforms import CenterCropTransform, RandomResizedCropTransform


__all__ = [
    "CaptionEmbeddingStore",
    "CaptionPairDataset",
    "CaptionTable",
    "CenterCropTransform",
    "DropoutPairDataset",
    "ImageTextCollator",
    "ImageTextDataset",
    "ImageTextStream",
    "ImageTextTable",
    "LoadReport",
    "Overlap",
    "RandomResizedCropTransform",
    "SkipReport",
    "TextPairDataset",
    "count_samples",
    "embed_captions",
    "embedding_fingerprint",
    "find_overlap",
    "load_captions",
    "load_image_text",
    "load_shard_captions",
    "split_sub_captions",
    "stream_caption_pairs",
]
