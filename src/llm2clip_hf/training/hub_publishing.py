# SPDX-License-Identifier: Apache-2.0
"""Pushing of trained models: what loads elsewhere and a card that says how it was made, and no pickles."""

import logging
import shutil
import tempfile
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from ..hub.model_card import CARD_FILE, LLM2CLIPModelCardData
from ..modeling.card_llm2clip import is_repository, merged_card, read_card
from ..modeling.publishing_llm2clip import (
    commit_files,
    create_repository,
    existing_card,
    hub_errors,
    pin_text_model,
    publishable_files,
    stated_license,
)
from .clip_checkpoints import saved_text_weights
from .lora import LORA_FILE
from .trained_parts import has_llm


logger = logging.getLogger(__name__)


class PublishingTrainer(Trainer):
    """
    A `Trainer` that pushes what loads elsewhere: config, weights (safetensors), code, processor and card.

    Neither the training arguments nor the state of the optimizer are pushed: both are pickles. A push is one commit.
    """

    hub_model_id: Any
    push_in_progress: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Makes the repository, before training starts.

        Raises:
            ValueError: for a `hub_strategy` that pushes optimizers.
            PermissionError: without a token that may write to it.
            ConnectionError: if the Hub cannot be reached.
        """
        strategy = HubStrategy(self.args.hub_strategy)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"`hub_strategy={strategy.value!r}` pushes optimizers and training arguments, which are pickles. Use "
                "'every_save' or 'end', and resume from the checkpoints in `output_dir`."
            )
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        token = token if token is not None else self.args.hub_token
        private = private if private is not None else self.args.hub_private_repo
        with hub_errors(name, token):
            self.hub_model_id = create_repository(name, private, token, self.args.hub_revision)
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Saves the model to `args.output_dir` and pushes it to `args.hub_model_id`, in one commit.

        A card in the repository that somebody wrote keeps its text; missing metadata are added.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): First line of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Whether to wait until all is pushed.
            token (`str`, *optional*): Token to write with; `args.hub_token` or the stored one by default.
            revision (`str`, *optional*): Branch; `args.hub_revision` or `main` by default.
            private (`bool`, *optional*): Whether a new repository is private.
            kwargs: Arguments of `create_model_card`.

        Returns:
            `huggingface_hub.CommitInfo`, or a `Future` of it; `None` on other processes than the first.

        Raises:
            PermissionError: without a token that may write to the repository.
            ConnectionError: if the connection breaks; nothing has been committed then.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        token, revision = token if token is not None else self.args.hub_token, revision or self.args.hub_revision
        with hub_errors(str(self.hub_model_id), token):
            old = existing_card(str(self.hub_model_id), revision, token)
        where = f"`{CARD_FILE}` in {self.hub_model_id!r}"
        self.create_model_card(**{"license": stated_license(old, where), **kwargs})
        push = partial(self._push_folder, str(self.args.output_dir), str(commit_message), token, revision)
        return push() if blocking else HfApi().run_as_future(push)

    def _push_folder(self, folder: str, message: str, token: str | None, revision: str | None = None) -> Any:
        repo_id, revision = str(self.hub_model_id), revision or self.args.hub_revision
        files = [file for file in publishable_files(folder) if file.name != LORA_FILE]
        with hub_errors(repo_id, token), tempfile.TemporaryDirectory() as temporary:
            card = Path(folder) / CARD_FILE
            old = existing_card(repo_id, revision, token)
            if old is not None and card in files:
                text = merged_card(old, card.read_text(encoding="utf-8"), f"`{CARD_FILE}` in {repo_id!r}")
                (Path(temporary) / CARD_FILE).write_text(text, encoding="utf-8")
                for file in files:
                    if file != card:
                        _link(file, Path(temporary) / file.relative_to(folder))
                folder, files = temporary, publishable_files(temporary)
            return commit_files(repo_id, folder, files, message=message, token=token, revision=revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes what loads of a checkpoint while training goes on; a push that fails is logged."""
        if not self.is_world_process_zero() or HubStrategy(self.args.hub_strategy) == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # The checkpoint may be deleted, to make room for later ones, before all of it is pushed.
        copy = Path(tempfile.mkdtemp(prefix=".push-", dir=str(self.args.output_dir)))
        for file in publishable_files(checkpoint_folder):
            if file.name != LORA_FILE:
                _link(file, copy / file.relative_to(checkpoint_folder))
        job: Future = HfApi().run_as_future(self._push_copy, copy, self.state.global_step)
        if busy and self.push_in_progress is not None:
            self.push_in_progress.jobs.append(job)
        else:
            jobs: Any = [job]
            self.push_in_progress = PushInProgress(jobs)

    def _push_copy(self, copy: Path, step: int) -> None:
        try:
            self._push_folder(str(copy), f"Training in progress, step {step}", self.args.hub_token)
        except (OSError, RuntimeError, ValueError) as error:
            logger.warning("Step %d was not pushed to %s: %s", step, self.hub_model_id, error)
        finally:
            shutil.rmtree(copy, ignore_errors=True)


