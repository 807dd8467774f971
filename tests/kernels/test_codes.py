"""Keys and values in 8 and 4 bits: how far codes are from what they stand for, and products with them."""

from __future__ import annotations

import pytest
import torch
from linearize_kernels.codes import decode, encode, key_scores, rounded, turned, value_sums

WIDTHS = [8, 20, 32, 64, 80, 96]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_turn_keeps_lengths_and_is_its_own_inverse(width):
    x = drawn(3, width)
    torch.testing.assert_close(turned(turned(x)), x)
    torch.testing.assert_close(turned(x).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_error_is_bounded_by_the_scale(width, bits, dtype):
    """By half a step in 8 bits; in 4 bits by the widest step, where the channel furthest from 0 has an opposite."""
    x = (10.0 ** drawn(50, 3, 1, seed=1) * drawn(50, 3, width)).to(dtype)
    held = encode(x, bits)
    error = decode(held, torch.float64) - x.double()
    if bits == 4:
        error = turned(error)
    most = {8: 0.53, 4: 1.5}[bits]
    rounding = 1e-6 * x.double().abs().amax(-1, keepdim=True)
    assert bool((error.abs() <= most * held.scale.double().abs() + rounding).all())
    assert held.codes.numel() * 8 == x.numel() * bits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_twice_is_rounding_once(bits, dtype):
    """Also of tokens that are zero, constant, tiny or huge, or lie far from zero beside their spread."""
    x = drawn(40, 64).to(dtype)
    x[0], x[1], x[2], x[3] = 0, 3, x[2] * 1e-20, x[3] * 1e20
    x[6] *= 1e-35
    x[4, 5], x[5] = 1e4, x[5] + 300
    once = rounded(x, bits)
    twice = rounded(once, bits)
    if bits == 8:
        assert torch.equal(once, twice)
        assert all(torch.equal(a, b) for a, b in zip(encode(x, 8)[:2], encode(once, 8)[:2], strict=True))
    atol = 1e-6 if dtype == torch.float32 else 1e-14
    assert bool(((once - twice).abs() <= atol * x.abs().amax(-1, keepdim=True)).all())
    assert bool(torch.isfinite(once).all())
    assert not bool(once[0].any())


@pytest.mark.parametrize(("width", "loss"), [(64, 0.0077), (128, 0.0088)])
def test_4_bits_lose_little_and_keep_products(width, loss):
    """Normally distributed channels lose this share of their squares; x times the decoded x is |x|²."""
    x = drawn(4000, width)
    found = rounded(x, 4)
    assert float((x - found).square().sum() / x.square().sum()) < loss
    torch.testing.assert_close((x * found).sum(-1), x.square().sum(-1), rtol=2**-8, atol=0)
    assert abs(float((x * found).sum() / x.square().sum()) - 1) < 2e-4


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_is_decoded_as_not_finite(bits):
    x = drawn(3, 64).float()
    x[0, 5], x[1, 5] = float("nan"), float("inf")
    found = rounded(x, bits)
    assert not bool(found[:2].isfinite().all(-1).any())
    assert bool(found[2].isfinite().all())


def test_an_outlier_costs_the_other_channels_little():
    x = drawn(200, 64)
    x[:, 7] = 30.0
    symmetric = (x / (x.abs().amax(-1, keepdim=True) / 7)).round() * (x.abs().amax(-1, keepdim=True) / 7)
    assert float((rounded(x, 4) - x).norm()) < 0.4 * float((symmetric - x).norm())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [20, 64])
def test_products_are_those_of_the_decoded_tensors(width, bits):
    q, k, shares = drawn(2, 3, 4, width), drawn(2, 9, 3, width, seed=1), drawn(2, 3, 4, 9, seed=2)
    held = encode(k, bits)
    whole = decode(held, torch.float64)
    torch.testing.assert_close(key_scores(q, held), key_scores(q, whole))
    torch.testing.assert_close(value_sums(shares, held), value_sums(shares, whole))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_gradient_passes_straight_through(bits):
    x = drawn(5, 64).float().requires_grad_()
    pull = drawn(5, 64, seed=3).float()
    assert torch.equal(torch.autograd.grad((rounded(x, bits) * pull).sum(), x)[0], pull)
    half = x.detach().bfloat16().requires_grad_()
    assert torch.autograd.grad((rounded(half, bits) * pull).sum(), half)[0].dtype == torch.bfloat16


def test_an_odd_width_has_no_4_bits():
    with pytest.raises(ValueError, match="even width"):
        encode(drawn(2, 7), 4)
