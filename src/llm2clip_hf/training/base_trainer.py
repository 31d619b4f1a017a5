# SPDX-License-Identifier: Apache-2.0
"""What all trainers share: checks, callbacks, checkpoints that appear whole, pushing, and the stop at NaN."""

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import MISSING
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments, enable_full_determinism, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy, rotate_checkpoints
from transformers.utils.hub import PushInProgress

from ..distributed import world_size
from ..files import REPLACED, UNFINISHED, publish_folder, write_json_atomically
from ..hub.card_facts import ARGUMENTS_FILE, STATE_FILE
from ..hub.cards import CARD_FILE
from ..hub.publishing import link_files, stated_license
from ..modeling.loading_llm2clip import create_repository, existing_card, hub_errors
from .publishing import push_copy, push_folder, pushable_files


def gpu_supports_bf16() -> bool:
    """
    Whether there is a GPU whose hardware computes in bfloat16: NVIDIA from compute capability 8 on, and AMD.

    Older ones, such as T4 and V100, emulate it, which is slower than float32.
    """
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


class EpochCallback(TrainerCallback):
    """Tells a dataset that draws anew each epoch (`set_epoch`) which epoch begins; a resumed one included."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called before the loader of the epoch is read, and before its workers start."""
        self.dataset.set_epoch(int(state.epoch or 0))


def seed_run(args: TrainingArguments) -> None:
    """
    Seeds all random generators, on all processes alike, as `Trainer` does.

    `Trainer` is made of a finished model, so whoever builds one (LoRA, an adaptor, a projection) seeds before that.
    """
    if args.full_determinism:
        enable_full_determinism(args.seed)
    else:
        set_seed(args.seed)


