# SPDX-License-Identifier: Apache-2.0
"""The view of a result: tables beside published numbers, hardware, and entries of a model card."""

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub import EvalResult

from .definitions import TASKS


ENGLISH_SETS = ("flickr30k", "coco", "sharegpt4v-1k", "urban1k", "docci")
"""The five sets that the paper averages over."""
_TABLE_1 = "arXiv 2411.04997v6, Table 1"
_TABLE_2 = "arXiv 2411.04997v6, Table 2"
_TABLE_3 = "arXiv 2411.04997v6, Table 3"
_CRA = "arXiv 2411.04997v6, section 4.2 (corrected values)"
_ISSUE = "github.com/microsoft/LLM2CLIP, issue 28 (a user, released weights)"


class PublishedResult(NamedTuple):
    """One row of a published table."""

    model: str
    tower: str
    source: str
    scores: dict[str, tuple[float, ...]]


def average(scores: dict[str, tuple[float, ...]]) -> tuple[float, ...] | None:
    """Mean of the five English sets in each direction."""
    if any(name not in scores for name in ENGLISH_SETS):
        return None
    rows = [scores[name] for name in ENGLISH_SETS]
    return tuple(sum(column) / len(rows) for column in zip(*rows))


def _english(model: str, tower: str, *numbers: float) -> PublishedResult:
    pairs = list(zip(numbers[::2], numbers[1::2]))
    return PublishedResult(model, tower, _TABLE_1, dict(zip(ENGLISH_SETS, pairs)))


