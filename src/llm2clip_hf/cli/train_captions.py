# SPDX-License-Identifier: Apache-2.0
"""`llm2clip train-captions`: stage 1, an LLM learns to tell captions apart."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .options import DataOptions, Dtype, option, parse_options
from .runs import (
    claim_run,
    is_main_process,
    last_checkpoint,
    logs_to_stderr,
    refuse_finished,
    resume_point,
    write_results,
)


if TYPE_CHECKING:
    from ..training import CaptionContrastiveTrainingArguments


EXAMPLES = """\
  llm2clip train-captions --llm meta-llama/Llama-3.2-1B-Instruct --captions captions.jsonl --output_dir llm-cc
  llm2clip train-captions --config stage1.yaml --check
  accelerate launch --num_processes 8 -m llm2clip_hf train-captions --config stage1.yaml
  llm2clip train-captions --config stage1.yaml --resume_from_checkpoint last

A file with several sources, of which every batch takes one:

  llm: meta-llama/Llama-3.2-1B-Instruct
  output_dir: llm-cc
  sources:
    cc3m: {path: cc3m.parquet, columns: [raw_caption, longSV_captions], hard_negatives: true}
    nq: {kind: pairs, path: nq.jsonl, instruction: "Given a question, retrieve passages that answer it."}
    wiki: {kind: lines, path: wikitext.txt}"""

SHOWN = (
    "output_dir learning_rate num_train_epochs max_steps per_device_train_batch_size mini_batch_size "
    "mini_batch_tokens warmup_steps scale symmetric eval_strategy eval_steps save_steps resume_from_checkpoint "
    "report_to seed"
).split()


@dataclass(kw_only=True)
class TrainCaptionsOptions(DataOptions):
    llm: str = field(metadata={"help": "Folder or repository of a decoder LLM, or of a stage-1 result to train on."})
    captions: str | None = option(
        "Captions: a jsonl, json, csv, tsv or parquet file, a folder of them, or a Hub data set."
    )
    sources: dict | None = option("In a config file, instead of `captions`: several sources by name, see the example.")
    hard_negatives: bool = option("Add a random caption of another image as a hard negative (released code).", False)
    instruction: str | None = option("Instruction before the first caption of each pair; read, not pooled.")
    test_captions: str | None = option("Captions of the images to measure caption retrieval accuracy on.")
    test_split: str | None = option(
        "Split of `test_captions`, which are `captions` if left out; test, or the only one, if left out."
    )
    num_test_images: int = option("Without `test_captions`: images at the end that are held out; 0 for none.", 1000)
    max_length: int | None = option("Longest text in tokens; 512 (paper) if left out.")
    pooling: Literal["mean", "eos", "last"] | None = option(
        "How the states become one vector; mean (paper) if left out."
    )
    lora_r: int | None = option("Rank of LoRA; 16 (paper) if left out, 0 trains all.")
    lora_alpha: int | None = option("Alpha of LoRA; 32 (paper) if left out.")
    lora_dropout: float | None = option("Dropout of LoRA; 0.05 if left out.")
    quantization: Literal["4bit", "8bit"] | None = option(
        "Load the LLM quantised, for one small GPU; saves the adapter alone."
    )
    dtype: Dtype | None = option(
        "Type of the LLM's weights; the checkpoint's own if left out, float32 with --lora_r 0."
    )
    mntp_steps: int = option("Steps of masked next token prediction before stage 1.", 0)
    adapter_only: bool = option("Save the LoRA adapter instead of a merged LLM.", False)


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status."""
    from ..training import CaptionContrastiveTrainingArguments

    options, args = parse_options(
        argv,
        verb="train-captions",
        description="Stage 1: tune an LLM with LoRA so that two captions of one image are close and captions of other "
        "images are not. Prints caption retrieval accuracy before and after, and writes a folder that AutoModel, "
        "SentenceTransformer and LLM2CLIPModel load. The defaults are the paper's.",
        examples=EXAMPLES,
        own=TrainCaptionsOptions,
        training=CaptionContrastiveTrainingArguments,
        shown=SHOWN,
    )
    resume = resume_point(args)
    refuse_finished(args.output_dir, "modules.json", resume)
    train, test, steps = prepare(options, args)
    resume = claim_run("train-captions", options, args, data_identity(options, args, train), resume)
    if options.check:
        if is_main_process():
            print_plan(options, args, train, test, steps)
        return 0
    return train_and_save(options, args, train, test, resume)


