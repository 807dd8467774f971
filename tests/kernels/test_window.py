"""Windowed softmax attention against a dense softmax under the same mask."""

from __future__ import annotations

import math

import pytest
import torch
from linearize_kernels import step_attention, window_attention
from torch import Tensor

from tests.tables import pairwise, some


def dense(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, exists, columns) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    past = k.shape[1] - tokens
    query, key = torch.arange(tokens)[:, None] + past, torch.arange(past + tokens)[None]
    seen = ((key <= query) & (key > query - window)).expand(batch, -1, -1)
    if exists is not None:
        seen = seen & exists[:, None]
    if columns is not None:
        k, v = torch.cat([k, columns[0]], 1), torch.cat([v, columns[1]], 1)
        seen = torch.cat([seen, columns[2].expand(batch, -1, -1)], -1)
    group = heads // k.shape[2]
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(group, 2)) * scale
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    outputs = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v.repeat_interleave(group, 2))
    return outputs, scores.logsumexp(-1).transpose(1, 2)


@pytest.mark.parametrize(
    ("window", "tokens", "columns", "kind"),
    pairwise([1, 2, 5, 33, 64, 200], [1, 2, 31, 64, 65, 150], [0, 3], ["new", "continued"]),
)
def test_equals_dense_attention(window, tokens, columns, kind):
    generator = torch.Generator().manual_seed(window * 1000 + tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    past = window - 1 if kind == "continued" else 0
    q, k, v = normal(2, tokens, 6, 8), normal(2, past + tokens, 2, 8), normal(2, past + tokens, 2, 8)
    exists = torch.cat([torch.rand(2, past, generator=generator) > 0.5, torch.ones(2, tokens, dtype=torch.bool)], 1)
    extra = None
    if columns:
        extra = (
            normal(2, columns, 2, 8),
            normal(2, columns, 2, 8),
            torch.rand(1, tokens, columns, generator=generator) > 0.5,
        )
    ours = window_attention(q, k, v, window=window, scale=0.3, key_exists=exists if past else None, columns=extra)
    reference = dense(q, k, v, window, 0.3, exists, extra)
    torch.testing.assert_close(ours, reference)
    leaves = [q, k, v, *(extra[:2] if extra else ())]
    for a, b in zip(*(torch.autograd.grad(o.sin().sum() + n.sum(), leaves) for o, n in (ours, reference)), strict=True):
        torch.testing.assert_close(a, b)


def test_softcap_and_half_precision_inputs():
    q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
    capped, _ = window_attention(q, k, v, window=8, scale=10.0, softcap=2.0)
    free, _ = window_attention(q, k, v, window=8, scale=10.0)
    assert not torch.allclose(capped, free)
    half, _ = window_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), window=8, scale=0.25)
    full, _ = window_attention(q, k, v, window=8, scale=0.25)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.03, rtol=0.03)


def test_a_past_shorter_than_the_window_is_refused():
    q, k = torch.randn(1, 2, 2, 8), torch.randn(1, 5, 2, 8)
    with pytest.raises(ValueError, match="a window of 8 needs none or 7"):
        window_attention(q, k, k, window=8, scale=1.0)


@pytest.mark.parametrize(
    "sizes", some([(64, 0), (64, 63), (33, 0), (700, 0), (700, 699), (512, 511)], [(64, 63), (33, 0), (700, 699)])
)
def test_segments_change_nothing(sizes):
    """Without gradients a long text is taken segment by segment."""
    window, past = sizes
    generator = torch.Generator().manual_seed(window)
    tokens = 1100
    q = torch.randn(2, tokens, 4, 8, dtype=torch.float64, generator=generator)
    k, v, sinks = (
        torch.randn(2, n, 2, 8, dtype=torch.float64, generator=generator) for n in (past + tokens,) * 2 + (3,)
    )
    exists = torch.cat([torch.rand(2, past, generator=generator) > 0.5, torch.ones(2, tokens, dtype=torch.bool)], 1)
    columns = (sinks, 2 * sinks, torch.rand(1, tokens, 3, generator=generator) > 0.5)
    reference = dense(q, k, v, window, 0.3, exists, columns)
    for normaliser in (True, False):
        with torch.no_grad():
            outputs, log = window_attention(
                q, k, v, window=window, scale=0.3, key_exists=exists if past else None, columns=columns,
                normaliser=normaliser,
            )  # fmt: skip
        torch.testing.assert_close(outputs, reference[0])
        if normaliser:
            torch.testing.assert_close(log, reference[1])
        else:
            assert log is None


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_one_query_equals_the_window_that_ends_with_it(softcap):
    q = torch.randn(3, 1, 6, 8, dtype=torch.float64)
    k, v = torch.randn(3, 17, 2, 8, dtype=torch.float64), torch.randn(3, 17, 2, 5, dtype=torch.float64)
    outputs, log = window_attention(q, k, v, window=17, scale=0.3, softcap=softcap)
    order = torch.randperm(17)
    ours = step_attention(q[:, 0], k[:, order], v[:, order], scale=0.3, softcap=softcap)
    torch.testing.assert_close(ours, (outputs[:, 0], log[:, 0]))
    bare = step_attention(q[:, 0], k, v, scale=0.3, softcap=softcap, normaliser=False)
    torch.testing.assert_close(bare[0], outputs[:, 0])
    assert bare[1] is None
    half = step_attention(*(x.bfloat16() for x in (q[:, 0], k, v)), scale=0.3, softcap=softcap, normaliser=False)
    assert half[0].dtype == torch.float32
