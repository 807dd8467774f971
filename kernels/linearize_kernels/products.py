"""Products with weights on a CPU, through oneDNN where torch's own are slow.

torch multiplies float32 matrices with MKL, which does not use its AVX-512 kernels on non-Intel processors and
multiplies a single row with one thread. oneDNN, which torch includes, has neither limit and reads the same weights
without a copy.

Dimensions: I inputs, O outputs.
"""

from __future__ import annotations

import platform
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from linearize_kernels.dispatch import choose
from linearize_kernels.native import launch, packed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeGuard

    from torch import Tensor

# Least number of multiplications for oneDNN, whose call costs some 10 microseconds.
_WORK = 2**18
_PLAIN = (torch.Tensor, nn.Parameter)


@cache
def onednn_is_faster() -> bool:
    """True if products go to oneDNN. The kind of processor decides, not a timing, so results on one machine are
    reproducible."""
    there = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _processor()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight^T + bias` of `x` `[..., I]` and `weight` `[O, I]`."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    learns = torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)
    if not learns and _goes_to_native(x, weight):
        return _native(x, weight, bias)
    if not _goes_to_onednn(x, weight):
        return F.linear(x, weight, bias)
    if learns:
        result: Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return result
    return _onednn(x, weight, bias)


@contextmanager
def on_one_thread(x: Tensor) -> Iterator[None]:
    """Run torch's operators of this block on one thread, if `x` `[B, ...]` is one row whose products are C functions.

    A row's small operators gain nothing from torch's threads. These wait actively after each, and take the processors
    from the threads of the C functions, which run the next product. A thread of Python that calls torch for the first
    time during the block stays with one thread, because torch gives it the number of that moment.
    """
    threads = 1 if torch.compiler.is_compiling() else torch.get_num_threads()
    here = x.is_cpu and x.dtype is torch.float32 and len(x) == 1
    if threads == 1 or not here or choose("product", x.device, x.dtype) != "native":
        yield
        return
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


class Linear(nn.Linear):
    """A linear layer that multiplies with `product`."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """True if the module's class is `nn.Linear` itself."""
    return type(module) is nn.Linear or type(module) is Linear


def take_products(model: nn.Module) -> None:
    """Make the linear layers of `model` multiply with `product`, if that is faster on this machine."""
    if onednn_is_faster():
        for module in model.modules():
            if type(module) is nn.Linear:
                _become(module, Linear)


def leave_products(model: nn.Module) -> None:
    """Undo `take_products`: restore torch's own layers."""
    for module in model.modules():
        if type(module) is Linear:
            _become(module, nn.Linear)


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    # In place, so parameters, hooks, names and references to the module stay valid.
    object.__setattr__(module, "__class__", kind)


def _goes_to_native(x: Tensor, weight: Tensor) -> bool:
    """True for one row: the C function reads weights at the memory's pace."""
    return (
        x.numel() == weight.shape[1]
        and weight.numel() >= _WORK
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.is_cpu
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and weight.is_contiguous()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and choose("product", x.device, x.dtype) == "native"
    )


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    outputs, inputs = weight.shape
    y = torch.empty(*x.shape[:-1], outputs, dtype=torch.float32)
    x, bias = x.contiguous(), None if bias is None else bias.float().contiguous()
    launch("product", packed(inputs, outputs, x, weight, bias, y))
    return y


def _goes_to_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.numel() * weight.shape[0] >= _WORK
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and onednn_is_faster()
        and not torch.is_autocast_enabled("cpu")
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


class _Product(torch.autograd.Function):
    """Gradients through the same kind of product; no second derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Save only tensors that a gradient needs, because a frozen layer's inputs are most of a model's activations.
        ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None)
        return _onednn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _onednn(gradient, weight.t())
        if ctx.needs_input_grad[1]:
            of_weight = _onednn(gradient.flatten(0, -2).t(), x.flatten(0, -2).t())
        if ctx.needs_input_grad[2]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_x, of_weight, of_bias


def _processor() -> str:
    told = Path("/proc/cpuinfo")
    try:
        with told.open(encoding="utf-8", errors="replace") as lines:
            return lines.read(4096)
    except OSError:
        return platform.processor()
