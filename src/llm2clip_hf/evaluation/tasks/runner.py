# SPDX-License-Identifier: Apache-2.0
"""
Running tasks on a model.

`evaluate_tasks` (1) opens and checks the data of all tasks, so that a missing file stops a run at its start, (2)
encodes every image and text once, (3) computes the metrics, and (4) returns one record that goes into a JSON file, and
the queries that are drawn.
"""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data import CaptionEmbeddingStore
from ...data.images import ImageSource
from ..caption_accuracy import evaluate_caption_retrieval
from ..embedding_cache import EmbeddingCache, cached_images, cached_llm_embeds, cached_texts
from ..joint_space import (
    FEWEST_MATCHES,
    composition_accuracy,
    joint_space_statistics,
    match_threshold,
    winoground_scores,
)
from ..metrics import retrieval_metrics
from ..retrieval import check_store
from ..zero_shot import build_zero_shot_classifier, classification_metrics
from .composition import CompositionData, PairData
from .data import (
    CaptionData,
    ClassificationData,
    CrossLingualData,
    ImageData,
    RetrievalData,
    TaskData,
)
from .definitions import TaskDefinition, resolve_tasks
from .loading import load_task_data


@dataclass(frozen=True)
class StoredTexts:
    """The rows of a store that are a task's captions."""

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
    """
    for store in stores:
        if store.holds(data.captions, any_sources=True):
            return StoredTexts(store)
        if store.holds(data.all_captions, any_sources=True):
            return StoredTexts(store, data.rows)
    return None


logger = logging.getLogger(__name__)
_GALLERY_QUERIES, _GALLERY_IMAGES = 6, 5


@dataclasses.dataclass
class GalleryRow:
    """A query and the images found for it."""

    query: str
    right: int | None
    found: list[int]
    scores: list[float]
    label: str = ""
    rights: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class Evaluation:
    """What a run found."""

    results: dict[str, dict[str, Any]]
    galleries: dict[str, tuple[ImageSource, list[GalleryRow]]]


def evaluate_tasks(
    model: Any,
    processor: Any,
    tasks: Sequence[TaskDefinition | str],
    *,
    data_root: str | Path | None = None,
    text_embeddings: Sequence[str | Path] = (),
    batch_size: int = 64,
    max_length: int | None = None,
    on_bad_row: str = "error",
    max_images: int | None = None,
    device: str | torch.device | None = None,
    cache_dir: str | Path | None = None,
    match_precision: float = 0.95,
    show_progress: bool = False,
) -> Evaluation:
    """
    Measure a model on tasks. In a process group, all processes make this call, share the work and get the result.

    Args:
        model: `LLM2CLIPModel`, or a model of transformers with CLIP's interface.
        processor: its processor, with an image processor and, unless all texts are stored, a tokenizer.
        tasks (sequence): definitions, or what `resolve_tasks` takes.
        data_root (`str` or `Path`, *optional*): folder of local copies of the benchmarks.
        text_embeddings (sequence of paths): stores of `embed_captions`, used where they hold exactly the captions of
            a retrieval task, or all captions of its data where it takes the first ones only; the LLM is not needed
            then. They must be made by the text encoder that the model was trained with, or by the LLM that it holds.
        batch_size (`int`, defaults to 64): images or texts per forward pass.
        max_length (`int`, *optional*): tokens per text, see `encode_texts`.
        on_bad_row (`str`, defaults to `"error"`): `"error"`, or `"skip"`, which leaves bad rows out and counts them.
        max_images (`int`, *optional*): use the first so many images of each task; such results are marked partial.
        device (*optional*): device to move the model to first.
        cache_dir (`str` or `Path`, *optional*): folder to keep the embeddings of retrieval tasks and of images in, see
            `evaluate_retrieval`.
        match_precision (`float`, defaults to 0.95): precision of `match_threshold`, which retrieval tasks of 100
            captions and more tell, with the statistics of the joint space, under `joint_space`.
        show_progress (`bool`, defaults to `False`): show progress bars.

    Returns:
        `Evaluation`: `results` by task name, and what `draw_gallery` needs.

    Raises:
        ValueError: if two tasks have one name, data are missing, bad, or differ from the definition, the processor
            does not serve, a store is of another text encoder, or an embedding is not finite; the message names the
            item.

    Example:
    >>> evaluate_tasks(model, processor, ["coco"], data_root="data").results["coco"]["metrics"]  # doctest: +SKIP
    {'image_to_text_recall@1': 0.724, ...}
    """
    if not 0 < match_precision < 1:
        raise ValueError(f"`match_precision` must lie between 0 and 1, both excluded, got {match_precision}.")
    plan = resolve_tasks(tasks)
    stores = [CaptionEmbeddingStore.open(path) for path in text_embeddings]
    # Opened before anything is encoded: the last task's missing file must not end a run of hours.
    data = {task.name: load_task_data(task, data_root, on_bad_row=on_bad_row, max_images=max_images) for task in plan}
    stored = _match_stores(model, processor, data, stores)
    _check_parts(model, processor, data, stored)
    if device is not None:
        model.to(device)
    cache = None if cache_dir is None else EmbeddingCache(cache_dir, model)
    runner = _Runner(model, processor, batch_size, max_length, cache, match_precision, show_progress)
    outcome = Evaluation({}, {})
    for task in plan:
        start = time.perf_counter()
        own = data.pop(task.name)
        logger.info("Task `%s`: %s.", task.name, own.counts)
        try:
            record, gallery = runner.run(own, stored.get(task.name))
        except ValueError as error:
            raise ValueError(f"Task `{task.name}`: {error}") from error
        outcome.results[task.name] = {
            **_description(task),
            **record,
            "counts": own.counts,
            "fingerprint": own.fingerprint,
            "skipped": own.skipped,
            "partial": max_images is not None,
            "seconds": round(time.perf_counter() - start, 2),
        }
        if isinstance(own, ImageData) and gallery:
            outcome.galleries[task.name] = (own.images, gallery)
    return outcome


def _description(task: TaskDefinition) -> dict[str, Any]:
    return {
        "kind": task.kind,
        "title": task.title or task.name,
        "published": task.published or (task.name if task.path is None else None),
        "source": task.source,
        "protocol": task.protocol,
        "split": task.hub.split if task.path is None and task.hub is not None else task.split or "test",
    }


def _match_stores(
    model: Any, processor: Any, data: Mapping[str, TaskData], stores: Sequence[CaptionEmbeddingStore]
) -> dict[str, StoredTexts]:
    """The stored embeddings of the tasks that have some, after a check that they are of the model's text encoder."""
    stored = {}
    for name, each in data.items():
        if isinstance(each, RetrievalData) and (found := find_stored_texts(each, stores)) is not None:
            stored[name] = found
    for store in stores:
        if all(found.store is not store for found in stored.values()):
            logger.warning("The embeddings in `%s` are of the captions of no task, and are not used.", store.path)
        else:
            check_store(model, store, processor)
    return stored


