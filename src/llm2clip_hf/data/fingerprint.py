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


__all__ = ["FingerprintValue", "embedding_fingerprint", "tokenizer_digest", "weights_digest", "weights_identity"]

FingerprintValue = str | int | float | bool | None

_ROUNDED = (torch.float16, torch.float32, torch.float64)


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
        `dict`: JSON scalars only: what `weights_identity` gives, `tokenizer_sha256`, and the arguments.

    Raises:
        ValueError: if the folder holds no safetensors file, or the tokenizer is not a fast one.

    Example:
    >>> fingerprint = embedding_fingerprint(llm, tokenizer, text_prefix_length=5)  # doctest: +SKIP
    >>> store = CaptionEmbeddingStore.open("embeddings", expected_fingerprint=fingerprint)  # doctest: +SKIP
    """
    return {
        **weights_identity(weights),
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
    return _digests(weights, with_rounded=False)[0]


def weights_identity(
    weights: torch.nn.Module | Mapping[str, torch.Tensor] | str | Path,
) -> dict[str, FingerprintValue]:
    """
    The entries of a fingerprint that say which LLM it was.

    All weights are read once, one tensor at a time; SHA-256 takes 0.5 to 2 GB per second.

    Args:
        weights: as for `weights_digest`.

    Returns:
        `dict`: `weights_sha256`, see `weights_digest`; `weights_bf16_sha256`, the same after rounding to bfloat16, by
        which an LLM is recognized that was loaded in float32 for one purpose and in bfloat16 for another;
        `weights_dtype`; and of a module `weights_sample_sha256`, which a model compares when its LLM is attached.

    Raises:
        ValueError: if a folder holds no safetensors file.
    """
    # Imported when needed: the model classes take seconds, and workers that only read a store do without.
    from ..modeling.modules_llm2clip import sampled_weights_digest

    sha256, bf16_sha256, dtypes = _digests(weights, with_rounded=True)
    identity: dict[str, FingerprintValue] = {
        "weights_sha256": sha256,
        "weights_bf16_sha256": bf16_sha256,
        "weights_dtype": "+".join(dtypes),
    }
    sample = sampled_weights_digest(weights) if isinstance(weights, torch.nn.Module) else None
    return identity if sample is None else identity | {"weights_sample_sha256": sample}


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


def _digests(
    weights: torch.nn.Module | Mapping[str, torch.Tensor] | str | Path, with_rounded: bool
) -> tuple[str, str, list[str]]:
    """SHA-256 of all tensors, the same rounded to bfloat16 (or as they are, if not wanted), and the dtypes."""
    exact = hashlib.sha256()
    # Made when the two begin to differ: with bfloat16 weights, one digest is both.
    rounded = None
    dtypes = set()
    state = _state_dict(weights)
    for name in sorted(state):
        value = state[name]
        tensor = (value.read() if isinstance(value, _LazyTensor) else value).detach()
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        if with_rounded and tensor.dtype in _ROUNDED and rounded is None:
            rounded = exact.copy()
        _update(exact, name, tensor)
        if rounded is not None:
            _update(rounded, name, tensor.bfloat16() if tensor.dtype in _ROUNDED else tensor)
    return exact.hexdigest(), (rounded or exact).hexdigest(), sorted(dtypes)


def _update(digest: Any, name: str, tensor: torch.Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    digest.update(f"{name}|{dtype}|{tuple(tensor.shape)}|".encode())
    # Flat, because the view as bytes needs a last dimension; 0-d tensors have none.
    digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


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
