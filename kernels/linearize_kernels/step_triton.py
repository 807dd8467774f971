"""Launch the fused step: one launch per layer.

A step updates all buffers in place and copies nothing to the host, so a CUDA graph can record it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linearize_kernels.dispatch import interpreted, power_of_2
from linearize_kernels.step_kernel import step_kernel

if TYPE_CHECKING:
    from linearize_kernels.step import Step, StepWeights

# Entries per thread of a program's largest product; twice as many exceed its registers.
_ENTRIES = 32
_TILE = 16  # the least side of a product of tensor cores


def step_triton(
    step: Step,
    weights: StepWeights,
    projections: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    parts: dict[str, dict[str, Tensor]],
    counts: Tensor,
    lengths: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Run one token per row through window, sinks and state, which are updated in place.

    Args:
        projections: q `[B, 1, H, D]`, k `[B, 1, K, D]`, v `[B, 1, K, V]`, then q and k with positions.
        parts: `window` with `k_rotated`, `v` and, for a state of evicted tokens, `k` and `source`, `[B, W, K, D or V]`;
            `sinks` with `k_rotated` and `v`, `[B, M, K, D or V]`; `state` with `state`, `[B, K, F, V+1]` float32.
        counts: `[B]` tokens that each row has read; not changed here.
        lengths: `[B]`, not 0 for rows with a real token; other rows change nothing. None: all tokens are real.

    Returns:
        `[B, 1, H, V]` in `dtype`; finite but meaningless for rows without a real token.
    """
    q, k, v, q_rotated, k_rotated = (x if x.stride(-1) == 1 else x.contiguous() for x in projections)
    batch, _, heads, width = q.shape
    key_value_heads, value_width = v.shape[2], v.shape[3]
    group = heads // key_value_heads
    ring, sinks, state = parts["window"], parts.get("sinks", {}), parts.get("state", {}).get("state")
    if not (counts.is_contiguous() and all(x.is_contiguous() for part in parts.values() for x in part.values())):
        raise ValueError("the fused step writes into the memory where it lies, which has to be contiguous")
    out = torch.empty(batch, 1, heads, value_width, dtype=dtype, device=q.device)
    of_window = torch.empty(batch * heads, value_width + 1, dtype=torch.float32, device=q.device).flatten()
    window_out, window_log = of_window.split([batch * heads * value_width, batch * heads])
    block_g = power_of_2(group)
    block_d, block_e = (max(power_of_2(x), _TILE) for x in (width, value_width))
    block_f = block_d * (2 if step.features in ("exp", "learned") else 1)
    wide = max(block_d, block_e)
    warps = 4 if wide <= 64 else 8
    most = warps * 32 * _ENTRIES
    strides = [s for x in (q, k, v, q_rotated, k_rotated) for s in (x.stride(0), x.stride(2))]
    absent = q  # a placeholder pointer that the kernel does not read
    with torch.cuda.device_of(q):  # Triton launches on the current device
        step_kernel[(batch, key_value_heads)](
            q,
            k,
            v,
            q_rotated,
            k_rotated,
            out,
            window_out,
            window_log,
            ring["k_rotated"],
            ring.get("k", absent),
            ring.get("source", absent),
            ring["v"],
            sinks.get("k_rotated", absent),
            sinks.get("v", absent),
            absent if state is None else state,
            counts,
            counts if lengths is None else lengths.contiguous(),
            *(
                absent if x is None else x
                for x in (
                    weights.gate_scale,
                    weights.gate_bias,
                    weights.gate_projection,
                    weights.feature_projection,
                    weights.mix,
                )
            ),
            *strides,
            step.scale,
            step.softcap or 1.0,
            step.gate_sign,
            step.gate_scale,
            step.gate_bias,
            step.gate_divisor,
            step.gate_bound,
            K=key_value_heads,
            G=group,
            D=width,
            V=value_width,
            W=step.window,
            SINKS=step.sinks,
            HAS_LENGTHS=lengths is not None,
            HAS_SOFTCAP=step.softcap is not None,
            GATE=step.gate,
            LEARNED_GATE=weights.gate_scale is not None,
            HAS_PROJECTION=weights.gate_projection is not None,
            HAS_BOUND=step.gate_bound > 0,
            SOURCE=step.source,
            FEATURES=step.features,
            QK_NORM=step.qk_norm,
            WRITES_GATE=step.writes_gate,
            COVERS_ALL=step.covers_all,
            ROPE=step.rope,
            NORMALIZE=step.normalize,
            MIX=step.mix,
            # The interpreter multiplies in numpy, which has no bfloat16.
            WHOLE=interpreted(),
            BLOCK_G=block_g,
            BLOCK_Q=max(block_g, _TILE),
            BLOCK_D=block_d,
            BLOCK_F=block_f,
            BLOCK_I=_block(width, most // (block_g * block_f)),
            BLOCK_E=block_e,
            BLOCK_W=max(_block(step.window, 64), _TILE),
            BLOCK_M=max(power_of_2(step.sinks or 1), _TILE),
            BLOCK_V=_block(value_width, most // (2 * block_f)),
            num_warps=warps,
            enable_fp_fusion=True,  # triton 3.10 changes the default
        )
    return out


def _block(whole: int, most: int) -> int:
    """The largest power of 2 that is at most `most`, at least 4, and not larger than needed to cover `whole`."""
    power = power_of_2(whole)
    while power > max(most, 4):
        power //= 2
    return power
