# SPDX-License-Identifier: Apache-2.0
"""What a run will need, told from configs alone: no weight is loaded."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..modeling.loading_llm2clip import load_text_config
from .adapter_folder import find_adapter
from .adapters import add_lora, describe_lora, lora_config


_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.55}


_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def find_model(name_or_path: str, option: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """
    The config of a model whose weights are there; they are neither loaded nor fetched.

    Args:
        name_or_path (`str`): Folder or repository of a model, or of a caption encoder saved as adapters only, for
            which its LLM is looked up.
        option (`str`): The option that names it, for messages.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether to run the repository's own code.

    Returns:
        `PreTrainedConfig`

    Raises:
        ValueError: if there is no such model, its config cannot be read, or its weights are missing or cut off.
    """
    given = f"`--{option} {name_or_path}`"
    try:
        if not Path(name_or_path).is_dir() and (name_or_path[:1] in "/.~" or name_or_path.count("/") > 1):
            raise OSError("there is no such folder.")
        adapter = find_adapter(name_or_path)
        name = name_or_path if adapter is None else adapter.settings["base_model"]
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{given} is no model that can be read: {' '.join(str(error).split())}") from error
    folder: Path | None = Path(name)
    if not Path(name).is_dir():
        try:
            folder, files = None, set(HfApi().list_repo_files(name))
        except (HfHubHTTPError, OfflineModeIsEnabled, ConnectionError):
            folder = Path(snapshot_download(name, local_files_only=True))
    if folder is not None:
        files = {file.name for file in folder.iterdir()}
    found = [file for file in (*_WEIGHTS, getattr(config, "transformers_weights", None)) if file in files]
    if not found:
        raise ValueError(
            f"{given} has a config, but no weights: none of {', '.join(_WEIGHTS)} is there. Give a folder that "
            "`save_pretrained` wrote, or copy the weights there."
        )
    if folder is not None:
        _check_files(folder, found[0], given)
    return config


def _check_files(folder: Path, file: str, given: str) -> None:
    """Whether the shards that an index names are there, and safetensors files are as long as they say."""
    names = [file]
    if file.endswith(".index.json"):
        names = sorted(set(json.loads((folder / file).read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{given} lacks the weights `{name}`, which its `{file}` names. Copy the folder again.")
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, "pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(f"{given}: `{name}` is cut off or damaged ({error}). Copy it again.") from error


def describe_trained(model: torch.nn.Module) -> str:
    """
    What of a model is trained, part by part, and the memory of that with AdamW.

    Args:
        model (`nn.Module`): A model that is ready for training.

    Returns:
        `str`: One line.
    """
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.partition(".")[0]
            counts[part] = counts.get(part, 0) + parameter.numel()
    parts = ", ".join(f"{part} {_count(number)}" for part, number in counts.items())
    memory = 16 * sum(counts.values()) / 2**30
    return f"trained   {parts}; about {memory:,.1f} GiB with gradients and AdamW, without activations"


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 50_000 else str(number)


def describe_llm(
    name_or_path: str, *, lora_rank: int | None, dtype: str | None = None, quantization: str | None = None
) -> str:
    """
    Size of an LLM, of its LoRA adapters on all linear layers, and the memory of both with AdamW.

    Args:
        name_or_path (`str`): Folder or repository of the LLM.
        lora_rank (`int` or `None`): Rank of LoRA; 0 for training all weights, `None` for a frozen LLM.
        dtype (`str`, *optional*): Type of the weights; that of the checkpoint by default.
        quantization (`str`, *optional*): `"4bit"` or `"8bit"`.

    Returns:
        `str`: One line. Activations come on top; they grow with the tokens of a forward pass.
    """
    config = load_text_config(name_or_path).get_text_config()
    with torch.device("meta"):
        llm = AutoModel.from_config(config)
    total = sum(parameter.numel() for parameter in llm.parameters())
    trained, lora = total if lora_rank == 0 else 0, ""
    if lora_rank:
        adapter = find_adapter(name_or_path)
        with torch.device("meta"):
            add_lora(llm, lora_config({"r": lora_rank}) if adapter is None else adapter.lora())
        trained = sum(parameter.numel() for parameter in llm.parameters() if parameter.requires_grad)
        lora = f"; LoRA {describe_lora(llm)}"
    weights = quantization or dtype or _name(config.dtype)
    # Weight, gradient and AdamW's two moments in float32 for each trained number.
    memory = total * _BYTES[weights] + 16 * trained
    return (
        f"LLM       {type(llm).__name__}, {total / 1e6:,.1f} M parameters in {weights}, {trained / 1e6:,.1f} M "
        f"trained, about {memory / 2**30:,.1f} GiB without activations{lora}"
    )


def _name(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if name in _BYTES else "float32"
