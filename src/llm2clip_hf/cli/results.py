# SPDX-License-Identifier: Apache-2.0
"""What the training verbs share: where to resume, what not to overwrite, and the record of a run."""

import contextlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


RESULTS_FILE = "results.json"


def logs_to_stderr() -> contextlib.AbstractContextManager[Any]:
    """What is printed meanwhile, such as the logs of a trainer, goes to standard error: the result stands alone."""
    return contextlib.redirect_stdout(sys.stderr)


def resume_point(args: Any) -> Any:
    """The checkpoint to resume from: `last` of the output folder, a path, or none."""
    given = args.resume_from_checkpoint
    if given in (None, "", "none", "false", "False"):
        return None
    if given not in ("last", "true", "True", "auto"):
        return given
    from transformers.trainer_utils import get_last_checkpoint

    folder = str(args.output_dir)
    checkpoint = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    if checkpoint is None and given != "auto":
        raise ValueError(f"`{folder}` holds no checkpoint to resume from. Leave `--resume_from_checkpoint` out.")
    return checkpoint


def refuse_finished(output_dir: Any, marker: str, resume: Any) -> None:
    """Refuses to write over a finished model; a folder to resume in is none."""
    if resume is None and (Path(str(output_dir)) / marker).exists():
        raise ValueError(
            f"`{output_dir}` already holds a finished model. Choose another `--output_dir`, or delete the folder."
        )


def write_results(output_dir: Any, results: Mapping[str, Any]) -> Path:
    """Writes `results.json`: the results, the command, and the versions that gave them."""
    import torch
    import transformers

    from llm2clip_hf.data.atomic import write_json_atomically
    from llm2clip_hf.version import __version__

    record = {
        **results,
        "command": shlex.join(["llm2clip", *sys.argv[1:]]),
        "versions": {
            "llm2clip_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    path = Path(str(output_dir)) / RESULTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path, json.loads(json.dumps(record, default=str)))
    return path
