# SPDX-License-Identifier: Apache-2.0
"""`llm2clip demo`: a miniature of both stages on real images, in minutes on a CPU."""

import argparse
from collections.abc import Sequence


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="llm2clip demo",
        description="Train a miniature LLM2CLIP end to end on a CPU, without any download: a small Llama learns from "
        "text, stage 1 tunes it on captions, stage 2 trains a ViT with it on few image-caption pairs. Prints a table "
        "and writes metrics.json, retrieval.png and the folder `model`, which AutoModel loads.",
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
    arguments = parser.parse_args(list(argv))

    from llm2clip_hf.demo import FAST, FULL, run_demo

    run_demo(
        arguments.output_dir, seed=arguments.seed, settings=FAST if arguments.fast else FULL, split=arguments.split
    )
    return 0