def prepare(
    options: TrainCaptionsOptions, args: "CaptionContrastiveTrainingArguments"
) -> tuple[dict[str, Any], list[list[str]], int]:
    """The sources, the captions of the test images and the number of steps, and all checks that need no weights."""
    from transformers import AutoTokenizer

    from ..data import CaptionPairDataset
    from ..training.captions.encoder import check_caption_encoder
    from ..training.captions.mntp import mask_token_id
    from ..training.captions.sources import count_steps
    from ..training.model_checks import find_model
    from ..training.run_checks import check_settings

    check_sources(options)
    check_settings(args)
    check_caption_encoder(
        options.llm,
        find_model(options.llm, "llm"),
        pooling=options.pooling,
        lora=lora_fields(options),
        quantization=options.quantization,
        **options.llm_settings(),
    )
    if options.adapter_only and options.lora_r == 0:
        raise ValueError("`--adapter_only` saves the LoRA adapter, and `--lora_r 0` trains none. Leave one out.")
    train, test = load_sources(options, args.seed)
    for source in train.values():
        source[0]  # draws a pair, as training will
    if options.mntp_steps:
        mntp_arguments(options, args)
        mask_token_id(AutoTokenizer.from_pretrained(options.llm), None)
        if not any(isinstance(source, CaptionPairDataset) for source in train.values()):
            raise ValueError("`--mntp_steps` trains on captions, and no source is of the kind `captions`.")
    evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if evaluates != "no" and not test:
        raise ValueError(
            f"`--eval_strategy {evaluates}` has nothing to measure. Give `--test_captions` or `--num_test_images`."
        )
    return train, test, count_steps(args, [len(source) for source in train.values()])


def lora_fields(options: TrainCaptionsOptions) -> dict[str, Any] | None:
    """The fields of LoRA that are given, `None` to train all weights."""
    fields = {"r": options.lora_r, "lora_alpha": options.lora_alpha, "lora_dropout": options.lora_dropout}
    return None if options.lora_r == 0 else {name: value for name, value in fields.items() if value is not None}


def check_sources(options: TrainCaptionsOptions) -> None:
    """Refuses entries of `sources` that say too little or what has no effect; `captions` become such an entry."""
    entry = {name.removeprefix("caption_"): getattr(options, name) for name in FLAGS_OF_CAPTIONS}
    own = {"captions": {"path": options.captions, **entry}}
    if options.captions is not None and options.sources is None:
        options.sources = own
    if options.sources != own:
        if options.captions is not None or options.sources is None:
            raise ValueError("Give either `captions` or, in a config file, `sources`.")
        if ignored := [name for name in FLAGS_OF_CAPTIONS if getattr(options, name)]:
            raise ValueError(f"`--{ignored[0]}` is of `--captions`; an entry of `sources` has its own.")
    for name, entry in options.sources.items():
        source_settings(name, entry, options.on_bad_row)


def load_sources(options: TrainCaptionsOptions, seed: int) -> tuple[dict[str, Any], list[list[str]]]:
    """The training sources by name, and the captions of the test images."""
    from ..data import CaptionPairDataset, find_overlap, load_captions

    check_sources(options)
    test: list[list[str]] = []
    if options.test_captions or options.test_split:
        source = options.test_captions or options.captions
        settings: dict[str, Any] = {"on_bad_row": options.on_bad_row}
        if source is None:
            raise ValueError(f"`--test_split {options.test_split}` is a split of `--test_captions`. Give them.")
        if source == options.captions:
            columns = {"columns": options.caption_columns, "image_column": options.image_column}
            settings |= {**columns, "subset": options.subset}
        table = load_captions(source, split=options.test_split, default_split="test", min_captions=2, **settings)
        test = [table[image] for image in range(len(table))]
    sources: dict[str, Any] = {}
    for name, entry in (options.sources or {}).items():
        kind, settings = source_settings(name, entry, options.on_bad_row)
        if kind != "captions":
            sources[name] = other_source(kind, settings, seed)
            continue
        pair_settings = {key: settings.pop(key) for key in PAIR_SETTINGS if key in settings}
        table = load_captions(settings.pop("path"), min_captions=2, **settings)
        if not test and options.num_test_images:
            train_images = len(table) - options.num_test_images
            if train_images < options.num_test_images:
                raise ValueError(
                    f"`{name}` has {len(table)} images, too few to hold out {options.num_test_images} of them. Lower "
                    "`num_test_images`, or give `test_captions`."
                )
            test = [table[image] for image in range(train_images, len(table))]
            table = table.select(range(train_images))
        sources[name] = CaptionPairDataset(table, seed, **pair_settings)
        if test and is_main_process():
            find_overlap(table, test).warn()
    return sources, test


