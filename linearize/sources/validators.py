"""Import transformers' configuration validators without its activation functions.

The configuration of Llama imports `transformers.utils.type_validators`, which reads the names in
`transformers.activations`. That module imports kernels, FSDP and torch._dynamo, which takes half of the time of
`linearize inspect`. Few configurations validate an activation name, and none in `linearize.families` does.
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
    """A lazy import of transformers' `ACT2FN`."""

    @property
    def _found(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = importlib.import_module(_ACTIVATIONS).ACT2FN
        return found

    def __getitem__(self, name: str) -> Any:
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._found  # `self._found[name]` would build the module

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def import_validators() -> None:
    """Import the validators with a lazy `ACT2FN`; a no-op if they or the activations are already imported."""
    if not sys.modules.keys().isdisjoint((_VALIDATORS, _ACTIVATIONS)):
        return
    lazy: Any = ModuleType(_ACTIVATIONS)
    lazy.ACT2FN = _Activations()
    sys.modules[_ACTIVATIONS] = lazy
    try:
        with suppress(ImportError):  # older versions of transformers lack the module and need no lazy import
            importlib.import_module(_VALIDATORS)
    finally:
        del sys.modules[_ACTIVATIONS]
