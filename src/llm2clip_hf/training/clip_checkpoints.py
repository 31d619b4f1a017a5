# SPDX-License-Identifier: Apache-2.0
"""
What stage 2 saves and loads again.

A checkpoint is a folder that `AutoModel` loads: LoRA merged, the frozen LLM left out and named, CLIP's own text
encoder and the concatenated head in a folder beside. LoRA weights are kept apart as well, in `lora.safetensors`, from
which training resumes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_utils import load_state_dict as load_weights

from . import clip_text
from .adapters import has_adapters
from .checkpoints import AtomicCheckpointTrainer
from .lora import LORA_FILE, lora_layers, lora_state, merged_state
from .sharding import unsharded_class
from .trained_parts import has_llm


_TOWERS = ("vision_model", "text_model")


class ClipCheckpointTrainer(AtomicCheckpointTrainer):
    """A `Trainer` that saves and loads models as the module says."""

    processor: Any = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        core: Any = self.accelerator.unwrap_model(self.model)
        adapted, with_clip_text = has_adapters(core), hasattr(core, clip_text.NAME)
        adapters: dict[str, Any] = {}
        attached: dict[str, Any] = {}
        if (adapted or with_clip_text) and self.args.should_save:
            state_dict = core.state_dict() if state_dict is None else state_dict
            adapters = lora_state(core, state_dict)
            state_dict, attached = clip_text.split_state(merged_state(core, state_dict))
        with _as_plain_model(core):
            super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        if adapters:
            save_file({key: tensor.contiguous().cpu() for key, tensor in adapters.items()}, folder / LORA_FILE)
        if with_clip_text:
            clip_text.save_attached(folder, core, attached)
        if self.processor is not None:
            self.processor.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        core: Any = self.accelerator.unwrap_model(self.model if model is None else model)
        if self.is_fsdp_enabled or not (has_adapters(core) or hasattr(core, clip_text.NAME)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_parts(Path(resume_from_checkpoint), core)

    def _load_best_model(self) -> None:
        core: Any = self.accelerator.unwrap_model(self.model)
        has_parts = has_adapters(core) or hasattr(core, clip_text.NAME)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not has_parts:
            super()._load_best_model()
        else:
            self._load_parts(Path(str(self.state.best_model_checkpoint)), core)

    def _load_parts(self, folder: Path, core: Any) -> None:
        """Loads a checkpoint of a model with LoRA: towers with LoRA keep their own weights, and get the adapters."""
        adapted = tuple(f"{name}." for name in _TOWERS if has_adapters(getattr(core, name, None)))
        for file in (folder / "model.safetensors", *([folder / LORA_FILE] if adapted else [])):
            if not file.is_file():
                raise ValueError(
                    f"`{file}` does not exist. Resume from a checkpoint that was saved with the same "
                    "`train_vision` and `train_text`."
                )
        state = load_weights(str(folder / "model.safetensors"))
        state = {key: tensor for key, tensor in state.items() if not key.startswith(adapted or ("\0",))}
        state |= clip_text.load_attached_state(folder, core)
        if adapted:
            state |= load_file(folder / LORA_FILE)
        self._issue_warnings_after_load(core.load_state_dict(state, strict=False))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        model: Any = self.accelerator.unwrap_model(self.model)
        elsewhere = ["text_model."] if has_llm(model) and not has_adapters(model.text_model) else []
        for name in _TOWERS:
            part: Any = getattr(model, name, None)
            if has_adapters(part):
                adapters = set(lora_state(part))
                elsewhere += [f"{name}.{key}" for key in part.state_dict() if key not in adapters]
        missing = [key for key in load_result.missing_keys if not key.startswith(tuple(elsewhere))]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint does not fit the model: missing {missing[:3]}, unexpected "
                f"{load_result.unexpected_keys[:3]}. Resume with the model and options that the run was started with."
            )


def saved_text_weights(model: Any) -> str:
    """Where the LLM that an LLM2CLIP model holds will be: with it if it was trained or exchanged, else where it is."""
    if lora_layers(model.text_model):
        return "bundled"
    if not model.config.text_base_model:
        return "none"
    # Code that travelled with an older folder does not know.
    return "external" if getattr(model, "text_model_is_named", lambda: True)() else "bundled"


@contextmanager
def _as_plain_model(model: Any) -> Iterator[None]:
    """
    Makes `save_pretrained` name a frozen LLM instead of writing it, bundle one that was trained, take towers with LoRA
    for plain ones, whose merged weights it is given, and a model under FSDP2 for one of its own class, whose code is
    saved with it.
    """
    sharded_class = type(model)
    model.__class__ = unsharded_class(model)
    towers: list[Any] = [tower for tower in (getattr(model, name, None) for name in _TOWERS) if has_adapters(tower)]
    towers.append(model)  # `add_adapter` of the whole model
    flags = [getattr(tower, "_hf_peft_config_loaded", False) for tower in towers]
    config: Any = getattr(model, "config", None)
    conversions = getattr(model, "_weight_conversions", None)
    if flags[-1]:  # `load_adapter` left those of the adapters' names
        model._weight_conversions = None
    text_weights = getattr(config, "text_weights", None)
    if has_llm(model):
        config.text_weights = saved_text_weights(model)
    for tower in towers:
        tower._hf_peft_config_loaded = False
    try:
        yield
    finally:
        model.__class__ = sharded_class
        for tower, flag in zip(towers, flags):
            tower._hf_peft_config_loaded = flag
        if flags[-1]:
            model._weight_conversions = conversions
        if has_llm(model):
            config.text_weights = text_weights
