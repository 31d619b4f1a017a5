# SPDX-License-Identifier: Apache-2.0
"""What FSDP2 needs to know of a CLIP-like model, whose parameters it spreads over processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial

from .trained_parts import is_llm2clip


# Called without the model's `forward`.
_FEATURE_METHODS = ("get_image_features", "get_text_features", "get_llm_embeds")


def whole_parameter(parameter: torch.Tensor) -> torch.Tensor:
    """
    The whole tensor of a parameter that FSDP2 shards; any other as it is.

    For use outside of the model's `forward`, where FSDP2 does not see the gradient, so that the mean over processes is
    taken here.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


@contextmanager
def ready_for_fsdp2(model: Any) -> Iterator[None]:
    """Makes a model give the answers that accelerate shards it by, while it does."""
    # The list of a vision tower also names layers of the text tower that it was published with, and accelerate stops
    # at a name that is not there.
    present = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = sorted(present & set(model._no_split_modules or ()))
    if is_llm2clip(model) and model.text_model is None:
        # accelerate asks for token embeddings to shard apart; a model without an LLM answers with an error.
        model.get_input_embeddings = lambda: None
    try:
        yield
    finally:
        model.__dict__.pop("get_input_embeddings", None)


def register_feature_methods(model: Any) -> None:
    """Lets the methods that give features be called on a model that is sharded."""
    for name in _FEATURE_METHODS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def unsharded_class(model: Any) -> type:
    """The class that a model had before FSDP2 derived one from it."""
    classes = type(model).__mro__
    return classes[classes.index(FSDPModule) + 1] if isinstance(model, FSDPModule) else type(model)
