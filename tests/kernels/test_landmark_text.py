"""The kernels that choose and read for a whole text with landmarks, against plain torch. See `test_step.py`."""

from __future__ import annotations

import pytest
import torch
from linearize_kernels.codes import rounded

from linearize.families.base import Projections
from linearize.model.configuration import BLOCK
from linearize.model.landmarks import exact
from linearize.model.landmarks.rows import lay_out
from linearize.model.landmarks.text import text_of
from linearize.model.landmarks.training import whole_rows
from linearize.model.memory import LayerMemory
from linearize.model.mixer.fused import refusal
from linearize.model.precision import decoded, slot_bits
from tests.kernels.test_step import (
    DEVICE,
    assert_no_worse_than_twice_plain_torch,
    make_layer,
    make_mixer,
    pytestmark,
    tokens_of,
)

__all__ = ["pytestmark"]

WINDOW, SINKS, SLOTS = 5, 2, 40
# Tokens of each call, and those that are real in two rows; the second call begins with slots filled, the third with
# rows of different lengths.
CALLS = ((75, None), (70, (70, 6)), (34, (1, 34)))
KINDS = {
    "model's dtype, novelty": ({"group": 3}, {}),
    "learned, window of one block, empty slots, softcap": (
        {"group": 1, "softcap": 2.0},
        {"landmark_score": "learned", "window": 33, "landmarks": 70},
    ),
    "8 bits, no sinks": ({"group": 4, "values": 6}, {"memory_dtype": "int8", "sinks": 0}),
    "8 bits, sinks": ({"group": 2}, {"memory_dtype": "int8"}),
    "4 bits, learned": ({"group": 2, "width": 32}, {"memory_dtype": "int4", "landmark_score": "learned"}),
    "4 bits, coded by kernels": (
        {"group": 2, "heads": 2, "width": 128, "values": 64},
        {"memory_dtype": "int4", "landmark_score": "learned"},
    ),
    "beside a recurrence": ({"group": 2}, {"recurrence": "gla", "mix": "softmax", "rope": True}),
}


def mixer_of(kind: str):
    shape, options = KINDS[kind]
    layer = make_layer(**{"heads": 1, "width": 12, "values": 10, **shape})
    fixed = {"window": WINDOW, "sinks": SINKS, "landmarks": SLOTS, "recurrence": "none"}
    return layer, make_mixer(layer, **fixed | options)


@torch.no_grad()
def read(mixer, new: Projections, *, fused: bool) -> dict[str, torch.Tensor]:
    """Outputs and memory after `CALLS`; tokens that are not real are left out."""
    memory, outputs, start = LayerMemory(mixer.parts(2, new.q.dtype, DEVICE), 2, DEVICE), [], 0
    for count, real in CALLS:
        lengths = None if real is None else torch.tensor(real, device=DEVICE)
        mixed = mixer(Projections(*(x[:, start : start + count] for x in new)), lengths, memory, fused=fused)
        memory.advance(count, lengths)
        assert bool(mixed.isfinite().all())
        outputs.append(mixed.flatten(0, 1) if real is None else mixed[torch.arange(count) < lengths.cpu()[:, None]])
        start += count
    return {"outputs": torch.cat(outputs).double(), **{name: x.double().clone() for name, x in memory.tensors()}}


@pytest.mark.parametrize("kind", KINDS)
def test_calls_equal_plain_torch(kind):
    layer, mixer = mixer_of(kind)
    new = tokens_of(layer, 2, sum(count for count, _ in CALLS), torch.float32)
    wide = Projections(*(x.double() for x in new))
    ways = (wide, False), (new, False), (new, True)
    assert_no_worse_than_twice_plain_torch([read(mixer, given, fused=fused) for given, fused in ways])


@pytest.mark.parametrize("kind", ["8 bits, sinks", "4 bits, coded by kernels"])
def test_the_pool_is_what_codes_stand_for(kind):
    """After two calls, so old tokens are decoded and new ones rounded; codes are those of plain torch."""
    from linearize_kernels.landmark_pool_triton import launch_landmark_pool

    layer, mixer = mixer_of(kind)
    bits, count, more = slot_bits(mixer.config), 75, 70
    new = tokens_of(layer, 1, count + more, torch.float32)
    with torch.no_grad():
        memory = LayerMemory(mixer.parts(1, torch.float32, DEVICE), 1, DEVICE)
        mixer(Projections(*(x[:, :count] for x in new)), None, memory, fused=True)
        memory.advance(count, None)
        rows = lay_out(mixer, Projections(*(x[:, count:] for x in new)), None, memory)
        text = text_of(mixer, rows, rows.places)
        fresh = (x[:, count:] for x in (new.k_rotated, new.v, new.k))
        own = mixer._parameters
        given = {"key_scale": own.get("key_scale"), "key_shift": own.get("key_shift")}
        pool = launch_landmark_pool(text, memory.parts, *fresh, **given, learned=False)
    seen = rows.merged * BLOCK + SINKS  # tokens before the first of the text
    for name, ours in (("k_rotated", pool.keys), ("v", pool.values)):
        wide = getattr(mixer.in_code(Projections(*(x.double() for x in new))), name)
        narrow = getattr(mixer.in_code(new), name)
        exact, plain = rounded(wide, 8), rounded(narrow, 8)
        parts = [(x[:, :SINKS], x[:, seen:]) for x in (exact, plain)]
        if bits == 4:
            leaving = slice(seen, seen + text.merges * BLOCK)
            parts = [(*two, rounded(x[:, leaving], 4)) for two, x in zip(parts, (exact, plain), strict=True)]
        ours = torch.cat([ours[:, :SINKS], ours[:, SINKS + SLOTS :]], 1)
        wanted, theirs = (torch.cat(x, 1).double() for x in parts)
        assert ours.shape == wanted.shape
        assert_no_worse_than_twice_plain_torch([{name: wanted}, {name: theirs}, {name: ours.double()}])


