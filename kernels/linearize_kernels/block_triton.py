"""Launch the kernels of `block.py`, one for each of its functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from linearize_kernels.block import Heads
from linearize_kernels.block_kernels import activated_kernel, residual_norm_kernel, turned_heads_kernel
from linearize_kernels.dispatch import power_of_2

if TYPE_CHECKING:
    from torch import Tensor

    from linearize_kernels.block import Activation, HeadNorms, Norm, Turn


def launch_residual_norm(
    x: Tensor, delta: Tensor | None, after: Norm | None, before: Norm | None, factor: float, copies: bool
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    width, stores = x.shape[1], copies or delta is not None
    h = torch.empty_like(x) if stores else x
    y = h if before is None else torch.empty_like(x)
    if y is x:
        return x, x
    with torch.cuda.device_of(x):  # Triton launches on the current device
        residual_norm_kernel[(x.shape[0],)](
            x,
            x if delta is None else delta.contiguous(),
            h,
            y,
            *(_present(tensor, x) for tensor in (*_tensors(after), *_tensors(before))),
            factor,
            *(0.0 if norm is None else norm.eps for norm in (after, before)),
            *(0.0 if norm is None else norm.offset for norm in (after, before)),
            N=width,
            HAS_DELTA=delta is not None,
            STORES=stores,
            **_constants("AFTER", after),
            **_constants("BEFORE", before),
            BLOCK=power_of_2(width),
            num_warps=4 if width <= 2048 else 8 if width <= 8192 else 16,
            enable_fp_fusion=True,
        )
    return h, y


def launch_turned_heads(
    projected: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor, Tensor, Tensor] | None,
    norms: HeadNorms | None,
    table: tuple[Tensor, Tensor] | None,
    turn: Turn,
    counts: Tensor | None,
    lengths: Tensor | None,
) -> Heads:
    q, k, v = (x if x.stride(-1) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in projected)
    (batch, heads, width), (groups, values) = q.shape, v.shape[1:]
    changes = biases is not None or norms is not None
    if not changes and table is None and counts is None:
        return Heads._make([*(x.unsqueeze(1) for x in (q, k, v, q, k)), None])
    q_out, k_out = (x.new_empty(x.shape) if changes else x for x in (q, k))
    v_out = v.new_empty(v.shape) if biases is not None else v
    q_turned, k_turned = (q_out, k_out) if table is None else (x.new_empty(x.shape) for x in (q, k))
    before = None if counts is None else torch.empty_like(counts)
    cos, sin = (q, q) if table is None else (x.contiguous() for x in table)
    weights = (None, None) if norms is None else (norms.q.weight, norms.k.weight)
    by_head = weights[0] is not None and weights[0].numel() != width
    with torch.cuda.device_of(q):
        turned_heads_kernel[(batch, heads + groups * (2 if biases is not None else 1))](
            q,
            k,
            v,
            q_out,
            k_out,
            v_out,
            q_turned,
            k_turned,
            *((q, q, q) if biases is None else biases),
            *(_present(weight, q) for weight in weights),
            cos,
            sin,
            *(_present(x, q) for x in (counts, before, lengths if lengths is None else lengths.contiguous())),
            q.stride(0),
            k.stride(0),
            v.stride(0),
            cos.stride(0) if table is not None and cos.shape[0] > 1 else 0,
            0.0 if norms is None else norms.q.eps,
            0.0 if norms is None else norms.q.offset,
            H=heads,
            K=groups,
            D=width,
            V=values,
            R=0 if table is None else cos.shape[-1],
            HAS_BIAS=biases is not None,
            KIND=None if norms is None else norms.q.kind,
            HAS_WEIGHT=weights[0] is not None,
            BY_HEAD=by_head,
            WIDE=norms is not None and norms.wide,
            TURN=None if table is None else turn,
            COUNTS=counts is not None,
            HAS_LENGTHS=lengths is not None,
            BLOCK_D=power_of_2(width),
            BLOCK_V=power_of_2(values),
            BLOCK_Q=power_of_2(heads * width),
            BLOCK_K=power_of_2(groups * width),
            num_warps=4 if norms is not None and norms.wide else 1,
            enable_fp_fusion=True,
        )
    return Heads._make([*(x.unsqueeze(1) for x in (q_out, k_out, v_out, q_turned, k_turned)), before])


def launch_activated(x: Tensor, activation: Activation, gated: bool) -> Tensor:
    x = x.contiguous()
    width = x.shape[1] // (2 if gated else 1)
    y, block = x.new_empty(x.shape[0], width), min(power_of_2(width), 512)
    with torch.cuda.device_of(x):
        activated_kernel[(x.shape[0], -(-width // block))](
            x, y, N=width, GATED=gated, ACTIVATION=activation, BLOCK=block, num_warps=4, enable_fp_fusion=True
        )
    return y


def _tensors(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.weight, norm.bias)


def _constants(name: str, norm: Norm | None) -> dict[str, object]:
    weight, bias = _tensors(norm)
    return {
        name: None if norm is None else norm.kind,
        f"{name}_WEIGHT": weight is not None,
        f"{name}_BIAS": bias is not None,
    }


def _present(tensor: Tensor | None, absent: Tensor) -> Tensor:
    """`absent` is a pointer that the kernel does not read."""
    return absent if tensor is None else tensor
