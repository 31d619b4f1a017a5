# SPDX-License-Identifier: Apache-2.0
"""Turns published checkpoints of LLM2CLIP into folders that `AutoModel` loads.

(1) Read the tensors, and find out by their names what they are.
(2) Read every size of the model from their shapes, and give them our names.
(3) Build the model; every key that is missing or left over must have been declared, or nothing is written.
(4) Write a temporary folder, load it again, compare weights and outputs, move it into place.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..files import temporary_folder
from ..modeling import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor, text_prefix_length
from ..modeling.loading_llm2clip import load_pretrained_text
from .cards import CONVERTED, conversion_card
from .checkpoint_files import (
    MODEL,
    Checkpoint,
    check_keys,
    check_loaded,
    check_values,
    find_source,
    read_checkpoint,
    read_image_processor,
)
from .eva_keys import eva_tower, is_eva
from .gguf import GGUF_KIND, convert_gguf
from .text_keys import (
    Adaptor,
    TextModel,
    find_adaptor,
    is_language_model,
    quiet_transformers,
    read_language_model,
    read_text_model,
    save_language_model,
)
from .vision_keys import (
    START_TYPES,
    Tower,
    open_clip_tower,
    siglip_tower,
    transformers_clip_tower,
    transformers_start,
)


logger = logging.get_logger(__name__)
# Where each kind keeps its text adaptor; the online setting wraps it around its LLM.
_ADAPTOR_PREFIXES = ("text_adapter.adaptor.", "text.text_adaptor.", "text.text_proj.text_adaptor.")
# A CLIP's own text tower, in any layout. Where there is none, the projection is not that of a CLIP.
_TEXT_TOWER = re.compile(r"(text|text_model|text_projection|transformer|token_embedding|ln_final)(\..*)?")
# The LLM of the online setting: named by the user, never taken from there.
_ONLINE_LLM = (r"text\.text\..*",)
# Agreement of the written folder with the converted model: rounding of matrix products, nothing else.
_TOLERANCE = 1e-5


def check_output(output: Path, source: Path) -> None:
    """Refuses a target that a conversion must not replace."""
    if output.exists() and source.exists() and output.resolve() == source.resolve():
        raise ValueError(f"`output_dir` {str(output)!r} is the source. Give another folder.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output_dir` {str(output)!r} is a file. Give a folder.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    card = output / "README.md"
    # Modules of sentence-transformers are the only folders that a conversion writes.
    foreign = sorted(each.name for each in output.iterdir() if each.is_dir() and not each.name[0].isdigit())
    if foreign or not card.is_file() or CONVERTED not in card.read_text(encoding="utf-8", errors="replace"):
        named = f", such as {foreign[0]!r}" if foreign else ""
        raise ValueError(f"`output_dir` {str(output)!r} holds other files{named}. Give a new or empty folder.")


@dataclass
class ConversionReport:
    """
    What [`convert_checkpoint`] did.

    Args:
        kind (`str`): What the source was found to be.
        output_dir (`Path`): The folder that was written.
        config (`PreTrainedConfig`): Config of the model in it: an `LLM2CLIPConfig`, or that of an LLM.
        dropped_keys (`list[str]`): Keys of the source that were declared to carry nothing, and left behind.
        new_keys (`list[str]`): Weights that the source does not have and that are initialised (a starting tower).
        max_difference (`float`): Largest difference between outputs of the folder and of the converted model.
    """

    kind: str
    output_dir: Path
    config: PreTrainedConfig
    dropped_keys: list[str]
    new_keys: list[str]
    max_difference: float


def convert_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    *,
    text_model: str | None = None,
    text_weights: str = "external",
    model_config: str | Path | None = None,
    logit_scale_init_value: float | str | None = None,
) -> ConversionReport:
    r"""
    Converts a published checkpoint of LLM2CLIP, a vision tower to start one from, or a caption-tuned LLM.

    The kind is told by the names of the weights, every size by their shapes: the Hugging Face folders with an OpenAI
    tower, the `.pt` files with an EVA tower, training checkpoints with an OpenAI tower, SigLIP2 with the LLM online,
    the vision side alone, and as starting towers CLIP and SigLIP folders of transformers and checkpoints of open_clip.
    The LLM is not part of them; `text_model` names it. What a starting tower lacks, projection and adaptor, is new,
    with fixed seeds. A folder of a Llama becomes a plain bidirectional LLM with the template in its tokenizer, for
    `text_model`, `LLM2CLIPModel.from_vision_text_pretrained` and `training.build_caption_encoder`. A gguf file of a
    decoder becomes a plain causal LLM in float32, its tokenizer as it was, to start stage 1 from.

    Weights are written as float32, an LLM's in their own dtype. The folder appears whole or not at all, with a model
    card; converting again replaces it.

    Args:
        source (`str` or `Path`): File, folder or repository. Pickled files are read as tensors only.
        output_dir (`str` or `Path`): Folder to write: new, empty, or one that a conversion wrote, which is replaced.
        text_model (`str`, *optional*):
            Repository or folder of the LLM, checked against the adaptor's width. `None` or `"none"` for a model that
            takes stored LLM embeddings.
        text_weights (`str`, *optional*, defaults to `"external"`):
            `"external"` names the LLM in the config; `"bundled"` copies its weights into the folder.
        model_config (`str` or `Path`, *optional*):
            The original model JSON, for what shapes do not tell: `head_width`, `postnorm`, `quick_gelu`. Defaults to
            a JSON file of the same name beside the weights or `open_clip_config.json`, if there is one, else to the
            published towers' values.

        logit_scale_init_value (`float` or `str`, *optional*):
            Of a starting tower, the logarithm of the logit scale that training starts from; `"pretrained"` keeps the
            trained one of the checkpoint. Defaults to 2.6592, as in `LLM2CLIPModel.from_vision_text_pretrained`. A
            whole LLM2CLIP keeps its own.

    Returns:
        [`ConversionReport`]

    Raises:
        ValueError: if the source cannot be read, is of no known kind or incomplete, has keys that are not known or
            weights that are not finite, if the LLM does not fit, or the written folder does not give the same outputs.
    """
    output = Path(output_dir)
    check_output(output, Path(source))
    if text_weights not in ("external", "bundled"):
        raise ValueError(f"`text_weights` must be 'external' or 'bundled', got {text_weights!r}.")
    if Path(source).is_file() and Path(source).suffix == ".gguf":
        _check_only_llm(str(source), text_model, logit_scale_init_value)
        config, difference = convert_gguf(Path(source), output)
        return ConversionReport(GGUF_KIND, output, config, [], [], difference)
    # Step (1)
    found = find_source(source, model_config)
    if (found.config or {}).get("model_type") == LLM2CLIPConfig.model_type:
        raise ValueError(f"{found.name!r} is converted already: `AutoModel.from_pretrained` loads it.")
    if is_language_model(found.config):
        _check_only_llm(found.name, text_model, logit_scale_init_value)
        return _convert_language_model(found, output)
    return _convert_model(found, output, text_model, text_weights, logit_scale_init_value)


def _convert_model(
    found: Checkpoint, output: Path, text_model: str | None, text_weights: str, given_scale: float | str | None
) -> ConversionReport:
    """An LLM2CLIP, or a tower to start one from."""
    checkpoint = read_checkpoint(found)
    prefix = next((p for p in _ADAPTOR_PREFIXES if any(key.startswith(p) for key in checkpoint.weights)), None)
    # Step (2)
    kind, tower = _read_tower(checkpoint, is_start=prefix is None)
    adaptor = None if prefix is None else find_adaptor(checkpoint.weights, prefix)
    is_online = prefix == _ADAPTOR_PREFIXES[2]
    if is_online:
        tower.droppable += _ONLINE_LLM
    weights, dropped = _collect(checkpoint, tower, adaptor)
    scale = _starting_scale(checkpoint, weights, adaptor, given_scale)
    if scale is not None:
        dropped += ["logit_scale"] if weights.pop("logit_scale", None) is not None else []
    text = read_text_model(text_model, None if adaptor is None else adaptor.llm_hidden_size)
    config = _build_config(checkpoint, tower, adaptor, text, normalize=not is_online)
    if scale is not None:
        config.logit_scale_init_value = scale
    with quiet_transformers():
        # Step (3)
        model, new_keys = _build_model(checkpoint, config, weights, is_start=adaptor is None)
        if text is not None and text_weights == "bundled":
            _bundle_text_model(model)
        # Step (4)
        card = conversion_card(
            found.name,
            kind,
            model.config,
            text_model=text and text.name,
            text_weights=text_weights,
            new_keys=len(new_keys),
        )
        difference = _write(model, checkpoint, text, output, card)
    logger.info("%s is %s; left behind: %s", checkpoint.name, kind, ", ".join(dropped) or "nothing")
    return ConversionReport(kind, output, model.config, dropped, new_keys, difference)


def _check_only_llm(name: str, text_model: str | None, scale: float | str | None) -> None:
    if text_model not in (None, "none"):
        raise ValueError(f"{name!r} is an LLM itself. Leave `text_model` out, got {text_model!r}.")
    _check_no_scale(name, scale)


def _check_no_scale(name: str, given: float | str | None) -> None:
    if given is not None:
        raise ValueError(
            f"`logit_scale_init_value` is {given!r}, but {name!r} is no tower to start from. Leave it out."
        )


def _starting_scale(
    checkpoint: Checkpoint, weights: dict[str, torch.Tensor], adaptor: Adaptor | None, given: float | str | None
) -> float | None:
    """The logarithm of the logit scale that a starting tower gets; `None` where the checkpoint's own is kept."""
    if adaptor is not None or _is_vision_side(checkpoint.weights):
        _check_no_scale(checkpoint.name, given)
        return None
    if given == "pretrained":
        if "logit_scale" not in weights:
            raise ValueError(
                f"`logit_scale_init_value` is 'pretrained', but {checkpoint.name!r} has no `logit_scale`. Give a "
                "number, or leave it out."
            )
        return None
    if isinstance(given, str):
        raise ValueError(f"`logit_scale_init_value` must be a number or 'pretrained', got {given!r}.")
    return LLM2CLIPConfig().logit_scale_init_value if given is None else given


