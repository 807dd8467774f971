"""The closed forms against float64 least squares, and against what was planted."""

from __future__ import annotations

import math

import pytest
import torch
from linearize_kernels.window import mix_outputs

from linearize.calibration.closed import Ridge, bisect, channel_weights, decay_of, mass_weights


@pytest.fixture
def drawn():
    torch.manual_seed(0)
    return [torch.randn(200, 3, 5) for _ in range(3)]


def test_channel_weights_are_least_squares(drawn):
    y, read, target = drawn
    found = channel_weights(y, read, target)
    for head in range(3):
        for channel in range(5):
            a = (read - y)[:, head, channel, None].double()
            b = (target - y)[:, head, channel, None].double()
            expected = torch.linalg.lstsq(a, b).solution
            torch.testing.assert_close(found[head, channel].double(), expected[0, 0], rtol=1e-5, atol=1e-6)


def test_a_reading_that_is_the_window_again_gets_no_weight(drawn):
    y, _, target = drawn
    assert not channel_weights(y, y, target).any()


def test_weights_of_a_mass_are_found_again():
    torch.manual_seed(0)
    tokens, heads = 300, 2
    y, read = torch.randn(2, tokens, heads, 4)
    mass, normaliser = torch.rand(tokens, heads) + 0.5, torch.randn(tokens, heads)
    planted = torch.tensor([0.02, 7.0])
    averaged = read / mass[..., None]
    log_beyond = mass.log() + planted.log()
    mixed = mix_outputs(y, normaliser, read, mass[..., None], mix="softmax", normalize=True, weight=planted)
    torch.testing.assert_close(averaged * mass[..., None], read)
    found = mass_weights(y, normaliser, read, mass, mixed, log_beyond)
    torch.testing.assert_close(found, planted, rtol=1e-5, atol=0)


def test_no_mass_is_taken_where_it_only_harms():
    torch.manual_seed(0)
    y, read = torch.randn(2, 100, 2, 4)
    mass, normaliser = torch.ones(100, 2), torch.zeros(100, 2)
    assert not mass_weights(y, normaliser, read, mass, y, torch.zeros(100, 2)).any()


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9995])
def test_a_planted_decay_is_found(decay):
    available = torch.linspace(500, 1, 500).double()
    distance = torch.arange(500).double()
    mass = (available * decay**distance).repeat(2, 1)
    assert decay_of(mass, available).exp().tolist() == pytest.approx([decay] * 2, abs=1e-6)


def test_attention_that_does_not_fade_has_no_decay():
    available = torch.ones(100).double()
    assert decay_of(torch.ones(1, 100), available).item() == pytest.approx(0, abs=1e-6)


def test_bisect():
    wanted = torch.tensor([0.25, 4.0], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(bisect(torch.square, wanted, zero, zero + 10), wanted.sqrt())


def test_ridge_is_least_squares_around_the_weight():
    torch.manual_seed(0)
    x = torch.randn(400, 6, dtype=torch.float64)
    weight, rest = torch.randn(2, 6, dtype=torch.float64), torch.randn(400, 2, dtype=torch.float64)
    ridge = Ridge(6, 2, x.device)
    for rows in (slice(0, 150), slice(150, 400)):
        ridge.add(x[rows].float(), rest[rows].float())
    strength = 0.3
    penalty = math.sqrt(strength * float(x.square().sum(0).mean()))
    padded = torch.cat([x, penalty * torch.eye(6)]), torch.cat([rest, torch.zeros(6, 2)])
    expected = torch.linalg.lstsq(*padded).solution.T
    torch.testing.assert_close(ridge.step(strength), expected, rtol=1e-5, atol=1e-6)
    exact = Ridge(6, 2, x.device)
    exact.add(x, x @ weight.T)
    torch.testing.assert_close(exact.step(1e-12), weight, rtol=1e-6, atol=1e-6)