@pytest.mark.parametrize("kind", ["8 bits, sinks", "4 bits, coded by kernels"])
def test_what_is_not_finite_stays_so(kind):
    """In sinks, slots and window: a finite number in its place would be a wrong answer instead of none."""
    layer, mixer = mixer_of(kind)
    count, broken = 45, {0: "nan", 9: "inf", 44: "nan"}  # one merge, into empty slots
    new = tokens_of(layer, 1, count, torch.float32)
    for at, value in broken.items():
        new.v[0, at, 0, 3] = float(value)
    found = []
    for fused in (False, True):
        memory = LayerMemory(mixer.parts(1, torch.float32, DEVICE), 1, DEVICE)
        with torch.no_grad():
            mixer(new, None, memory, fused=fused)
        stored = [decoded(part, torch.float32)["v"] for part in memory.parts.values() if "v" in part]
        found.append(sum(int((~x[0, :, 0].isfinite().all(-1)).sum()) for x in stored))
    assert found[0] == found[1] == len(broken)


def test_calls_shorter_than_the_sinks():
    layer, mixer = mixer_of("8 bits, sinks")
    new, found = tokens_of(layer, 2, 60, torch.float32), []
    for given, fused in ((Projections(*(x.double() for x in new)), False), (new, False), (new, True)):
        memory, start = LayerMemory(mixer.parts(2, given.q.dtype, DEVICE), 2, DEVICE), 0
        for count, real in ((2, (2, 1)), (2, None), (56, (40, 56))):
            lengths = None if real is None else torch.tensor(real, device=DEVICE)
            with torch.no_grad():
                mixer(Projections(*(x[:, start : start + count] for x in given)), lengths, memory, fused=fused)
            memory.advance(count, lengths)
            start += count
        found.append({name: x.double() for name, x in memory.tensors()})
    assert_no_worse_than_twice_plain_torch(found)


@pytest.mark.parametrize("tokens", [1, SINKS + WINDOW, 140])
def test_a_text_without_a_memory_in_half_precision(tokens):
    """The products' operands are those of float16, and so are the pieces of wider keys and values."""
    layer, mixer = mixer_of("4 bits, learned")
    new = tokens_of(layer, 1, tokens, torch.float16)
    found = []
    for given, fused in ((Projections(*(x.double() for x in new)), False), (new, False), (new, True)):
        with torch.no_grad():
            found.append({"outputs": mixer(given, None, None, fused=fused).to(torch.float16).double()})
    assert_no_worse_than_twice_plain_torch(found)


@pytest.mark.parametrize("kind", ["4 bits, learned", "beside a recurrence"])
def test_training_chooses_by_the_kernel(kind, monkeypatch):
    layer, mixer = mixer_of(kind)
    drawn, found, launched, run = tokens_of(layer, 2, 140, torch.float32), [], [], exact.attend

    def counting(*given, fused: bool, **named):
        launched.append(fused)
        return run(*given, fused=fused, **named)

    monkeypatch.setattr("linearize.model.landmarks.training.attend", counting)
    for dtype, fused in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        new = Projections(*(x.to(dtype, copy=True).requires_grad_() for x in drawn))
        y = whole_rows(mixer, mixer._as_stored(new, None), fused=fused)
        gradients = torch.autograd.grad(y.sin().sum(), new, allow_unused=True)
        named = zip(new._fields, gradients, strict=True)
        found.append({"y": y.detach().double(), **{name: x.double() for name, x in named if x is not None}})
    assert_no_worse_than_twice_plain_torch(found)
    assert launched == [False, False, True]


def test_a_text_takes_two_launches(monkeypatch):
    from linearize_kernels import landmark_text_triton

    grids = []

    class Counting:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            grids.append(grid)
            return self.kernel[grid]

    for name in ("landmark_choose_kernel", "landmark_read_kernel"):
        monkeypatch.setattr(landmark_text_triton, name, Counting(getattr(landmark_text_triton, name)))
    layer, mixer = mixer_of("model's dtype, novelty")
    with torch.no_grad():
        mixer(tokens_of(layer, 1, 140, torch.float32), None, None, fused=True)
    assert grids == [(1, 1), (6, 1, 2)]


def test_what_the_kernels_do_not_know_is_refused():
    layer, mixer = mixer_of("beside a recurrence")
    assert refusal("slots", mixer.config, layer) is None and refusal("step", mixer.config, layer)
    assert "width 512" in str(refusal("slots", mixer.config, make_layer(width=512)))