def _convert_language_model(source: Checkpoint, output: Path) -> ConversionReport:
    kind = "caption-tuned LLM"
    with quiet_transformers():
        language_model = read_language_model(source)
        template = language_model.tokenizer.decode(language_model.tokenizer("{text}")["input_ids"])
        config = language_model.model.config
        with temporary_folder(output) as folder:
            difference = save_language_model(language_model, folder)
            (folder / "README.md").write_text(conversion_card(source.name, kind, template=template), encoding="utf-8")
    return ConversionReport(kind, output, config, language_model.dropped_keys, [], difference)


def _is_vision_side(weights: dict[str, torch.Tensor]) -> bool:
    return not any(_TEXT_TOWER.fullmatch(key) for key in weights)


def _read_tower(checkpoint: Checkpoint, is_start: bool) -> tuple[str, Tower]:
    """The vision tower, by the weights that only one kind has."""
    weights = checkpoint.weights
    start = "starting tower" if is_start else "LLM2CLIP"
    if "visual.patch_embed.proj.weight" in weights or is_eva(weights):
        return f"{start}, EVA tower", eva_tower(checkpoint)
    if "visual.trunk.pos_embed" in weights:
        return f"{start}, SigLIP tower of timm", siglip_tower(checkpoint)
    if "visual.conv1.weight" in weights:
        return f"{start}, OpenAI tower of open_clip", open_clip_tower(checkpoint, is_start)
    model_type = (checkpoint.config or {}).get("model_type")
    is_clip = "vision_model.embeddings.class_embedding" in weights
    if is_clip and (not is_start or ("visual_projection.weight" in weights and _is_vision_side(weights))):
        return f"{start}, OpenAI tower of transformers", transformers_clip_tower(checkpoint)
    if is_start and model_type in START_TYPES:
        return f"{start}, {model_type} of transformers", transformers_start(checkpoint, str(model_type))
    tops = sorted({key.split(".")[0] for key in weights})
    shown = ", ".join(tops[:8]) + (", ..." if len(tops) > 8 else "")
    raise ValueError(
        f"{checkpoint.name!r} is none of the checkpoints that can be converted: its weights are `{shown}`"
        f"{f', its model type {model_type!r}' if model_type else ''}. Expected are LLM2CLIP with an OpenAI, EVA or "
        "SigLIP tower, CLIP or SigLIP as a starting tower, or a Llama; `LLM2CLIPModel.from_vision_text_pretrained` "
        "takes any other vision backbone of transformers."
    )


