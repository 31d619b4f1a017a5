# SPDX-License-Identifier: Apache-2.0
"""Hugging Face-native LLM2CLIP: a large language model as CLIP's text encoder (arXiv 2411.04997)."""

import importlib.metadata
import re
from typing import TYPE_CHECKING, Any

from .auto_registration import register_with_auto_classes
from .version import __version__


if TYPE_CHECKING:
    from .modeling import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor

_OLDEST_TRANSFORMERS = "5.17"
_SUPPORTED_TRANSFORMERS = f">={_OLDEST_TRANSFORMERS},<6"


def _check_transformers() -> None:
    """Raises `ImportError` for a transformers that is too old; reads its version without importing it."""
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:  # not installed, or a checkout: its import will tell
        return
    numbers = [[int(number) for number in re.findall(r"\d+", each)[:2]] for each in (found, _OLDEST_TRANSFORMERS)]
    if numbers[0] < numbers[1]:
        raise ImportError(
            f"`llm2clip_hf` needs transformers {_OLDEST_TRANSFORMERS} or newer, found {found}. Update it: "
            "`pip install -U transformers`."
        )


_check_transformers()
register_with_auto_classes()


def __getattr__(name: str) -> Any:
    # The model classes take seconds to import; that is due when one is used.
    if name in ("LLM2CLIPConfig", "LLM2CLIPModel", "LLM2CLIPProcessor"):
        try:
            from . import modeling
        except ImportError as error:  # what a newer transformers moved or removed
            supported = f"transformers{_SUPPORTED_TRANSFORMERS}"
            raise ImportError(
                f"`{name}` needs {supported}, found {importlib.metadata.version('transformers')}: {error}. Install a "
                f'supported one: `pip install "{supported}"`.'
            ) from error
        return getattr(modeling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["LLM2CLIPConfig", "LLM2CLIPModel", "LLM2CLIPProcessor", "__version__"]
