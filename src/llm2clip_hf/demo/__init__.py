# SPDX-License-Identifier: Apache-2.0
"""The demo of `llm2clip demo`: a miniature of both stages of LLM2CLIP on real images, on a CPU."""

from .recipe import FAST, FULL, DemoSettings, run_demo


__all__ = ["FAST", "FULL", "DemoSettings", "run_demo"]
