# SPDX-License-Identifier: Apache-2.0
"""`llm2clip evaluate`: measure a model on retrieval, zero-shot and caption tasks, beside published numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .options import Dtype, option, parse_options
from .runs import RESULTS_FILE, is_main_process, process_device, process_group, write_results


EXAMPLES = """\
  llm2clip evaluate --model llm2clip --tasks flickr30k coco --data_root benchmarks --output_dir results/llm2clip
  llm2clip evaluate --model openai/clip-vit-large-patch14-336 --tasks flickr30k coco --data_root benchmarks
  llm2clip evaluate --model llm2clip --tasks pairs.parquet "zero-shot:flowers/test.parquet?label_column=label_name"
  llm2clip evaluate --model llm2clip --tasks "cross-lingual:emoji.parquet?text_column=names&where=split:test"
  accelerate launch --num_processes 8 -m llm2clip_hf evaluate --model llm2clip --tasks coco --data_root benchmarks
  llm2clip evaluate --list_tasks
  llm2clip evaluate --show results/llm2clip"""


@dataclass
class EvaluateOptions:
    model: str | None = option("Folder or repository of an LLM2CLIP, CLIP or SigLIP model.")
    tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Names of benchmarks (see --list_tasks), KIND:PATH?SETTINGS with the kinds retrieval, "
            "cross-lingual, zero-shot, cra, composition and winoground, YAML files of tasks, or paths of images with "
            "captions."
        },
    )
    data_root: str | None = option("Folder with local copies of the benchmarks; what it lacks comes from the Hub.")
    output_dir: str | None = option("Folder for results.json and the pictures; nothing is written if left out.")
    cache_dir: str | None = option("Folder to keep embeddings in; the same model and data find them again.")
    batch_size: int = option("Images or texts per forward pass.", 64)
    device: str | None = option("Device; a GPU per process where there is one.")
    dtype: Dtype = option("Type of the weights.", "float32")
    max_length: int | None = option("Tokens per text; 512 or the tokenizer's maximum if left out.")
    text_model: str | None = option("LLM of an LLM2CLIP model, instead of the one that its config names.")
    text_embeddings: list[str] = field(
        default_factory=list,
        metadata={"help": "Stores of `llm2clip embed-captions` with exactly the tasks' captions; the LLM stays away."},
    )
    processor: str | None = option("Folder or repository of the processor, if the model has none.")
    revision: str | None = option("Revision of the model's repository.")
    trust_remote_code: bool = option("Run code that the repository brings; models of this package need none.", False)
    on_bad_row: Literal["error", "skip"] = option(
        "What to do with rows of own data that cannot be used: stop, or count.", "error"
    )
    max_images: int | None = option("Use the first so many images per task; the result is marked partial.")
    match_precision: float = option("Precision of the cosine from which on an image and a text are a match.", 0.95)
    published: bool = option("Show published numbers beside the result.", True)
    pictures: bool = option("Draw PNG files into `output_dir`.", True)
    list_tasks: bool = option("List the benchmarks and exit.", False)
    show: str | None = option("Print the tables of a folder with results, and exit.")

    def __post_init__(self) -> None:
        # A config file may give one entry where a list is meant; as a list, a string is its letters.
        for name in ("tasks", "text_embeddings"):
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) else list(value or []))


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status."""
    (options,) = parse_options(
        argv,
        verb="evaluate",
        description="Measure a model: image-text retrieval, in many languages too, zero-shot classification, and "
        "caption retrieval accuracy. Prints tables beside published numbers, and writes results.json and pictures.",
        examples=EXAMPLES,
        own=EvaluateOptions,
    )
    if options.list_tasks:
        return list_tasks()
    if options.show is not None:
        return show(options)
    if options.model is None or not options.tasks:
        raise ValueError("Give `--model` and at least one of `--tasks`. `--list_tasks` lists the benchmarks.")
    return evaluate(options)


def list_tasks() -> int:
    """Prints the benchmarks."""
    from ..evaluation.tasks.definitions import TASKS

    for name, task in TASKS.items():
        hub = f"Hub: {task.hub.repo}" if task.hub is not None else "local copy only"
        images = f"{task.num_images} images" if task.num_images else ""
        print(f"{name:<16}{task.kind:<15}{images:<15}{hub}")
    return 0


def show(options: EvaluateOptions) -> int:
    """Prints the tables of results that are on disk."""
    from pathlib import Path

    from ..evaluation import format_report
    from ..files import read_json_object

    path = Path(str(options.show))
    path = path / RESULTS_FILE if path.is_dir() else path
    record = read_json_object(path, "Give a folder that `evaluate` wrote.")
    if not all(isinstance(record.get(part), dict) for part in ("model", "tasks")):
        raise ValueError(
            f"`{path}` is no result of `llm2clip evaluate`: it has no `model` with `tasks`. The training verbs write "
            "a file of that name too; give a folder that `evaluate` wrote."
        )
    print(format_report(record, options.published))
    return 0


def evaluate(options: EvaluateOptions) -> int:
    """Measures, prints and writes; on several processes, the first one prints and writes."""
    from ..evaluation.model_loading import describe_model, load_model_and_processor
    from ..evaluation.tasks.definitions import resolve_tasks
    from ..evaluation.tasks.report import describe_hardware, format_report
    from ..evaluation.tasks.runner import evaluate_tasks
    from ..modeling.loading_llm2clip import pin_revision

    tasks = resolve_tasks(options.tasks)  # before the model, which may take minutes to load
    revision = pin_revision(options.model, {"revision": options.revision}).get("revision")
    device = process_device(options.device)
    with process_group(device):
        model, processor = load_model_and_processor(
            str(options.model),
            processor=options.processor,
            text_model=options.text_model,
            load_text_model=not options.text_embeddings,
            revision=revision,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
        )
        evaluation = evaluate_tasks(
            model,
            processor,
            tasks,
            data_root=options.data_root,
            text_embeddings=options.text_embeddings,
            batch_size=options.batch_size,
            max_length=options.max_length,
            on_bad_row=options.on_bad_row,
            max_images=options.max_images,
            device=device,
            cache_dir=options.cache_dir,
            match_precision=options.match_precision,
            show_progress=is_main_process(),
        )
    if not is_main_process():
        return 0
    record: dict[str, Any] = {
        "model": describe_model(
            model, str(options.model), revision, processor=processor, text_model=options.text_model
        ),
        "tasks": evaluation.results,
        "settings": {
            "batch_size": options.batch_size,
            "dtype": options.dtype,
            "max_length": options.max_length,
            "match_precision": options.match_precision,
            "text_model": options.text_model,
            "text_embeddings": options.text_embeddings,
        },
        "hardware": describe_hardware(device),
    }
    print(format_report(record, options.published))
    if options.output_dir is not None:
        write_outputs(options, record, evaluation)
    return 0


def write_outputs(options: EvaluateOptions, record: dict[str, Any], evaluation: Any) -> None:
    """Writes `results.json` and the pictures."""
    path = write_results(options.output_dir, record)
    print(f"\nwritten   {path}")
    if options.pictures:
        from ..evaluation.tasks.pictures import write_pictures

        for picture in write_pictures(evaluation, path.parent, str(options.model).rstrip("/").split("/")[-1]):
            print(f"written   {picture}")
