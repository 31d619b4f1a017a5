# SPDX-License-Identifier: Apache-2.0
"""Which precision a device trains in."""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments, enable_full_determinism, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints

from ..files import _REPLACED, UNFINISHED, publish_folder, write_json_atomically
from ..hub.card_facts import ARGUMENTS_FILE, STATE_FILE


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


class LogitScaleClamp(TrainerCallback):
    """Keeps the logit scale in `[1, max_logit_scale]` after each optimizer step (CLIP, arXiv 2103.00020, 2.5)."""

    def __init__(self, max_logit_scale: float, deepspeed: bool = False) -> None:
        self.max_log = math.log(max_logit_scale)
        self.deepspeed = deepspeed

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called right after the optimizer's step."""
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, self.max_log)
            if self.deepspeed:
                self._clamp_copy(model.logit_scale)

    def _clamp_copy(self, parameter: torch.Tensor) -> None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        copy = safe_get_full_fp32_param(parameter)  # on all processes, each of which may hold a part
        if copy is not None:
            safe_set_full_fp32_param(parameter, copy.clamp(0.0, self.max_log))
        elif parameter.dtype != torch.float32:
            raise RuntimeError(
                f"DeepSpeed trains `logit_scale` in {parameter.dtype}, and its float32 copy, which has to be clamped, "
                "is out of reach without ZeRO. Set `zero_optimization.stage` to 1 or 2 in the DeepSpeed config."
            )


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
    """Checks that a process trains on one device."""
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


class AtomicCheckpointTrainer(Trainer):
    """
    A `Trainer` whose checkpoints appear whole or not at all; their content is that of `Trainer`.

    Beside a finished model, `trainer_state.json` and `training_args.json` say how it was trained.
    """

    # Whether what is being saved is a checkpoint, and not the finished model.
    _is_checkpoint = False

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
