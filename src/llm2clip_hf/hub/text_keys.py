# SPDX-License-Identifier: Apache-2.0
"""Caption-tuned LLMs: as the text side of a converted model, and as checkpoints to convert themselves.

The published ones are Llama decoders that a class of their repository makes bidirectional, under the string template
that their encoding script puts around every text. Here both are settings of plain files: `is_causal=False` in the
config and the template in the tokenizer, so no code of the repository is needed, and none is ever run.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging

from ..modeling import apply_text_template, assert_bidirectional
from ..modeling.loading_llm2clip import load_text_config, pin_revision
from ..modeling.processing_llm2clip import record_text_settings
from .checkpoint_files import PUBLISHED_LLMS, Checkpoint, check_keys, check_values, one_line, read_weights


_LLAMA3_MARKERS = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
# Fields that name code, classes or files instead of describing the model.
_NOT_OF_THE_MODEL = ("auto_map", "architectures", "_name_or_path", "model_type", "transformers_version")
# What published decoders carry besides the decoder: a language modelling head, and frequencies that are computed.
_DROPPABLE = ("lm_head.weight", "rotary_emb.inv_freq")


class TextModel(NamedTuple):
    """An LLM that a converted model names: where it is, its commit, its config, its tokenizer with the template."""

    name: str
    revision: str | None
    config: PreTrainedConfig
    tokenizer: Any


class LanguageModel(NamedTuple):
    """An LLM read from a checkpoint, with what was left behind."""

    model: Any
    tokenizer: Any
    dropped_keys: list[str]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its tables of missing keys and progress bars: what matters of it is reported here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def caption_tokenizer(tokenizer: Any) -> Any:
    """
    The tokenizer with the template of the original implementation: for Llama 3 its user turn, whether or not a chat
    template came along; for other families what `apply_text_template` finds.
    """
    is_llama3 = _LLAMA3_MARKERS <= tokenizer.get_added_vocab().keys()
    return apply_text_template(tokenizer, "llama3" if is_llama3 else "auto")


def read_text_model(name: str | None, width: int | None) -> TextModel | None:
    """The LLM that a converted model is to name; code of its repository is never run."""
    if name is None or name == "none":
        return None
    try:
        source = pin_revision(name, {"trust_remote_code": False})
        config = load_text_config(name, source)
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The LLM {name!r} cannot be read ({one_line(error)}). Give the repository or folder of a decoder with "
            "its tokenizer, or 'none'."
        ) from error
    config = getattr(config, "text_config", None) or config  # of a multimodal model, the language model
    found = getattr(config, "hidden_size", None)
    if width is not None and found is not None and found != width:
        published = PUBLISHED_LLMS.get(width)
        raise ValueError(
            f"The LLM {name!r} is {found} wide, but the text adaptor takes {width}. Name the LLM "
            f"that the checkpoint was trained with{f', for example {published!r}' if published else ''}."
        )
    # It names code of the LLM's repository, which is not used.
    vars(config).pop("auto_map", None)
    # A folder is found again from anywhere.
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    return TextModel(name, source.get("revision"), config, caption_tokenizer(tokenizer))


def is_language_model(config: dict[str, Any] | None) -> bool:
    """Whether a `config.json` describes a decoder and nothing else."""
    if not config or "vision_config" in config or "image_size" in config:
        return False
    return all(isinstance(config.get(name), int) for name in ("vocab_size", "hidden_size", "num_hidden_layers"))


def read_language_model(source: Checkpoint) -> LanguageModel:
    """
    Reads a decoder as a plain bidirectional model of transformers, in the dtype of its checkpoint.

    Keys may carry the prefix `model.` or not, and a language modelling head, which is left behind.
    """
    config = _language_config(source)
    try:
        tokenizer = caption_tokenizer(
            AutoTokenizer.from_pretrained(source.folder, config=config, trust_remote_code=False)
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source.name!r} has no tokenizer that can be read ({one_line(error)}). Give the whole folder."
        ) from error
    # As in the original; the embeddings do not depend on it.
    tokenizer.padding_side = "left"
    with torch.device("meta"):
        empty = AutoModel.from_config(config)
    weights, dropped = _language_weights(source, {name: value.shape for name, value in empty.state_dict().items()})
    dtypes = {value.dtype for value in weights.values()}
    with quiet_transformers():
        model: Any = type(empty).from_pretrained(
            None, config=config, state_dict=weights, dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer of {source.name!r} knows {len(tokenizer)} tokens, its model {config.vocab_size}. They "
            "belong to different models."
        )
    assert_bidirectional(model)
    return LanguageModel(model.eval(), tokenizer, dropped)


def _language_config(source: Checkpoint) -> PreTrainedConfig:
    fields = dict(source.config or {})
    model_type = str(fields.get("model_type"))
    if model_type not in CONFIG_MAPPING and "llama" in model_type.lower():
        model_type = "llama"  # a class of the repository, which changes the mask only
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_MAPPING:
        raise ValueError(
            f"{source.name!r} is of type {model_type!r}, which this version of transformers does not know. Give a "
            "decoder of a registered architecture, for example a Llama."
        )
    fields = {name: value for name, value in fields.items() if name not in _NOT_OF_THE_MODEL}
    config = CONFIG_MAPPING[model_type].from_dict(fields)
    # Persisted in config.json; the one switch that all attention backends of transformers honour.
    config.is_causal = False
    return config


def _language_weights(source: Checkpoint, expected: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The decoder's weights by the names of transformers, and the keys that were left behind."""
    weights: dict[str, torch.Tensor] = {}
    dropped, unexpected = [], []
    for file in source.files:
        for key, value in read_weights(file).items():
            name = key
            while name not in expected and name.startswith("model."):
                name = name.removeprefix("model.")
            if name in expected:
                if name in weights:
                    raise ValueError(f"{source.name!r} holds `{name}` twice, with and without the prefix `model.`.")
                weights[name] = value
            elif name.endswith(_DROPPABLE):
                dropped.append(key)
            else:
                unexpected.append(key)
    if any(".lora_" in key for key in unexpected):
        raise ValueError(f"{source.name!r} holds LoRA weights that are not merged. Merge them first, with PEFT.")
    check_keys(
        source.name,
        "the decoder of its `config.json`",
        most=8,
        missing=expected.keys() - weights.keys(),
        unexpected=unexpected,
        of_another_shape=[name for name, value in weights.items() if value.shape != expected[name]],
    )
    check_values(source.name, weights)
    return weights, sorted(dropped)


