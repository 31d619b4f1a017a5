# SPDX-License-Identifier: Apache-2.0
"""What all map-style sources of text pairs share: the epoch, single and batched access, the Arrow copy."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch


if TYPE_CHECKING:
    import datasets


_ROWS_PER_STEP = 8192


class PairDataset(torch.utils.data.Dataset):
    """
    Rows `{"anchor": str, "positive": str, ["negative": str,] "label": int}`, drawn anew each epoch.

    Args:
        num_rows (`int`): length.
        seed (`int`): seed of the draws.
        instruction (`str`, *optional*): instruction of the anchor column.
        has_negatives (`bool`): whether the rows have the column `negative`.

    Attributes:
        instruction (`str` or `None`): as given.
        column_names (`tuple[str, ...]`): the keys of the rows, in this order.
    """

    def __init__(self, num_rows: int, seed: int, instruction: str | None, has_negatives: bool) -> None:
        self._num_rows = num_rows
        self._seed = seed
        self.instruction = instruction
        self.column_names = ("anchor", "positive", *(["negative"] if has_negatives else []), "label")
        # In shared memory, so that the workers of a loader with `persistent_workers=True` see `set_epoch`.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self._num_rows

    def set_epoch(self, epoch: int) -> None:
        """Draw the pairs of epoch `epoch` from the next access on, in worker processes too."""
        self._epoch.fill_(epoch)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows at once, as the loaders of torch ask for a batch."""
        for row in rows:
            if not 0 <= row < len(self):
                raise IndexError(f"Row {row} is out of range for {len(self)} rows.")
        return list(self._draw(int(self._epoch), np.asarray(rows, dtype=np.int64)))

    def to_dataset(self) -> "datasets.Dataset":
        """
        The rows of the current epoch as a `datasets.Dataset`.

        Returns:
            `datasets.Dataset` with the columns of `column_names`, in row order; ready for
            `SentenceTransformerTrainer`, whose collator takes `label` for what it is.
        """
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"`{type(self).__name__}.to_dataset` needs `datasets`. "
                "Install it with `pip install llm2clip-hf[train]`."
            ) from error
        kinds = {name: datasets.Value("int64" if name == "label" else "string") for name in self.column_names}
        parts = []
        # Step by step into Arrow: millions of rows never are Python objects at once.
        for start in range(0, len(self), _ROWS_PER_STEP):
            rows = list(self._draw(int(self._epoch), np.arange(start, min(start + _ROWS_PER_STEP, len(self)))))
            columns = {name: [row[name] for row in rows] for name in self.column_names}
            parts.append(datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)))
        return datasets.concatenate_datasets(parts)

    def _draw(self, epoch: int, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        raise NotImplementedError
