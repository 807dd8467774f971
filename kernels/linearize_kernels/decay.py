"""Helpers of the chunkwise forms: chunks, cumulative decays, and products of token pairs under decay.

A decay from token s to token t is exp(c_t - c_s), where c is the running sum of log-gates. The factors exp(c_t) and
exp(-c_s) turn it into a matrix product, but with strong gates each factor alone exceeds float32's range. So both are
computed relative to a reference between the two tokens. The reference is half of the chunk's decay if that is known to
be safe; else it is the border of two halves, for the chunk, its halves, and so on down to single tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize_kernels.dispatch import pinned

Form = Literal["parallel", "chunkwise", "recurrent"]

CHUNK = 64
SUB_CHUNK = 16

# exp(±x) for x up to half of this is far from float32's limits (about e^88), and so is a product of two.
_SAFE_LOG_DECAY = 60.0


def computing_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def prepare(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Convert inputs to the computing dtype, group queries by key/value head `[B, T, K, G, D]`, and default the state
    to zeros."""
    batch, tokens, heads, width = q.shape
    key_value_heads = k.shape[2]
    if heads % key_value_heads:
        raise ValueError(f"{heads} query heads cannot share {key_value_heads} key/value heads evenly")
    dtype = computing_dtype(q)
    q, k, v, log_gate = (x.to(dtype) for x in (q, k, v, log_gate))
    q = q.reshape(batch, tokens, key_value_heads, heads // key_value_heads, width)
    if initial_state is None:
        state = q.new_zeros(batch, key_value_heads, width, v.shape[-1])
    else:
        state = initial_state.to(dtype)
    return q, k, v, log_gate, state


def running_sum(log_gate: Tensor, dim: int) -> Tensor:
    """Running sum of log-gates in float64. Decays are differences of these sums; in float32, a few strong gates would
    cancel all digits of the weak ones. (Apple's GPUs have no float64, so float32 there.)"""
    # Convert first: with `cumsum(dtype=...)` the backward pass runs in float32, where large gradients cancel.
    return log_gate.to(torch.float32 if log_gate.device.type == "mps" else torch.float64).cumsum(dim)


def exp_like(exponent: Tensor, like: Tensor) -> Tensor:
    """exp in the dtype of `like`."""
    return exponent.exp().to(like.dtype)


def to_chunks(q: Tensor, *others: Tensor) -> list[Tensor]:
    """Cut queries `[B, T, K, G, D]` into `[B, N, K, G, C, D]`, and the others `[B, T, K, ...]` into `[B, N, K, C,
    ...]`. Heads come before tokens, so every product is a plain batched matmul. The last chunk is padded with zeros,
    which do not change the state."""
    tokens = q.shape[1]
    chunk = min(CHUNK, -(-tokens // SUB_CHUNK) * SUB_CHUNK)
    missing = -tokens % chunk
    # Checked first, because `F.pad` by 0 copies.
    filled = (F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x for x in (q, *others))
    q, *in_chunks = (x.unflatten(1, (-1, chunk)) for x in filled)
    return [q.permute(0, 1, 3, 4, 2, 5).contiguous(), *(x.transpose(2, 3).contiguous() for x in in_chunks)]


def from_chunks(outputs: Tensor, tokens: int) -> Tensor:
    """The inverse: `[B, N, K, G, C, V]` to `[B, T, H, V]`."""
    return outputs.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :tokens]


def form_for(tokens: int) -> Form:
    """The form for a length: `recurrent` for one token, `chunkwise` for more; with `LINEARIZE_KERNELS=reference`,
    `parallel` for more."""
    if tokens == 1:
        return "recurrent"
    return "parallel" if not torch.compiler.is_compiling() and pinned() == "reference" else "chunkwise"


def pair_decay(later: Tensor, earlier: Tensor, dim: int, *, strict: bool = False) -> Tensor:
    """exp(later_t - earlier_s) for s <= t (s < t if strict), 0 elsewhere; the token axis `dim` becomes two, (t, s)."""
    tokens = earlier.shape[dim]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=earlier.device).triu(0 if strict else 1)
    hidden = hidden.reshape(tokens, tokens, *([1] * (earlier.dim() - dim - 1)))
    difference = later.unsqueeze(dim + 1) - earlier.unsqueeze(dim)
    decay: Tensor = difference.masked_fill(hidden, float("-inf")).exp()
    return decay


def lower_triangle(tokens: int, like: Tensor, diagonal: int = 0) -> Tensor:
    """1 for s <= t + diagonal, 0 elsewhere, `[C, C]` (t, s). A product with it is faster than `tril` of many small
    matrices."""
    return torch.ones(tokens, tokens, dtype=like.dtype, device=like.device).tril(diagonal)


def splits(cumulative: Tensor) -> bool:
    """True if the decays of each chunk `[..., C, D]` are weak enough for one factor per query and one per key. Always
    False on a GPU, because reading the decays would sync the device, up to four times a layer."""
    # Meta tensors have no values; assume weak decays, those of a new model.
    if cumulative.device.type != "cpu":
        return cumulative.is_meta
    return bool(cumulative[..., -1, :].amin() >= -_SAFE_LOG_DECAY)


def folded(queries: Tensor, keys: Tensor, onto: Tensor | None = None) -> Tensor:
    """q kᵀ, or any product of queries `[..., G, C, D]` with matrices `[..., D, X]`: `[..., G, C, X]`. The queries of a
    group are rows of one matrix, so the matrices are not repeated. The result is added to `onto` in place if it is
    given."""
    rows = queries.flatten(-3, -2)
    if onto is None:
        product: Tensor = (rows @ keys).unflatten(-2, queries.shape[-3:-1])
        return product
    rows, keys = rows.flatten(0, -3), keys.flatten(0, -3)
    onto.view(*rows.shape[:2], -1).baddbmm_(rows, keys)
    return onto


def decayed_scores(q: Tensor, k: Tensor, later: Tensor, earlier: Tensor, *, strict: bool = False) -> Tensor:
    """Σ_d q_td exp(later_td - earlier_sd) k_sd for each pair of a chunk, 0 where s > t (s >= t if strict).

    Args:
        q: `[..., G, C, D]`. k: `[..., C, D]`.
        later, earlier: running decays `[..., C, D or 1]` of queries and of keys; `earlier` is the chunk's own, and
            `later` is the same, or the one before it (if queries read the state before their own token's decay).

    Returns:
        `[..., G, C, C]`.
    """
    diagonal = -1 if strict else 0
    if earlier.shape[-1] == 1:
        # One gate per head gives one factor per pair. A factor per query and one per key would be faster, but the
        # gates' gradients would be differences of sums of both, which cancel in float32.
        decay = pair_decay(later, earlier, dim=later.dim() - 2, strict=strict).squeeze(-1)
        return folded(q, k.transpose(-1, -2)) * decay.to(q.dtype).unsqueeze(-3)
    if splits(earlier):
        # Both factors are relative to half of the chunk's decay, so neither exponent exceeds half of the limit.
        middle = earlier[..., -1:, :] / 2
        queries = q * exp_like(later - middle, q).unsqueeze(-3)
        keys = k * exp_like(middle - earlier, k)
        return folded(queries, keys.transpose(-1, -2)) * lower_triangle(q.shape[-2], q, diagonal)

    tokens = k.shape[-2]
    last = earlier[..., -1:, :]
    q, k, later, earlier = (_filled(x, fill) for x, fill in ((q, None), (k, None), (later, last), (earlier, last)))
    own = torch.zeros_like(k) if strict else k * exp_like(later - earlier, k)
    rows = (q * own.unsqueeze(-3)).sum(-1)[..., None, None]  # [..., G, N, c, c], N blocks of c = 1 token
    for half in _halves(k.shape[-2]):
        of_queries, of_keys = _border_decay(later, earlier, half, k)
        queries = q.unflatten(-2, (-1, 2, half))[..., 1, :, :] * of_queries.unsqueeze(-4)
        keys = k.unflatten(-2, (-1, 2, half))[..., 0, :, :] * of_keys
        across = queries @ keys.unsqueeze(-4).transpose(-1, -2)
        first, second = rows.unflatten(-3, (-1, 2)).unbind(-3)
        rows = torch.cat([F.pad(first, (0, half)), torch.cat([across, second], -1)], -2)
    return rows.squeeze(-3)[..., :tokens, :tokens]


def decayed_sum(scores: Tensor, v: Tensor, cumulative: Tensor) -> Tensor:
    """Σ_s scores_ts exp(c_tv - c_sv) v_sv: decay per value channel.

    Args:
        scores: `[..., G, C, C]`, 0 where s > t.
        v, cumulative: `[..., C, V]`.

    Returns:
        `[..., G, C, V]`.
    """
    if splits(cumulative):
        middle = cumulative[..., -1:, :] / 2
        summed = folded(scores, v * exp_like(middle - cumulative, v))
        return summed * exp_like(cumulative - middle, v).unsqueeze(-3)
    tokens = v.shape[-2]
    v, cumulative = _filled(v, None), _filled(cumulative, cumulative[..., -1:, :])
    missing = v.shape[-2] - tokens
    scores = F.pad(scores, (0, missing, 0, missing))
    summed = scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * v.unsqueeze(-3)
    for half in _halves(v.shape[-2]):
        of_queries, of_keys = _border_decay(cumulative, cumulative, half, v)
        values = v.unflatten(-2, (-1, 2, half))[..., 0, :, :] * of_keys
        pairs = scores.unflatten(-2, (-1, 2, half)).unflatten(-1, (-1, 2, half))[..., 1, :, :, 0, :]
        across = pairs.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # [..., G, N, c, c]
        rows = (across @ values.unsqueeze(-4)) * of_queries.unsqueeze(-4)
        summed = summed + F.pad(rows, (0, 0, half, 0)).flatten(-3, -2)
    return summed[..., :tokens, :]


def _filled(x: Tensor, row: Tensor | None) -> Tensor:
    """Pad `[..., C, D]` with `row` `[..., 1, D]`, or with zeros, until C is a power of two. Running decays are padded
    with the chunk's last one, so no decay between two tokens exceeds 1."""
    missing = (1 << (x.shape[-2] - 1).bit_length()) - x.shape[-2]
    if not missing:
        return x
    if row is None:
        return F.pad(x, (0, 0, 0, missing))
    return torch.cat([x, row.expand(*row.shape[:-2], missing, -1)], -2)


def _halves(tokens: int) -> list[int]:
    """1, 2, 4, ... below `tokens`. For each pair s < t of a chunk, exactly one of these sizes has s in the first half
    and t in the second half of the same block of twice the size."""
    return [1 << level for level in range(tokens.bit_length() - 1)]


def _border_decay(later: Tensor, earlier: Tensor, half: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """For blocks of two halves: the decay from the end of the first half to each token of the second, and from each
    token of the first half to its end, `[..., N, half, D]` each. No exponent is above 0."""
    first = earlier.unflatten(-2, (-1, 2, half))[..., 0, :, :]
    border = first[..., -1:, :]
    second = later.unflatten(-2, (-1, 2, half))[..., 1, :, :]
    return exp_like(second - border, like), exp_like(border - first, like)
