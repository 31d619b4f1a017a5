# SPDX-License-Identifier: Apache-2.0
"""The text of a streamed sample: a drawn caption, its stored LLM embedding, or both."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .embedding_store import CaptionEmbeddingStore
from .sample_draws import SampleDraws
from .shards import RawSample


class StreamTexts:
    """
    What a sample of a stream has instead of its captions.

    Args:
        fields (mapping from source name to `str`): caption fields, in the order of `source_fields`; may be empty.
        store (`CaptionEmbeddingStore`, *optional*): embeddings by key.
        draws (`SampleDraws`): which caption is drawn.
    """

    def __init__(self, fields: Mapping[str, str], store: CaptionEmbeddingStore | None, draws: SampleDraws) -> None:
        self._fields, self._store, self._draws = fields, store, draws

    def features(self, epoch: int, index: int, raw: RawSample) -> dict[str, Any]:
        """
        `llm_embeds`, `text`, or both of the same caption.

        Args:
            epoch (`int`): epoch.
            index (`int`): number of the sample in the stream.
            raw (`RawSample`): the sample as it was read.

        Raises:
            ValueError: if it cannot be used; the message says why, and nothing else.
        """
        texts = [text for captions in raw.captions.values() for text in captions]
        numbers = [len(captions) for captions in raw.captions.values()]
        source_ids = np.repeat(np.arange(len(numbers)), numbers)
        start = 0
        if self._store is not None:
            try:
                row = self._store.index_of(raw.key)
            except KeyError as error:
                raise ValueError(f"its key is not in the store `{self._store.path}`") from error
            start, stop = int(self._store.offsets[row]), int(self._store.offsets[row + 1])
            stored = self._store.source_ids[start:stop]
            if self._fields and not np.array_equal(stored, source_ids):
                expected = np.bincount(stored, minlength=len(numbers)).tolist()
                raise ValueError(
                    f"it has {numbers} captions in the sources {list(self._fields)}, but the store "
                    f"`{self._store.path}` has embeddings of {expected}"
                )
            source_ids = stored
        if not len(source_ids) or not self._draws.weights[source_ids].any():
            found = {source: len(captions) for source, captions in raw.captions.items()}
            raise ValueError(f"it has no caption in a source of positive weight (captions: {found})")
        drawn = self._draws.caption(epoch, index, source_ids)
        features: dict[str, Any] = {}
        if self._store is not None:
            features["llm_embeds"] = self._store.gather([start + drawn])[0].float()
        if self._fields:
            features["text"] = self._draws.sub_caption(epoch, index, texts[drawn])
        return features


def source_fields(caption_fields: Mapping[str, str] | None, store: CaptionEmbeddingStore | None) -> dict[str, str]:
    """
    The caption fields, where there is a store in the order of its sources, by which captions are numbered.

    Raises:
        ValueError: if there are neither fields nor a store, or both with different sources.
    """
    if caption_fields is None and store is None:
        raise ValueError("Pass `caption_fields`, for captions as text, or `store`, for stored embeddings, or both.")
    fields = dict(caption_fields or {})
    if store is None or caption_fields is None:
        return fields
    if set(fields) != set(store.source_names):
        raise ValueError(
            f"`caption_fields` names the sources {sorted(fields)}, the store `{store.path}` has "
            f"{sorted(store.source_names)}. Pass the fields that it was made with."
        )
    return {name: fields[name] for name in store.source_names}
