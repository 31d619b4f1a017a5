# Copyright 2026 The llm2clip_hf authors.
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Saving and pushing: what stands in the folder of a model, and one commit that brings it to the Hub, with a card."""

import copy
import inspect
import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .configuration_llm2clip import is_repository


ATTACH_HINT = (
    "Attach the LLM with `model.attach_text_model(AutoModel.from_pretrained(...))`, or pass stored LLM embeddings as "
    "`llm_embeds`."
)

# Bytes of an LLM that are not worth a file of their own.
SMALL_LLM = 10**9
# The pipeline of transformers takes the softmax over the labels, which is not what a sigmoid model means.
SIGMOID_PIPELINES = {
    "zero-shot-image-classification": {
        "impl": "modeling_llm2clip.LLM2CLIPZeroShotImageClassificationPipeline",
        "pt": ["AutoModelForZeroShotImageClassification"],
    }
}
# What sentence-transformers reads beside the model's own files.
SENTENCE_FILES: dict[str, Any] = {
    "config_sentence_transformers.json": {
        "default_prompt_name": None,
        "model_type": "SentenceTransformer",
        "prompts": {},
        "similarity_fn_name": "cosine",
    },
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_llm2clip.LLM2CLIPEncoder"}],
}


# --------------------------------------------------------------------------------------------------------- the folder


def config_to_save(model: Any, text_weights: str) -> Any:
    """The config of a folder whose LLM is `"bundled"`, `"external"` or `"none"`; that of the model stays as it is."""
    text_model = model.text_model
    if text_weights == "bundled" and text_model is None:
        raise ValueError(f"`text_weights` is 'bundled', but the model holds no LLM to save. {ATTACH_HINT}")
    if text_weights == "bundled" and getattr(text_model.config, "quantization_config", None) is not None:
        raise ValueError(
            "`text_weights` is 'bundled', but the LLM is quantised, and a folder cannot say that of one part. "
            "Save with `text_weights='external'` and quantise on loading, with `text_model_kwargs`."
        )
    config = copy.deepcopy(model.config)
    if text_weights == "external" and not config.text_base_model:
        raise ValueError(
            "`text_weights` is 'external', but `config.text_base_model` does not name the LLM. Set it to the "
            "LLM's repository or folder."
        )
    if text_weights == "external" and text_model is not None and not model.text_model_is_named():
        raise ValueError(
            "`text_weights` is 'external', but the LLM was trained or exchanged: it is not known to be the one "
            f"that `config.text_base_model` ({config.text_base_model!r}) names, which would be loaded instead. "
            "Save with `text_weights='bundled'`, or save the LLM by itself and set `config.text_base_model` to "
            "its folder or repository."
        )
    config.text_weights = text_weights
    # How this copy of the LLM is quantised is no matter of the folder; written, it would be applied to all parts.
    if config.text_config is not None:
        vars(config.text_config).pop("quantization_config", None)
    if text_weights != "bundled":
        vars(config).pop("quantization_config", None)
    if type(model)._auto_class is not None:
        # The pipeline for zero-shot classification looks for this entry; `AutoModel` is added on saving.
        modeling_class = f"{type(model).__module__.split('.')[-1]}.{type(model).__name__}"
        entries = getattr(config, "auto_map", None) or {}
        config.auto_map = {**entries, "AutoModelForZeroShotImageClassification": modeling_class}
        if config.logit_bias_init_value is not None:
            config.custom_pipelines = copy.deepcopy(SIGMOID_PIPELINES)
    return config


def check_merged(model: Any, text_weights: str, weights_given: bool) -> None:
    """Refuses parts with adapters, whose weights have other names, unless plain weights are given to be saved."""
    named = model.config.text_base_model if text_weights == "external" else None
    for name, part in model.named_children():
        if name == "text_model" and named is not None and getattr(part, "adapters_name", None) == named:
            continue  # as it came from there: adapters beside a quantised LLM
        # The flag is set by `add_adapter`; `get_peft_model` leaves only its layers, each with a base layer.
        layers = not weights_given and any(hasattr(module, "base_layer") for module in part.modules())
        if layers or getattr(part, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"`{name}` carries an adapter; saved like this, its weights could not be loaded again. Merge it "
                "first, with `llm2clip_hf.training.merge_lora(model)`, or with `merge_and_unload()` where PEFT's "
                "own wrapper put it there; `trainer.save_model` saves a trained model merged."
            )


def llm_last(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `save_pretrained` by which the files of an LLM can be left out of a download: after all others."""
    is_llm = {name: name.startswith("text_model.") for name in state_dict}
    size = {True: 0, False: 0}
    for name, value in state_dict.items():
        size[is_llm[name]] += value.numel() * value.element_size()
    ordered = dict(sorted(state_dict.items(), key=lambda item: is_llm[item[0]]))
    # One file as long as it is small; else the first file ends where the LLM begins.
    large = size[True] > SMALL_LLM
    return {"state_dict": ordered, **({"max_shard_size": max(size[False], SMALL_LLM)} if large else {})}


