# SPDX-License-Identifier: Apache-2.0
"""Evaluation in stage 2: retrieval among the rows of a data set, and evaluations of the user's choice."""

import numbers
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import EvalPrediction

from ..evaluation.metrics import retrieval_metrics


def retrieval_of_pairs(prediction: EvalPrediction) -> dict[str, float]:
    """
    Retrieval metrics of paired image and text embeddings, row `i` of one with row `i` of the other; those of CLIP's
    own text encoder, where it is trained too, under names that begin with `clip_text_`, and those of the concatenated
    head under `concatenated_text_`.
    """
    image_embeds, *all_text_embeds = (torch.as_tensor(embeds) for embeds in prediction.predictions)
    metrics: dict[str, float] = {}
    for prefix, text_embeds in zip(("", "clip_text_", "concatenated_text_"), all_text_embeds):
        found = retrieval_metrics(image_embeds, text_embeds, torch.arange(len(text_embeds)))
        metrics |= {f"{prefix}{name}": value for name, value in found.items()}
    return metrics


def run_evaluators(trainer: Any, evaluators: Mapping[str, Callable[..., Any]]) -> dict[str, dict[str, float]]:
    """
    Calls each evaluator with the model and the processor, on all processes at once.

    An evaluator may therefore share its work among the processes, as `evaluate_retrieval` does by default. All get the
    numbers of the main process. Under FSDP2 each process holds the whole weights meanwhile, so that processes need not
    go through the model in step. The random state is that of before afterwards.

    Args:
        trainer ([`LLM2CLIPTrainer`]): The trainer; all processes make this call.
        evaluators (mapping from `str` to callable): Each called as `evaluator(model, processor)`.

    Returns:
        `dict[str, dict[str, float]]`: What each evaluator found, by its name; equal on all processes.

    Raises:
        ValueError: if an evaluator returns something else than a mapping to numbers.
        RuntimeError: if an evaluator failed on another process.
    """
    model = trainer.model if trainer.is_fsdp_enabled else trainer.accelerator.unwrap_model(trainer.model)
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    found: dict[str, dict[str, float]] = {}
    failure: Exception | None = None
    training = model.training
    model.eval()
    try:
        with (
            _whole_weights(model, getattr(plugin, "reshard_after_forward", True)),
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
        ):
            for name, evaluator in evaluators.items():
                found[name] = _numbers(name, evaluator(model, trainer.processor))
    except Exception as error:
        if trainer.args.world_size == 1:
            raise
        failure = error
    finally:
        model.train(training)
    return found if trainer.args.world_size == 1 else _of_main_process(found, failure)


def _of_main_process(found: dict[str, dict[str, float]], failure: Exception | None) -> dict[str, dict[str, float]]:
    """The numbers of the main process. An error in one process ends all, so that none waits for ever."""
    reports: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reports, (found, None if failure is None else repr(failure)))
    if failure is not None:
        raise failure
    for rank, (_, error) in enumerate(reports):
        if error is not None:
            raise RuntimeError(f"An evaluator failed on process {rank}: {error}")
    numbers_of_main: dict[str, dict[str, float]] = reports[0][0]
    return numbers_of_main


@contextmanager
def _whole_weights(model: Any, reshard_after_forward: bool) -> Iterator[None]:
    """Keeps the weights of a model under FSDP2 gathered: its forward pass then needs no other process."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not parts:
        yield
        return
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            # The weights of the root stay until the backward pass, which needs them at once.
            part.set_reshard_after_forward(bool(reshard_after_forward) and part is not model, recurse=False)
            part.reshard()


def _numbers(name: str, found: Any) -> dict[str, float]:
    if not isinstance(found, Mapping) or not all(isinstance(v, numbers.Real) for v in found.values()):
        raise ValueError(
            f"The evaluator of `{name}` must return a mapping from names to numbers, such as `evaluate_retrieval` "
            f"does, got {found!r}."
        )
    return {str(key): float(value) for key, value in found.items()}


@contextmanager
def held_back_announcement(handler: Any) -> Iterator[Callable[..., Any]]:
    """
    Holds `on_evaluate` of the callbacks back, for the duration of the context, in which several parts of one
    evaluation end.

    Args:
        handler (`CallbackHandler`): The callbacks of the trainer.

    Yields:
        callable: `on_evaluate` as it was before; inside of another such context, one that does nothing.
    """
    announce, was_held = handler.on_evaluate, "on_evaluate" in vars(handler)
    handler.on_evaluate = lambda args, state, control, metrics: control
    try:
        yield announce
    finally:
        if was_held:
            handler.on_evaluate = announce
        else:
            del handler.on_evaluate
