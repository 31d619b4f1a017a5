# Copyright 2026 The llm2clip_hf authors.
# SPDX-License-Identifier: Apache-2.0
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Pushing to the Hub: one commit that loads elsewhere, with a card that says what it is."""

import inspect
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import ProcessorMixin
from transformers.utils import logging

from .card_llm2clip import card_metadata, card_sections, is_repository, merged_card, read_card, render_card
from .configuration_llm2clip import without_local_names


logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What may be pushed: no pickles (`.bin`, `.pt`, `.pth`), hence no optimizers and no training arguments either.
_SUFFIXES = {".json", ".safetensors", ".py", ".md", ".jinja", ".txt", ".model", ".png", ".jpg"}
# Folders of CLIP's own text encoder, of templates, and of the modules of sentence-transformers.
_SUBFOLDERS = re.compile(r"clip_text_model|additional_chat_templates|[0-9]+_[A-Za-z]+")
# Weights that would be loaded instead of, or beside, the new ones.
_OLD_WEIGHTS = re.compile(r"(model.*\.safetensors|pytorch_model.*\.bin)(\.index\.json)?|training_args\.bin")
_CARD_OPTIONS = ("license", "model_card", "overwrite_card", "tags")


@contextmanager
def hub_errors(repo_id: str, token: Any = None) -> Iterator[None]:
    """Turns what the Hub and the network answer into errors that say what to do."""
    if token in (None, True) and get_token() is None:
        raise PermissionError(
            f"No token to push to {repo_id!r} with. Run `hf auth login`, set HF_TOKEN, or pass `token=`; it needs the "
            "right to write."
        )
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            raise  # says what is wrong already
        cause: BaseException | None = error
        while cause is not None:
            raise_readable(cause, error, repo_id)
            cause = cause.__cause__
        raise


def raise_readable(cause: BaseException, error: Exception, repo_id: str) -> None:
    """Raises the readable form of `cause`, if it has one."""
    if isinstance(cause, OfflineModeIsEnabled):
        raise ConnectionError(
            f"Offline mode is on, so nothing can be pushed to {repo_id!r}. Unset HF_HUB_OFFLINE."
        ) from error
    if isinstance(cause, HfHubHTTPError):
        status = getattr(cause.response, "status_code", None)
        if status == 401:
            raise PermissionError(
                f"The Hub does not accept the token for {repo_id!r} (401). Make a new one with the right to write at "
                "https://huggingface.co/settings/tokens."
            ) from error
        if status == 403:
            raise PermissionError(
                f"The token may not write to {repo_id!r} (403). Push to a repository of your own or of an "
                "organisation that you may write for, or propose the change with `create_pr=True`."
            ) from error
    if type(cause).__module__.startswith(("httpx", "httpcore")):
        raise ConnectionError(
            f"The connection broke while pushing to {repo_id!r} ({error} {cause}). A push is one commit at its end: "
            "the repository holds all of it or nothing. Push again; files that arrived are not sent twice."
        ) from error


def pin_text_model(config: Any, text_model: Any = None, text_weights: str | None = None, token: Any = None) -> None:
    """
    Makes a config name its external LLM so that everybody gets the same one: repository and commit.

    The commit is that of the LLM in memory, where the Hub gave it, else the one that `text_base_revision` stands for.
    """
    name, revision = config.text_base_model, config.text_base_revision
    if (text_weights or config.text_weights) != "external" or (is_repository(name) and _is_commit(revision)):
        return
    if not is_repository(name):
        raise ValueError(
            f"The LLM is external, and `config.text_base_model` is {name!r}, which is no repository on the Hub: "
            "nobody else could load this model. Push the LLM first and set `config.text_base_model` to its "
            "repository, or push with `text_weights='bundled'`, or with `'none'` for a model of stored embeddings."
        )
    loaded = getattr(text_model, "config", None)
    commit = getattr(loaded, "_commit_hash", None) if getattr(loaded, "_name_or_path", None) == name else None
    if commit is None:
        try:
            commit = HfApi().model_info(name, revision=revision, token=token).sha
        except Exception as error:
            # Not found, not allowed or not reached: in any case the name stays without a commit.
            raise ValueError(
                f"The commit of the external LLM {name!r} at revision {revision or 'main'!r} cannot be found out: "
                f"{' '.join(str(error).split())} Set `config.text_base_revision` to its commit hash."
            ) from error
    logger.info("The external LLM %s is pinned to commit %s.", name, commit)
    config.text_base_revision = commit


def _is_commit(revision: Any) -> bool:
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


def publishable_files(folder: str | Path) -> list[Path]:
    """The files of a folder that may be pushed: those that are loaded, their card and its pictures; no pickles."""
    found = list(Path(folder).iterdir())
    found += [file for path in found if path.is_dir() and _SUBFOLDERS.fullmatch(path.name) for file in path.iterdir()]
    return sorted(file for file in found if file.is_file() and file.suffix in _SUFFIXES and file.name[0] not in "._")


def existing_card(repo_id: str, revision: str | None = None, token: Any = None) -> str | None:
    """The card of a repository, or `None` if it has none."""
    try:
        path = hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token)
    except (RemoteEntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError):
        return None
    return Path(path).read_text(encoding="utf-8")


def stated_license(card: str | None, where: str) -> str | None:
    """The licence in the metadata of a card."""
    license = None if card is None else read_card(card, where).data.get("license")
    return license if isinstance(license, str) else None


def create_repository(
    repo_id: str, private: bool | None = None, token: Any = None, revision: str | None = None, exist_ok: bool = True
) -> str:
    """Creates a repository, and a branch in it, unless they are there; returns the full name."""
    api = HfApi()
    full_name = str(api.create_repo(repo_id, private=private, token=token, exist_ok=exist_ok).repo_id)
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(full_name, branch=revision, token=token, exist_ok=True)
    return full_name


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


def take_push_options(
    kwargs: dict[str, Any], save_directory: Any, push_to_hub: Callable[..., Any]
) -> dict[str, Any] | None:
    """Takes what `save_pretrained(push_to_hub=True, ...)` is for the push out of its arguments."""
    if not kwargs.pop("push_to_hub", False):
        return None
    names = inspect.signature(push_to_hub).parameters
    for name in _CARD_OPTIONS:
        if name in kwargs and name not in names:
            raise ValueError(
                f"`{name}` is for the card of a repository, which a model brings with it, not a processor. Pass it to "
                "`push_to_hub` of the model."
            )
    options = {name: kwargs[name] for name in names if name in kwargs}
    for name in options.keys() - {"token", "max_shard_size"}:
        del kwargs[name]
    options.setdefault("repo_id", Path(save_directory).resolve().name)
    return options


class PushedModel:
    """`push_to_hub` of a model: see the method."""

    config: Any
    text_model: Any

    def push_to_hub(
        self,
        repo_id: str,
        *,
        processor: Any = None,
        license: str | None = None,
        model_card: Any = None,
        overwrite_card: bool = False,
        text_weights: str | None = None,
        commit_message: str | None = "Upload LLM2CLIP model",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> Any:
        """
        Pushes config, weights (safetensors), code and a model card to the Hub, in one commit.

        The repository loads with `AutoModel.from_pretrained(repo_id, trust_remote_code=True)` where only transformers
        is installed. An external LLM is named with its commit, which also becomes `config.text_base_revision`.

        A card that is there already and that somebody wrote or edited keeps its text; missing metadata are added. A
        card that this method wrote and nobody edited is rendered again.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                "The model carries adapters of `add_adapter`, and a repository gets whole models. Merge them, with "
                "`llm2clip_hf.training.merge_lora(model)`, or save them and upload that folder with `huggingface_hub`."
            )
        with hub_errors(repo_id, token), tempfile.TemporaryDirectory() as folder:
            # Whatever can fail here fails before anything is made on the Hub.
            pin_text_model(self.config, self.text_model, text_weights, token)
            with self._shown_config(text_weights):
                if processor is not None:
                    processor.save_pretrained(folder)
                model: Any = self
                model.save_pretrained(folder, text_weights=text_weights, max_shard_size=max_shard_size)
                repo_id = create_repository(repo_id, private, token, None if create_pr else revision)
                old = existing_card(repo_id, revision, token)
                where = f"`{CARD_FILE}` in {repo_id!r}"
                license = license or stated_license(None if overwrite_card else old, where)
                card = str(self._card(repo_id, license, tags) if model_card is None else model_card)
            if old is not None and not overwrite_card:
                card = merged_card(old, card, where)
            (Path(folder) / CARD_FILE).write_text(card, encoding="utf-8")
            return commit_files(
                repo_id,
                folder,
                publishable_files(folder),
                message=commit_message or "Upload LLM2CLIP model",
                description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def _card(self, repo_id: str, license: str | None, tags: list[str] | None) -> str:
        metadata = card_metadata(self.config, license)
        metadata["tags"] = [*metadata["tags"], *(tags or [])]
        return render_card(repo_id.split("/")[-1], metadata, card_sections(self.config, repo_id, license))

    @contextmanager
    def _shown_config(self, text_weights: str | None) -> Iterator[None]:
        """The config as the Hub gets it: where the LLM is from, but not where it lies on this machine."""
        config = self.config
        restore = config.text_weights, config.text_base_model
        config.text_weights = text_weights or config.text_weights
        if not is_repository(config.text_base_model):
            config.text_base_model = None
        try:
            yield
        finally:
            config.text_weights, config.text_base_model = restore


class PushedProcessor(ProcessorMixin):  # type: ignore[misc]
    """`push_to_hub` of a processor: its files only, since the card of a repository is its model's."""

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = "Upload LLM2CLIP processor",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Pushes image processor, tokenizer and code to the Hub, in one commit; the card stays as it is."""
        with hub_errors(repo_id, token), tempfile.TemporaryDirectory() as folder:
            processor: Any = self
            processor.save_pretrained(folder)
            repo_id = create_repository(repo_id, private, token, None if create_pr else revision)
            return commit_files(
                repo_id,
                folder,
                publishable_files(folder),
                message=commit_message or "Upload LLM2CLIP processor",
                description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )
