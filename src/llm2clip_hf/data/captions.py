# SPDX-License-Identifier: Apache-2.0
"""
Captions of images: one table type for every input form, and caption pairs for caption-contrastive tuning.

The captions of an image come from one or several named sources (in the paper: the real caption and a dense one written
by a multimodal LLM). `CaptionTable` numbers them in one flat order, image by image and source by source, which the
embedding store and the image-text dataset share.
"""

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .sampling import random_bits


if TYPE_CHECKING:
    import datasets


__all__ = ["CaptionPairDataset", "CaptionTable", "Captions"]

CaptionsOfImage = str | Sequence[str]
Captions = Sequence[CaptionsOfImage] | Mapping[str, Sequence[CaptionsOfImage]]
"""Per image a caption or a list of captions; or a mapping from source name to such a sequence."""

DEFAULT_SOURCE = "caption"

# Streams of `random_bits`; every kind of choice has its own number.
_FIRST_CAPTION, _SECOND_CAPTION = 10, 11


class CaptionTable:
    """
    Captions per image, grouped by source and numbered in one flat order.

    Flat order: image 0 first; within an image the sources in the order of the mapping, within a source the given
    order. All captions are checked once, when the table is made.

    Args:
        captions:
            A sequence with one caption or one list of captions per image (its source is called `"caption"`), or a
            mapping from source name to such a sequence. All sources have one entry per image; an entry may be an
            empty list as long as the image has a caption in another source. Columns of a `datasets.Dataset` work.

    Attributes:
        source_names (`tuple[str, ...]`): names of the sources.
        offsets (`np.ndarray` of shape `(num_images + 1,)`, int64): captions of image `i` are the flat rows
            `offsets[i]` to `offsets[i + 1]`.
        source_ids (`np.ndarray` of shape `(num_captions,)`, int16): position in `source_names` of each flat row.
        sha256 (`str`): digest of all captions, their sources and their grouping.

    Raises:
        ValueError: if there is no image, sources differ in length, an image has no caption, or a caption is not a
            non-empty string.

    Example:
    >>> table = CaptionTable({"real": ["a cat", "a dog"], "dense": [["a grey cat asleep"], []]})
    >>> table[0], len(table), table.offsets.tolist()
    (['a cat', 'a grey cat asleep'], 2, [0, 2, 3])
    """

    def __init__(self, captions: Captions) -> None:
        sources = dict(captions) if isinstance(captions, Mapping) else {DEFAULT_SOURCE: captions}
        _check_sources(sources)
        self.source_names = tuple(sources)
        self._columns = tuple(sources.values())
        self._num_images = len(self._columns[0])
        self.offsets, self.source_ids, self.sha256 = self._scan()

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> list[str]:
        """Captions of image `index` in flat order."""
        return [caption for column in self._columns for caption in _as_list(column[index])]

    @property
    def num_captions(self) -> int:
        """Captions of all images together."""
        return len(self.source_ids)

    def rows(self, start: int, stop: int) -> list[str]:
        """Captions of the flat rows `start` to `stop` (exclusive)."""
        if start >= stop:
            return []
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        last = int(np.searchsorted(self.offsets, stop, side="left"))
        texts = [text for image in range(first, last) for text in self[image]]
        begin = start - int(self.offsets[first])
        return texts[begin : begin + stop - start]

    def _scan(self) -> tuple[np.ndarray, np.ndarray, str]:
        counts = np.zeros(self._num_images, dtype=np.int64)
        source_ids = array("h")
        digest = hashlib.sha256("\0".join(self.source_names).encode())
        for image, entries in enumerate(zip(*self._columns)):
            for source, entry in enumerate(entries):
                texts = _as_list(entry)
                for text in texts:
                    _check_caption(text, image, self.source_names[source])
                    encoded = text.encode()
                    # The length prefix keeps ["ab", "c"] apart from ["a", "bc"].
                    digest.update(f"{image},{source},{len(encoded)}:".encode() + encoded)
                source_ids.extend([source] * len(texts))
                counts[image] += len(texts)
            if not counts[image]:
                raise ValueError(f"Image {image} has no caption. Give every image at least one, or drop the row.")
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return offsets, np.array(source_ids, dtype=np.int16), digest.hexdigest()


