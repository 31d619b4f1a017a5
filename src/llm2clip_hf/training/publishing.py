# SPDX-License-Identifier: Apache-2.0
"""Pushing of trained models: what loads elsewhere and a card that says how it was made, and no pickles."""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..hub.cards import CARD_FILE, merged_card
from ..hub.publishing import commit_files, link_files, publishable_files
from ..modeling.saving_llm2clip import create_repository, existing_card, hub_errors, read_card


logger = logging.getLogger(__name__)
LORA_FILE = "lora.safetensors"  # the adapters, beside weights that have them merged


def pushable_files(folder: str | Path) -> list[Path]:
    """The files of a folder that a model loads from, without adapters, which are merged into its weights."""
    return [file for file in publishable_files(folder) if file.name != LORA_FILE]


def push_folder(repo_id: str, folder: str | Path, message: str, token: str | None, revision: str | None) -> Any:
    """Pushes what loads of a folder in one commit; a card in the repository that somebody wrote keeps its text."""
    files = pushable_files(folder)
    with hub_errors(repo_id, token), tempfile.TemporaryDirectory() as temporary:
        card = Path(folder) / CARD_FILE
        old = existing_card(repo_id, revision, token)
        if old is not None and card in files:
            text = merged_card(old, card.read_text(encoding="utf-8"), f"`{CARD_FILE}` in {repo_id!r}")
            (Path(temporary) / CARD_FILE).write_text(text, encoding="utf-8")
            link_files([file for file in files if file != card], folder, temporary)
            folder, files = temporary, publishable_files(temporary)
        return commit_files(repo_id, folder, files, message=message, token=token, revision=revision)


def push_copy(repo_id: str, copy: Path, message: str, token: str | None, revision: str | None) -> None:
    """Pushes a folder and deletes it; a push that fails is logged."""
    try:
        push_folder(repo_id, copy, message, token, revision)
    except (OSError, RuntimeError, ValueError) as error:
        logger.warning("%s was not pushed to %s: %s", message, repo_id, error)
    finally:
        shutil.rmtree(copy, ignore_errors=True)


class PublishedEncoder:
    """`push_to_hub` of a caption encoder."""

    def push_to_hub(
        self,
        repo_id: str,
        token: str | None = None,
        private: bool | None = None,
        safe_serialization: bool = True,
        commit_message: str | None = None,
        local_model_path: str | None = None,
        exist_ok: bool = False,
        replace_model_card: bool = False,
        train_datasets: list[str] | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        license: str | None = None,
    ) -> str:
        """Pushes the encoder, LoRA merged, with its code and card, in one commit."""
        encoder: Any = self
        with hub_errors(repo_id, token), tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "encoder"
            if local_model_path is None:
                encoder.save(str(folder), repo_id, True, train_datasets, safe_serialization)
            else:
                link_files(publishable_files(local_model_path), local_model_path, folder)
            branch = None if create_pr else revision
            repo_id = create_repository(repo_id, private, token, branch, exist_ok or create_pr)
            card, where = folder / CARD_FILE, f"`{CARD_FILE}` in {repo_id!r}"
            content = read_card(card.read_text(encoding="utf-8"), f"`{card}`")
            if license is not None:
                content.data["license"] = license
            old = None if replace_model_card else existing_card(repo_id, revision, token)
            text = str(content) if old is None else merged_card(old, str(content), where)
            card.unlink()  # it may be a link to a file of the user's
            card.write_text(text, encoding="utf-8")
            commit = commit_files(
                repo_id,
                folder,
                publishable_files(folder),
                message=commit_message or "Upload caption encoder",
                token=token,
                revision=revision,
                create_pr=create_pr,
            )
            return str(commit.commit_url)
