# SPDX-License-Identifier: Apache-2.0
"""Hugging Face-native LLM2CLIP: a large language model as CLIP's text encoder (arXiv 2411.04997)."""

from typing import TYPE_CHECKING, Any

from .auto_registration import register_with_auto_classes
from .version import __version__


if TYPE_CHECKING:
    from .modeling import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor

register_with_auto_classes()


def __getattr__(name: str) -> Any:
    # The model classes take seconds to import; that is due when one is used.
    if name in ("LLM2CLIPConfig", "LLM2CLIPModel", "LLM2CLIPProcessor"):
        from . import modeling

        return getattr(modeling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["LLM2CLIPConfig", "LLM2CLIPModel", "LLM2CLIPProcessor", "__version__"]
