"""Measure free memory, memory bandwidth, and the peak memory of a piece of work."""

from __future__ import annotations

import ctypes
import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


# Much larger than any processor cache.
_COPIED = {"cpu": 1 << 28, "cuda": 1 << 31}
_COPIES = 8
_STATUS = Path("/proc/self/status")


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        # Memory that torch's allocator has reserved but not allocated is free too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + int(unused)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Resident bytes of the process; 0 without Linux's /proc."""
    return _resident("VmRSS")


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes: an upper bound for a step that reads all weights."""
    source = torch.zeros(_COPIED[device.type], dtype=torch.uint8, device=device)
    target, taken = torch.empty_like(source), []
    for _ in range(_COPIES):
        wait_for(device)
        began = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        taken.append(time.perf_counter() - began)
    return 2 * source.numel() / min(taken)


def wait_for(device: torch.device) -> None:
    """Sync a GPU; a no-op on other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """A context that measures the peak increase of memory in use, in bytes; None if it cannot be measured.

    On a GPU this is torch's allocated memory; on a CPU, the process's peak resident memory from Linux's /proc.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._before = device, 0
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            _give_back()
            self._before = _resident("VmRSS") if _forget_peak() else -1
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = max(torch.cuda.max_memory_allocated(self.device) - self._before, 0)
        elif self._before >= 0:
            self.bytes = max(_resident("VmHWM") - self._before, 0)


def _give_back() -> None:
    """Return freed memory to the system, so resident memory is memory in use (glibc only)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return _resident("VmHWM") > 0


def _resident(name: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def nbytes(model: torch.nn.Module) -> int:
    """Bytes of the model's state dict; tied weights count once."""
    kept = {id(tensor): tensor.numel() * tensor.element_size() for tensor in model.state_dict(keep_vars=True).values()}
    return sum(kept.values())


def digest_of(tensor: Tensor) -> bytes:
    """SHA-256 of all bytes of `tensor`."""
    octets: Any = tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
    return hashlib.sha256(octets).digest()
