# SPDX-License-Identifier: Apache-2.0
"""A zero-shot classifier as a safetensors file: the class matrix, what it was made of, and by which model."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..data.atomic import write_atomically
from .embedding_cache import model_fingerprint, texts_digest
from .encoding import longest_text
from .zero_shot import check_classes


__all__ = ["ZeroShotClassifier", "load_zero_shot_classifier", "save_zero_shot_classifier"]

_FORMAT = "llm2clip_hf zero-shot classifier 1"


class ZeroShotClassifier(NamedTuple):
    """
    A zero-shot classifier that was loaded from a file.

    Args:
        weight (`torch.Tensor` of shape `(num_classes, projection_dim)`): one L2-normalized text embedding per class.
        class_names (`list[str]`): names, in the order of the rows.
        templates (`list[str]`): templates that were averaged over.
    """

    weight: torch.Tensor
    class_names: list[str]
    templates: list[str]


def save_zero_shot_classifier(
    path: str | Path,
    classifier: torch.Tensor,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    model: torch.nn.Module,
    processor: Any,
) -> None:
    """
    Save a classifier with what it was made of.

    Args:
        path (`str` or `Path`): safetensors file to write; it appears whole or not at all.
        classifier (`torch.Tensor` of shape `(num_classes, projection_dim)`): from `build_zero_shot_classifier`.
        class_names (sequence of `str`): its names.
        templates (sequence of `str`): its templates.
        model: the model that made it.
        processor: the processor or tokenizer that made it.

    Raises:
        ValueError: if names and rows differ in number.

    Example:
    >>> save_zero_shot_classifier(
    ...     "flowers.safetensors", weight, names, templates, model=model, processor=processor
    ... )  # doctest: +SKIP
    >>> load_zero_shot_classifier("flowers.safetensors", model=model, processor=processor).weight  # doctest: +SKIP
    """
    check_classes(class_names, templates, allow_duplicates=True)
    if classifier.ndim != 2 or len(classifier) != len(class_names):
        raise ValueError(
            f"`classifier` must have one row per class ({len(class_names)}), got shape {tuple(classifier.shape)}."
        )
    metadata = {
        "format": _FORMAT,
        "class_names": json.dumps(list(class_names)),
        "templates": json.dumps(list(templates)),
        "fingerprint": _fingerprint(model, processor, class_names, templates),
    }
    content = {"weight": classifier.detach().cpu().contiguous()}
    write_atomically(Path(path), lambda temporary: save_file(content, temporary, metadata=metadata))


def load_zero_shot_classifier(
    path: str | Path, *, model: torch.nn.Module | None = None, processor: Any = None
) -> ZeroShotClassifier:
    """
    Load a classifier that `save_zero_shot_classifier` wrote.

    Args:
        path (`str` or `Path`): file written by `save_zero_shot_classifier`.
        model (*optional*): refuse the file unless this model made it, with these weights.
        processor (*optional*): processor or tokenizer of `model`; given with it.

    Returns:
        `ZeroShotClassifier`.

    Raises:
        ValueError: if the file is none of ours or damaged, or another model or tokenizer made it.
    """
    if (model is None) != (processor is None):
        raise ValueError("`model` and `processor` go together: both decide a classifier. Pass both or neither.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weight = file.get_tensor("weight") if metadata.get("format") == _FORMAT else None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"`{path}` cannot be read: {error}. Build the classifier again.") from error
    if weight is None:
        raise ValueError(
            f"`{path}` is not a zero-shot classifier of this package. Write one with `save_zero_shot_classifier`."
        )
    loaded = ZeroShotClassifier(weight, json.loads(metadata["class_names"]), json.loads(metadata["templates"]))
    if model is not None and metadata["fingerprint"] != _fingerprint(
        model, processor, loaded.class_names, loaded.templates
    ):
        raise ValueError(f"`{path}` was made by another model or tokenizer. Build the classifier again.")
    return loaded


def _fingerprint(model: torch.nn.Module, processor: Any, class_names: Sequence[str], templates: Sequence[str]) -> str:
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = texts_digest([*class_names, *templates], tokenizer, longest_text(model, tokenizer))
    return hashlib.sha256(f"{model_fingerprint(model)}|{texts}".encode()).hexdigest()
