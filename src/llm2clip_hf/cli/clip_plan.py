# SPDX-License-Identifier: Apache-2.0
"""What `train-clip` is about to do: the parts that were made and checked before the expensive one, and in words."""

import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .options import json_values, named_values, nearest
from .runs import is_main_process


if TYPE_CHECKING:
    from ..data import CaptionEmbeddingStore, ImageTextTable
    from ..evaluation.tasks.data import ClassificationData


logger = logging.getLogger(__name__)
# Fields of LLM2CLIPConfig that come from the parts, or have options of another name.
OWN_FIELDS = (
    "vision_config vision_hidden_size text_config text_prefix_length text_weights text_base_model "
    "text_base_revision text_fingerprint llm_hidden_size"
).split()


@dataclass
class Plan:
    """What a run is made of."""

    table: "ImageTextTable | None"
    test: "ImageTextTable | None"
    classes: "ClassificationData | None"
    captions: dict[str, Any]
    stores: "dict[str, CaptionEmbeddingStore]"
    model: Any
    processor: Any
    dataset: Any
    parts: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    bundled: bool = False
    identity: dict[str, Any] = field(default_factory=dict)


def find_models(options: Any) -> dict[str, Any]:
    """The configs of the models that are named, which are there with their weights, by option."""
    from ..training.model_checks import find_model

    configs = {
        option: find_model(name, option, trust_remote_code=option == "model" and options.trust_remote_code)
        for option in ("model", "vision_model", "text_model", "clip_text_model")
        if (name := getattr(options, option)) is not None
    }
    if "model" in configs and configs["model"].model_type != "llm2clip":
        raise ValueError(
            f"`--model {options.model}` is of the type {configs['model'].model_type!r}, not an LLM2CLIP model. Give "
            "it as `--vision_model`, with a `--text_model`."
        )
    return configs


def holds_llm(options: Any, args: Any, config: Any) -> bool:
    """Whether the LLM is put into the trained model; one that was trained with LoRA is saved with it anyway."""
    was_bundled = config is not None and config.text_weights == "bundled" and options.text_model is None
    return args.train_text != "lora" and (options.text_weights == "bundled" or was_bundled)


def model_fields(options: Any) -> dict[str, Any]:
    """The fields of the config of a new model that the user sets."""
    import inspect

    from .. import LLM2CLIPConfig

    given = json_values(options.model_config, "model_config")
    known = sorted({*inspect.signature(LLM2CLIPConfig).parameters} - {"kwargs", *OWN_FIELDS})
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"`--model_config` sets `{unknown[0]}`, which is no field that it may set{nearest(unknown[0], known)}; "
            f"choose from {', '.join(known)}."
        )
    for name in ("projection_dim", "adapter_num_layers"):
        value = getattr(options, name)
        if value is not None and given.setdefault(name, value) != value:
            raise ValueError(f"`--{name}` is {value} and `--model_config` says {given[name]}. Give one of them.")
    return given


def load_classes(source: str) -> "ClassificationData":
    """The labelled images of `zero_shot_data`."""
    from ..evaluation.tasks.definitions import TASKS, resolve_tasks
    from ..evaluation.tasks.loading import load_task_data

    known = source in TASKS or source.startswith("zero-shot:")
    [task] = resolve_tasks([source if known else f"zero-shot:{source}"])
    if task.kind != "zero-shot":
        raise ValueError(f"`--zero_shot_data {source}` is a task of the kind {task.kind}. Give images with labels.")
    data: Any = load_task_data(task)
    return data


def load_tables(options: Any) -> "tuple[ImageTextTable | None, ImageTextTable | None]":
    """Images with captions to train and to measure on; what both have in common is warned of."""
    from ..data import find_overlap, load_image_text

    if options.shards and (options.split or options.subset):
        raise ValueError("`--split` and `--subset` are of `--data`; `--shards` name their files themselves.")
    if options.test_split and not (options.test_data or options.data):
        raise ValueError(f"`--test_split {options.test_split}` is a split of `--test_data`, which is not given.")
    settings = options.table_settings()
    table = None
    if options.data:
        table = load_image_text(options.data, split=options.split, weight_column=options.weight_column, **settings)
    test_data = options.test_data or (options.data if options.test_split else None)
    if test_data is None:
        return table, None
    if table is None:
        settings |= {"image_column": None, "key_column": None}  # those of the shards
    if test_data != options.data:
        settings["subset"] = None
    test = load_image_text(test_data, split=options.test_split, default_split="test", **settings)
    if table is not None and is_main_process():
        find_overlap(table, test).warn()
    return table, test


