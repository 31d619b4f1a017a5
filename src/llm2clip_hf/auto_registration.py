# SPDX-License-Identifier: Apache-2.0
"""Makes LLM2CLIP known to the Auto classes of transformers, at the moment they are first used.

Importing the model classes costs seconds, importing this package must not. So the classes are registered when the
module of an Auto class is imported, or at once where it has been imported before.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def _register_config(module: ModuleType) -> None:
    from .modeling.configuration_llm2clip import LLM2CLIPConfig

    module.AutoConfig.register("llm2clip", LLM2CLIPConfig, exist_ok=True)


def _register_models(module: ModuleType) -> None:
    from .modeling import LLM2CLIPConfig, LLM2CLIPModel

    module.AutoModel.register(LLM2CLIPConfig, LLM2CLIPModel, exist_ok=True)
    module.AutoModelForZeroShotImageClassification.register(LLM2CLIPConfig, LLM2CLIPModel, exist_ok=True)


def _register_processor(module: ModuleType) -> None:
    from .modeling import LLM2CLIPConfig, LLM2CLIPProcessor

    module.AutoProcessor.register(LLM2CLIPConfig, LLM2CLIPProcessor, exist_ok=True)


_AUTO_MODULES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.processing_auto": _register_processor,
}


class _RegisteringLoader(importlib.abc.Loader):
    """Loads a module as its own loader does, then registers."""

    def __init__(self, loader: importlib.abc.Loader, register: Callable[[ModuleType], None]) -> None:
        self.loader = loader
        self.register = register

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.register(module)


class _AutoModuleFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of the Auto classes as the other finders do, with a loader that registers."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        register = _AUTO_MODULES.get(fullname)
        if register is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _RegisteringLoader(spec.loader, register)
                return spec
        return None


def register_with_auto_classes() -> None:
    """Registers config, model and processor with the Auto classes, now or when they are first imported."""
    if any(isinstance(finder, _AutoModuleFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AutoModuleFinder())
    for name, register in _AUTO_MODULES.items():
        if name in sys.modules:
            register(sys.modules[name])
