# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a model, its data and its arguments, found before the first step of stage 2."""

import inspect
import logging
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import nn

from ...data import CaptionEmbeddingStore
from ...data.store.fingerprint import require_identity, require_text_encoder
from ..run_checks import (
    check_float32_weights,
    check_metric_options,
    check_one_device,
    largest_weight,
    seed_run,
    steps_of_run,
)
from ..streams import shards_itself
from . import clip_text
from .arguments import LLM2CLIPTrainingArguments
from .encoding import CLIP_TEXT_NAMES, has_batch_statistics
from .parameters import is_llm2clip, prepare_trained_parts


logger = logging.getLogger(__name__)
# Entries of a batch about its rows, which do not enter the model: their names, and what the loss is told of them.
ROW_NAMES = ("key", "index")
PAIR_IDS = ("image_id", "text_id")
NO_FEATURES = frozenset({*ROW_NAMES, *PAIR_IDS, "weight"})
_OWN_REMEDY = (
    "Embed the captions with the LLM and processor of this model, or build the model with the `text_prefix_length` "
    "and `text_pooling` of the store."
)


def resolve_loss_type(model: nn.Module, loss_type: str | None) -> Literal["softmax", "sigmoid"]:
    """The loss to train with: the given one, or sigmoid for a model with a logit bias and softmax for one without."""
    has_bias = getattr(model, "logit_bias", None) is not None
    if loss_type == "sigmoid" and not has_bias:
        raise ValueError(
            '`loss_type="sigmoid"` needs a logit bias, which the model has not. Build it with '
            "`logit_bias_init_value=-10.0` (`--model_config logit_bias_init_value=-10`)."
        )
    if loss_type is None:
        return "sigmoid" if has_bias else "softmax"
    return cast(Literal["softmax", "sigmoid"], loss_type)


def prepare_training(
    model: Any, args: LLM2CLIPTrainingArguments, clip_text_model: Any = None, compute_metrics: Any = None
) -> None:
    """
    Freezes and extends a model as the arguments say, and checks that it can be trained; a second call changes nothing.
    """
    check_one_device(args)
    check_metric_options(args, compute_metrics)
    seed_run(args)  # before LoRA and the concatenated head are drawn
    prepare_trained_parts(model, args)
    clip_text.attach_clip_text_model(model, clip_text_model, args.integration)
    check_trainable(model, args)
    check_contrastive_batch(args)
    resolve_loss_type(model, args.loss_type)


def count_steps(args: LLM2CLIPTrainingArguments, dataset: Any) -> int:
    """Optimizer steps of a run, as the trainer counts them."""
    size, accumulated, rows = args.train_batch_size, args.gradient_accumulation_steps, len(dataset)

    def quotient(count: int, divisor: int) -> int:
        return count // divisor if args.dataloader_drop_last else -(-count // divisor)

    def whole(count: int, per_step: int) -> int:
        drops = args.dataloader_drop_last and args.accumulate_negatives
        return count // per_step * per_step or count if drops else count

    if shards_itself(dataset):
        batches = whole(quotient(rows, size), accumulated)
    else:
        processes = 1 if cast(Any, args.accelerator_config).split_batches else args.world_size
        batches = quotient(quotient(whole(rows, size * args.world_size * accumulated), size), processes)
    if not batches:
        raise ValueError(
            f"The training set of {rows} rows holds less than one batch of {size} rows on each of {args.world_size} "
            "device(s). Lower `--per_device_train_batch_size`."
        )
    return steps_of_run(args, batches)


