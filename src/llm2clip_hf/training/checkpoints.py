# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints that appear whole or not at all.

A checkpoint is written into a folder `.unfinished-checkpoint-N`, flushed to disk and renamed to `checkpoint-N` at the
end. A run that is killed or meets a full disk while it saves leaves the earlier checkpoints as they were, and
`resume_from_checkpoint=True` never picks up the half-written one.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints

from ..data.atomic import write_json_atomically
from ..hub.model_card import ARGUMENTS_FILE, STATE_FILE


UNFINISHED = ".unfinished-"
_REPLACED = ".replaced-"
# Options of `TrainingArguments` that decide what is trained; others are about speed, files, logs and this machine.
_DECISIVE = (
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps num_train_epochs max_steps "
    "per_device_train_batch_size gradient_accumulation_steps weight_decay max_grad_norm optim optim_args adam_beta1 "
    "adam_beta2 adam_epsilon label_smoothing_factor neftune_noise_alpha bf16 fp16 tf32 seed data_seed "
    "full_determinism dataloader_drop_last train_sampling_strategy"
).split()


class AtomicCheckpointTrainer(Trainer):
    """
    A `Trainer` whose checkpoints appear whole or not at all; their content is that of `Trainer`.

    Beside a finished model, `trainer_state.json` and `training_args.json` say how it was trained.
    """

    # Whether what is being saved is a checkpoint, and not the finished model.
    _is_checkpoint = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the finished model; see the class for what that is.

        Args:
            output_dir (`str`, *optional*): Folder to write, `args.output_dir` by default.
        """
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

        Args:
            output_dir (`str`, *optional*): Folder of the model, `args.output_dir` by default.
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

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        target = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_dir / f"{UNFINISHED}{target.name}"
        if self.args.should_save:
            for leftover in (*run_dir.glob(f"{UNFINISHED}*"), *run_dir.glob(f"{_REPLACED}*")):
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
            self._push_from_checkpoint(str(target))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _write_checkpoint(self, target: Path, staging: Path) -> None:
        """Everything that `Trainer` puts into a checkpoint, in its order, the state of the Trainer last."""
        self.save_model(str(staging), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
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


def publish_folder(staging: Path, target: Path) -> None:
    """
    Flushes all files of a folder to disk and renames it; an older folder of that name is replaced.

    Args:
        staging (`Path`): The finished folder.
        target (`Path`): Its final name, on the same disk.
    """
    for file in staging.rglob("*"):
        if file.is_file():
            with file.open("r+b") as opened:
                os.fsync(opened.fileno())
    if target.exists():
        replaced = target.with_name(f"{_REPLACED}{target.name}")
        os.replace(target, replaced)
        os.replace(staging, target)
        shutil.rmtree(replaced)
    else:
        os.replace(staging, target)