def write_sentence_files(folder: Path) -> None:
    """Makes a folder with a saved model one that `SentenceTransformer` loads; prompts that it has are kept."""
    for name, content in SENTENCE_FILES.items():
        target = folder / name
        if name == "config_sentence_transformers.json" and target.exists():
            continue
        partial = target.with_name(f".{name}.partial")
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, target)


# ------------------------------------------------------------------------------------------------------------ the Hub


def pin_text_model(config: Any, text_model: Any = None, text_weights: str | None = None, token: Any = None) -> None:
    """
    Makes a config name its external LLM so that everybody gets the same one: repository and commit.

    The commit is that of the LLM in memory, where the Hub gave it, else the one that `text_base_revision` stands for.
    """
    name, revision = config.text_base_model, config.text_base_revision
    pinned = isinstance(revision, str) and re.fullmatch("[0-9a-f]{40}", revision)
    if (text_weights or config.text_weights) != "external" or (is_repository(name) and pinned):
        return
    if not is_repository(name):
        raise ValueError(
            f"The LLM is external, and `config.text_base_model` is {name!r}, which is no repository on the Hub: "
            "nobody else could load this model. Push the LLM first and set `config.text_base_model` to its "
            "repository, or push with `text_weights='bundled'`, or with `'none'` for a model of stored embeddings."
        )
    loaded = getattr(text_model, "config", None)
    commit = getattr(loaded, "_commit_hash", None) if getattr(loaded, "_name_or_path", None) == name else None
    if commit is None:
        try:
            commit = HfApi().model_info(name, revision=revision, token=token).sha
        except Exception as error:
            # Not found, not allowed or not reached: in any case the name stays without a commit.
            raise ValueError(
                f"The commit of the external LLM {name!r} at revision {revision or 'main'!r} cannot be found out: "
                f"{' '.join(str(error).split())} Set `config.text_base_revision` to its commit hash."
            ) from error
    config.text_base_revision = commit


def short_card(config: Any, repo_id: str, license: str | None = None, tags: Collection[str] = ()) -> str:
    """The card of a repository that has none: what the config tells, and how to load the model."""
    base = config.text_base_model if is_repository(config.text_base_model) else None
    task = "image-feature-extraction" if config.text_weights == "none" else "zero-shot-image-classification"
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task, "license": license}
    fields |= {"tags": ["llm2clip", *tags], "base_model": [base] if base else None}
    revision = f" at revision `{config.text_base_revision}`" if config.text_base_revision else ""
    llm = {
        "bundled": "Its language model is in this repository, under its own licence.",
        "external": f"Its language model is fetched from `{base}`{revision}, under its own licence.",
        "none": "It takes stored embeddings of its language model (`llm_embeds`).",
    }
    return f"""---
{ModelCardData(**fields).to_yaml()}
---

# {repo_id.split("/")[-1]}

A CLIP-like model whose texts are read by a large language model ([LLM2CLIP](https://arxiv.org/abs/2411.04997)).
{llm[config.text_weights]}

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
```
"""


# What may be pushed: no pickles (`.bin`, `.pt`, `.pth`), hence no optimizers and no training arguments either.
_PUSHED = [f"*.{end}" for end in ("json", "safetensors", "py", "md", "jinja", "txt", "model", "png", "jpg")]
# Weights that would be loaded instead of, or beside, the new ones.
_OLD_WEIGHTS = ["model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin*", "training_args.bin"]


_REFUSALS = {
    401: "The Hub does not accept the token for {repo_id!r} (401). Make a new one with the right to write at "
    "https://huggingface.co/settings/tokens.",
    403: "The token may not write to {repo_id!r} (403). Push to a repository of your own or of an organisation that "
    "you may write for, or propose the change with `create_pr=True`.",
}