def _rows() -> list[PublishedResult]:
    rows = [
        _english("CLIP", "B/16-224", 82.3, 62.2, 52.4, 33.1, 84.5, 79.8, 67.5, 53.1, 60.7, 57.1),
        _english("CLIP + LLM2CLIP-15M", "B/16-224", 91.8, 80.7, 64.8, 52.4, 97.8, 97.6, 90.1, 92.1, 86.1, 86.9),
        _english("EVA02", "B/16-224", 86.2, 71.5, 58.7, 42.1, 90.5, 85.5, 67.0, 60.8, 67.7, 68.0),
        _english("EVA02 + LLM2CLIP-15M", "B/16-224", 91.2, 81.4, 66.0, 53.9, 98.5, 98.5, 88.2, 91.3, 86.8, 88.5),
        _english("CLIP", "L/14-224", 85.2, 65.0, 56.3, 36.5, 84.2, 83.6, 68.3, 55.6, 63.1, 65.8),
        _english("CLIP + LLM2CLIP-15M", "L/14-224", 93.0, 83.5, 67.4, 56.4, 98.7, 98.6, 91.5, 94.1, 88.3, 90.4),
        _english("EVA02", "L/14-224", 89.7, 77.3, 63.7, 47.5, 91.9, 89.3, 73.3, 68.5, 73.5, 75.0),
        _english("EVA02 + LLM2CLIP-3M", "L/14-224", 94.3, 84.3, 65.2, 56.0, 98.0, 98.0, 91.0, 94.7, 87.8, 90.7),
        _english("EVA02 + LLM2CLIP-15M", "L/14-224", 94.6, 85.0, 69.5, 58.3, 98.9, 99.1, 93.6, 95.7, 89.8, 91.2),
        _english("EVA02 + LLM2CLIP-60M", "L/14-224", 95.9, 85.1, 71.7, 58.5, 99.2, 99.2, 95.2, 97.0, 90.1, 92.0),
        _english("Long-CLIP", "L/14-224", 90.0, 76.2, 62.8, 46.3, 97.2, 97.3, 82.5, 86.1, 66.5, 78.6),
        _english("CLIP", "L/14-336", 87.7, 67.0, 58.0, 37.1, 86.2, 84.0, 72.8, 57.0, 67.4, 65.7),
        _english("CLIP + LLM2CLIP-15M", "L/14-336", 91.2, 82.1, 65.5, 53.6, 98.1, 98.4, 90.3, 93.2, 87.7, 89.0),
        _english("CLIP + LLM2CLIP-60M", "L/14-336", 93.9, 84.3, 68.5, 54.8, 98.9, 99.1, 96.6, 97.9, 89.6, 91.6),
        _english("EVA02", "L/14-336", 89.6, 78.0, 64.2, 47.9, 91.5, 89.4, 76.6, 70.0, 74.7, 76.4),
        _english("EVA02 + LLM2CLIP-15M", "L/14-336", 94.7, 85.1, 69.7, 58.5, 98.8, 99.2, 93.5, 96.2, 89.2, 91.3),
        _english("EVA02 + LLM2CLIP-60M", "L/14-336", 95.9, 85.4, 72.4, 58.8, 98.8, 99.2, 95.5, 97.3, 90.7, 92.6),
        _english("SigLIP2", "So400m/14-224", 93.9, 82.9, 72.0, 55.5, 90.2, 87.2, 75.7, 74.5, 77.0, 78.9),
        _english("SigLIP2 + LLM2CLIP-60M", "So400m/14-224",
                 95.2, 84.6, 73.7, 57.6, 99.4, 99.4, 96.2, 97.3, 91.5, 92.9),
        PublishedResult("EVA02 + LLM2CLIP, released", "L/14-336", _ISSUE, {"urban1k": (96.0, 97.5)}),
        PublishedResult("EVA02 + LLM2CLIP-1B, released", "L/14-336", _ISSUE, {"urban1k": (93.6, 94.1)}),
    ]  # fmt: skip
    for model, flickr, coco, crossmodal in (
        ("CN-CLIP", (80.2, 68.0), (63.4, 64.0), None),
        ("EVA02", (4.4, 0.9), (2.6, 1.0), (14.0, 8.0)),
        ("EVA02 + LLM2CLIP", (90.6, 75.6), (72.0, 70.1), (68.3, 56.0)),
        ("SigLIP2", (79.2, 56.9), (55.3, 51.7), (59.7, 48.2)),
        ("SigLIP2 + LLM2CLIP", (90.0, 76.1), (70.8, 70.2), (69.1, 56.3)),
    ):
        scores: dict[str, tuple[float, ...]] = {"flickr30k-cn": flickr, "coco-cn": coco}
        tower = {"EVA02": "L/14-224", "SigLIP2": "So400m/14-224"}.get(model.split(" ")[0], "")
        rows.append(
            PublishedResult(model, tower, _TABLE_2, scores | ({} if crossmodal is None else {"xm3600": crossmodal}))
        )
    for model, tower, single, ensemble in (
        ("CLIP", "L/14-224", 73.7, 75.5),
        ("CLIP + LLM2CLIP", "L/14-224", 73.2, 74.3),
        ("CLIP", "L/14-336", 74.9, 76.6),
        ("CLIP + LLM2CLIP", "L/14-336", 74.6, 75.8),
    ):
        rows.append(PublishedResult(model, tower, _TABLE_3, {"imagenet": (single,), "imagenet-80": (ensemble,)}))
    for model, accuracy in (
        ("CLIP-L/14, text tower", 25.2),
        ("EVA02-L/14, text tower", 27.1),
        ("Llama-3-8B", 5.2),
        ("Llama-3.2-1B", 5.6),
        ("Llama-3-8B-CC", 29.5),
        ("Llama-3.2-1B-CC", 29.4),
    ):
        rows.append(PublishedResult(model, "", _CRA, {"cra": (accuracy,)}))
    return rows


PUBLISHED: tuple[PublishedResult, ...] = tuple(_rows())
_RETRIEVAL = ("image_to_text_recall@1", "text_to_image_recall@1")
_RETRIEVAL_KINDS = ("retrieval", "cross-lingual")
_UNITS = "R@1 in percent, image to text/text to image."
_AVERAGE = (
    "avg: mean of the five sets, computed from the columns; some averages printed in the paper's Table 1 are not."
)
_CELL, _SCORE_NAMES = 11, {"zero-shot": "zero_shot_top1", "cra": "caption_retrieval_accuracy"}


