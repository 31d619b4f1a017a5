# SPDX-License-Identifier: Apache-2.0
"""
What stored caption embeddings depend on, as a small dictionary that two runs can compare.

An embedding store made with another LLM, chat template or pooling has the right shape and the wrong content. The
fingerprint travels with the store, and `CaptionEmbeddingStore.open` compares it with the one of the model at hand.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


__all__ = ["FingerprintValue", "embedding_fingerprint", "tokenizer_digest", "weights_digest"]

FingerprintValue = str | int | float | bool | None


def embedding_fingerprint(
    weights: torch.nn.Module | Mapping[str, torch.Tensor] | str | Path,
    tokenizer: Any,
    *,
    text_prefix_length: int = 0,
    max_length: int = 512,
    pooling: str = "mean",
    is_causal: bool = False,
    **other: FingerprintValue,
) -> dict[str, FingerprintValue]:
    """
    Fingerprint of everything that decides the value of a caption embedding.

    Args:
        weights: the LLM as a module, as a state dict, or as a folder or file of safetensors (see `weights_digest`).
        tokenizer: a fast tokenizer of transformers; its post-processor holds the chat template.
        text_prefix_length (`int`, defaults to 0): leading template tokens that are not pooled.
        max_length (`int`, defaults to 512): tokens a caption is truncated to; the paper's value (section 4.1).
        pooling (`str`, defaults to `"mean"`): pooling over the tokens, `text_pooling` of `LLM2CLIPConfig`.
        is_causal (`bool`, defaults to `False`): whether the LLM attends causally.
        other: further JSON scalars to compare, e.g. `quantization="nf4"`.

    Returns:
        `dict`: JSON scalars only: the digests `weights_sha256` and `tokenizer_sha256`, `weights_dtype`, and the
        arguments.

    Raises:
        ValueError: if the folder holds no safetensors file, or the tokenizer is not a fast one.

    Example:
    >>> fingerprint = embedding_fingerprint(llm, tokenizer, text_prefix_length=5)  # doctest: +SKIP
    >>> store = CaptionEmbeddingStore.open("embeddings", expected_fingerprint=fingerprint)  # doctest: +SKIP
    """
    sha256, dtypes = _digest(weights)
    return {
        "weights_sha256": sha256,
        "weights_dtype": "+".join(dtypes),
        "tokenizer_sha256": tokenizer_digest(tokenizer),
        "text_prefix_length": text_prefix_length,
        "max_length": max_length,
        "pooling": pooling,
        "is_causal": is_causal,
        **other,
    }


def weights_digest(weights: torch.nn.Module | Mapping[str, torch.Tensor] | str | Path) -> str:
    """
    SHA-256 over the names, dtypes, shapes and bytes of all tensors, in the order of their names.

    A module, its `state_dict()` and a safetensors file with the same names, however it is sharded, give the same
    digest. A file with other names for the same weights (a prefix `model.`) or another dtype does not.

    Args:
        weights: a module, a mapping from name to tensor, a safetensors file, or a folder with safetensors files.

    Returns:
        `str`: hexadecimal digest.

    Raises:
        ValueError: if a folder holds no safetensors file.

    Example:
    >>> layer = torch.nn.Linear(2, 3)
    >>> weights_digest(layer) == weights_digest(layer.state_dict())
    True
    """
    return _digest(weights)[0]


def tokenizer_digest(tokenizer: Any) -> str:
    """
    SHA-256 of a fast tokenizer: vocabulary, normalizer and post-processor (with it the chat template).

    Truncation and padding are left out: transformers changes them on the tokenizer object at every call, and the
    padding side does not change an embedding.

    Args:
        tokenizer: a tokenizer of transformers with a `backend_tokenizer`.

    Returns:
        `str`: hexadecimal digest.

    Raises:
        ValueError: if the tokenizer has no `backend_tokenizer`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"`tokenizer` of type {type(tokenizer).__name__} has no `backend_tokenizer`. "
            "Load a fast tokenizer, e.g. with `AutoTokenizer.from_pretrained`."
        )
    content = json.loads(backend.to_str())
    for mutable in ("truncation", "padding"):
        content.pop(mutable, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(weights: torch.nn.Module | Mapping[str, torch.Tensor] | str | Path) -> tuple[str, list[str]]:
    digest = hashlib.sha256()
    dtypes = set()
    state = _state_dict(weights)
    for name in sorted(state):
        value = state[name]
        tensor = value.read() if isinstance(value, _LazyTensor) else value
        dtype = str(tensor.dtype).removeprefix("torch.")
        dtypes.add(dtype)
        digest.update(f"{name}|{dtype}|{tuple(tensor.shape)}|".encode())
        # Flat, because the view as bytes needs a last dimension; 0-d tensors have none.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest(), sorted(dtypes)


class _LazyTensor:
    """A tensor of a safetensors file, read when asked for, so that a 16 GB folder never is in memory at once."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def read(self) -> torch.Tensor:
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(self._name)


def _state_dict(
    weights: torch.nn.Module | Mapping[str, torch.Tensor] | str | Path,
) -> Mapping[str, torch.Tensor | _LazyTensor]:
    if isinstance(weights, torch.nn.Module):
        return weights.state_dict()
    if isinstance(weights, Mapping):
        return weights
    path = Path(weights)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"`{path}` holds no safetensors file. Pass the folder or file with the weights of the LLM.")
    tensors: dict[str, torch.Tensor | _LazyTensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            tensors.update({name: _LazyTensor(file, name) for name in content.keys()})
    return tensors
