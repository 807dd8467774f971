"""Times, memory and the roof of a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

Run = Callable[[], Any]

# Larger than any GPU's L2 cache, which a model's weights also flush between two layers.
_CACHE = 256 * 2**20


class Clock:
    """Seconds of one call with a cold cache; on a GPU measured by CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.flush = torch.empty(_CACHE if self.on_gpu else 0, dtype=torch.int8, device=device)

    def __call__(self, run: Run) -> float:
        if not self.on_gpu:
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3


def in_turns(clock: Clock, made: dict[str, Callable[[], Run]], turns: int, warm_up: int) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum seconds of each contender. They run in turns, so a slowdown of the device affects
    all.

    Args:
        made: builds the timed function outside the clock; for a backward pass it runs the forward pass.
    """
    for make in made.values():
        for _ in range(warm_up):
            make()()
    taken: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(turns):
        for name, make in made.items():
            taken[name].append(clock(make()))
    return {name: {"seconds": median(x), "least": min(x), "most": max(x)} for name, x in taken.items()}


def peak_bytes(device: torch.device, run: Callable[[], Any]) -> int | None:
    """Peak memory of a call above the memory before it; None if the device does not count it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def roof(clock: Clock, dtype: torch.dtype, *, size: int, side: int, turns: int) -> dict[str, float]:
    """The device's peak rates: bytes per second of a copy of `size` bytes (read and written), and FLOPs per second of a
    product of square matrices."""
    source = torch.empty(size, dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=clock.device).to(dtype)
    b = torch.randn(side, side, device=clock.device).to(dtype)
    copy: Run = lambda: target.copy_(source)  # noqa: E731
    product: Run = lambda: a @ b  # noqa: E731
    taken = in_turns(clock, {"copy": lambda: copy, "product": lambda: product}, turns, 2)
    return {
        "bytes_per_second": 2 * size / taken["copy"]["seconds"],
        "flops_per_second": 2 * side**3 / taken["product"]["seconds"],
    }
