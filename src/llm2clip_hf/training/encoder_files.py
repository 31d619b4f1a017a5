# SPDX-License-Identifier: Apache-2.0
"""Folders of stage 1 that appear file by file, each whole, the one that makes them loadable last."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..modeling.loading_llm2clip import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ENCODER_SETTINGS
from . import caption_pooling
from .caption_pooling import CaptionPooling


# Where a checkpoint keeps adapters: beside a tokenizer, `AutoModel` would load the causal LLM with them.
ADAPTER_FOLDER = "adapter"


@contextmanager
def written_folder(target: Path, last: str) -> Iterator[Path]:
    """
    A temporary folder whose files are moved into `target` when the block ends without an error.

    Args:
        target (`Path`): Folder to write; made if needed. Weights and adapters of an earlier save are replaced.
        last (`str`): Name of the file without which the folder does not load.
    """
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        yield Path(folder)
        _move_files(Path(folder), target, last)


def _move_files(source: Path, target: Path, last: str) -> None:
    files = sorted((file for file in source.rglob("*") if file.is_file()), key=lambda f: f.name == last)
    # A shard or an adapter that is left over would be loaded with the new files.
    names = ("model.safetensors.index.json", ADAPTER_CONFIG, ADAPTER_WEIGHTS, ENCODER_SETTINGS)
    for stale in [*target.glob("model*.safetensors"), *(target / name for name in names)]:
        stale.unlink(missing_ok=True)
    for file in files:
        destination = target / file.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, destination)
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()


def point_to_local_code(path: Path) -> None:
    """Makes `modules.json` name the copy of the pooling code in the folder instead of this package."""
    modules = json.loads(path.read_text(encoding="utf-8"))
    for module in modules:
        if module["type"] == f"{CaptionPooling.__module__}.{CaptionPooling.__name__}":
            module["type"] = f"{Path(caption_pooling.__file__).stem}.{CaptionPooling.__name__}"
    path.write_text(json.dumps(modules, indent=2), encoding="utf-8")
