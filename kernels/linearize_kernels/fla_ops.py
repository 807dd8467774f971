"""The recurrences through flash-linear-attention's kernels (arXiv 2312.06635 and others; the package `fla`, 0.6).

Each function has the interface of this package's function of the same name. fla's kernels have no grouped heads, so
keys, values, gates and states are repeated per query head; of a group's G equal states the first one is returned.

    gla            chunk_gla, chunk_simple_gla with one gate per head, fused_recurrent_gla for short texts
    delta_rule     chunk_dplr_delta_rule: the same general correction, which includes the others
    gated_values   fused_recurrent_gla, because its chunkwise kernels have no gates on values alone
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule
    from fla.ops.gla import chunk_gla, fused_recurrent_gla
    from fla.ops.simple_gla import chunk_simple_gla
except ImportError as error:
    raise ImportError("these recurrences need flash-linear-attention: pip install flash-linear-attention") from error

# Up to this length fla's own layers use the recurrent kernel.
_SHORT = 64


def gla_fla(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`linearize_kernels.gla` through fla's kernels."""
    group, (k, v, log_gate), options = _per_query_head(q, (k, v, log_gate), initial_state)
    if q.shape[1] <= _SHORT:
        outputs, final = fused_recurrent_gla(q, k, v, gk=log_gate.expand_as(k).contiguous(), **options)
    elif log_gate.shape[-1] == 1 and not _backward_of_one_gate_fails(q):
        outputs, final = chunk_simple_gla(q, k, v, log_gate[..., 0].contiguous(), **options)
    else:
        outputs, final = chunk_gla(q, k, v, log_gate.expand_as(k).contiguous(), **options)
    return outputs, final[:, ::group]


def gated_values_fla(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`linearize_kernels.gated_values` through fla's kernels."""
    group, (k, v, log_gate), options = _per_query_head(q, (k, v, log_gate), initial_state)
    outputs, final = fused_recurrent_gla(q, k, v, gv=log_gate, **options)
    return outputs, final[:, ::group]


def delta_rule_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linearize_kernels.delta_rule` through fla's kernels."""
    group, (k, v, log_gate, a, b), options = _per_query_head(q, (k, v, log_gate, a, b), initial_state)
    outputs, final = chunk_dplr_delta_rule(q, k, v, a, b, log_gate.expand_as(k).contiguous(), **options)
    return outputs, final[:, ::group]


def _per_query_head(
    q: Tensor, tensors: tuple[Tensor, ...], initial_state: Tensor | None
) -> tuple[int, list[Tensor], dict[str, Any]]:
    """G, the tensors `[B, T, K, ...]` repeated to `[B, T, H, ...]`, and the keyword arguments of every call."""
    group = q.shape[2] // tensors[0].shape[2]
    if q.shape[2] % tensors[0].shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {tensors[0].shape[2]} key/value heads evenly")
    state = None if initial_state is None else initial_state.repeat_interleave(group, 1)
    repeated = [x.to(q.dtype).repeat_interleave(group, 2) for x in tensors]
    return group, repeated, {"scale": 1.0, "initial_state": state, "output_final_state": True}


def _backward_of_one_gate_fails(q: Tensor) -> bool:
    """True if fla refuses the backward pass of `chunk_simple_gla`: on Hopper with triton 3.4 to 3.7.0."""
    if not torch.is_grad_enabled() or q.device.type != "cuda":
        return False
    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3])
    return torch.cuda.get_device_capability(q.device)[0] == 9 and (3, 4) <= version <= (3, 7, 0)
