# SPDX-License-Identifier: Apache-2.0
"""The view of a result: tables beside published numbers, hardware, and entries of a model card."""

import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub import EvalResult

from .definitions import TASKS, read_table


ENGLISH_SETS = ("flickr30k", "coco", "sharegpt4v-1k", "urban1k", "docci")
"""The five sets that the paper averages over."""


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


PUBLISHED: tuple[PublishedResult, ...] = tuple(
    PublishedResult(
        model,
        tower,
        table["source"],
        {column: tuple(cell) for column, cell in zip(table["columns"], cells) if cell is not None},
    )
    for table in read_table("published.yaml")
    for model, tower, *cells in table["rows"]
)
_RETRIEVAL = ("image_to_text_recall@1", "text_to_image_recall@1")
_RETRIEVAL_KINDS = ("retrieval", "cross-lingual")
_UNITS = "R@1 in percent, image to text/text to image."
_AVERAGE = (
    "avg: mean of the five sets, computed from the columns; some averages printed in the paper's Table 1 are not."
)
_TYPES = {
    "retrieval": "image-text-retrieval",
    "cross-lingual": "image-text-retrieval",
    "zero-shot": "zero-shot-image-classification",
    "cra": "sentence-similarity",
    "composition": "image-text-matching",
    "winoground": "image-text-matching",
}
# What results files say besides results.
_NO_METRICS = ("command", "versions", "settings", "options", "config", "args", "training")
# Times, and the loss, whose value depends on the size of the batch.
_NO_QUALITY = re.compile(r"(^|_)(loss|runtime|samples_per_second|steps_per_second|(preparation|compilation)_time)$")
# Metrics that are shares: fractions in results, percent in cards.
_SHARE = re.compile(r"recall@|top[0-9]|accuracy")
_CELL = 11
_SCORE_NAMES = {
    "zero-shot": "zero_shot_top1",
    "cra": "caption_retrieval_accuracy",
    "composition": "composition_accuracy",
    "winoground": "group_score",
}


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
    return _percent(task["metrics"], _main_metrics(task))


def _main_metrics(task: Mapping[str, Any]) -> tuple[str, ...]:
    return _RETRIEVAL if task["kind"] in _RETRIEVAL_KINDS else (_SCORE_NAMES[task["kind"]],)


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
        lines += _joint_space_lines(task.get("joint_space", {}))
        if "languages" in task:
            lines += _language_lines(task["languages"])
    else:
        lines += [
            f"  {key.replace('zero_shot_', '').replace('_', ' ')} {100 * value:.1f}"
            for key, value in metrics.items()
            if not key.startswith("num_")
        ]
        for category, result in task.get("categories", {}).items():
            lines.append(f"    {category} {100 * result['accuracy']:.1f} ({result['num_images']} images)")
    if task["skipped"]:
        lines.append(f"  left out: {', '.join(f'{what} {count}' for what, count in task['skipped'].items())}")
    return lines


def _joint_space_lines(values: Mapping[str, float]) -> list[str]:
    """What a cosine means, and how images and texts lie."""
    lines = []
    if "match_threshold" in values:
        percent = {name: f"{100 * values[f'match_{name}']:.1f}" for name in ("precision", "recall")}
        lines.append(
            f"  match from cosine {values['match_threshold']:.3f} on: precision {percent['precision']}, recall "
            f"{percent['recall']} (as many other pairs as matches; mean cosine {values['matching_cosine']:.3f} and "
            f"{values['other_cosine']:.3f})"
        )
    if values:
        uniformity = "/".join(f"{values[f'{name}_uniformity']:.2f}" for name in ("image", "text"))
        lines.append(
            f"  modality gap {values['modality_gap']:.2f}   alignment {values['alignment']:.2f}   "
            f"uniformity image/text {uniformity}"
        )
    return lines


def _language_lines(languages: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Four languages a line: R@1 of both directions."""
    width = max(map(len, languages))
    cells = [f"{name:<{width}} {_both(_percent(metrics)):>10}" for name, metrics in languages.items()]
    return ["    " + "    ".join(cells[start : start + 4]) for start in range(0, len(cells), 4)]


def _percent(metrics: Mapping[str, float], names: Sequence[str] = _RETRIEVAL) -> tuple[float, ...]:
    return tuple(100 * metrics[name] for name in names)


def describe_hardware(device: Any) -> dict[str, Any]:
    """What a result says of the machine."""
    device = torch.device(device)
    described = {"device": device.type, "cpu_threads": torch.get_num_threads(), "system": platform.system()}
    if device.type == "cuda":
        described["name"] = torch.cuda.get_device_name(device)
    return described


def metric_rows(results: Mapping[str, Any], data: str = "") -> Iterator[tuple[str, str, float]]:
    """Rows `(data set, metric, value)` of nested results; what is not a number, or no result, is left out."""
    for name, value in results.items():
        if isinstance(value, Mapping):
            if name not in _NO_METRICS:
                yield from metric_rows(value, f"{data} / {name}" if data else str(name))
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and not _NO_QUALITY.search(name):
            yield data, str(name), value


def to_eval_results(record: Mapping[str, Any]) -> list[EvalResult]:
    """
    Entries for the metadata of a model card (`model-index`).

    Args:
        record (mapping):
            The content of a `results.json`: of `llm2clip evaluate`, where partial results are refused; or of
            training, metrics by name, or such dictionaries by data set, as deep as needed.

    Returns:
        `list[EvalResult]`: of `llm2clip evaluate` one per task and main metric, of a cross-lingual task the mean of
            its languages; else one per metric. Recall and accuracy are in percent.

    Raises:
        ValueError: if a result is of a part of the images only.

    Example:
    >>> task = {"kind": "cra", "title": "CRA on COCO", "partial": False, "split": "test", "fingerprint": {},
    ...     "metrics": {"caption_retrieval_accuracy": 0.295}}
    >>> [result] = to_eval_results({"tasks": {"cra": task}})
    >>> result.dataset_name, result.metric_value
    ('CRA on COCO', 29.5)
    """
    if "tasks" not in record:
        return [
            _entry(
                metric,
                value,
                task_type=_TYPES["zero-shot" if metric.startswith("zero_shot") else "retrieval"],
                dataset_type=re.sub(r"[^a-z0-9]+", "-", data.lower()).strip("-"),
                dataset_name=data,
            )
            for data, metric, value in metric_rows(record)
        ]
    entries = []
    for name, task in record["tasks"].items():
        if task["partial"]:
            raise ValueError(f"The result of `{name}` is of a part of the images. Run it without `max_images`.")
        hub = TASKS[name].hub if name in TASKS and "revision" in task["fingerprint"] else None
        fields = {
            "task_type": _TYPES[task["kind"]],
            "dataset_type": name if hub is None else hub.repo,
            "dataset_name": task["title"],
            "dataset_split": task["split"],
            "dataset_revision": task["fingerprint"].get("revision"),
        }
        entries += [_entry(key, task["metrics"][key], **fields) for key in _main_metrics(task)]
    return entries


def _entry(metric: str, value: float, **fields: Any) -> EvalResult:
    return EvalResult(
        metric_type=metric.replace("@", "_at_"),
        metric_name=metric.replace("_", " "),
        metric_value=round(100 * value, 2) if _SHARE.search(metric) else value,
        **fields,
    )


__all__ = [
    "ENGLISH_SETS",
    "PUBLISHED",
    "average",
    "describe_hardware",
    "format_report",
    "metric_rows",
    "to_eval_results",
]