class PublishingClipTrainer(PublishingTrainer):
    """Pushing for stage 2: the LLM is named with its commit, and the card says how the model was trained."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Makes the repository, before training starts, if what will be pushed can be loaded by others.

        Raises:
            ValueError: if the external LLM is no repository or its commit is unknown, or for a `hub_strategy` that
                pushes optimizers.
            PermissionError: without a token that may write to the repository.
            ConnectionError: if the Hub cannot be reached.
        """
        core: Any = self.accelerator.unwrap_model(self.model)
        if getattr(getattr(core, "config", None), "model_type", "") == "llm2clip":
            token = token if token is not None else self.args.hub_token
            with hub_errors(str(self.args.hub_model_id or self.args.output_dir), token):
                pin_text_model(core.config, core.text_model, self._saved_text_weights(core), token)
        super().init_hf_repo(token, private)

    @staticmethod
    def _saved_text_weights(core: Any) -> str:
        """Where the LLM will be: with the model if it was trained, else in its own repository."""
        if not has_llm(core):
            return str(core.config.text_weights)
        return saved_text_weights(core)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Writes the card of the model, and its facts, into `args.output_dir`.

        A card there that somebody wrote or edited keeps its text; missing metadata are added.

        Args:
            language (`str`, *optional*): Language of the texts.
            license (`str`, *optional*): Licence of the weights; by default as of `LLM2CLIPModelCardData`.
            tags (`str` or `list[str]`, *optional*): Further tags.
            model_name (`str`, *optional*): Repository or title; `args.hub_model_id` or the folder's name by default.
            finetuned_from (`str`, *optional*): Repository of the model that training started from.
            tasks (`str` or `list[str]`, *optional*): Not used: the config says what the model does.
            dataset_tags (`str` or `list[str]`, *optional*): Repositories of the training data.
            dataset (`str` or `list[str]`, *optional*): Names of the training data, for the text.
            dataset_args (`str` or `list[str]`, *optional*): Not used.
        """
        core: Any = self.accelerator.unwrap_model(self.model)
        if getattr(getattr(core, "config", None), "model_type", "") != "llm2clip":
            super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
            return
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        # As it was saved: it says where the LLM is.
        config = type(core.config).from_pretrained(folder)
        start = [finetuned_from, config.text_base_model] if finetuned_from else []
        fields: dict[str, Any] = {
            "name": model_name or self.hub_model_id or folder.absolute().name,
            "license": license,
            "language": language,
            "tags": [tags] if isinstance(tags, str) else tags,
            "base_model": [name for name in start if is_repository(name)],
            "datasets": dataset_tags,
        }
        named = [dataset] if isinstance(dataset, str) else dataset
        if named:
            fields["training_data"] = named
        LLM2CLIPModelCardData.from_trainer(self, config, **fields).save(folder)


class PublishingEncoderTrainer(PublishingTrainer):
    """Pushing for stage 1: the finished encoder, as `CaptionEncoder.push_to_hub` does; never a checkpoint."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Pushes the encoder, LoRA merged, with its code and card to `args.hub_model_id`, in one commit.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): First line of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Whether to wait until all is pushed.
            token (`str`, *optional*): Token to write with; `args.hub_token` or the stored one by default.
            revision (`str`, *optional*): Branch; `args.hub_revision` or `main` by default.
            private (`bool`, *optional*): Whether a new repository is private.
            kwargs: Further arguments of `CaptionEncoder.push_to_hub`, such as `license`.

        Returns:
            `str`: address of the commit, or a `Future` of it; `None` on other processes than the first.

        Raises:
            PermissionError: without a token that may write to the repository.
            ConnectionError: if the connection breaks; nothing has been committed then.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        encoder: Any = self.accelerator.unwrap_model(self.model)
        push = partial(
            encoder.push_to_hub,
            str(self.hub_model_id),
            token=token if token is not None else self.args.hub_token,
            commit_message=commit_message,
            revision=revision or self.args.hub_revision,
            exist_ok=True,
            **kwargs,
        )
        return push() if blocking else HfApi().run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes nothing: a checkpoint holds adapters, which do not load by themselves."""


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
        """
        Pushes the encoder, LoRA merged, with its code and card, in one commit.

        Args:
            repo_id (`str`): Repository, `owner/name`.
            token (`str`, *optional*): Token to write with; the stored one by default.
            private (`bool`, *optional*): Whether a new repository is private.
            safe_serialization (`bool`, *optional*, defaults to `True`): Must be `True`; pickles are not written.
            commit_message (`str`, *optional*): First line of the commit.
            local_model_path (`str`, *optional*): Saved encoder to push instead, e.g. one of adapters only.
            exist_ok (`bool`, *optional*, defaults to `False`): Whether the repository may exist already.
            replace_model_card (`bool`, *optional*, defaults to `False`):
                Whether to replace a card that is there; else its text is kept and missing metadata are added.
            train_datasets (`list[str]`, *optional*): Names of the training sets, for the card.
            revision (`str`, *optional*): Branch to push to; created if it does not exist.
            create_pr (`bool`, *optional*, defaults to `False`): Whether to propose the commit instead.
            license (`str`, *optional*): Licence of the weights, e.g. that of the LLM; none is stated by default.

        Returns:
            `str`: address of the commit.

        Raises:
            ValueError: if the encoder cannot be saved, or the metadata of the card that is there are not valid.
            PermissionError: without a token that may write to the repository.
            ConnectionError: if the connection breaks; nothing has been committed then.
        """
        encoder: Any = self
        with hub_errors(repo_id, token), tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "encoder"
            if local_model_path is None:
                encoder.save(str(folder), repo_id, True, train_datasets, safe_serialization)
            else:
                for file in publishable_files(local_model_path):
                    _link(file, folder / file.relative_to(local_model_path))
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


def _link(file: Path, target: Path) -> None:
    """A second name of a file, or a copy of it where the file system has no such thing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, target)
