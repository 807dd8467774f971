"""Softmax attention over a sliding window, plus a few exact columns (sinks) that every later query may read.

y_t = Σ_s p_ts v_s ,   p_t = softmax over {last W tokens} ∪ {visible columns} of  scale · q_t·k_s
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries are cut into blocks of the window's width, but no narrower than this: thinner ones waste launches.
_NARROWEST_BLOCK = 32


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
) -> tuple[Tensor, Tensor]:
    """Attention of each query to the last `window` tokens and to the `columns`, in O(T · window).

    Args:
        q: `[B, T, H, D]`, positions already encoded.
        k, v: `[B, P + T, K, D]` and `[B, P + T, K, V]`: the P tokens before the first query, oldest first
            (P = 0 or at least `window - 1`), then those of the queries. Query t reads k[:, P+t-window+1 : P+t+1].
        window: tokens in the window, the query's own included.
        scale: multiplies the scores.
        key_exists: `[B, P + T]`, which of the keys are real; None means all. Each query's own must be.
        columns: keys `[B, M, K, D]`, values `[B, M, K, V]` and visibility `[B or 1, T, M]` of exact columns.
        softcap: scores become `softcap * tanh(scores / softcap)`.

    Returns:
        outputs `[B, T, H, V]` and the log of the softmax's denominator `[B, T, H]`, both float32 (or float64).
    """
    batch, tokens, heads, width = q.shape
    key_value_heads, past = k.shape[2], k.shape[1] - tokens
    if 0 < past < window - 1:
        raise ValueError(f"{past} earlier tokens were given; a window of {window} needs none or {window - 1}")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(dtype) for x in (q, k, v))
    q = q.reshape(batch, tokens, key_value_heads, heads // key_value_heads, width) * scale

    block = max(window, _NARROWEST_BLOCK)
    if tokens <= block:
        block, before = tokens, past
    else:
        before = window - 1  # every block sees as many keys before its first query
    if past > before:
        k, v = k[:, past - before :], v[:, past - before :]
        key_exists = key_exists[:, past - before :] if key_exists is not None else None
    elif past < before:
        key_exists = (torch.arange(before + tokens, device=q.device) >= before)[None]
        k, v = (F.pad(x, (0, 0, 0, 0, before, 0)) for x in (k, v))
    blocks = -(-tokens // block)
    fill = blocks * block - tokens
    if fill:
        q = F.pad(q, (0, 0) * 3 + (0, fill))
        k, v = (F.pad(x, (0, 0, 0, 0, 0, fill)) for x in (k, v))

    q = q.reshape(batch, blocks, block, *q.shape[2:]).permute(0, 1, 3, 4, 2, 5)  # [B, N, K, G, C, D]
    k, v = (x.unfold(1, before + block, block) for x in (k, v))  # [B, N, K, D, before + C]
    scores = _cap(q @ k.unsqueeze(3), softcap)
    scores = scores + _window_bias(scores, window, before, key_exists)
    values = v.unsqueeze(3).transpose(-1, -2)

    if columns is None:
        normaliser = scores.logsumexp(-1)
        outputs = (scores - normaliser[..., None]).exp() @ values
    else:
        column_k, column_v, visible = (
            columns[0].to(dtype).permute(0, 2, 3, 1)[:, None, :, None],  # [B, 1, K, 1, D, M]
            columns[1].to(dtype).transpose(1, 2)[:, None, :, None],  # [B, 1, K, 1, M, V]
            F.pad(columns[2], (0, 0, 0, fill)).unflatten(1, (blocks, block))[:, :, None, None],
        )
        extra = _cap(q @ column_k, softcap).masked_fill(~visible, -math.inf)
        normaliser = torch.cat([scores, extra], -1).logsumexp(-1)
        outputs = (scores - normaliser[..., None]).exp() @ values
        outputs = outputs + (extra - normaliser[..., None]).exp() @ column_v

    outputs = outputs.permute(0, 1, 4, 2, 3, 5).reshape(batch, blocks * block, heads, -1)
    normaliser = normaliser.permute(0, 1, 4, 2, 3).reshape(batch, blocks * block, heads)
    return outputs[:, :tokens], normaliser[:, :tokens]


def _cap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _window_bias(scores: Tensor, window: int, before: int, key_exists: Tensor | None) -> Tensor:
    """0 where a query may read a key of its block, -inf elsewhere; `[1 or B, 1 or N, 1, 1, C, before + C]`."""
    blocks, block, span = scores.shape[1], scores.shape[-2], scores.shape[-1]
    query = torch.arange(block, device=scores.device)[:, None] + before
    key = torch.arange(span, device=scores.device)[None]
    seen = ((key <= query) & (key > query - window))[None, None]
    if key_exists is not None:
        flags = F.pad(key_exists, (0, before + blocks * block - key_exists.shape[1]), value=True)
        seen = seen & flags.unfold(1, span, block)[:, :, None]
    bias = torch.zeros(seen.shape, dtype=scores.dtype, device=scores.device).masked_fill(~seen, -math.inf)
    return bias[:, :, None, None]
