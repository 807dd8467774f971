"""Recurrences that forget per value channel (or per slot) instead of per key channel:

    S_t = S_{t-1} diag(g_t) + k_tᵀ v_t          o_t = q_t S_t

With keys and queries of width 1 this is an elementwise gated average of the values, as in RG-LRU (Griffin, arXiv
2402.19427) and minGRU (arXiv 2410.01201). Applied twice, with slots as values and then as keys, it is gated slot
attention (GSA, arXiv 2409.07146). Every form takes

    q         [B, T, H, D]     log_gate       [B, T, K, V]  log g, <= 0
    k         [B, T, K, D]     initial_state  [B, K, D, V] or None for zeros
    v         [B, T, K, V]

and returns the outputs `[B, T, H, V]` and the final state `[B, K, D, V]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize_kernels.decay import (
    Form,
    decayed_sum,
    exp_like,
    folded,
    form_for,
    from_chunks,
    lower_triangle,
    pair_decay,
    prepare,
    running_sum,
    to_chunks,
)
from linearize_kernels.dispatch import through_fla


def gated_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None = None,
    *,
    form: Form | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `form`, or the dispatch's choice: by default the form for the length, see `form_for`."""
    if form is None and through_fla("gated_values", q):
        from linearize_kernels.fla_ops import gated_values_fla

        return gated_values_fla(q, k, v, log_gate, initial_state)
    run = _VALUE_FORMS[form or form_for(q.shape[1])]
    return run(q, k, v, log_gate, initial_state)


def gated_values_parallel(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The reference: all pairs of tokens at once, O(T² (D + V)) time and memory, safe for gates of any strength."""
    q, k, v, log_gate, state = prepare(q, k, v, log_gate, initial_state)
    cumulative = running_sum(log_gate, 1)
    scores = torch.einsum("btkgd,bskd->btskg", q, k)
    outputs = torch.einsum("btskg,btskv,bskv->btkgv", scores, pair_decay(cumulative, cumulative, dim=1).to(q.dtype), v)
    outputs = outputs + torch.einsum("btkgd,bkdv->btkgv", q, state) * cumulative.to(q.dtype).exp().unsqueeze(3)
    total = cumulative[:, -1]
    kept = v * (total[:, None] - cumulative).to(q.dtype).exp()
    final = total.to(q.dtype).exp()[:, :, None] * state + torch.einsum("btkd,btkv->bkdv", k, kept)
    return outputs.flatten(2, 3), final


def gated_values_recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token, O(T D V) time and constant memory beyond the outputs."""
    q, k, v, log_gate, state = prepare(q, k, v, log_gate, initial_state)
    gate, outputs = log_gate.exp(), []
    for t in range(q.shape[1]):
        state = state * gate[:, t, :, None] + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(q[:, t] @ state)
    return torch.stack(outputs, 1).flatten(2, 3), state


def gated_values_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk, O(T) time and memory, safe for gates of any strength."""
    q, k, v, log_gate, state = prepare(q, k, v, log_gate, initial_state)
    tokens = q.shape[1]
    q, k, v, log_gate = to_chunks(q, k, v, log_gate)
    cumulative = running_sum(log_gate, 3)
    total = cumulative[..., -1:, :]

    scores = folded(q, k.transpose(-1, -2)).mul_(lower_triangle(k.shape[-2], k))
    outputs = decayed_sum(scores, v, cumulative)

    written = k.transpose(-1, -2) @ (v * exp_like(total - cumulative, v))  # [B, N, K, D, V]
    chunk_decay = exp_like(total, v)  # [B, N, K, 1, V]
    entering = []
    for n in range(q.shape[1]):
        entering.append(state)
        state = torch.addcmul(written[:, n], chunk_decay[:, n], state)
    read = folded(q, torch.stack(entering, 1))
    return from_chunks(torch.addcmul(outputs, read, exp_like(cumulative, v).unsqueeze(3)), tokens), state


def gated_values_step(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor) -> Tensor:
    """One token, for decoding; as `gla_step`, with `gate` `[B, 1, K, V]`."""
    batch, key_value_heads, width, values = state.shape
    heads = batch * key_value_heads
    matrices = state.view(heads, width, values)
    matrices.mul_(gate.reshape(heads, 1, -1)).baddbmm_(k.reshape(heads, width, 1), v.reshape(heads, 1, values))
    return torch.bmm(q.reshape(heads, -1, width), matrices).view(batch, 1, -1, values)


_VALUE_FORMS = {
    "parallel": gated_values_parallel,
    "chunkwise": gated_values_chunkwise,
    "recurrent": gated_values_recurrent,
}
