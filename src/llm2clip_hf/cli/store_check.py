# SPDX-License-Identifier: Apache-2.0
"""Whether a finished store was made by the LLM that `train-clip` was told, found before anything is trained."""

import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .processes import is_main_process


if TYPE_CHECKING:
    from llm2clip_hf.data import CaptionEmbeddingStore


logger = logging.getLogger(__name__)


def check_finished_stores(options: Any, folders: Iterable[str]) -> None:
    """
    Compares the LLM's weights with what finished stores say of them; template, tokenizer and pooling are compared by
    the trainer, which has the model's.

    The LLM is read once, on the CPU of the first process, whose error is that of all.

    Args:
        options: those of `train-clip`.
        folders (iterable of `str`): stores, finished or not; one that is not finished is compared when it is filled.

    Raises:
        ValueError: if a store was made by another LLM, or cut captions at another length than `max_length`.
    """
    from llm2clip_hf.data import CaptionEmbeddingStore

    stores = [CaptionEmbeddingStore.open(folder) for folder in folders if (Path(folder) / "index.json").is_file()]
    for store in stores:
        length = store.fingerprint.get("max_length")
        if options.max_length is not None and length is not None and length != options.max_length:
            raise ValueError(
                f"The captions of `{store.path}` were cut at {length} tokens, `max_length` is {options.max_length}. "
                "Leave `max_length` out, or give another `store`."
            )
    if stores:
        _on_first_process(lambda: _check_weights(options, stores))


def _check_weights(options: Any, stores: "list[CaptionEmbeddingStore]") -> None:
    from llm2clip_hf.data.store_identity import identity_differences

    llm = str(options.text_model or options.model)
    silent = [store for store in stores if "weights_sha256" not in store.fingerprint]
    for store in silent:
        logger.warning("`%s` does not record the weights of its LLM; that it is %r is not checked.", store.path, llm)
    stores = [store for store in stores if store not in silent]
    if not stores:
        return
    note = f"checking  the weights of {llm}, which take a while to read, against {stores[0].path}"
    print(note, file=sys.stderr, flush=True)
    try:
        identity = _weights_of(options, llm, stores[0].fingerprint.get("weights_dtype"))
    except OSError as error:
        logger.warning("The weights of %r cannot be read (%s); `%s` is not checked.", llm, error, stores[0].path)
        return
    if identity is None:
        logger.warning("%r holds no LLM, so that `%s` was made by its LLM is not checked.", llm, stores[0].path)
        return
    for store in stores:
        differences = identity_differences(store.fingerprint, identity, shared_only=True, ignored=("weights_dtype",))
        if differences:
            raise ValueError(
                f"The embeddings in `{store.path}` were made by another LLM than {llm!r}: {differences}. Give the "
                "`text_model` that made them, or another `store`."
            )


def _weights_of(options: Any, llm: str, dtype: Any) -> dict[str, Any] | None:
    """The identity of the LLM's weights, loaded in the dtype that a store names; `None` for a model without LLM."""
    from transformers import AutoModel

    import llm2clip_hf  # noqa: F401  (registers the model type)
    from llm2clip_hf.data.fingerprint import weights_identity
    from llm2clip_hf.modeling.loading_llm2clip import load_pretrained_text, load_text_config

    kwargs = {"dtype": dtype} if dtype in ("float32", "bfloat16", "float16") else {}
    trust = options.trust_remote_code
    config = load_text_config(llm, {"trust_remote_code": trust})
    if config.model_type != "llm2clip":
        return weights_identity(load_pretrained_text(llm, None, kwargs))
    if config.text_weights == "none":
        return None
    model = AutoModel.from_pretrained(llm, trust_remote_code=trust, text_model_kwargs=kwargs)
    return weights_identity(model.text_model)


def _on_first_process(check: Callable[[], None]) -> None:
    """Runs a check on the first process and raises its error on all."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        if is_main_process():
            check()
        return
    problems: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            check()
        except Exception as error:
            problems = [str(error)]
    # Otherwise the others would wait in the first step for a process that has ended.
    dist.broadcast_object_list(problems)
    if problems[0] is not None:
        raise ValueError(problems[0])
