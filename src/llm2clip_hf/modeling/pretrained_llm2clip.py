# Copyright 2026 The llm2clip_hf authors.
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Loading and saving of LLM2CLIP, with its LLM bundled, named or left out."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from .configuration_llm2clip import LLM2CLIPConfig, config_fields, is_repository
from .loading_llm2clip import (
    base_keywords,
    check_loading_info,
    external_text_kwargs,
    find_adapters,
    load_adapters,
    load_pretrained_text,
    load_pretrained_tokenizer,
    pin_revision,
    route_keywords,
    skip_shards,
    source_keywords,
    stored_text_weights,
    text_keywords,
)
from .processing_llm2clip import apply_text_template, template_digest, text_end_token, text_prefix_length
from .saving_llm2clip import check_merged, config_to_save, llm_last, take_push_options, write_sentence_files
from .text_llm2clip import (
    LLM2CLIPAdapterLinear,
    assert_bidirectional,
    check_text_fingerprint,
    same_sampled_weights,
    sampled_weights,
    sampled_weights_digest,
)
from .vision_llm2clip import (
    load_pretrained_vision,
    pretrained_logit_scale,
    vision_kwargs,
)


logger = logging.get_logger(__name__)


class LLM2CLIPPreTrainedModel(PreTrainedModel):
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
    # The LLM that `config.text_base_model` named when one was loaded or attached: this name, and samples of its
    # weights, which are `None` where it is not known to be what is there.
    _text_base: tuple[str | None, dict[str, torch.Tensor] | None] | None = None

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
            ValueError: if its width is not the adaptor's, it was trained with another pooling or template header, it
                does not attend bidirectionally, or it is not the LLM that `config.text_fingerprint` records (by
                sampled weights); or if nobody says how long the header is. A model built without an LLM takes pooling
                and length of the header from the LLM's config, where a folder of stage 1 or `convert` has them.
        """
        pooling, prefix = self.config.text_pooling, self.config.text_prefix_length
        if self.config.text_config is None:
            # The defaults of a model that was built without an LLM; what the LLM's folder says counts.
            pooling = getattr(text_model.config, "text_pooling", pooling)
            prefix = getattr(text_model.config, "text_prefix_length", prefix)
        fingerprint = self.config.text_fingerprint or {}
        width = text_model.config.get_text_config().hidden_size
        if (
            width == self.config.llm_hidden_size
            and prefix is None
            and not hasattr(text_model.config, "text_prefix_length")
        ):
            if "text_prefix_length" not in fingerprint:
                raise ValueError(
                    "Neither the model nor the LLM says how many leading tokens of a text (begin-of-text and template "
                    "header) are left out of the mean. Set `model.config.text_prefix_length = "
                    "text_prefix_length(processor.tokenizer)`, or pass that number to `from_pretrained`."
                )
            prefix = 0
        # The config's own checks: architecture, width of the adaptor, pooling, header, choice of `text_weights`.
        own = LLM2CLIPConfig(
            text_config=text_model.config,
            llm_hidden_size=self.config.llm_hidden_size,
            text_pooling=pooling,
            text_prefix_length=prefix,
            text_weights=text_weights,
        )
        check_text_fingerprint(text_model, own, fingerprint)
        self.config.text_pooling, self.config.text_prefix_length = own.text_pooling, own.text_prefix_length
        text_model.config.is_causal = False
        assert_bidirectional(text_model)
        if self._text_base is None:
            known = _same_source(text_model.config._name_or_path, self.config.text_base_model)
            known = known or fingerprint.get("weights_sample_sha256") == sampled_weights_digest(text_model) is not None
            self._text_base = (self.config.text_base_model, sampled_weights(text_model) if known else None)
        # The layers of the LLM hold this object, so it is the one that settings must reach.
        self.config.text_config = text_model.config
        if text_weights is not None:
            self.config.text_weights = text_weights
        self.text_model = text_model
        text_model.requires_grad_(False).eval()
        self.keep_layers_whole()

    def keep_layers_whole(self) -> None:
        """
        Names the layers that a device map or FSDP2 must not split. Towers also name those of models that they were
        published with, and accelerate stops at a name that is not there.
        """
        parts = [self, *(part for part in (self.vision_model, self.text_model) if part is not None)]
        named = {name for part in parts for name in part._no_split_modules or ()}
        self._no_split_modules = sorted(named & {type(module).__name__ for module in self.modules()})

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
                Whether to load the LLM. Without it the model takes images and stored LLM embeddings, and of a bundled
                one only those files are fetched that hold other weights too.
            text_model (`PreTrainedModel`, *optional*): An LLM to attach instead of the bundled or named one.
            text_model_kwargs (`dict`, *optional*):
                Arguments for loading an external LLM. Those of the model that concern any part hold for it too, unless
                they are given here: `dtype`, `attn_implementation`, `device_map`, `quantization_config`, `token`,
                `cache_dir`, `local_files_only`, ..., but neither `revision` nor `trust_remote_code`. For a bundled LLM
                `quantization_config`, `dtype` and `attn_implementation` alone.
            output_loading_info (`bool`, *optional*, defaults to `False`):
                Return also the dictionary of missing and unexpected keys instead of raising an error for them.
            kwargs: As for any transformers model. `dtype` and `quantization_config` are the LLM's; all other parts
                stay float32.

        Returns:
            [`LLM2CLIPModel`] in evaluation mode.

        Raises:
            ValueError: if weights are missing, unexpected or (without `ignore_mismatched_sizes=True`) of another
                shape, the LLM does not fit, or an argument for loading it cannot be used.
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
        if text_model_kwargs or kwargs.get("quantization_config") is not None:
            where = stored_text_weights(pretrained_model_name_or_path, kwargs) if bundled else "none"
            text_model_kwargs = text_keywords(where, kwargs, text_model_kwargs or {})
        name = pretrained_model_name_or_path
        if not bundled and name is not None:
            name, kwargs = skip_shards(name, kwargs, cls.config_class, ("text_model.",))
        loaded: Any = super().from_pretrained(
            name, *model_args, load_text_model=bundled, output_loading_info=True, **kwargs
        )
        model, info = loaded
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path or "")
        if not output_loading_info:
            accepted = ("mismatched_keys",) if kwargs.get("ignore_mismatched_sizes") else ()
            check_loading_info(pretrained_model_name_or_path, info, accepted)
        if text_model is None and load_text_model and model.config.text_weights == "external":
            text_kwargs = external_text_kwargs(kwargs, text_model_kwargs)
            named = load_pretrained_text(model.config.text_base_model, model.config.text_base_revision, text_kwargs)
            model._text_base = (model.config.text_base_model, sampled_weights(named))
            model.attach_text_model(named)
        elif text_model is not None:
            model.attach_text_model(text_model)
        elif model.text_model is not None:
            model._text_base = (model.config.text_base_model, sampled_weights(model.text_model))
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
        **kwargs: Any,
    ) -> Any:
        r"""
        Builds an untrained model from a pretrained vision tower and a pretrained LLM.

        The projection and the adaptor are new, drawn from torch's generator: call `transformers.set_seed` before, on
        all processes alike. `LLM2CLIPProcessor.from_vision_text_pretrained` makes the processor for it from the same
        parts.

        Args:
            vision_model_name_or_path (`str`):
                Repository or folder of a vision backbone, or of a CLIP-like model, whose vision tower is taken.
            text_model_name_or_path (`str`, *optional*):
                Repository or folder of a decoder LLM, or of a multimodal model, whose language model is taken.
            text_template (`str`, *optional*, defaults to `"auto"`): See [`apply_text_template`].
            text_model_kwargs (`dict`, *optional*):
                Arguments for loading the LLM: `dtype`, `quantization_config`, `revision`, `token`, ...
            kwargs: Fields of [`LLM2CLIPConfig`], for example `text_weights="external"`; arguments for loading both
                parts: `token`, `cache_dir`, `local_files_only`, `force_download`, `proxies`, `revision`,
                `trust_remote_code`, `attn_implementation`, `device_map` and what goes with it; of these `dtype` and
                `quantization_config` are the LLM's, as in `from_pretrained`. With `vision_` or `text_` before it, an
                argument, or a field of the part's own config, is for one part: `vision_revision`, `text_dtype`,
                `vision_image_size`. `vision_pooling` is `"pooler"` if left out, but `"cls"` for a checkpoint without
                weights for its pooler. `logit_scale_init_value="pretrained"` keeps the trained temperature of a CLIP;
                else a new model starts at ln(1 / 0.07), as its projection is new.

        Returns:
            [`LLM2CLIPModel`] in evaluation mode, with its LLM frozen. Its config records repositories and commits.

        Raises:
            ValueError: if a part has missing weights, the LLM cannot attend bidirectionally, or `text_pooling` is not
                the one it was trained with or does not fit its tokenizer.
            TypeError: for an argument that nothing takes.
        """
        where = f"`{cls.__name__}.from_vision_text_pretrained`"
        own, shared, vision, text = route_keywords(where, kwargs, [*config_fields(), *vars(PreTrainedConfig())])
        vision = pin_revision(vision_model_name_or_path, vision_kwargs(shared, vision))
        vision_model, pooling = load_pretrained_vision(vision_model_name_or_path, vision, own.get("vision_pooling"))
        own["vision_pooling"] = pooling or "pooler"
        if own.get("logit_scale_init_value") == "pretrained":
            own["logit_scale_init_value"] = pretrained_logit_scale(vision_model_name_or_path, vision)
        if is_repository(vision_model_name_or_path):
            own.setdefault("vision_base_model", vision_model_name_or_path)
            own.setdefault("vision_base_revision", vision.get("revision"))
        names = ("dtype", "torch_dtype", "quantization_config")
        text = {**{name: shared[name] for name in names if name in shared}, **text, **(text_model_kwargs or {})}
        if text_model_name_or_path is None:
            if text:
                raise ValueError(
                    f"{', '.join(map(repr, text))} would hold for an LLM, and none is named. Give "
                    "`text_model_name_or_path`, or leave it out."
                )
            return _with_new_parts(cls(LLM2CLIPConfig(vision_config=vision_model.config, **own), vision_model))
        shared["revision"] = own.get("text_base_revision") or shared.get("revision")
        of_one = {name: shared.get(name) for name in ("revision", "trust_remote_code")}
        text = {**{name: value for name, value in of_one.items() if value is not None}, **text}
        text = pin_revision(text_model_name_or_path, external_text_kwargs(shared, text))
        own.setdefault("text_base_model", str(text_model_name_or_path))
        own["text_base_revision"] = text.get("revision")
        text_model = load_pretrained_text(text_model_name_or_path, None, text)
        own |= _template_fields(text_model, text_model_name_or_path, text_template, text, own)
        config = LLM2CLIPConfig(vision_config=vision_model.config, text_config=text_model.config, **own)
        model = cls(config, vision_model, load_text_model=False)
        if _same_source(str(text_model_name_or_path), config.text_base_model):
            model._text_base = (config.text_base_model, sampled_weights(text_model))
        model.attach_text_model(text_model)
        return _with_new_parts(model)

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
                named or not the one that is named (see [`~LLM2CLIPModel.text_model_is_named`]), or if a part, other
                than by `add_adapter` of the whole model, carries an adapter (LoRA) that has not been merged.
        """
        push = take_push_options(kwargs, save_directory, self.push_to_hub)
        if getattr(self, "_hf_peft_config_loaded", False):
            self._save_adapters(save_directory, *args, push=push, text_weights=text_weights, **kwargs)
            return
        where = text_weights or str(self.config.text_weights)
        check_merged(self, where, weights_given=kwargs.get("state_dict") is not None)
        restore = self.config, self._keys_to_ignore_on_save
        self.config = config_to_save(self, where)
        if where == "bundled":
            kwargs = {**llm_last(kwargs.pop("state_dict", None) or self.state_dict()), **kwargs}
            # One dtype is recorded for the folder and used when it is loaded: that of the LLM, since all other parts
            # are kept in float32 then.
            self._dtype_to_save = self.text_model.dtype
        elif self.text_model is not None:
            keys = {f"text_model.{key}" for key in self.text_model.state_dict()}
            self._keys_to_ignore_on_save = {*(self._keys_to_ignore_on_save or ()), *keys}
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config, self._keys_to_ignore_on_save = restore
            self._dtype_to_save = None
        if kwargs.get("is_main_process", True):
            write_sentence_files(Path(save_directory))
            if push is not None:
                self.push_to_hub(**push, text_weights=text_weights)

    def text_model_is_named(self) -> bool:
        """
        Whether `config.text_base_model` names the LLM that the model holds, as far as sampled weights show: `False`
        after it was trained, or another was put in its place, unless the name was changed since.
        """
        if self._text_base is None:
            return True  # built from a config, so nothing is known of it
        name, before = self._text_base
        if name != self.config.text_base_model:
            return True
        if before is None:
            configs = (self.config, self.text_model.config)
            quantized = any(getattr(config, "quantization_config", None) is not None for config in configs)
            return quantized or _same_source(self.text_model.config._name_or_path, name)
        now = sampled_weights(self.text_model)
        return now is None or same_sampled_weights(before, now)

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


