# SPDX-License-Identifier: Apache-2.0
"""Read images from whatever a data set holds: PIL images, paths, or the undecoded form of `datasets`."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps


__all__ = ["ImageSource", "load_image"]

ImageSource = Sequence[Any]
"""PIL images, paths, `{"bytes": ..., "path": ...}` dictionaries, or an image column of a `datasets.Dataset`."""

# What Pillow raises on damaged files; `UnidentifiedImageError` is an `OSError`.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def load_image(images: ImageSource, row: int) -> Image.Image:
    """
    Image `row` of `images`, decoded, upright and in RGB.

    Args:
        images: see `ImageSource`.
        row (`int`): position.

    Returns:
        `PIL.Image.Image` in mode RGB; the orientation in the EXIF data is applied, transparency is dropped.

    Raises:
        ValueError: if the image cannot be read; the message names the row and, where there is one, the file.
    """
    item: Any = None
    try:
        # Inside the `try`, because an image column decodes on access.
        item = images[row]
        return ImageOps.exif_transpose(_open(item)).convert("RGB")
    except _DECODING_ERRORS as error:
        where = f" (`{item}`)" if isinstance(item, (str, Path)) else ""
        raise ValueError(
            f"Image {row}{where} cannot be read: {error}. Repair the file, or drop the row from the data set."
        ) from error


def _open(item: Any) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, (str, Path)):
        return Image.open(item)
    if isinstance(item, dict) and item.get("bytes") is not None:
        return Image.open(io.BytesIO(item["bytes"]))
    if isinstance(item, dict) and item.get("path") is not None:
        return Image.open(item["path"])
    raise ValueError(f"expected a PIL image, a path or a dictionary with `bytes` or `path`, got {type(item).__name__}")
