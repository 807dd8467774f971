"""Find the first values that are not finite: the layer of a forward pass, or the parameters of a backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from linearize.training.sharding import whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

_LISTED = 3


def first_unsound(model: nn.Module, run_again: Callable[[], object]) -> str:
    """The innermost module of `model` with the first output that is not finite, while `run_again` repeats the forward
    pass; "the loss itself" if there is none."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append(name)

        return look

    # Inner modules return before outer ones, so the first one found is the innermost.
    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            run_again()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the loss itself"


def unsound_gradients(model: nn.Module) -> str:
    """The parameters whose gradients are not finite, the first few by name."""
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(whole(parameter.grad)).all())
    ]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients together, as in gradient clipping."""
    return whole(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def _finite(output: Any) -> bool:
    if isinstance(output, torch.Tensor):
        return not output.is_floating_point() or bool(torch.isfinite(output).all())
    if isinstance(output, (tuple, list)):
        return all(map(_finite, output))
    if isinstance(output, dict):
        return all(map(_finite, output.values()))
    return True
