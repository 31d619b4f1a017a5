# SPDX-License-Identifier: Apache-2.0
"""
One function that embeds texts with whatever can: sentence-transformers, CLIP's text tower, LLM2CLIP, a raw LLM.

What the four have in common: equal texts are encoded once, nothing is added to a text, and a text that looks like a
path or an address is text.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from ..data.store.text_encoders import encode_as_text
from .encoding import (
    batches_by_length,
    check_texts,
    distinct,
    encode_batches,
    encode_texts,
    evaluation_mode,
    longest_text,
)


__all__ = ["Pooling", "embed_texts", "embed_with_sentence_transformer"]

Pooling = Literal["mean", "last"]


def embed_texts(
    encoder: Any,
    texts: Sequence[str],
    *,
    processor: Any = None,
    is_causal: bool | None = None,
    pooling: Pooling | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    show_progress: bool = False,
) -> torch.Tensor:
    """
    Embed texts with any text encoder.

    Args:
        encoder:
            A `SentenceTransformer`; a model with CLIP's interface (`CLIPModel`, `SiglipModel`, `LLM2CLIPModel`) or its
            text tower alone (`CLIPTextModelWithProjection`, `SiglipTextModel`), which give the text's vector in the
            joint space; any other model of transformers, taken as a raw LLM; or the name or folder of such a model.
        texts (sequence of `str`): the texts.
        processor (*optional*):
            Tokenizer, or processor with one. Needed with a model of transformers, not with a name (it is loaded) or
            a `SentenceTransformer` (it has one).
        is_causal (`bool`, *optional*):
            Raw LLM only: whether a token sees the earlier ones alone; by default what the model's config says, which
            is yes for a raw LLM. `False` is checked to have an effect. The model is left as it was.
        pooling (`str`, *optional*):
            Raw LLM only: `"mean"` over the tokens, without the leading special tokens, as of LLM2CLIP; or
            `"last"`, the last token. By default what stage 1 recorded in its config, else the mean.
        batch_size (`int`, defaults to 32): texts per forward pass.
        max_length (`int`, *optional*): tokens per text; by default 512 or the encoder's own maximum, if smaller.
        device (*optional*): device to move the encoder to first; by default it stays where it is.
        show_progress (`bool`, defaults to `False`): show a progress bar.

    Returns:
        `torch.Tensor` of shape `(len(texts), D)`, float32, on the CPU; not normalized in general.

    Raises:
        ValueError: if a text is not a non-empty string, the encoder is of no known kind, an option does not concern
            it, or a tokenizer is missing.
    """
    check_texts(texts, batch_size)
    if isinstance(encoder, (str, Path)):
        encoder, processor = _load(str(encoder), processor, pooling)
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "device": device}
    options["show_progress"] = show_progress
    is_sentence_transformer = hasattr(encoder, "encode") and hasattr(encoder, "modalities")
    joint = None if is_sentence_transformer else _joint_space_tower(encoder)
    if (is_sentence_transformer or joint is not None) and (is_causal is not None or pooling is not None):
        raise ValueError(
            f"`is_causal` and `pooling` concern a raw LLM, and {type(encoder).__name__} has its own. Leave them out."
        )
    if is_sentence_transformer:
        if max_length is not None:
            raise ValueError("`max_length` of a `SentenceTransformer` is its `max_seq_length`. Set it there.")
        return embed_with_sentence_transformer(encoder, texts, batch_size, show_progress, device)
    if not isinstance(encoder, torch.nn.Module):
        raise ValueError(
            f"`encoder` of type {type(encoder).__name__} is neither a `SentenceTransformer` nor a model of "
            "transformers, nor the name of one."
        )
    if processor is None:
        raise ValueError(f"{type(encoder).__name__} needs a tokenizer to embed texts. Pass it as `processor`.")
    if joint is not None:
        return encode_texts(joint, texts, processor=processor, **options)
    return _embed_with_llm(encoder, texts, getattr(processor, "tokenizer", processor), is_causal, pooling, options)


def embed_with_sentence_transformer(
    model: Any,
    texts: Sequence[str],
    batch_size: int,
    show_progress: bool = False,
    device: str | torch.device | None = None,
) -> torch.Tensor:
    """Embeddings of a `SentenceTransformer`, without any prompt; equal texts once, so that they tie exactly."""
    unique, rows = distinct(texts)
    if device is not None:
        model.to(device)
    with evaluation_mode(model):
        encoded = encode_as_text(model, unique, batch_size, show_progress)
    return torch.as_tensor(encoded)[rows].float().cpu()


def _load(name: str, processor: Any, pooling: Pooling | None) -> tuple[Any, Any]:
    # Imported where they are used: they take seconds, and most evaluations need neither.
    from transformers import AutoModel, AutoTokenizer

    from ..modeling.loading_llm2clip import find_adapters, find_file, load_pretrained_text

    if pooling is None and find_file(name, "modules.json") is not None:
        raise ValueError(
            f"`{name}` is a sentence-transformers model with a pooling of its own. Pass it as `SentenceTransformer`, "
            "or say with `pooling` how its LLM alone shall be pooled."
        )
    processor = AutoTokenizer.from_pretrained(name) if processor is None else processor
    if find_adapters(name) is None:
        return AutoModel.from_pretrained(name).eval(), processor
    return load_pretrained_text(name, None, None).eval(), processor


class _TextTower(torch.nn.Module):
    """A text tower alone, with the interface of the whole model."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower, self.config = tower, tower.config

    def get_text_features(self, **inputs: torch.Tensor) -> Any:
        outputs = self.tower(**inputs)
        embeds = getattr(outputs, "text_embeds", None)
        return SimpleNamespace(pooler_output=outputs.pooler_output if embeds is None else embeds)


