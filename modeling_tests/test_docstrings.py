# SPDX-License-Identifier: Apache-2.0
"""Public names are documented, every parameter of theirs too, and the examples in docstrings run."""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
from typing import Any

import pytest

import llm2clip_hf


PACKAGES = ("", ".modeling", ".ops", ".losses", ".data", ".evaluation", ".training", ".hub")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(llm2clip_hf.__path__, "llm2clip_hf.")
    if not module.name.endswith(("__main__", "contrastive_triton"))
)

# Classes that a user does not construct, and what makes them.
MADE_BY_A_METHOD = {"CaptionEmbeddingStore": "open"}


def public_names() -> list[tuple[str, Any]]:
    names = []
    for package in PACKAGES:
        module = importlib.import_module(f"llm2clip_hf{package}")
        names += [(f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__]
    return [(name, value) for name, value in names if callable(value)]


def signature_of(value: Any) -> list[str]:
    if dataclasses.is_dataclass(value):
        # The fields that the class adds; those of `TrainingArguments` are documented there.
        inherited = {name for base in value.__mro__[1:] for name in vars(base).get("__annotations__", {})}
        return [name for name in vars(value).get("__annotations__", {}) if name not in inherited]
    if value.__name__ in MADE_BY_A_METHOD:
        value = getattr(value, MADE_BY_A_METHOD[value.__name__])
    if inspect.isclass(value) and "__init__" not in vars(value):
        return []  # constructed as its base class is
    function = value.__init__ if inspect.isclass(value) else value
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


@pytest.mark.parametrize(("name", "value"), public_names(), ids=lambda v: v if isinstance(v, str) else "")
def test_public_name_documents_its_parameters(name: str, value: Any) -> None:
    text = inspect.getdoc(value) or ""
    if inspect.isclass(value):
        text += inspect.getdoc(value.__init__) or ""
        text += inspect.getdoc(getattr(value, MADE_BY_A_METHOD.get(value.__name__, ""), None)) or ""
    assert len(text.splitlines()[0]) > 20, name
    for parameter in signature_of(value):
        assert re.search(rf"\b{parameter}\b", text), f"{name} does not say what `{parameter}` is"


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module: str) -> None:
    results = doctest.testmod(
        importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    assert results.failed == 0