def open_finished(captions: Mapping[str, Any]) -> "dict[str, CaptionEmbeddingStore]":
    """The stores that are finished already, by folder; one of other captions is refused."""
    from ..data import CaptionEmbeddingStore

    stores = {}
    for folder, table in captions.items():
        if CaptionEmbeddingStore.is_finished(folder):
            stores[folder] = CaptionEmbeddingStore.open(folder)
            if table is not None and not stores[folder].holds(table):
                raise ValueError(
                    f"The store `{folder}` was made from other captions than those of this run. Give another "
                    "`--store`, or delete the folder."
                )
    return stores


def check_llm(options: Any, configs: dict[str, Any], model: Any, processor: Any, needed: bool) -> None:
    """Whether the LLM that will embed captions is there and fits the adaptor, the pooling and the template."""
    from ..modeling.pretrained_llm2clip import check_end_token
    from ..training.captions.encoder import check_caption_encoder
    from ..training.model_checks import find_model

    config, llm = model.config, configs.get("text_model")
    if llm is None:
        if needed and configs["model"].text_weights == "none":
            raise ValueError(
                f"`--model {options.model}` holds no LLM and names none. Give the `--text_model` that embeds its "
                "captions, or a finished `--store`."
            )
        if needed and config.text_weights == "external":
            find_model(str(config.text_base_model), "text_model")
        return
    if options.model is not None and options.text_mode == "online":
        raise ValueError(
            "`--text_mode online` runs the LLM of `--model`, so `--text_model` has no effect. Leave it out, or attach "
            "that LLM to the model and save it."
        )
    if llm.model_type != "llm2clip":
        check_caption_encoder(options.text_model, llm, pooling=config.text_pooling, **options.llm_settings())
    composite = llm.model_type == "llm2clip"
    width = llm.llm_hidden_size if composite else llm.get_text_config().hidden_size
    if width != config.llm_hidden_size:
        raise ValueError(
            f"`--text_model {options.text_model}` gives embeddings of width {width}, the adaptor of `--model "
            f"{options.model}` takes {config.llm_hidden_size}. Give the LLM that it was trained with."
        )
    pooling = getattr(llm if composite else llm.get_text_config(), "text_pooling", None)
    if pooling not in (None, config.text_pooling):
        raise ValueError(
            f"`--text_model {options.text_model}` was trained with the pooling {pooling!r}, `--model {options.model}` "
            f"with {config.text_pooling!r}. Give the LLM that it was trained with."
        )
    if config.text_pooling == "eos":
        check_end_token(processor.tokenizer, options.text_model)


def check_evaluation(options: Any, args: Any, test: Any, classes: "ClassificationData | None") -> None:
    """Whether there is something to measure during training where that is asked for, and the metric exists."""
    import torch

    from ..evaluation import retrieval_metrics
    from ..evaluation.zero_shot import classification_metrics

    evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
    if evaluates and test is None and classes is None:
        raise ValueError(
            f"`--eval_strategy {args.eval_strategy.value}` has nothing to measure. Give `--test_data` or "
            "`--zero_shot_data`."
        )
    if options.early_stopping_patience is not None:
        if options.early_stopping_patience < 1:
            raise ValueError(f"`--early_stopping_patience` must be 1 or more, got {options.early_stopping_patience}.")
        if not evaluates or args.metric_for_best_model is None:
            raise ValueError(
                "`--early_stopping_patience` needs evaluations to count and a metric to compare, e.g. "
                "`--eval_strategy epoch --metric_for_best_model test_text_to_image_recall@1`."
            )
    metric = args.metric_for_best_model
    if metric is None or not evaluates:
        return
    two = torch.eye(2)
    heads = ["", "clip_text_", "concatenated_text_"]
    heads = heads[: {"replace": 1, "concatenated": 3}.get(args.integration, 2)]
    ranks = retrieval_metrics(two, two, torch.arange(2)) if test is not None else {}
    known = [f"test_{head}{name}" for head in heads for name in ranks]
    if classes is not None:
        number = len(classes.class_names)
        known += classification_metrics(torch.zeros(1, number), torch.zeros(1, dtype=torch.long), "zero_shot")
    if metric.removeprefix("eval_") not in known:
        raise ValueError(
            f"`--metric_for_best_model {metric}` is not measured{nearest(metric.removeprefix('eval_'), known)}; "
            f"choose from {', '.join(known)}."
        )
    if metric.endswith("_rank") and args.greater_is_better:
        raise ValueError(f"`{metric}` is better the smaller it is. Set `--greater_is_better False`.")


