# SPDX-License-Identifier: Apache-2.0
"""What a model is before its weights are loaded: whether they are there, their size, their quantisation."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..modeling.loading_llm2clip import find_adapters, is_quantized, load_text_config
from .lora import add_lora, describe_lora, lora_config, stored_lora


_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.55}
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def find_model(name_or_path: str, option: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model whose weights are there; they are neither loaded nor fetched."""
    given = f"`--{option} {name_or_path}`"
    try:
        if not Path(name_or_path).is_dir() and (name_or_path[:1] in "/.~" or name_or_path.count("/") > 1):
            raise OSError("there is no such folder.")
        adapter = find_adapters(name_or_path)
        name = name_or_path if adapter is None else adapter["base_model"]
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
    """What of a model is trained, part by part, and the memory of that with AdamW."""
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
    """Size of an LLM, of its LoRA adapters on all linear layers, and the memory of both with AdamW."""
    config = load_text_config(name_or_path).get_text_config()
    with torch.device("meta"):
        llm = AutoModel.from_config(config)
    total = sum(parameter.numel() for parameter in llm.parameters())
    trained, lora = total if lora_rank == 0 else 0, ""
    if lora_rank:
        stored = find_adapters(name_or_path)
        with torch.device("meta"):
            add_lora(llm, lora_config({"r": lora_rank}) if stored is None else stored_lora(name_or_path))
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


def quantized_model_kwargs(quantization: str | QuantizationConfigMixin | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` that load an LLM quantised, on the GPU of this process."""
    if quantization is None:
        return {}
    if isinstance(quantization, QuantizationConfigMixin):
        if not isinstance(quantization, BitsAndBytesConfig):
            # Other methods have other needs, which transformers checks; some run on a CPU.
            return {"quantization_config": quantization}
        config = quantization
    elif quantization == "4bit":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    elif quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        raise ValueError(
            f"`quantization` must be None, '4bit', '8bit' or a quantisation config of transformers, got "
            f"{quantization!r}."
        )
    if not _has_bitsandbytes():
        raise ImportError(
            "`quantization` needs `bitsandbytes`, which is not installed. Install it with `pip install bitsandbytes`, "
            "or leave `quantization` out."
        )
    if not _has_gpu():
        raise RuntimeError("`quantization` with bitsandbytes needs a GPU, and torch finds none. Leave it out.")
    # The process's own GPU under a launcher; bf16 for what stays unquantised, so that LoRA alone is float32.
    return {"quantization_config": config, "device_map": {"": PartialState().device}, "dtype": torch.bfloat16}


def quantization_label(llm: Any) -> str | None:
    """The quantisation of a loaded LLM as one line of JSON, `None` for one that is not quantised."""
    if not is_quantized(llm):
        return None
    config = llm.config.quantization_config
    fields = config if isinstance(config, dict) else config.to_dict()
    return json.dumps(fields, sort_keys=True, default=str)


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _has_gpu() -> bool:
    return torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