def _joint_space_tower(encoder: Any) -> Any:
    """`encoder` as a model with `get_text_features`; `None` if it has no joint space."""
    if hasattr(encoder, "get_text_features"):
        return encoder
    name = type(encoder).__name__
    if name.endswith("TextModelWithProjection") or name in ("SiglipTextModel", "Siglip2TextModel"):
        return _TextTower(encoder)
    if name == "CLIPTextModel":
        raise ValueError(
            "`CLIPTextModel` has no projection to the joint space. Load `CLIPTextModelWithProjection`, or `CLIPModel`."
        )
    return None


def _embed_with_llm(
    model: Any,
    texts: Sequence[str],
    tokenizer: Any,
    is_causal: bool | None,
    pooling: str | None,
    options: dict[str, Any],
) -> torch.Tensor:
    from ..modeling import pool_text, text_prefix_length

    if pooling not in (None, "mean", "last"):
        raise ValueError(f"`pooling` must be 'mean' or 'last', got {pooling!r}.")
    llm = model.base_model  # without the head that predicts tokens
    if pooling is None and getattr(llm.config, "text_pooling", None) in ("eos", "last"):
        pooling = "last"  # as stage 1 trained it
    unique, rows_of_texts = distinct(texts)
    length = options["max_length"] or longest_text(llm, tokenizer)
    prefix = 0 if pooling == "last" else text_prefix_length(tokenizer)

    def encode(rows: list[int], target: torch.device) -> torch.Tensor:
        batch = tokenizer([unique[row] for row in rows], truncation=True, max_length=length)
        ids = [torch.tensor(each) for each in batch["input_ids"]]
        # Padded here: many LLMs come without a pad token, and what is masked may be any token.
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths = torch.tensor([len(each) for each in ids])
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long().to(target)
        states = llm(input_ids=padded.to(target), attention_mask=mask).last_hidden_state
        if pooling == "last":
            return states[torch.arange(len(ids)), lengths.to(target) - 1]
        return pool_text(states, mask, prefix)

    if options["device"] is not None:
        model.to(options["device"])
    description = "Encoding texts" if options["show_progress"] else None
    with _attention(llm, is_causal):
        batches = batches_by_length(unique, options["batch_size"])
        return encode_batches(llm, encode, batches, options["device"], description, True)[rows_of_texts]


@contextlib.contextmanager
def _attention(llm: Any, is_causal: bool | None) -> Iterator[None]:
    """Set the direction of attention on the config, where every mask is made from, and put it back."""
    from ..modeling import assert_bidirectional

    if is_causal is None:
        yield
        return
    had, before = hasattr(llm.config, "is_causal"), getattr(llm.config, "is_causal", None)
    llm.config.is_causal = is_causal
    try:
        if not is_causal:
            assert_bidirectional(llm)
        yield
    finally:
        if had:
            llm.config.is_causal = before
        else:
            del llm.config.is_causal
