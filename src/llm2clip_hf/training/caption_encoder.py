# SPDX-License-Identifier: Apache-2.0
"""
The caption encoder of stage 1: an LLM that attends both ways, mean-pooled, as a `SentenceTransformer`.

(1) The LLM is loaded, `is_causal=False` is set on its config, and a probe confirms that it obeys.
(2) The tokenizer gets the chat template built in, so every text is wrapped exactly once, whoever tokenises.
(3) Pooling leaves the template's header out, as `LLM2CLIPModel` does.
(4) LoRA is added for training; saving merges it, so that a folder always holds a plain LLM.
"""

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from transformers import AutoTokenizer, PreTrainedModel

from ..data import embedding_fingerprint
from ..modeling import apply_text_template, assert_bidirectional, text_prefix_length
from . import caption_pooling
from .caption_pooling import CaptionPooling


logger = logging.getLogger(__name__)

# Text is the only modality. Pinned, because sentence-transformers would otherwise wrap texts in a chat template it
# finds, and take a caption that looks like the address of an image for the image.
_MODALITY_CONFIG = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


def lora_config(lora: LoraConfig | Mapping[str, Any]) -> LoraConfig:
    """
    A LoRA config: the paper's recipe, rank 16 and alpha 32 (section 4.1), with dropout 0.05 on all linear layers
    (released code), and other values for the fields that a mapping names; a `LoraConfig` is copied as it is.
    """
    if isinstance(lora, LoraConfig):
        return copy.deepcopy(lora)
    fields: dict[str, Any] = {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
        "bias": "none",
        "task_type": TaskType.FEATURE_EXTRACTION,
    }
    try:
        return LoraConfig(**{**fields, **lora})
    except TypeError as error:
        raise ValueError(f"`lora` is {dict(lora)!r}, but {error}. Name fields of `peft.LoraConfig`.") from error


