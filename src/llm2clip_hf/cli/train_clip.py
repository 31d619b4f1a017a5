# SPDX-License-Identifier: Apache-2.0
"""`llm2clip train-clip`: stage 2, the vision tower learns with the LLM as text encoder."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .clip_plan import (
    Plan,
    check_evaluation,
    check_finished_stores,
    check_first_images,
    check_llm,
    embed_missing,
    find_models,
    holds_llm,
    load_classes,
    load_tables,
    make_evaluators,
    model_fields,
    open_finished,
    outline_of_llm,
    print_plan,
)
from .options import EmbeddingOptions, named_values, option, parse_options
from .runs import (
    claim_folder,
    is_main_process,
    logs_to_stderr,
    refuse_finished,
    resume_point,
    run_identity,
    table_identity,
    write_results,
)


if TYPE_CHECKING:
    from ..data import CaptionEmbeddingStore, ImageTextTable
    from ..modeling import LLM2CLIPModel
    from ..training import LLM2CLIPTrainingArguments


EXAMPLES = """\
  llm2clip train-clip --vision_model openai/clip-vit-large-patch14-336 --text_model llm-cc --data pairs.parquet \\
      --output_dir llm2clip
  llm2clip train-clip --config stage2.yaml --check
  accelerate launch --num_processes 8 -m llm2clip_hf train-clip --config stage2.yaml
  llm2clip train-clip --config stage2.yaml --resume_from_checkpoint last

A config file with two caption sources and tar shards:

  vision_model: openai/clip-vit-large-patch14-336
  text_model: llm-cc
  shards: ["cc3m/{00000..00287}.tar"]
  caption_fields: {real: txt, dense: json.longSV_captions}
  store: cc3m-embeddings
  caption_weights: {real: 0.5, dense: 0.5}
  output_dir: llm2clip"""

SHOWN = (
    "output_dir learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps "
    "encoder_chunk_size vision_layer_decay train_vision train_text integration loss_type dataloader_num_workers "
    "eval_strategy eval_steps save_steps resume_from_checkpoint report_to seed"
).split()


@dataclass(kw_only=True)
class TrainClipOptions(EmbeddingOptions):
    model: str | None = option("LLM2CLIP folder to train on, instead of two parts.")
    vision_model: str | None = option("Vision tower to start from: a backbone, or a CLIP-like model.")
    text_model: str | None = option("The LLM, best a result of stage 1.")
    clip_text_model: str | None = option(
        "CLIP whose text encoder is trained beside the LLM, with `integration` other than replace."
    )
    caption_weights: list[str] | None = option(
        "Weight of each source, e.g. real=0.5 dense=0.5 (paper); equal if left out."
    )
    weight_column: str | None = option(
        "Column of positive numbers, the weight of each pair in the loss; in tar shards e.g. json.score."
    )
    on_bad_image: Literal["error", "skip"] = option(
        "Images that cannot be read: stop, or take another row and count.", "error"
    )
    text_mode: Literal["stored", "online"] = option(
        "Captions as stored embeddings (paper), or through the LLM at every step.", "stored"
    )
    store: str | None = option("Folder of the embeddings; made if missing. OUTPUT_DIR/store if left out.")
    test_data: str | None = option("Images with captions to measure retrieval on, like `data`.")
    test_split: str | None = option(
        "Split of `test_data`, which is `data` if left out; test, or the only one, if left out itself."
    )
    zero_shot_data: str | None = option(
        "Images with labels to measure zero-shot accuracy on: a file, folder or Hub data set, with settings as in "
        "`evaluate`, e.g. flowers.parquet?label_column=name, or a benchmark of `evaluate`."
    )
    early_stopping_patience: int | None = option(
        "Stop after so many evaluations without a better `metric_for_best_model`, e.g. zero_shot_top1."
    )
    projection_dim: int | None = option("Width of the joint space; 1280 (paper) if left out.")
    adapter_num_layers: int | None = option("Blocks of the text adaptor; 4 (paper) if left out.")
    model_config: list[str] | None = option(
        "Other fields of LLM2CLIPConfig for a new model, e.g. vision_pooling=mean adapter_dropout=0.1, or "
        "logit_bias_init_value=-10 for the sigmoid loss."
    )
    text_weights: Literal["external", "bundled"] = option(
        "Whether the saved model names the LLM or holds it, as one of a `model` with its LLM does.", "external"
    )
    crop_scale: list[float] | None = option(
        "Smallest and largest share of the image to crop; 0.9 1.0 (paper) if left out."
    )


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status."""
    from ..training import LLM2CLIPTrainingArguments

    options, args = parse_options(
        argv,
        verb="train-clip",
        description="Stage 2: train the vision tower, its projection and the text adaptor with the frozen LLM. "
        "Captions are embedded once if there is no store of them yet. The defaults are the paper's.",
        examples=EXAMPLES,
        own=TrainClipOptions,
        training=LLM2CLIPTrainingArguments,
        shown=SHOWN,
    )
    resume = resume_point(args)
    refuse_finished(args.output_dir, "config.json", resume)
    plan = prepare(options, args, resume)
    if options.check:
        if is_main_process():
            print_plan(options, args, plan)
        return 0
    return train_and_save(options, args, plan, claim_folder(args, plan.identity, resume))


