"""Choose the kernels by operation, device and dtype, or as `LINEARIZE_KERNELS` says, and record the reason.

    reference   the parallel forms, and token by token: what a reader checks the others against
    torch       the chunkwise forms in plain torch: every device, every option
    triton      one fused kernel for window, recurrence and mix; one for a decoding step
    fla         recurrences that have no fused kernel, through flash-linear-attention

What was asked for and cannot run falls back to torch, and says so once on stderr. No package is imported to decide.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, get_args

import torch

Kernels = Literal["reference", "torch", "triton", "fla"]
Operation = Literal["attention", "step", "gla", "gated_values", "delta_rule"]

CHOICES: tuple[Kernels, ...] = get_args(Kernels)
VARIABLE = "LINEARIZE_KERNELS"


class _Row(NamedTuple):
    """Kernels of an operation on a GPU, whether they run unless another choice is pinned, and why."""

    kernels: Kernels
    unasked: bool
    why: str


# NOTHING HERE IS MEASURED YET: `python -m evals.kernels` measures, and its figures belong beside each row. Until then
# the choice is by reasoning, and careful.
_ON_GPU: dict[Operation, _Row] = {
    "attention": _Row("triton", True, "window, recurrence and mix share what they read, and no score leaves the chip"),
    "step": _Row("triton", True, "one launch where the plain way has some forty"),
    "gla": _Row("fla", True, "chunks in a few launches, in TF32"),
    "delta_rule": _Row("fla", True, "chunks in a few launches, in TF32"),
    "gated_values": _Row("fla", False, "fla's takes one token after the other"),
}
_PACKAGES = {"triton": "triton", "fla": "flash-linear-attention"}
_OLDEST = (8, 0)  # Ampere: bfloat16 in tensor cores

_LOG = logging.getLogger("linearize_kernels")


class UnknownKernelsError(ValueError):
    """`LINEARIZE_KERNELS` is none of the choices."""


@dataclass(frozen=True)
class Decision:
    """The chosen kernels, and the reason why no faster ones run.

    Attributes:
        lost: whether something faster was asked for, or could be had on this machine, and does not run.
    """

    kernels: Kernels
    why: str
    lost: bool = False


def pinned() -> Kernels | None:
    """The value of `LINEARIZE_KERNELS`, or None if it is unset.

    Raises:
        UnknownKernelsError: it is none of the choices.
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
        refusal: why kernels other than torch's cannot take this case, if so.

    Raises:
        UnknownKernelsError: `LINEARIZE_KERNELS` is none of the choices.
    """
    wanted = pinned()
    # Told apart by what decides, so that deciding before every token costs a look-up.
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
    if wanted is None and device.type != "cuda":
        return Decision("torch", f"{device.type} has no other kernels")
    kernels, unasked, why = _ON_GPU[operation]
    pin = f"{VARIABLE}={wanted}"
    if wanted is not None and wanted != kernels:
        # Pinning one of the two leaves what the other one is for to torch.
        return Decision("torch", f"{pin}, which has no {operation}")
    reason = _missing(kernels, device, dtype, interpreting) or refusal
    if reason is not None:
        # Nobody who left the choice open misses an optional package, except the one for which the GPU was made.
        return Decision("torch", reason, lost=wanted is not None or kernels == "triton")
    if wanted is not None:
        return Decision(kernels, pin)
    if not unasked:
        return Decision("torch", why)
    if kernels == "fla" and precise:
        # It multiplies float32 in TF32, which float32 models would notice, unless the program allows that itself.
        return Decision("torch", "float32 products are to be exact (torch.set_float32_matmul_precision)")
    return Decision(kernels, f"{why}; not yet measured")


def _missing(kernels: Kernels, device: torch.device, dtype: torch.dtype, interpreting: bool) -> str | None:
    """Why `kernels` do not run on this device in this dtype, whatever the operation."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreting):
        return f"{kernels} needs a GPU, or TRITON_INTERPRET=1 before triton is imported; this is {device.type}"
    for package in ("triton", "fla") if kernels == "fla" else ("triton",):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install {_PACKAGES[package]}"
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < _OLDEST:
        return f"{kernels} needs an Ampere GPU or newer"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{kernels} does not compute in {str(dtype).removeprefix('torch.')}"
    return None


def choose(operation: Operation, device: torch.device, dtype: torch.dtype, *, refusal: str | None = None) -> Kernels:
    """`decide` for whoever runs it: a choice that was lost is told on stderr, once."""
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
    """Not a warning of Python's: commands hide those of the libraries they use."""
    _LOG.warning("linearize: %s", message)


def interpreted() -> bool:
    """True if Triton's interpreter runs kernels on the CPU (for tests); fixed when triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
