# SPDX-License-Identifier: Apache-2.0
"""
The caption encoder of stage 1: an LLM that attends both ways, pooled, as a `SentenceTransformer`.

(1) The LLM is loaded, `is_causal=False` is set on its config, and a probe confirms that it obeys.
(2) The tokenizer gets the chat template built in, so every text is wrapped exactly once, whoever tokenises.
(3) Pooling leaves the template's header out, as `LLM2CLIPModel` does.
(4) LoRA is added for training; saving merges it, so that a folder holds a plain LLM, or saves it alone.
"""

import json
import logging
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, Literal, cast

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...data import embedding_fingerprint
from ...files import written_into
from ...hub.card_facts import encoder_facts
from ...hub.cards import encoder_card
from ...modeling import LLM2CLIPConfig, apply_text_template, assert_bidirectional, text_prefix_length
from ...modeling.loading_llm2clip import (
    ADAPTER_WEIGHTS,
    ENCODER_SETTINGS,
    find_adapters,
    load_pretrained_tokenizer,
    load_text_config,
)
from ...modeling.processing_llm2clip import record_text_settings, text_end_token
from ..lora import (
    ADAPTER_FOLDER,
    REPLACED_FILES,
    add_lora,
    attach_stored_lora,
    check_stored_lora,
    has_adapters,
    load_adapter_weights,
    lora_config,
    merged_llm,
    write_adapter,
)
from ..model_checks import quantization_label, quantized_model_kwargs
from ..publishing import PublishedEncoder
from . import caption_pooling
from .caption_pooling import CaptionPooling


logger = logging.getLogger(__name__)
# Text is the only modality. Pinned, because sentence-transformers would otherwise wrap texts in a chat template it
# finds, and take a caption that looks like the address of an image for the image.
_MODALITY_CONFIG = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
# Longest text in tokens, template included (paper section 4.1).
_MAX_LENGTH = 512


