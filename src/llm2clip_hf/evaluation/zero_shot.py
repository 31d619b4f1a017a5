# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification: class names become text embeddings, images are given the nearest one."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.images import ImageSource
from .encoding import encode_images, encode_texts
from .metrics import Counts, check_cutoffs, check_rows, hit_probability, hit_rate


# The single-template protocol of the paper (Table 3).
SINGLE_TEMPLATE = ("a photo of the {}",)


def fill_template(template: str, class_name: str) -> str:
    """Put a class name into a template."""
    if "{}" not in template:
        raise ValueError(f"The template {template!r} has no `{{}}` for the class name. Add one.")
    return template.replace("{}", class_name)


_TOP_K = (1, 5)
# Texts held at a time while a classifier is built: 80 templates of a few dozen classes.
_TEXTS_PER_BLOCK = 4096


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
    allow_duplicates: bool = False,
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
        allow_duplicates (`bool`, defaults to `False`):
            Accept classes of the same name, which then share their hits at random. CLIP's names of the ImageNet
            classes need it: two of them are "sunglasses".

    Returns:
        `torch.Tensor` of shape `(num_classes, projection_dim)`, float32, L2-normalized, on the CPU.

    Raises:
        ValueError: if there is no class or no template, a name is empty or occurs twice, or a template has no `{}`.

    Example:
    >>> classifier = build_zero_shot_classifier(model, ["tulip", "daisy"], processor=processor)  # doctest: +SKIP
    >>> (encode_images(model, images, processor=processor) @ classifier.T).argmax(dim=1)  # doctest: +SKIP
    tensor([1, 0, 0])
    """
    check_classes(class_names, templates, allow_duplicates)
    per_block = max(_TEXTS_PER_BLOCK // len(templates), 1)
    rows = []
    for start in tqdm(range(0, len(class_names), per_block), desc="Classes", disable=not show_progress):
        block = class_names[start : start + per_block]
        texts = [fill_template(template, name) for name in block for template in templates]
        embeds = encode_texts(
            model, texts, processor=processor, batch_size=batch_size, max_length=max_length, device=device
        )
        rows.append(embeds.view(len(block), len(templates), -1).mean(dim=1))
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def check_classes(class_names: Sequence[str], templates: Sequence[str], allow_duplicates: bool) -> None:
    """Raise a `ValueError` that says which class or template is none."""
    for name, value in (("class_names", class_names), ("templates", templates)):
        if isinstance(value, str):
            raise ValueError(f"`{name}` is one string, {value!r}. Pass a list of strings.")
    if not len(class_names) or not len(templates):
        raise ValueError(
            f"A classifier needs at least one class and one template, got {len(class_names)} and {len(templates)}."
        )
    for position, name in enumerate(class_names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"Class {position} is named {name!r}. Give every class a non-empty name.")
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated and not allow_duplicates:
        rows = [position for position, name in enumerate(class_names) if name == repeated[0]]
        raise ValueError(
            f"Classes {rows} are all named {repeated[0]!r} ({len(repeated)} such names), so that no text tells them "
            "apart. Rename or merge them, or pass `allow_duplicates=True`."
        )


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
    classifier: torch.Tensor | None = None,
    allow_duplicates: bool = False,
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
        classifier (`torch.Tensor` of shape `(num_classes, projection_dim)`, *optional*):
            What `build_zero_shot_classifier` gave for these classes; `templates` are not used then.
        allow_duplicates (`bool`, defaults to `False`): accept classes of the same name, see
            `build_zero_shot_classifier`.

    Returns:
        `dict[str, float]`: `zero_shot_top1`, `zero_shot_top5` with five classes or more, and
        `zero_shot_mean_per_class_recall`, all in `[0, 1]`.

    Raises:
        ValueError: if images and labels differ in number, a label is no class, a class has no or no own name, or an
            image cannot be read.

    Example:
    >>> names = ["tulip", "daisy"]
    >>> evaluate_zero_shot_classification(model, images, [1, 0, 0], names, processor=processor)  # doctest: +SKIP
    {'zero_shot_top1': 1.0, 'zero_shot_mean_per_class_recall': 1.0}
    """
    # Before the long pass over the images.
    check_classes(class_names, templates, allow_duplicates)
    targets = check_labels(labels, len(images), len(class_names))
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "show_progress": show_progress}
    own: dict[str, Any] = {"max_length": max_length, "allow_duplicates": allow_duplicates}
    weight = given_or_built(classifier, model, class_names, templates, processor=processor, **own, **options)
    logits = encode_images(model, images, processor=processor, **options) @ weight.T
    return classification_metrics(logits, targets, "zero_shot")


