# SPDX-License-Identifier: Apache-2.0
"""
Read images from whatever a data set holds: PIL images, paths, or the undecoded form of `datasets`.

Every source goes through `decode_image`, so that all give the same pixels: upright by the EXIF orientation (as the
image column of `datasets` does), in RGB, transparency dropped (as the image processors of transformers do), 16-bit
gray scaled to 8 bits.

Nothing is fetched: an address is refused, also where an image column of `datasets` would open it.
"""

import io
import os
import re
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


__all__ = [
    "IMAGE_ENDINGS",
    "METADATA_FILES",
    "PATH_COLUMNS",
    "ImageSource",
    "decode_image",
    "is_address",
    "load_image",
    "located",
    "undecoded",
]

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
_MAX_GRAY_16 = 65535
# Of two letters or more: `C:/a.png` is a path.
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def is_address(name: Any) -> bool:
    """
    Whether `name` is an address, such as `https://host/a.png`, and no path.

    Args:
        name: a path, or what a data set has in its place.

    Returns:
        `bool`

    Example:
    >>> is_address("https://host/a.png"), is_address("photos/a.png"), is_address("C:/a.png")
    (True, False, False)
    """
    return isinstance(name, str) and _ADDRESS.match(name) is not None


def located(image: Any, root: str | Path) -> Any:
    """
    An undecoded image whose path, where it has no bytes, is looked for below a folder.

    Args:
        image: a path, `{"bytes": ..., "path": ...}`, or anything else, which stays as it is.
        root (`str` or `Path`): folder that relative paths are below, if a file is there.
    """
    if isinstance(image, dict) and image.get("bytes") is None and image.get("path"):
        return {**image, "path": located(image["path"], root)}
    if isinstance(image, str) and not is_address(image) and os.path.isfile(joined := os.path.join(root, image)):
        return joined
    return image


def undecoded(images: ImageSource) -> ImageSource:
    """
    The same images, not decoded by `datasets`, which would fetch those that are addresses.

    Args:
        images: see `ImageSource`.

    Returns:
        An image column of a `datasets.Dataset` as `{"bytes": ..., "path": ...}`; everything else as it is.
    """
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


def load_image(images: ImageSource, row: int) -> Image.Image:
    """
    Image `row` of `images`, decoded, upright and in RGB.

    Args:
        images: see `ImageSource`.
        row (`int`): position.

    Returns:
        `PIL.Image.Image` in mode RGB, see `decode_image`.

    Raises:
        ValueError: if the image cannot be read; the message names the row and, where there is one, the file.
    """
    try:
        # Inside the `try`, because a sequence may decode on access.
        item = undecoded(images)[row]
    except _DECODING_ERRORS as error:
        raise _unreadable(f"Image {row}", error) from error
    return decode_image(item, f"Image {row}{_file_of(item)}")


def decode_image(item: Any, name: str = "The image") -> Image.Image:
    """
    One image, decoded, upright and in RGB.

    The orientation in the EXIF data is applied and transparency is dropped. 16-bit gray levels are divided by 257, so
    that white stays white. An image in RGB that needs no turn is returned without a copy.

    Args:
        item: a PIL image, a path, the `bytes` of a file, or a dictionary with `bytes` or `path`.
        name (`str`, defaults to `"The image"`): subject of the error message.

    Returns:
        `PIL.Image.Image` in mode RGB.

    Raises:
        ValueError: if the image cannot be read, or has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels; the message
            begins with `name`.
    """
    try:
        image = _open(item)
        limit = Image.MAX_IMAGE_PIXELS
        # Pillow only warns up to twice its limit.
        if limit is not None and image.width * image.height > limit:
            raise ValueError(
                f"it has {image.width} x {image.height} pixels, more than `PIL.Image.MAX_IMAGE_PIXELS` = {limit}"
            )
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except _DECODING_ERRORS as error:
        raise _unreadable(name, error) from error


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
