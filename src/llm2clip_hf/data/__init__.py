# SPDX-License-Identifier: Apache-2.0
"""Image-text data: captions, the caption-embedding store, datasets, transforms and the collator."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .captions import CaptionTable, Overlap, find_overlap
from .image_text import ImageTextCollator, ImageTextDataset
from .image_text_stream import ImageTextStream
from .images import CenterCropTransform, RandomResizedCropTransform
from .reports import LoadReport, SkipReport
from .sampling import split_sub_captions
from .shard_index import count_samples, load_shard_captions
from .store.embed import embed_captions
from .store.embedding_store import CaptionEmbeddingStore
from .store.exchange import export_dataset, import_embeddings
from .store.fingerprint import embedding_fingerprint
from .store.slices import DataShardSlices, caption_slices, image_text_slices


if TYPE_CHECKING:
    from .caption_stream import stream_caption_pairs
    from .loading import ImageTextTable, load_captions, load_image_text
    from .pairs import CaptionPairDataset, DropoutPairDataset, TextPairDataset


__all__ = [
    "CaptionEmbeddingStore",
    "CaptionPairDataset",
    "CaptionTable",
    "CenterCropTransform",
    "DataShardSlices",
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
    "caption_slices",
    "count_samples",
    "embed_captions",
    "embedding_fingerprint",
    "export_dataset",
    "find_overlap",
    "image_text_slices",
    "import_embeddings",
    "load_captions",
    "load_image_text",
    "load_shard_captions",
    "split_sub_captions",
    "stream_caption_pairs",
]
# What needs `datasets`, which not everybody has, and which takes seconds to import.
_NEEDS_DATASETS = {
    "CaptionPairDataset": "pairs",
    "DropoutPairDataset": "pairs",
    "ImageTextTable": "loading",
    "TextPairDataset": "pairs",
    "holds_image_paths": "image_sources",
    "load_captions": "loading",
    "load_image_text": "loading",
    "open_image_table": "image_sources",
    "open_source": "sources",
    "stream_caption_pairs": "caption_stream",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_DATASETS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_NEEDS_DATASETS[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name not in ("datasets", "pyarrow"):
            raise
        raise ImportError(f"`{name}` needs `datasets`. Install it with `pip install llm2clip-hf[train]`.") from error
