# SPDX-License-Identifier: Apache-2.0
"""`llm2clip train-clip`: stage 2, the vision tower learns with the LLM as text encoder."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .options import named_values, parse_options
from .processes import is_main_process
from .results import claim_run, logs_to_stderr, refuse_finished, resume_point, table_identity, write_results
from .store_check import check_finished_stores


if TYPE_CHECKING:
    from llm2clip_hf.data import CaptionEmbeddingStore, ImageTextTable
    from llm2clip_hf.modeling import LLM2CLIPModel
    from llm2clip_hf.training import LLM2CLIPTrainingArguments


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
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "encoder_chunk_size",
    "vision_layer_decay",
    "train_vision",
    "train_text",
    "integration",
    "loss_type",
    "dataloader_num_workers",
    "eval_strategy",
    "eval_steps",
    "save_steps",
    "resume_from_checkpoint",
    "report_to",
    "seed",
)


@dataclass
class TrainClipOptions:
    model: str | None = field(default=None, metadata={"help": "LLM2CLIP folder to train on, instead of two parts."})
    vision_model: str | None = field(
        default=None, metadata={"help": "Vision tower to start from: a backbone, or a CLIP-like model."}
    )
    text_model: str | None = field(default=None, metadata={"help": "The LLM, best a result of stage 1."})
    clip_text_model: str | None = field(
        default=None,
        metadata={"help": "CLIP whose text encoder is trained beside the LLM, with `integration` other than replace."},
    )
    data: str | None = field(
        default=None,
        metadata={"help": "Images with captions: a folder, a parquet, jsonl or csv file, or a Hub data set."},
    )
    shards: list[str] | None = field(
        default=None, metadata={"help": "Tar or parquet shards to stream instead, with braces and wildcards."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of images or of paths."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that paths of images are relative to."})
    caption_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns with captions, each a source; found by their names if left out."}
    )
    caption_fields: list[str] | None = field(
        default=None,
        metadata={"help": "For `shards`: where each source's captions are, e.g. real=txt dense=json.long_caption."},
    )
    caption_weights: list[str] | None = field(
        default=None,
        metadata={"help": "Weight of each source, e.g. real=0.5 dense=0.5 (paper); equal if left out."},
    )
    split: str | None = field(
        default=None,
        metadata={"help": "Split of `data`, as `datasets` names them; train, or the only one, if left out."},
    )
    subset: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    key_column: str | None = field(
        default=None, metadata={"help": "Column of a unique key per image, e.g. key in parquet shards of img2dataset."}
    )
    on_bad_row: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Rows without image or caption: stop, or skip and count."}
    )
    on_bad_image: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Images that cannot be read: stop, or take another row and count."}
    )
    text_mode: Literal["stored", "online"] = field(
        default="stored",
        metadata={"help": "Captions as stored embeddings (paper), or through the LLM at every step."},
    )
    store: str | None = field(
        default=None, metadata={"help": "Folder of the embeddings; made if missing. OUTPUT_DIR/store if left out."}
    )
    store_dtype: Literal["float16", "bfloat16", "float32"] = field(
        default="float16", metadata={"help": "Type of the stored embeddings."}
    )
    max_tokens_per_batch: int = field(default=16384, metadata={"help": "Padded tokens of a batch of the LLM."})
    rows_per_shard: int = field(default=32768, metadata={"help": "Captions per file of the store."})
    test_data: str | None = field(
        default=None, metadata={"help": "Images with captions to measure retrieval on, like `data`."}
    )
    test_split: str | None = field(
        default=None,
        metadata={
            "help": "Split of `test_data`, which is `data` if left out; test, or the only one, if left out itself."
        },
    )
    template: str = field(default="auto", metadata={"help": "Chat template of the LLM: auto, none, or a template."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens per caption; 512 (paper) if left out."})
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Type of the LLM's weights; the checkpoint's own if left out."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of the LLM."})
    device: str | None = field(
        default=None, metadata={"help": "Device for embedding; that of the process if left out."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with `model`."})
    projection_dim: int = field(default=1280, metadata={"help": "Width of the joint space (paper)."})
    adapter_num_layers: int = field(default=4, metadata={"help": "Blocks of the text adaptor (paper)."})
    text_weights: Literal["external", "bundled"] = field(
        default="external", metadata={"help": "Whether the saved model names the LLM or holds it."}
    )
    crop_scale: list[float] | None = field(
        default=None,
        metadata={"help": "Smallest and largest share of the image to crop; 0.9 1.0 (paper) if left out."},
    )
    check: bool = field(
        default=False, metadata={"help": "Read data and settings, print what would run, and stop before the weights."}
    )


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status."""
    from llm2clip_hf.training import LLM2CLIPTrainingArguments

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
    check_choices(options, args)
    table, test = load_tables(options)
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    resume = claim_run("train-clip", options, args, {"pairs_per_step": pairs, **table_identity(table)}, resume)
    if options.check:
        print_plan(options, args, table, test)
        return 0
    return train_and_save(options, args, table, test, resume)