def format_report(record: Mapping[str, Any], with_published: bool = True) -> str:
    """
    The tables of a run, from nothing but the content of `results.json`.

    Args:
        record (mapping): with `model` and `tasks`, as `llm2clip evaluate` writes it.
        with_published (`bool`, defaults to `True`): show published numbers beside; never beside a partial result.

    Returns:
        `str`: lines of text; all figures are percentages.
    """
    tasks: Mapping[str, Any] = record["tasks"]
    # A name of a folder fits the column, a whole path would not.
    model = os.path.basename(str(record["model"]["name"]).rstrip("/"))
    columns = {}
    if with_published:
        columns = {
            task["published"]: name
            for name, task in tasks.items()
            if task["published"] in TASKS and not task["partial"] and _is_published(task["published"])
        }
    lines: list[str] = []
    for chosen, note in (
        ([name for name in ENGLISH_SETS if name in columns], _UNITS),
        ([name for name in ("flickr30k-cn", "coco-cn", "xm3600") if name in columns], _UNITS),
        ([name for name in ("imagenet", "imagenet-80") if name in columns], "Zero-shot accuracy, top-1, in percent."),
        ([name for name in ("cra",) if name in columns], "Caption retrieval accuracy in percent."),
    ):
        if chosen:
            own = {name: _scores(tasks[columns[name]]) for name in chosen}
            average_note = [_AVERAGE] if list(chosen) == list(ENGLISH_SETS) else []
            lines += [*_comparison(model, own, chosen), note, *average_note, ""]
    for name, task in tasks.items():
        lines += [*_task_lines(name, task), ""]
    return "\n".join(lines).rstrip()


def _is_published(column: str) -> bool:
    return any(column in row.scores for row in PUBLISHED)


def _scores(task: Mapping[str, Any]) -> tuple[float, ...]:
    """Percent of a task's main metrics."""
    metrics = task["metrics"]
    names = _RETRIEVAL if task["kind"] in _RETRIEVAL_KINDS else (_SCORE_NAMES[task["kind"]],)
    return tuple(100 * metrics[name] for name in names)


def _comparison(model: str, own: dict[str, tuple[float, ...]], columns: Sequence[str]) -> list[str]:
    titles = [TASKS[name].title for name in columns]
    all_five = list(columns) == list(ENGLISH_SETS)
    rows = [(row.model, row.tower, row.scores) for row in PUBLISHED if any(name in row.scores for name in columns)]
    width = max(len(model), 29)
    tower = max([len(row[1]) for row in rows] + [5]) + 2
    head = f"{'model':<{width}}  {'tower':<{tower}}" + "".join(
        f"{title:>{max(_CELL, len(title) + 1)}}" for title in titles
    )
    lines = [head + (f"{'avg':>{_CELL}}" if all_five else "")]
    lines.append("-" * len(lines[0]))

    def line(name: str, size: str, scores: Mapping[str, tuple[float, ...]]) -> str:
        cells = [_both(scores.get(column)) for column in columns]
        text = f"{name:<{width}}  {size:<{tower}}"
        text += "".join(f"{cell:>{max(_CELL, len(title) + 1)}}" for cell, title in zip(cells, titles))
        return (text + (f"{_both(average(dict(scores))):>{_CELL}}" if all_five else "")).rstrip()

    lines += [line(*row) for row in rows]
    lines.append("-" * len(lines[0]))
    return [*lines, line(model, "this run", own)]


def _both(scores: tuple[float, ...] | None) -> str:
    return "-" if scores is None else "/".join(f"{score:.1f}" for score in scores)


