# SPDX-License-Identifier: Apache-2.0
"""What the demo measures, and what a run leaves behind: `metrics.json`, its table, the picture of retrieved images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation import (
    CaptionRetrievalEvaluator,
    encode_images,
    encode_texts,
    evaluate_retrieval,
    evaluate_zero_shot_classification,
)
from ..evaluation.tasks.pictures import draw_gallery
from ..evaluation.tasks.runner import GalleryRow
from .captions import PAIRED, DemoData, caption
from .scenes import COLOURS, DIGITS, render


MODEL_TITLES = {
    "clip_from_scratch": "(a) CLIP, own text encoder",
    "raw_llm": "(b) raw LLM + CLIP training",
    "cc_llm": "(c) CC-tuned LLM + CLIP training",
}
# Two captions of a held-out scene, the second one told in the opposite order; and the title of the row.
CRA_SETS = {
    "english_wordings": ("english_dense", "english_compass", "two English wordings"),
    "english_german": ("english_dense", "german_dense", "English and German"),
    "english_spanish": ("english_dense", "spanish_dense", "English and Spanish"),
}
# Retrieval with captions in these wordings, and the title of the row.
RETRIEVAL_SETS = {
    "short": ("english_short", "short captions"),
    "dense": ("english_dense", "dense captions"),
    "dense_unseen_wording": ("english_compass", "dense, wording never paired with an image"),
    "dense_german": ("german_dense", "dense, German, never paired with an image"),
    "dense_spanish": ("spanish_dense", "dense, Spanish, never paired with an image"),
}
ZERO_SHOT_TEMPLATES = tuple(f"a {colour} {{}}" for colour in COLOURS)
STAGE_TITLES = {
    "data": "drawing the scenes",
    "language_model": "(0) language modelling",
    "stage1": "(1) stage 1, caption-contrastive tuning",
    "embedding": "(2) embedding the captions, both LLMs",
    "clip_from_scratch": "(3a) CLIP training, own text encoder",
    "raw_llm": "(3b) CLIP training, raw LLM",
    "cc_llm": "(3c) CLIP training, CC-tuned LLM",
    "evaluation": "(4) evaluation and report",
}
_LABEL, _COLUMN = 44, 16


def format_table(metrics: dict[str, Any]) -> str:
    """The table of a run, from nothing but the content of `metrics.json`."""
    cra, models, seconds = metrics["caption_retrieval_accuracy"], metrics["models"], metrics["seconds"]
    size = metrics["settings"]["num_held_out"]
    lines = [_row(f"Caption retrieval accuracy (CRA), {size} scenes", ["before", "after stage 1"])]
    lines += [
        _row(f"  {title}", [_percent(cra[when][name]) for when in ("before", "after")])
        for name, (*_, title) in CRA_SETS.items()
    ]
    lines += ["", _row(f"R@1 image to text / text to image, {size} scenes", ["(a) CLIP", "(b) raw LLM", "(c) CC LLM"])]
    for name, (_, title) in RETRIEVAL_SETS.items():
        lines.append(_row(f"  {title}", [_both_ways(models[model][name]) for model in MODEL_TITLES]))
    zero_shot = [_percent(models[model]["zero_shot"]["zero_shot_top1"]) for model in MODEL_TITLES]
    lines += [_row("Zero-shot accuracy, ten digits", zero_shot), ""]
    lines += [_row("Seconds per stage", [])]
    lines += [_row(f"  {STAGE_TITLES[name]}", [f"{value:.0f}"]) for name, value in seconds.items()]
    lines += [_row("  all", [f"{sum(seconds.values()):.0f}"]), ""]
    lines += list(MODEL_TITLES.values())
    return "\n".join(lines)


def _row(label: str, cells: Sequence[str]) -> str:
    return (f"{label:<{_LABEL}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)).rstrip()


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _both_ways(retrieval: dict[str, float]) -> str:
    return " / ".join(_percent(retrieval[f"{way}_recall@1"]) for way in ("image_to_text", "text_to_image"))


def measure_cra(encoder: Any, data: DemoData) -> dict[str, float]:
    """Caption retrieval accuracy on the held-out scenes, per set of `CRA_SETS`."""
    accuracies = {}
    for name, (first, second, _) in CRA_SETS.items():
        captions = [[caption(s, first), caption(s, second, backwards=True)] for s in data.held_out]
        evaluator = CaptionRetrievalEvaluator(captions, batch_size=128)
        accuracies[name] = evaluator(encoder)["caption_retrieval_accuracy"]
    return accuracies


def measure(model: Any, processor: Any, data: DemoData) -> dict[str, Any]:
    """(4) Retrieval in all wordings and languages, and zero-shot classification of single digits."""
    images = [render(scene) for scene in data.held_out]
    results: dict[str, Any] = {}
    for name, (wording, _) in RETRIEVAL_SETS.items():
        captions = [caption(scene, wording) for scene in data.held_out]
        results[name] = evaluate_retrieval(model, images, captions, processor=processor, batch_size=128)
    single = data.held_out_single
    results["zero_shot"] = evaluate_zero_shot_classification(
        model,
        [render(scene) for scene in single],
        [scene.digits[0].digit for scene in single],
        DIGITS,
        ZERO_SHOT_TEMPLATES,
        processor=processor,
        batch_size=128,
    )
    return results


# Queries of the picture: position of the held-out scene, wording.
PICTURE_QUERIES = (
    (0, "english_dense"),
    (0, "german_dense"),
    (0, "spanish_dense"),
    (1, "english_short"),
    (1, "english_compass"),
    (1, "spanish_dense"),
    (2, "english_dense"),
    (2, "german_dense"),
)


def draw(data: DemoData, models: dict[str, tuple[Any, Any]], path: Path, top: int = 5) -> None:
    """The picture: the first held-out scenes as queries, and what models (c) and (a) find for them, side by side."""
    images = [render(scene) for scene in data.held_out]
    texts = [caption(data.held_out[scene], wording) for scene, wording in PICTURE_QUERIES]
    labels = [
        wording.replace("_", ", ") + ("" if wording in PAIRED else " (never paired with an image)")
        for _, wording in PICTURE_QUERIES
    ]
    rows = [GalleryRow(text, scene, [], [], label) for text, (scene, _), label in zip(texts, PICTURE_QUERIES, labels)]
    shown = ("cc_llm", "clip_from_scratch")
    for model, processor in (models[name] for name in shown):
        text_embeds = encode_texts(model, texts, processor=processor)
        best = (text_embeds @ encode_images(model, images, processor=processor).T).topk(top)
        for row, found, scores in zip(rows, best.indices.tolist(), best.values.tolist()):
            row.found += found
            row.scores += scores
    note = ", then of ".join(MODEL_TITLES[name] for name in shown)
    figure = draw_gallery(images, rows, "LLM2CLIP demo", f"The first {top} images of {note}; right ones are framed.")
    figure.savefig(path)
