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

from ..hub.cards import CARD_FILE, merged_card
from ..hub.publishing import commit_files, publishable_files, stated_license
from ..modeling.loading_llm2clip import create_repository, existing_card, hub_errors, read_card
from .lora import LORA_FILE


logger = logging.getLogger(__name__)


class PublishingTrainer(Trainer):
    """
    A `Trainer` that pushes what loads elsewhere: config, weights (safetensors), code, processor and card.

    Neither the training arguments nor the state of the optimizer are pushed: both are pickles. A push is one commit.
    """

    hub_model_id: Any
    push_in_progress: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository, before training starts."""
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
