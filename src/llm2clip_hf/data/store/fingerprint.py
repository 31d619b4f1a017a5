# SPDX-License-Identifier: Apache-2.0
"""
What stored caption embeddings depend on, as a small dictionary that two runs can compare.

An embedding store made with another LLM, chat template or pooling has the right shape and the wrong content. The
fingerprint travels with the store, and `CaptionEmbeddingStore.open` compares it with the one of the model at hand.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open


if TYPE_CHECKING:
    from .embedding_store import CaptionEmbeddingStore


logger = logging.getLogger(__name__)
FingerprintValue = str | int | float | bool | None
Fingerprint = Mapping[str, FingerprintValue]
# An LLM as a module, as a state dict, or as a folder or file of safetensors.
Weights = torch.nn.Module | Mapping[str, torch.Tensor] | str | Path
_BLOCK, _BLOCKS = 1 << 16, 256
# What a config says about where it came from, not about the model.
_ORIGIN = ("_name_or_path", "transformers_version", "text_base_revision")
_ROUNDED = (torch.float16, torch.float32, torch.float64)


def embedding_fingerprint(
    weights: Weights,
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


def weights_digest(weights: Weights) -> str:
    """
    SHA-256 over the names, dtypes, shapes and bytes of all tensors, in the order of their names.

    A module, its `state_dict()` and a safetensors file with the same names, however it is sharded, give the same
    digest. A file with other names for the same weights (a prefix `model.`) or another dtype does not.
    """
    return _digests(weights, with_rounded=False)[0]


def weights_identity(weights: Weights) -> dict[str, FingerprintValue]:
    """
    The entries of a fingerprint that say which LLM it was.

    All weights are read once, one tensor at a time; SHA-256 takes 0.5 to 2 GB per second.
    """
    # Imported when needed: the model classes take seconds, and workers that only read a store do without.
    from ...modeling.text_llm2clip import sampled_weights_digest

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


def digest_of(content: Any) -> str:
    """SHA-256 of plain content as JSON."""
    text = json.dumps(content, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def lines_digest(lines: Sequence[str], separator: str = "\n") -> str:
    """SHA-256 of strings in their order."""
    return hashlib.sha256(separator.join(lines).encode()).hexdigest()


def files_digest(files: Iterable[Path], root: Path) -> str:
    """SHA-256 of the names, sizes and contents of files; of more than 16 MiB, of 256 blocks spread over the file."""
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def model_digest(model: torch.nn.Module) -> str:
    """Digest of all that decides the embeddings of a whole model of images and texts."""
    config: Any = getattr(model, "config", None)
    fields = _without_origin(config.to_dict()) if hasattr(config, "to_dict") else None
    # Adapters that are switched off or scaled have the same weights.
    adapters = [
        [name, module.disable_adapters, list(module.active_adapters), list(module.merged_adapters), module.scaling]
        for name, module in model.named_modules()
        if hasattr(module, "disable_adapters") and hasattr(module, "merged_adapters") and hasattr(module, "scaling")
    ]
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    autocast = {kind: str(torch.get_autocast_dtype(kind)) for kind in kinds}
    return digest_of([type(model).__name__, weights_digest(model), fields, adapters, autocast])


def _without_origin(fields: Any) -> Any:
    if isinstance(fields, dict):
        return {key: _without_origin(value) for key, value in fields.items() if key not in _ORIGIN}
    return fields


def _digests(weights: Weights, with_rounded: bool) -> tuple[str, str, list[str]]:
    """SHA-256 of all tensors, the same rounded to bfloat16 (or as they are, if not wanted), and the dtypes."""
    exact = hashlib.sha256()
    # Made when the two begin to differ: with bfloat16 weights, one digest is both.
    rounded = None
    dtypes = set()
    for name, tensor in _tensors(weights):
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


def _tensors(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors by name; of files one at a time, so that a folder of 16 GB never is in memory at once."""
    if isinstance(weights, torch.nn.Module):
        weights = weights.state_dict()
    if isinstance(weights, Mapping):
        yield from ((name, weights[name].detach()) for name in sorted(weights))
        return
    path = Path(weights)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"`{path}` holds no safetensors file. Pass the folder or file with the weights of the LLM.")
    places = {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            places.update(dict.fromkeys(content.keys(), file))
    for name in sorted(places):
        with safe_open(places[name], framework="pt") as content:
            yield name, content.get_tensor(name)


# Other views of the weights, which `weights_sha256` stands for; fingerprints of earlier releases lack them.
_VIEWS = ("weights_bf16_sha256", "weights_sample_sha256")
_ABSENT = "(absent)"
# Fields of a fingerprint that change embeddings by rounding or for long texts only.
_NOT_IDENTITY = ("weights_dtype", "max_length")


def fingerprint_differences(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The keys in which two dictionaries differ with both values, as text for a message; empty if they agree."""
    return "; ".join(
        f"`{key}`: store {stored.get(key, _ABSENT)!r}, expected {expected.get(key, _ABSENT)!r}"
        for key in sorted({*stored, *expected})
        if stored.get(key, _ABSENT) != expected.get(key, _ABSENT)
    )


def build_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """
    `fingerprint_differences` of two plans of a store, each with a `fingerprint`.

    The dtype of the weights counts here: rows of two roundings are not mixed in one store.
    """
    plans = []
    for plan, own in zip((found, wanted), _with_shared_entries(found["fingerprint"], wanted["fingerprint"])):
        rest = {key: value for key, value in plan.items() if key != "fingerprint"}
        plans.append(rest | {f"fingerprint.{key}": value for key, value in own.items()})
    return fingerprint_differences(*plans)


def _with_shared_entries(stored: Fingerprint, expected: Fingerprint) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Two fingerprints as one release would write them: without the views of the weights that only one of them has, and
    with the pooling, which is the mean where the fingerprint of an LLM does not name it.
    """
    old, new = dict(stored), dict(expected)
    for view in _VIEWS:
        if view not in old or view not in new:
            old.pop(view, None)
            new.pop(view, None)
    # These two entries make it a whole fingerprint, not some entries of one or the user's own.
    for one, other in ((old, new), (new, old)):
        if "pooling" in other and {"weights_sha256", "tokenizer_sha256"} <= one.keys():
            one.setdefault("pooling", "mean")
    return old, new


def require_identity(
    store: "CaptionEmbeddingStore",
    expected: Fingerprint,
    whose: str,
    remedy: str,
    *,
    shared_only: bool = True,
    ignored: tuple[str, ...] = _NOT_IDENTITY,
    maker: str = "text encoder",
) -> None:
    """
    Refuses a store that another text encoder made; `shared_only` compares the entries that both fingerprints have.

    The weights are the same if their digests are, or, loaded in different dtypes, their digests rounded to bfloat16 or
    (bfloat16 and float16) a sample of them.
    """
    stored = store.fingerprint
    old, new = _with_shared_entries(stored, expected)
    same_weights = _same_weights(stored, expected)
    left_out = {*ignored, *_VIEWS, *(("weights_sha256", "weights_dtype") if same_weights else ())}
    if shared_only:
        left_out |= old.keys() ^ new.keys()
    differences = fingerprint_differences(
        {key: value for key, value in old.items() if key not in left_out},
        {key: value for key, value in new.items() if key not in left_out},
    )
    before, now = stored.get("weights_dtype"), expected.get("weights_dtype")
    if "weights_sha256" in stored and not same_weights and None not in (before, now) and before != now:
        differences += (
            f" (the captions were embedded with an LLM in {before}, this one is in {now}; if it is the same LLM, "
            f'load it in {before}, e.g. with `text_model_kwargs={{"dtype": "{before}"}}`)'
        )
    if differences:
        raise ValueError(
            f"The embeddings in `{store.path}` were made by another {maker} than {whose}: {differences}. {remedy}"
        )


def require_text_encoder(
    store: "CaptionEmbeddingStore", model: Any, processor: Any, remedy: str, *, by_sample: bool = False
) -> None:
    """
    Refuses a store that was not made by the text encoder of an `LLM2CLIPModel`: the one that it was trained with, its
    template, pooling and tokenizer, and the LLM that it holds.

    The weights are all read, which `by_sample` spares where a sample of them settles that the LLM made the store.
    """
    # Imported when needed: the model classes take seconds, and workers that only read a store do without.
    from ...modeling.text_llm2clip import sampled_weights_digest

    if model.config.text_fingerprint:
        require_identity(
            store,
            model.config.text_fingerprint,
            "the one that the model was trained with (`config.text_fingerprint`)",
            "Use embeddings of that one, or set `config.text_fingerprint` to None to use others on purpose.",
        )
    require_identity(store, model_settings(model, getattr(processor, "tokenizer", processor)), "the model", remedy)
    if model.text_model is None or "weights_sha256" not in store.fingerprint:
        return
    if any("base_layer." in name for name, _ in model.text_model.named_parameters()):
        logger.warning("The LLM has adapters, so `%s` is not compared with its weights.", store.path)
        return
    sample = store.fingerprint.get("weights_sample_sha256")
    if not by_sample or sample is None or sample != sampled_weights_digest(model.text_model):
        logger.info("Comparing the weights of the LLM with the fingerprint of `%s`.", store.path)
        require_identity(store, weights_identity(model.text_model), "the model", remedy)


def _same_weights(stored: Fingerprint, expected: Fingerprint) -> bool:
    if "weights_sha256" not in stored or "weights_sha256" not in expected:
        return False
    if stored["weights_sha256"] == expected["weights_sha256"]:
        return True
    dtypes = {str(stored.get("weights_dtype")), str(expected.get("weights_dtype"))}
    # In one dtype, weights that agree rounded only are those of two LLMs.
    if len(dtypes) == 1:
        return False
    rounded, own = (
        each["weights_sha256"] if each.get("weights_dtype") == "bfloat16" else each.get("weights_bf16_sha256")
        for each in (stored, expected)
    )
    if rounded is not None and rounded == own:
        return True
    # float16 drops bits of tiny bfloat16 values, which the sample leaves out.
    sample = stored.get("weights_sample_sha256")
    return dtypes == {"bfloat16", "float16"} and sample is not None and sample == expected.get("weights_sample_sha256")


def model_fingerprint(model: Any, tokenizer: Any, max_length: int) -> dict[str, FingerprintValue]:
    """`embedding_fingerprint` of an `LLM2CLIPModel` that holds its LLM; reads all weights of the LLM."""
    settings = model_settings(model)
    return embedding_fingerprint(
        model.text_model,
        tokenizer,
        text_prefix_length=model.config.text_prefix_length or 0,
        max_length=max_length,
        pooling=str(settings["pooling"]),
        is_causal=bool(settings["is_causal"]),
    )


def model_settings(model: Any, tokenizer: Any = None) -> dict[str, FingerprintValue]:
    """The entries of `model_fingerprint` that are known without the weights of the LLM."""
    config = model.config
    settings: dict[str, FingerprintValue] = {
        "text_prefix_length": config.text_prefix_length,
        "pooling": config.text_pooling,
        # The attention that an `LLM2CLIPModel` gives any LLM.
        "is_causal": bool(getattr(config.text_config, "is_causal", config.text_config is not None)),
    }
    if config.text_config is None:
        defaults: dict[str, FingerprintValue] = {"text_prefix_length": 0, "pooling": "mean"}
        settings = {key: value for key, value in settings.items() if key not in defaults or value != defaults[key]}
    if config.text_prefix_length is None:  # not known before an LLM is attached
        settings.pop("text_prefix_length")
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        settings["tokenizer_sha256"] = tokenizer_digest(tokenizer)
    return settings


__all__ = [
    "FingerprintValue",
    "build_differences",
    "digest_of",
    "embedding_fingerprint",
    "files_digest",
    "fingerprint_differences",
    "lines_digest",
    "model_digest",
    "model_fingerprint",
    "model_settings",
    "require_identity",
    "require_text_encoder",
    "tokenizer_digest",
    "weights_digest",
    "weights_identity",
]
