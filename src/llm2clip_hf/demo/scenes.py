# SPDX-License-Identifier: Apache-2.0
"""
Scenes of the demo: pictures composed from real scans of handwritten digits, and captions that describe them.

A scene holds one to three digits. Each is a scan from scikit-learn's bundled set (8x8 pixels, 1797 scans), has a
colour and a size, and stands in one cell of a 3x3 grid; no two digits of a scene share digit, colour or cell. The same
facts are told by short captions (colours and digits) and by dense ones (also size, place and how two of them stand to
each other), in three languages. The wordings differ in words, in what a clause begins with and in the order in which
the digits are told, so a reader has to understand which colour, size and place belong to which digit.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES = ("small", "large")
# Colours as RGB, far enough apart to be told from each other on the dark background.
COLOURS = {
    "red": (235, 45, 45),
    "green": (40, 190, 70),
    "blue": (60, 100, 255),
    "yellow": (245, 220, 50),
    "white": (245, 245, 245),
    "purple": (185, 70, 215),
}

CELL = 12  # pixels per grid cell; a large digit fills it, a small one keeps the scan's own 8x8 pixels
IMAGE_SIZE = 3 * CELL
_DIGIT_PIXELS = {"small": 8, "large": 12}
_JITTER = 1  # pixels that a small digit may be off the middle of its cell, each way
_BACKGROUND = (22, 22, 30)
_NOISE = 6.0  # standard deviation of the pixel noise, in 8-bit levels


@dataclass(frozen=True)
class PlacedDigit:
    """One digit of a scene: what a caption tells of it, and where exactly its scan is drawn."""

    digit: int
    colour: str
    size: str
    row: int
    column: int
    scan: int = 0
    offset: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Scene:
    """A scene: its digits from top to bottom and from left to right, and the seed of its pixel noise."""

    digits: tuple[PlacedDigit, ...]
    noise_seed: int = 0

    @property
    def facts(self) -> frozenset[tuple[int, str, str, int, int]]:
        """What a dense caption tells; scenes with equal facts have equal captions."""
        return frozenset((d.digit, d.colour, d.size, d.row, d.column) for d in self.digits)


@cache
def digit_scans() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 scans as `(1797, 8, 8)` floats in 0-1 (1 is ink), and their digits `(1797,)`."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images / 16.0, data.target


def split_scans(seed: int = 0) -> dict[str, list[list[int]]]:
    """Splits the scans of each digit into disjoint parts for training, validation and test (70, 10 and 20 percent)."""
    labels = digit_scans()[1]
    parts: dict[str, list[list[int]]] = {"train": [], "validation": [], "test": []}
    rng = random.Random(f"scans-{seed}")
    for digit in range(10):
        scans = [int(i) for i in np.flatnonzero(labels == digit)]
        rng.shuffle(scans)
        first, second = round(0.7 * len(scans)), round(0.8 * len(scans))
        for part, chosen in zip(parts, (scans[:first], scans[first:second], scans[second:])):
            parts[part].append(chosen)
    return parts


def sample_scenes(
    count: int,
    scans: Sequence[Sequence[int]],
    *,
    seed: str | int,
    num_digits: Sequence[int] = (2, 3),
    exclude: Iterable[Scene] = (),
    distinct_short_captions: bool = False,
) -> list[Scene]:
    """Draws random scenes with distinct facts."""
    rng = random.Random(f"scenes-{seed}")
    seen = {scene.facts for scene in exclude}
    short = set()
    cells = [(row, column) for row in range(3) for column in range(3)]
    scenes: list[Scene] = []
    while len(scenes) < count:
        number = rng.choice(list(num_digits))
        digits = []
        places = sorted(rng.sample(cells, number))
        for digit, colour, (row, column) in zip(
            rng.sample(range(10), number), rng.sample(sorted(COLOURS), number), places
        ):
            size = rng.choice(SIZES)
            room = CELL - _DIGIT_PIXELS[size]
            jitter = _JITTER if room else 0
            offset = (room // 2 + rng.randint(-jitter, jitter), room // 2 + rng.randint(-jitter, jitter))
            digits.append(PlacedDigit(digit, colour, size, row, column, rng.choice(scans[digit]), offset))
        scene = Scene(tuple(digits), noise_seed=rng.randrange(2**31))
        names = frozenset((d.digit, d.colour) for d in digits)
        if scene.facts in seen or (distinct_short_captions and names in short):
            continue
        seen.add(scene.facts)
        short.add(names)
        scenes.append(scene)
    return scenes


def render(scene: Scene) -> Image.Image:
    """Draws a scene: an RGB picture of `IMAGE_SIZE` x `IMAGE_SIZE` pixels, the same one at every call."""
    noise = np.random.default_rng(scene.noise_seed).normal(0.0, _NOISE, (IMAGE_SIZE, IMAGE_SIZE, 3))
    canvas = np.array(_BACKGROUND) + noise
    images = digit_scans()[0]
    for placed in scene.digits:
        pixels = _DIGIT_PIXELS[placed.size]
        scan = Image.fromarray((images[placed.scan] * 255).astype(np.uint8))
        if pixels != 8:
            scan = scan.resize((pixels, pixels), Image.Resampling.BICUBIC)
        ink = np.asarray(scan, dtype=np.float64)[:, :, None] / 255
        top, left = placed.row * CELL + placed.offset[0], placed.column * CELL + placed.offset[1]
        window = canvas[top : top + pixels, left : left + pixels]
        window[:] = (1 - ink) * window + ink * np.array(COLOURS[placed.colour])
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
