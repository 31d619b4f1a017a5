# SPDX-License-Identifier: Apache-2.0
"""Makes LLM2CLIP known to the Auto classes of transformers, at the moment they are first used.

Importing the model classes costs seconds, importing this package must not. So a class is registered as soon as both
its own module and the module of its Auto class are there:

(1) When the module of an Auto class has been imported, ours is imported too, and its class is registered.
(2) When ours is imported first, it imports the Auto class half-way; then step (1) waits until ours is complete.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple


def _register_config(auto: ModuleType, own: ModuleType) -> None:
    auto.AutoConfig.register("llm2clip", own.LLM2CLIPConfig, exist_ok=True)


def _register_model(auto: ModuleType, own: ModuleType) -> None:
    for auto_class in (auto.AutoModel, auto.AutoModelForZeroShotImageClassification):
        auto_class.register(own.LLM2CLIPConfig, own.LLM2CLIPModel, exist_ok=True)


def _register_processor(auto: ModuleType, own: ModuleType) -> None:
    config = importlib.import_module(f"{__package__}.modeling.configuration_llm2clip")
    auto.AutoProcessor.register(config.LLM2CLIPConfig, own.LLM2CLIPProcessor, exist_ok=True)


class _Pair(NamedTuple):
    auto: str
    own: str
    register: Callable[[ModuleType, ModuleType], None]


_PAIRS = (
    _Pair(
        "transformers.models.auto.configuration_auto",
        f"{__package__}.modeling.configuration_llm2clip",
        _register_config,
    ),
    _Pair("transformers.models.auto.modeling_auto", f"{__package__}.modeling.modeling_llm2clip", _register_model),
    _Pair(
        "transformers.models.auto.processing_auto", f"{__package__}.modeling.processing_llm2clip", _register_processor
    ),
)


class _RegisteringLoader(importlib.abc.Loader):
    """Loads a module as its own loader does, then registers what is ready."""

    def __init__(self, loader: importlib.abc.Loader, finder: "_PairFinder") -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.finder.loading.add(module.__name__)
        try:
            self.loader.exec_module(module)
        finally:
            self.finder.loading.discard(module.__name__)
        self.finder.loaded.add(module.__name__)
        self.finder.register()


class _PairFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of the pairs as the other finders do, and has them registered once they are loaded."""

    def __init__(self) -> None:
        self.loading: set[str] = set()
        self.loaded: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        # All of ours: while any of them is loading, those that import it cannot be.
        if not fullname.startswith(f"{__package__}.modeling.") and all(fullname != pair.auto for pair in _PAIRS):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _RegisteringLoader(spec.loader, self)
                return spec
        return None

    def register(self) -> None:
        """Registers the classes of the modules that were loaded, unless others are still on their way."""
        while self.loaded and not self.loading:
            name = self.loaded.pop()
            for pair in _PAIRS:
                if name in (pair.auto, pair.own) and pair.auto in sys.modules:
                    pair.register(sys.modules[pair.auto], importlib.import_module(pair.own))


def register_with_auto_classes() -> None:
    """Registers config, model and processor with the Auto classes, now or when they are first imported."""
    if any(isinstance(finder, _PairFinder) for finder in sys.meta_path):
        return
    finder = _PairFinder()
    sys.meta_path.insert(0, finder)
    finder.loaded.update(pair.auto for pair in _PAIRS if pair.auto in sys.modules)
    finder.register()
