# SPDX-License-Identifier: Apache-2.0
"""Caption retrieval accuracy (CRA) of a text encoder, as an evaluator of sentence-transformers."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.evaluation import BaseEvaluator

from .encoding import evaluation_mode
from .metrics import caption_retrieval_accuracy


__all__ = ["CaptionRetrievalEvaluator"]

logger = logging.getLogger(__name__)

_PRIMARY_METRIC = "caption_retrieval_accuracy"


class CaptionRetrievalEvaluator(BaseEvaluator):
    """
    Does one caption of an image find the other one among the captions of all images?

    The first two captions of each image are used. No prompt is added, not even a default prompt of the model, and
    similarity is the cosine. Source: CRA in the paper (section 4.2), top-1 on the 5,000 images of COCO.

    Args:
        captions (sequence of sequences of `str`): captions of each image, at least two.
        name (`str`, defaults to `""`): prefix of the metrics, e.g. `"coco"`.
        batch_size (`int`, defaults to 32): captions per forward pass.
        ks (sequence of `int`, defaults to `(1, 5, 10)`): cut-offs.
        show_progress_bar (`bool`, defaults to `False`): show a progress bar.

    Raises:
        ValueError: if there is no image, an image has fewer than two captions, or a caption is not a non-empty
            string; the message names the row.

    Example:
    >>> evaluator = CaptionRetrievalEvaluator([["a cat", "a grey cat"], ["a dog", "a small dog"]], name="toy")
    >>> evaluator.primary_metric
    'toy_caption_retrieval_accuracy'
    """

    def __init__(
        self,
        captions: Sequence[Sequence[str]],
        name: str = "",
        batch_size: int = 32,
        ks: Sequence[int] = (1, 5, 10),
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__()
        self.first, self.second = _first_two(captions)
        self.name = name
        self.batch_size = batch_size
        self.ks = tuple(ks)
        self.show_progress_bar = show_progress_bar
        self.primary_metric = f"{name}_{_PRIMARY_METRIC}" if name else _PRIMARY_METRIC

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """
        Args:
            model (`SentenceTransformer`): text encoder, also a multimodal one; kept in its train or eval mode.
            output_path (`str`, *optional*): folder; the metrics are appended to `caption_retrieval[_name].jsonl`.
            epoch (`int`, defaults to -1): epoch for the record, -1 outside training.
            steps (`int`, defaults to -1): step for the record, -1 at the end of an epoch.

        Returns:
            `dict[str, float]`: the keys of `caption_retrieval_accuracy`, prefixed with `name`.
        """
        with evaluation_mode(model):
            embeds = self._embed(model)
        metrics = caption_retrieval_accuracy(embeds[: len(self.first)], embeds[len(self.first) :], ks=self.ks)
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        logger.info("Caption retrieval at epoch %s, step %s: %s", epoch, steps, metrics)
        if output_path is not None:
            self._append_record(Path(output_path), {"epoch": epoch, "steps": steps, **metrics})
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def get_config_dict(self) -> dict[str, Any]:
        """Settings that the model card shows."""
        return {"num_images": len(self.first), "ks": list(self.ks)}

    def _embed(self, model: Any) -> torch.Tensor:
        # Equal captions are encoded once, so that they tie exactly.
        unique = list(dict.fromkeys([*self.first, *self.second]))
        # A multimodal model opens a string that looks like the URL or path of an image; the dictionary says it is
        # text. Text-only modules take strings alone.
        is_multimodal = any(modality != "text" for modality in model.modalities)
        inputs: list[Any] = [{"text": text} for text in unique] if is_multimodal else unique
        encoded = model.encode(
            inputs,
            prompt="",
            batch_size=self.batch_size,
            convert_to_tensor=True,
            show_progress_bar=self.show_progress_bar,
        )
        row = {text: position for position, text in enumerate(unique)}
        return torch.as_tensor(encoded)[[row[text] for text in [*self.first, *self.second]]]

    def _append_record(self, folder: Path, record: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        suffix = f"_{self.name}" if self.name else ""
        with (folder / f"caption_retrieval{suffix}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _first_two(captions: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
    if not len(captions):
        raise ValueError("`captions` is empty. Give at least one image with two captions.")
    for row, texts in enumerate(captions):
        if isinstance(texts, str) or len(texts) < 2:
            raise ValueError(
                f"Row {row} needs a list of at least two captions, got {texts!r}. "
                "Caption retrieval compares two captions of each image; drop the row."
            )
        for text in texts[:2]:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"Row {row} has the caption {text!r}, not a non-empty string. Drop the row.")
    return [texts[0] for texts in captions], [texts[1] for texts in captions]
