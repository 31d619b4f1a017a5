# Copyright 2026 The llm2clip_hf authors.
# SPDX-License-Identifier: Apache-2.0
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Loading and saving of LLM2CLIP, with its LLM bundled, named or left out."""

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from .configuration_llm2clip import LLM2CLIPConfig
from .loading_llm2clip import (
    HUB_KEYWORDS,
    base_keywords,
    check_loading_info,
    external_text_kwargs,
    find_adapters,
    load_adapters,
    load_pretrained_text,
    load_pretrained_tokenizer,
    load_pretrained_vision,
    source_keywords,
)
from .modules_llm2clip import LLM2CLIPAdapterLinear, assert_bidirectional, check_text_fingerprint
from .processing_llm2clip import apply_text_template, text_end_token, text_prefix_length
from .publishing_llm2clip import PushedModel, take_push_options


logger = logging.get_logger(__name__)

ATTACH_HINT = (
    "Attach the LLM with `model.attach_text_model(AutoModel.from_pretrained(...))`, or pass stored LLM embeddings as "
    "`llm_embeds`."
)

# The pipeline of transformers takes the softmax over the labels, which is not what a sigmoid model means.
SIGMOID_PIPELINES = {
    "zero-shot-image-classification": {
        "impl": "pipeline_llm2clip.LLM2CLIPZeroShotImageClassificationPipeline",
        "pt": ["AutoModelForZeroShotImageClassification"],
    }
}
# What sentence-transformers reads beside the model's own files.
SENTENCE_FILES: dict[str, Any] = {
    "config_sentence_transformers.json": {
        "default_prompt_name": None,
        "model_type": "SentenceTransformer",
        "prompts": {},
        "similarity_fn_name": "cosine",
    },
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_llm2clip.LLM2CLIPEncoder"}],
}


class LLM2CLIPPreTrainedModel(PushedModel, PreTrainedModel):  # type: ignore[misc]
    """Base class: what transformers reads from the class, initialisation, loading and saving."""

    config: LLM2CLIPConfig
    config_class = LLM2CLIPConfig
    vision_model: Any
    visual_projection: Any
    text_model: Any
    logit_scale: Any
    logit_bias: Any
    base_model_prefix = "llm2clip"
    # Not `input_ids`: gradient checkpointing would make the embeddings of a frozen LLM require gradients.
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["LLM2CLIPAdapterBlock"]
    _keep_in_fp32_modules_strict = ["vision_model", "visual_projection", "text_adapter", "logit_scale", "logit_bias"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    _dtype_to_save: torch.dtype | None = None

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LLM2CLIPAdapterLinear):
            # As in the original: uniform in +-1/sqrt(fan_in).
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, LLM2CLIPPreTrainedModel):
            if isinstance(module.visual_projection, nn.Linear):
                init.normal_(module.visual_projection.weight, std=module.config.vision_hidden_size**-0.5)
            init.constant_(module.logit_scale, module.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, module.config.logit_bias_init_value)

    def attach_text_model(self, text_model: PreTrainedModel, text_weights: str | None = None) -> None:
        """
        Gives the model its LLM, frozen.

        Args:
            text_model (`PreTrainedModel`): A decoder without a head (`AutoModel`), in any dtype, also quantised.
            text_weights (`str`, *optional*):
                New value of `config.text_weights`, for example `"bundled"` to save the LLM with the model.

        Raises:
            ValueError: if its width is not the adaptor's, it was trained with another pooling, it does not attend
                bidirectionally, or it is not the LLM that `config.text_fingerprint` records (by sampled weights).
        """
        # The config's own checks: architecture, width of the adaptor, pooling, choice of `text_weights`.
        LLM2CLIPConfig(
            text_config=text_model.config,
            llm_hidden_size=self.config.llm_hidden_size,
            text_pooling=self.config.text_pooling,
            text_weights=text_weights,
        )
        check_text_fingerprint(text_model, self.config)
        text_model.config.is_causal = False
        assert_bidirectional(text_model)
        # The layers of the LLM hold this object, so it is the one that settings must reach.
        self.config.text_config = text_model.config
        if text_weights is not None:
            self.config.text_weights = text_weights
        self.text_model = text_model
        text_model.requires_grad_(False).eval()
        self._no_split_modules = sorted({*(self._no_split_modules or ()), *(text_model._no_split_modules or ())})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        load_text_model: bool = True,
        text_model: PreTrainedModel | None = None,
        text_model_kwargs: dict[str, Any] | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        r"""
        Loads a model, and its LLM where the model only names it.

        Args:
            pretrained_model_name_or_path (`str`): Repository or folder.
            load_text_model (`bool`, *optional*, defaults to `True`):
                Whether to load the LLM. Without it the model takes images and stored LLM embeddings.
            text_model (`PreTrainedModel`, *optional*): An LLM to attach instead of the bundled or named one.
            text_model_kwargs (`dict`, *optional*):
                Arguments for loading an external LLM, such as `quantization_config`. Those of the model that concern
                any part hold for it too, unless they are given here: `dtype`, `attn_implementation`, `device_map`,
                `token`, `cache_dir`, `local_files_only`, ..., but neither `revision` nor `trust_remote_code`.
            output_loading_info (`bool`, *optional*, defaults to `False`):
                Return also the dictionary of missing and unexpected keys instead of raising an error for them.
            kwargs: As for any transformers model.

        Returns:
            [`LLM2CLIPModel`] in evaluation mode.

        Raises:
            ValueError: if weights are missing, unexpected or (without `ignore_mismatched_sizes=True`) of another
                shape, or the LLM does not fit.
        """
        adapters, source = None, (kwargs.pop("adapter_kwargs", None) or {})
        # `AutoModel` has followed adapters to the model that they are for.
        if source.get("_adapter_model_path", pretrained_model_name_or_path) != pretrained_model_name_or_path:
            adapters = source["_adapter_model_path"]
        elif isinstance(pretrained_model_name_or_path, (str, os.PathLike)):
            source = source_keywords(kwargs)
            found = find_adapters(str(pretrained_model_name_or_path), source)
            if found is not None:
                adapters, pretrained_model_name_or_path = str(pretrained_model_name_or_path), found["base_model"]
                kwargs = base_keywords(kwargs, found)
        bundled = load_text_model and text_model is None
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, load_text_model=bundled, output_loading_info=True, **kwargs
        )
        model, info = loaded
        if not output_loading_info:
            accepted = ("mismatched_keys",) if kwargs.get("ignore_mismatched_sizes") else ()
            check_loading_info(pretrained_model_name_or_path, info, accepted)
        if text_model is None and load_text_model and model.config.text_weights == "external":
            text_kwargs = external_text_kwargs(kwargs, text_model_kwargs)
            text_model = load_pretrained_text(
                model.config.text_base_model, model.config.text_base_revision, text_kwargs
            )
        if text_model is not None:
            model.attach_text_model(text_model)
        if adapters is not None:  # now that all parts are there
            load_adapters(model, adapters, source)
        return (model, info) if output_loading_info else model

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str,
        text_model_name_or_path: str | None = None,
        *,
        text_template: str | None = "auto",
        text_model_kwargs: dict[str, Any] | None = None,
        **config_kwargs: Any,
    ) -> Any:
        r"""
        Builds an untrained model from a pretrained vision tower and a pretrained LLM.

        The projection and the adaptor are new, drawn from torch's generator: call `transformers.set_seed` before, on
        all processes alike. `LLM2CLIPProcessor.from_vision_text_pretrained` makes the processor for it from the same
        parts.

        Args:
            vision_model_name_or_path (`str`):
                Repository or folder of a vision backbone, or of a CLIP-like model, whose vision tower is taken.
            text_model_name_or_path (`str`, *optional*): Repository or folder of a decoder LLM.
            text_template (`str`, *optional*, defaults to `"auto"`): See [`apply_text_template`].
            text_model_kwargs (`dict`, *optional*):
                Arguments for loading the LLM: `dtype`, `quantization_config`, `revision`, `token`, ...
            config_kwargs: Further fields of [`LLM2CLIPConfig`], for example `text_weights="external"`, and `token`,
                `cache_dir`, `local_files_only`, `force_download` and `proxies`, by which both parts are fetched.

        Returns:
            [`LLM2CLIPModel`] in evaluation mode, with its LLM frozen.

        Raises:
            ValueError: if a part has missing weights, the LLM cannot attend bidirectionally, or `text_pooling` is not
                the one it was trained with or does not fit its tokenizer.
        """
        # Taken out, since a config keeps, and saves, whatever it is given.
        hub_kwargs = {name: config_kwargs.pop(name) for name in HUB_KEYWORDS if name in config_kwargs}
        vision_model = load_pretrained_vision(vision_model_name_or_path, hub_kwargs)
        if text_model_name_or_path is None:
            return cls(LLM2CLIPConfig(vision_config=vision_model.config, **config_kwargs), vision_model).eval()
        text_kwargs = {**hub_kwargs, **(text_model_kwargs or {})}
        config_kwargs.setdefault("text_base_model", str(text_model_name_or_path))
        config_kwargs.setdefault("text_base_revision", text_kwargs.get("revision"))
        revision = config_kwargs["text_base_revision"]
        text_model = load_pretrained_text(text_model_name_or_path, revision, text_kwargs)
        pooling = config_kwargs.get("text_pooling") or getattr(text_model.config, "text_pooling", None)
        if "text_prefix_length" not in config_kwargs or pooling == "eos":
            tokenizer = load_pretrained_tokenizer(text_model_name_or_path, revision, text_kwargs)
            tokenizer = apply_text_template(tokenizer, text_template)
            config_kwargs.setdefault("text_prefix_length", text_prefix_length(tokenizer))
            if pooling == "eos":
                check_end_token(tokenizer, text_model_name_or_path)
        config = LLM2CLIPConfig(vision_config=vision_model.config, text_config=text_model.config, **config_kwargs)
        model = cls(config, vision_model, load_text_model=False)
        model.attach_text_model(text_model)
        return model.eval()

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype_to_save or super().dtype

    def save_pretrained(self, save_directory: Any, *args: Any, text_weights: str | None = None, **kwargs: Any) -> None:
        """
        Saves config, weights and code; the folder loads with `trust_remote_code=True` without this package.

        Of a model with adapters of `add_adapter`, it saves these alone, as any model of transformers does;
        `from_pretrained` of that folder loads the model that they name, and puts them in.

        `AutoModel`, pipelines and, once the processor is saved there too, `SentenceTransformer` load it.

        Args:
            save_directory (`str`): Folder to write to.
            text_weights (`str`, *optional*):
                `"bundled"`, `"external"` or `"none"` for this folder, instead of `config.text_weights`: a training
                checkpoint, say, leaves a frozen LLM out and names it.
            kwargs: As for any transformers model; with `push_to_hub=True` also those of
                [`~LLM2CLIPModel.push_to_hub`].

        Raises:
            ValueError: if the LLM is to be bundled but is not attached or quantised, or to be external but is not
                named, or if a part, other than by `add_adapter` of the whole model, carries an adapter (LoRA) that has
                not been merged.
        """
        push = take_push_options(kwargs, save_directory, self.push_to_hub)
        if getattr(self, "_hf_peft_config_loaded", False):
            self._save_adapters(save_directory, *args, push=push, text_weights=text_weights, **kwargs)
            return
        self._check_merged(text_weights, weights_given=kwargs.get("state_dict") is not None)
        with self._saving(text_weights or str(self.config.text_weights)):
            super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_sentence_files(Path(save_directory))
            if push is not None:
                self.push_to_hub(**push, text_weights=text_weights)

    def _save_adapters(self, save_directory: Any, *args: Any, push: Any, text_weights: Any, **kwargs: Any) -> None:
        """Saves what `add_adapter` put into the whole model, alone, as any model of transformers does."""
        if push is not None:
            self.push_to_hub(**push)  # says why not
        if text_weights is not None:
            raise ValueError(
                f"`text_weights` is {text_weights!r}, but the model carries adapters of `add_adapter`, which are "
                "saved alone. Leave it out, or merge them first, with `llm2clip_hf.training.merge_lora(model)`."
            )
        if not any(config.base_model_name_or_path for config in self.peft_config.values()):
            logger.warning(
                "The adapters do not name the model that they are for, which has not been loaded from a folder. Save "
                "it before `add_adapter`, load it from there, and they load by themselves; else use `load_adapter`."
            )
        auto_class, type(self)._auto_class = type(self)._auto_class, None  # the code goes with whole models
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            type(self)._auto_class = auto_class

    def _check_merged(self, text_weights: str | None, weights_given: bool) -> None:
        """Refuses parts with adapters, whose weights have other names, unless plain weights are given to be saved."""
        named = self.config.text_base_model if (text_weights or self.config.text_weights) == "external" else None
        for name, part in self.named_children():
            if name == "text_model" and named is not None and getattr(part, "adapters_name", None) == named:
                continue  # as it came from there: adapters beside a quantised LLM
            # The flag is set by `add_adapter`; `get_peft_model` leaves only its layers, each with a base layer.
            layers = not weights_given and any(hasattr(module, "base_layer") for module in part.modules())
            if layers or getattr(part, "_hf_peft_config_loaded", False):
                raise ValueError(
                    f"`{name}` carries an adapter; saved like this, its weights could not be loaded again. Merge it "
                    "first, with `llm2clip_hf.training.merge_lora(model)`, or with `merge_and_unload()` where PEFT's "
                    "own wrapper put it there; `trainer.save_model` saves a trained model merged."
                )

    @contextmanager
    def _saving(self, text_weights: str) -> Iterator[None]:
        """Sets what `save_pretrained` of transformers reads from the model, and restores it."""
        config, text_model = self.config, self.text_model
        if text_weights == "bundled" and text_model is None:
            raise ValueError(f"`text_weights` is 'bundled', but the model holds no LLM to save. {ATTACH_HINT}")
        if text_weights == "bundled" and getattr(text_model.config, "quantization_config", None) is not None:
            raise ValueError(
                "`text_weights` is 'bundled', but the LLM is quantised, and a folder cannot say that of one part. "
                "Save with `text_weights='external'` and quantise on loading, with `text_model_kwargs`."
            )
        if text_weights == "external" and not config.text_base_model:
            raise ValueError(
                "`text_weights` is 'external', but `config.text_base_model` does not name the LLM. Set it to the "
                "LLM's repository or folder."
            )
        restore = (config.text_weights, self._keys_to_ignore_on_save)
        # How this copy of the LLM is quantised is no matter of the folder; written, it would be applied to all parts.
        text_fields = {} if config.text_config is None else vars(config.text_config)
        quantization = text_fields.pop("quantization_config", None)
        config.text_weights = text_weights
        if text_model is not None and text_weights != "bundled":
            text_keys = {f"text_model.{key}" for key in text_model.state_dict()}
            self._keys_to_ignore_on_save = {*(self._keys_to_ignore_on_save or ()), *text_keys}
        if type(self)._auto_class is not None:
            # The pipeline for zero-shot classification looks for this entry; `AutoModel` is added on saving.
            modeling_class = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
            config.auto_map = {
                **(getattr(config, "auto_map", None) or {}),
                "AutoModelForZeroShotImageClassification": modeling_class,
            }
            if config.logit_bias_init_value is not None:
                config.custom_pipelines = copy.deepcopy(SIGMOID_PIPELINES)
        if text_model is not None and text_weights == "bundled":
            # One dtype is recorded for the folder and used when it is loaded: that of the LLM, since all other parts
            # are kept in float32 then.
            self._dtype_to_save = text_model.dtype
        try:
            yield
        finally:
            config.text_weights, self._keys_to_ignore_on_save = restore
            if quantization is not None:
                text_fields["quantization_config"] = quantization
            self._dtype_to_save = None


def check_end_token(tokenizer: Any, name: str) -> None:
    if text_end_token(tokenizer) is None:
        raise ValueError(
            f"`text_pooling` is 'eos', but the tokenizer of {str(name)!r} puts no end token after a text. Pass "
            f"`text_template='{{text}}{tokenizer.eos_token}'`, to the processor too, or set `text_pooling='last'`."
        )


def write_sentence_files(folder: Path) -> None:
    """Makes a folder with a saved model one that `SentenceTransformer` loads; prompts that it has are kept."""
    for name, content in SENTENCE_FILES.items():
        target = folder / name
        if name == "config_sentence_transformers.json" and target.exists():
            continue
        partial = target.with_name(f".{name}.partial")
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, target)


__all__ = ["ATTACH_HINT", "LLM2CLIPPreTrainedModel"]
