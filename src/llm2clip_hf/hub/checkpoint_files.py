# SPDX-License-Identifier: Apache-2.0
"""Reads a published checkpoint, file, folder or repository, into plain tensors; no code in it is ever run."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPImageProcessorPil
from transformers.image_utils import PILImageResampling


_WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")
# Configs and tokenizers.
_SMALL_FILES = (".json", ".jinja", "tokenizer.model")
# In this order. In a repository with a `.pt` beside other formats, the `.pt` is the whole model and the others hold
# its vision tower only. DeepSpeed writes optimizer states beside the model's; open_clip writes its weights twice.
_CHOICES = (
    r"mp_rank_00_model_states\.pt",
    r".*\.pth?",
    r"model(-\d+-of-\d+)?\.safetensors",
    r"pytorch_model(-\d+-of-\d+)?\.bin",
    r"open_clip_(pytorch_)?model\.safetensors",
    r"open_clip_pytorch_model\.bin",
    r".*",
)
_OPEN_CLIP_CONFIG = "open_clip_config.json"
# Where training scripts put the weights among optimizer states and counters.
_WRAPPERS = ("state_dict", "module", "model")
# What distributed training and compilation put before every name.
_PREFIXES = ("module.", "_orig_mod.")


@dataclass
class Source:
    """A checkpoint that has been found, but not read."""

    name: str
    files: list[Path]
    folder: Path
    config: dict[str, Any] | None = None
    model_config: dict[str, Any] | None = None


@dataclass
class Checkpoint:
    """A checkpoint as it was found."""

    name: str
    weights: dict[str, torch.Tensor]
    config: dict[str, Any] | None = None
    model_config: dict[str, Any] | None = None
    folder: Path | None = None


def find_source(source: str | Path, model_config: str | Path | None = None) -> Source:
    """Finds the files of a checkpoint, and fetches those of a repository."""
    path = Path(source)
    if path.is_file():
        folder, config, files = path.parent, None, [path]
    else:
        folder = path if path.is_dir() else _download(str(source))
        files = [folder / name for name in pick_weight_files(str(source), (p.name for p in folder.iterdir()))]
        # A `config.json` beside a `.pt` or open_clip's weights belongs to other files.
        foreign = files[0].suffix in (".pt", ".pth") or files[0].name.startswith("open_clip")
        own_config = folder / "config.json"
        config = _read_json(own_config) if own_config.is_file() and not foreign else None
    if model_config is None and config is None:
        beside = (files[0].with_suffix(".json"), folder / _OPEN_CLIP_CONFIG)
        model_config = next((file for file in beside if file.is_file()), None)
    original = None if model_config is None else _read_json(Path(model_config))
    return Source(str(source), files, folder, config, original)


def read_checkpoint(source: Source) -> Checkpoint:
    """Reads all tensors of a checkpoint."""
    weights: dict[str, torch.Tensor] = {}
    for file in source.files:
        weights.update(read_weights(file))
    if not weights:
        raise ValueError(f"{source.name!r} holds no weights. Give a checkpoint of LLM2CLIP.")
    return Checkpoint(source.name, weights, source.config, source.model_config, source.folder)


def pick_weight_files(name: str, file_names: Iterable[str]) -> list[str]:
    """
    The files, of all in a folder, that together hold the model.

    One `.pt` if there is one; else what transformers writes, safetensors before pickled files; else the only weights
    file there is.
    """
    found = sorted(f for f in file_names if f.endswith(_WEIGHTS))
    for pattern in _CHOICES:
        chosen = [f for f in found if re.fullmatch(pattern, f)]
        if chosen and all("-of-" in f for f in chosen):
            _check_shards(name, chosen)
            return chosen
        if len(chosen) == 1:
            return chosen
        if chosen:
            break
    if found:
        raise ValueError(f"{name!r} holds several checkpoints: {', '.join(found)}. Give the path of one of them.")
    raise ValueError(
        f"{name!r} holds no weights: no file ends in {', '.join(_WEIGHTS)}. Give the folder or repository of a "
        "checkpoint."
    )


def _check_shards(name: str, files: list[str]) -> None:
    """All parts of one checkpoint, each once."""
    parts = [match for file in files if (match := re.search(r"-(\d+)-of-(\d+)\.", file))]
    numbers, totals = sorted(int(part[1]) for part in parts), {int(part[2]) for part in parts}
    if len(parts) != len(files) or len(totals) != 1 or numbers != list(range(1, totals.pop() + 1)):
        raise ValueError(
            f"{name!r} does not hold all the parts of its checkpoint, only {', '.join(files)}. Get it again."
        )


def _download(name: str) -> Path:
    """The snapshot of a repository, with the chosen weights and the small files, but no code."""
    failure: Exception | None = None
    try:
        files = [f for f in HfApi().list_repo_files(name) if "/" not in f]
    except (OSError, RuntimeError, ValueError) as error:  # offline, no such repository, no access
        failure = error
        patterns = [f"*{suffix}" for suffix in (*_SMALL_FILES, *_WEIGHTS)]
    else:
        patterns = [*pick_weight_files(name, files), *(f for f in files if f.endswith(_SMALL_FILES))]
    try:
        # Without a list of files only what the cache holds can be had.
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=failure is not None))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(failure or error).split())[:200]
        raise ValueError(
            f"{name!r} is neither a file, nor a folder, nor a repository that can be fetched ({reason}). Check the "
            "name, and the connection."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not readable JSON: {error}. Get it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(content).__name__}.")
    return content


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file; code in it is not run."""
    if path.suffix not in _WEIGHTS:
        raise ValueError(f"{str(path)!r} must end in one of {', '.join(_WEIGHTS)}. Give the file with the weights.")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged files make the readers raise almost anything; the kind of error says nothing to the user.
        with path.open("rb") as file:
            is_pickle = file.read(2)[:1] in (b"P", b"\x80")  # a zip archive, or a bare pickle
        if is_pickle and "weights_only" in str(error):
            raise ValueError(
                f"{str(path)!r} holds more than tensors (pickled code or objects), which is not loaded. Save its "
                "`state_dict` alone, in a process that trusts it."
            ) from error
        raise ValueError(
            f"{str(path)!r} cannot be read; it is damaged, cut short or no checkpoint ({type(error).__name__}). "
            "Download it again."
        ) from error
    return _as_tensors(path, content)