def given_or_built(
    classifier: torch.Tensor | None, model: Any, class_names: Sequence[str], templates: Sequence[str], **options: Any
) -> torch.Tensor:
    """The classifier that a user gave, checked, or that of `build_zero_shot_classifier`."""
    if classifier is None:
        return build_zero_shot_classifier(model, class_names, templates, **options)
    if classifier.ndim != 2 or len(classifier) != len(class_names):
        raise ValueError(
            f"`classifier` must have one row per class ({len(class_names)}), got shape {tuple(classifier.shape)}."
        )
    return classifier


def check_labels(labels: Sequence[int] | torch.Tensor, num_images: int, num_classes: int) -> torch.Tensor:
    """`labels` as a tensor; a `ValueError` names the first one that is no class in `[0, num_classes)`."""
    targets = torch.as_tensor(labels)
    if targets.shape != (num_images,) or targets.is_floating_point():
        raise ValueError(
            f"`labels` must hold one integer per image ({num_images}), got shape {tuple(targets.shape)} and "
            f"{targets.dtype}."
        )
    outside = ((targets < 0) | (targets >= num_classes)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"Label {int(targets[row])} of image {row} is not a class in [0, {num_classes}). "
            "Check that `class_names` lists all classes in the order of the labels."
        )
    return targets.long()


def classification_metrics(logits: torch.Tensor, targets: torch.Tensor, prefix: str) -> dict[str, float]:
    """Top-1, top-5 (with five classes or more) and mean per-class recall, with `prefix` in front."""
    ks = [k for k in _TOP_K if k <= logits.shape[1]]
    metrics = {f"{prefix}_{name}": value for name, value in top_k_accuracy(logits, targets, ks).items()}
    return metrics | {f"{prefix}_mean_per_class_recall": mean_per_class_recall(logits, targets)}


def top_k_accuracy(logits: torch.Tensor, labels: torch.Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """
    Share of samples whose class is among the `k` highest logits.

    Classes that tie with the right one share the places at random: two classes of the same name get half each.

    Args:
        logits (`torch.Tensor` of shape `(N, C)`): score of each class.
        labels (`torch.LongTensor` of shape `(N,)`): right class in `[0, C)`.
        ks (sequence of `int`, defaults to `(1, 5)`): cut-offs, each at most `C`.

    Returns:
        `dict[str, float]`: `top1`, `top5`, ..., in `[0, 1]`.

    Raises:
        ValueError: if shapes disagree, a row of logits is not finite, a label is out of range, or a cut-off is not
            between 1 and `C`.

    Example:
    >>> top_k_accuracy(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]]), torch.tensor([1, 2]), ks=(1, 2))
    {'top1': 0.5, 'top2': 1.0}
    """
    check_cutoffs(ks, at_most=logits.shape[-1])
    counts = _count_classes(logits, labels)
    return {f"top{k}": hit_rate(counts, k) for k in ks}


def mean_per_class_recall(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """
    Top-1 accuracy of each class, averaged over the classes that occur in `labels`.

    Args:
        logits (`torch.Tensor` of shape `(N, C)`): score of each class.
        labels (`torch.LongTensor` of shape `(N,)`): right class in `[0, C)`.

    Returns:
        `float` in `[0, 1]`.

    Raises:
        ValueError: as for `top_k_accuracy`.

    Example:
    >>> mean_per_class_recall(torch.eye(3)[[0, 0, 0, 0]], torch.tensor([0, 0, 0, 1]))
    0.5
    """
    hits = hit_probability(_count_classes(logits, labels), k=1)
    labels = labels.to(hits.device)
    samples = torch.bincount(labels)
    hits_per_class = torch.zeros(len(samples), dtype=torch.float64, device=hits.device).index_add_(0, labels, hits)
    return (hits_per_class[samples > 0] / samples[samples > 0]).mean().item()


def _count_classes(logits: torch.Tensor, labels: torch.Tensor) -> Counts:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"`logits` {tuple(logits.shape)} and `labels` {tuple(labels.shape)} must have the shapes (N, C) and (N,) "
            "with N > 0."
        )
    check_rows(~logits.isfinite().all(dim=1), "logits", "is not finite")
    labels = labels.to(logits.device)
    check_rows((labels < 0) | (labels >= logits.shape[1]), "labels", f"is not a class in [0, {logits.shape[1]})")
    right = logits.gather(1, labels[:, None])
    equal = (logits == right).sum(dim=1)
    return Counts((logits > right).sum(dim=1), equal - 1, torch.ones_like(equal))


__all__ = [
    "SINGLE_TEMPLATE",
    "build_zero_shot_classifier",
    "evaluate_zero_shot_classification",
    "fill_template",
    "mean_per_class_recall",
    "top_k_accuracy",
]
