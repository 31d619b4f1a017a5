# SPDX-License-Identifier: Apache-2.0
"""Makes LLM2CLIP known to the Auto classes of transformers, at the moment they are first used."""

import importlib
import importlib.abc
import sys
from functools import partial
from typing import Any


_AUTO, _OWN = "transformers.models.auto.", f"{__package__}.modeling."
_CLASSES = {
    "configuration_auto": (["AutoConfig"], "configuration_llm2clip", "LLM2CLIPConfig"),
    "modeling_auto": (["AutoModel", "AutoModelForZeroShotImageClassification"], "modeling_llm2clip", "LLM2CLIPModel"),
    "processing_auto": (["AutoProcessor"], "processing_llm2clip", "LLM2CLIPProcessor"),
}


class _Finder(importlib.abc.MetaPathFinder):
    """Registers our classes once the module of their Auto class is loaded and none of ours is half-way.

    Plain registration imports the Auto classes: `import llm2clip_hf` would take 1.2 (`AutoConfig`) to 2.3 times
    (`AutoProcessor`) as long as torch and transformers, instead of less than 1.15 times.
    """

    def __init__(self) -> None:
        self.loading: set[str] = set()
        self.pending = list(_CLASSES)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if not fullname.startswith(_OWN) and fullname.removeprefix(_AUTO) not in self.pending:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec: Any = next((spec for spec in others if spec is not None), None)
        if spec is not None:
            spec.loader.exec_module = partial(self.load, spec.loader.exec_module)
        return spec

    def load(self, execute: Any, module: Any) -> None:
        self.loading.add(module.__name__)
        try:
            execute(module)
        finally:
            self.loading.discard(module.__name__)
        self.register()

    def register(self) -> None:
        for name in _CLASSES:
            if name in self.pending and _AUTO + name in sys.modules and not self.loading:
                self.pending.remove(name)
                auto_names, own, own_name = _CLASSES[name]
                own_class = getattr(importlib.import_module(_OWN + own), own_name)
                config: Any = importlib.import_module(f"{_OWN}configuration_llm2clip")
                for auto_name in auto_names:
                    key = "llm2clip" if auto_name == "AutoConfig" else config.LLM2CLIPConfig
                    getattr(sys.modules[_AUTO + name], auto_name).register(key, own_class, exist_ok=True)


def register_with_auto_classes() -> None:
    """Registers config, model and processor with the Auto classes, now or when they are first imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        finder = _Finder()
        sys.meta_path.insert(0, finder)
        finder.register()
