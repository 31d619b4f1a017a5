# SPDX-License-Identifier: Apache-2.0
"""Image-text data: captions, the caption-embedding store, datasets, transforms and the collator."""

from .caption_pairs import CaptionPairDataset
from .caption_stream import stream_caption_pairs
from .captions import CaptionTable, load_captions
from .image_text import ImageTextCollator, ImageTextDataset
from .image_text_loading import ImageTextTable, load_image_text
from .image_text_stream import ImageTextStream
from .images import CenterCropTransform, RandomResizedCropTransform
from .overlap import Overlap, find_overlap
from .reports import LoadReport, SkipReport
from .sampling import split_sub_captions
from .shard_index import count_samples, load_shard_captions
from .store.embed import embed_captions
from .store.embedding_store import CaptionEmbeddingStore
from .store.fingerprint import embedding_fingerprint
from .text_pairs import DropoutPairDataset, TextPairDataset


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
