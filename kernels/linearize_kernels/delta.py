"""Recurrences that correct the state's current content (delta rules), one state per key/value head:

    S_t = diag(g_t) S_{t-1} + b_tᵀ (a_t S_{t-1}) + k_tᵀ v_t          o_t = q_t S_t

This is the general rank-one correction of RWKV-7 (arXiv 2503.14456). With b = -β k, a = g ⊙ k, and β k in place of k,
it becomes the delta rule with decay

    S_t = (I - β_t k_tᵀ k_t) diag(g_t) S_{t-1} + β_t k_tᵀ v_t

This is gated DeltaNet (arXiv 2412.06464) with one gate per head, and KDA (arXiv 2510.26692) with one per channel. The
chunkwise form solves one triangular system per chunk for all corrections (the WY representation, arXiv 2406.06484).
Every form takes

    q         [B, T, H, D]     log_gate       [B, T, K, D]  log g, <= 0; width 1 is one gate per head
    k, a, b   [B, T, K, D]     initial_state  [B, K, D, V] or None for zeros
    v         [B, T, K, V]

and returns the outputs `[B, T, H, V]` and the final state `[B, K, D, V]`. A token with k = b = 0 and log_gate = 0
leaves the state unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize_kernels.decay import (
    Form,
    decayed_scores,
    exp_like,
    folded,
    form_for,
    from_chunks,
    pair_decay,
    prepare,
    running_sum,
    to_chunks,
)
from linearize_kernels.dispatch import through_fla


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    form: Form | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `form`, or the dispatch's choice: by default the form for the length, see `form_for`."""
    if form is None and through_fla("delta_rule", q):
        from linearize_kernels.fla_ops import delta_rule_fla

        return delta_rule_fla(q, k, v, log_gate, a, b, initial_state)
    run = _DELTA_FORMS[form or form_for(q.shape[1])]
    return run(q, k, v, log_gate, a, b, initial_state)


def delta_rule_parallel(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, a: Tensor, b: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The reference: one triangular system over the whole text, O(T² D + T³) time, O(T² D) memory."""
    q, k, v, log_gate, state = prepare(q, k, v, log_gate, initial_state)
    a, b = a.to(q.dtype), b.to(q.dtype)
    cumulative = running_sum(log_gate, 1)
    before = cumulative - log_gate
    tokens, width = q.shape[1], q.shape[-1]

    def decay(later: Tensor, strict: bool) -> Tensor:
        return pair_decay(later, cumulative, dim=1, strict=strict).to(q.dtype).expand(*(-1,) * 4, width)

    earlier, own = decay(before, True), decay(cumulative, False)  # [B, T, T, K, D]
    entering = torch.einsum("btkd,bkdv->bktv", a * before.to(q.dtype).exp(), state)
    from_writes = torch.einsum("btkd,btskd,bskd->bkts", a, earlier, k) @ v.transpose(1, 2)
    system = torch.eye(tokens, dtype=q.dtype, device=q.device) - torch.einsum("btkd,btskd,bskd->bkts", a, earlier, b)
    corrections = torch.linalg.solve_triangular(system, entering + from_writes, upper=False, unitriangular=True)

    outputs = torch.einsum("btkgd,btskd,bskd,bskv->btkgv", q, own, k, v)
    outputs = outputs + torch.einsum("btkgd,btskd,bskd,bksv->btkgv", q, own, b, corrections)
    outputs = outputs + torch.einsum("btkgd,bkdv->btkgv", q * cumulative.to(q.dtype).exp().unsqueeze(3), state)
    total = cumulative[:, -1]
    kept = (total[:, None] - cumulative).to(q.dtype).exp()
    final = total.to(q.dtype).exp()[..., None] * state + torch.einsum("btkd,btkv->bkdv", k * kept, v)
    return outputs.flatten(2, 3), final + torch.einsum("btkd,bktv->bkdv", b * kept, corrections)


def delta_rule_recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, a: Tensor, b: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token, O(T D V) time and constant memory beyond the outputs."""
    q, k, v, log_gate, state = prepare(q, k, v, log_gate, initial_state)
    a, b, gate = a.to(q.dtype), b.to(q.dtype), log_gate.exp()
    outputs = []
    for t in range(q.shape[1]):
        correction = a[:, t, :, None] @ state  # [B, K, 1, V]
        state = gate[:, t, :, :, None] * state + b[:, t, :, :, None] * correction
        state = state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(q[:, t] @ state)
    return torch.stack(outputs, 1).flatten(2, 3), state


def delta_rule_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, a: Tensor, b: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk: one triangular solve gives a chunk's corrections as an affine function of the incoming state;
    O(T) time and memory, safe for gates of any strength."""
    q, k, v, log_gate, state = prepare(q, k, v, log_gate, initial_state)
    tokens = q.shape[1]
    a, b = a.to(q.dtype), b.to(q.dtype)
    q, k, v, log_gate, a, b = to_chunks(q, k, v, log_gate, a, b)
    cumulative = running_sum(log_gate, 3)
    before = cumulative - log_gate
    total = cumulative[..., -1:, :]

    # Correction u_t = a_t S_{t-1} = entering_t S_0 + of_writes_t; the system's inverse is applied to both terms.
    reads = a.unsqueeze(3)
    of_corrections = decayed_scores(reads, b, before, cumulative, strict=True).squeeze(3)
    of_writes = decayed_scores(reads, k, before, cumulative, strict=True).squeeze(3) @ v
    system = torch.eye(k.shape[3], dtype=k.dtype, device=k.device) - of_corrections
    solved = torch.linalg.solve_triangular(
        system, torch.cat([a * exp_like(before, a), of_writes], -1), upper=False, unitriangular=True
    )
    entering, of_writes = solved.split([a.shape[-1], v.shape[-1]], -1)

    kept = exp_like(total - cumulative, k)
    written = (k * kept).transpose(-1, -2) @ v  # [B, N, K, D, V]
    corrected = (b * kept).transpose(-1, -2)  # [B, N, K, D, C]
    chunk_decay = exp_like(total, k).transpose(-1, -2)  # [B, N, K, D or 1, 1]
    states, corrections = [], []
    for n in range(q.shape[1]):
        states.append(state)
        corrections.append(entering[:, n] @ state + of_writes[:, n])
        state = torch.addcmul(written[:, n] + corrected[:, n] @ corrections[-1], chunk_decay[:, n], state)

    outputs = folded(q * exp_like(cumulative, q).unsqueeze(3), torch.stack(states, 1))
    outputs = folded(decayed_scores(q, k, cumulative, cumulative), v, onto=outputs)
    outputs = folded(decayed_scores(q, b, cumulative, cumulative), torch.stack(corrections, 1), onto=outputs)
    return from_chunks(outputs, tokens), state


def delta_rule_step(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """One token, for decoding; as `linearize_kernels.gla_step`, with `a` and `b` `[B, 1, K, D]`."""
    batch, key_value_heads, width, values = state.shape
    heads = batch * key_value_heads
    matrices = state.view(heads, width, values)
    correction = torch.bmm(a.reshape(heads, 1, width), matrices)
    matrices.mul_(gate.reshape(heads, -1, 1))
    # One product does both writes.
    written = torch.stack([b.reshape(heads, width), k.reshape(heads, width)], 2)
    matrices.baddbmm_(written, torch.cat([correction, v.reshape(heads, 1, values)], 1))
    return torch.bmm(q.reshape(heads, -1, width), matrices).view(batch, 1, -1, values)


_DELTA_FORMS = {"parallel": delta_rule_parallel, "chunkwise": delta_rule_chunkwise, "recurrent": delta_rule_recurrent}
