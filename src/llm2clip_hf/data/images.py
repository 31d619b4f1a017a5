# SPDX-License-Identifier: Apache-2.0
"""
Read images from whatever a data set holds: PIL images, paths, or the undecoded form of `datasets`.

Every source goes through `decode_image`, so that all give the same pixels: upright by the EXIF orientation (as the
image column of `datasets` does), in RGB, transparency dropped (as the image processors of transformers do), 16-bit
gray scaled to 8 bits.

Nothing is fetched: an address is refused, also where an image column of `datasets` would open it.
"""

import hashlib
import io
import math
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError


ImageSource = Sequence[Any]
"""PIL images, paths, `{"bytes": ..., "path": ...}` dictionaries, or an image column of a `datasets.Dataset`."""
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
PATH_COLUMNS = ("file_name", "image", "image_path", "path")  # the first is that of the image folders of `datasets`
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# What Pillow raises on damaged files; `UnidentifiedImageError` is an `OSError`.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations that exchange width and height
_MAX_GRAY_16 = 65535
# Of two letters or more: `C:/a.png` is a path.
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def is_address(name: Any) -> bool:
    """Whether `name` is an address, such as `https://host/a.png`, and no path."""
    return isinstance(name, str) and _ADDRESS.match(name) is not None


def located(image: Any, root: str | Path) -> Any:
    """An undecoded image whose path, where it has no bytes, is looked for below a folder."""
    if isinstance(image, dict) and image.get("bytes") is None and image.get("path"):
        return {**image, "path": located(image["path"], root)}
    if isinstance(image, str) and not is_address(image) and os.path.isfile(joined := os.path.join(root, image)):
        return joined
    return image


def undecoded(images: ImageSource) -> ImageSource:
    """The same images, not decoded by `datasets`, which would fetch those that are addresses."""
    if "datasets" not in sys.modules:
        return images
    from datasets import Dataset
    from datasets import Image as ImageFeature
    from datasets.arrow_dataset import Column

    if not isinstance(images, Column) or not isinstance(images.source, Dataset):
        return images
    feature = images.features
    if not isinstance(feature, ImageFeature) or not feature.decode or images.source.format["type"] is not None:
        return images
    return images.source.cast_column(images.column_name, ImageFeature(decode=False))[images.column_name]


def undecoded_rows(dataset: Any, column: str) -> Any:
    """The rows of a data set, or of a stream of `datasets`, with the images in `column` undecoded."""
    from datasets import Image as ImageFeature

    if isinstance((dataset.features or {}).get(column), ImageFeature):
        return dataset.cast_column(column, ImageFeature(decode=False))
    return dataset


def load_image(images: ImageSource, row: int) -> Image.Image:
    """Image `row` of `images`, decoded, upright and in RGB."""
    return decode_image(*raw_image(images, row))


def raw_image(images: ImageSource, row: int) -> tuple[Any, str]:
    """Image `row` of `images` as it comes, and its name for messages."""
    try:
        # Inside the `try`, because a sequence may decode on access.
        item = undecoded(images)[row]
    except _DECODING_ERRORS as error:
        raise _unreadable(f"Image {row}", error) from error
    return item, f"Image {row}{_file_of(item)}"


def decode_for(transform: "ImageTransform", item: Any, name: str) -> "Callable[[torch.Generator], torch.Tensor]":
    """
    The transform of an image that is decoded here: what is left takes the generator.

    A JPEG file is decoded at a half, quarter or eighth of its size where the transform needs no more of it.
    """
    enough = getattr(transform, "decoded_size", None)
    if enough is None:
        return partial(transform, decode_image(item, name))
    size = [0, 0]
    image = decode_image(item, name, enough, size)
    return partial(transform, image, full_size=(size[0], size[1]))


def decode_image(
    item: Any,
    name: str = "The image",
    enough: Callable[[int, int], tuple[int, int]] | None = None,
    full_size: list[int] | None = None,
) -> Image.Image:
    """
    One image, decoded, upright and in RGB.

    The orientation in the EXIF data is applied and transparency is dropped. 16-bit gray levels are divided by 257, so
    that white stays white. An image in RGB that needs no turn is returned without a copy. `enough` says from width and
    height how large a JPEG has to be decoded at least; `full_size` takes what it had been.
    """
    try:
        image = _open(item)
        limit = Image.MAX_IMAGE_PIXELS
        # Pillow only warns up to twice its limit.
        if limit is not None and image.width * image.height > limit:
            raise ValueError(
                f"it has {image.width} x {image.height} pixels, more than `PIL.Image.MAX_IMAGE_PIXELS` = {limit}"
            )
        size = image.size
        if enough is not None and image.format == "JPEG" and image is not item:  # an image of the user stays as it is
            is_turned = image.getexif().get(_ORIENTATION, 1) in _TURNED
            across, down = enough(*(size[::-1] if is_turned else size))
            image.draft(image.mode, (down, across) if is_turned else (across, down))
        image.load()
        if (orientation := image.getexif().get(_ORIENTATION, 1)) != 1:
            image, size = ImageOps.exif_transpose(image), size[::-1] if orientation in _TURNED else size
        if full_size is not None:
            full_size[:] = size
        return _to_rgb(image)
    except _DECODING_ERRORS as error:
        raise _unreadable(name, error) from error


