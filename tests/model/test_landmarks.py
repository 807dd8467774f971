"""Landmarks against a reference that goes token by token, and what they are for: what is odd in a text stays exact."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from linearize.checkpoint.sizes import state_nbytes
from linearize.families.base import AttentionLayer, Projections
from linearize.model import LayerMemory, LinearizedForCausalLM, MixerConfig
from linearize.model.landmarks import chunks
from linearize.model.landmarks.chunks import _chunk
from linearize.model.landmarks.training import whole_rows
from linearize.model.mixer.mixer import Mixer
from tests.model.test_families import build

QUERY_HEADS, HEADS, WIDTH, TOKENS = 4, 2, 8, 130
LAYER = AttentionLayer(QUERY_HEADS, HEADS, WIDTH, WIDTH, scale=WIDTH**-1.0)
CASES = {
    "state": {},
    "alone": {"recurrence": "none"},
    "no sinks, few slots": {"sinks": 0, "landmarks": 3},
    "positions in the state": {"rope": True, "window": 11},
    "a window of one": {"window": 1, "sinks": 1, "landmarks": 33},
    "int8": {"memory_dtype": "int8"},
    "int8, positions in the state": {"memory_dtype": "int8", "rope": True},
    "int4": {"memory_dtype": "int4"},
    "int4, positions in the state": {"memory_dtype": "int4", "rope": True, "window": 11},
    "int4 alone": {"memory_dtype": "int4", "recurrence": "none", "sinks": 0, "landmarks": 40},
}


def mixer_of(layer: AttentionLayer = LAYER, **changes) -> Mixer:
    config = MixerConfig(**{"layers": [0], "window": 16, "sinks": 4, "landmarks": 20, **changes})
    mixer = Mixer(config, layer).double()
    for name, parameter in mixer.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return mixer


def projections(tokens: int = TOKENS, rows: int = 1, seed: int = 0) -> Projections:
    generator = torch.Generator().manual_seed(seed)

    def drawn(heads: int) -> Tensor:
        return torch.randn(rows, tokens, heads, WIDTH, generator=generator, dtype=torch.float64)

    return Projections(drawn(QUERY_HEADS), drawn(HEADS), drawn(HEADS), drawn(QUERY_HEADS), drawn(HEADS))


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, changed):
        return changed

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def in_8_bits(x: Tensor) -> Tensor:
    scale = (x.detach().abs().amax(-1, keepdim=True) / 127).bfloat16().double()
    return _Through.apply(x, (x.detach() / scale).round() * scale)


def in_4_bits(x: Tensor) -> Tensor:
    turn = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(WIDTH)] for i in range(WIDTH)]) / WIDTH**0.5
    y = x.detach() @ turn
    most, least = y.amax(-1, keepdim=True), y.amin(-1, keepdim=True)
    scale = (torch.where(most > -1.0003 * least, most, least) / -8).bfloat16().double()
    z = y / scale
    c = (z * (21 / 16 - z**2 / 128 + 3 * z**4 / 65536)).round().clamp(-8, 7)
    level = 0.75 * c + c**3 / 256
    scale = (scale * (z * z).sum(-1, keepdim=True) / (z * level).sum(-1, keepdim=True)).bfloat16().double()
    return _Through.apply(x, (level * scale) @ turn)


def reference(mixer: Mixer, new: Projections) -> Tensor:
    """One row, one head and one token after the other, in plain loops; the state is GLA's."""
    config, group = mixer.config, QUERY_HEADS // HEADS
    window, sinks, slots, block, reach = config.window, config.sinks, config.landmarks, 32, 2
    q, k, v, q_rotated, k_rotated = (x[0] for x in new)
    own = (mixer._parameters.get(name) for name in ("key_scale", "key_shift"))
    scale, shift = (
        torch.full((), start) if x is None else x.detach() for x, start in zip(own, (1.0, 0.0), strict=True)
    )
    if config.memory_dtype != "auto":
        k_rotated, v = (in_8_bits(scale * k_rotated + shift) - shift) / scale, in_8_bits(v)
        k = in_8_bits(k) if mixer.recurrence is not None and not config.rope else k
    of_slots = k_rotated, v, k
    if config.memory_dtype == "int4":
        of_slots = (in_4_bits(scale * k_rotated + shift) - shift) / scale, in_4_bits(v), in_4_bits(k)
    outputs = torch.zeros(q.shape)
    for head in range(HEADS):
        keys, values = k_rotated[:, head], v[:, head]
        slot_keys, slot_values, slot_k = (x[:, head] for x in of_slots)
        unlike, total = [], torch.zeros(WIDTH)
        for t in range(len(q)):
            unit = (k[t, head] / k[t, head].norm()).detach()
            unlike.append(-float(unit @ total / total.norm()) if t else 0.0)
            total = total + unit
        local, slot, received = [], dict[int, float](), dict[int, float]()  # token -> its novelty in `slot`
        state, lost_any = torch.zeros(WIDTH, WIDTH + 1), False
        for t in range(len(q)):
            if len(local) >= block and local[block - 1] <= t - window:
                leaving, local = local[:block], local[block:]
                for token in leaving:
                    near = [s for s in range(token - reach, token + reach + 1) if leaving[0] <= s < t]
                    slot[token] = sum(unlike[s] for s in near) / len(near)

                def standard(score: dict[int, float]) -> dict[int, float]:
                    mean = sum(score.values()) / len(score)
                    spread = math.sqrt(sum((x - mean) ** 2 for x in score.values()) / len(score))
                    return {token: (x - mean) / spread for token, x in score.items()}

                attention = {}
                for token in slot:
                    queries = window - window // 4 + block // 2
                    for _ in range((leaving[-1] - token) // block):
                        queries = 0.8 * queries + block
                    attention[token] = math.log(received[token] / queries + 1e-5)
                novelty = standard(slot)
                attention = standard(attention)
                rank = {token: novelty[token] + max(attention[token], -1.0) for token in slot}
                order = sorted(slot, key=lambda token: rank[token], reverse=True)
                for token in sorted(order[slots:]):
                    lost_any = True
                    del slot[token]
                    del received[token]
                    if mixer.recurrence is None:
                        continue
                    key = slot_keys[token] if config.rope else slot_k[token]
                    own = mixer.recurrence
                    gate = torch.sigmoid(own.gate_scale[head] * key + own.gate_bias[head])
                    write = key.exp() / key.exp().sum()
                    state = gate[:, None] * state + write[:, None] * torch.cat([slot_values[token], torch.ones(1)])
                received = {token: x * (0.8 if token in slot else 1.0) for token, x in received.items()}
            if t >= sinks:
                local.append(t)
                received[t] = 0.0
            seen = [*range(min(sinks, t + 1)), *slot, *local]
            of = {s: (slot_keys[s], slot_values[s]) if s in slot else (keys[s], values[s]) for s in seen}
            for index in range(head * group, (head + 1) * group):
                weights = torch.stack([(q_rotated[t, index] @ of[s][0] * mixer.layer.scale).exp() for s in seen])
                weights = weights / weights.sum()
                y = sum(weight * of[s][1] for weight, s in zip(weights, seen, strict=True))
                for weight, s in zip(weights, seen, strict=True):
                    if s in slot or (s in local and t - s >= window // 4):
                        received[s] += float(weight.detach())
                if mixer.recurrence is not None and lost_any:
                    query = q_rotated[t, index] if config.rope else q[t, index]
                    read = (query.exp() / query.exp().sum()) @ state
                    y = y + mixer.mix_weight[index] * (read[:-1] / read[-1] - y)
                outputs[t, index] = y
    return outputs[None]


@pytest.fixture(autouse=True)
def _in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case):
    mixer, new = mixer_of(**CASES[case]), projections()
    wanted = reference(mixer, new)
    torch.testing.assert_close(mixer(new, None, None), wanted, rtol=0, atol=1e-5)
    memory = LayerMemory(mixer.parts(1, torch.float64, torch.device("cpu")), 1, torch.device("cpu"))
    for start, stop in itertools.pairwise((0, 2, 40, 41, 42, 110, *range(111, TOKENS + 1))):
        piece = mixer(Projections(*(x[:, start:stop] for x in new)), None, memory)
        memory.advance(stop - start, None)
        torch.testing.assert_close(piece, wanted[:, start:stop], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["state", "positions in the state", "int8", "int4, positions in the state"])
def test_gradients_are_those_of_the_reference(case):
    mixer = mixer_of(**CASES[case])
    names, tokens = [name for name, _ in mixer.named_parameters()], 65

    def gradients(run) -> list[Tensor]:
        new = Projections(*(x.requires_grad_() for x in projections(tokens)))
        given = [*new, *mixer.parameters()]
        pull = torch.randn(1, tokens, QUERY_HEADS, WIDTH, generator=torch.Generator().manual_seed(3))
        return torch.autograd.grad((run(new) * pull).sum(), given, allow_unused=True)

    ours, theirs = gradients(lambda new: mixer(new, None, None)), gradients(lambda new: reference(mixer, new))
    for name, one, other in zip(["q", "k", "v", "q_rotated", "k_rotated", *names], ours, theirs, strict=True):
        if other is None:
            assert one is None or not bool(one.any()), name
            continue
        assert float(other.abs().max()) > 0, name
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * float(other.abs().max()), msg=name)


