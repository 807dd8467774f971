"""The mixer on the fused operation: what it hands over, in every way of calling it, against plain torch.

The operation has tests of its own; these are about pads, memories, gates and feature maps on their way to it.
"""

from __future__ import annotations

import pytest
import torch
from linearize_kernels import liger

from linearize.families.base import Projections
from linearize.model.layout import Layout
from linearize.model.mixer import fused
from tests.kernels.test_step import DEVICE, empty, make_layer, make_mixer, pytestmark, tokens_of

__all__ = ["pytestmark"]

SIZES = ((6, (6, 4)), (1, (1, 1)), (9, (2, 9)))
OPTIONS = {
    "default": {},
    "softmax, all": {"mix": "softmax", "covers": "all"},
    "exp, gates from queries": {"feature_map": "exp", "gate_source": "q"},
    "elu, gates from values, rope": {"feature_map": "elu", "gate_source": "v", "rope": True, "sinks": 0},
    "hgrn2": {"recurrence": "hgrn2", "lower_bound": 0.5, "mix": "fixed"},
    "mamba2, all": {"recurrence": "mamba2", "covers": "all", "normalize": False},
    "learned, random gates": {"feature_map": "learned", "gate_source": "random", "qk_norm": True},
}


@torch.no_grad()
@pytest.mark.parametrize(("name", "ragged"), [*((name, True) for name in OPTIONS), ("softmax, all", False)])
def test_texts_in_pieces_and_whole(name, ragged, monkeypatch):
    layer = make_layer(heads=1)
    mixer = make_mixer(layer, **OPTIONS[name])
    pieces = [tokens_of(layer, 2, tokens, torch.float32, seed) for seed, (tokens, _) in enumerate(SIZES)]
    found = {}
    for kernels in ("torch", "triton"):
        monkeypatch.setenv("LINEARIZE_KERNELS", kernels)
        memory, outputs = empty(mixer, 2, torch.float32), []
        for new, (tokens, lengths) in zip(pieces, SIZES, strict=True):
            given = torch.tensor(lengths, device=DEVICE) if ragged else None
            real = torch.arange(tokens, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
            outputs.append(mixer(new, given, memory)[real])
            memory.advance(tokens, given)
        outputs.append(mixer(new, given, None)[real])
        found[kernels] = {"outputs": torch.cat(outputs), **dict(memory.tensors())}
    for part, plain in found["torch"].items():
        torch.testing.assert_close(found["triton"][part], plain, rtol=1e-5, atol=1e-5, msg=part)


def test_texts_take_the_operation_and_what_it_does_not_know_does_not(monkeypatch):
    calls = []
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    monkeypatch.setattr(fused, "liger_attention", lambda *a, **k: calls.append(a) or liger.liger_attention(*a, **k))
    layer = make_layer(heads=1)
    new = tokens_of(layer, 1, 6, torch.float32)
    with torch.no_grad():
        make_mixer(layer)(new, None, None)
        assert len(calls) == 1
        for options in ({"recurrence": "kda"}, {"recurrence": "none"}):
            make_mixer(layer, **options)(new, None, None)
        exact = make_mixer(layer).double()
        exact(Projections(*(x.double() for x in new)), None, None)
        silent = make_mixer(layer)
        silent.branches_off = frozenset({"window"})
        silent(new, None, None)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["default", "exp, gates from queries"])
def test_gradients_of_texts_of_unequal_length(name, monkeypatch):
    layer = make_layer(heads=1)
    lengths = torch.tensor([9, 6], device=DEVICE)
    real = torch.arange(9, device=DEVICE) < lengths[:, None]
    found = {}
    for kernels in ("torch", "triton"):
        monkeypatch.setenv("LINEARIZE_KERNELS", kernels)
        mixer = make_mixer(layer, **OPTIONS[name])
        new = Projections(*(x.requires_grad_() for x in tokens_of(layer, 2, 9, torch.float32)))
        outputs = mixer(new, lengths, None)[real]
        (outputs * torch.linspace(-1, 1, outputs.numel(), device=DEVICE).view_as(outputs)).sum().backward()
        leaves = {**new._asdict(), **dict(mixer.named_parameters())}
        found[kernels] = {leaf: x.grad for leaf, x in leaves.items() if x.grad is not None}
    assert found["torch"].keys() == found["triton"].keys()
    for leaf, plain in found["torch"].items():
        torch.testing.assert_close(found["triton"][leaf], plain, rtol=1e-5, atol=1e-5, msg=leaf)


@pytest.mark.parametrize("name", ["default", "softmax, all", "elu, gates from values, rope"])
def test_packed_documents_where_they_lie(name, monkeypatch):
    """Documents of one token, of a window and of more, with pads before, between and after them."""
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    layer = make_layer(heads=1)
    segments = [[0, *[1] * 9, 2, 0, *[3] * 6], [*[1] * 17, 0]]
    layout = Layout(torch.tensor(segments, device=DEVICE), packed=True)
    found = {}
    for way in ("gathered", "as they lie"):
        mixer = make_mixer(layer, **OPTIONS[name])
        new = Projections(*(x.requires_grad_() for x in tokens_of(layer, 2, 18, torch.float32)))
        if way == "gathered":
            rows = Projections(*(layout.gather(x) for x in new))
            outputs = layout.scatter(mixer(rows, layout.lengths, None))
        else:
            mixed = mixer.documents(new, layout)
            outputs = layout.masked(mixed)
        (outputs * torch.linspace(-1, 1, outputs.numel(), device=DEVICE).view_as(outputs)).sum().backward()
        leaves = {**new._asdict(), **dict(mixer.named_parameters())}
        found[way] = {"outputs": outputs.detach()} | {leaf: x.grad for leaf, x in leaves.items() if x.grad is not None}
    assert found["gathered"].keys() == found["as they lie"].keys()
    for leaf, rows in found["gathered"].items():
        torch.testing.assert_close(found["as they lie"][leaf], rows, rtol=1e-5, atol=1e-5, msg=leaf)
