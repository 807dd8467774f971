"""Softmax attention over a sliding window and a few exact columns (sinks) that every later query may read; and the mix
of its outputs with a recurrence's.

y_t = Σ_s p_ts v_s ,   p_t = softmax over {last W tokens} ∪ {visible columns} of  scale · q_t·k_s
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize_kernels.codes import Codes, decode, key_scores, value_sums
from linearize_kernels.decay import computing_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

# Divisors are clamped to TINY, and a recurrence's weight is at most e^60 times the window's.
TINY = torch.finfo(torch.float32).tiny
MOST_LOG_RATIO = 60.0

# Least width of a block of queries; a block is otherwise as wide as the window. Narrower blocks waste launches.
_NARROWEST_BLOCK = 32
# Tokens per segment without gradients, so the scores fit into the processor's cache.
_WINDOW_SEGMENT = 512


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float,
    key_exists: Tensor | None = None,
    columns: tuple[Tensor, Tensor, Tensor] | None = None,
    softcap: float | None = None,
    normaliser: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention of each query to the last `window` tokens and to the `columns`, in O(T · window).

    Args:
        q: `[B, T, H, D]`, positions already encoded.
        k, v: `[B, P + T, K, D]` and `[B, P + T, K, V]`: the P tokens before the first query, oldest first
            (P = 0 or at least `window - 1`), then those of the queries. Query t reads k[:, P+t-window+1 : P+t+1].
        window: tokens in the window, the query's own included.
        scale: multiplies the scores.
        key_exists: `[B, P + T]`, True for real keys; None means all. Each query's own key must be real.
        columns: keys `[B, M, K, D]`, values `[B, M, K, V]` and visibility `[B or 1, T, M]` of exact columns.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        normaliser: also return the log of the softmax's denominator.

    Returns:
        outputs `[B, T, H, V]` and that logarithm `[B, T, H]` (None without `normaliser`), both float32 (or float64).
    """
    tokens, past = q.shape[1], k.shape[1] - q.shape[1]
    if 0 < past < window - 1:
        raise ValueError(f"{past} earlier tokens were given; a window of {window} needs none or {window - 1}")
    # Segments of whole blocks. For a wider window, segments are shorter than a block, which adds few scores beyond
    # those of the window.
    segment = _WINDOW_SEGMENT // window * window or _WINDOW_SEGMENT
    if tokens <= segment or torch.is_grad_enabled():
        return _attend_window(q, k, v, window, scale, key_exists, columns, softcap, normaliser)
    dtype = computing_dtype(q)
    outputs = q.new_empty(*q.shape[:3], v.shape[-1], dtype=dtype)
    logs = q.new_empty(q.shape[:3], dtype=dtype) if normaliser else None
    for start in range(0, tokens, segment):
        own = slice(start, start + segment)
        seen = slice(max(past + start - window + 1, 0), past + start + segment)
        exists = None if key_exists is None else key_exists[:, seen]
        exact = None if columns is None else (columns[0], columns[1], columns[2][:, own])
        outputs[:, own], log = _attend_window(
            q[:, own], k[:, seen], v[:, seen], window, scale, exists, exact, softcap, normaliser
        )
        if logs is not None and log is not None:
            logs[:, own] = log
    return outputs, logs