def check_choices(options: TrainClipOptions, args: "LLM2CLIPTrainingArguments") -> None:
    """Refuses options that do not go together, before anything is loaded."""
    stored, new = options.text_mode == "stored", options.vision_model is not None
    refused = [
        (
            (options.model is None) != new,
            "Give either `model` (an LLM2CLIP folder) or `vision_model` with `text_model`.",
        ),
        (new and options.text_model is None, "`text_model` is missing: the LLM that the captions are embedded with."),
        (
            (options.clip_text_model is None) != (args.integration == "replace"),
            f"`clip_text_model` ({options.clip_text_model}) names CLIP's own text encoder, which every `integration` "
            f"but replace ({args.integration}) needs. Give both or neither.",
        ),
        (
            options.clip_text_model is not None and options.data is None,
            f"`integration={args.integration}` reads captions as text beside their stored embeddings, which a stream "
            "of `shards` does not offer. Give `data`.",
        ),
        ((options.data is None) == (options.shards is None), "Give either `data` or `shards`."),
        (
            args.train_text == "lora" and stored,
            "`train_text=lora` changes the LLM, so stored embeddings would be stale. Set `text_mode=online`.",
        ),
        (
            options.shards and options.caption_fields is None and (not stored or options.store is None),
            "`shards` need `caption_fields`, which say where captions are, e.g. `real=txt dense=json.long_caption`, "
            "or a finished `store`, made with `llm2clip embed-captions --shards`.",
        ),
        (
            options.store is not None and not stored,
            "`--store` has no effect with `--text_mode online`, which stores no embeddings. Leave it out.",
        ),
        (
            options.caption_fields is not None and options.data is not None,
            "`--caption_fields` are for `--shards`. Name the columns of `--data` with `--caption_columns`.",
        ),
    ]
    for is_wrong, message in refused:
        if is_wrong:
            raise ValueError(message)
    scale = options.crop_scale
    if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
        raise ValueError(
            f"`--crop_scale` needs two numbers, the smallest and the largest share of the image, in (0, 1], got "
            f"{' '.join(map(str, scale))}."
        )
    new_model = ("model_config", "projection_dim", "adapter_num_layers")
    if options.model is not None and (given := [name for name in new_model if getattr(options, name) is not None]):
        raise ValueError(f"`--{given[0]}` is for a new model of `--vision_model`, and `--model` brings its own.")


