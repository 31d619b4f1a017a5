# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: the printed table, `metrics.json` and the picture of retrieved images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


MODEL_TITLES = {
    "clip_from_scratch": "(a) CLIP, own text encoder",
    "raw_llm": "(b) raw LLM + CLIP training",
    "cc_llm": "(c) CC-tuned LLM + CLIP training",
}
CRA_TITLES = {
    "english_wordings": "two English wordings",
    "english_german": "English and German",
    "english_spanish": "English and Spanish",
}
RETRIEVAL_TITLES = {
    "short": "short captions",
    "dense": "dense captions",
    "dense_unseen_wording": "dense, wording never paired with an image",
    "dense_german": "dense, German, never paired with an image",
    "dense_spanish": "dense, Spanish, never paired with an image",
}
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
        for name, title in CRA_TITLES.items()
    ]
    lines += ["", _row(f"R@1 image to text / text to image, {size} scenes", ["(a) CLIP", "(b) raw LLM", "(c) CC LLM"])]
    for name, title in RETRIEVAL_TITLES.items():
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


def draw_retrieval(
    images: Sequence[Image.Image],
    queries: Sequence[tuple[str, str, int]],
    found: dict[str, list[list[int]]],
    path: Path,
) -> None:
    """Draws queries and the images that each model finds for them."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    top = len(next(iter(found.values()))[0])
    figure = Figure(figsize=(5 + 0.95 * top * len(found), 1.15 * len(queries) + 0.8), dpi=110)
    widths = [5 / 0.95] + [w for _ in found for w in (0.4, *[1.0] * top)]
    grid = figure.add_gridspec(
        len(queries), len(widths), width_ratios=widths, left=0.01, right=0.99, top=1 - 0.55 / figure.get_figheight(),
        bottom=0.01, wspace=0.08, hspace=0.12,
    )  # fmt: skip
    for row, (kind, text, right) in enumerate(queries):
        axes = figure.add_subplot(grid[row, 0])
        axes.axis("off")
        axes.text(0, 0.98, kind, va="top", fontsize=8, fontweight="bold", transform=axes.transAxes)
        axes.text(0, 0.76, textwrap.fill(text, 62), va="top", fontsize=8, transform=axes.transAxes)
        for block, (model, rows) in enumerate(found.items()):
            for place, image in enumerate(rows[row]):
                axes = figure.add_subplot(grid[row, 2 + block * (top + 1) + place])
                axes.imshow(images[image], interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                if image == right:
                    frame = Rectangle(
                        (0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor="lime", linewidth=5
                    )
                    axes.add_patch(frame)
                if row == 0 and place == 0:
                    axes.set_title(f"{MODEL_TITLES[model]}: top {top}", fontsize=9, loc="left")
    figure.savefig(path)
