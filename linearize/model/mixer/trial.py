"""A check of each fused kernel on the user's GPU, because a compiler or driver version can break a kernel.

Before the first call of each kind, the mixer runs on random tokens with the kernel and in plain PyTorch. The kernel is
used only if outputs, memory and, where gradients are on, gradients agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from linearize_kernels import Operation, say_once
from torch import Tensor, nn

from linearize.families.base import Projections
from linearize.model.memory import LayerMemory
from linearize.model.precision import decoded

if TYPE_CHECKING:
    from linearize.model.mixer.base import MixerBase

# The interpreter on the CPU uses no GPU compiler, so there is nothing to check.
ON_TRIAL = {"cuda"}
_VERDICTS: dict[tuple[Any, ...], bool] = {}
_ROWS = 2
# Relative to the largest value: far above rounding errors, far below the effect of a fault.
_TOLERANCE = {torch.float32: 2e-3}
_HALF_TOLERANCE = 4e-2


def passes(operation: Operation, mixer: MixerBase, device: torch.device, dtype: torch.dtype) -> bool:
    """True if the kernel for `operation` agrees with plain PyTorch on this device; checked once per kind of mixer."""
    if device.type not in ON_TRIAL:
        return True
    # The backward kernels take the longest to compile, so they wait for a call with gradients.
    trains = operation != "step" and torch.is_grad_enabled()
    kind = (operation, mixer.kind, device, dtype, trains)
    if kind not in _VERDICTS:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # the check cannot run during CUDA graph capture
        _VERDICTS[kind] = _agrees(operation, mixer, device, dtype, trains)
    return _VERDICTS[kind]


def _agrees(operation: Operation, mixer: MixerBase, device: torch.device, dtype: torch.dtype, trains: bool) -> bool:
    weight = mixer._parameters.get("mix_weight")
    try:
        if weight is not None:
            # A mix weight of 0 would hide the outputs of the recurrence.
            mixer._parameters["mix_weight"] = nn.Parameter(torch.full_like(weight, 0.5), requires_grad=False)
        plain = _run(operation, mixer, device, dtype, trains, fused=False)
        try:
            ours = _run(operation, mixer, device, dtype, trains, fused=True)
        except Exception as error:
            told = (str(error).splitlines() or [type(error).__name__])[0]
            say_once(f"{operation} runs in plain torch, which is slower: its kernel fails on this GPU: {told}")
            return False
    finally:
        if weight is not None:
            mixer._parameters["mix_weight"] = weight
    allowed = _TOLERANCE.get(dtype, _HALF_TOLERANCE)
    worst = max(_distance(a, b) for a, b in zip(ours, plain, strict=True))
    if not worst <= allowed:
        say_once(
            f"{operation} runs in plain torch, which is slower: its kernel is off by {worst:.1e} on this GPU, where "
            f"{allowed:.0e} is allowed; please report it with the versions of torch and triton"
        )
        return False
    return True


def _run(
    operation: Operation, mixer: MixerBase, device: torch.device, dtype: torch.dtype, trains: bool, *, fused: bool
) -> list[Tensor]:
    """Outputs, memory and (if it trains) gradients of a mixer on random tokens of a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Projections:
        layer = mixer.layer
        q, k = (layer.query_heads, layer.key_width), (layer.key_value_heads, layer.key_width)
        shapes = (q, k, (layer.key_value_heads, layer.value_width), q, k)
        drawn = (torch.randn(_ROWS, count, *shape, generator=generator) for shape in shapes)
        return Projections(*(x.to(device, dtype) for x in drawn))

    # With landmarks, a merge is due in both rows on the way.
    prompt, more = mixer.window + (mixer.config.sinks + 94 if mixer.config.landmarks else 96), 70
    more = 1 if operation == "step" else more
    found: list[Tensor] = []
    with torch.inference_mode(mode=False):
        with torch.no_grad():
            memory = LayerMemory(mixer.parts(_ROWS, dtype, device), _ROWS, device)
            for count, lengths in ((prompt, None), (more, None), (more, [more, more // 2]), (more, None)):
                real = None if lengths is None else torch.tensor(lengths, device=device)
                mixed = mixer(tokens(count), real, memory, fused=fused and (operation != "step") == (count > 1))
                memory.advance(count, real)
                if real is not None:
                    mixed = mixed[torch.arange(count, device=device) < real[:, None]]
                found.append(mixed)
            # A code of 4 bits may be a neighbour's where two are as near, so what codes stand for is compared.
            found += [x for part in memory.parts.values() for x in decoded(part, torch.float32).values()]
        if trains:
            with torch.enable_grad():
                given = Projections(*(x.requires_grad_() for x in tokens(prompt)))
                mixed = mixer(given, None, None, fused=fused)
                weights = torch.randn(mixed.shape, generator=generator).to(mixed)
                grads = torch.autograd.grad(mixed, given, weights, allow_unused=True)
            found += [mixed, *(x for x in grads if x is not None)]
    return [x.detach().float() for x in found]


def _distance(ours: Tensor, plain: Tensor) -> float:
    """The largest absolute difference relative to the largest value; infinite if it is NaN."""
    if plain.numel() == 0:
        return 0.0
    worst = float((ours - plain).abs().max() / plain.abs().max().clamp_min(1e-6))
    return worst if worst == worst else float("inf")
