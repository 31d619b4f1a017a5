# SPDX-License-Identifier: Apache-2.0
"""Evaluation in stage 2: retrieval among the rows of a data set, and evaluations of the user's choice."""

import math
import numbers
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import EvalPrediction
from transformers.trainer_utils import speed_metrics

from ...data import CaptionEmbeddingStore, CaptionTable
from ...evaluation import encode_images, encode_texts, evaluate_zero_shot_classification
from ...evaluation.encoding import encode_llm_embeds
from ...evaluation.metrics import retrieval_metrics
from ...evaluation.retrieval import check_store
from ...evaluation.tasks.data import ClassificationData
from ...evaluation.text_towers import embed_texts
from ...evaluation.zero_shot import fill_template
from .clip_text import HEAD_NAME, concatenated_text_embeds
from .clip_text import NAME as CLIP_TEXT


# What `retrieval_metrics` names are of CLIP's own text encoder, and of the concatenated head.
_HEADS = ("", "clip_text_", "concatenated_text_")


def retrieval_of_pairs(prediction: EvalPrediction) -> dict[str, float]:
    """
    Retrieval metrics of paired image and text embeddings, row `i` of one with row `i` of the other; those of CLIP's
    own text encoder, where it is trained too, under names that begin with `clip_text_`, and those of the concatenated
    head under `concatenated_text_`.
    """
    image_embeds, *all_text_embeds = (torch.as_tensor(embeds) for embeds in prediction.predictions)
    return _retrieval_of_heads(image_embeds, all_text_embeds, torch.arange(len(image_embeds)))


def evaluate_pairs(trainer: Any, dataset: Any, prefix: str) -> dict[str, float]:
    """Retrieval on one data set, logged; what `Trainer.evaluate` does but for telling the callbacks."""
    trainer._memory_tracker.start()
    loader, start = trainer.get_eval_dataloader(dataset), time.time()
    output = trainer.evaluation_loop(loader, description="Evaluation", metric_key_prefix=prefix)
    metrics: dict[str, float] = output.metrics
    start += metrics.get(f"{prefix}_model_preparation_time", 0.0)
    steps = math.ceil(output.num_samples / (trainer.args.eval_batch_size * trainer.args.world_size))
    metrics |= speed_metrics(prefix, start, num_samples=output.num_samples, num_steps=steps)
    trainer.log(metrics)
    trainer._memory_tracker.stop_and_update_metrics(metrics)
    return metrics


def _retrieval_of_heads(
    image_embeds: torch.Tensor, all_text_embeds: list[torch.Tensor], text_to_image: torch.Tensor
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for prefix, text_embeds in zip(_HEADS, all_text_embeds):
        found = retrieval_metrics(image_embeds, text_embeds, text_to_image)
        metrics |= {f"{prefix}{name}": value for name, value in found.items()}
    return metrics


def evaluate_text_encoders(
    model: Any,
    images: Any,
    captions: CaptionTable,
    *,
    processor: Any,
    store: CaptionEmbeddingStore | None = None,
    clip_tokenizer: Any = None,
    max_length: int | None = None,
) -> dict[str, float]:
    """Retrieval with every text encoder that a model trains: the LLM's, CLIP's own, and the concatenated head."""
    texts = captions.rows(0, captions.num_captions)
    if store is None:
        text_embeds = [encode_texts(model, texts, processor=processor, max_length=max_length)]
    else:
        check_store(model, store, processor)
        text_embeds = [encode_llm_embeds(model, store.gather, store.num_captions)]
    if hasattr(model, CLIP_TEXT):
        clip_text = embed_texts(getattr(model, CLIP_TEXT), texts, processor=clip_tokenizer)
        text_embeds.append(torch.nn.functional.normalize(clip_text, dim=-1))
    target = next(model.parameters()).device
    text_embeds = [embeds.to(target) for embeds in text_embeds]
    if hasattr(model, HEAD_NAME):
        text_embeds.append(concatenated_text_embeds(getattr(model, HEAD_NAME), text_embeds[1], text_embeds[0]))
    image_embeds = encode_images(model, images, processor=processor).to(target)
    owners = np.repeat(np.arange(len(captions)), np.diff(captions.offsets))
    return _retrieval_of_heads(image_embeds, text_embeds, torch.from_numpy(owners))


def class_prompts(data: ClassificationData) -> CaptionTable:
    """The prompts of each class, one per template; their stored embeddings are for `evaluate_classes`."""
    return CaptionTable([[fill_template(each, name) for each in data.templates] for name in data.class_names])


def evaluate_classes(
    model: Any, data: ClassificationData, *, processor: Any, store: CaptionEmbeddingStore | None = None
) -> dict[str, float]:
    """Zero-shot classification, also by a model without its LLM, from stored embeddings of the prompts."""
    classifier = None
    if store is not None:
        check_store(model, store, processor)
        embeds = encode_llm_embeds(model, store.gather, store.num_captions)
        means = embeds.view(len(data.class_names), len(data.templates), -1).mean(dim=1)
        classifier = torch.nn.functional.normalize(means, dim=-1)
    metrics = evaluate_zero_shot_classification(
        model,
        data.images,
        data.labels,
        data.class_names,
        data.templates,
        processor=processor,
        classifier=classifier,
        allow_duplicates=True,
    )
    return {name.removeprefix("zero_shot_"): value for name, value in metrics.items()}


def run_evaluators(trainer: Any, evaluators: Mapping[str, Callable[..., Any]]) -> dict[str, dict[str, float]]:
    """
    Calls each evaluator with the model and the processor, on all processes at once.

    An evaluator may therefore share its work among the processes, as `evaluate_retrieval` does by default. All get the
    numbers of the main process. Under FSDP2 each process holds the whole weights meanwhile, so that processes need not
    go through the model in step. The random state is that of before afterwards.
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