def check_first_images(model: Any, processor: Any, dataset: Any, others: list[Any]) -> None:
    """Puts the first image of each data set through the vision tower, as training and evaluation will."""
    import copy

    import torch

    from ..evaluation import encode_images

    if hasattr(dataset, "shuffle_buffer"):
        first = copy.copy(dataset)
        first.shuffle_buffer = 0  # one sample, not thousands that are shuffled
        sample = next(iter(first))
    else:
        sample = dataset[0]
    with torch.no_grad():
        model.get_image_features(pixel_values=sample["pixel_values"][None])
    for images in others:
        encode_images(model, images[:1] if isinstance(images, list) else [images[0]], processor=processor)


def outline_of_llm(config: Any) -> Any:
    """An LLM without weights, which takes its place where it is only asked what would be trained."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config).requires_grad_(False)


def check_finished_stores(options: Any, folders: Iterable[str]) -> None:
    """Compares the LLM's weights with what finished stores say of them; the trainer compares all else."""
    from ..data import CaptionEmbeddingStore

    stores = [CaptionEmbeddingStore.open(folder) for folder in folders if CaptionEmbeddingStore.is_finished(folder)]
    for store in stores:
        length = store.fingerprint.get("max_length")
        if options.max_length is not None and length is not None and length != options.max_length:
            raise ValueError(
                f"The captions of `{store.path}` were cut at {length} tokens, `max_length` is {options.max_length}. "
                "Leave `max_length` out, or give another `store`."
            )
    if stores:  # the LLM is read once, on the CPU of the first process, whose error is that of all
        _on_first_process(lambda: _check_weights(options, stores))


def _check_weights(options: Any, stores: "list[CaptionEmbeddingStore]") -> None:
    from ..data.store.fingerprint import require_identity

    llm = str(options.text_model or options.model)
    silent = [store for store in stores if "weights_sha256" not in store.fingerprint]
    for store in silent:
        logger.warning("`%s` does not record the weights of its LLM; that it is %r is not checked.", store.path, llm)
    stores = [store for store in stores if store not in silent]
    if not stores:
        return
    note = f"checking  the weights of {llm}, which take a while to read, against {stores[0].path}"
    print(note, file=sys.stderr, flush=True)
    try:
        identity = _weights_of(options, llm, stores[0].fingerprint.get("weights_dtype"))
    except OSError as error:
        logger.warning("The weights of %r cannot be read (%s); `%s` is not checked.", llm, error, stores[0].path)
        return
    if identity is None:
        logger.warning("%r holds no LLM, so that `%s` was made by its LLM is not checked.", llm, stores[0].path)
        return
    for store in stores:
        remedy = "Give the `text_model` that made them, or another `store`."
        require_identity(store, identity, repr(llm), remedy, maker="LLM")


def _weights_of(options: Any, llm: str, dtype: Any) -> dict[str, Any] | None:
    """The identity of the LLM's weights, loaded in the dtype that a store names; `None` for a model without LLM."""
    from transformers import AutoModel

    import llm2clip_hf  # noqa: F401  (registers the model type)

    from ..data.store.fingerprint import weights_identity
    from ..modeling.loading_llm2clip import load_pretrained_text, load_text_config

    kwargs = {"dtype": dtype} if dtype in ("float32", "bfloat16", "float16") else {}
    trust = options.trust_remote_code
    config = load_text_config(llm, {"trust_remote_code": trust})
    if config.model_type != "llm2clip":
        return weights_identity(load_pretrained_text(llm, None, kwargs))
    if config.text_weights == "none":
        return None
    model = AutoModel.from_pretrained(llm, trust_remote_code=trust, text_model_kwargs=kwargs)
    return weights_identity(model.text_model)


