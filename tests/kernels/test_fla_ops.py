"""The recurrences through flash-linear-attention's kernels, against the equations in float64.

Its kernels are made for GPUs: Triton's interpreter wants a few things from outside, which `interpretable` gives them.
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import sys

import pytest
import torch

from tests.kernels.test_forms import KERNELS, error, inputs, literal, run

GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
    ),
]
CASES = {"gla": (70, 10), "gla, gate per head": (70,), "gated values": (10,), "kda": (40,), "gated delta rule": (40,)}


class _Index(int):
    def to(self, _):
        return self


@pytest.fixture(scope="module", autouse=True)
def interpretable():
    """One configuration of each kernel, counters that can be converted, and functions looked up when called."""
    if GPU:
        yield
        return
    import triton.language as tl
    from linearize_kernels import fla_ops  # noqa: F401 - imports the package
    from triton.runtime.autotuner import Autotuner

    def run_first(self, *args, **kwargs):
        chosen = {name: x for name, x in self.configs[0].all_kwargs().items() if name not in kwargs}
        return self.fn.run(*args, **kwargs, **chosen)

    patch = pytest.MonkeyPatch()
    patch.setattr(Autotuner, "run", run_first)
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops"):
            counted = lambda *a: map(_Index, builtins.range(*map(int, a)))  # noqa: E731
            patch.setattr(module, "range", counted, raising=False)
            if hasattr(module, "gather"):
                patch.setattr(module, "gather", lambda *a, **k: tl.gather(*a, **k))
    yield
    patch.undo()


def adapter(name: str):
    from linearize_kernels import fla_ops

    kind = "delta_rule" if KERNELS[name].corrects else "gated_values" if name == "gated values" else "gla"
    return getattr(fla_ops, f"{kind}_fla")


@pytest.mark.parametrize(("name", "tokens"), [(name, tokens) for name, all_ in CASES.items() for tokens in all_])
def test_outputs_and_states_are_no_worse_than_twice_plain_torch(name, tokens):
    """Two query heads per key/value head, from a state."""
    kernel = KERNELS[name]
    arguments = [x[:1] for x in inputs(kernel, tokens, 0.3, group=2, heads=1)]
    reference = [x.double() for x in literal(kernel)(*arguments)]
    ours = kernel.forms[1](*(x.float() for x in arguments))
    theirs = adapter(name)(*(x.float() for x in arguments))
    for a, b in zip(error(list(theirs), reference), error(list(ours), reference), strict=True):
        assert a <= 2 * b + 1e-6


def test_gradients_reach_the_shared_heads():
    kernel = KERNELS["gla"]
    arguments = [x[:1] for x in inputs(kernel, 10, 0.3, group=2, heads=1)]
    reference = run(literal(kernel), arguments, torch.float64)
    assert max(error(run(adapter("gla"), arguments, torch.float32), reference)) < 1e-5


def test_a_pin_takes_the_adapters(monkeypatch):
    from linearize_kernels import fla_ops, gla

    arguments = [x[:1].float() for x in inputs(KERNELS["gla"], 10, 0.3, group=2, heads=1)]
    monkeypatch.setenv("LINEARIZE_KERNELS", "fla")
    expected = fla_ops.gla_fla(*arguments)[0]
    assert torch.equal(gla(*arguments)[0], expected)
    assert not torch.equal(gla(*arguments, form="chunkwise")[0], expected)


def test_hopper_with_an_old_triton_trains_one_gate_per_head_as_many(monkeypatch):
    from linearize_kernels import fla_ops

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    class Queries:
        device = torch.device("cuda")

    for version, fails in (("3.3.1", False), ("3.4.0", True), ("3.7.0", True), ("3.7.1", False), ("3.9.0", False)):
        monkeypatch.setattr(fla_ops.triton, "__version__", version)
        assert fla_ops._backward_of_one_gate_fails(Queries()) is fails
    monkeypatch.setattr(fla_ops.triton, "__version__", "3.5.0")
    with torch.no_grad():
        assert not fla_ops._backward_of_one_gate_fails(Queries())
