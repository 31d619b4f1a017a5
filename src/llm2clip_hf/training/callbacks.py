# SPDX-License-Identifier: Apache-2.0
"""Trainer callbacks of both stages."""

from typing import Any

from transformers import TrainerCallback


class EpochCallback(TrainerCallback):
    """Tells a dataset that draws anew each epoch (`set_epoch`) which epoch begins; a resumed one included."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called before the loader of the epoch is read, and before its workers start."""
        self.dataset.set_epoch(int(state.epoch or 0))