def _check_parts(model: Any, processor: Any, data: Mapping[str, TaskData], stored: Mapping[str, StoredTexts]) -> None:
    """Whether model and processor have what the tasks need, before hours of encoding."""
    needs_images = any(not isinstance(each, CaptionData) for each in data.values())
    if needs_images and not hasattr(processor, "image_processor"):
        raise ValueError(f"The processor ({type(processor).__name__}) has no image processor. Pass the model's own.")
    unstored = [name for name in data if name not in stored]
    if not unstored:
        return
    remedy = "or give `text_embeddings` made from exactly the captions of the task"
    if getattr(processor, "tokenizer", None) is None:
        raise ValueError(
            f"Task `{unstored[0]}` needs a tokenizer, and the processor ({type(processor).__name__}) has none. Pass "
            f"the model's own, {remedy}."
        )
    if getattr(model.config, "model_type", None) == "llm2clip" and getattr(model, "text_model", None) is None:
        raise ValueError(f"Task `{unstored[0]}` needs an LLM, and the model has none. Attach it, {remedy}.")


class _Runner:
    """A model with its options; one method per kind of task."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        batch_size: int,
        max_length: int | None,
        cache: EmbeddingCache | None,
        match_precision: float,
        show_progress: bool,
    ) -> None:
        self.model, self.processor, self.max_length, self.cache = model, processor, max_length, cache
        self.match_precision = match_precision
        self.options: dict[str, Any] = {"batch_size": batch_size, "show_progress": show_progress}

    def run(self, data: TaskData, stored: StoredTexts | None = None) -> tuple[dict[str, Any], list[GalleryRow]]:
        if isinstance(data, RetrievalData):
            return self._retrieval(data, stored)
        if isinstance(data, CrossLingualData):
            return self._cross_lingual(data)
        if isinstance(data, ClassificationData):
            return self._classification(data)
        if isinstance(data, CompositionData):
            return self._composition(data)
        if isinstance(data, PairData):
            embeds = [
                each.unflatten(0, (-1, 2))
                for each in (self._images(data.images, data.keys), self._texts(data.captions))
            ]
            return {"metrics": winoground_scores(*embeds)}, []
        assert isinstance(data, CaptionData)
        metrics = evaluate_caption_retrieval(
            self.model, data.captions, processor=self.processor, max_length=self.max_length, **self.options
        )
        return {"metrics": metrics}, []

    def _composition(self, data: CompositionData) -> tuple[dict[str, Any], list[GalleryRow]]:
        images, texts = self._images(data.images, data.keys), self._texts(data.captions)
        negatives = self._texts([text for wrong in data.negatives for text in wrong])
        owners = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(wrong) for wrong in data.negatives]))
        right = composition_accuracy(images, texts, negatives, owners)
        categories = {}
        for name in sorted(set(data.categories)):
            chosen = right[torch.tensor([category == name for category in data.categories])]
            categories[name] = {"accuracy": chosen.mean().item(), "num_images": len(chosen)}
        mean = sum(each["accuracy"] for each in categories.values()) / len(categories)
        metrics = {"composition_accuracy": right.mean().item(), "mean_category_accuracy": mean}
        return {"metrics": metrics, "categories": categories}, []

    def _images(self, images: ImageSource, keys: Sequence[str]) -> torch.Tensor:
        embeds = cached_images(self.cache, self.model, images, processor=self.processor, **self.options)
        return _finite(embeds, lambda row: f"image `{keys[row]}`").to(self._device)

    def _texts(self, texts: Sequence[str]) -> torch.Tensor:
        options = {**self.options, "max_length": self.max_length}
        embeds = cached_texts(self.cache, self.model, texts, processor=self.processor, **options)
        return _finite(embeds, lambda row: f"text {texts[row][:80]!r}").to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _retrieval(self, data: RetrievalData, stored: StoredTexts | None) -> tuple[dict[str, Any], list[GalleryRow]]:
        texts = data.captions.rows(0, data.captions.num_captions)
        owners = torch.tensor([data.captions.image_of(row) for row in range(len(texts))])
        record: dict[str, Any] = {"stored_texts": stored is not None}
        if stored is None:
            text_embeds = self._texts(texts)
        else:
            embeds = cached_llm_embeds(self.cache, self.model, stored.gather, len(texts), **self.options)
            record["text_fingerprint"] = stored.store.fingerprint
            text_embeds = _finite(embeds, lambda row: f"text {texts[row][:80]!r}").to(self._device)
        image_embeds = self._images(data.images, data.keys)
        metrics = retrieval_metrics(image_embeds, text_embeds, owners)
        record["joint_space"] = self._joint_space(image_embeds, text_embeds, owners)
        gallery = _gallery(image_embeds, text_embeds, texts, owners.tolist())
        return {"metrics": metrics, **record}, gallery

    def _joint_space(self, images: torch.Tensor, texts: torch.Tensor, owners: torch.Tensor) -> dict[str, float]:
        if min(len(images), len(texts)) < 2:
            return {}
        statistics = joint_space_statistics(images, texts, owners)
        if len(texts) < FEWEST_MATCHES:
            return statistics
        try:
            return match_threshold(images, texts, owners, precision=self.match_precision) | statistics
        except ValueError as error:  # an untrained model has no such cosine, and results all the same
            logger.warning("%s", error)
            return statistics

    def _cross_lingual(self, data: CrossLingualData) -> tuple[dict[str, Any], list[GalleryRow]]:
        image_embeds = self._images(data.images, data.keys)
        languages: dict[str, dict[str, float]] = {}
        gallery: list[GalleryRow] = []
        names = list(data.texts)
        drawn = {names[place] for place in _evenly(len(names), _GALLERY_QUERIES)}
        for language, rows in data.texts.items():
            present = sorted({image for image, _ in rows})
            position = {image: place for place, image in enumerate(present)}
            owners = [position[image] for image, _ in rows]
            texts = [text for _, text in rows]
            text_embeds = self._texts(texts)
            # The gallery of a language: the images that have a text in it.
            candidates = image_embeds[present]
            metrics = retrieval_metrics(candidates, text_embeds, torch.tensor(owners))
            languages[language] = metrics | {"num_images": float(len(present)), "num_texts": float(len(texts))}
            if language in drawn:
                query = [len(rows) // 2]
                for row in _gallery(candidates, text_embeds, texts, owners, query, language):
                    row.found = [present[place] for place in row.found]
                    row.right = None if row.right is None else present[row.right]
                    gallery.append(row)
        shared = [key for key in next(iter(languages.values())) if not key.startswith("num_")]
        mean = {key: sum(metrics[key] for metrics in languages.values()) / len(languages) for key in shared}
        return {"metrics": mean, "languages": languages}, gallery

    def _classification(self, data: ClassificationData) -> tuple[dict[str, Any], list[GalleryRow]]:
        classifier = build_zero_shot_classifier(
            self.model,
            data.class_names,
            data.templates,
            processor=self.processor,
            max_length=self.max_length,
            allow_duplicates=len(set(data.class_names)) < len(data.class_names),
            **self.options,
        )
        classifier = _finite(classifier, lambda row: f"class `{data.class_names[row]}`").to(self._device)
        image_embeds = self._images(data.images, data.keys)
        metrics = classification_metrics(image_embeds @ classifier.T, torch.tensor(data.labels), "zero_shot")
        gallery = []
        for number in _evenly(len(data.class_names), _GALLERY_QUERIES):
            [row] = _gallery(image_embeds, classifier, data.class_names, [None] * len(classifier), [number])
            row.rights = {place for place in row.found if data.labels[place] == number}
            gallery.append(row)
        return {"metrics": metrics}, gallery


def _finite(embeds: torch.Tensor, name: Any) -> torch.Tensor:
    bad = (~embeds.isfinite().all(dim=1)).nonzero()
    if len(bad):
        raise ValueError(
            f"The embedding of {name(int(bad[0]))} is not finite ({len(bad)} of {len(embeds)} such rows). Check the "
            "weights, or use `dtype` float32."
        )
    return embeds


def _evenly(count: int, wanted: int) -> list[int]:
    """Up to `wanted` positions of `count`, spread evenly."""
    return sorted({(2 * place + 1) * count // (2 * wanted) for place in range(wanted)}) if count else []


def _gallery(
    images: torch.Tensor,
    texts: torch.Tensor,
    queries: Sequence[str],
    owners: Sequence[int | None],
    rows: Sequence[int] | None = None,
    label: str = "",
) -> list[GalleryRow]:
    gallery = []
    for row in _evenly(len(queries), _GALLERY_QUERIES) if rows is None else rows:
        best = (images @ texts[row]).topk(min(_GALLERY_IMAGES, len(images)))
        gallery.append(GalleryRow(queries[row], owners[row], best.indices.tolist(), best.values.tolist(), label))
    return gallery


__all__ = ["Evaluation", "GalleryRow", "evaluate_tasks"]
