# SPDX-License-Identifier: Apache-2.0
"""Stored LLM embeddings in the place of an LLM: which store holds a task's captions, and whether it fits a model."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data import CaptionEmbeddingStore, CaptionTable
from ..data.fingerprint import weights_identity
from ..data.store_identity import require_identity
from ..data.text_encoders import model_settings
from ..modeling.modules_llm2clip import sampled_weights_digest
from .dataset_parts import RetrievalData


__all__ = ["StoredTexts", "check_store", "find_stored_texts"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredTexts:
    """
    The rows of a store that are a task's captions.

    Args:
        store (`CaptionEmbeddingStore`): the store.
        rows (`np.ndarray` of shape `(num_captions,)`, *optional*): row of each caption of the task; `None` where the
            store holds nothing else.
    """

    store: CaptionEmbeddingStore
    rows: np.ndarray | None = None

    def gather(self, captions: Sequence[int]) -> Any:
        """LLM embeddings of captions of the task by their numbers, of shape `(n, llm_hidden_size)`."""
        return self.store.gather(captions if self.rows is None else self.rows[np.asarray(captions)])


def find_stored_texts(data: RetrievalData, stores: Sequence[CaptionEmbeddingStore]) -> StoredTexts | None:
    """
    The store that holds the captions of a task.

    A store of all captions of the data serves a task that takes some of them (the first of each image, or the first
    images) as well. The names of the caption sources do not matter, texts, order and grouping do.

    Args:
        data (`RetrievalData`): data of the task.
        stores (sequence of `CaptionEmbeddingStore`): the stores to look in; the first that fits is taken.

    Returns:
        `StoredTexts`, or `None` if no store fits.
    """
    for store in stores:
        if _holds(store, data.captions):
            return StoredTexts(store)
        if _holds(store, data.all_captions):
            return StoredTexts(store, data.rows)
    return None


def _holds(store: CaptionEmbeddingStore, table: CaptionTable) -> bool:
    if store.captions_sha256 == table.sha256:
        return True
    if store.num_captions != table.num_captions or not np.array_equal(store.offsets, table.offsets):
        return False
    return store.captions_sha256 == table.sha256_as(store.source_names, store.source_ids)


def check_store(model: Any, store: CaptionEmbeddingStore, processor: Any = None) -> None:
    """
    Checks that stored embeddings are of the text encoder of a model.

    They are compared with `config.text_fingerprint`, what made the embeddings that the model was trained on; with the
    template, pooling and tokenizer of the model; and with the LLM that it holds. All weights of the LLM are read only
    where a sample of them does not settle that it made the embeddings.

    Args:
        model: an `LLM2CLIPModel`.
        store (`CaptionEmbeddingStore`): the embeddings.
        processor (*optional*): its processor, or its tokenizer.

    Raises:
        ValueError: if the model takes no LLM embeddings, or the store has another width or origin; the message names
            what differs.
    """
    if getattr(getattr(model, "config", None), "model_type", None) != "llm2clip":
        raise ValueError(
            f"`{store.path}` holds embeddings of an LLM, which a {type(model).__name__} does not take. Leave it out."
        )
    store.check_compatible(model)
    if model.config.text_fingerprint:
        require_identity(
            store,
            model.config.text_fingerprint,
            "the one that the model was trained with (`config.text_fingerprint`)",
            "Embed the captions with that one, or set `config.text_fingerprint` to null to measure others on purpose.",
        )
    remedy = "Embed the captions with the LLM and processor of this model, or leave the store out."
    require_identity(
        store, model_settings(model, getattr(processor, "tokenizer", processor)), "that of the model", remedy
    )
    if model.text_model is None or "weights_sha256" not in store.fingerprint:
        return
    if any("base_layer." in name for name, _ in model.text_model.named_parameters()):
        logger.warning("The LLM has adapters, so `%s` is not compared with its weights.", store.path)
        return
    sample = store.fingerprint.get("weights_sample_sha256")
    if sample is not None and sample == sampled_weights_digest(model.text_model):
        return
    logger.info("Comparing the weights of the LLM with the fingerprint of `%s`.", store.path)
    require_identity(store, weights_identity(model.text_model), "that of the model", remedy)