def _task_lines(name: str, task: Mapping[str, Any]) -> list[str]:
    counts = ", ".join(f"{count} {what}" for what, count in task["counts"].items())
    lines = [f"{name}: {counts}{', PARTIAL' if task['partial'] else ''}"]
    metrics = task["metrics"]
    if task["kind"] in _RETRIEVAL_KINDS:
        mean = "mean of the languages, " if task["kind"] == "cross-lingual" else ""
        for direction, title in (("image_to_text", "image to text"), ("text_to_image", "text to image")):
            recalls = "".join(f"   R@{k} {100 * metrics[f'{direction}_recall@{k}']:5.1f}" for k in (1, 5, 10))
            rank = metrics[f"{direction}_median_rank"]
            lines.append(f"  {mean}{title}{recalls}   median rank {rank:g}")
        if "languages" in task:
            lines += _language_lines(task["languages"])
    else:
        lines += [
            f"  {key.replace('zero_shot_', '').replace('_', ' ')} {100 * value:.1f}"
            for key, value in metrics.items()
            if not key.startswith("num_")
        ]
    if task["skipped"]:
        lines.append(f"  left out: {', '.join(f'{what} {count}' for what, count in task['skipped'].items())}")
    return lines


def _language_lines(languages: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Four languages a line: R@1 of both directions."""
    width = max(map(len, languages))
    cells = [f"{name:<{width}} {_both(_percent(metrics)):>10}" for name, metrics in languages.items()]
    return ["    " + "    ".join(cells[start : start + 4]) for start in range(0, len(cells), 4)]


def _percent(metrics: Mapping[str, float]) -> tuple[float, ...]:
    return tuple(100 * metrics[name] for name in _RETRIEVAL)


def describe_hardware(device: Any) -> dict[str, Any]:
    """What a result says of the machine."""
    device = torch.device(device)
    described = {"device": device.type, "cpu_threads": torch.get_num_threads(), "system": platform.system()}
    if device.type == "cuda":
        described["name"] = torch.cuda.get_device_name(device)
    return described


def to_eval_results(record: Mapping[str, Any]) -> list[EvalResult]:
    """
    Entries for the metadata of a model card (`model-index`).

    Args:
        record (mapping): the content of `results.json`. Partial results are refused.

    Returns:
        `list[EvalResult]`: one per task and main metric, in percent; of a cross-lingual task the mean of its
            languages.

    Raises:
        ValueError: if a result is of a part of the images only.

    Example:
    >>> task = {"kind": "cra", "title": "CRA on COCO", "partial": False, "split": "test", "fingerprint": {},
    ...     "metrics": {"caption_retrieval_accuracy": 0.295}}
    >>> [result] = to_eval_results({"tasks": {"cra": task}})
    >>> result.dataset_name, result.metric_value
    ('CRA on COCO', 29.5)
    """
    types = {
        "retrieval": "image-text-retrieval",
        "cross-lingual": "image-text-retrieval",
        "zero-shot": "zero-shot-image-classification",
        "cra": "sentence-similarity",
    }
    entries = []
    for name, task in record["tasks"].items():
        if task["partial"]:
            raise ValueError(f"The result of `{name}` is of a part of the images. Run it without `max_images`.")
        keys = list(_RETRIEVAL) if task["kind"] in _RETRIEVAL_KINDS else [_SCORE_NAMES[task["kind"]]]
        hub = TASKS[name].hub if name in TASKS and "revision" in task["fingerprint"] else None
        for key in keys:
            entries.append(
                EvalResult(
                    task_type=types[task["kind"]],
                    dataset_type=name if hub is None else hub.repo,
                    dataset_name=task["title"],
                    dataset_split=task["split"],
                    dataset_revision=task["fingerprint"].get("revision"),
                    metric_type=key.replace("@", "_at_"),
                    metric_name=key.replace("_", " "),
                    metric_value=round(100 * task["metrics"][key], 2),
                )
            )
    return entries


__all__ = [
    "ENGLISH_SETS",
    "PUBLISHED",
    "PublishedResult",
    "average",
    "describe_hardware",
    "format_report",
    "to_eval_results",
]
