"""Choose the kernels by operation, device and dtype, or by `LINEARIZE_KERNELS`, and record the reason.

    reference   the parallel and the token-by-token forms, to check the others against
    torch       the chunkwise forms in plain torch: every device, every option
    triton      one fused kernel for window, recurrence and mix; four for a text with slots; one for a decoding step
    fla         recurrences without a fused kernel, through flash-linear-attention
    native      slots and products of one row on a CPU, in C functions that are compiled when they are first needed

A pinned choice that cannot run falls back to torch with one warning on stderr. The decision imports no package.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Literal, NamedTuple, get_args

import torch

from linearize_kernels.native import native_refusal

Kernels = Literal["reference", "torch", "triton", "fla", "native"]
Operation = Literal["attention", "slots", "step", "block", "product", "gla", "gated_values", "delta_rule"]

CHOICES: tuple[Kernels, ...] = get_args(Kernels)
VARIABLE = "LINEARIZE_KERNELS"


class _Row(NamedTuple):
    """An operation's kernels on a GPU; `unasked` is True if they run without being pinned; and the reason."""

    kernels: Kernels
    unasked: bool
    why: str


# NOT MEASURED YET: `python -m evals.kernels` measures, and its figures belong beside each row. Until then the choices
# are cautious estimates.
_ON_GPU: dict[Operation, _Row] = {
    "attention": _Row("triton", True, "window, recurrence and mix share what they read, and no score leaves the chip"),
    "slots": _Row("triton", True, "four launches for a text where the plain way has some 18 for 32 tokens"),
    "step": _Row("triton", True, "one launch where the plain way has some forty"),
    "block": _Row("triton", True, "nine launches a layer where the plain way has some forty"),
    "gla": _Row("fla", True, "chunks in a few launches, in TF32"),
    "delta_rule": _Row("fla", True, "chunks in a few launches, in TF32"),
    "gated_values": _Row("fla", False, "fla's takes one token after the other"),
}
_ON_CPU: dict[Operation, str] = {
    "slots": "one call a layer where the plain way has some forty operators a block of tokens",
    "product": "of one row; weights are read at the memory's pace",
}
_NONE = _Row("torch", True, "there are no other kernels")
_PACKAGES = {"triton": "triton", "fla": "flash-linear-attention"}
_OLDEST = (8, 0)  # Ampere, the first with bfloat16 in tensor cores
# Assemblers before CUDA 13.3 may reuse the registers of an operand that Hopper's tensor cores still read.
_HOPPER, _OLDEST_FOR_HOPPER = 9, "3.9"


class UnknownKernelsError(ValueError):
    """`LINEARIZE_KERNELS` is not one of the choices."""


@dataclass(frozen=True)
class Decision:
    """The chosen kernels, and the reason that no faster ones run.

    Attributes:
        lost: True if faster kernels were pinned, or exist for this machine, but cannot run.
    """

    kernels: Kernels
    why: str
    lost: bool = False


def pinned() -> Kernels | None:
    """The value of `LINEARIZE_KERNELS`; None if it is unset.

    Raises:
        UnknownKernelsError: the value is not one of the choices.
    """
    value = os.environ.get(VARIABLE, "")
    if value and value not in CHOICES:
        raise UnknownKernelsError(
            f"{VARIABLE}={value}: there is no such choice; take {', '.join(CHOICES)}, or leave it out"
        )
    return value or None


def decide(
    operation: Operation, device: torch.device | str, dtype: torch.dtype, *, refusal: str | None = None
) -> Decision:
    """Choose the kernels for an operation on a device and in a dtype.

    Args:
        refusal: the reason that only torch's kernels support this case; None if others do too.

    Raises:
        UnknownKernelsError: `LINEARIZE_KERNELS` is not one of the choices.
    """
    wanted = pinned()
    # `_decide` is cached on everything that it depends on, because this runs before every decoded token.
    where = torch.device(device)
    precise = torch.get_float32_matmul_precision() == "highest" and dtype == torch.float32
    return _decide(operation, where, dtype, refusal, wanted, interpreted(), precise)


