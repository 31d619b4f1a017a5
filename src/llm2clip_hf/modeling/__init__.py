# SPDX-License-Identifier: Apache-2.0
"""The model, its configuration and its processor: the files that travel to the Hub with every saved model."""

import importlib
from typing import TYPE_CHECKING, Any

from .configuration_eva02 import Eva02VisionConfig
from .configuration_llm2clip import LLM2CLIPConfig


if TYPE_CHECKING:
    from .modeling_eva02 import Eva02VisionModel
    from .modeling_llm2clip import LLM2CLIPModel, LLM2CLIPOutput
    from .processing_llm2clip import LLM2CLIPProcessor, apply_text_template, text_prefix_length
    from .text_llm2clip import LLM2CLIPTextAdapter, assert_bidirectional, pool_text
    from .vision_llm2clip import LLM2CLIPVisionModel

# Imported when first used: the config must be importable while transformers is still loading its Auto classes.
_MODULES = {
    "Eva02VisionModel": "modeling_eva02",
    "LLM2CLIPModel": "modeling_llm2clip",
    "LLM2CLIPOutput": "modeling_llm2clip",
    "LLM2CLIPProcessor": "processing_llm2clip",
    "LLM2CLIPTextAdapter": "text_llm2clip",
    "LLM2CLIPVisionModel": "vision_llm2clip",
    "apply_text_template": "processing_llm2clip",
    "assert_bidirectional": "text_llm2clip",
    "pool_text": "text_llm2clip",
    "text_prefix_length": "processing_llm2clip",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Eva02VisionConfig",
    "Eva02VisionModel",
    "LLM2CLIPConfig",
    "LLM2CLIPModel",
    "LLM2CLIPOutput",
    "LLM2CLIPProcessor",
    "LLM2CLIPTextAdapter",
    "LLM2CLIPVisionModel",
    "apply_text_template",
    "assert_bidirectional",
    "pool_text",
    "text_prefix_length",
]
