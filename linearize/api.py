"""The commands as functions, with the same names and options: `linearize.verify(...)` is `linearize verify`.

Everything public is imported from `linearize`, which loads this module when a function is first used. Models are named
as on the command line: a Hub id, a folder, or a GGUF file. A function's module in `linearize.jobs` is a lazy import,
because it imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linearize.jobs.convert import convert as convert
    from linearize.jobs.evaluate import evaluate as evaluate
    from linearize.jobs.export import export as export
    from linearize.jobs.finetune import finetune as finetune
    from linearize.jobs.generate import generate as generate
    from linearize.jobs.push import push as push
    from linearize.jobs.verify import verify as verify

__all__ = ["convert", "evaluate", "export", "finetune", "generate", "push", "verify"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'linearize.api' has no attribute {name!r}")
    return getattr(importlib.import_module(f"linearize.jobs.{name}"), name)
