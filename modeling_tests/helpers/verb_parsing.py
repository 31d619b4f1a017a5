# SPDX-License-Identifier: Apache-2.0
"""A verb that stops when it has read its options, to see whether command lines parse."""

import argparse
import importlib
from typing import Any

import pytest

from llm2clip_hf.cli.main import VERBS


class Parsed(BaseException):
    """Raised where a verb would go on to work."""


def stop_after_parsing(verb: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of a verb, made to end when its options have been read."""
    module = importlib.import_module(f"llm2clip_hf.cli.{VERBS[verb][0]}")
    holder: Any = module if hasattr(module, "parse_options") else argparse.ArgumentParser
    name = "parse_options" if holder is module else "parse_args"
    read = getattr(holder, name)

    def parse(*args: Any, **kwargs: Any) -> None:
        read(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(holder, name, parse)
    return module
