# SPDX-License-Identifier: Apache-2.0
"""What all trainers share: callbacks, checkpoints that appear whole, pushing, and the stop at NaN."""

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy, rotate_checkpoints
from transformers.utils.hub import PushInProgress

from ..files import REPLACED, UNFINISHED, publish_folder, write_json_atomically
from ..hub.card_facts import ARGUMENTS_FILE, STATE_FILE
from ..hub.cards import CARD_FILE
from ..hub.publishing import link_files, stated_license
from ..modeling.saving_llm2clip import create_repository, existing_card, hub_errors
from .lora import ADAPTER_FOLDER, has_adapters, load_adapter_checkpoint
from .publishing import push_copy, push_folder, pushable_files
from .run_checks import describe_divergence


class EpochCallback(TrainerCallback):
    """Tells a dataset that draws anew each epoch (`set_epoch`) which epoch begins; a resumed one included."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called before the loader of the epoch is read, and before its workers start."""
        self.dataset.set_epoch(int(state.epoch or 0))


class TrainBeginCallback(TrainerCallback):
    """Calls a function when a run begins: the model is wrapped, and the loader is not read yet."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called before the first epoch; a resumed run has its step by then."""
        self.function()


# Options of `TrainingArguments` that decide what is trained; others are about speed, files, logs and this machine.
_DECISIVE = (
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps num_train_epochs max_steps "
    "per_device_train_batch_size gradient_accumulation_steps weight_decay max_grad_norm optim optim_args adam_beta1 "
    "adam_beta2 adam_epsilon label_smoothing_factor neftune_noise_alpha bf16 fp16 tf32 seed data_seed "
    "full_determinism dataloader_drop_last train_sampling_strategy"
).split()


