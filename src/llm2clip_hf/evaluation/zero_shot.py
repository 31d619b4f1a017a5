# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification: class names become text embeddings, images are given the nearest one."""

from collections.abc import Sequence
from typing import Any

import torch

from ..data.images import ImageSource
from .encoding import encode_images, encode_texts
from .metrics import mean_per_class_recall, top_k_accuracy
from .prompts import SINGLE_TEMPLATE, fill_template


__all__ = ["build_zero_shot_classifier", "evaluate_zero_shot_classification"]

_TOP_K = (1, 5)


def build_zero_shot_classifier(
    model: Any,
    class_names: Sequence[str],
    templates: Sequence[str] = SINGLE_TEMPLATE,
    *,
    processor: Any,
    batch_size: int = 64,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    show_progress: bool = False,
) -> torch.Tensor:
    """
    One text embedding per class, averaged over templates.

    Each text embedding is L2-normalized, the mean is taken over the templates, and the mean is normalized again
    (CLIP's prompt ensemble; paper section 4.1).

    Args:
        model: `LLM2CLIPModel` with its LLM, or a model of transformers with CLIP's interface.
        class_names (sequence of `str`): names, one per class.
        templates (sequence of `str`, defaults to `("a photo of the {}",)`): texts with `{}` for the name.
        processor: processor or tokenizer of the model.
        batch_size (`int`, defaults to 64): texts per forward pass.
        max_length (`int`, *optional*): tokens per text, see `encode_texts`.
        device (*optional*): device to move the model to first; by default the model stays where it is.
        show_progress (`bool`, defaults to `False`): show a progress bar.

    Returns:
        `torch.Tensor` of shape `(num_classes, projection_dim)`, float32, L2-normalized, on the CPU.

    Raises:
        ValueError: if there is no class or no template, a name is empty, or a template has no `{}`.

    Example:
    >>> classifier = build_zero_shot_classifier(model, ["tulip", "daisy"], processor=processor)  # doctest: +SKIP
    >>> (encode_images(model, images, processor=processor) @ classifier.T).argmax(dim=1)  # doctest: +SKIP
    tensor([1, 0, 0])
    """
    if not class_names or not templates:
        raise ValueError(
            f"A classifier needs at least one class and one template, got {len(class_names)} and {len(templates)}."
        )
    for position, name in enumerate(class_names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"Class {position} is named {name!r}. Give every class a non-empty name.")
    texts = [fill_template(template, name) for name in class_names for template in templates]
    embeds = encode_texts(
        model,
        texts,
        processor=processor,
        batch_size=batch_size,
        max_length=max_length,
        device=device,
        show_progress=show_progress,
    )
    per_class = embeds.view(len(class_names), len(templates), -1).mean(dim=1)
    return torch.nn.functional.normalize(per_class, dim=-1)


def evaluate_zero_shot_classification(
    model: Any,
    images: ImageSource,
    labels: Sequence[int] | torch.Tensor,
    class_names: Sequence[str],
    templates: Sequence[str] = SINGLE_TEMPLATE,
    *,
    processor: Any,
    batch_size: int = 64,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    show_progress: bool = False,
) -> dict[str, float]:
    """
    Accuracy of zero-shot classification.

    Args:
        model: `LLM2CLIPModel` with its LLM, or a model of transformers with CLIP's interface.
        images: sequence of PIL images or paths, or an image column of a `datasets.Dataset`.
        labels (`(N,)` integers): right class of each image, a position in `class_names`.
        class_names (sequence of `str`): names, one per class.
        templates (sequence of `str`, defaults to `("a photo of the {}",)`): texts with `{}` for the name.
        processor: processor of the model.
        batch_size (`int`, defaults to 64): images or texts per forward pass.
        max_length (`int`, *optional*): tokens per text, see `encode_texts`.
        device (*optional*): device to move the model to first; by default the model stays where it is.
        show_progress (`bool`, defaults to `False`): show progress bars.

    Returns:
        `dict[str, float]`: `zero_shot_top1`, `zero_shot_top5` with five classes or more, and
        `zero_shot_mean_per_class_recall`, all in `[0, 1]`.

    Raises:
        ValueError: if images and labels differ in number, a label is no class, or an image cannot be read.

    Example:
    >>> names = ["tulip", "daisy"]
    >>> evaluate_zero_shot_classification(model, images, [1, 0, 0], names, processor=processor)  # doctest: +SKIP
    {'zero_shot_top1': 1.0, 'zero_shot_mean_per_class_recall': 1.0}
    """
    targets = torch.as_tensor(labels)
    if targets.shape != (len(images),) or targets.is_floating_point():
        raise ValueError(
            f"`labels` must hold one integer per image ({len(images)}), got shape {tuple(targets.shape)} and "
            f"{targets.dtype}."
        )
    # Before the long pass over the images.
    outside = ((targets < 0) | (targets >= len(class_names))).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"Label {int(targets[row])} of image {row} is not a class in [0, {len(class_names)}). "
            "Check that `class_names` lists all classes in the order of the labels."
        )
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "show_progress": show_progress}
    classifier = build_zero_shot_classifier(
        model, class_names, templates, processor=processor, max_length=max_length, **options
    )
    logits = encode_images(model, images, processor=processor, **options) @ classifier.T
    ks = [k for k in _TOP_K if k <= len(class_names)]
    accuracies = top_k_accuracy(logits, targets, ks)
    metrics = {f"zero_shot_{name}": value for name, value in accuracies.items()}
    return metrics | {"zero_shot_mean_per_class_recall": mean_per_class_recall(logits, targets)}
