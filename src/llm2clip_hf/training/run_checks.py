# SPDX-License-Identifier: Apache-2.0
"""What is checked of a run before its first step, and said of one whose loss is not finite."""

import math
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments, enable_full_determinism, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from ..distributed import world_size


def gpu_supports_bf16() -> bool:
    """
    Whether there is a GPU whose hardware computes in bfloat16: NVIDIA from compute capability 8 on, and AMD.

    Older ones, such as T4 and V100, emulate it, which is slower than float32.
    """
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


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


def steps_of_run(args: Any, batches: int) -> int:
    """Optimizer steps of a run with so many batches per process and epoch, as `Trainer` counts them."""
    steps: int = args.max_steps
    if steps < 1:
        steps = math.ceil(args.num_train_epochs * -(-batches // args.gradient_accumulation_steps))
    if steps < 1:
        raise ValueError(
            f"`--num_train_epochs {args.num_train_epochs:g}` with `--max_steps {args.max_steps}` is no step of "
            "training. Raise one of them."
        )
    return steps
