"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635), one state per key/value head:

    S_t = diag(g_t) S_{t-1} + k_tᵀ v_t          o_t = q_t S_t

in three forms of one function. `parallel` is the reference, quadratic in T. `chunkwise` is linear in T, for training
and prefill. `recurrent` runs token by token, for decoding. Every form takes

    q         [B, T, H, D]     log_gate       [B, T, K, D]  log g, <= 0; width 1 is one gate per head
    k         [B, T, K, D]     initial_state  [B, K, D, V] or None for zeros
    v         [B, T, K, V]

and returns the outputs `[B, T, H, V]` and the final state `[B, K, D, V]`. There is no scale argument: fold the scale
into `q`. A token with `k = 0` and `log_gate = 0` leaves the state unchanged.
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
    lower_triangle,
    pair_decay,
    prepare,
    running_sum,
    splits,
    to_chunks,
)
from linearize_kernels.dispatch import through_fla


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    initial_state: Tensor | None = None,
    *,
    form: Form | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `form`, or the dispatch's choice: by default the form for the length, see `form_for`."""
    if form is None and through_fla("gla", q):
        from linearize_kernels.fla_ops import gla_fla

        return gla_fla(q, k, v, log_gate, initial_state)
    run = _GLA_FORMS[form or form_for(q.shape[1])]
    return run(q, k, v, log_gate, initial_state)


def gla_parallel(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The reference: all pairs of tokens at once, O(T² D) time and memory, safe for gates of any strength."""
    q, k, v, log_gate, state = prepare(q, k, v, log_gate, initial_state)
    cumulative = running_sum(log_gate, 1)
    decay = pair_decay(cumulative, cumulative, dim=1).to(q.dtype).expand(*(-1,) * 4, q.shape[-1])
    scores = torch.einsum("btkgd,btskd,bskd->bkgts", q, decay, k)
    outputs = torch.einsum("bkgts,bskv->btkgv", scores, v)
    outputs = outputs + torch.einsum("btkgd,bkdv->btkgv", q * cumulative.to(q.dtype).exp().unsqueeze(3), state)
    total = cumulative[:, -1]
    kept = k * (total[:, None] - cumulative).to(q.dtype).exp()
    final = total.to(q.dtype).exp()[..., None] * state + torch.einsum("btkd,btkv->bkdv", kept, v)
    return outputs.flatten(2, 3), final


def gla_recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token, O(T D V) time and constant memory beyond the outputs."""
    q, k, v, log_gate, state = prepare(q, k, v, log_gate, initial_state)
    gate = log_gate.exp()
    outputs = []
    for t in range(q.shape[1]):
        state = gate[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(q[:, t] @ state)
    return torch.stack(outputs, 1).flatten(2, 3), state


def gla_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk: matrix products inside a chunk, the state carried between chunks; O(T) time and memory.

    Safe for gates of any strength: a decay that is too strong to split into one factor per query and one per key is
    computed by repeatedly halving the chunk; factors relative to the border of two halves cannot overflow.
    """
    q, k, v, log_gate, state = prepare(q, k, v, log_gate, initial_state)
    tokens = q.shape[1]
    q, k, v, log_gate = to_chunks(q, k, v, log_gate)
    cumulative = running_sum(log_gate, 3)
    total = cumulative[..., -1:, :]

    if log_gate.shape[-1] > 1 and splits(cumulative):
        # Half of the chunk's decay is applied once to queries and keys, the other half to the states, which are
        # smaller.
        middle = total / 2
        half = exp_like(middle, k).transpose(-1, -2)  # [B, N, K, D, 1]
        decay = exp_like(cumulative - middle, k)
        q, k = q * decay.unsqueeze(3), k / decay
        scores = folded(q, k.transpose(-1, -2)).mul_(lower_triangle(k.shape[-2], k))
        entering, state = _states(half * (k.transpose(-1, -2) @ v), half.square(), state)
        outputs = folded(scores, v, onto=folded(q, half * entering))
    else:
        scores = decayed_scores(q, k, cumulative, cumulative)
        written = (k * exp_like(total - cumulative, k)).transpose(-1, -2) @ v  # [B, N, K, D, V]
        entering, state = _states(written, exp_like(total, k).transpose(-1, -2), state)
        outputs = folded(scores, v, onto=folded(q * exp_like(cumulative, q).unsqueeze(3), entering))
    return from_chunks(outputs, tokens), state


def _states(written: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state at the start of each chunk `[B, N, K, D, V]`, and the last state; `decay` `[B, N, K, D or 1, 1]`."""
    entering = []
    for n in range(written.shape[1]):
        entering.append(state)
        state = torch.addcmul(written[:, n], decay[:, n], state)
    return torch.stack(entering, 1), state


def gla_step(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor) -> Tensor:
    """One token, for decoding. Updates `state` in place, without gradients.

    Args:
        q: `[B, 1, H, D]`. k: `[B, 1, K, D]`. v: `[B, 1, K, V]`. gate: `[B, 1, K, D or 1]`, g, not its logarithm.
        state: `[B, K, D, V]` float32.

    Returns:
        `[B, 1, H, V]`.
    """
    batch, key_value_heads, width, values = state.shape
    heads = batch * key_value_heads
    # Three-dimensional views, which `bmm` takes without a copy.
    matrices = state.view(heads, width, values)
    matrices.mul_(gate.reshape(heads, -1, 1)).baddbmm_(k.reshape(heads, width, 1), v.reshape(heads, 1, values))
    return torch.bmm(q.reshape(heads, -1, width), matrices).view(batch, 1, -1, values)


_GLA_FORMS = {"parallel": gla_parallel, "chunkwise": gla_chunkwise, "recurrent": gla_recurrent}
