# SPDX-License-Identifier: Apache-2.0
"""
Encode many images or texts with any model of CLIP's interface.

Such a model has `get_image_features(pixel_values=...)` and `get_text_features(input_ids=..., attention_mask=...)`,
which return an object with `pooler_output`: `LLM2CLIPModel`, and `CLIPModel` and its relatives in transformers.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.images import ImageSource, load_image


__all__ = ["encode_images", "encode_llm_embeds", "encode_texts"]

# The paper's longest text in LLM tokens (section 4.1); a shorter maximum of the tokenizer wins.
MAX_TEXT_LENGTH = 512


def encode_images(
    model: Any,
    images: ImageSource,
    *,
    processor: Any = None,
    transform: Callable[[int], torch.Tensor] | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    show_progress: bool = False,
) -> torch.Tensor:
    """
    Image embeddings in the joint space, in the given order.

    Args:
        model: a model of CLIP's interface; its train or eval mode is restored afterwards.
        images: sequence of PIL images or paths, or an image column of a `datasets.Dataset`.
        processor: an image processor of transformers, or a processor with one; needed unless `transform` is given.
        transform (*optional*): function from a position to pixel values of shape `(3, height, width)`, instead.
        batch_size (`int`, defaults to 64): images per forward pass.
        device (*optional*): device to move the model to first; by default the model stays where it is.
        show_progress (`bool`, defaults to `False`): show a progress bar.

    Returns:
        `torch.Tensor` of shape `(len(images), projection_dim)`, float32, L2-normalized, on the CPU.

    Raises:
        ValueError: if there is no image, an image cannot be read, or neither `processor` nor `transform` is given.

    Example:
    >>> encode_images(model, ["boat.jpg", "dog.jpg"], processor=processor).norm(dim=1)  # doctest: +SKIP
    tensor([1., 1.])
    """
    if processor is None and transform is None:
        raise ValueError("Images need a `processor`. Pass the processor of the model.")
    image_processor = getattr(processor, "image_processor", processor)
    _check_batching(len(images), batch_size, "images")

    def encode(rows: list[int], target: torch.device) -> torch.Tensor:
        if transform is not None:
            inputs = {"pixel_values": torch.stack([transform(row) for row in rows])}
        else:
            inputs = image_processor(images=[load_image(images, row) for row in rows], return_tensors="pt")
        return model.get_image_features(**{name: value.to(target) for name, value in inputs.items()}).pooler_output

    batches = _batches(list(range(len(images))), batch_size)
    return _encode(model, encode, batches, device, "Encoding images" if show_progress else None)


def encode_texts(
    model: Any,
    texts: Sequence[str],
    *,
    processor: Any,
    batch_size: int = 64,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    show_progress: bool = False,
) -> torch.Tensor:
    """
    Text embeddings in the joint space, in the given order.

    Equal texts are encoded once. Texts of similar length share a batch, so that little is padded.

    Args:
        model: a model of CLIP's interface; its train or eval mode is restored afterwards.
        texts (sequence of `str`): the texts.
        processor: a tokenizer of transformers, or a processor with one.
        batch_size (`int`, defaults to 64): texts per forward pass.
        max_length (`int`, *optional*):
            Tokens a text is truncated to; by default 512 or the tokenizer's own maximum, whichever is smaller.
        device (*optional*): device to move the model to first; by default the model stays where it is.
        show_progress (`bool`, defaults to `False`): show a progress bar.

    Returns:
        `torch.Tensor` of shape `(len(texts), projection_dim)`, float32, L2-normalized, on the CPU.

    Raises:
        ValueError: if there is no text, or a text is not a non-empty string; the message names the row.

    Example:
    >>> encode_texts(model, ["a red boat", "a dog"], processor=processor).shape  # doctest: +SKIP
    torch.Size([2, 1280])
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    _check_batching(len(texts), batch_size, "texts")
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"Text {row} is {text!r}, not a non-empty string. Drop it.")
    if max_length is None:
        max_length = min(MAX_TEXT_LENGTH, tokenizer.model_max_length)
    unique = list(dict.fromkeys(texts))

    def encode(rows: list[int], target: torch.device) -> torch.Tensor:
        batch = tokenizer(
            [unique[row] for row in rows],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        inputs = {name: batch[name].to(target) for name in ("input_ids", "attention_mask")}
        return model.get_text_features(**inputs).pooler_output

    # Longest first, so that a batch that does not fit in memory fails at the start.
    order = sorted(range(len(unique)), key=lambda row: -len(unique[row]))
    description = "Encoding texts" if show_progress else None
    encoded = _encode(model, encode, _batches(order, batch_size), device, description)
    position = {text: row for row, text in enumerate(unique)}
    return encoded[[position[text] for text in texts]]


def encode_llm_embeds(
    model: Any,
    llm_embeds: Callable[[list[int]], torch.Tensor],
    num_rows: int,
    *,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    show_progress: bool = False,
) -> torch.Tensor:
    """
    Text embeddings in the joint space from stored LLM embeddings.

    Args:
        model: an `LLM2CLIPModel`, with or without its LLM.
        llm_embeds: function from row numbers to LLM embeddings of shape `(n, llm_hidden_size)`, for example
            `CaptionEmbeddingStore.gather`.
        num_rows (`int`): rows to encode, 0 to `num_rows - 1`.
        batch_size (`int`, defaults to 64): rows per forward pass.
        device (*optional*): device to move the model to first; by default the model stays where it is.
        show_progress (`bool`, defaults to `False`): show a progress bar.

    Returns:
        `torch.Tensor` of shape `(num_rows, projection_dim)`, float32, L2-normalized, on the CPU.

    Raises:
        ValueError: if there is no row.
    """
    _check_batching(num_rows, batch_size, "embeddings")

    def encode(rows: list[int], target: torch.device) -> torch.Tensor:
        return model.get_text_features(llm_embeds=llm_embeds(rows).to(target, torch.float32)).pooler_output

    batches = _batches(list(range(num_rows)), batch_size)
    return _encode(model, encode, batches, device, "Encoding texts" if show_progress else None)


@torch.inference_mode()
def _encode(
    model: Any,
    encode: Callable[[list[int], torch.device], torch.Tensor],
    batches: list[list[int]],
    device: str | torch.device | None,
    description: str | None,
) -> torch.Tensor:
    """Rows of `encode` for all batches, put back in the order of the row numbers, normalized in float32."""
    if device is not None:
        model.to(device)
    target = next(model.parameters()).device
    outputs = []
    with evaluation_mode(model):
        for rows in tqdm(batches, desc=description, disable=description is None):
            outputs.append(encode(rows, target).float().cpu())
    encoded = torch.cat(outputs)
    ordered = torch.empty_like(encoded)
    ordered[[row for rows in batches for row in rows]] = encoded
    return torch.nn.functional.normalize(ordered, dim=-1)


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every module back into its own mode afterwards."""
    # Module by module, because `model.train()` would also wake a frozen tower that was in eval mode.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _batches(order: list[int], batch_size: int) -> list[list[int]]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _check_batching(count: int, batch_size: int, name: str) -> None:
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be positive, got {batch_size}.")
    if not count:
        raise ValueError(f"There are no {name} to encode. Pass at least one.")
