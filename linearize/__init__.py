"""linearize: turn a pretrained transformer language model into a gated linear-recurrent one.

What is public is listed in `__all__`: the commands as functions, `State`, and the base of all errors. Importing this
package is cheap. It makes transformers' auto classes know converted checkpoints, at once where
transformers is already loaded, otherwise at the moment its auto classes are.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from linearize.api import convert, evaluate, export, finetune, generate, push, verify
    from linearize.errors import LinearizeError
    from linearize.state import State

__all__ = [
    "LinearizeError",
    "State",
    "__version__",
    "convert",
    "evaluate",
    "export",
    "finetune",
    "generate",
    "push",
    "verify",
]

__version__ = "0.1.0"

_HOMES = {"LinearizeError": "linearize.errors", "State": "linearize.state"}
_AUTO_CLASSES = "transformers.models.auto.modeling_auto"


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'linearize' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "linearize.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _RegisteringLoader(importlib.abc.Loader):
    """Runs a module's own loader, then registers our classes."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()


class _AutoClassesFinder(importlib.abc.MetaPathFinder):
    """Waits for transformers' auto classes, so that `import linearize` need not load transformers and torch itself."""

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != _AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def _register() -> None:
    importlib.import_module("linearize.model")  # registers at its end, also where it is itself what loads transformers


if _AUTO_CLASSES in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AutoClassesFinder())