@cache
def _decide(
    operation: Operation,
    device: torch.device,
    dtype: torch.dtype,
    refusal: str | None,
    wanted: Kernels | None,
    interpreting: bool,
    precise: bool,
) -> Decision:
    if wanted in ("reference", "torch"):
        return Decision(wanted, f"{VARIABLE}={wanted}")
    pin = f"{VARIABLE}={wanted}"
    if operation in _ON_CPU and device.type == "cpu" and wanted in (None, "native"):
        return _in_c(operation, dtype, refusal, wanted)
    if wanted is None and device.type != "cuda":
        return Decision("torch", f"{device.type} has no other kernels")
    kernels, unasked, why = _ON_GPU.get(operation, _NONE)
    if wanted is not None and wanted != kernels:
        # A pin leaves the operations of other kernels to torch.
        return Decision("torch", f"{pin}, which has no {operation} on {device.type}")
    if kernels == "torch":
        return Decision("torch", why)
    reason = _missing(kernels, device, dtype, interpreting) or refusal
    if reason is not None:
        # A missing optional package needs a warning only if it was pinned, except triton, the main GPU path.
        return Decision("torch", reason, lost=wanted is not None or kernels == "triton")
    if wanted is not None:
        return Decision(kernels, pin)
    if not unasked:
        return Decision("torch", why)
    if kernels == "fla" and precise:
        # fla computes float32 products in TF32, which changes results of float32 models; torch's precision setting must
        # allow it.
        return Decision("torch", "float32 products are to be exact (torch.set_float32_matmul_precision)")
    return Decision(kernels, f"{why}; not yet measured")


def _in_c(operation: Operation, dtype: torch.dtype, refusal: str | None, wanted: Kernels | None) -> Decision:
    exact = "float64 is the reference's" if dtype == torch.float64 else None
    reason = refusal or exact or native_refusal()
    if reason is not None:
        return Decision("torch", reason, lost=wanted is not None and exact is None)
    return Decision("native", _ON_CPU[operation])


def _missing(kernels: Kernels, device: torch.device, dtype: torch.dtype, interpreting: bool) -> str | None:
    """The reason that `kernels` cannot run any operation on this device in this dtype; None if they can."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreting):
        return f"{kernels} needs a GPU, or TRITON_INTERPRET=1 before triton is imported; this is {device.type}"
    for package in ("triton", "fla") if kernels == "fla" else ("triton",):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install {_PACKAGES[package]}"
    if device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:
            return f"{kernels} needs an Ampere GPU or newer"
        # AMD's MI200 and MI300 also have capability 9.
        hopper = capability[0] == _HOPPER and torch.version.hip is None
        if hopper and _release(found := version("triton")) < _release(_OLDEST_FOR_HOPPER):
            return (
                f"a GPU of compute capability {_HOPPER} needs triton {_OLDEST_FOR_HOPPER} or newer, because older ones "
                f"can compute wrong products on it; this is triton {found}: pip install -U triton"
            )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{kernels} does not compute in {str(dtype).removeprefix('torch.')}"
    return None


def _release(of: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in of.split(".")[:2])


def choose(operation: Operation, device: torch.device, dtype: torch.dtype, *, refusal: str | None = None) -> Kernels:
    """`decide` before a run: warns once on stderr about a lost choice."""
    decision = decide(operation, device, dtype, refusal=refusal)
    if decision.lost:
        say_once(f"{operation} runs in plain torch on {device.type}, which is slower: {decision.why}")
    return decision.kernels


def through_fla(operation: Operation, q: torch.Tensor) -> bool:
    """True if flash-linear-attention runs a recurrence on these queries."""
    if torch.compiler.is_compiling() or settled(q.device):
        return False
    return choose(operation, q.device, q.dtype) == "fla"


def settled(device: torch.device) -> bool:
    """True if plain torch runs and no check is needed: the device is a CPU and no kernels are pinned."""
    return device.type == "cpu" and not os.environ.get(VARIABLE)


@cache
def say_once(message: str) -> None:
    """A log record, not a Python warning, because the commands hide libraries' warnings."""
    logging.getLogger("linearize_kernels").warning("linearize: %s", message)


def interpreted() -> bool:
    """True if Triton's interpreter runs kernels on the CPU (for tests); fixed when triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def power_of_2(size: int) -> int:
    """The least power of 2 that is at least `size`, and at least 1."""
    power: int = 1 << (max(size, 1) - 1).bit_length()
    return power
