# SPDX-License-Identifier: Apache-2.0
"""
Image transforms for training and for evaluation from stored pixels, with PIL and without torchvision.

A transform is called as `transform(image, generator)`: it takes its randomness from the given generator only, so that
the data set decides what a sample depends on.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image


__all__ = ["CenterCropTransform", "ImageTransform", "RandomResizedCropTransform"]

ImageTransform = Callable[[Image.Image, torch.Generator], torch.Tensor]

# Statistics of CLIP's training images; LLM2CLIP uses them for every vision tower (reference code, `constants.py`).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_CROP_ATTEMPTS = 10


class RandomResizedCropTransform:
    """
    Cut a random rectangle, resize it to `size` with bicubic interpolation, normalize.

    The rectangle covers a share of the area drawn from `scale`, with an aspect ratio drawn log-uniformly from `ratio`,
    at a uniform position. If ten draws do not fit into the image, the largest central rectangle within `ratio` is
    taken. This is the usual random resized crop (Szegedy et al., 2015) and the only augmentation of the paper.

    Args:
        size (`int` or `(height, width)`): size of the result in pixels.
        scale (`tuple[float, float]`, defaults to `(0.9, 1.0)`): share of the area; the paper's recipe.
        ratio (`tuple[float, float]`, defaults to `(3 / 4, 4 / 3)`): width over height.
        mean, std (sequences of 3 `float`): statistics in `[0, 1]` scale; CLIP's by default.

    Raises:
        ValueError: if `size`, `scale` or `ratio` is out of range.

    Example:
    >>> transform = RandomResizedCropTransform(8)
    >>> transform(Image.new("RGB", (20, 10)), torch.Generator().manual_seed(0)).shape
    torch.Size([3, 8, 8])
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"`scale` must satisfy 0 < low <= high <= 1, got {scale}. The paper uses (0.9, 1.0).")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"`ratio` must satisfy 0 < low <= high, got {ratio}. The default is (3/4, 4/3).")
        self.height, self.width = _height_width(size)
        self.scale, self.ratio = scale, ratio
        self.mean, self.std = _statistics(mean, std)

    @classmethod
    def from_image_processor(
        cls, image_processor: Any, scale: tuple[float, float] = (0.9, 1.0)
    ) -> "RandomResizedCropTransform":
        """The training transform that matches an image processor of transformers: its output size, mean and std."""
        height, width, _ = _processor_geometry(image_processor)
        mean, std = _processor_statistics(image_processor)
        return cls((height, width), scale=scale, mean=mean, std=std)

    def __call__(self, image: Image.Image, generator: torch.Generator) -> torch.Tensor:
        """
        Args:
            image (`PIL.Image.Image`): RGB image.
            generator (`torch.Generator`): source of all randomness.

        Returns:
            `torch.Tensor` of shape `(3, height, width)`, float32, normalized.
        """
        crop = image.crop(self._box(image.width, image.height, generator))
        resized = crop.resize((self.width, self.height), Image.Resampling.BICUBIC)
        return _to_tensor(resized, self.mean, self.std)

    def _box(self, width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
        draws = torch.rand(_CROP_ATTEMPTS, 4, generator=generator, dtype=torch.float64).tolist()
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for area_draw, ratio_draw, left_draw, top_draw in draws:
            area = width * height * (self.scale[0] + area_draw * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + ratio_draw * (high - low))
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left = int(left_draw * (width - crop_width + 1))
                top = int(top_draw * (height - crop_height + 1))
                return left, top, left + crop_width, top + crop_height
        crop_width = max(1, min(width, round(height * self.ratio[1])))
        crop_height = max(1, min(height, round(width / self.ratio[0])))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        return left, top, left + crop_width, top + crop_height


class CenterCropTransform:
    """
    Resize the shortest edge to `resize`, cut the central rectangle, normalize: CLIP's evaluation transform.

    Equal to `CLIPImageProcessor` of transformers with the PIL backend. It ignores its generator.

    Args:
        size (`int` or `(height, width)`): size of the result in pixels.
        resize (`int`, *optional*): length of the shortest edge before the crop; the longer side of `size` by default.
        mean, std (sequences of 3 `float`): statistics in `[0, 1]` scale; CLIP's by default.

    Raises:
        ValueError: if `size` is not positive, or `resize` is smaller than a side of `size`.

    Example:
    >>> CenterCropTransform(8)(Image.new("RGB", (20, 10)), torch.Generator()).shape
    torch.Size([3, 8, 8])
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        resize: int | None = None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        self.height, self.width = _height_width(size)
        self.resize = max(self.height, self.width) if resize is None else resize
        if self.resize < max(self.height, self.width):
            raise ValueError(
                f"`resize` must be at least the longer side of `size` {(self.height, self.width)}, got {resize}. "
                "A smaller value would leave an empty border."
            )
        self.mean, self.std = _statistics(mean, std)

    @classmethod
    def from_image_processor(cls, image_processor: Any) -> "CenterCropTransform":
        """
        The transform that equals an image processor of transformers which resizes the shortest edge and crops.

        Raises:
            ValueError: if the processor does anything else; use the processor itself then.
        """
        height, width, shortest_edge = _processor_geometry(image_processor)
        resample = getattr(image_processor, "resample", None)
        if shortest_edge is None or resample != Image.Resampling.BICUBIC:
            raise ValueError(
                f"{type(image_processor).__name__} with size {image_processor.size} and resample {resample} is no "
                "bicubic shortest-edge resize with a center crop. Call the image processor itself instead."
            )
        mean, std = _processor_statistics(image_processor)
        return cls((height, width), resize=shortest_edge, mean=mean, std=std)

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        """
        Args:
            image (`PIL.Image.Image`): RGB image.
            generator (`torch.Generator`, *optional*): not used; there is nothing random.

        Returns:
            `torch.Tensor` of shape `(3, height, width)`, float32, normalized.
        """
        shortest = min(image.width, image.height)
        # The long edge is truncated, not rounded: rounding would shift the crop by a pixel.
        target = (int(image.width * self.resize / shortest), int(image.height * self.resize / shortest))
        resized = image.resize(target, Image.Resampling.BICUBIC)
        left, top = (resized.width - self.width) // 2, (resized.height - self.height) // 2
        return _to_tensor(resized.crop((left, top, left + self.width, top + self.height)), self.mean, self.std)


def _to_tensor(image: Image.Image, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    # Channels first while a pixel is still one byte: the same values as after the conversion, in half the time.
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"`size` must be positive, got {size}. Give the input size of the vision tower, e.g. 224.")
    return height, width


def _statistics(mean: Sequence[float], std: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"`mean` and `std` need 3 values each and positive std, got {mean} and {std}.")
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)


def _processor_geometry(image_processor: Any) -> tuple[int, int, int | None]:
    """Height and width of the output, and the shortest edge before the crop where there is one."""
    size = dict(image_processor.size or {})
    crops = bool(getattr(image_processor, "do_center_crop", False))
    crop = dict(image_processor.crop_size) if crops else {}
    if "height" in crop and size.get("shortest_edge"):
        return crop["height"], crop["width"], size["shortest_edge"]
    final = crop or size
    if not final.get("height") or not final.get("width"):
        raise ValueError(
            f"The output size of {type(image_processor).__name__} is not fixed (size {size}, crop {crop or None}). "
            "Construct the transform with an explicit `size`."
        )
    return final["height"], final["width"], None


def _processor_statistics(image_processor: Any) -> tuple[Sequence[float], Sequence[float]]:
    if not image_processor.do_rescale or not math.isclose(image_processor.rescale_factor, 1 / 255):
        raise ValueError(
            f"{type(image_processor).__name__} does not rescale by 1/255. Construct the transform explicitly, with "
            "`mean` and `std` in the scale of [0, 1]."
        )
    if not image_processor.do_normalize:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return image_processor.image_mean, image_processor.image_std
