# SPDX-License-Identifier: Apache-2.0
"""Search among images by a sentence, and among captions by an image, with any model of CLIP's interface."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from ..data.images import decode_image
from ..evaluation import encode_images, encode_texts
from .captions import caption, make_data
from .recipe import FULL
from .scenes import render


logger = logging.getLogger(__name__)

# Formats that Pillow decodes by itself; EPS, for one, would start another program on a file that anyone may send.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_KINDS = "PNG, JPEG, WebP, GIF, BMP or TIFF"
DEMO_WORDINGS = ("english_dense", "german_dense", "spanish_dense")


@dataclass(frozen=True)
class Match:
    """One result."""

    row: int
    score: float


class SearchIndex:
    """Embeddings of images and captions, and the model that embeds what is asked. Safe to use from several threads."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        images: Sequence[Any],
        image_embeds: torch.Tensor,
        captions: Sequence[str],
        caption_embeds: torch.Tensor,
    ) -> None:
        self.model, self.processor = model, processor
        self.images, self.image_embeds = list(images), image_embeds
        self.captions, self.caption_embeds = list(captions), caption_embeds
        # A tokenizer keeps its padding and truncation as state, which two threads must not share.
        self._lock = threading.Lock()

    @classmethod
    def build(
        cls,
        model: Any,
        processor: Any,
        images: Sequence[Any],
        captions: Sequence[str] = (),
        *,
        batch_size: int = 32,
        show_progress: bool = False,
    ) -> SearchIndex:
        """Embeds images and captions once."""
        if not len(images):
            raise ValueError("There are no images to search among. Pass at least one.")
        options: dict[str, Any] = {"batch_size": batch_size, "show_progress": show_progress}
        readable = _ReadableImages(images)
        image_embeds = encode_images(model, readable, processor=processor, **options)
        rows = [row for row in range(len(images)) if row not in readable.failed]
        if not rows:
            first = readable.failed[min(readable.failed)]
            raise ValueError(f"None of the {len(images)} images can be read. The first: {first}")
        unique = list(dict.fromkeys(captions))
        caption_embeds = image_embeds.new_empty(0, image_embeds.shape[1])
        if unique:
            caption_embeds = encode_texts(model, unique, processor=processor, **options)
        return cls(model, processor, [images[row] for row in rows], image_embeds[rows], unique, caption_embeds)

    def by_text(self, query: str, top_k: int = 8) -> list[Match]:
        """The images nearest to a text."""
        # Half of a surrogate pair, which a browser may send, is no text for a tokenizer.
        text = (query or "").encode("utf-8", "replace").decode("utf-8").strip()
        if not text:
            raise ValueError("The query is empty. Type a sentence that describes the image.")
        with self._lock:
            embeds = encode_texts(self.model, [text], processor=self.processor)
        return nearest(embeds[0], self.image_embeds, top_k)

    def by_image(self, image: Any, top_k: int = 8) -> list[Match]:
        """The captions nearest to an image."""
        if not self.captions:
            raise ValueError("There are no captions to search among. Give a file of captions, one per line.")
        picture = open_image(image)
        with self._lock:
            embeds = encode_images(self.model, [picture], processor=self.processor)
        return nearest(embeds[0], self.caption_embeds, top_k)


def nearest(query: torch.Tensor, candidates: torch.Tensor, top_k: int) -> list[Match]:
    """The rows with the largest product."""
    scores, rows = (candidates @ query).topk(min(top_k, len(candidates)))
    return [Match(row, score) for row, score in zip(rows.tolist(), scores.tolist())]


def open_image(item: Any) -> Image.Image:
    """An image, decoded, upright and in RGB; with a message for whoever sent it if that is impossible."""
    if isinstance(item, Image.Image):
        return decode_image(item)
    try:
        with Image.open(item, formats=FORMATS) as image:
            return decode_image(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"This file is no image that can be read. Use {_KINDS}.") from error
    except FileNotFoundError as error:
        raise ValueError(f"There is no file `{Path(item).name}`. Give the path of an image.") from error
    except (Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"This image cannot be opened: {error}. Save it anew, or smaller.") from error
    except ValueError as error:
        raise ValueError(
            f"This image cannot be read: {error.__cause__ or error}. Save it anew, or smaller."
        ) from error


def find_images(folder: str | Path) -> list[Path]:
    """The image files below a folder, by their names."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"The folder `{folder}` does not exist. Give a folder of images.")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"The folder `{folder}` holds no image. Put {_KINDS} files into it.")
    return paths


def read_captions(path: str | Path) -> list[str]:
    """The captions of a text file, one per line; blank lines are passed over."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The captions `{path}` cannot be read: {error}. Give a text file in UTF-8.") from error
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise ValueError(f"The file `{path}` holds no caption. Write one per line.")
    return captions


def demo_scenes(output_dir: str | Path, limit: int = 300) -> tuple[list[Image.Image], list[str]]:
    """Held-out scenes of a demo run, which its models have never seen, told in three languages."""
    path = Path(output_dir) / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    held_out = metrics.get("settings", {}).get("num_held_out", FULL.num_held_out)
    data = make_data(
        num_text=0,
        num_pairs=0,
        num_held_out=min(limit, held_out),
        num_single=0,
        split=metrics.get("split", "test"),
        seed=metrics.get("seed", 0),
    )
    captions = [caption(scene, wording) for wording in DEMO_WORDINGS for scene in data.held_out]
    return [render(scene) for scene in data.held_out], captions


class _ReadableImages(Sequence[Image.Image]):
    """Images, decoded on access; what cannot be read is gray, and is noted in `failed` with its message."""

    def __init__(self, images: Sequence[Any]) -> None:
        self.images = images
        self.failed: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: Any) -> Any:
        try:
            return open_image(self.images[row])
        except ValueError as error:
            item = self.images[row]
            name = f"`{item}`" if isinstance(item, str | Path) else f"image {row}"
            self.failed[row] = f"{name}: {error}"
            logger.warning("Left out %s", self.failed[row])
            return Image.new("RGB", (64, 64), (128, 128, 128))
