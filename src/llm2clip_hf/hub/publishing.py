# SPDX-License-Identifier: Apache-2.0
"""Pushing to the Hub: one commit that loads elsewhere, with a card that says what it is."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from ..modeling.configuration_llm2clip import is_repository, without_local_names
from ..modeling.loading_llm2clip import read_card


# What may be pushed: no pickles (`.bin`, `.pt`, `.pth`), hence no optimizers and no training arguments either.
_SUFFIXES = {".json", ".safetensors", ".py", ".md", ".jinja", ".txt", ".model", ".png", ".jpg"}
# Folders of CLIP's own text encoder, of templates, and of the modules of sentence-transformers.
_SUBFOLDERS = re.compile(r"clip_text_model|additional_chat_templates|[0-9]+_[A-Za-z]+")
# Weights that would be loaded instead of, or beside, the new ones.
_OLD_WEIGHTS = re.compile(r"(model.*\.safetensors|pytorch_model.*\.bin)(\.index\.json)?|training_args\.bin")


def publishable_files(folder: str | Path) -> list[Path]:
    """The files of a folder that may be pushed: those that are loaded, their card and its pictures; no pickles."""
    found = list(Path(folder).iterdir())
    found += [file for path in found if path.is_dir() and _SUBFOLDERS.fullmatch(path.name) for file in path.iterdir()]
    return sorted(file for file in found if file.is_file() and file.suffix in _SUFFIXES and file.name[0] not in "._")


def stated_license(card: str | None, where: str) -> str | None:
    """The licence in the metadata of a card."""
    license = None if card is None else read_card(card, where).data.get("license")
    return license if isinstance(license, str) else None


def shown_content(file: Path) -> str | bytes:
    """The file as the Hub gets it: its name, or, for a model's config, its content without paths of this machine."""
    fields = json.loads(file.read_text(encoding="utf-8")) if file.name == "config.json" else {}
    if fields.get("model_type") != "llm2clip":
        return str(file)
    shown = without_local_names(fields)
    if not is_repository(shown.get("text_base_model")):
        shown["text_base_model"] = None
    return (json.dumps(shown, indent=2, sort_keys=True) + "\n").encode()


def commit_files(
    repo_id: str,
    folder: str | Path,
    files: Sequence[Path],
    *,
    message: str,
    description: str | None = None,
    token: Any = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """
    Pushes files in one commit, which also removes weights that would be loaded instead of the new ones.

    A model's config goes without names of folders of this machine.
    """
    names = {file.relative_to(folder).as_posix(): file for file in files}
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=shown_content(file)) for name, file in names.items()
    ]
    if any(_OLD_WEIGHTS.fullmatch(name) for name in names):
        present = HfApi().list_repo_files(repo_id, revision=revision, token=token)
        old = [name for name in present if _OLD_WEIGHTS.fullmatch(name) and name not in names]
        operations += [CommitOperationDelete(path_in_repo=name) for name in old]
    return HfApi().create_commit(
        repo_id,
        operations,
        commit_message=message,
        commit_description=description,
        token=token,
        revision=revision,
        create_pr=create_pr,
    )
