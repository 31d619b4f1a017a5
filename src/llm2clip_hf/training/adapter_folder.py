# SPDX-License-Identifier: Apache-2.0
"""A caption encoder saved as adapters only: megabytes that name their LLM, with the settings an embedding needs."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .adapters import ADAPTER_WEIGHTS, add_lora, base_state, has_adapters, load_adapter_weights
from .encoder_files import ADAPTER_CONFIG, ENCODER_SETTINGS
from .quantization import quantization_label


_FIELDS = ("base_model", "base_revision", "is_causal", "template", "pooling", "max_length", "normalize", "hidden_size")
# How PEFT names the weights of a wrapped model in a file.
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter-only caption encoder, found and not yet loaded: its settings and where its files are."""

    settings: dict[str, Any]
    config_file: Path
    weights_file: Path

    def check_base(self, llm: PreTrainedModel) -> None:
        """
        Checks that an LLM is the one that the adapters were trained on.

        Raises:
            ValueError: if its width or its weights are others.
        """
        name, width = self.settings["base_model"], llm.config.hidden_size
        problem = ""
        if width != self.settings["hidden_size"]:
            problem = f"its width is {width}, not {self.settings['hidden_size']}"
        else:
            digests = base_digests(llm)
            # One of the two is missing where the LLM is, or was, quantised; float16 holds other values than bfloat16.
            dtypes = {str(llm.dtype), self.settings.get("base_dtype")}
            comparable = len(dtypes) == 1 or "torch.float16" not in dtypes
            shared = [key for key, value in digests.items() if comparable and value and self.settings.get(key)]
            if any(digests[key] != self.settings[key] for key in shared):
                problem = "its weights are not those that the adapters were trained on"
        if problem:
            raise ValueError(
                f"The LLM in `{llm.config._name_or_path}` is not the base {name!r} of the adapters in "
                f"`{self.config_file.parent}`: {problem}. Give the right LLM as `base_model`."
            )

    def attach(self, llm: PreTrainedModel) -> None:
        """Puts the adapters into their LLM, trainable."""
        self.check_base(llm)
        config = LoraConfig.from_pretrained(str(self.config_file.parent))
        config.inference_mode = False
        add_lora(llm, config)
        load_adapter_weights(llm, self.weights_file)


def find_adapter(name_or_path: str, revision: str | None = None) -> AdapterFolder | None:
    """
    The adapter-only encoder in a folder or repository, `None` if there is none.

    Raises:
        ValueError: if its settings are incomplete or a file of it is missing.
    """
    settings_file = _file(name_or_path, ENCODER_SETTINGS, revision)
    if settings_file is None:
        return None
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    missing = [field for field in _FIELDS if field not in settings]
    if missing:
        raise ValueError(f"`{settings_file}` has no {', '.join(map(repr, missing))}. Save the encoder again.")
    files = {name: _file(name_or_path, name, revision) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    for name, file in files.items():
        if file is None:
            raise ValueError(f"{name_or_path!r} holds `{ENCODER_SETTINGS}`, but no `{name}`. Save the encoder again.")
    config_file, weights_file = (file for file in files.values() if file is not None)
    return AdapterFolder(settings, config_file, weights_file)


def write_adapter(folder: Path, llm: PreTrainedModel, settings: dict[str, Any]) -> None:
    """
    Writes adapters, their PEFT config and the settings of the encoder.

    Args:
        folder (`Path`): An existing folder.
        llm (`PreTrainedModel`): The LLM with its adapters.
        settings (`dict`): What `caption_encoder.json` says, without the base's width and digests.

    Raises:
        ValueError: if the LLM has no adapters.
    """
    if not has_adapters(llm):
        raise ValueError("The encoder has no adapters to save. Save all of it with `save_pretrained`.")
    name = llm.active_adapters()[0]
    state = get_peft_model_state_dict(llm, adapter_name=name)
    save_file(
        {f"{_PREFIX}{key}": value.detach().cpu().contiguous() for key, value in state.items()},
        folder / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )
    config: Any = llm.peft_config[name]
    config.base_model_name_or_path, config.revision = settings["base_model"], settings["base_revision"]
    config.save_pretrained(str(folder))
    base = {"hidden_size": llm.config.hidden_size, "base_dtype": str(llm.dtype), **base_digests(llm)}
    content = {**settings, **base}
    (folder / ENCODER_SETTINGS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def base_digests(llm: PreTrainedModel) -> dict[str, str | None]:
    """
    SHA-256 of the LLM's weights and of its token embeddings alone, adapters left out, rounded to bfloat16.

    Rounded, because an LLM may be trained in one precision and used in another. The first is `None` for a quantised
    LLM; its token embeddings are not quantised and tell the base as well as they can.
    """
    embeddings: Any = llm.get_input_embeddings()
    if isinstance(embeddings, BaseTunerLayer):
        embeddings = embeddings.get_base_layer()
    whole = None if quantization_label(llm) else _digest(base_state(llm))
    return {"base_sha256": whole, "base_embeddings_sha256": _digest({"weight": embeddings.weight})}


def _digest(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        tensor = tensor.bfloat16() if tensor.is_floating_point() else tensor
        digest.update(f"{name}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _file(name_or_path: str, file: str, revision: str | None) -> Path | None:
    found = cached_file(
        name_or_path,
        file,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
