# SPDX-License-Identifier: Apache-2.0
"""A verb that stops when it has read its options, to see whether command lines parse."""

import importlib
from typing import Any

import pytest

from llm2clip_hf.cli.main import VERBS


class Parsed(BaseException):
    """Raised where a verb would go on to work, with the options that it has read."""


def stop_after_parsing(verb: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of a verb, made to end when its options have been read."""
    module: Any = importlib.import_module(f"llm2clip_hf.cli.{VERBS[verb][0]}")
    read = module.parse_options

    def parse(*args: Any, **kwargs: Any) -> None:
        raise Parsed(*read(*args, **kwargs))

    monkeypatch.setattr(module, "parse_options", parse)
    return module
