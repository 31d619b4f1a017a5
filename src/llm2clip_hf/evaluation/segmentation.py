# SPDX-License-Identifier: Apache-2.0
"""
Zero-shot semantic segmentation: every pixel is given the class whose text is nearest to its patch (MaskCLIP).

(1) Class names become text embeddings, one per class.
(2) An image is resized, cut into overlapping windows, and each window gives one vector per patch.
(3) Cosines of patches and classes are upsampled to pixels, averaged where windows overlap, and resized to the mask.
(4) The largest one is the class of a pixel; hits and misses of all images go into one confusion matrix.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data.images import ImageSource, decode_image, load_image, undecoded
from ..distributed import all_reduce_sum
from .dense_features import dense_image_features, tower_sizes
from .encoding import check_batching, encode_batches
from .zero_shot import SINGLE_TEMPLATE, check_classes, given_or_built


__all__ = ["evaluate_zero_shot_segmentation", "segment_image"]

# Scores held at a time while they are resized to a mask: 256 MiB in float32.
_MAX_SCORES = 2**26


def evaluate_zero_shot_segmentation(
    model: Any,
    images: ImageSource,
    masks: Sequence[Any],
    class_names: Sequence[str],
    templates: Sequence[str] = SINGLE_TEMPLATE,
    *,
    processor: Any,
    ignore_index: int = 255,
    short_side: int = 448,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    show_progress: bool = False,
    classifier: torch.Tensor | None = None,
) -> dict[str, float]:
    """
    Intersection over union of zero-shot segmentation with the features of `dense_image_features`.

    The confusion matrix is summed over all images before a ratio is taken, as mmsegmentation does. There is no
    background class: what has no class name carries `ignore_index` in the mask, as in the protocol of VOC20 (20 names;
    the background of VOC is ignored). MaskCLIP's refinements (key smoothing, prompt denoising) are not applied.

    In a process group each process takes its share of the images; all get the same result.

    Args:
        model: a model that `dense_image_features` takes, with its text side unless `classifier` is given.
        images: sequence of PIL images or paths, or an image column of a `datasets.Dataset`.
        masks (sequence):
            One mask per image and of its size: an integer array or tensor of shape `(height, width)`, or a PIL image
            of mode `L`, `P` or `I`. A pixel is a position in `class_names`, or `ignore_index`. Item `i` is read when
            its turn comes. Images are turned upright by their EXIF orientation, masks are taken as they are.
        class_names (sequence of `str`): names, one per class.
        templates (sequence of `str`, defaults to `("a photo of the {}",)`): texts with `{}` for the name.
        processor: processor of the model; of its image processor, everything but size and crop is applied.
        ignore_index (`int`, defaults to 255): value of pixels that are not counted; no class in `class_names`.
        short_side (`int`, defaults to 448): see `segment_image`.
        window (`int`, *optional*): see `segment_image`.
        stride (`int`, *optional*): see `segment_image`.
        batch_size (`int`, defaults to 16): windows of an image, or texts, per forward pass.
        max_length (`int`, *optional*): tokens per text, see `encode_texts`.
        device (*optional*): device to move the model to first; by default the model stays where it is.
        show_progress (`bool`, defaults to `False`): show progress bars.
        classifier (`torch.Tensor` of shape `(num_classes, projection_dim)`, *optional*):
            What `build_zero_shot_classifier` gave for these classes; `templates` are not used then.

    Returns:
        `dict[str, float]`, shares in `[0, 1]`:
        `mean_iou`, over the classes that occur in a mask or a prediction; `pixel_accuracy`; `mean_class_accuracy`, the
        recall over the classes that occur in a mask; `iou_NAME` of each class in `mean_iou`, and no such entry for
        the others; and the counts `num_images`, `num_pixels` (without ignored ones), `num_ignored_pixels` and
        `num_classes`, the classes in `mean_iou`.

    Raises:
        ValueError: if images and masks differ in number, a mask is missing, is not of its image's size or holds a
            label that is no class, no pixel is left to count, a class has no or no own name, an option is out of
            range, the tower has no dense features, or an image cannot be read. The message names the row.

    Example:
    >>> names = ["sky", "meadow", "cow"]
    >>> evaluate_zero_shot_segmentation(model, images, masks, names, processor=processor)  # doctest: +SKIP
    {'mean_iou': 0.61, 'pixel_accuracy': 0.83, 'mean_class_accuracy': 0.75, 'iou_sky': 0.82, ...}
    """
    # Before the long pass over the images.
    check_classes(class_names, templates, allow_duplicates=False)
    _check_set(len(images), len(masks), class_names, ignore_index)
    check_batching(len(images), batch_size, "images")
    _window_sizes(model, short_side, window, stride)
    own: dict[str, Any] = {"processor": processor, "batch_size": batch_size}
    shown: dict[str, Any] = {"device": device, "show_progress": show_progress}
    weight = given_or_built(classifier, model, class_names, templates, max_length=max_length, **own, **shown)
    windows = {"short_side": short_side, "window": window, "stride": stride}
    confusion, ignored = _confusion(model, images, masks, weight, ignore_index, own | windows, **shown)
    metrics = segmentation_metrics(confusion, class_names)
    return metrics | {"num_images": len(images), "num_ignored_pixels": ignored}


def _confusion(
    model: Any,
    images: ImageSource,
    masks: Sequence[Any],
    classifier: torch.Tensor,
    ignore_index: int,
    options: dict[str, Any],
    device: str | torch.device | None,
    show_progress: bool,
) -> tuple[torch.Tensor, int]:
    """Pixels of all images by their class in the mask and in the prediction, `(C, C)`, and ignored ones."""
    images, num_classes = undecoded(images), len(classifier)
    # Masks by predictions, and at the end the pixels that are ignored.
    counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64)

    def count(rows: list[int], target: torch.device) -> torch.Tensor:
        (row,) = rows
        image = load_image(images, row)
        labels = _load_mask(masks, row, (image.height, image.width), num_classes, ignore_index)
        predicted = segment_image(model, image, classifier, **options)
        counted = labels != ignore_index
        pairs = labels[counted] * num_classes + predicted.flatten()[counted]
        counts[:-1] += torch.bincount(pairs, minlength=num_classes**2)
        counts[-1] += len(labels) - len(pairs)
        return torch.zeros(1, 1)

    description = "Segmenting images" if show_progress else None
    encode_batches(model, count, [[row] for row in range(len(images))], device, description, True)
    counts = all_reduce_sum(counts.to(next(model.parameters()).device)).cpu()
    return counts[:-1].view(num_classes, num_classes), int(counts[-1])


def segment_image(
    model: Any,
    image: Any,
    classifier: torch.Tensor,
    *,
    processor: Any,
    short_side: int = 448,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
) -> torch.Tensor:
    """
    The class of every pixel of an image.

    The image is resized so that its shorter side is about `short_side`, each side to whole patches. Windows go over it
    every `stride` pixels; the last one of a row or column is moved back to end with the image. A window larger than
    the image is cut to it, so that a large `window` sees the image as a whole: so does MaskCLIP, at a shorter side of
    about 512 (`short_side=512, window=2048`). The defaults slide a window of the size that the tower was trained for.
    """
    # Step (2)
    patch, window, stride = _window_sizes(model, short_side, window, stride)
    check_batching(1, batch_size, "windows")
    picture = decode_image(image)
    pixels = _resized_pixels(picture, getattr(processor, "image_processor", processor), short_side, patch)
    # Step (3)
    scores = _score_windows(model, pixels, classifier, window, stride, batch_size)
    # Step (4)
    return _best_class(scores, picture.height, picture.width).cpu()


def segmentation_metrics(confusion: torch.Tensor, class_names: Sequence[str]) -> dict[str, float]:
    """Metrics of a confusion matrix, see `evaluate_zero_shot_segmentation`."""
    total = int(confusion.sum())
    if not total:
        raise ValueError("All pixels of all masks are ignored, so nothing can be measured. Check `ignore_index`.")
    confusion = confusion.double()
    hits, labelled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    union = labelled + predicted - hits
    seen = union > 0
    iou = hits[seen] / union[seen]
    names = [name for name, flag in zip(class_names, seen.tolist()) if flag]
    return {
        "mean_iou": iou.mean().item(),
        "pixel_accuracy": hits.sum().item() / total,
        "mean_class_accuracy": (hits[labelled > 0] / labelled[labelled > 0]).mean().item(),
        **{f"iou_{name}": value for name, value in zip(names, iou.tolist())},
        "num_pixels": total,
        "num_classes": len(names),
    }


def _check_set(num_images: int, num_masks: int, class_names: Sequence[str], ignore_index: int) -> None:
    if num_images != num_masks:
        first = min(num_images, num_masks)
        which = f"image {first} has no mask" if num_masks < num_images else f"mask {first} has no image"
        raise ValueError(
            f"Images ({num_images}) and masks ({num_masks}) must pair one to one: {which}. Pass one mask per image, "
            "in the same order."
        )
    if 0 <= ignore_index < len(class_names):
        raise ValueError(
            f"`ignore_index` is {ignore_index}, which is the class {class_names[ignore_index]!r}. Use a value outside "
            f"of [0, {len(class_names)}), in the masks too."
        )


def _window_sizes(model: Any, short_side: int, window: int | None, stride: int | None) -> tuple[int, int, int]:
    """Patch size, window and stride in pixels, with their defaults."""
    patch, own_size = tower_sizes(model)
    if short_side < patch:
        raise ValueError(f"`short_side` must hold a patch of the tower, {patch} pixels, got {short_side}.")
    if window is None:
        window = own_size // patch * patch
    elif window < patch or window % patch:
        below = max(window // patch, 1) * patch
        raise ValueError(
            f"`window` must be a multiple of the tower's patch size, {patch}, got {window}. Use {below} or "
            f"{below + patch}."
        )
    if stride is None:
        stride = max(window // 2, 1)
    elif not 1 <= stride <= window:
        raise ValueError(f"`stride` must be in [1, {window}], so that windows leave no gap, got {stride}.")
    return patch, window, stride


def _load_mask(
    masks: Sequence[Any], row: int, size: tuple[int, int], num_classes: int, ignore_index: int
) -> torch.Tensor:
    """Labels of mask `row`, flattened; a `ValueError` says what is wrong with it."""
    try:
        # Inside the `try`, because a sequence may decode on access.
        item = masks[row]
        labels = np.asarray(item)
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"Mask {row} cannot be read: {error}. Repair it, or drop the row from the set.") from error
    if item is None:
        raise ValueError(f"Image {row} has no mask: it is None. Drop the row from the set.")
    if labels.dtype.kind not in "iu" or labels.ndim != 2:
        raise ValueError(
            f"Mask {row} must be an array of integers of shape (height, width), or a PIL image of mode L, P or I; got "
            f"{type(item).__name__} with shape {labels.shape} and {labels.dtype}. Turn colours into class numbers."
        )
    if labels.shape != size:
        raise ValueError(
            f"Mask {row} has {labels.shape[0]} x {labels.shape[1]} pixels (height x width), its image {size[0]} x "
            f"{size[1]}. Resize the mask without interpolation, or check that the two belong together."
        )
    labels = labels.astype(np.int64)
    wrong = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        raise ValueError(
            f"Label {labels[y, x]} of mask {row}, at row {y} and column {x}, is neither a class in [0, {num_classes}) "
            f"nor `ignore_index` {ignore_index}. Check that `class_names` lists all classes in their order."
        )
    return torch.from_numpy(labels).flatten()


def _resized_pixels(picture: Any, image_processor: Any, short_side: int, patch: int) -> torch.Tensor:
    """Pixel values `(3, height, width)`: the shorter side is `short_side`, and both are rounded to whole patches."""
    scale = short_side / min(picture.size) / patch
    width, height = (max(round(side * scale), 1) * patch for side in picture.size)
    size = {"height": height, "width": width}
    pixels = image_processor(images=[picture], do_resize=True, size=size, do_center_crop=False, return_tensors="pt")[
        "pixel_values"
    ]
    if pixels.shape[-2:] != (height, width):
        raise ValueError(
            f"The image processor {type(image_processor).__name__} gave pixel values of shape {tuple(pixels.shape)} "
            f"where {height} x {width} pixels were asked for. Use one that takes `size` as height and width."
        )
    return pixels[0]


def _score_windows(
    model: Any, pixels: torch.Tensor, classifier: torch.Tensor, window: int, stride: int, batch_size: int
) -> torch.Tensor:
    """Cosines `(num_classes, height, width)` of all pixels and classes, averaged where windows overlap."""
    height, width = pixels.shape[-2:]
    window_height, window_width = min(window, height), min(window, width)
    corners = [
        (top, left)
        for top in _window_starts(height, window_height, stride)
        for left in _window_starts(width, window_width, stride)
    ]
    device = next(model.parameters()).device
    pixels, classifier = pixels.to(device), classifier.to(device, torch.float32)
    total = torch.zeros(len(classifier), height, width, device=device)
    passes = torch.zeros(height, width, device=device)
    for start in range(0, len(corners), batch_size):
        batch = corners[start : start + batch_size]
        crops = [pixels[:, top : top + window_height, left : left + window_width] for top, left in batch]
        features = dense_image_features(model, torch.stack(crops))
        if classifier.ndim != 2 or features.shape[-1] != classifier.shape[1]:
            raise ValueError(
                f"`classifier` must have shape (num_classes, {features.shape[-1]}), got {tuple(classifier.shape)}. "
                "Build it with this model."
            )
        # One window at a time: with many classes, scores of pixels are far larger than features.
        for (top, left), patches in zip(batch, features):
            scores = _resize((patches @ classifier.T).permute(2, 0, 1), window_height, window_width)
            total[:, top : top + window_height, left : left + window_width] += scores
            passes[top : top + window_height, left : left + window_width] += 1
    return total / passes


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    return [min(start, length - window) for start in range(0, length - window + stride, stride)]


def _resize(scores: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.interpolate(scores[None], size=(height, width), mode="bilinear", align_corners=False)[0]


def _best_class(scores: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Class of the largest score after resizing, `(height, width)`; a few classes at a time."""
    best = torch.full((height, width), -torch.inf, device=scores.device)
    classes = torch.zeros(height, width, dtype=torch.int64, device=scores.device)
    step = max(_MAX_SCORES // (height * width), 1)
    for start in range(0, len(scores), step):
        value, position = _resize(scores[start : start + step], height, width).max(dim=0)
        better = value > best
        best = torch.where(better, value, best)
        classes = torch.where(better, position + start, classes)
    return classes
