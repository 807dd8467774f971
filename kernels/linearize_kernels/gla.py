"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635), one state per key/value head:

    S_t = diag(g_t) S_{t-1} + k_tᵀ v_t          o_t = q_t S_t

in three forms of the same function. `parallel` is the readable reference, quadratic in T; `chunkwise` is linear and
serves training and prefill; `recurrent` is the step that decoding takes. Every form takes

    q         [B, T, H, D]     log_gate       [B, T, K, D]  log g, <= 0
    k         [B, T, K, D]     initial_state  [B, K, D, V] or None for zeros
    v         [B, T, K, V]

and returns the outputs `[B, T, H, V]` and the final state `[B, K, D, V]`. There is no scale: fold it into `q`.
A token with `k = 0` and `log_gate = 0` leaves the state as it was.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
SUB_CHUNK = 16

# exp(±x) for x up to half of this stays far from float32's limits (about e^88), also after a product of two.
_SAFE_LOG_DECAY = 60.0


def gla(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The form that suits the length: `recurrent` for one token, `chunkwise` for more."""
    form = gla_recurrent if q.shape[1] == 1 else gla_chunkwise
    return form(q, k, v, log_gate, initial_state)


def gla_parallel(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The reference: every pair of tokens at once, O(T² D) time and memory, safe for gates of any strength."""
    q, k, v, log_gate, state = _prepare(q, k, v, log_gate, initial_state)
    cumulative = _cumulative(log_gate, 1)
    decay = _pair_decay(cumulative).to(q.dtype)
    scores = torch.einsum("btkgd,btskd,bskd->bkgts", q, decay, k)
    outputs = torch.einsum("bkgts,bskv->btkgv", scores, v)
    outputs = outputs + torch.einsum("btkgd,btkd,bkdv->btkgv", q, cumulative.to(q.dtype).exp(), state)
    total = cumulative[:, -1]
    kept = k * (total[:, None] - cumulative).to(q.dtype).exp()
    final = total.to(q.dtype).exp()[..., None] * state + torch.einsum("btkd,btkv->bkdv", kept, v)
    return outputs.flatten(2, 3), final


def gla_recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token, O(T D V) time and constant memory beyond the outputs."""
    q, k, v, log_gate, state = _prepare(q, k, v, log_gate, initial_state)
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

    Safe for gates of any strength: where the decay inside a chunk is too strong to be split into one factor per
    query and one per key, chunks are cut into sub-chunks whose factors cannot overflow.
    """
    q, k, v, log_gate, state = _prepare(q, k, v, log_gate, initial_state)
    tokens = q.shape[1]
    chunk = min(CHUNK, -(-tokens // SUB_CHUNK) * SUB_CHUNK)
    q, k, v, log_gate = (_to_chunks(x, chunk) for x in (q, k, v, log_gate))

    # Heads before tokens, so that every product below is a plain batched matmul: [B, N, K, C, ...].
    k, v, log_gate = (x.transpose(2, 3) for x in (k, v, log_gate))
    q = q.permute(0, 1, 3, 4, 2, 5)  # [B, N, K, G, C, D]
    cumulative = _cumulative(log_gate, 3)
    total = cumulative[..., -1:, :]

    scores = _scores_within_chunks(q, k, cumulative, total)
    outputs = scores @ v.unsqueeze(3)

    written = (k * _exp(total - cumulative, k)).transpose(-1, -2) @ v  # [B, N, K, D, V]
    chunk_decay = _exp(total, k).transpose(-1, -2)  # [B, N, K, D, 1]
    entering = []
    for n in range(q.shape[1]):
        entering.append(state)
        state = chunk_decay[:, n] * state + written[:, n]
    read = q * _exp(cumulative, q).unsqueeze(3)
    outputs = outputs + read @ torch.stack(entering, 1).unsqueeze(3)

    outputs = outputs.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
    return outputs[:, :tokens], state


def _scores_within_chunks(q: Tensor, k: Tensor, cumulative: Tensor, total: Tensor) -> Tensor:
    """Decayed q·k of each pair inside a chunk, `[B, N, K, G, C, C]`, zero where the key comes after the query."""
    chunk = k.shape[3]
    if bool(total.amin() >= -_SAFE_LOG_DECAY):
        # Both factors are taken against half of the chunk's decay, so neither exponent passes half of the limit.
        middle = total / 2
        queries = q * _exp(cumulative - middle, q).unsqueeze(3)
        keys = (k * _exp(middle - cumulative, k)).unsqueeze(3)
        return (queries @ keys.transpose(-1, -2)).tril()

    rows = []
    for start in range(0, chunk, SUB_CHUNK):
        stop = start + SUB_CHUNK
        block = cumulative[..., start:stop, :]
        pairs = k[..., None, start:stop, :] * _pair_decay(block, dim=3).to(k.dtype)  # [B, N, K, c, c, D]
        row = torch.einsum("bnkgtd,bnktsd->bnkgts", q[..., start:stop, :], pairs)
        if start:
            # Against the decay at the sub-chunk's border both exponents are <= 0 for every earlier key.
            border = cumulative[..., start - 1 : start, :]
            queries = q[..., start:stop, :] * _exp(block - border, q).unsqueeze(3)
            keys = k[..., :start, :] * _exp(border - cumulative[..., :start, :], k)
            row = torch.cat([queries @ keys.unsqueeze(3).transpose(-1, -2), row], -1)
        rows.append(F.pad(row, (0, chunk - stop)))
    return torch.cat(rows, -2)


def _pair_decay(cumulative: Tensor, dim: int = 1) -> Tensor:
    """exp(c_t - c_s) for s <= t and 0 elsewhere; the token axis `dim` becomes two, (t, s)."""
    tokens = cumulative.shape[dim]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=cumulative.device).triu(1)
    later = later.reshape(tokens, tokens, *([1] * (cumulative.dim() - dim - 1)))
    difference = cumulative.unsqueeze(dim + 1) - cumulative.unsqueeze(dim)
    decay: Tensor = difference.masked_fill(later, float("-inf")).exp()
    return decay


def _cumulative(log_gate: Tensor, dim: int) -> Tensor:
    """Running sum of the log-gates, in float64: decays are differences of these sums, and after a few strong gates
    float32 would have nothing left of the weak ones. (Apple's GPUs have no float64.)"""
    return log_gate.cumsum(dim, dtype=torch.float32 if log_gate.device.type == "mps" else torch.float64)


def _exp(exponent: Tensor, like: Tensor) -> Tensor:
    return exponent.to(like.dtype).exp()


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs in the computing dtype, queries grouped by key/value head `[B, T, K, G, D]`, a state in any case."""
    batch, tokens, heads, width = q.shape
    key_value_heads = k.shape[2]
    if heads % key_value_heads:
        raise ValueError(f"{heads} query heads cannot share {key_value_heads} key/value heads evenly")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v, log_gate = (x.to(dtype) for x in (q, k, v, log_gate))
    q = q.reshape(batch, tokens, key_value_heads, heads // key_value_heads, width)
    if initial_state is None:
        state = q.new_zeros(batch, key_value_heads, width, v.shape[-1])
    else:
        state = initial_state.to(dtype)
    return q, k, v, log_gate, state


def _to_chunks(x: Tensor, chunk: int) -> Tensor:
    """`[B, T, ...]` as `[B, N, C, ...]`; the last chunk is filled with zeros, which change no state."""
    missing = -x.shape[1] % chunk
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    chunks: Tensor = x.unflatten(1, (-1, chunk))
    return chunks
