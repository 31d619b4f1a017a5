# Copyright 2026 The llm2clip_hf authors.
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Configuration of LLM2CLIP: a vision tower, a large language model and the adaptor between them."""

import copy
import difflib
import inspect
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers


# Before the imports that an older one does not know. The file travels alone, without the package that says this.
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 17):
    raise ImportError(
        f"LLM2CLIP needs transformers 5.17 or newer, found {transformers.__version__}. Update it: "
        "`pip install -U transformers`."
    )

from huggingface_hub.errors import HFValidationError  # noqa: E402
from huggingface_hub.utils import validate_repo_id  # noqa: E402
from transformers import AutoConfig, PreTrainedConfig  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

from .configuration_eva02 import check_positive_int  # noqa: E402


# Decoders whose attention stays causal, wholly or for some inputs, when `is_causal=False` is set on their config, or
# whose output then depends on the padding (GPT-2).
# `assert_bidirectional` in the modeling file finds such architectures by a probe; these are known beforehand.
NOT_BIDIRECTIONAL = ("gpt2", "llama4_text", "mamba", "mamba2", "nemotron", "rwkv", "stablelm")

VISION_POOLINGS = ("pooler", "cls", "mean")
VISION_PROJECTIONS = ("linear", "linear_bias", "none")
TEXT_POOLINGS = ("mean", "eos", "last")
TEXT_WEIGHTS = ("bundled", "external", "none")


def _sub_config(config: PreTrainedConfig | dict[str, Any] | None, name: str, default: str | None) -> Any:
    """Builds a sub-config object from an object, a dict with `model_type`, or a default model type."""
    if isinstance(config, PreTrainedConfig):
        # A copy: building the composite resets the attention implementation of its parts, which may be in use.
        return copy.deepcopy(config)
    if config is None:
        return CONFIG_MAPPING[default]() if default is not None else None
    if not isinstance(config, dict):
        raise ValueError(f"`{name}` must be a transformers config or a dict, got {type(config).__name__}.")
    fields = dict(config)
    model_type = fields.pop("model_type", default)
    if model_type is None:
        raise ValueError(f"`{name}` has no `model_type`. Add it, for example `'model_type': 'llama'`.")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"`{name}.model_type` is {model_type!r}, which this version of transformers does not know. Give the model "
            "type of a registered architecture, or update transformers."
        )
    return CONFIG_MAPPING[model_type](**fields)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def unknown_keyword(where: str, name: str, known: Iterable[str]) -> TypeError:
    """The error for a keyword that nothing takes, with the name that it is nearest to."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    hint = f"Did you mean `{nearest[0]}`?" if nearest else "Leave it out."
    return TypeError(f"{where} got `{name}`, which nothing takes. {hint}")