def step_attention(
    q: Tensor,
    k: Tensor | Codes,
    v: Tensor | Codes,
    *,
    scale: float,
    softcap: float | None = None,
    normaliser: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one query to all given keys.

    Args:
        q: `[B, H, D]` or `[B, 1, H, D]`, positions already encoded.
        k, v: `[B, N, K, D]` and `[B, N, K, V]`, or their codes, in any order.
        scale: multiplies the scores.
        softcap, normaliser: as in `window_attention`.

    Returns:
        outputs `[B, H, V]` or `[B, 1, H, V]` and the log of the softmax's denominator, without the last axis, both
        float32 (or float64).
    """
    dtype = computing_dtype(q)
    groups = (k if isinstance(k, Tensor) else k.codes).shape[2]
    # The query heads of a group become several queries of one head.
    grouped = (q if q.dtype == dtype else q.to(dtype)).view(q.shape[0], groups, -1, q.shape[-1])
    if softcap is None and not normaliser:
        keys, values = (decode(x, dtype) if isinstance(x, Codes) else x.to(dtype) for x in (k, v))
        attended = F.scaled_dot_product_attention(grouped, keys.transpose(1, 2), values.transpose(1, 2), scale=scale)
        return attended.view(*q.shape[:-1], -1), None
    score = _cap(key_scores(grouped, k) * scale, softcap)
    outputs = value_sums(score.softmax(-1), v)
    logs = score.logsumexp(-1).view(q.shape[:-1]) if normaliser else None
    return outputs.view(*q.shape[:-1], -1), logs


def joint_attention(
    q: Tensor,
    keys: Sequence[Tensor | Codes],
    values: Sequence[Tensor | Codes],
    hidden: Sequence[slice | Tensor | None],
    *,
    scale: float,
    softcap: float | None = None,
    normaliser: bool = True,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Attention of one query with one softmax over keys in several tensors, and its weights.

    Args:
        q: `[B, 1, H, D]`.
        keys, values: each `[B, S, K, D or V]`, or its codes.
        hidden: per tensor the keys that the query does not read: a slice of S, or a mask broadcastable to
            `[B, K, 1, S]`; None means that it reads all.
        scale, softcap, normaliser: as in `window_attention`.

    Returns:
        outputs `[B, 1, H, V]` and the log of the softmax's denominator `[B, 1, H]` (None without `normaliser`), both
        float32 (or float64); and per tensor the attention weights, summed over the query heads of a group, `[B, K, S]`.
    """
    groups = (keys[0] if isinstance(keys[0], Tensor) else keys[0].codes).shape[2]
    grouped = (q.to(computing_dtype(q)) * scale).view(q.shape[0], groups, -1, q.shape[-1])
    found = []
    for k, mask in zip(keys, hidden, strict=True):
        score = _cap(key_scores(grouped, k), softcap)
        if isinstance(mask, slice):
            score[..., mask].fill_(-math.inf)
        elif mask is not None:
            score.masked_fill_(mask, -math.inf)
        found.append(score)
    sizes = [score.shape[-1] for score in found]
    scores = found[0] if len(found) == 1 else torch.cat(found, -1)
    shares = scores.softmax(-1)
    pieces = [shares] if len(found) == 1 else shares.split(sizes, -1)
    read = [value_sums(piece, v) for piece, v in zip(pieces, values, strict=True)]
    outputs = sum(read[1:], read[0]).view(*q.shape[:-1], -1)
    logs = scores.logsumexp(-1).view(q.shape[:-1]) if normaliser else None
    return outputs, logs, list(shares.sum(2).split(sizes, -1))


def mix_outputs(
    y: Tensor,
    normaliser: Tensor | None,
    read: Tensor,
    mass: Tensor | None,
    *,
    mix: Literal["fixed", "learned", "softmax"],
    normalize: bool,
    weight: Tensor | None,
) -> Tensor:
    """Mix the outputs of window and recurrence. If the mass is 0, the result is the window's output.

    Args:
        y: the window's outputs `[..., H, V]`. normaliser: `[..., H]`, the log of their denominator, for `mix: softmax`.
        read: the recurrence's outputs `[..., H, V]`. mass: their mass `[..., H, 1]`; None if the recurrence has none.
        mix, normalize: see `LigerOptions`.
        weight: `[H, V]` for `mix: learned`, `[H]` for `mix: softmax`.
    """
    if mix == "softmax" and mass is not None:
        assert weight is not None and normaliser is not None  # noqa: S101 - for the type checker
        # One normaliser, exp(normaliser) + |w| mass, in a form in which neither term overflows. With |w|, a weight of
        # either sign keeps the denominator positive, and the derivative at 0 is not 0.
        by_head = weight[:, None].to(y.dtype)
        log_ratio = mass.clamp_min(TINY).log() - normaliser[..., None]
        ratio = log_ratio.clamp_max(MOST_LOG_RATIO).exp()
        share = torch.where(mass > 0, by_head * ratio / (1 + by_head.abs() * ratio), 0)
        return y + share * (read / mass.clamp_min(TINY) - y)
    part: Tensor | float = 0.5 if weight is None else weight if weight.dtype == y.dtype else weight.to(y.dtype)
    if mass is None or not normalize:
        return torch.lerp(y, read, part)
    # An output without mass has underflowed and is no average, so keep the window's output.
    if not torch.is_grad_enabled() and y.dtype == read.dtype:
        # The same in fewer launches: without mass the read is 0 too, so the window's output stays.
        change = torch.addcmul(read, mass, y, value=-1).div_(mass.clamp_min(TINY))
        return torch.addcmul(y, change, part) if isinstance(part, Tensor) else y.add(change, alpha=part)
    return torch.where(mass > 0, torch.lerp(y, read / mass.clamp_min(TINY), part), y)


def _attend_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scale: float,
    key_exists: Tensor | None,
    columns: tuple[Tensor, Tensor, Tensor] | None,
    softcap: float | None,
    normaliser: bool,
) -> tuple[Tensor, Tensor | None]:
    """`window_attention` for one segment. The query heads of a group are rows of one matrix, so keys and values are not
    repeated. Columns are keys of every block, so there is one softmax."""
    batch, tokens, heads, _ = q.shape
    key_value_heads, past = k.shape[2], k.shape[1] - tokens
    dtype = computing_dtype(q)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    block = max(window, _NARROWEST_BLOCK)
    if tokens <= block:
        block, before = tokens, past
    else:
        before = window - 1  # every block reads this number of keys before its first query
    if past > before:
        k, v = k[:, past - before :], v[:, past - before :]
        key_exists = key_exists[:, past - before :] if key_exists is not None else None
    elif past < before:
        key_exists = (torch.arange(before + tokens, device=q.device) >= before)[None]
        k, v = (F.pad(x, (0, 0, 0, 0, before, 0)) for x in (k, v))
    blocks = -(-tokens // block)
    fill = blocks * block - tokens
    if fill:
        q = F.pad(q, (0, 0, 0, 0, 0, fill))
        k, v = (F.pad(x, (0, 0, 0, 0, 0, fill)) for x in (k, v))

    q = q.unflatten(2, (key_value_heads, -1)).unflatten(1, (blocks, block)).permute(0, 1, 3, 4, 2, 5)
    k, v = (x.unfold(1, before + block, block).transpose(-1, -2) for x in (k, v))  # [B, N, K, before + C, D]
    seen = _in_window(block, window, before, blocks, key_exists, q.device)  # [1 or B, 1 or N, C, before + C]
    if columns is not None:
        visible = F.pad(columns[2], (0, 0, 0, fill)).unflatten(1, (blocks, block))
        shape = (max(seen.shape[0], visible.shape[0]), blocks, block, -1)
        seen = torch.cat([seen.expand(shape), visible.expand(shape)], -1)
        exact = (x.to(dtype).transpose(1, 2)[:, None].expand(*k.shape[:3], -1, -1) for x in columns[:2])
        k, v = (torch.cat(pair, -2) for pair in zip((k, v), exact, strict=True))
    queries, keys, values = (x.flatten(0, 2).flatten(1, -2) for x in (q, k, v))  # [B*N*K, G*C or keys, width]

    scores = torch.baddbmm(queries.new_zeros(1), queries, keys.transpose(1, 2), beta=0, alpha=scale)
    scores = _cap(scores, softcap).unflatten(0, q.shape[:3]).unflatten(3, q.shape[3:5])  # [B, N, K, G, C, keys]
    bias = torch.where(seen, 0.0, q.new_full((), -math.inf))
    scores = scores.add_(bias[:, :, None, None])
    outputs = scores.flatten(0, 2).flatten(1, 2).softmax(-1) @ values

    outputs = outputs.unflatten(0, q.shape[:3]).unflatten(3, q.shape[3:5]).permute(0, 1, 4, 2, 3, 5)
    outputs = outputs.reshape(batch, blocks * block, heads, -1)[:, :tokens]
    if not normaliser:
        return outputs, None
    return outputs, scores.logsumexp(-1).permute(0, 1, 4, 2, 3).reshape(batch, blocks * block, heads)[:, :tokens]


def _cap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _in_window(
    block: int, window: int, before: int, blocks: int, key_exists: Tensor | None, device: torch.device
) -> Tensor:
    """Mask of the keys in a block that each query reads, `[1 or B, 1 or N, C, before + C]`."""
    span = before + block
    query = torch.arange(block, device=device)[:, None] + before
    key = torch.arange(span, device=device)[None]
    seen = ((key <= query) & (key > query - window))[None, None]
    if key_exists is not None:
        flags = F.pad(key_exists, (0, before + blocks * block - key_exists.shape[1]), value=True)
        seen = seen & flags.unfold(1, span, block)[:, :, None]
    return seen