FLAGS_OF_CAPTIONS = ("caption_columns", "image_column", "split", "subset", "hard_negatives", "instruction")
PAIR_SETTINGS = ("hard_negatives", "pair_sources", "instruction")
SETTINGS = {
    "captions": {"path", "columns", "image_column", "split", "subset", "on_bad_row", *PAIR_SETTINGS},
    "pairs": {"path", "columns", "split", "subset", "on_bad_row", "instruction"},
    "lines": {"path", "column", "split", "subset", "on_bad_row", "instruction", "min_characters"},
}


def source_settings(name: str, entry: Any, on_bad_row: str) -> tuple[str, dict[str, Any]]:
    """Kind and settings of one entry of `sources`, checked."""
    if not isinstance(entry, dict) or "path" not in entry:
        raise ValueError(f"Source `{name}` is {entry!r}; expected a mapping with at least `path`.")
    settings = {key: value for key, value in entry.items() if value is not None and key != "kind"}
    kind = entry.get("kind", "captions")
    if kind not in SETTINGS:
        raise ValueError(f"Source `{name}` has the kind {kind!r}; choose from {', '.join(SETTINGS)}.")
    if unknown := sorted(set(settings) - SETTINGS[kind]):
        raise ValueError(
            f"Source `{name}` of kind `{kind}` has no setting {unknown}; it has {sorted(SETTINGS[kind])}."
        )
    return kind, {"on_bad_row": on_bad_row} | settings


def other_source(kind: str, settings: dict[str, Any], seed: int) -> Any:
    """A source of text pairs, or of lines paired with themselves."""
    from ..data import DropoutPairDataset, TextPairDataset

    path = settings.pop("path")
    return TextPairDataset(path, seed=seed, **settings) if kind == "pairs" else DropoutPairDataset(path, **settings)


def data_identity(
    options: TrainCaptionsOptions, args: "CaptionContrastiveTrainingArguments", train: dict[str, Any]
) -> dict[str, Any]:
    """What is trained on, by digests, and how many pairs a batch has."""
    from ..data import CaptionPairDataset
    from ..data.store.fingerprint import files_digest

    found: dict[str, Any] = {
        "pairs_per_batch": args.per_device_train_batch_size * args.world_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
    }
    for name, entry in (options.sources or {}).items():
        path, source = Path(str(entry["path"])), train[name]
        if isinstance(source, CaptionPairDataset):
            settings = {key: entry.get(key) for key in PAIR_SETTINGS} | {"sha256": source.table.sha256}
        else:
            settings = {key: value for key, value in entry.items() if key not in ("path", "on_bad_row")}
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            settings |= {"rows": len(source), "sha256": files_digest(files, path.parent) if files else str(path)}
        found[f"source {name}"] = {key: value for key, value in settings.items() if value not in (None, False)}
    return found


def print_plan(
    options: TrainCaptionsOptions,
    args: "CaptionContrastiveTrainingArguments",
    train: dict[str, Any],
    test: list[list[str]],
    steps: int,
) -> None:
    """What would run: data, steps, size of the model."""
    from ..training.model_checks import describe_llm

    batch = args.per_device_train_batch_size * args.world_size
    for name, source in train.items():
        entry = dict((options.sources or {})[name])
        table = getattr(source, "table", None)
        columns = (
            entry.get("columns") or entry.get("column") or (table.source_names if table is not None else "by name")
        )
        print(f"source    {name}: {len(source)} rows of {entry['path']}, split {entry.get('split') or 'train'}")
        print(f"columns   {columns if isinstance(columns, str) else ', '.join(columns)}")
        print(f"pair      {source[0]}")
    print(f"test      {len(test)} images")
    if options.mntp_steps:
        print(f"mntp      {options.mntp_steps} steps before")
    print(f"steps     {steps}, {batch} pairs per step on {args.world_size} device(s)")
    dtype = weights_dtype(options)
    rank = 16 if options.lora_r is None else options.lora_r
    print(describe_llm(options.llm, lora_rank=rank, dtype=dtype, quantization=options.quantization))