class CaptionEncoder(PublishedEncoder, SentenceTransformer):
    """
    A `SentenceTransformer` made by `build_caption_encoder`, whose saved folder is complete.

    `save_pretrained` merges LoRA weights (the encoder in memory keeps them apart) and writes one folder that
    `AutoModel` (the bidirectional LLM), `AutoTokenizer` (with the template), `LLM2CLIPModel` and, with
    `trust_remote_code=True`, `SentenceTransformer` load, also where `llm2clip_hf` is not installed. `save_adapter`
    writes the LoRA weights alone.
    """

    # Of the run that trained it, for the card.
    training_options: Mapping[str, Any] = MappingProxyType({})

    @property
    def llm(self) -> PreTrainedModel:
        """The language model."""
        return cast(PreTrainedModel, self[0].model)

    @property
    def pooling(self) -> str:
        """`"mean"`, `"eos"` or `"last"`; `text_pooling` of `LLM2CLIPConfig`."""
        return cast(CaptionPooling, self[1]).pooling

    @property
    def text_prefix_length(self) -> int:
        """Leading template tokens that are attended to and not pooled; `text_prefix_length` of `LLM2CLIPConfig`."""
        return cast(CaptionPooling, self[1]).prefix_length

    @property
    def embedding_settings(self) -> dict[str, Any]:
        """What decides an embedding besides weights and tokenizer: the settings of `data.embedding_fingerprint`."""
        label = quantization_label(self.llm)
        return {
            "text_prefix_length": self.text_prefix_length,
            "max_length": int(self.tokenizer.model_max_length),
            "pooling": self.pooling,
            "is_causal": getattr(self.llm.config, "is_causal", True) is not False,
            **({} if label is None else {"quantization": label}),
        }

    def fingerprint(self) -> dict[str, Any]:
        """What the embeddings depend on, for `data.embed_captions`; that of the saved encoder, LoRA merged."""
        # Adapters on quantised weights are not merged when they run either.
        llm = self.llm if quantization_label(self.llm) else merged_llm(self.llm)
        return embedding_fingerprint(llm, self.tokenizer, **self.embedding_settings)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recomputes the LLM's activations in the backward pass, as of `PreTrainedModel`."""
        # Older releases of transformers have the other name alone.
        enable = getattr(self.llm, "activation_checkpointing_enable", None) or self.llm.gradient_checkpointing_enable
        enable(**kwargs)

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

        Everything is written to a temporary folder first and then moved file by file, `modules.json` last. A folder
        `checkpoint-N`, which is a checkpoint of a `Trainer`, also gets the adapters by themselves, from which the run
        resumes, and of a quantised LLM nothing else.

        Args:
            path (`str`): Folder to write.
            model_name (`str`, *optional*): Name for the model card.
            create_model_card (`bool`, *optional*, defaults to `True`): Whether to write `README.md`.
            train_datasets (`list[str]`, *optional*): Names of the training sets, for the model card.
            safe_serialization (`bool`, *optional*, defaults to `True`): Must be `True`; pickles are not written.

        Raises:
            ValueError: if `safe_serialization` is `False`, or the LLM is quantised.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization=False` is not supported: weights are saved as safetensors only.")
        if has_adapters(self.llm) and re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(path).name):
            self.save_adapter(str(Path(path) / ADAPTER_FOLDER))
            if quantization_label(self.llm):
                return
        if quantization_label(self.llm):
            raise ValueError(
                "The LLM is quantised, and adapters merged into rounded weights are not what was trained. Save them "
                "with `save_adapter(path)`; `build_caption_encoder(path, lora=None).save_pretrained(folder)` then "
                "merges them into the LLM in full precision."
            )
        attached = self.llm
        with written_into(Path(path), "modules.json", REPLACED_FILES) as folder:
            self[0].model = merged_llm(attached)
            try:
                super().save(str(folder), create_model_card=False)
            finally:
                self[0].model = attached
            if create_model_card:
                self._create_model_card(str(folder), model_name or Path(path).resolve().name, train_datasets)
            _point_to_local_code(folder / "modules.json")

    @classmethod
    def _load_with_module_classes(cls, model_name_or_path: str, module_classes: Any, **kwargs: Any) -> Any:
        """What `SentenceTransformerTrainer` resumes from: by this package, without the code in the folder."""
        weights = Path(model_name_or_path) / ADAPTER_FOLDER / ADAPTER_WEIGHTS
        if weights.is_file():  # an encoder is not built to take its adapters
            return SimpleNamespace(state_dict=partial(load_file, weights))
        return build_caption_encoder(model_name_or_path, lora=None, bidirectional=False)  # as its config says

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of `nn.Module`; of a file of adapters, these, and the LLM stays what it is."""
        if not all(".lora_" in name for name in state_dict):
            return super().load_state_dict(state_dict, *args, **kwargs)
        if not has_adapters(self.llm):
            raise ValueError("The weights are those of adapters, and the encoder has none to load them into.")
        return load_adapter_weights(self.llm, state_dict, "of the checkpoint")

    def save_adapter(self, path: str, model_name: str | None = None, train_datasets: list[str] | None = None) -> None:
        """
        Saves the LoRA weights alone, with the name of their LLM: a folder of megabytes, and all a quantised run has.

        `build_caption_encoder(path)`, `LLM2CLIPModel` and the command line load it. Nothing else does so correctly:
        PEFT, `AutoModel` and `SentenceTransformer` would put the adapters into the causal LLM, since an adapter has no
        config to say that attention looks both ways. The folder's README says so too. For a folder that they load, use
        `save_pretrained`.

        Args:
            path (`str`): Folder to write; not one that holds a model.
            model_name (`str`, *optional*): Name for the model card.
            train_datasets (`list[str]`, *optional*): Names of the training sets, for the model card.

        Raises:
            ValueError: if the encoder has no adapters, or the folder holds a model.
        """
        if (Path(path) / "config.json").exists():
            raise ValueError(f"`{path}` holds a model, which the adapters would be loaded into. Give another folder.")
        own = self.embedding_settings
        settings = self._saved_settings() | {name: own[name] for name in ("is_causal", "pooling", "max_length")}
        with written_into(Path(path), ENCODER_SETTINGS, REPLACED_FILES) as folder:
            write_adapter(folder, self.llm, settings)
            self.tokenizer.save_pretrained(folder)
            self._create_model_card(folder, model_name or Path(path).resolve().name, train_datasets, adapter_only=True)

    def _saved_settings(self) -> dict[str, Any]:
        """Where the LLM was loaded from, the template (`{text}` for the text), and whether vectors are normalized."""
        name, ids = str(self.llm.config._name_or_path), self.tokenizer("")["input_ids"]
        header, ending = ids[: self.text_prefix_length], ids[self.text_prefix_length :]
        return {
            "base_model": str(Path(name).resolve()) if Path(name).is_dir() else name,  # found again from anywhere
            "base_revision": getattr(self.llm.config, "_commit_hash", None),
            "template": f"{self.tokenizer.decode(header)}{{text}}{self.tokenizer.decode(ending)}",
            "normalize": any(isinstance(module, Normalize) for module in self),
        }

    def _create_model_card(
        self,
        path: str | Path,
        model_name: str | None = None,
        train_datasets: list[str] | None = None,
        adapter_only: bool = False,
    ) -> None:
        """Writes `README.md` into a folder; what sentence-transformers calls for its own, longer card."""
        settings = self.embedding_settings | self._saved_settings() | {"dimension": self.get_embedding_dimension()}
        card = encoder_card(
            model_name or Path(path).resolve().name,
            settings["base_model"],
            settings,
            adapter_only=adapter_only,
            training_options=self.training_options,
            **encoder_facts(self.model_card_data, train_datasets),
        )
        (Path(path) / "README.md").write_text(card, encoding="utf-8")


def build_caption_encoder(
    name_or_path: str,
    *,
    template: str | None = "auto",
    max_length: int | None = None,
    pooling: Literal["mean", "eos", "last"] | None = None,
    bidirectional: bool = True,
    lora: LoraConfig | Mapping[str, Any] | Literal["default"] | None = "default",
    quantization: Literal["4bit", "8bit"] | QuantizationConfigMixin | None = None,
    normalize: bool = False,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    base_model: str | None = None,
) -> CaptionEncoder:
    r"""
    Makes a caption encoder of a decoder LLM: the model that stage 1 trains, or one to embed captions with.

    LoRA starts from draws of torch's generator: call `transformers.set_seed` before, on all processes alike.

    Its embedding equals `pool_text(llm(input_ids, attention_mask).last_hidden_state, attention_mask, prefix_length,
    pooling)` of `llm2clip_hf.modeling`, whatever the padding side and the order of the batch.

    The poolings `"eos"` and `"last"` both take the state of the last attended token. With `"eos"` this is an end
    token for every text, cut or not: the template's end-of-turn token, or, without a template, the tokenizer's
    end-of-sequence token, which is then added to the tokenizer. With `"last"` the tokenizer stays as it is, so that
    without a template it is the text's own last token.

    Args:
        name_or_path (`str`):
            Repository or folder of a decoder LLM, or of an encoder saved by this package, merged or adapters only.
        template (`str`, *optional*, defaults to `"auto"`):
            Chat template to build into the tokenizer, see `apply_text_template`; `None` for none.
        max_length (`int`, *optional*):
            Longest text in tokens, template included. Defaults to what a saved encoder says, else to 512 (paper
            section 4.1). Lowered to the LLM's own limit.
        pooling (`str`, *optional*):
            `"mean"`, `"eos"` or `"last"`. Defaults to what a saved encoder says, else to `"mean"` (paper section 3.1;
            section 4.7 compares it with the end token).
        bidirectional (`bool`, *optional*, defaults to `True`):
            Whether attention looks both ways (paper section 3.1). `False` leaves the LLM causal.
        lora (`LoraConfig`, `dict` or `None`, *optional*, defaults to `"default"`):
            Adapters to train: `"default"` is rank 16, alpha 32, dropout 0.05 on all linear layers; a `dict` changes
            fields of that, e.g. `{"r": 32}`; `None` adds none, for inference or to train all weights. Of an
            adapter-only encoder, `"default"` trains its own adapters on (as does a `dict` of what they are), and
            `None` merges them.
        quantization (`str` or a quantisation config of transformers, *optional*):
            Load the LLM in `"4bit"` (NF4, double quantisation, bf16 arithmetic) or `"8bit"` through bitsandbytes, on
            the GPU of this process, and train LoRA on it. Such an encoder is saved with `save_adapter`.
        normalize (`bool`, *optional*, defaults to `False`):
            Whether `encode` returns L2-normalised vectors. Stage 2 takes them un-normalised.
        dtype (`torch.dtype` or `str`, *optional*):
            Type of the LLM's weights; the checkpoint's own by default. LoRA weights are float32 in any case.
        attn_implementation (`str`, *optional*): Attention of transformers, e.g. `"sdpa"` or `"flash_attention_2"`.
        revision (`str`, *optional*): Revision of the repository, best a commit hash.
        base_model (`str`, *optional*): LLM of an adapter-only encoder, where it is not where the folder says.

    Returns:
        [`CaptionEncoder`], a `SentenceTransformer`.

    Raises:
        ValueError: if the LLM does not attend bidirectionally when told to, its tokenizer does not fit the template
            or the pooling, `lora` names no layer, or an adapter-only encoder meets another LLM.
        ImportError: if `quantization` needs bitsandbytes and it is not installed.
        RuntimeError: if `quantization` needs a GPU and there is none.

    Example:
    >>> encoder = build_caption_encoder("meta-llama/Llama-3.2-1B-Instruct")  # doctest: +SKIP
    >>> encoder.encode(["a red boat"]).shape  # doctest: +SKIP
    (1, 2048)
    """
    stored = find_adapters(name_or_path, {"revision": revision})
    base, base_revision = name_or_path, revision
    if stored is not None:
        check_stored_lora(name_or_path, stored, lora, bidirectional, revision)
        if base_model is None:
            load_text_config(name_or_path, {"revision": revision})  # says what is missing where the LLM is
        base, base_revision = base_model or stored["base_model"], None if base_model else stored["base_revision"]
        bidirectional = not stored["is_causal"]
        normalize = normalize or bool(stored.get("normalize"))
    elif base_model is not None:
        raise ValueError(f"`base_model` is for an adapter-only encoder, and {name_or_path!r} is none. Leave it out.")
    transformer = _load_transformer(
        base,
        base_revision,
        bidirectional,
        attn_implementation=attn_implementation,
        **{**quantized_model_kwargs(quantization), **({} if dtype is None else {"dtype": dtype})},
    )
    llm = transformer.model
    chosen = _chosen_pooling(pooling, (stored or {}).get("pooling") or getattr(llm.config, "text_pooling", None))
    tokenizer = load_pretrained_tokenizer(name_or_path, revision, {})
    tokenizer = _finished_tokenizer(
        tokenizer, template, _chosen_length(max_length, stored or {}, tokenizer, llm), chosen
    )
    transformer.processor = transformer.input_formatter.processor = tokenizer
    # Beside `is_causal`, so that whoever loads the LLM pools as it was trained.
    record_text_settings(llm.config, tokenizer, chosen)

    if stored is not None:
        attach_stored_lora(llm, name_or_path, stored, revision)
        if lora is None and quantization_label(llm):
            llm.requires_grad_(False)  # beside quantised weights adapters stay as they are
        elif lora is None:
            transformer.model = merged_llm(llm).to(cast(Any, llm.device))
    elif lora is not None:
        if has_adapters(llm):
            raise ValueError(
                f"{name_or_path!r} holds adapters of PEFT. Merge them first: load it with `lora=None` and save it."
            )
        add_lora(llm, lora_config({} if lora == "default" else lora))
    module = CaptionPooling(
        transformer.get_embedding_dimension(), text_prefix_length(tokenizer), _prompt_overhead(tokenizer), chosen
    )
    return CaptionEncoder(modules=[transformer, module, *([Normalize()] if normalize else [])])


def check_caption_encoder(
    name_or_path: str,
    config: Any,
    *,
    template: str | None = "auto",
    pooling: Any = None,
    lora: Any = None,
    quantization: Any = None,
    attn_implementation: str | None = None,
) -> None:
    """What `build_caption_encoder` refuses, as far as it can be told without the LLM's weights."""
    stored = find_adapters(name_or_path)
    if stored is not None:
        check_stored_lora(name_or_path, stored, lora)
    elif lora is not None:
        lora_config({} if lora == "default" else lora)
    quantized_model_kwargs(quantization)
    text_config = LLM2CLIPConfig(text_config=config.get_text_config()).text_config  # a decoder that looks both ways
    with torch.device("meta"):
        AutoModel.from_config(text_config, attn_implementation=attn_implementation)
    trained = stored["pooling"] if stored is not None else getattr(text_config, "text_pooling", None)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    _finished_tokenizer(tokenizer, template, _MAX_LENGTH, _chosen_pooling(pooling, trained))


def _chosen_pooling(pooling: str | None, trained: str | None) -> str:
    if pooling is not None and trained not in (None, pooling):
        logger.warning("The encoder was trained with `pooling=%r`; it gets %r now.", trained, pooling)
    return pooling or trained or "mean"


def _chosen_length(max_length: int | None, stored: Mapping[str, Any], tokenizer: Any, llm: PreTrainedModel) -> int:
    if max_length is None:
        # The tokenizer of a saved encoder ends where its texts did; that of an LLM where the LLM does.
        saved = tokenizer.model_max_length if hasattr(llm.config, "text_pooling") else _MAX_LENGTH
        max_length = int(stored.get("max_length", saved))
    limit = getattr(llm.config, "max_position_embeddings", None) or max_length
    if limit < max_length:
        logger.warning("`max_length` %d is above the LLM's %d positions and lowered to it.", max_length, limit)
    return min(max_length, limit)


def _finished_tokenizer(tokenizer: Any, template: str | None, max_length: int, pooling: str) -> Any:
    """The tokenizer with the template and, for `pooling="eos"`, an end token after every text."""
    finished = apply_text_template(tokenizer, template, max_length)
    if pooling != "eos" or text_end_token(finished) is not None:
        return finished
    end = tokenizer.eos_token
    if end is not None and len(finished("")["input_ids"]) == text_prefix_length(finished) <= 1:
        with_end = apply_text_template(tokenizer, f"{{text}}{end}", max_length)
        if text_end_token(with_end) == tokenizer.eos_token_id:
            return with_end
    raise ValueError(
        f"`pooling` is 'eos', but texts end in no end token with `template={template!r}`. Give a template that ends "
        f"in one, such as '{{text}}{end or '<end>'}', or use `pooling='last'`."
    )


def _load_transformer(
    name_or_path: str, revision: str | None, bidirectional: bool, **model_kwargs: Any
) -> Transformer:
    options = {} if revision is None else {"revision": revision}
    transformer = Transformer(
        name_or_path,
        model_kwargs={key: value for key, value in model_kwargs.items() if value is not None} | options,
        config_kwargs=dict(options),
        processor_kwargs=dict(options),
        modality_config=_MODALITY_CONFIG,
        module_output_name="token_embeddings",
    )
    if bidirectional:
        # On the config: that is saved and honoured for every mask; a keyword of `from_pretrained` is dropped silently.
        transformer.model.config.is_causal = False
        assert_bidirectional(transformer.model)
    return transformer


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
