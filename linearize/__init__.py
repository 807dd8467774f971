"""linearize: turn a pretrained transformer language model into a gated linear-recurrent one.

The public names are in `__all__`: the commands as functions, `State`, and the base of all errors. Importing this
package is cheap. It registers converted checkpoints with transformers' auto classes: at once if these are already
imported, otherwise when `AutoModelForCausalLM` is first accessed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from linearize.api import convert, evaluate, export, finetune, generate, push, verify
    from linearize.errors import LinearizeError
    from linearize.generation.state import State

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

__version__ = "0.2.0"

_HOMES = {"LinearizeError": "linearize.errors", "State": "linearize.generation.state"}
_AUTO_CLASSES = "transformers.models.auto.modeling_auto"


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'linearize' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "linearize.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AutoClasses(ModuleType):
    """The module of transformers' auto classes. The first access of its `AutoModelForCausalLM` registers our model.

    Not at the import of that module, because transformers imports it for the docstring of every configuration, and our
    model imports transformers' modeling modules, which takes seconds.
    """

    @property
    def AutoModelForCausalLM(self) -> Any:
        self.__class__ = ModuleType  # type: ignore[assignment]
        _register()
        return self.AutoModelForCausalLM


class _AutoClassesFinder:
    """An import hook for transformers' auto classes, so that `import linearize` does not import transformers.

    A plain class, because `importlib.abc` imports `importlib.resources`, 5 % of the time of `linearize --help`.
    """

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != _AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_watch(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("linearize.model.configuration")  # registers with AutoConfig
                module.__class__ = _AutoClasses

            spec.loader.exec_module = execute_and_watch  # type: ignore[method-assign]
        return spec


def _register() -> None:
    # The module registers itself at its end, even if it is the one that imports transformers' auto classes.
    importlib.import_module("linearize.model.modeling")


if _AUTO_CLASSES in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AutoClassesFinder())