def prepare(options: TrainClipOptions, args: "LLM2CLIPTrainingArguments", resume: Any) -> Plan:
    """Makes and checks all parts of a run but the embeddings; nothing here takes long, and nothing is written."""
    from ..training.clip.checks import check_stores, count_steps, prepare_training
    from ..training.clip.evaluation import class_prompts
    from ..training.run_checks import check_settings, seed_run
    from .embed_captions import check_store_options

    check_choices(options, args)
    check_settings(args)
    check_store_options(options)
    configs = find_models(options)
    table, test = load_tables(options)
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    identity = run_identity("train-clip", options, args, {"pairs_per_step": pairs, **table_identity(table)})
    claim_folder(args, identity, resume, write=False)
    classes = load_classes(options.zero_shot_data) if options.zero_shot_data else None
    check_evaluation(options, args, test, classes)
    stored, captions = options.text_mode == "stored", dict[str, Any]()
    if stored:
        folder = options.store or str(Path(str(args.output_dir)) / "store")
        captions[folder] = None if table is None else table.captions
        captions |= {} if test is None else {f"{folder}-test": test.captions}
        captions |= {} if classes is None else {f"{folder}-zero-shot": class_prompts(classes)}
    stores = open_finished(captions)
    seed_run(args)  # before anything random is built
    model, processor = load_model(options, with_llm=not (stored or options.check))
    bundled = holds_llm(options, args, configs.get("model"))
    needed = bundled or not stored or len(stores) < len(captions)
    check_llm(options, configs, model, processor, needed)
    if options.check and not stored:
        model.text_model = outline_of_llm(model.config.text_config)
    dataset = training_data(options, args, table, stores.get(next(iter(captions), "")), processor)
    check_first_images(model, processor, dataset, [part.images for part in (test, classes) if part is not None])
    parts = collator_and_clip_text(options, model, processor)
    prepare_training(model, args, parts.get("clip_text_model"))
    steps = count_steps(args, dataset)
    for store in stores.values():
        check_stores(model, store, processor)
    check_finished_stores(options, stores)
    return Plan(table, test, classes, captions, stores, model, processor, dataset, parts, steps, bundled, identity)


def train_and_save(options: TrainClipOptions, args: "LLM2CLIPTrainingArguments", plan: Plan, resume: Any) -> int:
    """Embeds what is not embedded yet, trains, measures and saves."""
    from transformers import EarlyStoppingCallback

    from ..training import LLM2CLIPTrainer
    from ..training.clip.evaluation import run_evaluators

    for folder, captions in plan.captions.items():
        if folder not in plan.stores:
            plan.stores[folder] = embed_missing(options, plan, captions, folder)
            plan.stores[folder].check_compatible(plan.model)
    store = plan.stores.get(next(iter(plan.captions), ""))
    if store is not plan.dataset.store:
        plan.dataset = training_data(options, args, plan.table, store, plan.processor)
    patience = options.early_stopping_patience
    evaluators = make_evaluators(options, plan)
    trainer = LLM2CLIPTrainer(
        plan.model,
        args,
        train_dataset=plan.dataset,
        processing_class=plan.processor,
        evaluators=evaluators,
        callbacks=None if patience is None else [EarlyStoppingCallback(patience)],
        **plan.parts,
    )
    with logs_to_stderr():
        trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    # On all processes: under FSDP2 none has the whole model, and elsewhere they share the work.
    results: dict[str, Any] = dict(run_evaluators(trainer, evaluators))
    if args.should_save:
        if plan.bundled:
            bundle(options, str(args.output_dir))
        for measured in results.values():
            for name, value in measured.items():
                if name.endswith(("to_text_recall@1", "to_image_recall@1", "top1")):
                    print(f"{name:<43}{100 * value:6.1f}")
        results["training"] = {"steps": trainer.state.global_step}
        write_results(args.output_dir, results)
        print(f"written   {args.output_dir}")
    return 0


def bundle(options: Any, folder: str) -> None:
    """Puts the LLM into a saved model that only names it, or that was trained without it."""
    from .. import LLM2CLIPModel
    from ..files import UNFINISHED, publish_folder

    kwargs: dict[str, Any] = {} if options.dtype is None else {"dtype": options.dtype}
    text_model = None
    if options.model is not None and options.text_model is None:
        trust = options.trust_remote_code
        text_model = LLM2CLIPModel.from_pretrained(options.model, trust_remote_code=trust, **kwargs).text_model
    model = LLM2CLIPModel.from_pretrained(folder, text_model=text_model, text_model_kwargs=kwargs)
    model.config.text_weights = "bundled"
    target = Path(folder)
    staging, complete = target / f"{UNFINISHED}model", target / f"{UNFINISHED}bundled-model"
    for leftover in (staging, complete):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        model.save_pretrained(staging)
        publish_folder(staging, complete)  # flushes the files
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)  # what a full disk needs most is space
        raise
    # The new files are on the disk: they only have to be renamed. Meanwhile there is no config, so that the folder
    # never passes for a finished model.
    (target / "config.json").unlink()
    if not (complete / "model.safetensors").exists():
        (target / "model.safetensors").unlink()  # would be read in place of several files
    for file in sorted(complete.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, target / file.name)
    complete.rmdir()