def _collect(
    checkpoint: Checkpoint, tower: Tower, adaptor: Adaptor | None
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """All weights under our names in float32, and the keys that were dropped; fails for any other key."""
    weights = dict(tower.weights)
    known = set(tower.source_keys)
    droppable = tower.droppable
    left_out: set[str] = set()
    if adaptor is None:
        droppable += tower.start_droppable
        if not _is_vision_side(checkpoint.weights):
            # The original starts from a CLIP with a new projection. The vision side of an LLM2CLIP, which comes
            # without any text tower, keeps its own.
            left_out = tower.projection_keys
            weights = {key: value for key, value in weights.items() if not key.startswith("visual_projection.")}
    else:
        weights.update(adaptor.weights)
        known |= adaptor.source_keys
    for name in ("logit_scale", "logit_bias"):
        value = checkpoint.weights.get(name)
        if value is not None:
            if value.numel() != 1:
                raise ValueError(f"`{name}` must be one number, got shape {tuple(value.shape)}.")
            weights[name] = value.reshape(1)
            known.add(name)
    dropped = [
        key
        for key in checkpoint.weights
        if key in left_out or (key not in known and any(re.fullmatch(pattern, key) for pattern in droppable))
    ]
    check_keys(checkpoint.name, MODEL, unexpected=checkpoint.weights.keys() - known - set(dropped))
    check_values(checkpoint.name, weights)
    return {key: value.float().contiguous() for key, value in weights.items()}, dropped


def _build_config(
    checkpoint: Checkpoint, tower: Tower, adaptor: Adaptor | None, text: TextModel | None, normalize: bool
) -> LLM2CLIPConfig:
    fields: dict[str, Any] = {"vision_config": tower.config, "vision_projection": tower.projection}
    projection = tower.weights.get("visual_projection.weight")
    if tower.projection == "none":
        fields["projection_dim"] = tower.config.hidden_size
    elif projection is not None and _is_vision_side(checkpoint.weights):
        fields["projection_dim"] = projection.shape[0]
    if adaptor is not None:
        _check_adaptor(checkpoint, tower, adaptor)
        fields.update(
            projection_dim=adaptor.projection_dim,
            adapter_num_layers=adaptor.num_layers,
            adapter_expansion=adaptor.expansion,
            llm_hidden_size=adaptor.llm_hidden_size,
            # As coded in the original: not where the adaptor is wrapped around an LLM that runs online.
            normalize_llm_embeds=normalize,
        )
    if "logit_bias" in checkpoint.weights:
        fields["logit_bias_init_value"] = float(checkpoint.weights["logit_bias"].float())
    if text is not None:
        fields.update(
            text_config=text.config,
            text_weights="external",
            text_base_model=text.name,
            text_base_revision=text.revision,
            text_prefix_length=text_prefix_length(text.tokenizer),
        )
    return LLM2CLIPConfig(**fields)


def _check_adaptor(checkpoint: Checkpoint, tower: Tower, adaptor: Adaptor) -> None:
    """Both sides must end in one space, and a config that came along must agree."""
    projection = tower.weights.get("visual_projection.weight")
    width = tower.config.hidden_size if projection is None else projection.shape[0]
    if width != adaptor.projection_dim:
        raise ValueError(
            f"The images of {checkpoint.name!r} end in {width} dimensions, its texts in {adaptor.projection_dim}. The "
            "parts come from different models."
        )
    original = checkpoint.model_config or {}
    stated = {
        "`embed_dim`": (original.get("embed_dim"), adaptor.projection_dim),
        "`llm_embedding_dim`": (original.get("text_cfg", {}).get("llm_embedding_dim"), adaptor.llm_hidden_size),
        "`projection_dim`": ((checkpoint.config or {}).get("projection_dim"), adaptor.projection_dim),
    }
    wrong = [f"{name} is {a} but {b} in the weights" for name, (a, b) in stated.items() if a not in (None, b)]
    if wrong:
        raise ValueError(f"The config does not belong to the weights of {checkpoint.name!r}: {'; '.join(wrong)}.")


def _build_model(
    checkpoint: Checkpoint, config: LLM2CLIPConfig, weights: dict[str, torch.Tensor], is_start: bool
) -> tuple[LLM2CLIPModel, list[str]]:
    """The model in evaluation mode without its LLM, and the names of the weights that are new."""
    weights = dict(weights)
    # A model whose top-level parameters are all there initialises none of the rest from the top, where the adaptor's
    # initialisation is; so they follow.
    later = {name: weights.pop(name) for name in ("logit_scale", "logit_bias") if is_start and name in weights}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same starting model every time
        model, info = LLM2CLIPModel.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.float32,
            load_text_model=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    with torch.no_grad():
        for name, value in later.items():
            model.get_parameter(name).copy_(value)
    added = ("visual_projection.", "text_adapter.", "logit_") if is_start else ()
    new = sorted(key for key in info["missing_keys"] if key.startswith(added) and key not in later)
    check_loaded(checkpoint.name, {**info, "missing_keys": set(info["missing_keys"]) - set(new) - set(later)})
    return model, new


def _bundle_text_model(model: LLM2CLIPModel) -> None:
    config = model.config
    text_model = load_pretrained_text(config.text_base_model, config.text_base_revision, {"trust_remote_code": False})
    vars(text_model.config).pop("auto_map", None)
    model.attach_text_model(text_model, text_weights="bundled")


def _write(model: LLM2CLIPModel, checkpoint: Checkpoint, text: TextModel | None, output: Path, card: str) -> float:
    """Writes the folder and checks it; returns the largest difference of its outputs."""
    image_processor = read_image_processor(checkpoint, model.config.vision_config.image_size)
    processor = LLM2CLIPProcessor(image_processor, None if text is None else text.tokenizer)
    with temporary_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        return _verify(model, folder)


@torch.no_grad()
def _verify(model: LLM2CLIPModel, folder: Path) -> float:
    """Loads `folder` and compares its weights and outputs with those of `model`."""
    loaded = LLM2CLIPModel.from_pretrained(folder, load_text_model=model.text_model is not None)
    expected, given = model.state_dict(), loaded.state_dict()
    changed = sorted(set(expected) ^ set(given))
    changed += [key for key in expected if key in given and not torch.equal(expected[key], given[key])]
    if changed:
        raise ValueError(f"The written folder does not load as it was written: {', '.join(changed[:5])} changed.")
    config = model.config
    generator = torch.Generator().manual_seed(0)
    size = config.vision_config.image_size
    inputs = {
        "pixel_values": torch.randn(2, config.vision_config.num_channels, size, size, generator=generator),
        "llm_embeds": torch.randn(3, config.llm_hidden_size, generator=generator),
    }
    before, after = model.eval()(**inputs), loaded.eval()(**inputs)
    difference = max(float((before[name] - after[name]).abs().max()) for name in ("image_embeds", "text_embeds"))
    if not difference <= _TOLERANCE:
        raise ValueError(f"The written folder gives outputs that differ by {difference:.1e} from the source's.")
    return difference


__all__ = ["ConversionReport", "convert_checkpoint"]
