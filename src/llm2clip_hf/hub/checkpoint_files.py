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


_WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")
# In this order. In a repository with a `.pt` beside other formats, the `.pt` is the whole model and the others hold
# its vision tower only.
_CHOICES = (
    r".*\.pth?",
    r"model(-\d+-of-\d+)?\.safetensors",
    r"pytorch_model(-\d+-of-\d+)?\.bin",
    r".*",
)
# Where training scripts put the weights among optimizer states and counters.
_WRAPPERS = ("state_dict", "module", "model")


@dataclass
class Checkpoint:
    """
    A checkpoint as it was found.

    Args:
        name (`str`): How messages call it.
        weights (`dict[str, torch.Tensor]`): All its tensors, by their own names and in their own dtypes.
        config (`dict`, *optional*): The `config.json` of a folder in the format of transformers.
        model_config (`dict`, *optional*): The JSON with which the original implementation builds the model.
        folder (`Path`, *optional*): The folder that holds it.
    """

    name: str
    weights: dict[str, torch.Tensor]
    config: dict[str, Any] | None = None
    model_config: dict[str, Any] | None = None
    folder: Path | None = None


def read_checkpoint(source: str | Path, model_config: str | Path | None = None) -> Checkpoint:
    """
    Reads a checkpoint.

    Args:
        source (`str` or `Path`):
            A `.pt`, `.pth`, `.bin` or `.safetensors` file, a folder that holds one (or the shards of one), or a
            repository.
        model_config (`str` or `Path`, *optional*):
            The original model JSON. A JSON file of the same name beside a weights file is read without being asked.

    Returns:
        [`Checkpoint`]

    Raises:
        ValueError: if it cannot be found, or a file is damaged, holds code or is not a dictionary of tensors.
    """
    path = Path(source)
    if path.is_file():
        json_beside = path.with_suffix(".json")
        if model_config is None and json_beside.is_file():
            model_config = json_beside
        folder, config, files = path.parent, None, [path]
    else:
        folder = path if path.is_dir() else _download(str(source))
        files = [folder / name for name in pick_weight_files(str(source), (p.name for p in folder.iterdir()))]
        # A `config.json` beside a `.pt` belongs to other files.
        has_config = (folder / "config.json").is_file() and files[0].suffix not in (".pt", ".pth")
        config = _read_json(folder / "config.json") if has_config else None
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        weights.update(_read_weights(file))
    if not weights:
        raise ValueError(f"{str(source)!r} holds no weights. Give a checkpoint of LLM2CLIP.")
    original = None if model_config is None else _read_json(Path(model_config))
    return Checkpoint(str(source), weights, config, original, folder)


def pick_weight_files(name: str, file_names: Iterable[str]) -> list[str]:
    """
    The files, of all in a folder, that together hold the model.

    One `.pt` if there is one; else what transformers writes, safetensors before pickled files; else the only weights
    file there is.

    Raises:
        ValueError: if there is none, or there are several to choose from.
    """
    found = sorted(f for f in file_names if f.endswith(_WEIGHTS))
    for pattern in _CHOICES:
        chosen = [f for f in found if re.fullmatch(pattern, f)]
        if len(chosen) == 1 or (chosen and all("-of-" in f for f in chosen)):
            return chosen
        if chosen:
            break
    if found:
        raise ValueError(f"{name!r} holds several checkpoints: {', '.join(found)}. Give the path of one of them.")
    raise ValueError(
        f"{name!r} holds no weights: no file ends in {', '.join(_WEIGHTS)}. Give the folder or repository of a "
        "checkpoint."
    )


def _download(name: str) -> Path:
    """The snapshot of a repository, with the chosen weights and the small files, but no code."""
    failure: Exception | None = None
    try:
        files = [f for f in HfApi().list_repo_files(name) if "/" not in f]
    except (OSError, RuntimeError, ValueError) as error:  # offline, no such repository, no access
        failure = error
        patterns = ["*.json", *(f"*{suffix}" for suffix in _WEIGHTS)]
    else:
        patterns = [*pick_weight_files(name, files), *(f for f in files if f.endswith(".json"))]
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


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
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
    # Wrappers for distributed training put a prefix on every name.
    prefix = "module." if content and all(str(key).startswith("module.") for key in content) else ""
    others = sorted(str(key) for key, value in content.items() if not isinstance(value, torch.Tensor))
    if others:
        raise ValueError(
            f"{str(path)!r} holds entries that are not tensors: {', '.join(others[:5])}. Save its `state_dict` alone."
        )
    return {str(key).removeprefix(prefix): value for key, value in content.items()}


__all__ = ["Checkpoint", "pick_weight_files", "read_checkpoint"]