def check_choices(options: TrainClipOptions, args: "LLM2CLIPTrainingArguments") -> None:
    """Refuses options that do not go together, before anything is loaded."""
    if (options.model is None) == (options.vision_model is None):
        raise ValueError("Give either `model` (an LLM2CLIP folder) or `vision_model` with `text_model`.")
    if options.vision_model is not None and options.text_model is None:
        raise ValueError("`text_model` is missing: the LLM that the captions are embedded with.")
    if (options.clip_text_model is None) != (args.integration == "replace"):
        raise ValueError(
            f"`clip_text_model` ({options.clip_text_model}) names CLIP's own text encoder, which every `integration` "
            f"but replace ({args.integration}) needs. Give both or neither."
        )
    if options.clip_text_model is not None and options.data is None:
        raise ValueError(
            f"`integration={args.integration}` reads captions as text beside their stored embeddings, which a stream "
            "of `shards` does not offer. Give `data`."
        )
    if (options.data is None) == (options.shards is None):
        raise ValueError("Give either `data` or `shards`.")
    if args.train_text == "lora" and options.text_mode == "stored":
        raise ValueError(
            "`train_text=lora` changes the LLM, so stored embeddings would be stale. Set `text_mode=online`."
        )
    if options.shards and options.caption_fields is None and (options.text_mode == "online" or options.store is None):
        raise ValueError(
            "`shards` need `caption_fields`, which say where captions are, e.g. `real=txt dense=json.long_caption`, "
            "or a finished `store`, made with `llm2clip embed-captions --shards`."
        )
    if options.crop_scale is not None and len(options.crop_scale) != 2:
        raise ValueError(f"`crop_scale` needs two numbers, got {options.crop_scale}.")


def load_tables(options: TrainClipOptions) -> "tuple[ImageTextTable | None, ImageTextTable | None]":
    """Images with captions to train and to measure on; what both have in common is warned of."""
    from llm2clip_hf.data import find_overlap, load_image_text

    if options.shards and (options.split or options.subset):
        raise ValueError("`--split` and `--subset` are of `--data`; `--shards` name their files themselves.")
    if options.test_split and not (options.test_data or options.data):
        raise ValueError(f"`--test_split {options.test_split}` is a split of `--test_data`, which is not given.")
    settings: dict[str, Any] = {
        "image_column": options.image_column,
        "caption_columns": options.caption_columns,
        "image_root": options.image_root,
        "key_column": options.key_column,
        "subset": options.subset,
        "on_bad_row": options.on_bad_row,
    }
    table = load_image_text(options.data, split=options.split, **settings) if options.data else None
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


