# SPDX-License-Identifier: Apache-2.0
"""A caption encoder saved as adapters only: megabytes that name their LLM, with the settings an embedding needs."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ...modeling.loading_llm2clip import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ENCODER_SETTINGS,
    find_adapters,
    find_file,
)
from ...modeling.text_llm2clip import check_adapter_base, is_quantized, weights_digest
from ..lora import add_lora, base_state, has_adapters, load_adapter_weights
from . import caption_pooling
from .caption_pooling import CaptionPooling


# How PEFT names the weights of a wrapped model in a file.
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter-only caption encoder, found and not yet loaded: its settings and where its files are."""

    settings: dict[str, Any]
    config_file: Path
    weights_file: Path

    def lora(self) -> LoraConfig:
        """The config of the adapters, to train them on."""
        config = LoraConfig.from_pretrained(str(self.config_file.parent))
        config.inference_mode = False
        return config

    def check_options(self, bidirectional: bool, lora: Any) -> None:
        """Refuses arguments of `build_caption_encoder` that ask for other adapters."""
        folder = self.config_file.parent
        own = self.lora()
        given = dict(lora) if isinstance(lora, Mapping) else {}
        others = {name: value for name, value in given.items() if value != getattr(own, name, None)}
        if others or isinstance(lora, LoraConfig):
            raise ValueError(
                f"`{folder}` has adapters of its own, and `lora` asks for {others or 'a config'}. Pass "
                "`lora='default'` (no `--lora_...` option) to train them on, or `lora=None` to merge them, to save a "
                "whole LLM that new ones are trained on."
            )
        if not bidirectional and not self.settings["is_causal"]:
            raise ValueError(f"The adapters in `{folder}` were trained bidirectionally. Leave `bidirectional` out.")

    def attach(self, llm: PreTrainedModel) -> None:
        """Puts the adapters into their LLM, trainable."""
        check_adapter_base(llm, self.settings, self.config_file.parent)
        add_lora(llm, self.lora())
        load_adapter_weights(llm, self.weights_file)


class AdapterCheckpoint(dict[str, Path]):
    """Stands for the encoder in a checkpoint of adapters, which is not built to take its weights."""

    def state_dict(self) -> "AdapterCheckpoint":
        return self


def find_adapter(name_or_path: str, revision: str | None = None) -> AdapterFolder | None:
    """The adapter-only encoder in a folder or repository, `None` if there is none."""
    source = {"revision": revision}
    settings = find_adapters(name_or_path, source)
    if settings is None:
        return None
    config_file, weights_file = (find_file(name_or_path, name, source) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    assert config_file is not None and weights_file is not None, "found together"
    return AdapterFolder(settings, config_file, weights_file)


def write_adapter(folder: Path, llm: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Writes adapters, their PEFT config and the settings of the encoder."""
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


def base_digests(llm: PreTrainedModel) -> dict[str, str | None]:
    """
    SHA-256 of the LLM's weights and of its token embeddings alone, adapters left out, rounded to bfloat16.

    Rounded, because an LLM may be trained in one precision and used in another. The first is `None` for a quantised
    LLM; its token embeddings are not quantised and tell the base as well as they can.
    """
    embeddings: Any = llm.get_input_embeddings()
    if isinstance(embeddings, BaseTunerLayer):
        embeddings = embeddings.get_base_layer()
    whole = None if is_quantized(llm) else weights_digest(base_state(llm))
    return {"base_sha256": whole, "base_embeddings_sha256": weights_digest({"weight": embeddings.weight})}


# Where a checkpoint keeps adapters: beside a tokenizer, `AutoModel` would load the causal LLM with them.
ADAPTER_FOLDER = "adapter"


@contextmanager
def written_folder(target: Path, last: str) -> Iterator[Path]:
    """A temporary folder whose files are moved into `target` when the block ends without an error."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        yield Path(folder)
        _move_files(Path(folder), target, last)


def _move_files(source: Path, target: Path, last: str) -> None:
    files = sorted((file for file in source.rglob("*") if file.is_file()), key=lambda f: f.name == last)
    # A shard or an adapter that is left over would be loaded with the new files.
    names = ("model.safetensors.index.json", ADAPTER_CONFIG, ADAPTER_WEIGHTS, ENCODER_SETTINGS)
    for stale in [*target.glob("model*.safetensors"), *(target / name for name in names)]:
        stale.unlink(missing_ok=True)
    for file in files:
        destination = target / file.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, destination)
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()


def point_to_local_code(path: Path) -> None:
    """Makes `modules.json` name the copy of the pooling code in the folder instead of this package."""
    modules = json.loads(path.read_text(encoding="utf-8"))
    for module in modules:
        if module["type"] == f"{CaptionPooling.__module__}.{CaptionPooling.__name__}":
            module["type"] = f"{Path(caption_pooling.__file__).stem}.{CaptionPooling.__name__}"
    path.write_text(json.dumps(modules, indent=2), encoding="utf-8")