def _with_new_parts(model: Any) -> Any:
    """The model in evaluation mode, its new parts on the devices of those they follow."""
    parts = (model.vision_model, nn.Module() if model.text_model is None else model.text_model)
    vision, text = ([each.device for each in part.parameters()] for part in parts)
    image_device = next((device for device in reversed(vision) if device.type != "meta"), torch.device("cpu"))
    text_device = next((device for device in reversed(text) if device.type != "meta"), image_device)
    model.visual_projection.to(image_device)
    model.text_adapter.to(text_device)
    for scale in (model.logit_scale, model.logit_bias):
        if scale is not None:
            scale.data = scale.data.to(image_device)
    return model.eval()


def _template_fields(llm: Any, name: str, text_template: Any, kwargs: dict[str, Any], own: dict[str, Any]) -> Any:
    """The length of the header of an LLM's template, which has to be the one that the LLM was trained with."""
    text_pooling = own.get("text_pooling") or getattr(llm.config, "text_pooling", None)
    trained = getattr(llm.config, "text_template_sha256", None)
    if "text_prefix_length" in own and text_pooling != "eos" and trained is None:
        return {}
    tokenizer = apply_text_template(load_pretrained_tokenizer(name, None, kwargs), text_template)
    if trained not in (None, template_digest(tokenizer)):
        raise ValueError(
            f"`text_template={text_template!r}` gives texts another template than the one that the LLM {str(name)!r} "
            "was trained with, as its config says. Leave `text_template` out, and keep the tokenizer of that folder."
        )
    if text_pooling == "eos":
        check_end_token(tokenizer, name)
    return {"text_prefix_length": own.get("text_prefix_length", text_prefix_length(tokenizer))}


def _same_source(one: str | None, other: str | None) -> bool:
    """Whether two names are of one repository or folder."""
    return bool(one and other) and (one == other or os.path.realpath(str(one)) == os.path.realpath(str(other)))


def check_end_token(tokenizer: Any, name: str) -> None:
    if text_end_token(tokenizer) is None:
        raise ValueError(
            f"`text_pooling` is 'eos', but the tokenizer of {str(name)!r} puts no end token after a text. Pass "
            f"`text_template='{{text}}{tokenizer.eos_token}'`, to the processor too, or set `text_pooling='last'`."
        )
