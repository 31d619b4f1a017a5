# SPDX-License-Identifier: Apache-2.0
"""Trainer callbacks of both stages."""

import math
from typing import Any

import torch
from transformers import TrainerCallback


class EpochCallback(TrainerCallback):
    """Tells a dataset that draws anew each epoch (`set_epoch`) which epoch begins; a resumed one included."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called before the loader of the epoch is read, and before its workers start."""
        self.dataset.set_epoch(int(state.epoch or 0))


class LogitScaleClamp(TrainerCallback):
    """Keeps the logit scale in `[1, max_logit_scale]` after each optimizer step (CLIP, arXiv 2103.00020, 2.5)."""

    def __init__(self, max_logit_scale: float) -> None:
        self.max_log = math.log(max_logit_scale)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called right after the optimizer's step."""
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, self.max_log)