def check_trainable(model: nn.Module, args: LLM2CLIPTrainingArguments) -> None:
    """Checks a model before training."""
    if not isinstance(getattr(model, "logit_scale", None), nn.Parameter):
        raise ValueError(f"`model` of type {type(model).__name__} has no parameter `logit_scale`.")
    check_float32_weights(model, args.learning_rate, "Load the model with `dtype=torch.float32`")
    if args.encoder_chunk_size is not None:
        chunks, remedy = "`encoder_chunk_size`", "Leave it out"
    elif args.gradient_accumulation_steps > 1 and args.accumulate_negatives:
        chunks, remedy = "`gradient_accumulation_steps`", "Set `accumulate_negatives=False`"
    else:
        return
    if has_batch_statistics(model):
        raise ValueError(
            f"{chunks} cannot be used with trained batch norms, whose statistics are those of the whole "
            f"batch. {remedy}, or freeze the batch norms."
        )
    if args.torch_compile:
        raise ValueError(f"{chunks} and `torch_compile` cannot be used together. {remedy}.")


def check_contrastive_batch(args: LLM2CLIPTrainingArguments, batch_size: int | None = None) -> None:
    """
    Checks that there are negatives, in batches as of the arguments or of what `auto_find_batch_size` made of them.
    """
    size = args.train_batch_size if batch_size is None else batch_size
    if args.contrastive_batch_size // args.train_batch_size * size < 2:
        raise ValueError(
            f"A contrastive batch of one row has no negatives: `per_device_train_batch_size` is {size} "
            f"on {args.world_size} process. Raise it."
        )


def find_stores(dataset: Any) -> Iterator[CaptionEmbeddingStore]:
    """The caption embedding stores of a data set, also of one inside a `Subset` or `ConcatDataset`."""
    if isinstance(dataset, CaptionEmbeddingStore):
        yield dataset
    elif isinstance(dataset, torch.utils.data.Dataset):
        for name in ("store", "dataset"):
            yield from find_stores(getattr(dataset, name, None))
        inner = getattr(dataset, "datasets", None)
        if isinstance(inner, (list, tuple)):
            for part in inner:
                yield from find_stores(part)


def check_stores(model: Any, dataset: Any, processor: Any) -> None:
    """
    Compares the embedding stores of a data set with the model, and records in `model.config.text_fingerprint` what
    made the embeddings, so that a later run on other embeddings is refused.

    Width, pooling, length of the template's header and tokenizer are always compared. A model that holds its LLM is
    compared by the digest of its weights too, which reads all of them once.
    """
    stores = list(find_stores(dataset))
    if not stores or not is_llm2clip(model):
        return
    config = model.config
    for store in stores:
        if store.embedding_dim != config.llm_hidden_size:
            raise ValueError(
                f"The embeddings in `{store.path}` have width {store.embedding_dim}, the model takes "
                f"{config.llm_hidden_size}. Embed the captions with the LLM of the model, or build the model with "
                f"`llm_hidden_size={store.embedding_dim}`."
            )
        require_identity(
            store, stores[0].fingerprint, f"`{stores[0].path}`", "Embed all captions with one LLM and template."
        )
    require_text_encoder(stores[0], model, processor, _OWN_REMEDY)
    config.text_fingerprint = dict(stores[0].fingerprint)


def check_batch(model: Any, batch: dict[str, Any], args: LLM2CLIPTrainingArguments) -> None:
    """Checks that a batch holds what the text mode and the integration need, and nothing that would be passed over."""
    if "pixel_values" not in batch:
        raise ValueError(f"The batch has no `pixel_values`, only {sorted(batch)}. Check the data collator.")
    if is_llm2clip(model):
        if ("llm_embeds" in batch) == ("input_ids" in batch):
            raise ValueError(
                f"A batch needs either `llm_embeds` or `input_ids`, got {sorted(batch)}. Check the data collator."
            )
        if "input_ids" in batch and model.text_model is None:
            raise ValueError(
                "The batch has token ids, but the model holds no LLM. Attach it with "
                "`model.attach_text_model(AutoModel.from_pretrained(...))`, or train on stored embeddings."
            )
        if "llm_embeds" in batch and args.train_text == "lora":
            raise ValueError(
                "`train_text='lora'` trains the LLM, but the batch has stored embeddings, which it does not enter. "
                "Give the data set captions instead of a store."
            )
        width = model.config.llm_hidden_size
        if "llm_embeds" in batch and batch["llm_embeds"].shape[-1] != width:
            raise ValueError(
                f"`llm_embeds` has width {batch['llm_embeds'].shape[-1]}, the model takes {width}. Embed the captions "
                "with the LLM of the model."
            )
    if args.integration != "replace" and CLIP_TEXT_NAMES[0] not in batch:
        raise ValueError(
            f"`integration={args.integration!r}` needs `{CLIP_TEXT_NAMES[0]}`, the tokens of CLIP's own text encoder, "
            f"in every batch, got {sorted(batch)}. Use `ClipTextCollator` as data collator."
        )
    _refuse_extra_entries(model, batch, args)


