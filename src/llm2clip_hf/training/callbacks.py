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
    """
    Keeps the logit scale in `[1, max_logit_scale]` after each optimizer step (CLIP, arXiv 2103.00020, 2.5).

    Args:
        max_logit_scale (`float`): The upper end.
        deepspeed (`bool`, *optional*, defaults to `False`):
            Whether DeepSpeed trains the model. Its optimizers keep a float32 copy of each parameter, from which the
            next step would bring an unclamped value back, so the copy is clamped as well.
    """

    def __init__(self, max_logit_scale: float, deepspeed: bool = False) -> None:
        self.max_log = math.log(max_logit_scale)
        self.deepspeed = deepspeed

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called right after the optimizer's step."""
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, self.max_log)
            if self.deepspeed:
                self._clamp_copy(model.logit_scale)

    def _clamp_copy(self, parameter: torch.Tensor) -> None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        copy = safe_get_full_fp32_param(parameter)  # on all processes, each of which may hold a part
        if copy is not None:
            safe_set_full_fp32_param(parameter, copy.clamp(0.0, self.max_log))
        elif parameter.dtype != torch.float32:
            raise RuntimeError(
                f"DeepSpeed trains `logit_scale` in {parameter.dtype}, and its float32 copy, which has to be clamped, "
                "is out of reach without ZeRO. Set `zero_optimization.stage` to 1 or 2 in the DeepSpeed config."
            )
