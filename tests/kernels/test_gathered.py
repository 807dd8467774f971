"""Attention to gathered tokens against a dense softmax under the mask that says the same."""

from __future__ import annotations

import math

import pytest
import torch
from linearize_kernels import gathered, gathered_attention
from torch import Tensor

ROWS, BLOCKS, SIZE, TOKENS, GROUPS, HEADS, WIDTH = 2, 5, 4, 60, 2, 6, 8
WIDTHS = [7, 9, 9, 12, 20]


def inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((ROWS, BLOCKS, SIZE, HEADS, WIDTH), (ROWS, TOKENS, GROUPS, WIDTH), (ROWS, TOKENS, GROUPS, WIDTH // 2))
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    chosen = [torch.randperm(TOKENS, generator=generator)[: WIDTHS[-1]] for _ in range(ROWS * BLOCKS * GROUPS)]
    at = torch.stack(chosen).view(ROWS, BLOCKS, GROUPS, -1)
    seen = torch.rand(BLOCKS, SIZE, WIDTHS[-1], generator=generator) > 0.3
    seen[..., 0] = True
    seen &= torch.arange(WIDTHS[-1]) < torch.tensor(WIDTHS)[:, None, None]
    return [x.requires_grad_() for x in leaves], at, seen


def dense(leaves: list[Tensor], at: Tensor, seen: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    q, k, v = leaves
    mask = torch.zeros(ROWS, BLOCKS, GROUPS, SIZE, TOKENS, dtype=torch.bool)
    mask.scatter_(4, at[:, :, :, None].expand(-1, -1, -1, SIZE, -1), seen[:, None].expand(ROWS, -1, GROUPS, -1, -1))
    mask, k, v = (x.repeat_interleave(HEADS // GROUPS, 2) for x in (mask, k, v))
    scores = torch.einsum("bnchd,bthd->bnhct", q, k) * 0.7
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -math.inf)
    y = torch.einsum("bnhct,bthd->bnchd", scores.softmax(-1), v)
    return y, scores.logsumexp(-1).transpose(2, 3)


def results(of, leaves: list[Tensor]) -> list[Tensor]:
    y, logs = of()
    found = torch.autograd.grad(y.sin().sum() + logs.square().sum(), leaves)
    return [y.detach(), logs.detach(), *found]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("at_once, slices", [(1, 8), (1, 2), (400, 8), (2**22, 8)])
def test_equals_dense_attention(softcap, at_once, slices, monkeypatch):
    monkeypatch.setattr(gathered, "_AT_ONCE", at_once)
    monkeypatch.setattr(gathered, "_SLICES", slices)
    leaves, at, seen = inputs(torch.float64)
    ours = results(lambda: gathered_attention(*leaves, at, seen, widths=WIDTHS, scale=0.7, softcap=softcap), leaves)
    for one, other in zip(ours, results(lambda: dense(leaves, at, seen, softcap), leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_no_further_from_float64_than_twice_plain_torch(dtype):
    leaves, at, seen = inputs(dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wanted = results(lambda: dense(exact, at, seen, None), exact)
    plain = results(lambda: dense([x.float() for x in leaves], at, seen, None), leaves)
    ours = results(lambda: gathered_attention(*leaves, at, seen, widths=WIDTHS, scale=0.7), leaves)
    for one, other, reference in zip(ours, plain, wanted, strict=True):
        assert one.dtype == other.dtype
        allowed = 2 * float((other.double() - reference).abs().max()) + 1e-6
        assert float((one.double() - reference).abs().max()) <= allowed


@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("blocks", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("at_once", [1, 2000, 2**22])
def test_slices_are_few_and_their_tensors_bounded(blocks, at_once, channels, monkeypatch):
    """A slice's scores and gathered keys have no more numbers than the scores of an eighth of the blocks."""
    monkeypatch.setattr(gathered, "_AT_ONCE", at_once)
    widths, queries = [min(20, 1 + block) for block in range(blocks)], 2
    q, k = torch.zeros(1, blocks, queries, 1, channels), torch.zeros(1, 20, 1, channels)
    at, seen = torch.zeros(1, blocks, 1, widths[-1], dtype=torch.int64), torch.ones(blocks, queries, widths[-1])
    slices = [one for one, _, _ in gathered._Work(q, k, k, at, seen, widths, 1.0, None).slices()]
    assert [block for one in slices for block in range(blocks)[one]] == list(range(blocks))
    eighth, most = math.ceil(blocks / gathered._SLICES), max(queries, channels)
    assert len(slices) <= math.ceil(blocks / max(1, eighth * queries // most))
    bound = max(at_once, eighth * queries * widths[-1])
    for one in slices:
        count = one.stop - one.start
        assert count == 1 or count * most * widths[one.stop - 1] <= bound


def test_what_needs_no_gradient_gets_none():
    (q, k, v), at, seen = inputs(torch.float64)
    y, _ = gathered_attention(q, k.detach(), v, at, seen, widths=WIDTHS, scale=0.7)
    y.sum().backward()
    assert k.grad is None and bool(q.grad.any()) and bool(v.grad.any())