@contextmanager
def hub_errors(repo_id: str, token: Any = None) -> Iterator[None]:
    """Turns what the Hub and the network answer into errors that say what to do."""
    if token in (None, True) and get_token() is None:
        raise PermissionError(
            f"No token to push to {repo_id!r} with. Run `hf auth login`, set HF_TOKEN, or pass `token=`; it needs the "
            "right to write."
        )
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            raise  # says what is wrong already
        cause: BaseException | None = error
        while cause is not None:
            kind = type(cause).__module__.split(".")[0]
            status = getattr(cause.response, "status_code", None) if isinstance(cause, HfHubHTTPError) else None
            if isinstance(cause, OfflineModeIsEnabled):
                raise ConnectionError(
                    f"Offline mode is on, so nothing can be pushed to {repo_id!r}. Unset HF_HUB_OFFLINE."
                ) from error
            if status in _REFUSALS:
                raise PermissionError(_REFUSALS[status].format(repo_id=repo_id)) from error
            if kind.startswith(("httpx", "httpcore")):
                raise ConnectionError(
                    f"The connection broke while pushing to {repo_id!r} ({error} {cause}). A push is one commit at "
                    "its end: the repository holds all of it or nothing. Push again; files that arrived are not sent "
                    "twice."
                ) from error
            cause = cause.__cause__
        raise


def create_repository(
    repo_id: str, private: bool | None = None, token: Any = None, revision: str | None = None, exist_ok: bool = True
) -> str:
    """Creates a repository, and a branch in it, unless they are there; returns the full name."""
    api = HfApi(token=token)
    full_name = str(api.create_repo(repo_id, private=private, exist_ok=exist_ok).repo_id)
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(full_name, branch=revision, exist_ok=True)
    return full_name


def push_folder(
    folder: str, repo_id: str, message: str | None, description: str | None, token: Any, revision: Any, create_pr: bool
) -> Any:
    """Pushes a saved model or processor in one commit, which also removes weights that the new ones replace."""
    has_weights = any(file.endswith(".safetensors") for file in os.listdir(folder))
    return HfApi(token=token).upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=_PUSHED,
        delete_patterns=_OLD_WEIGHTS if has_weights else None,
        commit_message=message,
        commit_description=description,
        revision=revision,
        create_pr=create_pr,
    )


def existing_card(repo_id: str, revision: str | None = None, token: Any = None) -> str | None:
    """The card of a repository, or `None` if it has none."""
    try:
        path = hf_hub_download(repo_id, "README.md", revision=revision, token=token)
    except (RemoteEntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError):
        return None
    return Path(path).read_text(encoding="utf-8")


def read_card(text: str, where: str) -> ModelCard:
    """A card with its metadata; a `ValueError` that names the card if they are not valid."""
    try:
        return ModelCard(text)
    except Exception as error:
        # What a parser of YAML raises is its own; whatever it is, the metadata cannot be read.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The metadata of {where} cannot be read: {reason}. Repair its first lines, or have the card replaced."
        ) from error


def completed_card(existing: str, new: str, where: str) -> str:
    """A card of somebody's, word for word, with the metadata of a new one that it lacks."""
    card, other = read_card(existing, where), ModelCard(new)
    for key, value in other.data.to_dict().items():
        if key == "tags":
            card.data[key] = list(dict.fromkeys([*card.data.to_dict().get(key, []), *value]))
        elif card.data.get(key) is None:
            card.data[key] = value
    if not card.text.strip():  # metadata only, as the Hub makes them for a new repository
        card.text = other.text
    return str(card)


def take_push_options(kwargs: dict[str, Any], folder: Any, push_to_hub: Callable[..., Any]) -> dict[str, Any] | None:
    """Takes what `save_pretrained(push_to_hub=True, ...)` is for the push out of its arguments."""
    if not kwargs.pop("push_to_hub", False):
        return None
    names = inspect.signature(push_to_hub).parameters
    for name in ("license", "model_card", "overwrite_card", "tags"):
        if name in kwargs and name not in names:
            raise ValueError(
                f"`{name}` is for the card of a repository, which a model brings with it, not a processor. Pass it to "
                "`push_to_hub` of the model."
            )
    options = {name: kwargs[name] for name in names if name in kwargs}
    for name in options.keys() - {"token", "max_shard_size"}:
        del kwargs[name]
    return {"repo_id": Path(folder).resolve().name, **options}
