# SPDX-License-Identifier: Apache-2.0
"""
Linear probe: how well a linear classifier does on the frozen features of the vision tower.

(1) Every image is encoded once. Features are the tower's pooled output before the projection to the joint space, as in
    the linear probes of the CLIP paper (its appendix A.3), not normalized and not standardized.
(2) A linear classifier is fitted, by SGD with the paper's recipe or as a logistic regression of scikit-learn.
(3) It is measured on the test images.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..data.images import ImageSource, load_image
from .encoding import check_batching, encode_batches, split_batches
from .zero_shot import check_labels, classification_metrics


__all__ = ["evaluate_linear_probe"]

# The paper's recipe (section 4.1): SGD, batch 1024, learning rate 0.1, momentum 0.9, no weight decay, 50 epochs.
BATCH_SIZE, LEARNING_RATE, MOMENTUM, EPOCHS = 1024, 0.1, 0.9, 50


def evaluate_linear_probe(
    model: Any,
    train_images: ImageSource,
    train_labels: Sequence[int] | torch.Tensor,
    test_images: ImageSource,
    test_labels: Sequence[int] | torch.Tensor,
    *,
    processor: Any,
    method: Literal["sgd", "logistic_regression"] = "sgd",
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    inverse_regularization: float = 0.316,
    seed: int = 0,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    show_progress: bool = False,
) -> dict[str, float]:
    """
    Accuracy of a linear classifier on frozen image features.

    Args:
        model: `LLM2CLIPModel`, or a model of transformers with CLIP's interface; kept in its train or eval mode.
        train_images: sequence of PIL images or paths, or an image column of a `datasets.Dataset`.
        train_labels (`(N,)` integers): classes of `train_images`, from 0; every class up to the largest occurs.
        test_images: as `train_images`.
        test_labels (`(M,)` integers): classes of `test_images`.
        processor: processor or image processor of the model.
        method (`str`, defaults to `"sgd"`):
            `"sgd"`: the paper's recipe (section 4.1), cross-entropy, batches of 1024, momentum 0.9, no weight decay,
            from zero weights; the learning rate falls to 0 along a cosine, which the paper does not say.
            `"logistic_regression"`: scikit-learn's, L-BFGS, at most 1000 iterations, as in the CLIP paper.
        epochs (`int`, defaults to 50): passes over the training features; SGD only.
        learning_rate (`float`, defaults to 0.1): highest learning rate; SGD only.
        inverse_regularization (`float`, defaults to 0.316):
            `C` of the logistic regression, the inverse of the strength of the L2 penalty. The default is that of the
            CLIP authors' example; they search for the best one on validation data.
        seed (`int`, defaults to 0): seed of the order of samples; SGD only.
        batch_size (`int`, defaults to 64): images per forward pass of the model.
        device (*optional*): device to move the model to first; by default the model stays where it is.
        show_progress (`bool`, defaults to `False`): show progress bars.

    Returns:
        `dict[str, float]`: `linear_probe_top1`, `linear_probe_top5` with five classes or more,
        `linear_probe_mean_per_class_recall`, and `linear_probe_train_top1` on the training images, all in `[0, 1]`.

    Raises:
        ValueError: if images and labels differ in number, a class has no training image, a test label is none of the
            training classes, an option is out of range, or an image cannot be read.
        ImportError: if `method` is `"logistic_regression"` and scikit-learn is not installed.

    Example:
    >>> evaluate_linear_probe(model, *train, *test, processor=processor)["linear_probe_top1"]  # doctest: +SKIP
    0.852
    """
    if method not in ("sgd", "logistic_regression"):
        raise ValueError(f"`method` must be 'sgd' or 'logistic_regression', got {method!r}.")
    for name, value in (
        ("epochs", epochs),
        ("learning_rate", learning_rate),
        ("inverse_regularization", inverse_regularization),
    ):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` must be positive, got {value}.")
    train_targets, test_targets = _checked_targets(train_labels, len(train_images), test_labels, len(test_images))
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "show_progress": show_progress}
    # Step (1)
    train = encode_vision_features(model, train_images, processor=processor, **options)
    test = encode_vision_features(model, test_images, processor=processor, **options)
    # Step (2)
    if method == "sgd":
        target = next(model.parameters()).device
        weight, bias = fit_sgd(train.to(target), train_targets.to(target), epochs, learning_rate, seed)
    else:
        weight, bias = fit_logistic_regression(train, train_targets, inverse_regularization)
    # Step (3)
    weight, bias = weight.cpu(), bias.cpu()
    metrics = classification_metrics(test @ weight.T + bias, test_targets, "linear_probe")
    on_train = classification_metrics(train @ weight.T + bias, train_targets, "linear_probe_train")
    return metrics | {"linear_probe_train_top1": on_train["linear_probe_train_top1"]}


def encode_vision_features(
    model: Any,
    images: ImageSource,
    *,
    processor: Any,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    show_progress: bool = False,
) -> torch.Tensor:
    """Pooled outputs `(len(images), D)` of the vision tower, before projection and norm, float32, on the CPU."""
    image_processor = getattr(processor, "image_processor", processor)
    check_batching(len(images), batch_size, "images")
    projection = getattr(model, "visual_projection", None)
    seen: list[torch.Tensor] = []

    def encode(rows: list[int], target: torch.device) -> torch.Tensor:
        inputs = image_processor(images=[load_image(images, row) for row in rows], return_tensors="pt")
        outputs = model.get_image_features(**{name: value.to(target) for name, value in inputs.items()})
        # What went into the projection, which every model of CLIP's interface calls by this name, where there is one.
        return seen.pop() if seen else outputs.pooler_output

    hook = None
    if isinstance(projection, torch.nn.Module):
        hook = projection.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    try:
        batches = split_batches(list(range(len(images))), batch_size)
        description = "Encoding images" if show_progress else None
        return encode_batches(model, encode, batches, device, description, gather_across_devices=True)
    finally:
        if hook is not None:
            hook.remove()


def fit_sgd(
    features: torch.Tensor, targets: torch.Tensor, epochs: int, learning_rate: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `(C, D)` and bias `(C,)` of a linear classifier after SGD with momentum, from zero; deterministic."""
    num_classes = int(targets.max()) + 1
    weight = torch.zeros(num_classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=learning_rate, momentum=MOMENTUM)
    steps = epochs * math.ceil(len(features) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(features), generator=generator).to(features.device).split(BATCH_SIZE):
                optimizer.zero_grad()
                F.cross_entropy(features[rows] @ weight.T + bias, targets[rows]).backward()
                optimizer.step()
                schedule.step()
    return weight.detach(), bias.detach()


