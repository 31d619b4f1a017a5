# SPDX-License-Identifier: Apache-2.0
"""Facts for model cards: from metrics, trainers and saved models, and checks of what the Hub takes."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import EvalResult
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..evaluation.tasks.report import metric_rows
from ..files import read_json_object
from ..modeling import LLM2CLIPConfig
from ..modeling.configuration_llm2clip import is_repository


FACTS_FILE = "model_card.json"
STATE_FILE = "trainer_state.json"
ARGUMENTS_FILE = "training_args.json"
# Options of a run that say how it was trained; others are about speed, files and logs.
_OPTIONS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "weight_decay",
    "vision_layer_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "loss_type",
    "train_vision",
    "train_text",
    "integration",
    "scale",
    "symmetric",
    "mask_false_negatives",
    "mask_probability",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
)
# Of these, 0 or less means that they are not used.
_OFF_AT_ZERO = ("max_steps", "warmup_steps", "label_smoothing_factor")
_META_LLAMA = re.compile(r"meta-llama/.*llama-?(3\.[123]|[23])(?![\d.a-z])", re.IGNORECASE)
_SLUG = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def config_fields(config: LLM2CLIPConfig, license: str | None = None) -> dict[str, Any]:
    """The fields of the front matter that a config tells."""
    base = config.text_base_model
    llama = _META_LLAMA.match(base or "") if config.text_weights == "bundled" else None
    return {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction"
        if config.text_weights == "none"
        else "zero-shot-image-classification",
        "tags": ["llm2clip"],
        "base_model": [base] if is_repository(base) else None,
        # A bundled LLM of Meta brings its licence with it.
        "license": license or (f"llama{llama[1]}" if llama else None),
    }


def check_fields(fields: Mapping[str, Any]) -> None:
    """Checks the front matter of a card."""
    for name, value in fields.items():
        if value is None:
            continue
        if name in ("license", "pipeline_tag", "library_name"):
            if not isinstance(value, str) or not _SLUG.fullmatch(value):
                raise ValueError(
                    f"`{name}` must be an identifier of the Hub such as 'apache-2.0' or 'other', in lower case, got "
                    f"{value!r}."
                )
        elif name in ("datasets", "base_model"):
            for item in value:
                _check_repository(name, item)
        elif name in ("tags", "language", "metrics"):
            items = [value] if isinstance(value, str) else value
            if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) and item for item in items):
                raise ValueError(f"`{name}` must be a string or a list of strings, got {value!r}.")
        elif not _is_plain(value):
            raise ValueError(
                f"`{name}` is {type(value).__name__}, which front matter cannot hold. Give strings, numbers, lists or "
                "dictionaries of them."
            )


def _check_repository(name: str, value: Any) -> None:
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise ValueError(
            f"`{name}` names {value!r}, which is no repository of the Hub such as 'org/name'. What is not on the Hub "
            "goes into `training_data`."
        ) from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (str, int, float))


def metric_text(value: Any) -> str:
    """A cell of a table."""
    if isinstance(value, float):
        return f"{value:.2f}" if 0.1 <= abs(value) < 1e6 or value == 0 else f"{value:.2g}"
    return str(value)


def option_rows(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of a table of options."""
    return [(f"`{name}`", f"{value:g}" if isinstance(value, float) else str(value)) for name, value in options.items()]


def run_options(args: Any, steps: int) -> dict[str, Any]:
    """The options of a training run that a card shows."""
    options: dict[str, Any] = {}
    for name in _OPTIONS:
        value = getattr(args, name, None)
        value = getattr(value, "value", value)  # of an enumeration
        if value is None or value is False or (name in _OFF_AT_ZERO and value <= 0):
            continue
        options[name] = value
    if "max_steps" in options:
        options.pop("num_train_epochs", None)  # which it overrides
    parts = [getattr(args, n, 0) for n in ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")]
    if all(parts):
        options["rows per step"] = math.prod(parts)
    return {**options, "steps": steps}


def trainer_facts(trainer: Any) -> dict[str, Any]:
    """Arguments of a card that a trainer tells: options, size of the data, last evaluation, time and hardware."""
    args, state = trainer.args, trainer.state
    facts: dict[str, Any] = {
        "hyperparameters": run_options(args, state.global_step),
        **_state_facts({"log_history": state.log_history}),
    }
    data = trainer.train_dataset
    if hasattr(data, "__len__"):
        facts["training_data"] = [f"{len(data):,} rows"]
    if facts["runtime"]:
        kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        facts["runtime"] = {"hardware": f"{args.world_size} x {kind}", **facts["runtime"]}
    return facts


def _state_facts(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the log of a training run tells: the last value of each metric of its evaluations, and its time."""
    results: dict[str, float] = {}
    runtime: dict[str, Any] = {}
    for entry in state.get("log_history", []):
        found = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
        results |= {name: value for _, name, value in metric_rows(found)}
        if "train_runtime" in entry:
            runtime["hours"] = round(entry["train_runtime"] / 3600, 4)
    return {"results": results, "runtime": runtime}


def stored_facts(root: Path) -> dict[str, Any]:
    """What lies beside a saved model: the facts of its card, else those of `trainer_state.json` and its options."""
    stored, state, arguments = (
        read_json_object(root / name, "Repair or delete it.") if (root / name).is_file() else {}
        for name in (FACTS_FILE, STATE_FILE, ARGUMENTS_FILE)
    )
    if not stored:
        stored = _state_facts(state)
        if arguments:
            stored["hyperparameters"] = run_options(SimpleNamespace(**arguments), state.get("global_step", 0))
        stored["name"] = root.resolve().name
    try:
        stored["eval_results"] = [EvalResult(**entry) for entry in stored.get("eval_results", [])]
    except (TypeError, ValueError) as error:
        raise ValueError(f"An entry of `eval_results` in `{root / FACTS_FILE}` is not valid: {error}") from error
    return stored


def encoder_facts(card_data: Any, train_datasets: Sequence[str] | None) -> dict[str, Any]:
    """What sentence-transformers noted of a run: training sets, unless given, and the metrics of each evaluator."""
    names = [str(name) for name in train_datasets or ()]
    for entry in [] if names else getattr(card_data, "train_datasets", None) or []:
        name, size = entry.get("id") or entry.get("name") or "", entry.get("size")
        if name and name != "Unnamed Dataset":
            names.append(name if entry.get("id") or not size else f"{name} ({size} rows)")
    results = {
        getattr(evaluator, "name", "") or type(evaluator).__name__: {
            key: float(value) for key, value in metrics.items() if isinstance(value, (int, float))
        }
        for evaluator, metrics in (getattr(card_data, "eval_results_dict", None) or {}).items()
    }
    return {"training_data": names, "results": results}


__all__ = [
    "ARGUMENTS_FILE",
    "FACTS_FILE",
    "STATE_FILE",
    "check_fields",
    "config_fields",
    "encoder_facts",
    "metric_text",
    "option_rows",
    "run_options",
    "stored_facts",
    "trainer_facts",
]
