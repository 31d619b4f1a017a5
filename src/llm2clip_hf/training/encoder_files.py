# SPDX-License-Identifier: Apache-2.0
"""Folders of stage 1 that appear file by file, each whole, the one that makes them loadable last."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..modeling.loading_llm2clip import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ENCODER_SETTINGS


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