class CaptionEncoder(SentenceTransformer):
    """
    A `SentenceTransformer` made by `build_caption_encoder`, whose saved folder is complete.

    `save_pretrained` merges LoRA weights (the encoder in memory keeps them apart) and writes one folder that
    `AutoModel` (the bidirectional LLM), `AutoTokenizer` (with the template), `LLM2CLIPModel` and, with
    `trust_remote_code=True`, `SentenceTransformer` load, also where `llm2clip_hf` is not installed.
    """

    @property
    def llm(self) -> PreTrainedModel:
        """The language model."""
        return cast(PreTrainedModel, self[0].model)

    @property
    def text_prefix_length(self) -> int:
        """Leading template tokens that are attended to and not pooled; `text_prefix_length` of `LLM2CLIPConfig`."""
        return cast(CaptionPooling, self[1]).prefix_length

    @property
    def embedding_settings(self) -> dict[str, Any]:
        """What decides an embedding besides weights and tokenizer: the settings of `data.embedding_fingerprint`."""
        return {
            "text_prefix_length": self.text_prefix_length,
            "max_length": int(self.tokenizer.model_max_length),
            "pooling": "mean",
            "is_causal": getattr(self.llm.config, "is_causal", True) is not False,
        }

    def fingerprint(self) -> dict[str, Any]:
        """What the embeddings depend on, for `data.embed_captions`; that of the saved encoder, LoRA merged."""
        return embedding_fingerprint(merged_llm(self.llm), self.tokenizer, **self.embedding_settings)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recomputes the LLM's activations in the backward pass, as of `PreTrainedModel`."""
        self.llm.activation_checkpointing_enable(**kwargs)

    def save(
        self,
        path: str,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """
        Saves the encoder with LoRA merged; see the class.

        Everything is written to a temporary folder first and then moved file by file, `modules.json` last.

        Args:
            path (`str`): Folder to write.
            model_name (`str`, *optional*): Name for the model card.
            create_model_card (`bool`, *optional*, defaults to `True`): Whether to write `README.md`.
            train_datasets (`list[str]`, *optional*): Names of the training sets, for the model card.
            safe_serialization (`bool`, *optional*, defaults to `True`): Must be `True`; pickles are not written.

        Raises:
            ValueError: if `safe_serialization` is `False`.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization=False` is not supported: weights are saved as safetensors only.")
        target = Path(path)
        target.mkdir(parents=True, exist_ok=True)
        attached = self.llm
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
            self[0].model = merged_llm(attached)
            try:
                super().save(folder, create_model_card=False)
            finally:
                self[0].model = attached
            if create_model_card:
                self._create_model_card(folder, model_name, train_datasets)
            _point_to_local_code(Path(folder) / "modules.json")
            _move_files(Path(folder), target)


def build_caption_encoder(
    name_or_path: str,
    *,
    template: str | None = "auto",
    max_length: int = 512,
    bidirectional: bool = True,
    lora: LoraConfig | Mapping[str, Any] | Literal["default"] | None = "default",
    normalize: bool = False,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
) -> CaptionEncoder:
    r"""
    Makes a caption encoder of a decoder LLM: the model that stage 1 trains, or one to embed captions with.

    Its embedding equals `pool_text(llm(input_ids, attention_mask).last_hidden_state, attention_mask, prefix_length)`
    of `llm2clip_hf.modeling`, whatever the padding side and the order of the batch.

    Args:
        name_or_path (`str`):
            Repository or folder of a decoder LLM, or of an encoder saved by this package.
        template (`str`, *optional*, defaults to `"auto"`):
            Chat template to build into the tokenizer, see `apply_text_template`; `None` for none.
        max_length (`int`, *optional*, defaults to 512):
            Longest text in tokens, template included (paper section 4.1). Lowered to the LLM's own limit.
        bidirectional (`bool`, *optional*, defaults to `True`):
            Whether attention looks both ways (paper section 3.1). `False` leaves the LLM causal.
        lora (`LoraConfig`, `dict` or `None`, *optional*, defaults to `"default"`):
            Adapters to train: `"default"` is rank 16, alpha 32, dropout 0.05 on all linear layers; a `dict` changes
            fields of that, e.g. `{"r": 32}`; `None` adds none, for inference or to train all weights.
        normalize (`bool`, *optional*, defaults to `False`):
            Whether `encode` returns L2-normalised vectors. Stage 2 takes them un-normalised.
        dtype (`torch.dtype` or `str`, *optional*):
            Type of the LLM's weights; the checkpoint's own by default. LoRA weights are float32 in any case.
        attn_implementation (`str`, *optional*): Attention of transformers, e.g. `"sdpa"` or `"flash_attention_2"`.

    Returns:
        [`CaptionEncoder`], a `SentenceTransformer`.

    Raises:
        ValueError: if the LLM does not attend bidirectionally when told to, its tokenizer does not fit the template,
            or `lora` matches no layer.

    Example:
    >>> encoder = build_caption_encoder("meta-llama/Llama-3.2-1B-Instruct")  # doctest: +SKIP
    >>> encoder.encode(["a red boat"]).shape  # doctest: +SKIP
    (1, 2048)
    """
    transformer = _load_transformer(name_or_path, bidirectional, dtype=dtype, attn_implementation=attn_implementation)
    llm = transformer.model
    limit = getattr(llm.config, "max_position_embeddings", None) or max_length
    if limit < max_length:
        logger.warning("`max_length` %d is above the LLM's %d positions and lowered to it.", max_length, limit)
    tokenizer = apply_text_template(AutoTokenizer.from_pretrained(name_or_path), template, min(max_length, limit))
    transformer.processor = transformer.input_formatter.processor = tokenizer

    if lora is not None:
        _add_lora(llm, lora_config({} if lora == "default" else lora))
    pooling = CaptionPooling(
        transformer.get_embedding_dimension(), text_prefix_length(tokenizer), _prompt_overhead(tokenizer)
    )
    return CaptionEncoder(modules=[transformer, pooling, *([Normalize()] if normalize else [])])


def _load_transformer(name_or_path: str, bidirectional: bool, **model_kwargs: Any) -> Transformer:
    transformer = Transformer(
        name_or_path,
        model_kwargs={key: value for key, value in model_kwargs.items() if value is not None},
        modality_config=_MODALITY_CONFIG,
        module_output_name="token_embeddings",
    )
    if bidirectional:
        # On the config: that is saved and honoured for every mask; a keyword of `from_pretrained` is dropped silently.
        transformer.model.config.is_causal = False
        assert_bidirectional(transformer.model)
    return transformer


def merged_llm(llm: PreTrainedModel) -> PreTrainedModel:
    """
    The LLM with its adapters merged into the weights.

    Args:
        llm (`PreTrainedModel`): An LLM with or without PEFT layers; it is not changed.

    Returns:
        `PreTrainedModel`: `llm` itself if it has no adapters, else a new model on the CPU. The adapters are merged
        layer by layer, which takes the memory of one more copy of the LLM, not two.
    """
    layers = {name: module for name, module in llm.named_modules() if isinstance(module, BaseTunerLayer)}
    if not layers:
        return llm
    state = {
        name: tensor.detach().cpu()
        for name, tensor in llm.state_dict().items()
        if not any(name.startswith(f"{layer}.") for layer in layers)
    }
    for name, layer in layers.items():
        single = copy.deepcopy(layer)
        single.merge(safe_merge=True)
        base = single.get_base_layer().state_dict()
        state.update({f"{name}.{key}": tensor.detach().cpu() for key, tensor in base.items()})
    with torch.device("meta"):
        merged = type(llm)._from_config(copy.deepcopy(llm.config), dtype=llm.dtype)
    merged.load_state_dict(state, strict=True, assign=True)
    for name, buffer in llm.named_buffers():  # those that are not in a state dict, such as rotary frequencies
        if any(name.startswith(f"{layer}.") for layer in layers):
            continue
        owner, _, leaf = name.rpartition(".")
        merged.get_submodule(owner).register_buffer(leaf, buffer.detach().cpu(), persistent=name in state)
    return merged.eval()


def _add_lora(llm: PreTrainedModel, config: LoraConfig) -> None:
    llm.add_adapter(config)
    trainable = [parameter for parameter in llm.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(f"`lora` matches no layer of {type(llm).__name__}: check `target_modules`.")
    for parameter in trainable:
        # In bfloat16 an update of a few 1e-4 of the weight is rounded away.
        parameter.data = parameter.data.float()


def _prompt_overhead(tokenizer: Any) -> int:
    """Tokens of the template's tail that sentence-transformers counts into a prompt: all, but a special last one."""
    ids = tokenizer("")["input_ids"]
    tail = ids[text_prefix_length(tokenizer) :]
    return len(tail) - int(bool(tail) and tail[-1] in tokenizer.all_special_ids)


def _point_to_local_code(path: Path) -> None:
    """Makes `modules.json` name the copy of the pooling code in the folder instead of this package."""
    modules = json.loads(path.read_text(encoding="utf-8"))
    for module in modules:
        if module["type"] == f"{CaptionPooling.__module__}.{CaptionPooling.__name__}":
            module["type"] = f"{Path(caption_pooling.__file__).stem}.{CaptionPooling.__name__}"
    path.write_text(json.dumps(modules, indent=2), encoding="utf-8")


def _move_files(source: Path, target: Path) -> None:
    """Moves all files of a folder into another on the same disk; `modules.json`, which makes it loadable, last."""
    files = sorted((file for file in source.rglob("*") if file.is_file()), key=lambda f: f.name == "modules.json")
    for stale in [*target.glob("model*.safetensors"), target / "model.safetensors.index.json"]:
        stale.unlink(missing_ok=True)
    for file in files:
        destination = target / file.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, destination)
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