@torch.no_grad()
def save_language_model(language_model: LanguageModel, folder: Path) -> float:
    """Writes model and tokenizer, and checks the folder without holding the weights twice."""
    model, tokenizer, _ = language_model
    # So that whoever attaches the LLM pools as the original does, over the caption and the end-of-turn token.
    record_text_settings(model.config, tokenizer, "mean")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = ["a red boat", "two dogs run over the grass"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    before = model(**batch, use_cache=False).last_hidden_state.float()
    written: dict[str, torch.Tensor] = model.state_dict()
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():
                if not torch.equal(shard.get_tensor(name), written.pop(name)):
                    raise ValueError(f"The written folder does not load as it was written: {name} changed.")
    if written:
        raise ValueError(f"The written folder lacks {', '.join(sorted(written)[:5])}.")
    model.to("meta")
    loaded = AutoModel.from_pretrained(folder, dtype=model.dtype, trust_remote_code=False).eval()
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(texts, padding=True)
    after = loaded(**batch, use_cache=False).last_hidden_state.float()
    difference = float((before - after).abs().max())
    if again["input_ids"] != batch["input_ids"].tolist() or not difference <= 1e-5 * float(before.abs().max()):
        raise ValueError(f"The written folder gives other tokens, or states that differ by {difference:.1e}.")
    return difference


class Adaptor(NamedTuple):
    """What the tensors of an adaptor tell: its sizes, and its weights under our names."""

    num_layers: int
    expansion: int
    llm_hidden_size: int
    projection_dim: int
    weights: dict[str, torch.Tensor]
    source_keys: set[str]


def find_adaptor(weights: dict[str, torch.Tensor], prefix: str) -> Adaptor:
    """
    Reads the adaptor whose modules are numbered after `prefix`: residual blocks, a LayerNorm, a projection.

    The two last ones are told by their number and rank. Of a block only the numbers of its outer module are used:
    inside, the LayerNorm is the module with a one-dimensional weight, the two linear layers follow each other by name
    and their shapes say which comes first. So the inner names do not matter.
    """
    modules: dict[int, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for key in weights:
        match = re.fullmatch(re.escape(prefix) + r"(\d+)\.(?:(.*)\.)?(weight|bias)", key)
        if match is not None:
            modules[int(match[1])][match[2] or ""][match[3]] = key
    numbers = sorted(modules)
    if len(numbers) < 3 or numbers != list(range(len(numbers))):
        raise ValueError(
            f"The text adaptor `{prefix}*` must have modules numbered from 0 without gaps, at least three, got "
            f"{numbers}. The checkpoint is incomplete or of another kind."
        )
    *blocks, norm, projection = numbers
    names = {
        "norm": _single(modules[norm], prefix, norm),
        "projection": _single(modules[projection], prefix, norm + 1),
    }
    shape, norm_shape = (tuple(weights[names[name]["weight"]].shape) for name in ("projection", "norm"))
    if len(shape) != 2 or norm_shape != shape[1:]:
        raise ValueError(
            "The text adaptor must end in a LayerNorm and a linear projection, got shapes "
            f"{norm_shape} and {shape} of `{prefix}{norm}` and `{prefix}{norm + 1}`."
        )
    width = shape[1]
    for number in blocks:
        for role, module in _block(modules[number], weights, width, f"{prefix}{number}").items():
            names[f"blocks.{number}.{role}"] = module
    hidden = weights[names["blocks.0.fc1"]["weight"]].shape[0]
    if hidden % width:
        raise ValueError(
            f"The blocks of the text adaptor are {hidden} wide, which is no multiple of its input width {width}."
        )
    own = {f"text_adapter.{name}.{kind}": weights[key] for name, m in names.items() for kind, key in m.items()}
    used = {key for module in names.values() for key in module.values()}
    return Adaptor(len(blocks), hidden // width, width, shape[0], own, used)


def _single(module: dict[str, dict[str, str]], prefix: str, number: int) -> dict[str, str]:
    if set(module) != {""} or set(module[""]) != {"weight", "bias"}:
        raise ValueError(
            f"`{prefix}{number}`, at the end of the text adaptor, must be one layer with weight and bias, got "
            f"parameters of {sorted(module)}."
        )
    return module[""]


def _block(
    module: dict[str, dict[str, str]], weights: dict[str, torch.Tensor], width: int, name: str
) -> dict[str, dict[str, str]]:
    """The layers of a residual block by their roles; their shapes are checked with those of the whole model."""

    def by_numbers(name: str) -> list[tuple[int, int, str]]:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]

    complete = all(set(layer) == {"weight", "bias"} for layer in module.values())
    shapes = {name: weights[module[name]["weight"]].shape for name in sorted(module, key=by_numbers) if complete}
    norms = [name for name, shape in shapes.items() if len(shape) == 1]
    # The first layer widens, the second narrows; with as many channels as the input, the order of names decides.
    linears = sorted((n for n, shape in shapes.items() if len(shape) == 2), key=lambda n: shapes[n][1] != width)
    if len(norms) != 1 or len(linears) != 2 or len(module) != 3:
        raise ValueError(
            f"`{name}` must be a residual block, a LayerNorm and two linear layers with weight and bias, got "
            f"parameters of {sorted(module)}."
        )
    return {"norm": module[norms[0]], "fc1": module[linears[0]], "fc2": module[linears[1]]}


__all__ = [
    "Adaptor",
    "TextModel",
    "find_adaptor",
    "is_language_model",
    "quiet_transformers",
    "read_language_model",
    "read_text_model",
    "save_language_model",
]
