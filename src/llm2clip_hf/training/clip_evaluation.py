# SPDX-License-Identifier: Apache-2.0
"""Evaluations of the user's choice, such as retrieval on a set with several captions per image, during training."""

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch


def run_evaluators(trainer: Any, evaluators: Mapping[str, Callable[..., Any]], prefix: str) -> dict[str, float]:
    """
    Calls each evaluator with the model and the processor, and names its numbers.

    The main process evaluates while the others wait, and all get its numbers; under FSDP, where the model is spread
    over processes, all of them evaluate. The others wait no longer than `ddp_timeout` of the arguments, 30 minutes by
    default. The random state is that of before afterwards.

    Args:
        trainer ([`LLM2CLIPTrainer`]): The trainer.
        evaluators (mapping from `str` to callable): Each called as `evaluator(model, processor)`.
        prefix (`str`): Prefix of all names.

    Returns:
        `dict[str, float]`: Numbers by `<prefix>_<evaluator>_<name>`.

    Raises:
        ValueError: if an evaluator returns something else than a mapping to numbers.
    """
    metrics: dict[str, float] = {}
    model = trainer.model if trainer.is_fsdp_enabled else trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled or trainer.accelerator.is_main_process:
        training = model.training
        model.eval()
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                for name, evaluator in evaluators.items():
                    metrics |= _named(f"{prefix}_{name}", evaluator(model, trainer.processor))
        finally:
            model.train(training)
    if trainer.args.world_size > 1 and not trainer.is_fsdp_enabled:
        shared = [metrics]
        torch.distributed.broadcast_object_list(shared, src=0)
        metrics = shared[0]
    return metrics


def _named(prefix: str, found: Any) -> dict[str, float]:
    if not isinstance(found, Mapping) or not all(isinstance(v, numbers.Real) for v in found.values()):
        raise ValueError(
            f"The evaluator of `{prefix}` must return a mapping from names to numbers, such as `evaluate_retrieval` "
            f"does, got {found!r}."
        )
    return {f"{prefix}_{name}": float(value) for name, value in found.items()}
