"""transformers' validators of configurations, imported without its activation functions.

`transformers.utils.type_validators`, which the configuration of Llama imports, reads the names of activation functions
in `transformers.activations`. That module imports kernels, FSDP and torch._dynamo: half of the time of `linearize
inspect`. Few configurations validate such a name, and none of a family in `linearize.families`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any

_VALIDATORS, _ACTIVATIONS = "transformers.utils.type_validators", "transformers.activations"


class _Activations(Mapping[str, Any]):
    """`ACT2FN` of transformers, imported at its first use."""

    @property
    def _found(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = importlib.import_module(_ACTIVATIONS).ACT2FN
        return found

    def __getitem__(self, name: str) -> Any:
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._found  # reading an item would build the module

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def import_validators() -> None:
    """Imports the validators with `ACT2FN` as a lazy import; a no-op where they or the activations are imported."""
    if not sys.modules.keys().isdisjoint((_VALIDATORS, _ACTIVATIONS)):
        return
    lazy: Any = ModuleType(_ACTIVATIONS)
    lazy.ACT2FN = _Activations()
    sys.modules[_ACTIVATIONS] = lazy
    try:
        with suppress(ImportError):  # a version of transformers without them needs no lazy import
            importlib.import_module(_VALIDATORS)
    finally:
        del sys.modules[_ACTIVATIONS]