class CaptionPairDataset(torch.utils.data.Dataset):
    """
    Two distinct captions per image, drawn anew each epoch: the positives of caption-contrastive tuning.

    Every image gives one row `{"anchor": str, "positive": str}`. The two captions are drawn uniformly among the
    distinct captions of the image (over all its sources), without replacement, as a pure function of
    `(seed, epoch, row)`. Source: paper section 3.1, any two captions of an image are positives.

    Args:
        captions: as for `CaptionTable`; at least two distinct captions per image.
        seed (`int`, defaults to 0): seed of the draw.

    Raises:
        ValueError: if an image has fewer than two distinct captions; the message names the row.

    Example:
    >>> pairs = CaptionPairDataset([["a cat", "a grey cat", "a cat asleep"]], seed=1)
    >>> pairs.set_epoch(3)
    >>> pairs[0]["anchor"] != pairs[0]["positive"]
    True
    """

    def __init__(self, captions: "Captions | CaptionTable", seed: int = 0) -> None:
        self._table = captions if isinstance(captions, CaptionTable) else CaptionTable(captions)
        self._seed = seed
        # In shared memory, so that the workers of a loader with `persistent_workers=True` see `set_epoch`.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        for row in range(len(self._table)):
            if len(set(self._table[row])) < 2:
                raise ValueError(
                    f"Row {row} has fewer than two distinct captions: {self._table[row]!r}. "
                    "Caption pairs need two per image; drop the row or add captions."
                )

    def __len__(self) -> int:
        return len(self._table)

    def set_epoch(self, epoch: int) -> None:
        """Draw the pairs of epoch `epoch` from the next access on."""
        self._epoch.fill_(epoch)

    def __getitem__(self, row: int) -> dict[str, str]:
        if not 0 <= row < len(self):
            raise IndexError(f"Row {row} is out of range for {len(self)} images.")
        return next(self._pairs(np.array([row])))

    def to_dataset(self) -> "datasets.Dataset":
        """
        The pairs of the current epoch as a `datasets.Dataset` with the columns `anchor` and `positive`.

        Returns:
            `datasets.Dataset` with one row per image, in image order; ready for `SentenceTransformerTrainer`.
        """
        try:
            from datasets import Dataset
        except ImportError as error:
            raise ImportError(
                "`CaptionPairDataset.to_dataset` needs `datasets`. Install it with `pip install llm2clip-hf[train]`."
            ) from error
        rows = list(self._pairs(np.arange(len(self))))
        return Dataset.from_dict({name: [row[name] for row in rows] for name in ("anchor", "positive")})

    def _pairs(self, rows: np.ndarray) -> Iterator[dict[str, str]]:
        epoch = int(self._epoch)
        first_bits = random_bits(self._seed, epoch, rows, _FIRST_CAPTION)
        second_bits = random_bits(self._seed, epoch, rows, _SECOND_CAPTION)
        for row, first_draw, second_draw in zip(rows.tolist(), first_bits.tolist(), second_bits.tolist()):
            texts = list(dict.fromkeys(self._table[row]))
            first = first_draw % len(texts)
            # A step of 1 to n - 1 around the circle: uniform over the other captions.
            second = (first + 1 + second_draw % (len(texts) - 1)) % len(texts)
            yield {"anchor": texts[first], "positive": texts[second]}


def _as_list(entry: CaptionsOfImage) -> Sequence[str]:
    # A missing entry or a row of another kind becomes a caption that the check refuses with its row.
    return [entry] if isinstance(entry, (str, Mapping)) or entry is None else entry


def _check_sources(sources: Mapping[str, Sequence[CaptionsOfImage]]) -> None:
    if not sources:
        raise ValueError("`captions` has no source. Pass at least one sequence of captions.")
    for name, column in sources.items():
        if isinstance(column, str):
            raise ValueError(
                f"The captions of source `{name}` are one string. Pass one caption or one list of captions per image."
            )
    lengths = {name: len(column) for name, column in sources.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"All caption sources need one entry per image, got {lengths}. Use [] where one is missing.")
    if 0 in lengths.values():
        raise ValueError("`captions` is empty. Pass the captions of at least one image.")


def _check_caption(text: object, image: int, source: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"Caption {text!r} of image {image}, source `{source}`, is not a non-empty string. "
            "Drop the caption, or use [] where an image has none in this source."
        )
