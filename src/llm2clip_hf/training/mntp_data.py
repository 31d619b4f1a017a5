# SPDX-License-Identifier: Apache-2.0
"""Texts with masked tokens, the same ones for a given seed, epoch and row: what MNTP trains on."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset


# Label of a position that is no target, as everywhere in transformers.
IGNORED = -100
# Of the masked tokens, 80 % become the mask token, 10 % a random one, 10 % stay (BERT, and the released recipe).
_MASKED, _RANDOM = 0.8, 0.1


class MaskedTexts(Dataset):
    """
    Texts as token ids with some of them masked, and the masked tokens as labels.

    Which tokens are masked depends on seed, epoch and row alone, so that a resumed run sees what the first one would
    have seen. Special tokens, template tokens and the first token of a row, which no earlier state predicts, are never
    masked.

    Args:
        texts: A sequence of strings, or of lists of strings (captions of an image), of which each epoch draws one.
        tokenizer: A fast tokenizer of transformers.
        mask_token_id (`int`): Id that stands for a masked token.
        mask_probability (`float`): Probability that a token is masked, in `(0, 1)`.
        max_length (`int`): Longest text in tokens; longer ones are cut.
        seed (`int`): Seed of the masks.

    Raises:
        ValueError: if there is no text, or `texts` is a table instead of one of its columns.
    """

    def __init__(
        self, texts: Any, tokenizer: Any, *, mask_token_id: int, mask_probability: float, max_length: int, seed: int
    ) -> None:
        columns = getattr(texts, "column_names", None)
        if columns is not None:
            name = columns[0] if isinstance(columns, list) and columns else "text"
            raise ValueError(
                f"The texts are a table with the columns {columns}. Pass one of them: `dataset[{name!r}]`."
            )
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"A sequence of texts is needed, got {texts!r}.")
        self.texts = texts
        self.tokenizer = tokenizer
        self.mask_token_id = mask_token_id
        self.mask_probability = mask_probability
        self.max_length = max_length
        self.seed = seed
        # In shared memory, so that the workers of a loader with `persistent_workers=True` see `set_epoch`.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))

    def set_epoch(self, epoch: int) -> None:
        """Draws other masks, and other captions of each image, from the next row on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        """`input_ids` with masks, and `labels`: the token where there is a mask, -100 elsewhere."""
        digest = hashlib.sha256(f"{self.seed}|{int(self._epoch)}|{row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        text = self._text(row, generator)
        encoded = self.tokenizer(text, truncation=True, max_length=self.max_length, return_special_tokens_mask=True)
        ids = torch.tensor(encoded["input_ids"], dtype=torch.long)
        if not len(ids):
            raise ValueError(f"Text {row} gives no token: {text!r}. Remove it.")
        fixed = torch.tensor(encoded["special_tokens_mask"]).bool() | torch.isin(ids, self._special)
        fixed[0] = True
        masked = (torch.rand(len(ids), generator=generator) < self.mask_probability) & ~fixed
        labels = torch.where(masked, ids, IGNORED)
        fate = torch.rand(len(ids), generator=generator)
        random = torch.randint(len(self.tokenizer), ids.shape, generator=generator)
        ids = torch.where(masked & (fate < _MASKED), self.mask_token_id, ids)
        ids = torch.where(masked & (fate >= _MASKED) & (fate < _MASKED + _RANDOM), random, ids)
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}

    def _text(self, row: int, generator: torch.Generator) -> str:
        text = self.texts[row]
        if isinstance(text, (list, tuple)) and text:
            text = text[int(torch.randint(len(text), (), generator=generator))]
        if not isinstance(text, str):
            raise ValueError(f"Row {row} must be a string or a list of strings, got {text!r}.")
        return text


class MaskedTextCollator:
    """
    Pads the rows of `MaskedTexts` to the longest of a batch, on the side of the tokenizer.

    Args:
        tokenizer: A tokenizer of transformers with a pad token; it may be the end token, since the attention mask says
            what is padding.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each of shape `(batch, length)`, int64."""
        batch = self.tokenizer.pad(
            {"input_ids": [row["input_ids"] for row in rows]}, padding=True, return_tensors="pt"
        )
        labels = torch.full_like(batch["input_ids"], IGNORED)
        labels[batch["attention_mask"].bool()] = torch.tensor([label for row in rows for label in row["labels"]])
        return {**batch, "labels": labels}