def _refuse_extra_entries(model: Any, batch: dict[str, Any], args: LLM2CLIPTrainingArguments) -> None:
    base = getattr(model, "_orig_mod", model)  # of a compiled one
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    known = {
        name
        for name, parameter in inspect.signature(type(base).forward).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    if "llm_embeds" in known.intersection(batch):
        known -= {"attention_mask", "position_ids"}
    if args.integration != "replace":
        known |= set(CLIP_TEXT_NAMES)
    extra = sorted(set(batch) - known - NO_FEATURES)
    # The names that a `forward` of `*args, **kwargs` takes are not known.
    if extra and "pixel_values" in known:
        raise ValueError(
            f"The batch has {extra}, which {type(base).__name__} takes no notice of in this training. Leave them out "
            "in the data collator."
        )
    plain = sorted(name for name in set(batch) - NO_FEATURES if not isinstance(batch[name], torch.Tensor))
    if plain:
        raise ValueError(
            f"Entries {plain} of the batch are no tensors with a row per pair, e.g. `{plain[0]}` is "
            f"{type(batch[plain[0]]).__name__}. Leave them out in the data collator, or make tensors of them."
        )


def describe_rows(
    core: nn.Module, embeds: dict[str, torch.Tensor], batches: list[dict[str, Any]], world_size: int
) -> str:
    """Why the loss is not finite although all weights are: rows are named where their own features are why."""
    names = _row_names(batches)
    broken = [name for name, is_finite in zip(names, _finite_inputs(batches)) if not is_finite]
    if broken:
        return f"The weights, images or stored embeddings of rows {broken} are not finite: repair or remove them."
    finite = torch.stack([value.isfinite().all(dim=1) for value in embeds.values()]).all(dim=0).tolist()
    broken = [name for name, is_finite in zip(names, finite) if not is_finite]
    if not broken:
        elsewhere = "another process says more" if world_size > 1 else "the logit scale or bias overflows"
        return f"All embeddings of its rows {names} are finite: {elsewhere}."
    if len(broken) < len(names):
        return (
            f"The embeddings of rows {broken} are not finite, though what they were made of is: look at these "
            "images and captions, or compute in a type of wider range than float16."
        )
    return (
        "No embedding is finite, though inputs and weights are: the weights have grown too large, up to "
        f"{largest_weight(core)}, so the run has diverged. Lower `learning_rate`."
    )


def _finite_inputs(batches: list[dict[str, Any]]) -> list[bool]:
    """Whether the numbers that each row of some batches begins with, pixels or stored embeddings, are finite."""
    rows: list[bool] = []
    for batch in batches:
        numbers = [v for v in batch.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
        rows += (
            torch.stack([value.isfinite().reshape(len(value), -1).all(dim=1) for value in numbers]).all(dim=0).tolist()
        )
    return rows


def _row_names(batches: list[dict[str, Any]]) -> list[Any]:
    """Names of the rows of some batches: their `key` or `index`, else their position."""
    names: list[Any] = []
    for batch in batches:
        given: Any = next((batch[name] for name in ROW_NAMES if name in batch), None)
        if given is None:
            given = range(len(names), len(names) + len(batch["pixel_values"]))
        names.extend(given.tolist() if isinstance(given, torch.Tensor) else list(given))
    return names
