# SPDX-License-Identifier: Apache-2.0
"""Evaluation: metrics, image-text retrieval, zero-shot classification, linear probe and caption retrieval."""

from typing import TYPE_CHECKING, Any

from .caption_accuracy import evaluate_caption_retrieval
from .dense_features import dense_image_features
from .encoding import encode_images, encode_texts
from .joint_space import composition_accuracy, joint_space_statistics, match_threshold, winoground_scores
from .linear_probe import evaluate_linear_probe
from .metrics import caption_retrieval_accuracy, retrieval_metrics
from .mteb_wrapper import MTEBEncoder
from .retrieval import evaluate_retrieval
from .segmentation import evaluate_zero_shot_segmentation
from .tasks.definitions import resolve_tasks
from .tasks.report import format_report, to_eval_results
from .tasks.runner import evaluate_tasks
from .text_towers import embed_texts
from .zero_shot import (
    build_zero_shot_classifier,
    evaluate_zero_shot_classification,
    mean_per_class_recall,
    top_k_accuracy,
)


if TYPE_CHECKING:
    from .caption_retrieval import CaptionRetrievalEvaluator


__all__ = [
    "CaptionRetrievalEvaluator",
    "MTEBEncoder",
    "build_zero_shot_classifier",
    "caption_retrieval_accuracy",
    "composition_accuracy",
    "dense_image_features",
    "embed_texts",
    "encode_images",
    "encode_texts",
    "evaluate_caption_retrieval",
    "evaluate_linear_probe",
    "evaluate_retrieval",
    "evaluate_tasks",
    "evaluate_zero_shot_classification",
    "evaluate_zero_shot_segmentation",
    "format_report",
    "joint_space_statistics",
    "match_threshold",
    "mean_per_class_recall",
    "resolve_tasks",
    "retrieval_metrics",
    "to_eval_results",
    "top_k_accuracy",
    "winoground_scores",
]


def __getattr__(name: str) -> Any:
    # On first use, because sentence-transformers takes seconds to import and is part of an extra.
    if name != "CaptionRetrievalEvaluator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .caption_retrieval import CaptionRetrievalEvaluator
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "sentence_transformers":
            raise
        raise ImportError(
            "`CaptionRetrievalEvaluator` needs `sentence-transformers`. "
            "Install it with `pip install llm2clip-hf[train]`."
        ) from error
    return CaptionRetrievalEvaluator
