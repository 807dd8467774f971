"""CUDA graphs without a GPU: the operators that a function runs are written down once, with the tensors they ran on,
and a replay runs them again on these tensors. What the host computed while recording is frozen, as in a CUDA graph;
asking the device for a value is an error, as it is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable

# What waits for the device, or whose result has a size that only it knows.
ASKS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "unique", "_unique2", "item"}


class AskedError(RuntimeError):
    """A recorded function asked the device for a value."""


class Recording(TorchDispatchMode):
    """Operators in order, each with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        picks = name in ("index", "index_put", "index_put_") and any(
            x.dtype in (torch.bool, torch.uint8) for x in args[1] if x is not None
        )
        if name in ASKS or picks:
            raise AskedError(f"{name} asks the device")
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, [x for x in tree_leaves(result) if isinstance(x, Tensor)]))
        return result

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, results in self.steps:
                again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
                for old, new in zip(results, again, strict=True):
                    if old.data_ptr() != new.data_ptr():  # a view, or in place, is there already
                        old.copy_(new)


class Recorder:
    """Records for a `linearize.generation.engine.Engine`, and counts what it does."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []
        self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        random = torch.get_rng_state()
        with torch.inference_mode():
            work()  # the warm-up
            with Recording() as recording:
                work()
        torch.set_rng_state(random)
        self.recordings.append(recording)

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return replay
