# SPDX-License-Identifier: Apache-2.0
"""Caption retrieval accuracy (CRA) of a text encoder, as an evaluator of sentence-transformers."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers.base.evaluation import BaseEvaluator

from .caption_accuracy import OnTooFew, caption_retrieval_metrics, first_two_captions
from .text_towers import embed_with_sentence_transformer


__all__ = ["CaptionRetrievalEvaluator"]

logger = logging.getLogger(__name__)

_PRIMARY_METRIC = "caption_retrieval_accuracy"


class CaptionRetrievalEvaluator(BaseEvaluator):
    """
    Does one caption of an image find the other one among the captions of all images?

    `evaluate_caption_retrieval` in the form that the trainer of stage 1 takes. The first two distinct captions of each
    image are used. No prompt is added, not even a default prompt of the model, and similarity is the cosine. Source:
    CRA in the paper (section 4.2), top-1 on the 5,000 images of COCO.

    Args:
        captions (sequence of sequences of `str`): captions of each image.
        name (`str`, defaults to `""`): prefix of the metrics, e.g. `"coco"`.
        batch_size (`int`, defaults to 32): captions per forward pass.
        ks (sequence of `int`, defaults to `(1, 5, 10)`): cut-offs.
        show_progress_bar (`bool`, defaults to `False`): show a progress bar.
        on_too_few (`str`, defaults to `"error"`):
            What happens to an image without two distinct captions: `"error"`, or `"skip"`, which counts it.

    Raises:
        ValueError: if there is no image, an image has fewer than two distinct captions, or a caption is not a
            non-empty string; the message names the row.

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
        on_too_few: OnTooFew = "error",
    ) -> None:
        super().__init__()
        self.first, self.second, self.num_skipped = first_two_captions(captions, on_too_few)
        self.name = name
        self.batch_size = batch_size
        self.ks = tuple(ks)
        self.show_progress_bar = show_progress_bar
        self.primary_metric = f"{name}_{_PRIMARY_METRIC}" if name else _PRIMARY_METRIC

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        embeds = embed_with_sentence_transformer(
            model, [*self.first, *self.second], self.batch_size, self.show_progress_bar
        )
        metrics = caption_retrieval_metrics(embeds, self.num_skipped, self.ks)
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        logger.info("Caption retrieval at epoch %s, step %s: %s", epoch, steps, metrics)
        if output_path is not None:
            self._append_record(Path(output_path), {"epoch": epoch, "steps": steps, **metrics})
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def get_config_dict(self) -> dict[str, Any]:
        """Settings that the model card shows."""
        return {"num_images": len(self.first), "num_skipped": self.num_skipped, "ks": list(self.ks)}

    def _append_record(self, folder: Path, record: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        suffix = f"_{self.name}" if self.name else ""
        with (folder / f"caption_retrieval{suffix}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
