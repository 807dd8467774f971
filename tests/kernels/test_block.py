"""The kernels of a decoder block against float64, and a model that decodes with them. See `test_step.py`."""

from __future__ import annotations

import itertools

import pytest
import torch
from linearize_kernels.block import HeadNorms, Norm, activated, residual_norm, turned_heads

from linearize.generation.blocks import Blocks, blocks_of
from linearize.generation.engine import Engine
from linearize.generation.sampling import Sampling
from tests.kernels.test_step import DEVICE, GPU, pytestmark
from tests.model.test_families import convert

__all__ = ["pytestmark"]

# The interpreter cuts bfloat16 off instead of rounding it.
DTYPES = (torch.float32, torch.bfloat16 if GPU else torch.float16)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def in_dtype(value, dtype):
    """Tensors, and those of norms and tuples, in a dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value.clone()
    if isinstance(value, Norm):
        return Norm(value.kind, *(in_dtype(x, dtype) for x in (value.weight, value.eps, value.bias, value.offset)))
    if isinstance(value, HeadNorms):
        return HeadNorms(*(in_dtype(x, dtype) for x in value))
    return tuple(in_dtype(x, dtype) for x in value) if isinstance(value, tuple) else value


def no_worse_than_twice_plain_torch(run, dtype: torch.dtype, *given, **options) -> None:
    """`run` on operands of `dtype`: the kernel against plain torch, both against plain torch in float64."""
    stored = in_dtype(given, dtype)
    exact = run(*in_dtype(stored, torch.float64), **options, fused=False)
    plain, ours = (run(*in_dtype(stored, dtype), **options, fused=fused) for fused in (False, True))
    for reference, one, other in zip(exact, plain, ours, strict=True):
        if reference is None:
            continue
        assert other.dtype == one.dtype and other.shape == one.shape
        largest = float(reference.abs().max())
        theirs, own = (float((x.double() - reference.double()).abs().max()) / largest for x in (one, other))
        assert own <= 2 * theirs + 1e-6


NORMS = {
    "rms": Norm("rms", drawn(48, seed=5), 1e-3),
    "rms of one": Norm("rms", drawn(48, seed=6), 1e-6, offset=1.0),
    "layer": Norm("layer", drawn(48, seed=7), 1e-5, drawn(48, seed=8)),
    "bare layer": Norm("layer", None, 1e-5),
    "none": None,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("after", "before"), [("none", "rms"), ("rms of one", "layer"), ("bare layer", "none")])
def test_norms_and_residuals(after, before, dtype):
    def run(x, delta, after, before, **options):
        return residual_norm(x, delta, after=after, before=before, **options)

    given = drawn(3, 48), drawn(3, 48, seed=1), NORMS[after], NORMS[before]
    no_worse_than_twice_plain_torch(run, dtype, *given, factor=0.7)
    no_worse_than_twice_plain_torch(run, dtype, given[0], None, *given[2:], copies=True)


def test_a_residual_is_copied_on_demand_alone():
    x = drawn(2, 48)
    assert residual_norm(x, None, before=NORMS["rms"], fused=True)[0] is x
    copied, _ = residual_norm(x, None, before=NORMS["rms"], copies=True, fused=True)
    assert copied is not x and torch.equal(copied, x)


def head_norms(kind: str, width: int) -> HeadNorms | None:
    if kind == "none":
        return None
    sizes = (4 * width, 2 * width) if kind in ("wide", "by head") else (width, width)
    weights = (drawn(size, seed=9) for size in sizes)
    q, k = (Norm("layer" if kind == "by head" else "rms", w, 1e-5, offset=float(kind == "of one")) for w in weights)
    return HeadNorms(q, k, kind == "wide")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("norms", "biased", "turn", "turning"),
    [
        ("none", False, "halves", 12),
        ("none", True, "pairs", 12),
        ("of one", False, "halves", 6),
        ("wide", True, "halves", 12),
        ("by head", False, "pairs of halves", 8),
        ("of one", True, None, 0),
    ],
)
def test_heads(norms, biased, turn, turning, dtype):
    width = 12
    projected = drawn(2, 4, width, seed=1), drawn(2, 2, width, seed=2), drawn(2, 2, 10, seed=3)
    biases = tuple(drawn(size, seed=4) for size in (4 * width, 2 * width, 20)) if biased else None
    angles = drawn(2, 1, max(turning // 2, 1), seed=2)
    angles = angles.repeat_interleave(2, -1) if turn == "pairs" else torch.cat([angles, angles], -1)
    table = None if turn is None else (angles.cos(), angles.sin())
    counts, lengths = torch.tensor([5, 7], device=DEVICE), torch.tensor([1, 0], device=DEVICE)

    def run(projected, biases, norms, table, counts, **options):
        heads = turned_heads(projected, biases, norms, table, turn or "halves", counts, lengths, **options)
        return *heads, counts

    given = projected, biases, head_norms(norms, width), table, counts
    no_worse_than_twice_plain_torch(run, dtype, *given)
    *heads, counted = run(*in_dtype(given, dtype), fused=True)
    assert heads[-1].tolist() == [5, 7] and counted.tolist() == [6, 7]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("activation", "gated"), [("silu", True), ("gelu", False), ("gelu_tanh", True), ("relu", True)]
)
def test_activations(activation, gated, dtype):
    def run(x, **options):
        return (activated(x, activation, gated=gated, **options),)

    no_worse_than_twice_plain_torch(run, dtype, 3 * drawn(2, 40))


@pytest.mark.parametrize("row", ["qwen3", "gemma2", "cohere"])
def test_a_model_writes_the_same_with_the_kernels(row, monkeypatch):
    """Every layer passes its trial, and a recorder that runs each step again stands for a CUDA graph."""
    model = convert(row).to(DEVICE)
    ids = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    rule = Sampling(max_new_tokens=5)
    monkeypatch.setenv("LINEARIZE_KERNELS", "torch")
    expected = Engine(model).generate(rule, ids, mask).tokens
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    blocks = blocks_of(model)
    assert blocks is not None and len(blocks.short) == 2 and not blocks.refused
    entered = list[int]()
    monkeypatch.setattr(Blocks, "__enter__", lambda self, enter=Blocks.__enter__: entered.append(1) or enter(self))
    assert torch.equal(Engine(model, lambda work: work).generate(rule, ids, mask).tokens, expected)
    assert entered
    assert all("forward" not in layer.__dict__ for layer in blocks.short)


def test_a_layer_that_differs_runs_its_own_code(monkeypatch, caplog):
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    model = convert("llama").to(DEVICE)
    first = model.model.layers[0]
    own = type(first).forward
    broken = itertools.count()
    monkeypatch.setattr(first, "forward", lambda x, **given: own(first, x, **given) + next(broken), raising=False)
    blocks = blocks_of(model)
    assert blocks is not None and first not in blocks.short and len(blocks.short) == 1