def load_model(options: TrainClipOptions, with_llm: bool) -> tuple["LLM2CLIPModel", Any]:
    """Model and processor; the LLM's weights only where they are needed."""
    from transformers import AutoModel, AutoProcessor

    from .. import LLM2CLIPModel, LLM2CLIPProcessor
    from ..modeling import text_prefix_length
    from ..modeling.loading_llm2clip import load_text_config, pin_revision

    if options.model is not None:
        trust = options.trust_remote_code
        model = AutoModel.from_pretrained(options.model, trust_remote_code=trust, load_text_model=with_llm)
        if options.text_model is not None:
            model.config.text_weights, model.config.text_base_model = "external", options.text_model
            model.config.text_base_revision = None
        elif model.config.text_weights == "bundled" and not with_llm:
            model.config.text_weights = "none"  # until it is put back at the end
        return model, AutoProcessor.from_pretrained(options.model, trust_remote_code=trust)
    vision, llm = str(options.vision_model), str(options.text_model)
    template = None if options.template == "none" else options.template
    processor = LLM2CLIPProcessor.from_vision_text_pretrained(vision, llm, text_template=template)
    sizes = {**model_fields(options), "text_base_model": llm}
    if with_llm:
        model = LLM2CLIPModel.from_vision_text_pretrained(
            vision,
            llm,
            text_template=template,
            text_weights=options.text_weights,
            text_model_kwargs=options.weights_settings(),
            **sizes,
        )
        return model, processor
    model = LLM2CLIPModel.from_vision_text_pretrained(
        vision,
        text_config=load_text_config(llm).get_text_config(),
        text_base_revision=pin_revision(llm, {}).get("revision"),
        text_prefix_length=text_prefix_length(processor.tokenizer),
        text_weights="external",
        **sizes,
    )
    return model, processor


def training_data(
    options: TrainClipOptions,
    args: "LLM2CLIPTrainingArguments",
    table: "ImageTextTable | None",
    store: "CaptionEmbeddingStore | None",
    processor: Any,
) -> Any:
    """The training set: a table with random access, or a stream of shards."""
    from ..data import ImageTextStream, RandomResizedCropTransform

    scale = (0.9, 1.0) if options.crop_scale is None else (options.crop_scale[0], options.crop_scale[1])
    transform = RandomResizedCropTransform.from_image_processor(processor.image_processor, scale=scale)
    weights = named_values(options.caption_weights, "caption_weights")
    try:
        weights = weights and {source: float(weight) for source, weight in weights.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"`--caption_weights` must be numbers, got {weights}.") from error
    settings: dict[str, Any] = {
        "transform": transform,
        "caption_weights": weights,
        "seed": args.seed,
        "on_bad_image": options.on_bad_image,
    }
    if table is not None:
        return table.dataset(store=store, with_text=options.clip_text_model is not None, **settings)
    fields = named_values(options.caption_fields, "caption_fields") if store is None else None
    settings |= {name: getattr(options, name) for name in ("image_column", "key_column", "weight_column")}
    return ImageTextStream(options.shards, fields, store=store, on_bad_sample=options.on_bad_row, **settings)


def collator_and_clip_text(options: TrainClipOptions, model: "LLM2CLIPModel", processor: Any) -> dict[str, Any]:
    """The collator, and CLIP's own text encoder where it is trained too, as arguments of the trainer."""
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    from ..data import ImageTextCollator
    from ..training import ClipTextCollator

    length = {} if options.max_length is None else {"max_length": options.max_length}
    collator = ImageTextCollator(processor, **length)
    if options.clip_text_model is None:
        return {"data_collator": collator}
    # Where the joint space has another width than CLIP's, the encoder starts with a new projection.
    clip_text_model = CLIPTextModelWithProjection.from_pretrained(
        options.clip_text_model, projection_dim=model.config.projection_dim, ignore_mismatched_sizes=True
    )
    tokenizer = AutoTokenizer.from_pretrained(options.clip_text_model)
    return {"clip_text_model": clip_text_model, "data_collator": ClipTextCollator(tokenizer, collator)}