def content_id(content: Any) -> int:
    """A number of 64 bits, the same in every process and run; other bytes have another one, all but certainly."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little", signed=True)


def image_id(item: Any) -> int:
    """`content_id` of the file of an image, or of the pixels of one that comes decoded."""
    if isinstance(item, dict):
        item = item.get("bytes") if item.get("bytes") is not None else item.get("path")
    if isinstance(item, Image.Image):
        return content_id(f"{item.mode} {item.size} ".encode() + item.tobytes())
    return content_id(Path(item).read_bytes() if isinstance(item, (str, Path)) else item)


def _unreadable(name: str, error: BaseException) -> ValueError:
    # Pillow's message names the buffer in memory.
    problem = "it is no image that Pillow can read" if isinstance(error, UnidentifiedImageError) else str(error)
    return ValueError(
        f"{name} cannot be read: {problem.rstrip('.')}. Repair the file, drop the row from the data set, or pass "
        '`on_bad_image="skip"`.'
    )


def _file_of(item: Any) -> str:
    path = item.get("path") if isinstance(item, dict) else item
    return f" (`{path}`)" if isinstance(path, (str, Path)) else ""


def _open(item: Any) -> Image.Image:
    found = type(item).__name__
    if isinstance(item, dict):
        item = item.get("bytes") if item.get("bytes") is not None else item.get("path")
    if isinstance(item, Image.Image):
        return item
    if is_address(item):
        raise ValueError("it is an address, and nothing is fetched; download the images and give their paths")
    if isinstance(item, (str, Path)):
        return Image.open(item)
    if isinstance(item, (bytes, bytearray, memoryview)):
        if not len(item):
            raise ValueError("the file is empty")
        return Image.open(io.BytesIO(item))
    raise ValueError(f"expected a PIL image, a path, bytes, or a dictionary with `bytes` or `path`, got {found}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return _gray_16_to_rgb(image)
    if image.mode == "P" and "transparency" in image.info:
        # The same pixels as the direct way, without Pillow's warning about transparent palettes.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _gray_16_to_rgb(image: Image.Image) -> Image.Image:
    """Pillow's own conversion clips at 255, which turns a 16-bit picture white."""
    levels = np.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > _MAX_GRAY_16:
        raise ValueError(f"gray levels of mode {image.mode} with no known range; save it with 8 or 16 bits")
    return Image.fromarray((levels.astype(np.float32) / 257).round().astype(np.uint8)).convert("RGB")


ImageTransform = Callable[..., torch.Tensor]
"""Called with an RGB image and a generator; one with `decoded_size` takes `full_size`, too."""
# Statistics of CLIP's training images; LLM2CLIP uses them for every vision tower (reference code, `constants.py`).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CROP_ATTEMPTS = 10
# How many times larger than the result the first of two steps of a resize leaves it; 3 is close to one step.
_REDUCING_GAP = 3.0


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
        draft (`bool`, defaults to `True`):
            Let data sets decode a JPEG at a half, quarter or eighth of its size where that has all pixels that the
            rectangle needs, and let Pillow shrink very large rectangles in two steps: faster, with small differences
            in pixels (`benchmarks/RESULTS.md`).

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
        draft: bool = True,
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"`scale` must satisfy 0 < low <= high <= 1, got {scale}. The paper uses (0.9, 1.0).")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"`ratio` must satisfy 0 < low <= high, got {ratio}. The default is (3/4, 4/3).")
        self.draft = draft
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

    def decoded_size(self, width: int, height: int) -> tuple[int, int]:
        """The size to which an image may be shrunk before any rectangle of it has fewer pixels than the result."""
        if not self.draft:
            return width, height
        central_width, central_height = self._central(width, height)
        smallest_width = min(math.sqrt(width * height * self.scale[0] * self.ratio[0]), central_width)
        smallest_height = min(math.sqrt(width * height * self.scale[0] / self.ratio[1]), central_height)
        factor = max(1.0, min(smallest_width / self.width, smallest_height / self.height))
        return math.ceil(width / factor), math.ceil(height / factor)

    def __call__(
        self, image: Image.Image, generator: torch.Generator, full_size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """"""
        width, height = full_size or image.size
        box = self._box(width, height, generator)
        if not self.draft:
            resized = image.crop(box).resize((self.width, self.height), Image.Resampling.BICUBIC)
            return _to_tensor(resized, self.mean, self.std)
        # The rectangle of the whole image, wherever it lies in what was decoded of it.
        across, down = image.width / width, image.height / height
        place = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        target = (self.width, self.height)
        resized = image.resize(target, Image.Resampling.BICUBIC, box=place, reducing_gap=_REDUCING_GAP)
        return _to_tensor(resized, self.mean, self.std)

    def _central(self, width: int, height: int) -> tuple[int, int]:
        """The sides of the largest central rectangle within `ratio`."""
        return (
            max(1, min(width, round(height * self.ratio[1]))),
            max(1, min(height, round(width / self.ratio[0]))),
        )

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
        crop_width, crop_height = self._central(width, height)
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
        """"""
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


__all__ = [
    "IMAGE_ENDINGS",
    "METADATA_FILES",
    "PATH_COLUMNS",
    "CenterCropTransform",
    "ImageSource",
    "ImageTransform",
    "RandomResizedCropTransform",
    "decode_for",
    "decode_image",
    "is_address",
    "load_image",
    "located",
    "undecoded",
    "undecoded_rows",
]
