# SPDX-License-Identifier: Apache-2.0
"""The version of llm2clip_hf, in one place."""

__version__ = "0.1.0.dev0"
