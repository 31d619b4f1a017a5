# SPDX-License-Identifier: Apache-2.0
"""One face for everything that turns captions into LLM embeddings: a function, an object with `encode`, the model."""

import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .fingerprint import FingerprintValue, model_fingerprint


logger = logging.getLogger(__name__)
# Of functions, whose tokens are not known: English has four bytes per token. It decides the size of batches alone.
_BYTES_PER_TOKEN = 4


class TextEncoder(Protocol):
    """What `embed_captions` needs of an encoder."""

    @property
    def pads(self) -> bool:
        """Whether a batch costs its rows times its longest text; otherwise the sum of the lengths."""

    def token_lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text, exact or estimated; decides the batches, never the values."""

    def encode(self, texts: list[str]) -> torch.Tensor:
        """Embeddings of shape `(n, dim)`."""

    def fingerprint(self) -> dict[str, FingerprintValue]:
        """What the embeddings depend on."""


def as_text_encoder(encoder: Any, tokenizer: Any, max_length: int) -> TextEncoder:
    """Wrap what the user passed to `embed_captions`."""
    # Duck typing, because `data` is a layer below the packages that own these classes. A model is callable too, so it
    # has to be recognized first.
    if hasattr(encoder, "get_llm_embeds"):
        if tokenizer is None:
            raise ValueError("An `LLM2CLIPModel` needs its `tokenizer` to embed captions. Pass `tokenizer=...`.")
        return _ModelEncoder(encoder, tokenizer, max_length)
    if tokenizer is not None:
        raise ValueError(
            f"`tokenizer` is used with an `LLM2CLIPModel` only, got an encoder of type {type(encoder).__name__}. "
            "Leave `tokenizer` out."
        )
    if hasattr(encoder, "encode"):
        module = encoder if isinstance(encoder, torch.nn.Module) else None
        return _FunctionEncoder(
            functools.partial(encode_as_text, encoder), module, getattr(encoder, "tokenizer", None)
        )
    if callable(encoder) and not isinstance(encoder, torch.nn.Module):
        return _FunctionEncoder(encoder)
    raise ValueError(
        f"`encoder` of type {type(encoder).__name__} is neither a function from strings to a tensor, nor an object "
        "with `encode`, nor an `LLM2CLIPModel`. Wrap it in a function."
    )


def _without_overflow(
    encode: Callable[[list[str]], torch.Tensor], texts: list[str], module: torch.nn.Module | None
) -> torch.Tensor:
    """Embeddings of a batch; where they overflow in an LLM in float16, in float32, with the same weights."""
    embeddings = torch.as_tensor(encode(texts))
    if module is None or bool(embeddings.isfinite().all()):
        return embeddings
    halves = [*module.parameters(), *module.buffers()]
    halves = [tensor for tensor in halves if tensor.dtype == torch.float16 and not tensor.is_meta]
    if not halves:
        return embeddings
    logger.warning("The LLM overflows in float16; %d captions are embedded in float32 instead.", len(texts))
    for tensor in halves:
        tensor.data = tensor.data.float()
    try:
        return torch.as_tensor(encode(texts))
    finally:
        for tensor in halves:
            tensor.data = tensor.data.half()


def _token_lengths(tokenizer: Any, texts: list[str], longest: int | None) -> list[int]:
    """Tokens of each text, template and all, cut off at the longest."""
    limit = {} if longest is None else {"truncation": True, "max_length": longest}
    return [len(ids) for ids in tokenizer(texts, return_attention_mask=False, **limit)["input_ids"]]


class _FunctionEncoder:
    # To be on the safe side: what happens in the function is not known.
    pads = True

    def __init__(
        self,
        function: Callable[[list[str]], torch.Tensor],
        module: torch.nn.Module | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._function, self._module = function, module
        self._tokenizer = tokenizer if hasattr(tokenizer, "backend_tokenizer") else None
        self._longest = getattr(module, "max_seq_length", None)

    def token_lengths(self, texts: list[str]) -> list[int]:
        if self._tokenizer is None:
            return [1 + len(text.encode()) // _BYTES_PER_TOKEN for text in texts]
        return _token_lengths(self._tokenizer, texts, self._longest)

    def encode(self, texts: list[str]) -> torch.Tensor:
        return _without_overflow(self._function, texts, self._module)

    def fingerprint(self) -> dict[str, FingerprintValue]:
        raise ValueError(
            "`fingerprint` is needed with this encoder, so that a later run can tell what made the embeddings. "
            "Make one with `embedding_fingerprint(llm, tokenizer, ...)`."
        )


class _ModelEncoder:
    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        self._model, self._tokenizer, self._max_length = model, tokenizer, max_length
        if model.text_model is None:
            raise ValueError("The `LLM2CLIPModel` holds no LLM. Load it with its LLM to embed captions.")

    def token_lengths(self, texts: list[str]) -> list[int]:
        return _token_lengths(self._tokenizer, texts, self._max_length)

    @property
    def pads(self) -> bool:
        # Every name for flash attention in transformers, also of kernels from the Hub, has the word in it.
        return "flash" not in str(getattr(self._model.text_model.config, "_attn_implementation", None))

    def encode(self, texts: list[str]) -> torch.Tensor:
        return _without_overflow(self._encode, texts, self._model.text_model)

    @torch.inference_mode()
    def _encode(self, texts: list[str]) -> torch.Tensor:
        text_model = self._model.text_model
        was_training = text_model.training
        text_model.eval()
        try:
            return self._encode_padded(texts) if self.pads else self._encode_packed(texts)
        finally:
            text_model.train(was_training)

    def _encode_padded(self, texts: list[str]) -> torch.Tensor:
        batch = self._tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self._max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        device = self._model.text_model.device
        return self._model.get_llm_embeds(
            input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
        )

    def _encode_packed(self, texts: list[str]) -> torch.Tensor:
        """All texts in one row, without padding; flash attention keeps them apart by their boundaries."""
        text_model = self._model.text_model
        ids = self._tokenizer(texts, truncation=True, max_length=self._max_length)["input_ids"]
        lengths = [len(each) for each in ids]
        limit = getattr(text_model.config, "max_position_embeddings", None)
        if limit is not None and max(lengths) > limit:
            raise ValueError(
                f"A caption has {max(lengths)} tokens, more than the {limit} that the LLM can take. "
                "Lower `max_length`."
            )
        device = text_model.device
        boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        outputs = text_model(
            input_ids=torch.tensor([list(itertools.chain.from_iterable(ids))], device=device),
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(device),
            cu_seq_lens_q=boundaries,
            cu_seq_lens_k=boundaries,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
            use_cache=False,
        )
        config = self._model.config
        return _pool_packed(outputs.last_hidden_state[0], lengths, config.text_prefix_length or 0, config.text_pooling)

    def fingerprint(self) -> dict[str, FingerprintValue]:
        return model_fingerprint(self._model, self._tokenizer, self._max_length)


def _pool_packed(
    hidden_states: torch.Tensor, lengths: list[int], prefix_length: int, pooling: str = "mean"
) -> torch.Tensor:
    """One vector for each text of a packed row; as `pool_text` of a padded batch."""
    texts = hidden_states.split(lengths)
    if pooling != "mean":
        return torch.stack([text[-1].float() for text in texts])
    own = [text[prefix_length:] if len(text) > prefix_length else text for text in texts]
    # One sum per text: its rounding depends on the text alone, and no atomic addition makes it vary.
    return torch.stack([text.float().mean(0) for text in own])


def encode_as_text(
    encoder: Any, texts: list[str], batch_size: int | None = None, show_progress: bool = False
) -> torch.Tensor:
    """Embeddings of a `SentenceTransformer` or the like, without any prompt, of texts alone."""
    # A multimodal sentence-transformers model would open a text that looks like the URL or path of an image.
    is_multimodal = any(modality != "text" for modality in getattr(encoder, "modalities", ["text"]))
    inputs = [{"text": text} for text in texts] if is_multimodal else texts
    # The empty prompt keeps a default prompt of the encoder away.
    return encoder.encode(
        inputs,
        prompt="",
        batch_size=batch_size or len(texts),
        convert_to_tensor=True,
        show_progress_bar=show_progress,
    )


__all__ = ["TextEncoder", "as_text_encoder", "encode_as_text"]