def _as_tensors(path: Path, content: Any) -> dict[str, torch.Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a dictionary of tensors, got {type(content).__name__}.")
    others = sorted(str(key) for key, value in content.items() if not isinstance(value, torch.Tensor))
    if others:
        raise ValueError(
            f"{str(path)!r} holds entries that are not tensors: {', '.join(others[:5])}. Save its `state_dict` alone."
        )
    tensors = {str(key): value for key, value in content.items()}
    while prefix := next((p for p in _PREFIXES if tensors and all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


_FILES = ("preprocessor_config.json", "processor_config.json")


def read_image_processor(checkpoint: Checkpoint, image_size: int) -> Any:
    """
    The image processor that came with a checkpoint; else that of the original implementation.

    The original uses one for every tower: OpenAI's statistics, bicubic resize of the shorter side, centre crop.
    """
    folder = checkpoint.folder
    if checkpoint.config is not None and folder and any((folder / name).is_file() for name in _FILES):
        try:
            return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"The image preprocessing of {checkpoint.name!r} cannot be read ({reason}). "
                "Code of a repository is never run: put a `preprocessor_config.json` of transformers beside the "
                "weights, or remove the one that is there for the original's preprocessing."
            ) from error
    fields: dict[str, Any] = {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
    }
    stated = (checkpoint.model_config or {}).get("preprocess_cfg", {})
    fields |= {ours: stated[name] for name, ours in (("mean", "image_mean"), ("std", "image_std")) if name in stated}
    if stated.get("resize_mode", "shortest") == "squash":
        fields |= {"size": {"height": image_size, "width": image_size}, "do_center_crop": False}
    elif stated.get("resize_mode", "shortest") != "shortest":
        raise ValueError(
            f"`preprocess_cfg.resize_mode` of {checkpoint.name!r} must be 'shortest' or 'squash', got "
            f"{stated['resize_mode']!r}."
        )
    if stated.get("interpolation", "bicubic") not in ("bicubic", "bilinear"):
        raise ValueError(
            f"`preprocess_cfg.interpolation` of {checkpoint.name!r} must be 'bicubic' or 'bilinear', got "
            f"{stated['interpolation']!r}."
        )
    if stated.get("interpolation") == "bilinear":
        fields["resample"] = PILImageResampling.BILINEAR
    return CLIPImageProcessorPil(**fields)


__all__ = [
    "Checkpoint",
    "Source",
    "find_source",
    "pick_weight_files",
    "read_checkpoint",
    "read_image_processor",
    "read_weights",
]
