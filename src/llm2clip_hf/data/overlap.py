# SPDX-License-Identifier: Apache-2.0
"""What training and test data have in common: a result on rows that were trained on says nothing."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .captions import Captions, CaptionTable


if TYPE_CHECKING:
    from .image_text_loading import ImageTextTable


__all__ = ["Overlap", "find_overlap"]

logger = logging.getLogger(__name__)

_MAX_EXAMPLES = 3


@dataclass
class Overlap:
    """
    Test data that are in the training data too.

    Args:
        captions, num_captions (`int`): test captions that are captions of training images, and all test captions.
        images, num_images (`int`): test images whose file is a training image, byte by byte, and all test images; 0
            of 0 where only captions were compared.
        examples (`list[str]`): the first of the captions.
    """

    captions: int = 0
    num_captions: int = 0
    images: int = 0
    num_images: int = 0
    examples: list[str] | None = None

    def __bool__(self) -> bool:
        return bool(self.captions or self.images)

    def describe(self) -> str:
        """One line, e.g. `12 of 500 captions and 0 of 100 images of the test data are in the training data too`."""
        counts = f"{self.captions} of {self.num_captions} captions"
        if self.num_images:
            counts += f" and {self.images} of {self.num_images} images"
        examples = f", e.g. {', '.join(repr(text[:60]) for text in self.examples)}" if self.examples else ""
        return f"{counts} of the test data are in the training data too{examples}"

    def warn(self) -> None:
        """Logs a warning if there is anything in common."""
        if self:
            logger.warning("%s. Results on these are no test: choose other rows, or another split.", self.describe())


def find_overlap(
    train: "ImageTextTable | CaptionTable | Captions", test: "ImageTextTable | CaptionTable | Captions"
) -> Overlap:
    """
    Captions and images that training and test data share.

    Images are compared where both are `ImageTextTable`, by the bytes of their files; only training images of the size
    of a test image are read.

    Args:
        train, test (`ImageTextTable` or `CaptionTable`, or captions as it takes them): the two tables.

    Returns:
        `Overlap`; false where there is nothing in common.

    Example:
    >>> find_overlap([["a cat"], ["a dog"]], [["a dog", "two dogs"]]).describe()
    "1 of 2 captions of the test data are in the training data too, e.g. 'a dog'"
    """
    texts = list(_captions(test).texts())
    known = set(texts)
    shared = {text for text in _captions(train).texts() if text in known}
    found = [text for text in texts if text in shared]
    overlap = Overlap(len(found), len(texts), examples=list(dict.fromkeys(found))[:_MAX_EXAMPLES])
    if hasattr(train, "images") and hasattr(test, "images"):
        overlap.num_images = len(test)
        overlap.images = _shared_images(train.images, test.images)
    return overlap


def _captions(table: Any) -> CaptionTable:
    table = getattr(table, "captions", table)
    return table if isinstance(table, CaptionTable) else CaptionTable(table)


def _shared_images(train: Any, test: Any) -> int:
    sizes = set(test.sizes())
    digests = {_digest(train[row]) for row, size in enumerate(train.sizes()) if size in sizes and size >= 0}
    return sum(_digest(test[row]) in digests for row in range(len(test)))


def _digest(image: Any) -> bytes:
    content = image.get("bytes") if isinstance(image, dict) else image
    if content is None or isinstance(content, str):
        content = Path(content or image["path"]).read_bytes()
    return hashlib.sha256(content).digest()