TRAINED = CASES | {
    "delta rule": {"recurrence": "gated_deltanet", "rope": True},
    "slots": {"recurrence": "gsa"},
    "softmax mix": {"mix": "softmax", "rope": True, "landmarks": 64},
    "gates from queries": {"gate_source": "q"},
    "gates from values": {"gate_source": "v"},
    "int4, gates from queries": {"memory_dtype": "int4", "gate_source": "q"},
}


@pytest.mark.parametrize("off", [frozenset(), frozenset({"window"}), frozenset({"recurrence"})])
@pytest.mark.parametrize("tokens", [40, 64, 131, 400])
@pytest.mark.parametrize("case", TRAINED)
def test_whole_rows_are_the_same_with_and_without_gradients(case, tokens, off):
    """Outputs and gradients of what is trained on against those of the sequence of merges that decoding follows."""
    mixer = mixer_of(replace(LAYER, softcap=3.0) if case == "slots" else LAYER, **TRAINED[case])
    mixer.branches_off = off
    new = Projections(*(x.requires_grad_() for x in projections(tokens, rows=2)))
    given = [*new, *mixer.parameters()]
    pull = torch.randn(2, tokens, QUERY_HEADS, WIDTH, generator=torch.Generator().manual_seed(3))

    def results(output: Tensor) -> list[Tensor]:
        pulled = (output * pull).sum() + 0.0 * new.q.sum()  # what says nothing has gradients, too: none
        found = torch.autograd.grad(pulled, given, allow_unused=True, materialize_grads=True)
        return [output, *found]

    whole = results(whole_rows(mixer, mixer._as_stored(new, None)))
    chunk = results(_chunk(mixer, mixer._as_stored(new, None), None, None, fused=False))
    for one, other in zip(whole, chunk, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max().clamp_min(1)))
    with torch.no_grad():
        stored = mixer._as_stored(new, None)
        torch.testing.assert_close(mixer(new, None, None), whole_rows(mixer, stored), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("case", ["state", "no sinks, few slots", "int8", "int4 alone"])
def test_a_memory_that_must_stay_where_it_is(case, ragged):
    """Its parts cannot become views of joint tensors, so a step writes into both, as in vLLM's pages."""
    mixer, new = mixer_of(**CASES[case]), projections(rows=2)
    wanted = mixer(new, None, None)
    pages, cpu = mixer.parts(2, torch.float64, torch.device("cpu")), torch.device("cpu")
    for start, stop in itertools.pairwise((0, 50, *range(51, TOKENS + 1))):
        memory = LayerMemory({name: dict(part) for name, part in pages.items()}, 2, cpu)
        memory.counts, memory.seen, memory.ragged, memory.stays = torch.full((2,), start), start, ragged, True
        lengths = torch.full((2,), stop - start) if ragged else None
        piece = mixer(Projections(*(x[:, start:stop] for x in new)), lengths, memory)
        torch.testing.assert_close(piece, wanted[:, start:stop], rtol=0, atol=1e-9)


def test_training_takes_whole_rows(monkeypatch):
    called = []
    monkeypatch.setattr(chunks, "whole_rows", lambda *_, **__: called.append(True))
    new = projections(100)
    mixer = mixer_of()
    with torch.no_grad():
        mixer(new, None, None)
    mixer(new, None, None)  # the mixer's parameters alone: nothing goes back through slots
    assert not called
    mixer(new._replace(v=new.v.requires_grad_()), None, None)
    assert called


@torch.no_grad()
def test_what_is_unlike_the_text_is_kept():
    """All keys are much alike but those of a few tokens, which a query finds long after they left the window."""
    layer = AttentionLayer(1, 1, WIDTH, WIDTH, scale=8.0)
    tokens, needles = 600, (30, 200, 333)
    generator = torch.Generator().manual_seed(0)
    common = torch.zeros(WIDTH)
    common[0] = 1
    k = common + 0.1 * torch.randn(tokens, WIDTH, generator=generator)
    v = torch.randn(tokens, WIDTH, generator=generator)
    for place, needle in enumerate(needles):
        k[needle : needle + 4] = torch.eye(WIDTH)[2 + place]
        v[needle : needle + 4] = 100.0 * (1 + place)
    q = k.clone()
    q[-3:] = torch.eye(WIDTH)[2:5]
    shaped = [x.view(1, tokens, 1, WIDTH) for x in (q, k, v)]
    new = Projections(*shaped, shaped[0], shaped[1])

    def found(**changes) -> Tensor:
        mixer = mixer_of(layer, recurrence="none", **changes)
        return mixer(new, None, None)[0, -3:, 0, 0]

    wanted = torch.tensor([100.0, 200.0, 300.0])
    torch.testing.assert_close(found(landmarks=40), wanted, rtol=0.05, atol=0)
    assert bool((found(landmarks=0, window=16 + 31 + 40) < 50).all())  # a window of as many tokens finds none


@torch.no_grad()
def test_a_layer_never_sees_beyond_its_own_sliding_window():
    """A checkpoint of before, whose configuration has landmarks in such layers, reads none either."""
    family, slots = "mistral, sliding", 48
    sections = [MixerConfig([0, 1], recurrence="none", window=8, sinks=0, landmarks=number) for number in (slots, 0)]
    models = [LinearizedForCausalLM.from_teacher(build(family), [section]).eval().double() for section in sections]
    ids = torch.randint(5, 97, (1, 90), generator=torch.Generator().manual_seed(0))
    with_landmarks, without = (model(ids, use_cache=False).logits for model in models)
    assert torch.equal(with_landmarks, without)
    assert state_nbytes(models[0]) == state_nbytes(models[1])
    other = ids.clone()
    other[:, :50] = 5 + (other[:, :50] - 4) % 92  # beyond both layers' windows of the last tokens
    torch.testing.assert_close(models[0](other, use_cache=False).logits[:, -1], with_landmarks[:, -1])


def test_a_state_of_all_tokens_is_refused():
    with pytest.raises(ValueError, match="landmarks need covers: evicted"):
        mixer_of(covers="all")
    assert mixer_of(covers="all", recurrence="none").config.landmarks == 20
