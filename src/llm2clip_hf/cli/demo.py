# SPDX-License-Identifier: Apache-2.0
"""`llm2clip demo`: a miniature of both stages on real images, in minutes on a CPU."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .options import option, parse_options


EXAMPLES = """\
  llm2clip demo
  llm2clip demo --fast --output_dir quick
  llm2clip demo --seed 1 --split validation --output_dir seed1
  llm2clip demo --app
  llm2clip demo --app --model openai/clip-vit-base-patch32 --images photos --captions captions.txt"""

# What a run writes into its folder, and replaces when it runs again.
_WRITTEN = {"stages", "model", ".model.tmp", "metrics.json", "retrieval.png"}


@dataclass
class DemoOptions:
    output_dir: str = option("Folder to write.", "demo_output")
    seed: int = option("Seed of data and training.", 0)
    fast: bool = option("A run of under a minute through the same code; its models learn little.", False)
    split: Literal["test", "validation"] = option("Scenes to measure on; choose settings on `validation`.", "test")
    app: bool = option("Instead of a run: a page in the browser, on which sentences find the demo's scenes.", False)
    model: str | None = option("Another model for --app: folder or repository, LLM2CLIP, CLIP or SigLIP.")
    images: str | None = option("Folder of images for --app, instead of the demo's scenes.")
    captions: str | None = option("Text file for --app, one caption per line.")
    host: str = option("Address for --app to listen on.", "127.0.0.1")
    port: int = option("Port for --app.", 7860)
    trust_remote_code: bool = option("Run code that the repository of --model brings.", False)


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status."""
    (options,) = parse_options(
        argv,
        verb="demo",
        description="Train a miniature LLM2CLIP end to end on a CPU, without any download: a small Llama learns from "
        "text, stage 1 tunes it on captions, stage 2 trains a ViT with it on few image-caption pairs. Prints a table "
        "and writes metrics.json, retrieval.png and the folder `model`, which AutoModel loads.",
        examples=EXAMPLES,
        own=DemoOptions,
    )
    if options.app:
        return run_app(options)
    for name in ("model", "images", "captions", "trust_remote_code"):
        if getattr(options, name):
            print(f"llm2clip demo: error: --{name.replace('_', '-')} belongs to --app", file=sys.stderr)
            return 2
    check_output(Path(options.output_dir))
    share_cores()

    from ..demo import FAST, FULL, run_demo

    run_demo(options.output_dir, seed=options.seed, settings=FAST if options.fast else FULL, split=options.split)
    return 0


def share_cores() -> None:
    """
    As many threads as cores are idle, and no spinning; read by OpenMP when torch is imported.

    Threads wait for each other after every operation, for the last of them. On a busy core that one is late, and
    those that spin meanwhile take its core too.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(idle_cores())


def idle_cores(seconds: float = 0.5) -> int:
    """Cores that this process may use and that nobody uses now, at least one; all where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = {f"cpu{core}" for core in os.sched_getaffinity(0)}

    def idle_ticks() -> int:
        rows = [line.split() for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines()]
        return sum(int(row[4]) + int(row[5]) for row in rows if row[0] in allowed)

    try:
        start = idle_ticks()
        time.sleep(seconds)
        idle = (idle_ticks() - start) / (seconds * os.sysconf("SC_CLK_TCK"))
        limit = Path("/sys/fs/cgroup/cpu.max")  # of a container, in microseconds of processor time per period
        quota, period = limit.read_text(encoding="utf-8").split() if limit.exists() else ("max", "1")
    except (OSError, ValueError, IndexError):
        return len(allowed)
    return max(1, round(idle if quota == "max" else min(idle, int(quota) / int(period))))


def check_output(folder: Path) -> None:
    """Refuses a folder with files that no run of the demo has written: a run replaces `model` and `stages`."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--output_dir` `{folder}` is a file. Give a folder.")
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    interrupted = "stages" in found and found <= _WRITTEN
    if found and not interrupted and not _is_record(folder / "metrics.json"):
        other = min(found - _WRITTEN or found)
        raise ValueError(
            f"`--output_dir` `{folder}` holds other files, such as {other!r}. Give a new or empty folder."
        )


def _is_record(path: Path) -> bool:
    """Whether `path` is the `metrics.json` of a run."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"split", "settings", "caption_retrieval_accuracy"} <= record.keys()


def run_app(options: DemoOptions) -> int:
    """Serves the search page until it is interrupted."""
    from ..demo.app import import_gradio, launch_app, load_index

    import_gradio()  # if it is missing, say so before the work
    index = load_index(
        options.model,
        options.images,
        options.captions,
        demo_dir=options.output_dir,
        trust_remote_code=options.trust_remote_code,
    )
    launch_app(index, host=options.host, port=options.port)
    return 0
