"""Products by oneDNN: the same function as torch's own, with its gradients, where they are taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from linearize_kernels import products
from linearize_kernels.products import Linear, leave_products, product, take_products
from torch import nn

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no such products"
)


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """On any processor, and for small products."""
    calls = []
    onednn = products._onednn
    monkeypatch.setenv("LINEARIZE_KERNELS", "torch")  # one row goes to a C function
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_WORK", 0)
    monkeypatch.setattr(products, "_onednn", lambda *operands: calls.append(operands) or onednn(*operands))
    return calls


@pytest.mark.parametrize("shape", [(576,), (1, 576), (1, 1, 576), (3, 40, 576), (0, 576)])
@pytest.mark.parametrize("bias", [False, True])
def test_as_exact_as_torch(taken, shape, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(96, 576)
    added = torch.randn(96) if bias else None
    exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
    got, own = product(x, weight, added), F.linear(x, weight, added)
    assert len(taken) == 1 and got.shape == exact.shape
    if x.numel():
        assert float((got - exact).norm()) <= 2 * float((own - exact).norm()) + 1e-6 * float(exact.norm())


@pytest.mark.parametrize("trained", ["x", "weight", "x,weight", "x,weight,bias", "bias"])
def test_gradients(taken, trained):
    """Each of what is trained gets torch's own gradient, and nothing else gets one; inputs may lie anyhow."""
    torch.manual_seed(0)
    names = trained.split(",")

    def run(multiply):
        torch.manual_seed(1)
        operands = {"x": torch.randn(2, 48, 7), "weight": torch.randn(32, 48), "bias": torch.randn(32)}
        for name in names:
            operands[name].requires_grad_()
        out = multiply(operands["x"].transpose(1, 2)[:, ::2], operands["weight"], operands["bias"])
        (out * torch.arange(32.0)).square().sum().backward()
        return out, {name: operand.grad for name, operand in operands.items()}

    want, wanted = run(F.linear)
    taken.clear()
    got, gradients = run(product)
    assert len(taken) == 1 + ("x" in names) + ("weight" in names)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    for name, gradient in gradients.items():
        assert (gradient is None) == (name not in names)
        if gradient is not None:
            assert float((gradient - wanted[name]).norm() / wanted[name].norm()) < 1e-5


def test_what_is_not_taken(taken, monkeypatch):
    """Other types and small products are torch's own; so are those under autocast, which are of another type."""
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(product(x.to(dtype), weight.to(dtype)), F.linear(x.to(dtype), weight.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, weight).dtype == torch.bfloat16
    assert product(x.to("meta"), weight.to("meta")).shape == (4, 8)
    monkeypatch.setattr(products, "_WORK", 10**9)
    assert torch.equal(product(x, weight), F.linear(x, weight))
    assert taken == []


def test_layers_of_a_model_take_them_and_leave_them(taken):
    class Other(nn.Linear):
        """A layer of somebody else's."""

    model = nn.Sequential(nn.Linear(8, 8), Other(8, 8), nn.ModuleList([nn.Linear(8, 4, bias=False)]))
    before = model.state_dict()
    take_products(model)
    assert [type(module) for module in (model[0], model[1], model[2][0])] == [Linear, Other, Linear]
    assert model.state_dict().keys() == before.keys()
    leave_products(model)
    assert [type(module) for module in (model[0], model[1], model[2][0])] == [nn.Linear, Other, nn.Linear]


def test_other_processors_keep_their_own(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    model = nn.Sequential(nn.Linear(8, 8))
    take_products(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(("vendor", "capability", "faster"), [
    ("AuthenticAMD", "AVX512", True),
    ("AuthenticAMD", "AVX2", False),
    ("GenuineIntel", "AVX512", False),
])  # fmt: skip
def test_which_processors(monkeypatch, vendor, capability, faster):
    monkeypatch.undo()
    monkeypatch.setattr(products, "_processor", lambda: f"processor : 0\nvendor_id : {vendor}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.onednn_is_faster.__wrapped__() is faster
