# SPDX-License-Identifier: Apache-2.0
"""Pushing to the Hub: which files of a folder, in one commit, without names of folders of this machine."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..modeling.configuration_llm2clip import is_repository, without_local_names
from ..modeling.saving_llm2clip import push_folder, read_card


# What may be pushed: no pickles (`.bin`, `.pt`, `.pth`), hence no optimizers and no training arguments either.
_SUFFIXES = {".json", ".safetensors", ".py", ".md", ".jinja", ".txt", ".model", ".png", ".jpg"}
# Folders of CLIP's own text encoder, of templates, and of the modules of sentence-transformers.
_SUBFOLDERS = re.compile(r"clip_text_model|additional_chat_templates|[0-9]+_[A-Za-z]+")


def publishable_files(folder: str | Path) -> list[Path]:
    """The files of a folder that may be pushed: those that are loaded, their card and its pictures; no pickles."""
    found = list(Path(folder).iterdir())
    found += [file for path in found if path.is_dir() and _SUBFOLDERS.fullmatch(path.name) for file in path.iterdir()]
    return sorted(file for file in found if file.is_file() and file.suffix in _SUFFIXES and file.name[0] not in "._")


def stated_license(card: str | None, where: str) -> str | None:
    """The licence in the metadata of a card."""
    license = None if card is None else read_card(card, where).data.get("license")
    return license if isinstance(license, str) else None


def link_files(files: Sequence[Path], source: str | Path, folder: str | Path) -> None:
    """Second names in `folder` of files in `source`, or copies where the file system has no such thing."""
    for file in files:
        target = Path(folder) / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(file)
        except OSError:
            shutil.copyfile(file, target)


def commit_files(
    repo_id: str,
    folder: str | Path,
    files: Sequence[Path],
    *,
    message: str,
    token: Any = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Pushes files in one commit, which also removes weights that would be loaded instead of the new ones."""
    # In the folder itself, on whose disk a second name costs nothing, unless it is read-only.
    place = folder if os.access(folder, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix=".push-") as temporary:
        link_files(files, folder, temporary)
        config = Path(temporary) / "config.json"
        fields = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if fields.get("model_type") == "llm2clip":
            shown = without_local_names(fields)
            if not is_repository(shown.get("text_base_model")):
                shown["text_base_model"] = None
            config.unlink()  # it is a file of the user's, too
            config.write_text(json.dumps(shown, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return push_folder(temporary, repo_id, message, None, token, revision, create_pr)
