# SPDX-License-Identifier: Apache-2.0
"""
Published numbers to hold a result against, in percent.

Numbers are those of each set. Averages are not in the tables: they are computed from the sets, because some printed
averages of the paper's Table 1 (version 6) are not the means of their rows.
"""

from typing import NamedTuple


__all__ = ["ENGLISH_SETS", "PUBLISHED", "PublishedResult", "average"]

ENGLISH_SETS = ("flickr30k", "coco", "sharegpt4v-1k", "urban1k", "docci")
"""The five sets that the paper averages over."""

_TABLE_1 = "arXiv 2411.04997v6, Table 1"
_TABLE_2 = "arXiv 2411.04997v6, Table 2"
_TABLE_3 = "arXiv 2411.04997v6, Table 3"
_CRA = "arXiv 2411.04997v6, section 4.2 (corrected values)"
_ISSUE = "github.com/microsoft/LLM2CLIP, issue 28 (a user, released weights)"


class PublishedResult(NamedTuple):
    """
    One row of a published table.

    Args:
        model (`str`): name of the model.
        tower (`str`): size and resolution of its vision tower, `""` for a text encoder.
        source (`str`): where the numbers are printed.
        scores (`dict`): percent by task; R@1 of both directions, image to text first, or one number.
    """

    model: str
    tower: str
    source: str
    scores: dict[str, tuple[float, ...]]


def average(scores: dict[str, tuple[float, ...]]) -> tuple[float, ...] | None:
    """
    Mean of the five English sets in each direction.

    Args:
        scores (`dict`): percent by task.

    Returns:
        `tuple[float, float]`, or `None` if a set is missing.

    Example:
    >>> average({name: (90.0, 80.0) for name in ENGLISH_SETS})
    (90.0, 80.0)
    """
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