def check_float32_weights(model: nn.Module, learning_rate: float, remedy: str) -> None:
    """
    Checks that no trained weight is in half precision, in which updates of the size of a learning rate are rounded
    away; frozen weights may be.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    half = [(name, p.dtype) for name, p in trained if p.is_floating_point() and p.dtype.itemsize < 4]
    if half:
        name, dtype = half[0]
        raise ValueError(
            f"{len(half)} trained parameters are in half precision, first `{name}` in {dtype}; at a learning rate of "
            f"{learning_rate:g} their updates would be rounded away. {remedy}; `bf16=True` computes in bfloat16 all "
            "the same."
        )


def check_whole_weights(trainer: Any) -> None:
    """
    Checks that every process holds all weights, which merging LoRA, evaluators and the recomputation of mini-batches
    take for granted, and a batch of its own.
    """
    check_data_parallel(trainer)
    deepspeed = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled:
        found = "FSDP"
    elif deepspeed is not None and deepspeed.zero_stage == 3:
        found = "stage 3 of DeepSpeed"
    else:
        return
    raise ValueError(
        f"{found} spreads the weights of the LLM over processes, and {type(trainer).__name__} could not save them. "
        "Start it with DistributedDataParallel: `accelerate launch --multi_gpu`, or a configuration without FSDP. An "
        "LLM that is too large for one GPU is trained with LoRA on `quantization='4bit'` (see "
        "`build_caption_encoder`)."
    )


def describe_divergence(model: nn.Module) -> str:
    """What weights that are not finite say about a run, in sentences; nothing where all are finite."""
    broken = {n: p for n, p in model.named_parameters() if p.is_floating_point() and not _own_part(p).isfinite().all()}
    if not broken:
        return ""
    trained = [name for name, parameter in broken.items() if parameter.requires_grad]
    if not trained:
        return (
            f"{len(broken)} frozen parameters are not finite, first `{next(iter(broken))}`, as they were loaded. Load "
            "the model from other weights, or with `dtype=torch.float32`."
        )
    return (
        f"{len(trained)} trained parameters are not finite, first `{trained[0]}`: the run has diverged, whatever the "
        "data. Lower `learning_rate`, and resume from a checkpoint of before or begin anew."
    )


def largest_weight(model: nn.Module) -> str:
    """The largest absolute value of a trained weight and where it is, for messages."""
    sizes = {
        n: float(_own_part(p).detach().abs().max())
        for n, p in model.named_parameters()
        if p.requires_grad and _own_part(p).numel()
    }
    name = max(sizes, key=sizes.__getitem__)
    return f"{sizes[name]:.1e} in `{name}`"


def _own_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter; the loss may be finite on others, which take no part in the search."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


# Arguments of `Trainer` that change how it makes what our trainers are given, or make themselves.
UNUSED_ARGUMENTS = {
    "model_init": "The trainer prepares one given model, so there is neither `model_init` nor "
    "`hyperparameter_search`. Make a trainer for each set of hyperparameters",
    "compute_loss_func": "The trainer computes its own loss. Override `compute_loss` in a subclass",
}
# Options of evaluation that say what `compute_metrics` gets.
_METRIC_OPTIONS = ("eval_do_concat_batches", "batch_eval_metrics", "include_for_metrics")


def refuse_arguments(given: Mapping[str, Any], unused: Mapping[str, str] = UNUSED_ARGUMENTS) -> None:
    """Refuses keyword arguments that a trainer would pass over."""
    for name, reason in unused.items():
        if given.get(name) is not None:
            raise ValueError(f"`{name}` has no effect here. {reason}, and leave `{name}` out.")


def refuse_options(args: Any, unused: Mapping[str, str]) -> None:
    """Refuses training arguments that a trainer would pass over."""
    for name, reason in unused.items():
        field = type(args).__dataclass_fields__.get(name)
        if field is None:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(args, name)
        if value != default:
            raise ValueError(
                f"`{name}` is {value!r}, which has no effect on `{type(args).__name__}`: {reason}. Leave it out."
            )


def check_metric_options(args: Any, compute_metrics: Any) -> None:
    """Checks that options of the evaluation and the metrics that they are for go together."""
    if compute_metrics is None:
        refuse_options(args, dict.fromkeys(_METRIC_OPTIONS, "it says what `compute_metrics` gets, and none is given"))
    elif args.prediction_loss_only:
        raise ValueError(
            "`compute_metrics` has no effect with `prediction_loss_only=True`. Set `prediction_loss_only=False`, or "
            "leave `compute_metrics` out."
        )


def check_data_parallel(trainer: Any) -> None:
    """
    Checks that every process has a batch of its own, as losses over the batches of all processes take for granted.
    """
    plan = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        size = getattr(plan, name, 1)
        if size > 1:
            raise ValueError(
                f"`{name}` of `parallelism_config` is {size}, which gives several processes the same batch, "
                f"and {type(trainer).__name__} would take its rows for negatives of one another. Use data parallelism "
                "only."
            )


def check_one_device(args: Any) -> None:
    """Checks that a process trains on one device, and that processes that were started together train together."""
    if world_size() != args.world_size:
        raise ValueError(
            f"{world_size()} processes were started, but on this machine each of them would train by itself and write "
            "the same files. Set `use_cpu=True` (`--use_cpu True`) to train on the CPU, or start one process."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would split the batch and its negatives. Start "
            "with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one of them."
        )


def check_settings(args: Any) -> None:
    """
    Checks what a `Trainer` finds out only when it is made or begins: one device per process, what a run reports to,
    its optimizer, its precision, and the right to push.
    """
    check_one_device(args)
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("`--fp16` needs a GPU, and training runs on the CPU. Leave it out.")
    for option in ("report_to", "optim", "push_to_hub"):
        try:
            if option == "report_to":
                for callback in get_reporting_integration_callbacks(args.report_to):
                    callback()
            elif option == "optim":
                Trainer.get_optimizer_cls_and_kwargs(args)
            elif args.push_to_hub:
                HfApi(token=args.hub_token).whoami()
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            value = getattr(args, option)
            given = " ".join(map(str, value)) if isinstance(value, list) else getattr(value, "value", value)
            raise ValueError(f"`--{option} {given}` cannot be used: {error}") from error


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
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        token, revision = token if token is not None else self.args.hub_token, revision or self.args.hub_revision
        with hub_errors(str(self.hub_model_id), token):
            old = existing_card(str(self.hub_model_id), revision, token)
        where = f"`{CARD_FILE}` in {self.hub_model_id!r}"
        self.create_model_card(**{"license": stated_license(old, where), **kwargs})
        folder = str(self.args.output_dir)
        push = partial(push_folder, str(self.hub_model_id), folder, str(commit_message), token, revision)
        return push() if blocking else HfApi().run_as_future(push)

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