def is_repository(name: Any) -> bool:
    """Whether a name is that of a repository on the Hub, `owner/name`, and not of a folder here."""
    if not isinstance(name, str) or name.count("/") != 1 or Path(name).is_dir():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def without_local_names(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config without the folders that its parts were loaded from; names of repositories stay."""
    shown = dict(fields)
    for name in LLM2CLIPConfig.sub_configs:
        part = shown.get(name)
        if isinstance(part, dict) and part.get("_name_or_path") and not is_repository(part["_name_or_path"]):
            shown[name] = {**part, "_name_or_path": ""}
    return shown


class LLM2CLIPConfig(PreTrainedConfig):
    r"""
    Configuration of an [`LLM2CLIPModel`]. It holds everything that is needed to rebuild the model.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Config of the vision tower: any vision backbone of transformers, or an [`Eva02VisionConfig`]. Defaults to a
            CLIP ViT.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Config of the decoder language model. `is_causal` is set to `False` on it, which makes its attention
            bidirectional. `None` for a model that takes stored LLM embeddings only.
        projection_dim (`int`, *optional*, defaults to 1280):
            Width of the joint embedding space (paper section 4.1).
        vision_pooling (`str`, *optional*, defaults to `"pooler"`):
            How the tower's output becomes one vector: its own pooled output, the first token, or the mean of its
            tokens (of its positions, for convolutional towers).
        vision_projection (`str`, *optional*, defaults to `"linear"`):
            `"linear"` (no bias, CLIP), `"linear_bias"` (EVA02) or `"none"` (SigLIP: the pooled vector is the joint
            embedding, so its width must be `projection_dim`).
        vision_hidden_size (`int`, *optional*):
            Width of the pooled vision vector. Read from `vision_config.hidden_size` where there is one, and measured
            when the model is built.
        adapter_num_layers (`int`, *optional*, defaults to 4):
            Residual blocks of the text adaptor (paper table 8).
        adapter_expansion (`int`, *optional*, defaults to 2):
            Hidden width of a block, in units of the LLM width.
        adapter_dropout (`float`, *optional*, defaults to 0.0):
            Dropout after the activation of a block, in `[0, 1)`.
        normalize_llm_embeds (`bool`, *optional*, defaults to `True`):
            Whether LLM embeddings are L2-normalised before the adaptor. True for the published OpenAI and EVA02
            checkpoints, False for those trained with the LLM online (SigLIP2).
        llm_hidden_size (`int`, *optional*):
            Width of an LLM embedding. Read from `text_config` where there is one; else 4096, that of Llama-3-8B.
        text_prefix_length (`int`, *optional*):
            Number of leading tokens of every text (begin-of-text and template header) that are attended to, but left
            out of the mean. Defaults to what `text_config.text_prefix_length` says, as a caption encoder of stage 1
            and a converted LLM do, else to 0; where the LLM is not part of the model, to `None`: not known until one
            is attached.
        text_pooling (`str`, *optional*):
            How the states of a text's tokens become one vector: `"mean"`, or the state of its last token. `"eos"` says
            that this is an end token which the tokenizer puts after every text, `"last"` takes whatever token is
            there (paper section 4.7 compares mean and end token). Defaults to what `text_config.text_pooling` says,
            as a caption encoder of stage 1 does, else to `"mean"`.
        logit_scale_init_value (`float`, *optional*, defaults to 2.6592):
            Initial logarithm of the logit scale, ln(1 / 0.07).
        logit_bias_init_value (`float`, *optional*):
            A float gives the model a logit bias and the sigmoid loss (-10 in the SigLIP paper); `None` the softmax
            loss.
        max_logit_scale (`float`, *optional*, defaults to 100.0):
            Training clamps the logit scale (not its logarithm) to this value.
        text_weights (`str`, *optional*):
            Where the LLM is: `"bundled"` (saved with the model), `"external"` (named by `text_base_model`, fetched by
            `from_pretrained`) or `"none"`. Defaults to `"bundled"` with a `text_config`, else to `"none"`.
        text_base_model (`str`, *optional*):
            Repository or folder of the external LLM.
        text_base_revision (`str`, *optional*):
            Revision of that repository, best a commit hash.
        vision_base_model (`str`, *optional*): Repository that the vision tower was loaded from; a record.
        vision_base_revision (`str`, *optional*): Its commit.
        text_fingerprint (`dict`, *optional*):
            What made the stored LLM embeddings that the model was trained on: names and digests of the LLM, tokenizer
            and template. The trainer sets it from the embedding store, and refuses embeddings of another origin;
            `None` takes any. Values are those of JSON.

    Raises:
        ValueError: for a value outside the ranges above, an unknown tower type, or a decoder that cannot attend
            bidirectionally.
        TypeError: for a keyword that is one of these but for a letter or two. Others are kept, as transformers does.

    Example:

    ```python
    >>> config = LLM2CLIPConfig(
    ...     vision_config={"model_type": "clip_vision_model"}, text_config={"model_type": "llama"}, projection_dim=512
    ... )
    >>> config.llm_hidden_size, config.text_config.is_causal, config.text_weights
    (4096, False, 'bundled')

    ```
    """

    model_type = "llm2clip"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        projection_dim: int = 1280,
        vision_pooling: str = "pooler",
        vision_projection: str = "linear",
        vision_hidden_size: int | None = None,
        adapter_num_layers: int = 4,
        adapter_expansion: int = 2,
        adapter_dropout: float = 0.0,
        normalize_llm_embeds: bool = True,
        llm_hidden_size: int | None = None,
        text_prefix_length: int | None = None,
        text_pooling: str | None = None,
        logit_scale_init_value: float = 2.6592,
        logit_bias_init_value: float | None = None,
        max_logit_scale: float = 100.0,
        text_weights: str | None = None,
        text_base_model: str | None = None,
        text_base_revision: str | None = None,
        text_fingerprint: dict[str, Any] | None = None,
        vision_base_model: str | None = None,
        vision_base_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            if difflib.get_close_matches(name, config_fields(), n=1, cutoff=0.9):
                raise unknown_keyword("`LLM2CLIPConfig`", name, config_fields())
        self.vision_config = _sub_config(vision_config, "vision_config", "clip_vision_model")
        self.text_config = _sub_config(text_config, "text_config", None)
        self.projection_dim = projection_dim
        self.vision_pooling = vision_pooling
        self.vision_projection = vision_projection
        self.vision_hidden_size: Any = vision_hidden_size
        self.adapter_num_layers = adapter_num_layers
        self.adapter_expansion = adapter_expansion
        self.adapter_dropout = adapter_dropout
        self.normalize_llm_embeds = normalize_llm_embeds
        self.llm_hidden_size: Any = llm_hidden_size
        self.text_prefix_length: Any = text_prefix_length
        self.text_pooling: Any = text_pooling
        self.logit_scale_init_value = logit_scale_init_value
        self.logit_bias_init_value: Any = logit_bias_init_value
        self.max_logit_scale = max_logit_scale
        self.text_weights = text_weights
        self.text_base_model = text_base_model
        self.text_base_revision = text_base_revision
        self.text_fingerprint: Any = text_fingerprint
        self.vision_base_model = vision_base_model
        self.vision_base_revision = vision_base_revision
        self._resolve_text()
        if self.vision_hidden_size is None:
            self.vision_hidden_size = getattr(self.vision_config, "hidden_size", None)
        self._check_values()
        # After the sub-configs, so that keywords such as `attn_implementation` reach them.
        super().__init__(**kwargs)

    @classmethod
    def from_vision_text_configs(
        cls, vision_config: PreTrainedConfig, text_config: PreTrainedConfig | None = None, **kwargs: Any
    ) -> "LLM2CLIPConfig":
        """The config of a model of two parts; `kwargs` are fields of this class or of every config, nothing else."""
        known = {*config_fields(), *vars(PreTrainedConfig())}
        for name in kwargs.keys() - known:
            raise unknown_keyword("`LLM2CLIPConfig.from_vision_text_configs`", name, known)
        return cls(vision_config=vision_config, text_config=text_config, **kwargs)

    def _resolve_text(self) -> None:
        # Of a multimodal model, the language model.
        self.text_config = getattr(self.text_config, "text_config", None) or self.text_config
        if self.text_config is None:
            self.llm_hidden_size = 4096 if self.llm_hidden_size is None else self.llm_hidden_size
            self.text_weights = self.text_weights or "none"
            self.text_pooling = self.text_pooling or "mean"
            return
        model_type = self.text_config.model_type
        if model_type in NOT_BIDIRECTIONAL:
            raise ValueError(
                f"`text_config` is of type {model_type!r}, which does not attend bidirectionally, whatever the "
                "padding, when `is_causal=False` is set on it. Use a decoder that honours it: Llama, Qwen2/3, "
                "Mistral, Gemma 2/3, Phi-3 and most others of transformers do."
            )
        width = getattr(self.text_config, "hidden_size", None)
        if width is None:
            raise ValueError(
                f"`text_config` of type {model_type!r} has no `hidden_size`. Give the config of a text-only decoder; "
                "of a multimodal model, its own `text_config`."
            )
        if self.llm_hidden_size not in (None, width):
            raise ValueError(
                f"`llm_hidden_size` is {self.llm_hidden_size}, but `text_config.hidden_size` is {width}. Leave "
                "`llm_hidden_size` out, or pair the adaptor with an LLM of its width."
            )
        self.llm_hidden_size = width
        # Persisted in config.json; the one switch that all attention backends of transformers honour.
        self.text_config.is_causal = False
        self.text_weights = self.text_weights or "bundled"
        for field in ("text_pooling", "text_prefix_length"):
            trained, given = getattr(self.text_config, field, None), getattr(self, field)
            if trained is not None and given not in (None, trained):
                raise ValueError(
                    f"`{field}` is {given!r}, but the LLM is a caption encoder trained with {trained!r}, as its "
                    f"config says. Leave `{field}` out."
                )
            setattr(self, field, trained if given is None else given)
        self.text_pooling = self.text_pooling or "mean"
        if self.text_prefix_length is None and self.text_weights == "bundled":
            self.text_prefix_length = 0

    def _check_values(self) -> None:
        _check_choice("vision_pooling", self.vision_pooling, VISION_POOLINGS)
        _check_choice("vision_projection", self.vision_projection, VISION_PROJECTIONS)
        _check_choice("text_pooling", self.text_pooling, TEXT_POOLINGS)
        _check_choice("text_weights", self.text_weights, TEXT_WEIGHTS)
        for name in ("projection_dim", "adapter_num_layers", "adapter_expansion", "llm_hidden_size"):
            check_positive_int(name, getattr(self, name))
        if self.vision_hidden_size is not None:
            check_positive_int("vision_hidden_size", self.vision_hidden_size)
        prefix = self.text_prefix_length
        if prefix is not None and (isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0):
            raise ValueError(f"`text_prefix_length` must be an integer >= 0 or None, got {prefix!r}.")
        if not 0.0 <= self.adapter_dropout < 1.0:
            raise ValueError(f"`adapter_dropout` must lie in [0, 1), got {self.adapter_dropout!r}.")
        if not (math.isfinite(self.max_logit_scale) and self.max_logit_scale > 0):
            raise ValueError(f"`max_logit_scale` must be a positive number, got {self.max_logit_scale!r}.")
        if not math.isfinite(self.logit_scale_init_value):
            raise ValueError(f"`logit_scale_init_value` must be finite, got {self.logit_scale_init_value!r}.")
        if self.logit_bias_init_value is not None and not math.isfinite(self.logit_bias_init_value):
            raise ValueError(f"`logit_bias_init_value` must be finite or None, got {self.logit_bias_init_value!r}.")
        if self.text_fingerprint is not None and not isinstance(self.text_fingerprint, dict):
            raise ValueError(
                f"`text_fingerprint` must be a dict or None, got {self.text_fingerprint!r}. Take the `fingerprint` of "
                "the `CaptionEmbeddingStore`."
            )
        if self.text_config is None and self.text_weights == "bundled":
            raise ValueError(
                "`text_weights` is 'bundled', but there is no `text_config`. Give the config of the LLM, or set "
                "`text_weights='none'` for a model that takes stored LLM embeddings."
            )
        self._check_vision_width()

    def to_dict(self) -> dict[str, Any]:
        """See `PreTrainedConfig.to_dict`; where on this machine the parts were loaded from is left out."""
        return without_local_names(super().to_dict())

    def set_vision_width(self, width: int) -> None:
        """Takes the width of the pooled vision vector, measured when the model is built."""
        if self.vision_hidden_size not in (None, width, getattr(self.vision_config, "hidden_size", None)):
            raise ValueError(
                f"`vision_hidden_size` is {self.vision_hidden_size}, but the vision tower's pooled vector is {width} "
                "wide. Leave `vision_hidden_size` out."
            )
        self.vision_hidden_size = width
        self._check_vision_width()

    def _check_vision_width(self) -> None:
        if self.vision_projection == "none" and self.vision_hidden_size not in (None, self.projection_dim):
            raise ValueError(
                f"`vision_projection='none'` needs `projection_dim` to equal the width of the vision tower, got "
                f"{self.projection_dim} and {self.vision_hidden_size}."
            )


def config_fields() -> list[str]:
    """Names of the fields that [`LLM2CLIPConfig`] adds to those of every config."""
    parameters = inspect.signature(LLM2CLIPConfig.__init__).parameters
    return [name for name in parameters if name not in ("self", "kwargs")]


LLM2CLIPConfig.register_for_auto_class()