class BaseTrainer(Trainer):
    """
    A `Trainer` whose checkpoints appear whole or not at all, whose pushes are one commit without pickles, and which
    stops before a loss or gradient that is not finite reaches the weights.

    Beside a finished model, `trainer_state.json` and `training_args.json` say how it was trained.
    """

    hub_model_id: Any
    push_in_progress: Any
    # Whether what is being saved is a checkpoint, and not the finished model.
    _is_checkpoint = False

    # ------------------------------------------------------------------------------------------- the non-finite stop

    # Losses since the last optimizer step, each with who says why it is not finite; and whether one can wait for it.
    _unchecked: tuple[tuple[torch.Tensor, Callable[[], str]], ...] = ()
    _in_step = False

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward pass of a micro-batch; its loss is looked at before the weights are updated."""
        self._in_step = not self.is_deepspeed_enabled  # whose backward pass updates the weights
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except BaseException:
            self._unchecked = ()
            raise
        finally:
            self._in_step = False
        self._unchecked += ((loss, self.nonfinite_advice),)
        return loss

    # Overridden because no callback sees the norm: an infinite one would reach the weights. It is the one place of a
    # step where the host waits for the device, with the backward pass behind it and the update before it.
    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses, self._unchecked = self._unchecked, ()
        for loss, explain in losses:
            if not math.isfinite(loss):
                raise FloatingPointError(f"The loss is {loss.item()} {self.step_name()}. {explain()}")
        # In fp16 an overflow is part of the dynamic loss scaling, which skips the step.
        if grad_norm is not None and not self.args.fp16 and not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"The gradient norm is {float(grad_norm)} {self.step_name()}. {self.nonfinite_advice()}"
            )
        return grad_norm

    def step_name(self) -> str:
        """The step that is being computed, for messages."""
        return f"at step {self.state.global_step + 1} (epoch {self.state.epoch or 0:.2f})"

    def nonfinite_advice(self) -> str:
        """How a message about a loss or gradient that is not finite ends."""
        cause = describe_divergence(self.accelerator.unwrap_model(self.model)) or "Lower `learning_rate`."
        return f"The weights are those of step {self.state.global_step}. {cause}"

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the finished model; see the class for what that is."""
        self._is_checkpoint = _internal_call
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._is_checkpoint = False
        if not _internal_call:
            self.save_record(output_dir)

    def save_record(self, output_dir: str | None = None) -> None:
        """
        Writes how the model was trained: `trainer_state.json`, with the log, and `training_args.json`, with the
        options that decide what is trained. Neither names a folder, a token or a device. Nothing is written before
        training.
        """
        if not self.args.should_save or not self.state.global_step:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        state = dataclasses.asdict(self.state) | {"trial_params": None, "stateful_callbacks": {}}
        if state["best_model_checkpoint"]:
            state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
        known = TrainingArguments.__dataclass_fields__
        own = [field.name for field in dataclasses.fields(self.args) if field.name not in known]
        options = {name: getattr(self.args, name) for name in (*_DECISIVE, *own) if hasattr(self.args, name)}
        options = {name: getattr(value, "value", value) for name, value in options.items()}
        options["world_size"] = self.args.world_size
        for name, content in ((STATE_FILE, state), (ARGUMENTS_FILE, options)):
            write_json_atomically(folder / name, json.loads(json.dumps(content, default=str)))

    @property
    def adapted_llm(self) -> Any:
        """The LLM whose adapters, where it has some, are all that a checkpoint holds of the model."""
        return None

    # Overridden because `Trainer` would write a frozen LLM, and leave out or not merge adapters.
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:  # `save_model` calls this on every process
            self.write_model(Path(output_dir or str(self.args.output_dir)), state_dict)

    def write_model(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """Writes the finished model or, in a checkpoint, what `read_model` needs of it."""
        if not self._is_checkpoint or not has_adapters(self.adapted_llm):
            super()._save(str(folder), state_dict)
            return
        self.adapted_llm.save_pretrained(folder / ADAPTER_FOLDER)
        cast(Any, self.processing_class).save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    # Overridden because `Trainer` only warns of weights that are missing.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.read_model(resume_from_checkpoint)

    def read_model(self, checkpoint: str) -> None:
        """Loads what `write_model` wrote into a checkpoint."""
        if has_adapters(self.adapted_llm):
            load_adapter_checkpoint(self.adapted_llm, checkpoint)
        else:
            super()._load_from_checkpoint(checkpoint)

    # Overridden because `Trainer` loads the best model by other code, and goes on with the last where that fails.
    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self.read_model(str(self.state.best_model_checkpoint))

    # Overridden because `Trainer` writes into the folder that a resume would read: a kill leaves half a checkpoint.
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        target = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_dir / f"{UNFINISHED}{target.name}"
        if self.args.should_save:
            for leftover in (*run_dir.glob(f"{UNFINISHED}*"), *run_dir.glob(f"{REPLACED}*")):
                shutil.rmtree(leftover)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            self._write_checkpoint(target, staging)
        except OSError:
            # What a full disk needs most is space.
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_folder(staging, target)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self.push_checkpoint(target)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def save_position(self, folder: Path) -> None:
        """Writes into a checkpoint what a trainer needs, beyond the step, to read its data on from there."""

    def _write_checkpoint(self, target: Path, staging: Path) -> None:
        """Everything that `Trainer` puts into a checkpoint, in its order, the state of the Trainer last."""
        self.save_model(str(staging), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
            self.save_position(staging)
        if self.args.save_strategy != SaveStrategy.NO and self.state.best_global_step:
            best = target.parent / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == target or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        if not self.args.should_save:
            return
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name = type(callback).__name__
                known: Any = self.state.stateful_callbacks
                if isinstance(known[name], list):
                    known[name].append(callback.state())
                else:
                    known[name] = callback.state()
        self.state.save_to_json(str(staging / STATE_FILE))

    # --------------------------------------------------------------------------------------------------------- pushing

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
        token, revision = token if token is not None else self.args.hub_token, revision or self.args.hub_revision
        push = self.prepare_push(str(commit_message), token, revision, **kwargs)
        if push is None:
            return None
        return push() if blocking else HfApi().run_as_future(push)

    def prepare_push(
        self, message: str, token: str | None, revision: str | None, **kwargs: Any
    ) -> Callable[[], Any] | None:
        """What pushes the finished model, on the main process; called on all of them."""
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        with hub_errors(str(self.hub_model_id), token):
            old = existing_card(str(self.hub_model_id), revision, token)
        where = f"`{CARD_FILE}` in {self.hub_model_id!r}"
        self.create_model_card(**{"license": stated_license(old, where), **kwargs})
        return partial(push_folder, str(self.hub_model_id), str(self.args.output_dir), message, token, revision)

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Pushes what loads of a checkpoint while training goes on; a push that fails is logged."""
        if not self.is_world_process_zero() or HubStrategy(self.args.hub_strategy) == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # The checkpoint may be deleted, to make room for later ones, before all of it is pushed.
        copy = Path(tempfile.mkdtemp(prefix=".push-", dir=str(self.args.output_dir)))
        link_files(pushable_files(checkpoint), checkpoint, copy)
        message = f"Training in progress, step {self.state.global_step}"
        job: Future = HfApi().run_as_future(
            push_copy, str(self.hub_model_id), copy, message, self.args.hub_token, self.args.hub_revision
        )
        if busy:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress(cast(Any, [job]))
