"""Softmax attention over the whole past, for layers and heads that conversion keeps.

y_t = Σ_s p_ts v_s ,   p_t = softmax over all s <= t of  scale · q_t·k_s
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# With a softcap the scores are a matrix in memory; blocks of queries keep it small.
_QUERY_BLOCK = 512


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, *, first: Tensor | int = 0, scale: float, softcap: float | None = None
) -> Tensor:
    """Causal attention of T queries to N keys.

    Args:
        q: `[B, T, H, D]`, positions already encoded.
        k, v: `[B, N, K, D]` and `[B, N, K, V]`, oldest first; keys after a query's own are not read.
        first: index of the first query among the keys: a number, or `[B]` per row.
        scale: multiplies the scores.
        softcap: scores become `softcap * tanh(scores / softcap)`.

    Returns:
        `[B, T, H, V]` in the inputs' dtype.
    """
    tokens, span = q.shape[1], k.shape[1]
    whole = isinstance(first, int) and first == 0 and span == tokens
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    visible = None
    if not whole:
        query = torch.arange(tokens, device=q.device) + (first if isinstance(first, int) else first[:, None])
        visible = torch.arange(span, device=q.device) <= query.reshape(-1, 1, tokens, 1)
    if softcap is None:
        outputs = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=whole, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return outputs.transpose(1, 2)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    if visible is None:
        visible = torch.ones(tokens, span, dtype=torch.bool, device=q.device).tril()[None, None]
    blocks = []
    for start in range(0, tokens, _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        scores = (q[:, :, rows] @ k.transpose(-1, -2)).float() * scale
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~visible[:, :, rows], -math.inf)
        blocks.append(scores.softmax(-1).to(v.dtype) @ v)
    return torch.cat(blocks, 2).transpose(1, 2)