def fit_logistic_regression(
    features: torch.Tensor, targets: torch.Tensor, inverse_regularization: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `(C, D)` and bias `(C,)` of scikit-learn's logistic regression."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "`method='logistic_regression'` needs scikit-learn. Install it with `pip install llm2clip-hf[eval]`."
        ) from error
    probe = LogisticRegression(C=inverse_regularization, max_iter=1000)
    probe.fit(features.numpy(), targets.numpy())
    weight, bias = (torch.from_numpy(each).float() for each in (probe.coef_, probe.intercept_))
    if len(weight) == 1:  # two classes: one row, the score of class 1 over class 0
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
    return weight, bias


def _checked_targets(
    train_labels: Sequence[int] | torch.Tensor,
    num_train: int,
    test_labels: Sequence[int] | torch.Tensor,
    num_test: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    given = torch.as_tensor(train_labels)
    num_classes = int(given.max()) + 1 if given.numel() else 0
    train = check_labels(train_labels, num_train, num_classes)
    test = check_labels(test_labels, num_test, num_classes)
    missing = (torch.bincount(train, minlength=num_classes) == 0).nonzero()
    if num_classes < 2 or len(missing):
        raise ValueError(
            f"A probe needs at least two classes with a training image each; got {num_classes} classes"
            + (f", and none of class {int(missing[0])}. " if len(missing) else ". ")
            + "Number the classes from 0 without gaps."
        )
    return train, test