def _on_first_process(check: Callable[[], None]) -> None:
    """Runs a check on the first process and raises its error on all."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        if is_main_process():
            check()
        return
    problems: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            check()
        except Exception as error:
            problems = [str(error)]
    # Otherwise the others would wait in the first step for a process that has ended.
    dist.broadcast_object_list(problems)
    if problems[0] is not None:
        raise ValueError(problems[0])


def make_evaluators(options: Any, plan: Plan) -> dict[str, Any]:
    """What is measured during training and after it, by name."""
    from ..training.clip.evaluation import evaluate_classes, evaluate_text_encoders

    evaluators: dict[str, Any] = {}
    tokenizer = getattr(plan.parts["data_collator"], "clip_tokenizer", None)
    folder = next(iter(plan.captions), "")
    if (test := plan.test) is not None:
        evaluators["test"] = lambda model, processor: evaluate_text_encoders(
            model,
            test.images,
            test.captions,
            processor=processor,
            store=plan.stores.get(f"{folder}-test"),
            clip_tokenizer=tokenizer,
            max_length=options.max_length,
        )
    if (classes := plan.classes) is not None:
        evaluators["zero_shot"] = lambda model, processor: evaluate_classes(
            model, classes, processor=processor, store=plan.stores.get(f"{folder}-zero-shot")
        )
    return evaluators


def embed_missing(options: Any, plan: Plan, captions: Any, folder: str) -> "CaptionEmbeddingStore":
    """The store in `folder`, made from captions, or from those of the shards."""
    from .embed_captions import data_shards, embed

    keys = plan.table.keys if plan.table is not None and captions is plan.table.captions else None
    if captions is None:
        captions = data_shards(options)
    llm, pooling = str(options.text_model or options.model), plan.model.config.text_pooling
    return embed(options, llm, captions, keys, folder, pooling)


def print_plan(options: Any, args: Any, plan: Plan) -> None:
    """What would run: data, models, what is trained, steps, and the size of the stores."""
    from ..data import find_overlap
    from ..training.model_checks import describe_llm, describe_trained

    if plan.table is None:
        fields = named_values(options.caption_fields, "caption_fields") or {}
        names = tuple(fields) if plan.dataset.store is None else plan.dataset.store.source_names
        print(f"shards    {' '.join(options.shards)}")
        print(f"train     {plan.dataset.num_samples} images, {', '.join(names)}")
    else:
        names = plan.table.captions.source_names
        describe_table("data", options.data, options.split or "train, or the only one", plan.table)
        print(f"train     {len(plan.table)} images, {plan.table.captions.num_captions} captions, {', '.join(names)}")
        if (of_pairs := plan.table.weights) is not None:
            print(f"weights   of pairs from `{options.weight_column}`, {of_pairs.min():g} to {of_pairs.max():g}")
    weights = named_values(options.caption_weights, "caption_weights") or dict.fromkeys(names, 1.0)
    total = sum(map(float, weights.values()))
    print(f"captions  {', '.join(f'{name} {float(weights[name]) / total:.0%}' for name in names)} of the draws")
    if plan.test is not None:
        source = options.test_data or options.data
        describe_table("test", source, options.test_split or "test, or the only one", plan.test)
        print(f"test      {len(plan.test)} images, {plan.test.captions.num_captions} captions")
        if plan.table is not None:
            print(f"shared    {find_overlap(plan.table, plan.test).describe()}")
    if plan.classes is not None:
        counts = plan.classes.counts
        print(f"zero-shot {counts['images']} images, {counts['classes']} classes, {counts['templates']} templates")
    config = plan.model.config
    tower = sum(parameter.numel() for parameter in plan.model.vision_model.parameters())
    print(
        f"vision    {type(plan.model.vision_model).__name__}, {tower / 1e6:,.1f} M parameters, pooling "
        f"{config.vision_pooling}, projection {config.vision_projection} to {config.projection_dim}"
    )
    if options.text_model:
        rank = 16 if args.train_text == "lora" else None
        print(describe_llm(options.text_model, lora_rank=rank, dtype=options.dtype))
    print(describe_trained(plan.model))
    print(
        f"steps     {plan.steps}, {args.contrastive_batch_size} pairs per contrastive batch on {args.world_size} "
        "device(s)"
    )
    if plan.bundled:
        print("saved     with the LLM in the model")
    for folder, captions in plan.captions.items():
        if folder in plan.stores:
            print(f"store     {folder}: finished, {plan.stores[folder].num_captions} captions")
        elif captions is None:
            print(f"store     {folder}: to be made")
        else:
            print(
                f"store     {folder}: to be made, {options.store_size(captions.num_captions, config.llm_hidden_size)}"
            )


def describe_table(role: str, source: str, split: str, table: "ImageTextTable") -> None:
    """Prints where a table comes from, and which columns it takes as what."""
    columns = ", ".join(f"{name} from `{column}`" for name, column in table.caption_columns.items())
    print(f"{role:<10}{source}, split {split}: images from `{table.image_column}`, captions {columns}")
