# SPDX-License-Identifier: Apache-2.0
"""Evaluation: metrics, image-text retrieval, zero-shot classification and caption retrieval."""

from typing import TYPE_CHECKING, Any

from .encoding import encode_images, encode_texts
from .metrics import caption_retrieval_accuracy, mean_per_class_recall, retrieval_metrics, top_k_accuracy
from .retrieval import evaluate_retrieval
from .zero_shot import build_zero_shot_classifier, evaluate_zero_shot_classification


if TYPE_CHECKING:
    from .caption_retrieval import CaptionRetrievalEvaluator


__all__ = [
    "CaptionRetrievalEvaluator",
    "build_zero_shot_classifier",
    "caption_retrieval_accuracy",
    "encode_images",
    "encode_texts",
    "evaluate_retrieval",
    "evaluate_zero_shot_classification",
    "mean_per_class_recall",
    "retrieval_metrics",
    "top_k_accuracy",
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
