# SPDX-License-Identifier: Apache-2.0
"""`llm2clip demo`: a miniature of both stages on real images, in minutes on a CPU."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .options import VerbParser


EXAMPLES = """\
  llm2clip demo
  llm2clip demo --fast --output-dir quick
  llm2clip demo --seed 1 --split validation --output-dir seed1
  llm2clip demo --app
  llm2clip demo --app --model openai/clip-vit-base-patch32 --images photos --captions captions.txt"""

# What a run writes into its folder, and replaces when it runs again.
_WRITTEN = {"stages", "model", ".model.tmp", "metrics.json", "retrieval.png"}


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status."""
    parser = VerbParser(
        "demo",
        usage="[options]",
        description="Train a miniature LLM2CLIP end to end on a CPU, without any download: a small Llama learns from "
        "text, stage 1 tunes it on captions, stage 2 trains a ViT with it on few image-caption pairs. Prints a table "
        "and writes metrics.json, retrieval.png and the folder `model`, which AutoModel loads.",
        examples=EXAMPLES,
    )
    parser.add_argument("--output-dir", default="demo_output", help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and training (default: %(default)s)")
    parser.add_argument(
        "--fast", action="store_true", help="a run of under a minute through the same code; its models learn little"
    )
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="scenes to measure on; choose settings on `validation` (default: %(default)s)",
    )
    app = parser.add_argument_group("search app", "A page in the browser, instead of a run: sentences find images.")
    app.add_argument("--app", action="store_true", help="search the demo's scenes with the model in --output-dir")
    app.add_argument("--model", help="another model for --app: folder or repository, LLM2CLIP, CLIP or SigLIP")
    app.add_argument("--images", help="folder of images for --app, instead of the demo's scenes")
    app.add_argument("--captions", help="text file for --app, one caption per line")
    app.add_argument("--host", default="127.0.0.1", help="address for --app to listen on (default: %(default)s)")
    app.add_argument("--port", type=int, default=7860, help="port for --app (default: %(default)s)")
    app.add_argument("--trust-remote-code", action="store_true", help="run code that the repository of --model brings")
    arguments = parser.parse_args(list(argv))
    if arguments.app:
        return run_app(arguments)
    for name in ("model", "images", "captions", "trust_remote_code"):
        if getattr(arguments, name):
            parser.error(f"--{name.replace('_', '-')} belongs to --app")
    check_output(Path(arguments.output_dir))

    from ..demo import FAST, FULL, run_demo

    run_demo(
        arguments.output_dir, seed=arguments.seed, settings=FAST if arguments.fast else FULL, split=arguments.split
    )
    return 0


def check_output(folder: Path) -> None:
    """Refuses a folder with files that no run of the demo has written: a run replaces `model` and `stages`."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--output-dir` `{folder}` is a file. Give a folder.")
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    interrupted = "stages" in found and found <= _WRITTEN
    if found and not interrupted and not _is_record(folder / "metrics.json"):
        other = min(found - _WRITTEN or found)
        raise ValueError(
            f"`--output-dir` `{folder}` holds other files, such as {other!r}. Give a new or empty folder."
        )


def _is_record(path: Path) -> bool:
    """Whether `path` is the `metrics.json` of a run."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"split", "settings", "caption_retrieval_accuracy"} <= record.keys()


def run_app(arguments: argparse.Namespace) -> int:
    """Serves the search page until it is interrupted."""
    from ..demo.app import import_gradio, launch_app, load_index

    import_gradio()  # if it is missing, say so before the work
    index = load_index(
        arguments.model,
        arguments.images,
        arguments.captions,
        demo_dir=arguments.output_dir,
        trust_remote_code=arguments.trust_remote_code,
    )
    launch_app(index, host=arguments.host, port=arguments.port)
    return 0
