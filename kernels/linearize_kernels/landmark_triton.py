"""Launch the fused step of landmarks: one launch per layer, but for merges.

It writes the token into window or sinks, attends to sinks, window and slots, and adds its weights to what the tokens
have received, all in the memory where it lies. `linearize.model.landmarks.step` is the same in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linearize_kernels.dispatch import interpreted, power_of_2
from linearize_kernels.landmark_kernel import landmark_step_kernel
from linearize_kernels.landmark_merge_kernel import landmark_merge_kernel

if TYPE_CHECKING:
    from collections.abc import Mapping

# Tokens per turn of a loop, and the least side of a product of tensor cores.
_TURN, _LEAST = 64, 16


HELD = ("k_rotated", "k_rotated_scale", "v", "v_scale")


@dataclass(frozen=True)
class LandmarkStep:
    """The constants of a step: W, the numbers of sinks and slots, the tokens of a merge, and bits per channel of window
    and sinks and of slots (0: the model's dtype)."""

    window: int
    sinks: int
    slots: int
    block: int
    scale: float
    softcap: float | None
    near_bits: int
    slot_bits: int


def launch_landmark_step(
    step: LandmarkStep,
    projections: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    parts: Mapping[str, Mapping[str, Tensor]],
    counts: Tensor,
    lengths: Tensor | None,
    *,
    score_weight: Tensor | None,
    key_scale: Tensor | None,
    key_shift: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Run one token per row.

    Args:
        projections: q `[B, 1, H, D]`, k `[B, 1, K, D]`, v `[B, 1, K, V]`, then q and k with positions.
        parts: the memory of a layer, in which a due merge has been made.
        counts: `[B]` tokens that each row has read; not changed here.
        lengths: `[B]`, not 0 for rows with a real token; other rows change nothing. None: all tokens are real.
        score_weight: `[K, K (D + V) + 1]` float32 of a learned score; None for novelty.
        key_scale, key_shift: `[K, D]` float32, of keys before they are coded.

    Returns:
        `[B, 1, H, V]`; finite but meaningless for rows without a real token.
    """
    q, k, v, q_rotated, k_rotated = (_rowwise(x) for x in projections)
    batch, _, heads, width = q.shape
    groups, values = v.shape[2:]
    sinks, window, slots = parts.get("sinks", {}), parts["window"], parts["landmarks"]
    group = heads // groups
    places = step.sinks + step.window + step.block - 1 + step.slots
    out = torch.empty(batch, 1, heads, values, dtype=dtype, device=q.device)
    scores = torch.empty(batch, heads, places, dtype=torch.float32, device=q.device)
    absent = scores  # a placeholder pointer that the kernel does not read
    with torch.cuda.device_of(q):  # Triton launches on the current device
        landmark_step_kernel[(batch, groups)](
            q,
            k,
            v,
            q_rotated,
            k_rotated,
            out,
            scores,
            *held_of(sinks, absent, *HELD),
            *held_of(window, absent, *HELD, "novelty", "received"),
            *held_of(slots, absent, *HELD, "received", "number"),
            *(
                absent if x is None else x
                for x in (parts.get("keys", {}).get("sum"), score_weight, key_scale, key_shift)
            ),
            counts,
            counts if lengths is None else lengths.contiguous(),
            *(x.stride(0) for x in (k, v, q_rotated, k_rotated)),
            sinks["k_rotated"].stride(0) // width if sinks else 0,
            window["k_rotated"].stride(0) // width,
            slots["k_rotated"].stride(0) // _entries(step, width),
            step.scale,
            step.softcap or 1.0,
            **_shared(step, lengths, width, values),
            K=groups,
            G=group,
            LEARNED=score_weight is not None,
            CODED=key_scale is not None,
            HAS_SOFTCAP=step.softcap is not None,
            BLOCK_Q=max(power_of_2(group), _LEAST),
            BLOCK_M=max(power_of_2(step.sinks or 1), _LEAST),
            BLOCK_N=_TURN,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return out


def launch_landmark_merge(
    step: LandmarkStep,
    parts: Mapping[str, Mapping[str, Tensor]],
    counts: Tensor,
    lengths: Tensor | None,
    *,
    width: int,
    values: int,
    reach: int,
    weight: float,
    fading: float,
    least_attention: float,
    least_spread: float,
    most_against: float,
) -> None:
    """Merge a block into the slots of the rows whose next token needs its room, and move their windows on.

    Args:
        counts, lengths: as in `launch_landmark_step`.
        width, values: D and V.
        reach: tokens on either side over which the static score is averaged; 0 takes it as it is.
        weight: of received attention beside the static score.
    """
    window, slots = parts["window"], parts["landmarks"]
    batch, _, groups = slots["number"].shape
    candidates = power_of_2(step.slots + step.block)
    places = torch.empty(batch, groups, 2, step.block, dtype=torch.int32, device=counts.device)
    with torch.cuda.device_of(places):
        landmark_merge_kernel[(batch, groups)](
            *held_of(window, places, *HELD, "novelty", "received"),
            *held_of(slots, places, *HELD, "novelty", "received", "number"),
            places,
            counts,
            counts if lengths is None else lengths.contiguous(),
            window["k_rotated"].stride(0) // width,
            slots["k_rotated"].stride(0) // _entries(step, width),
            weight,
            **_shared(step, lengths, width, values),
            K=groups,
            REACH=reach,
            FADING=fading,
            LEAST_ATTENTION=least_attention,
            LEAST_SPREAD=least_spread,
            MOST_AGAINST=most_against,
            CANDIDATES=candidates,
            num_warps=8,
            enable_fp_fusion=True,
        )


def held_of(part: Mapping[str, Tensor], absent: Tensor, *names: str) -> list[Tensor]:
    """The tensors of a part; `absent` is a pointer that the kernel does not read.

    Raises:
        ValueError: a tensor's rows are not contiguous.
    """
    found = [part.get(name, absent) for name in names]
    if any(x is not absent and x[0].stride() != torch.empty(x.shape[1:], device="meta").stride() for x in found):
        raise ValueError("the fused step writes into the memory where it lies, whose rows have to be contiguous")
    return found


def _shared(step: LandmarkStep, lengths: Tensor | None, width: int, values: int) -> dict[str, int | bool]:
    """The constants of both kernels."""
    return {
        "D": width,
        "V": values,
        "W": step.window,
        "SINKS": step.sinks,
        "SLOTS": step.slots,
        "BLOCK": step.block,
        "NEAR_BITS": step.near_bits,
        "SLOT_BITS": step.slot_bits,
        "HAS_LENGTHS": lengths is not None,
        "WHOLE": interpreted(),  # numpy has no bfloat16
        "BLOCK_D": power_of_2(width),
        "BLOCK_V": power_of_2(values),
        "BLOCK_H": max(power_of_2(width // 2), _LEAST),
        "BLOCK_U": max(power_of_2(values // 2), _LEAST),
    }


def _entries(step: LandmarkStep, width: int) -> int:
    """Entries of a key in the slots: channels, or bytes of two channels each."""
    return width // 2 if step.slot_bits == 4 else width


def _rowwise(x: Tensor) -> Tensor:
    """`x` `[B, 1, heads, width]` with the heads of a row side by side."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()
