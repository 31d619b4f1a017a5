# SPDX-License-Identifier: Apache-2.0
"""
Encode many images or texts with any model of CLIP's interface.

Such a model has `get_image_features(pixel_values=...)` and `get_text_features(input_ids=..., attention_mask=...)`,
which return an object with `pooler_output`: `LLM2CLIPModel`, and `CLIPModel`, `SiglipModel` and their relatives in
transformers.

In a process group (`torchrun`, `accelerate launch`) each process encodes its share of the batches; all get all rows.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.images import ImageSource, load_image, undecoded
from ..distributed import all_gather, all_gather_sizes, rank, world_size


__all__ = ["encode_images", "encode_llm_embeds", "encode_texts"]

# The paper's longest text in LLM tokens (section 4.1); a shorter maximum of the tokenizer wins.
MAX_TEXT_LENGTH = 512

# Trained without attention mask on texts padded to the full length: padding is part of their input.
_PADDED_WITHOUT_MASK = ("siglip", "siglip2", "siglip_text_model", "siglip2_text_model")


def encode_images(
    model: Any,
    images: ImageSource,
    *,
    processor: Any = None,
    transform: Callable[[int], torch.Tensor] | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    show_progress: bool = False,
    gather_across_devices: bool = True,
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
        gather_across_devices (`bool`, defaults to `True`): in a process group, share the batches among the processes,
            all of which make this call; `False` encodes everything here.

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
    check_batching(len(images), batch_size, "images")
    images = undecoded(images)

    def encode(rows: list[int], target: torch.device) -> torch.Tensor:
        if transform is not None:
            inputs = {"pixel_values": torch.stack([transform(row) for row in rows])}
        else:
            inputs = image_processor(images=[load_image(images, row) for row in rows], return_tensors="pt")
        return model.get_image_features(**{name: value.to(target) for name, value in inputs.items()}).pooler_output

    batches = split_batches(list(range(len(images))), batch_size)
    description = "Encoding images" if show_progress else None
    return normalize(encode_batches(model, encode, batches, device, description, gather_across_devices))


def encode_texts(
    model: Any,
    texts: Sequence[str],
    *,
    processor: Any,
    batch_size: int = 64,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    show_progress: bool = False,
    gather_across_devices: bool = True,
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
            Tokens a text is truncated to; by default 512, or the maximum of tokenizer or text tower if that is
            smaller (CLIP: 77). SigLIP models get every text padded to this length, as they were trained (64).
        device (*optional*): device to move the model to first; by default the model stays where it is.
        show_progress (`bool`, defaults to `False`): show a progress bar.
        gather_across_devices (`bool`, defaults to `True`): in a process group, share the batches among the processes,
            all of which make this call; `False` encodes everything here.

    Returns:
        `torch.Tensor` of shape `(len(texts), projection_dim)`, float32, L2-normalized, on the CPU.

    Raises:
        ValueError: if there is no text, or a text is not a non-empty string; the message names the row.

    Example:
    >>> encode_texts(model, ["a red boat", "a dog"], processor=processor).shape  # doctest: +SKIP
    torch.Size([2, 1280])
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    check_texts(texts, batch_size)
    if max_length is None:
        max_length = longest_text(model, tokenizer)
    unique, rows_of_texts = distinct(texts)

    def encode(rows: list[int], target: torch.device) -> torch.Tensor:
        inputs = tokenize(model, tokenizer, [unique[row] for row in rows], max_length)
        return model.get_text_features(**{name: value.to(target) for name, value in inputs.items()}).pooler_output

    description = "Encoding texts" if show_progress else None
    batches = batches_by_length(unique, batch_size)
    return normalize(encode_batches(model, encode, batches, device, description, gather_across_devices))[rows_of_texts]


def encode_llm_embeds(
    model: Any,
    llm_embeds: Callable[[list[int]], torch.Tensor],
    num_rows: int,
    *,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    show_progress: bool = False,
    gather_across_devices: bool = True,
) -> torch.Tensor:
    """Text embeddings in the joint space from stored LLM embeddings."""
    check_batching(num_rows, batch_size, "embeddings")

    def encode(rows: list[int], target: torch.device) -> torch.Tensor:
        return model.get_text_features(llm_embeds=llm_embeds(rows).to(target, torch.float32)).pooler_output

    batches = split_batches(list(range(num_rows)), batch_size)
    description = "Encoding texts" if show_progress else None
    return normalize(encode_batches(model, encode, batches, device, description, gather_across_devices))


def longest_text(model: Any, tokenizer: Any) -> int:
    """Tokens that a text is truncated to by default."""
    limit = min(MAX_TEXT_LENGTH, tokenizer.model_max_length)
    config = getattr(model, "config", None)
    text_config = getattr(config, "text_config", None) or config
    # Not every tokenizer knows how many positions the text tower has.
    return min(limit, getattr(text_config, "max_position_embeddings", None) or limit)


def tokenize(model: Any, tokenizer: Any, texts: list[str], max_length: int) -> dict[str, torch.Tensor]:
    """Inputs of the text tower for a batch."""
    unmasked = getattr(getattr(model, "config", None), "model_type", None) in _PADDED_WITHOUT_MASK
    batch = tokenizer(
        texts,
        padding="max_length" if unmasked else True,
        truncation=True,
        max_length=max_length,
        return_attention_mask=not unmasked,
        return_tensors="pt",
    )
    return {name: batch[name] for name in (["input_ids"] if unmasked else ["input_ids", "attention_mask"])}


@torch.inference_mode()
def encode_batches(
    model: Any,
    encode: Callable[[list[int], torch.device], torch.Tensor],
    batches: list[list[int]],
    device: str | torch.device | None,
    description: str | None,
    gather_across_devices: bool,
) -> torch.Tensor:
    """Rows of `encode` for all batches, put back in the order of the row numbers, float32, on the CPU."""
    if device is not None:
        model.to(device)
    target = next(model.parameters()).device
    count = world_size() if gather_across_devices else 1
    # Strided, so that every process gets long and short batches.
    share = [batches[each::count] for each in range(count)]
    failure: Exception | None = None
    outputs = []
    try:
        with evaluation_mode(model):
            for rows in tqdm(share[rank() if count > 1 else 0], desc=description, disable=description is None):
                outputs.append(encode(rows, target).float().cpu())
    except Exception as error:
        if count == 1:
            raise
        failure = error
    encoded = _gather(outputs, target, failure) if count > 1 else torch.cat(outputs)
    ordered = torch.empty_like(encoded)
    ordered[[row for part in share for rows in part for row in rows]] = encoded
    return ordered


def _gather(outputs: list[torch.Tensor], target: torch.device, failure: Exception | None) -> torch.Tensor:
    """Rows of all processes, in rank order. An error in one process ends all, so that none waits for ever."""
    failed = [position for position, flag in enumerate(all_gather_sizes(int(failure is not None), target)) if flag]
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(f"Encoding failed on rank {failed[0]}, whose error says why.")
    # A process that had no batch does not know the width.
    width = max(all_gather_sizes(outputs[0].shape[1] if outputs else 0, target))
    rows = torch.cat(outputs) if outputs else torch.empty(0, width)
    return all_gather(rows.to(target)).cpu()


def normalize(embeds: torch.Tensor) -> torch.Tensor:
    """Rows of length 1."""
    return torch.nn.functional.normalize(embeds, dim=-1)


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


def split_batches(order: list[int], batch_size: int) -> list[list[int]]:
    """`order` in pieces of `batch_size`."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def batches_by_length(texts: list[str], batch_size: int) -> list[list[int]]:
    """Rows of `texts` in batches of similar length, longest first: a batch too large for memory fails at the start."""
    return split_batches(sorted(range(len(texts)), key=lambda row: -len(texts[row])), batch_size)


def distinct(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The different texts, to encode each once, and the row of each text among them."""
    position = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    return list(position), [position[text] for text in texts]


def check_texts(texts: Sequence[str], batch_size: int) -> None:
    """Raise a `ValueError` that names the first text that is none."""
    check_batching(len(texts), batch_size, "texts")
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"Text {row} is {text!r}, not a non-empty string. Drop it.")


def check_batching(count: int, batch_size: int, name: str) -> None:
    """Raise a `ValueError` if there is nothing to encode, or no batch."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be positive, got {batch_size}.")
    if not count:
        raise ValueError(f"There are no {name} to encode. Pass at least one.")