def weights_dtype(options: TrainCaptionsOptions) -> str | None:
    """Type of the LLM's weights in stage 1, `None` for the checkpoint's own; weights to train are float32."""
    trains_all = options.lora_r == 0 and not options.quantization
    return "float32" if options.dtype is None and trains_all else options.dtype


def train_and_save(
    options: TrainCaptionsOptions,
    args: "CaptionContrastiveTrainingArguments",
    train: dict[str, Any],
    test: list[list[str]],
    resume: Any,
) -> int:
    """Trains, measures and saves."""
    from ..evaluation import CaptionRetrievalEvaluator
    from ..training import CaptionContrastiveTrainer, build_caption_encoder
    from ..training.run_checks import seed_run

    llm = pretrained_with_mntp(options, args, train) if options.mntp_steps else options.llm
    seed_run(args)
    encoder = build_caption_encoder(
        llm,
        max_length=options.max_length,
        pooling=options.pooling,
        lora=lora_fields(options),
        quantization=options.quantization,
        dtype=weights_dtype(options),
        **options.llm_settings(),
    )
    evaluator = CaptionRetrievalEvaluator(test, show_progress_bar=False) if test else None
    trainer = CaptionContrastiveTrainer(
        encoder,
        args,
        train_dataset=train if len(train) > 1 else next(iter(train.values())),
        evaluator=evaluator,
    )
    results: dict[str, Any] = {}
    # On all processes: none waits for another, and so none runs into a time-out.
    if evaluator is not None:
        results["before"] = evaluator(encoder)
    with logs_to_stderr():
        trainer.train(resume_from_checkpoint=resume)
    if evaluator is not None:
        results["after"] = evaluator(encoder)
    if args.should_save:
        if evaluator is not None:
            print_results(results, len(test))
        results["training"] = {"steps": trainer.state.global_step, "rows": {n: len(s) for n, s in train.items()}}
    if options.adapter_only or options.quantization:
        if args.should_save:
            encoder.save_adapter(str(args.output_dir))
        trainer.save_record()
    else:
        trainer.save_model()
    if args.should_save:
        write_results(args.output_dir, results)
        print(f"written   {args.output_dir}")
    return 0


def print_results(results: dict[str, Any], num_images: int) -> None:
    """Caption retrieval accuracy before and after, in percent."""
    print(f"\n{f'caption retrieval, {num_images} images':<36}{'before':>8}{'after':>8}")
    for key, name in (
        ("caption_retrieval_accuracy", "accuracy (CRA), both ways"),
        ("first_to_second_recall@1", "caption 1 to 2"),
        ("second_to_first_recall@1", "caption 2 to 1"),
        ("mean_recall@5", "R@5"),
        ("mean_recall@10", "R@10"),
    ):
        print(f"  {name:<34}{100 * results['before'][key]:8.1f}{100 * results['after'][key]:8.1f}")


def mntp_arguments(options: TrainCaptionsOptions, args: "CaptionContrastiveTrainingArguments") -> Any:
    """The arguments of masked next token prediction."""
    from ..training import MNTPTrainingArguments

    return MNTPTrainingArguments(
        os.path.join(str(args.output_dir), "mntp"),
        max_steps=options.mntp_steps,
        seed=args.seed,
        use_cpu=args.use_cpu,
        report_to=args.report_to,
    )


def pretrained_with_mntp(
    options: TrainCaptionsOptions, args: "CaptionContrastiveTrainingArguments", train: dict[str, Any]
) -> str:
    """The LLM after masked next token prediction on the captions; its folder."""
    from torch.utils.data import ConcatDataset

    from ..data import CaptionPairDataset
    from ..training import MNTPTrainer

    folder = Path(str(args.output_dir)) / "mntp"
    if (folder / "config.json").is_file():
        return str(folder)
    tables: Any = [source.table for source in train.values() if isinstance(source, CaptionPairDataset)]
    trainer = MNTPTrainer(
        options.llm,
        mntp_arguments(options, args),
        train_dataset=ConcatDataset(tables),
        model_kwargs=options.weights_settings(),
    )
    with logs_to_stderr():
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return str(folder)