def print_plan(
    options: TrainClipOptions,
    args: "LLM2CLIPTrainingArguments",
    table: "ImageTextTable | None",
    test: "ImageTextTable | None",
) -> None:
    """What would run: data, steps, size of the store and of the LLM."""
    from transformers import AutoConfig

    from llm2clip_hf.training.size_estimate import describe_llm

    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if table is not None:
        steps = int(len(table) // batch * args.num_train_epochs) if args.max_steps < 1 else args.max_steps
        captions = table.captions
        print(f"train     {len(table)} images, {captions.num_captions} captions, {', '.join(captions.source_names)}")
        print(f"steps     {steps}, {batch} pairs per contrastive batch on {args.world_size} device(s)")
        if options.text_mode == "stored" and options.text_model:
            width = AutoConfig.from_pretrained(options.text_model).get_text_config().hidden_size
            size = captions.num_captions * width * (4 if options.store_dtype == "float32" else 2)
            print(f"store     {size / 2**30:,.2f} GiB at width {width} in {options.store_dtype}")
    if test is not None:
        print(f"test      {len(test)} images, {test.captions.num_captions} captions")
    if options.text_model:
        rank = 16 if args.train_text == "lora" else None
        print(describe_llm(options.text_model, lora_rank=rank, dtype=options.dtype))


def train_and_save(
    options: TrainClipOptions,
    args: "LLM2CLIPTrainingArguments",
    table: "ImageTextTable | None",
    test: "ImageTextTable | None",
    resume: Any,
) -> int:
    """Embeds what is not embedded yet, trains, measures and saves."""
    from llm2clip_hf.evaluation import evaluate_retrieval
    from llm2clip_hf.training import LLM2CLIPTrainer
    from llm2clip_hf.training.clip_evaluation import run_evaluators

    stored = options.text_mode == "stored"
    folder = options.store or str(Path(str(args.output_dir)) / "store")
    if stored:
        check_finished_stores(options, [folder] if test is None else [folder, f"{folder}-test"])
    store = open_or_embed(options, table, folder) if stored else None
    test_store = open_or_embed(options, test, f"{folder}-test") if stored and test is not None else None
    model, processor = load_model(options, with_llm=not stored)
    if store is not None:
        store.check_compatible(model)
    evaluators = {}
    if test is not None:
        test_captions = test.captions if test_store is None else test_store

        def measure(model: Any, processor: Any) -> dict[str, float]:
            length = None if test_store is not None else options.max_length
            return evaluate_retrieval(model, test.images, test_captions, processor=processor, max_length=length)

        evaluators["test"] = measure
    trainer = LLM2CLIPTrainer(
        model,
        args,
        train_dataset=training_data(options, args, table, store, processor),
        processing_class=processor,
        evaluators=evaluators,
        **collator_and_clip_text(options, model, processor),
    )
    with logs_to_stderr():
        trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    # On all processes: under FSDP2 none has the whole model, and elsewhere they share the work.
    results: dict[str, Any] = dict(run_evaluators(trainer, evaluators))
    if args.should_save:
        if options.text_weights == "bundled" and stored:
            bundle(options, str(args.output_dir))
        for name in ("image_to_text_recall@1", "text_to_image_recall@1"):
            if "test" in results:
                print(f"{name:<26}{100 * results['test'][name]:6.1f}")
        results["training"] = {"steps": trainer.state.global_step}
        write_results(args.output_dir, results)
        print(f"written   {args.output_dir}")
    return 0


def open_or_embed(options: TrainClipOptions, table: "ImageTextTable | None", folder: str) -> "CaptionEmbeddingStore":
    """The store in `folder`, made from the captions of the table if it is not complete."""
    from llm2clip_hf.data import CaptionEmbeddingStore

    from .embed_captions import embed, read_shards

    if (Path(folder) / "index.json").is_file():
        return CaptionEmbeddingStore.open(folder)
    captions, keys = (table.captions, table.keys) if table is not None else read_shards(options)
    return embed(options, str(options.text_model or options.model), captions, keys, folder)


def load_model(options: TrainClipOptions, with_llm: bool) -> tuple["LLM2CLIPModel", Any]:
    """Model and processor; the LLM's weights only where they are needed."""
    from transformers import AutoConfig, AutoModel, AutoProcessor

    from llm2clip_hf import LLM2CLIPModel, LLM2CLIPProcessor
    from llm2clip_hf.modeling import text_prefix_length

    if options.model is not None:
        trust = options.trust_remote_code
        model = AutoModel.from_pretrained(options.model, trust_remote_code=trust, load_text_model=with_llm)
        return model, AutoProcessor.from_pretrained(options.model, trust_remote_code=trust)
    vision, llm = str(options.vision_model), str(options.text_model)
    template = None if options.template == "none" else options.template
    processor = LLM2CLIPProcessor.from_vision_text_pretrained(vision, llm, text_template=template)
    sizes: dict[str, Any] = {
        "projection_dim": options.projection_dim,
        "adapter_num_layers": options.adapter_num_layers,
        "text_base_model": llm,
    }
    if with_llm:
        kwargs = {"dtype": options.dtype, "attn_implementation": options.attn_implementation}
        model = LLM2CLIPModel.from_vision_text_pretrained(
            vision,
            llm,
            text_template=template,
            text_weights=options.text_weights,
            text_model_kwargs={key: value for key, value in kwargs.items() if value is not None},
            **sizes,
        )
        return model, processor
    model = LLM2CLIPModel.from_vision_text_pretrained(
        vision,
        text_config=AutoConfig.from_pretrained(llm).get_text_config(),
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
    from llm2clip_hf.data import ImageTextStream, RandomResizedCropTransform

    scale = (0.9, 1.0) if options.crop_scale is None else (options.crop_scale[0], options.crop_scale[1])
    transform = RandomResizedCropTransform.from_image_processor(processor.image_processor, scale=scale)
    weights = named_values(options.caption_weights, "caption_weights")
    settings: dict[str, Any] = {
        "transform": transform,
        "caption_weights": weights and {source: float(weight) for source, weight in weights.items()},
        "seed": args.seed,
        "on_bad_image": options.on_bad_image,
    }
    if table is not None:
        return table.dataset(store=store, with_text=options.clip_text_model is not None, **settings)
    fields = named_values(options.caption_fields, "caption_fields") if store is None else None
    settings |= {"image_column": options.image_column, "key_column": options.key_column}
    return ImageTextStream(options.shards, fields, store=store, on_bad_sample=options.on_bad_row, **settings)


def collator_and_clip_text(options: TrainClipOptions, model: "LLM2CLIPModel", processor: Any) -> dict[str, Any]:
    """The collator, and CLIP's own text encoder where it is trained too, as arguments of the trainer."""
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    from llm2clip_hf.data import ImageTextCollator
    from llm2clip_hf.training import ClipTextCollator

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


def bundle(options: TrainClipOptions, folder: str) -> None:
    """
    Puts the LLM into a saved model that only names it.

    The new files are written beside and flushed to disk before they take the place of the old ones, which takes no
    longer than to rename them. Meanwhile there is no config, so that the folder never passes for a finished model.
    """
    from llm2clip_hf import LLM2CLIPModel
    from llm2clip_hf.training.checkpoints import UNFINISHED, publish_folder

    kwargs = {} if options.dtype is None else {"dtype": options.dtype}
    model = LLM2CLIPModel.from_pretrained(folder, text_model_kwargs=kwargs)
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
    (target / "config.json").unlink()
    if not (complete / "model.safetensors").exists():
        (target / "model.safetensors").unlink()  # would be read in place of several files
    for file in sorted(complete.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, target / file.name)
    complete.rmdir()
