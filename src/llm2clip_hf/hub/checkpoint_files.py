# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints: which there are, and reading a file, folder or repository into tensors without its code."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPImageProcessorPil
from transformers.image_utils import PILImageResampling

from ..files import read_json_object


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """A checkpoint that the authors of LLM2CLIP have released: an entry of `released.yaml`."""

    repo_id: str
    contents: str
    license: str
    license_note: str
    llm: str
    llm_hidden_size: int
    projection_dim: int = 0
    parameters: float = 0.0
    numbers: Sequence[dict[str, Any]] = ()
    notes: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo_id.split("/")[1]

    @property
    def is_llm(self) -> bool:
        """Whether it is an LLM alone."""
        return self.projection_dim == 0


RELEASED = tuple(
    ReleasedCheckpoint(**entry)
    for entry in yaml.safe_load(Path(__file__).with_name("released.yaml").read_text(encoding="utf-8"))
)
# The published LLMs by their widths.
PUBLISHED_LLMS = {release.llm_hidden_size: release.repo_id for release in RELEASED if release.is_llm}


def find_release(source: str | Path) -> ReleasedCheckpoint | None:
    """The released checkpoint that a source is by its name."""
    for release in RELEASED:
        if str(source) == release.repo_id or Path(source).name in (release.name, f"{release.name}.pt"):
            return release
    return None


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
_AGAIN = "Get it again."
MODEL = "the model that they name"
# Where training scripts put the weights among optimizer states and counters.
_WRAPPERS = ("state_dict", "module", "model")
# What distributed training and compilation put before every name.
_PREFIXES = ("module.", "_orig_mod.")


@dataclass
class Checkpoint:
    """A checkpoint as it was found; without weights until it is read."""

    name: str
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    model_config: dict[str, Any] | None = None
    folder: Path | None = None
    files: Sequence[Path] = ()


def one_line(error: Exception) -> str:
    """What an error of a library says, short enough for an error of ours."""
    return " ".join(str(error).split())[:200]


def check_keys(name: str, model: str, most: int | None = None, **groups: Iterable[Any]) -> None:
    """Every key of a checkpoint must have its place in the model, and every place its key."""
    found = {kind.replace("_", " "): sorted(map(str, keys)) for kind, keys in groups.items()}
    problems = [f"{len(keys)} {kind}: {', '.join(keys[:most])}" for kind, keys in found.items() if keys]
    if problems:
        raise ValueError(
            f"The weights of {name!r} do not make up {model}; {'; '.join(problems)}. The checkpoint is incomplete, or "
            "of another kind."
        )


def check_loaded(name: str, info: dict[str, Any]) -> None:
    """`check_keys` of what loading with transformers reports."""
    check_keys(
        name,
        MODEL,
        missing=info["missing_keys"],
        unexpected=info["unexpected_keys"],
        of_another_shape=info["mismatched_keys"],
    )


def check_values(name: str, weights: dict[str, torch.Tensor]) -> None:
    """Weights are finite floating-point numbers."""
    for key, value in weights.items():
        if not value.is_floating_point():
            raise ValueError(
                f"The weight `{key}` must be floating-point, got {value.dtype}; quantised weights cannot be converted."
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"The weight `{key}` holds NaN or infinite values in {name!r}.")


def find_source(source: str | Path, model_config: str | Path | None = None) -> Checkpoint:
    """Finds the files of a checkpoint, and fetches those of a repository."""
    path = Path(source)
    if path.is_file():
        folder, config, files = path.parent, None, [path]
    else:
        folder = path if path.is_dir() else _download(str(source))
        files = [folder / name for name in _pick_weight_files(str(source), (p.name for p in folder.iterdir()))]
        # A `config.json` beside a `.pt` or open_clip's weights belongs to other files.
        foreign = files[0].suffix in (".pt", ".pth") or files[0].name.startswith("open_clip")
        own_config = folder / "config.json"
        config = read_json_object(own_config, _AGAIN) if own_config.is_file() and not foreign else None
    if model_config is None and config is None:
        beside = (files[0].with_suffix(".json"), folder / _OPEN_CLIP_CONFIG)
        model_config = next((file for file in beside if file.is_file()), None)
    original = None if model_config is None else read_json_object(Path(model_config), _AGAIN)
    return Checkpoint(str(source), {}, config, original, folder, files)


def read_checkpoint(source: Checkpoint) -> Checkpoint:
    """Reads all tensors of a checkpoint."""
    weights: dict[str, torch.Tensor] = {}
    for file in source.files:
        weights.update(read_weights(file))
    if not weights:
        raise ValueError(f"{source.name!r} holds no weights. Give a checkpoint of LLM2CLIP.")
    return replace(source, weights=weights)


def _pick_weight_files(name: str, file_names: Iterable[str]) -> list[str]:
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
        patterns = [*_pick_weight_files(name, files), *(f for f in files if f.endswith(_SMALL_FILES))]
    try:
        # Without a list of files only what the cache holds can be had.
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=failure is not None))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name!r} is neither a file, nor a folder, nor a repository that can be fetched "
            f"({one_line(failure or error)}). Check the name, and the connection."
        ) from error


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
            raise ValueError(
                f"The image preprocessing of {checkpoint.name!r} cannot be read ({one_line(error)}). "
                "Code of a repository is never run: put a `preprocessor_config.json` of transformers beside the "
                "weights, or remove the one that is there for the original's preprocessing."
            ) from error
    fields: dict[str, Any] = {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
    }
    stated = (checkpoint.model_config or {}).get("preprocess_cfg", {})
    fields |= {ours: stated[name] for name, ours in (("mean", "image_mean"), ("std", "image_std")) if name in stated}
    choices = {"resize_mode": ("shortest", "squash"), "interpolation": ("bicubic", "bilinear")}
    for name, (usual, other) in choices.items():
        if stated.get(name, usual) not in (usual, other):
            raise ValueError(
                f"`preprocess_cfg.{name}` of {checkpoint.name!r} must be {usual!r} or {other!r}, got {stated[name]!r}."
            )
    if stated.get("resize_mode") == "squash":
        fields |= {"size": {"height": image_size, "width": image_size}, "do_center_crop": False}
    if stated.get("interpolation") == "bilinear":
        fields["resample"] = PILImageResampling.BILINEAR
    return CLIPImageProcessorPil(**fields)


__all__ = [
    "MODEL",
    "PUBLISHED_LLMS",
    "RELEASED",
    "Checkpoint",
    "ReleasedCheckpoint",
    "check_keys",
    "check_loaded",
    "check_values",
    "find_release",
    "find_source",
    "one_line",
    "read_checkpoint",
    "read_image_processor",
    "read_weights",
]
