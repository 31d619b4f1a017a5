# SPDX-License-Identifier: Apache-2.0
"""The command `llm2clip`: names and help of the verbs; each verb is a module that is imported when it is called."""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from ..version import __version__


# Verb: (module with `run(argv) -> int`, help line).
VERBS = {
    "demo": ("demo", "train a miniature LLM2CLIP end to end on a CPU, without any download"),
    "train-captions": ("train_captions", "stage 1: tune an LLM so that it tells captions apart"),
    "embed-captions": ("embed_captions", "embed captions once with the LLM, into a store on disk"),
    "store": ("store", "finish, check, mend, extend and describe stores of caption embeddings"),
    "train-clip": ("train_clip", "stage 2: train the vision tower with the LLM as text encoder"),
    "evaluate": ("evaluate", "measure a model on retrieval, zero-shot and caption tasks"),
    "convert": ("convert", "convert a published checkpoint to a folder that AutoModel loads"),
    "card": ("card", "write the model card of a saved model"),
}


def usage() -> str:
    """The help text of the command."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "usage: llm2clip [--help] [--version] VERB ...",
            "",
            "Train and use CLIP models with a large language model as text encoder.",
            "",
            "verbs:",
            *lines,
            "",
            "`llm2clip VERB --help` shows the options of a verb, with examples. Results go to standard output,",
            "progress and logs to standard error. The status is 0, or 1 after a failure, or 2 after wrong usage.",
            "Set LLM2CLIP_DEBUG=1 for the traceback of an error.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["--help"], ["-h"]):
        print(usage())
        return 0
    if arguments[:1] == ["--version"]:
        print(f"llm2clip {__version__}")
        return 0
    if not arguments or arguments[0] not in VERBS:
        given = "no verb given"
        if arguments:
            near = difflib.get_close_matches(arguments[0], VERBS, n=1)
            given = f"unknown verb {arguments[0]!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        print(f"llm2clip: {given}\n\n{usage()}", file=sys.stderr)
        return 2
    verb, rest = arguments[0], arguments[1:]
    try:
        module = importlib.import_module(f"llm2clip_hf.cli.{VERBS[verb][0]}")
        status = int(module.run(rest))
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # argparse: 0 after --help, 2 on wrong usage
        if isinstance(stop.code, str):
            print(f"llm2clip {verb}: {stop.code}", file=sys.stderr)
            return 1
        return stop.code or 0
    except BrokenPipeError:
        # Whoever read the output, `head` for one, has seen enough. What is still to be flushed at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"llm2clip {verb}: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        # The last stop before the user: every failure ends in one readable line and a status of 1.
        if os.environ.get("LLM2CLIP_DEBUG"):
            traceback.print_exc()
        text = " ".join(str(error).split())
        print(f"llm2clip {verb}: {type(error).__name__}: {text}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
