# SPDX-License-Identifier: Apache-2.0
"""Pictures of a result: recall of every task, R@1 of every language, and queries with the images found for them."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.images import ImageSource, load_image
from ...files import write_atomically
from .runner import Evaluation, GalleryRow


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Two hues, three shades each: direction by hue, cut-off by shade; told apart in gray, too.
_IMAGE_TO_TEXT, _TEXT_TO_IMAGE = "#2f6db3", "#d9822b"
_INK, _GRID, _RIGHT, _WRONG = "#22272e", "#e3e6ea", "#2f9e58", "#c9ced6"
_ALPHAS = {10: 0.30, 5: 0.55, 1: 1.0}
_DPI = 130
_FONTS = (
    "DejaVu Sans", "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Devanagari", "Noto Sans Bengali",
    "Noto Sans Thai", "Noto Sans Telugu", "Noto Sans Tamil", "Noto Sans Ethiopic", "Arial Unicode MS",
)  # fmt: skip


def write_pictures(evaluation: Evaluation, folder: str | Path, model_name: str) -> list[Path]:
    """Draw all pictures of a run."""
    folder = Path(folder)
    written: list[Path] = []

    def save(name: str, figure: "Figure") -> None:
        path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.png"
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=_DPI))
        written.append(path)

    retrieval = {
        task["title"]: task["metrics"]
        for task in evaluation.results.values()
        if task["kind"] in ("retrieval", "cross-lingual")
    }
    if retrieval:
        save("recall", draw_recalls(retrieval, model_name))
    for name, task in evaluation.results.items():
        if "languages" in task:
            save(f"languages-{name}", draw_languages(task["languages"], f"{task['title']}: {model_name}"))
    for name, (images, rows) in evaluation.galleries.items():
        save(f"gallery-{name}", draw_gallery(images, rows, f"{evaluation.results[name]['title']}: {model_name}"))
    return written


def draw_recalls(metrics: Mapping[str, Mapping[str, float]], title: str) -> "Figure":
    """Horizontal bars of R@1, R@5 and R@10 in both directions, a pair per task."""
    from matplotlib.patches import Patch

    figure = _figure(8.2, 1.35 + 0.78 * len(metrics))
    axes = figure.add_subplot()
    for row, values in enumerate(metrics.values()):
        for offset, direction, colour in (
            (-0.19, "image_to_text", _IMAGE_TO_TEXT),
            (0.19, "text_to_image", _TEXT_TO_IMAGE),
        ):
            for k, alpha in _ALPHAS.items():
                # White below, so that the shades do not add up.
                value = 100 * values[f"{direction}_recall@{k}"]
                axes.barh(row + offset, value, 0.34, color="white", zorder=2)
                axes.barh(row + offset, value, 0.34, color=colour, alpha=alpha, zorder=2, linewidth=0)
            numbers = " / ".join(f"{100 * values[f'{direction}_recall@{k}']:.1f}" for k in sorted(_ALPHAS))
            axes.text(101, row + offset, numbers, va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(metrics)), [textwrap.fill(name, 24) for name in metrics], fontsize=9)
    axes.set_ylim(len(metrics) - 0.45, -0.55)
    axes.set_xlim(0, 100)
    axes.set_xlabel("recall, percent", fontsize=9)
    _tidy(axes, "x")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK, pad=26)
    handles = [Patch(color=_IMAGE_TO_TEXT, label="image to text"), Patch(color=_TEXT_TO_IMAGE, label="text to image")]
    handles += [Patch(color="#555c66", alpha=_ALPHAS[k], linewidth=0, label=f"R@{k}") for k in (1, 5, 10)]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=5, frameon=False, fontsize=8,
                handlelength=1.2, columnspacing=1.4)  # fmt: skip
    return figure


def draw_languages(languages: Mapping[str, Mapping[str, float]], title: str) -> "Figure":
    """Bars of R@1 per language, best first, with the means as lines."""
    keys = ("image_to_text_recall@1", "text_to_image_recall@1")
    order = sorted(languages, key=lambda name: -sum(languages[name][key] for key in keys))
    figure = _figure(max(5.5, 1.6 + 0.24 * len(order)), 3.5)
    axes = figure.add_subplot()
    highest = 0.0
    for offset, key, colour, label in (
        (-0.2, keys[0], _IMAGE_TO_TEXT, "image to text"),
        (0.2, keys[1], _TEXT_TO_IMAGE, "text to image"),
    ):
        values = [100 * languages[name][key] for name in order]
        mean = sum(values) / len(values)
        highest = max(highest, *values)
        places = [place + offset for place in range(len(order))]
        axes.bar(places, values, 0.38, color=colour, zorder=2, label=f"{label}, mean {mean:.1f}")
        axes.axhline(mean, color=colour, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
    slanted = len(order) > 12 or max(map(len, order)) > 4
    style: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(range(len(order)), order, fontsize=8, **style)
    axes.set_xlim(-0.7, len(order) - 0.3)
    axes.set_ylim(0, min(100.0, 1.08 * highest) if highest else 1)
    axes.set_ylabel("R@1, percent", fontsize=9)
    _tidy(axes, "y")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK, pad=24)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, fontsize=8, handlelength=1.2)
    return figure


def draw_gallery(images: ImageSource, rows: Sequence[GalleryRow], title: str, note: str | None = None) -> "Figure":
    """Queries, each with its best images; right ones are framed; `note` is the line below the title."""
    from matplotlib.patches import Rectangle

    top = max(len(row.found) for row in rows)
    cell, text_width = 1.18, 3.4
    width, height = text_width + cell * top + 0.25, 0.75 + (cell + 0.22) * len(rows)
    figure = _figure(width, height, constrained=False)
    figure.text(0.14 / width, 1 - 0.2 / height, title, fontsize=11, fontweight="bold", color=_INK, va="top")
    note = note or f"queries and their first {top} images; right ones are framed, with cosines"
    figure.text(0.14 / width, 1 - 0.45 / height, note, fontsize=8, color="#68707b", va="top")
    families = _families()
    for number, row in enumerate(rows):
        bottom = (height - 0.72 - (cell + 0.22) * (number + 1) + 0.22) / height
        lines = textwrap.wrap(_drawable(row.query, families), 46)
        query = "\n".join(lines[:6]) + (" ..." if len(lines) > 6 else "")
        middle = bottom + cell / height / 2
        label = f"{row.label}\n" if row.label else ""
        figure.text(0.14 / width, middle, label + query, fontsize=8.5, color=_INK, va="center", linespacing=1.35,
                    family=families)  # fmt: skip
        for place, (image, score) in enumerate(zip(row.found, row.scores)):
            left = (text_width + cell * place) / width
            axes = figure.add_axes((left, bottom, (cell - 0.1) / width, (cell - 0.1) / height))
            axes.imshow(_square(load_image(images, image)), interpolation="antialiased")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            is_right = image == row.right or image in row.rights
            axes.add_patch(
                Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, clip_on=False,
                          edgecolor=_RIGHT if is_right else _WRONG, linewidth=3.2 if is_right else 0.8)
            )  # fmt: skip
            axes.text(0.5, -0.045, f"{score:.2f}", transform=axes.transAxes, ha="center", va="top", fontsize=7,
                      color=_RIGHT if is_right else "#68707b")  # fmt: skip
    return figure


def _figure(width: float, height: float, constrained: bool = True) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need `matplotlib`. Install it with `pip install llm2clip-hf[eval]`.") from error
    return Figure(figsize=(width, height), layout="constrained" if constrained else None, facecolor="white")


def _tidy(axes: "Axes", grid: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#aab1ba")
    axes.tick_params(length=0, labelcolor=_INK)
    axes.tick_params(axis=grid, labelsize=8)
    axes.grid(axis=grid, color=_GRID, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)


def _square(image: Any) -> Any:
    """The middle of an image, so that all cells are alike."""
    side = min(image.size)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, upper, left + side, upper + side))
    return square.resize((224, 224)) if side > 224 else square


def _families() -> list[str]:
    """The default font, and those of other scripts that are installed, for letters that it lacks."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [name for name in _FONTS if name in installed]


def _drawable(text: str, families: Sequence[str]) -> str:
    """`text` with `?` for letters that no installed font has, or a remark where they are many."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    text = " ".join(text.split())
    glyphs = {code for name in families for code in get_font(findfont(FontProperties(family=[name]))).get_charmap()}
    drawable = "".join(letter if letter.isspace() or ord(letter) in glyphs else "?" for letter in text)
    is_lost = 10 * drawable.count("?") > len(text) + 10 * text.count("?")
    return "(no installed font has the letters of this text)" if is_lost else drawable


__all__ = ["draw_gallery", "draw_languages", "draw_recalls", "write_pictures"]
