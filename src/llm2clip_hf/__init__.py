# SPDX-License-Identifier: Apache-2.0
"""Hugging Face-native LLM2CLIP: a large language model as CLIP's text encoder (arXiv 2411.04997)."""

from .version import __version__


__all__ = ["__version__"]
