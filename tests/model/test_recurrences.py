"""Every recurrence against the equation of its paper, and its forms against each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linearize.families.base import AttentionLayer
from linearize.model import MixerConfig
from linearize.model.recurrences import RECURRENCES, Recurrence, build_recurrence
from tests.model.equations import EQUATIONS, GATE_WIDTH, WITHOUT_MASS, Token, features, pooled, sigmoid
from tests.tables import in_turn

WIDTH, HEADS, DEPTH = 8, 2, 0.5
FORMS = ("parallel", "chunkwise", "recurrent")
PLAIN = {"normalize": False, "feature_map": "identity"}
CASES = {
    **{name: {"recurrence": name} for name in RECURRENCES},
    "gla, identity": {"recurrence": "gla", "gate_source": "q", "gate_divisor": 16.0, **PLAIN},
    "gla, elu": {"recurrence": "gla", "feature_map": "elu", "gate_source": "v"},
    "gla, learned": {"recurrence": "gla", "feature_map": "learned", "gate_source": "random", "qk_norm": True},
    "hgrn2, bounded": {"recurrence": "hgrn2", "feature_map": "exp", "lower_bound": 0.9, "gate_divisor": 4.0},
    "gsa, 3 slots": {"recurrence": "gsa", "slots": 3, "gate_divisor": 16.0, **PLAIN},
    "gsa, 16 slots": {"recurrence": "gsa", "slots": 16, "feature_map": "exp", "gate_source": "random"},
    "gsa, 1 slot": {"recurrence": "gsa", "slots": 1, "feature_map": "elu"},
    "gated retention, fixed gate": {"recurrence": "gated_retention", "gate_learned": False, "gate_divisor": 8.0},
    "mamba2, random": {"recurrence": "mamba2", "gate_source": "random", "gate_divisor": 2.0},
    "mlstm, identity": {"recurrence": "mlstm", **PLAIN},
    "rwkv6, wide": {"recurrence": "rwkv6", "feature_map": "learned", "gate_divisor": 2.0},
    "rwkv7, wide": {"recurrence": "rwkv7", "feature_map": "exp", "qk_norm": True},
    "rwkv7, identity": {"recurrence": "rwkv7", **PLAIN},
    "gated deltanet, reflecting": {"recurrence": "gated_deltanet", "negative_eigenvalues": True, **PLAIN},
    "kda, reflecting": {"recurrence": "kda", "negative_eigenvalues": True, "gate_source": "q", **PLAIN},
    "kda, wide": {"recurrence": "kda", "feature_map": "exp", "gate_source": "random"},
    "gateloop, wide": {"recurrence": "gateloop", "feature_map": "exp", "gate_divisor": 3.0},
    "lightnet, wide": {"recurrence": "lightnet", "feature_map": "exp", "qk_norm": True},
    "rg_lru, from values": {"recurrence": "rg_lru", "gate_source": "v", "gate_divisor": 2.0},
    "mingru, from queries": {"recurrence": "mingru", "gate_source": "q", "gate_divisor": 4.0},
}


def built(case: str, group: int, *, strength: float = 0.0) -> Recurrence:
    """The recurrence in float64, its parameters far from where they start; `strength` makes some gates shut and some
    open to the last digit."""
    elementwise = CASES[case]["recurrence"] in ("rg_lru", "mingru")
    layer = AttentionLayer(group * HEADS, HEADS, WIDTH, WIDTH if elementwise else WIDTH + 3, scale=1.0)
    if CASES[case].get("gate_source") == "v" and not elementwise:
        layer = AttentionLayer(group * HEADS, HEADS, WIDTH, WIDTH, scale=1.0)
    recurrence = build_recurrence(MixerConfig(layers=[0], **CASES[case]), layer, DEPTH)
    recurrence = recurrence.double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in recurrence.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.7 * noise + (parameter.data if name == "decay" else 0.3)
        if strength and name in ("gate_scale", "input_scale"):
            parameter.data *= strength
    return recurrence


def inputs(recurrence: Recurrence, tokens: int) -> tuple[list[Tensor], Tensor]:
    """float64 queries, keys, values and sources of gates for three rows; and which tokens write: in the first row all,
    in the second none at either end nor in the middle, in the third none of the first half."""
    generator, layer = torch.Generator().manual_seed(2), recurrence.layer

    def normal(heads: int, width: int) -> Tensor:
        return torch.randn(3, tokens, heads, width, dtype=torch.float64, generator=generator)

    q, k, v = normal(layer.query_heads, WIDTH), normal(HEADS, WIDTH), normal(HEADS, layer.value_width)
    grouped = q.unflatten(2, (HEADS, -1)).mean(3)
    source = {"q": grouped, "v": v}.get(recurrence.config.gate_source, k).clone()
    writes = torch.ones(3, tokens, dtype=torch.bool)
    writes[1, [0, tokens // 2, -1]] = False
    writes[1, :: max(tokens // 7, 2)] = False
    writes[2, : (tokens + 1) // 2] = False
    return [q, k, v, source], writes


def equation(recurrence: Recurrence, arguments: list[Tensor], writes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What the paper's equation reads (numerator and mass side by side) and ends with, from an empty state."""
    config, name = recurrence.config, recurrence.config.recurrence
    p, (q, k, v, source) = dict(recurrence.named_parameters()), arguments
    steps, rows, dtype = EQUATIONS[name], len(q), q.dtype
    gates = config.slots or WIDTH if name == "gsa" else GATE_WIDTH.get(name, WIDTH)
    wide = WIDTH * (2 if config.feature_map in ("exp", "learned") else 1)
    columns = v.shape[-1] + (name == "mlstm" or name not in WITHOUT_MASS)
    shapes = {
        "gsa": {"keys": (gates, wide), "values": (gates, columns)},
        "lightnet": {"sum": (WIDTH,), "values": (WIDTH, columns)},
        "mingru": {"state": (WIDTH,)},
        "rg_lru": {"state": (WIDTH,)},
    }.get(name, {"state": (wide, columns)})
    number = torch.complex(q, q).dtype if name == "gateloop" else dtype
    state = {part: torch.zeros(rows, HEADS, *shape, dtype=number) for part, shape in shapes.items()}
    outputs = []
    for t in range(q.shape[1]):
        token = Token(v=v[:, t], source=source[:, t], q_raw=q[:, t].unflatten(1, (HEADS, -1)), p=p)
        token.divisor, token.bound = config.gate_divisor, config.lower_bound * DEPTH
        token.most_write = 2 if config.negative_eigenvalues else 1
        token.q, token.k = features(token.q_raw, config, p), features(k[:, t, :, None], config, p)[:, :, 0]
        if gates:
            x = source[:, t]
            x = torch.einsum("rkd,kde->rke", x, p["gate_projection"]) if config.gate_source == "random" else x
            fixed = recurrence.gate_start
            scale, bias = (p["gate_scale"], p["gate_bias"]) if config.gate_learned else fixed
            token.x = scale * pooled(x, gates) + bias
            token.g = sigmoid(token.x) ** (1 / config.gate_divisor)
        wrote = writes[:, t, None, None, None]
        new = steps.update(token, state)
        after = {n: torch.where(writes[:, t].view(-1, *[1] * (x.dim() - 1)), x, state[n]) for n, x in new.items()}
        outputs.append(steps.read(token, state, after, wrote).flatten(1, 2))
        state = after
    return torch.stack(outputs, 1), state


def called(recurrence: Recurrence, arguments: list[Tensor], writes: Tensor | None, state=None) -> Tensor:
    """What the module reads, the mass beside it where there is one."""
    outputs, mass = recurrence(*arguments, writes, state)
    assert (mass is None) == (recurrence.config.recurrence in WITHOUT_MASS)
    return outputs if mass is None else torch.cat([outputs, mass[..., None]], -1)


def as_written(recurrence: Recurrence, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state in the terms of the equation."""
    match recurrence.config.recurrence:
        case "mlstm":
            return {"state": state["state"] * state["log_scale"].exp()[..., None]}
        case "lightnet":
            total = state["log_sum"].exp() * state["started"][:, None, None]
            return {"sum": total, "values": state["state"][:, :, :WIDTH] * total[..., None]}
        case "gateloop":
            cos, sin = state["state"].chunk(2, 2)
            angle = torch.cat([state["angle"]] * (cos.shape[2] // WIDTH), -1)
            return {"state": torch.complex(cos, -sin) * torch.polar(torch.ones_like(angle), angle)[..., None]}
        case "gsa":
            return {"keys": state["keys"].transpose(-1, -2), "values": state["values"]}
        case "mingru" | "rg_lru":
            return {"state": state["state"][:, :, 0]}
        case _:
            return state


def gradients(recurrence: Recurrence, arguments: list[Tensor], function) -> dict[str, Tensor]:
    """What `function` gives, and the gradients of a fixed functional of it for inputs and parameters."""
    leaves = [x.detach().clone().requires_grad_() for x in arguments]
    outputs = function(leaves)
    names, parameters = zip(*recurrence.named_parameters(), strict=True) if list(recurrence.parameters()) else ((), ())
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    found = torch.autograd.grad((outputs * weights).sum(), [*leaves, *parameters], allow_unused=True)
    kept = {"outputs": outputs.detach(), **dict(zip(("q", "k", "v", "source", *names), found, strict=True))}
    return {name: x.double() for name, x in kept.items() if x is not None}


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to b, or to 0.01 where b is smaller (some gradients are 0 but for rounding)."""
    assert bool(a.isfinite().all())
    return float((a - b).norm() / b.norm().clamp_min(0.01))


@pytest.mark.parametrize(("case", "sizes"), in_turn(list(CASES), [(1, 3), (17, 1), (70, 3)]))
def test_outputs_and_gradients_are_the_equations(case, sizes):
    tokens, group = sizes
    recurrence = built(case, group)
    arguments, writes = inputs(recurrence, tokens)
    expected = gradients(recurrence, arguments, lambda leaves: equation(recurrence, leaves, writes)[0])
    for form in FORMS:
        recurrence.form = form
        ours = gradients(recurrence, arguments, lambda leaves: called(recurrence, leaves, writes))
        for name, value in expected.items():
            assert distance(ours[name], value) < 1e-9, (form, name)


@torch.no_grad()
@pytest.mark.parametrize(("case", "form"), in_turn(list(CASES), [None, *FORMS]))
def test_a_state_is_continued(case, form):
    recurrence = built(case, 3)
    recurrence.form = form
    arguments, writes = inputs(recurrence, 40)
    state = {name: x.double() for name, x in recurrence.state(3, torch.device("cpu")).items()}
    expected, final = equation(recurrence, arguments, writes)
    pieces = []
    for piece in (slice(0, 1), slice(1, 18), slice(18, 19), slice(19, 40)):
        pieces.append(called(recurrence, [x[:, piece] for x in arguments], writes[:, piece], state))
    assert distance(torch.cat(pieces, 1), expected) < 1e-10
    for name, value in as_written(recurrence, state).items():
        assert float((value - final[name]).abs().max()) < 1e-9 * float(final[name].abs().max()), name


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_no_mask_is_one_of_all_tokens(case):
    recurrence = built(case, 3)
    arguments, writes = inputs(recurrence, 9)
    whole = called(recurrence, arguments, torch.ones_like(writes))
    torch.testing.assert_close(called(recurrence, arguments, None), whole)


@pytest.mark.parametrize(("case", "strength"), in_turn(list(CASES), [0.0, 40.0]))
def test_float32_is_no_worse_than_twice_plain_torch(case, strength):
    recurrence = built(case, 3, strength=strength)
    arguments, writes = inputs(recurrence, 70)
    exact = gradients(recurrence, arguments, lambda leaves: equation(recurrence, leaves, writes)[0])
    tolerance = 1e-5 if case.startswith("rg_lru") else 1e-9  # see test_rg_lru_admits_nothing_where_it_keeps_all
    for form in FORMS:
        recurrence.form = form
        ours = gradients(recurrence, arguments, lambda leaves: called(recurrence, leaves, writes))
        for name, value in exact.items():
            assert distance(ours[name], value) < tolerance, (form, name)

    recurrence = recurrence.float()
    arguments = [x.float() for x in arguments]
    results = []
    for form in FORMS:
        recurrence.form = form
        ours = gradients(recurrence, arguments, lambda leaves: called(recurrence, leaves, writes))
        results.append({name: distance(ours[name], value) for name, value in exact.items()})
    plain, chunked, step = results
    inputs_and_outputs = ("outputs", "q", "k", "v", "source")
    for name, ours in chunked.items():
        # A parameter's gradient adds up all tokens' rounding errors, while what they are errors of may cancel.
        slack = 1e-6 if name in inputs_and_outputs else 1e-5
        assert ours <= 2 * max(plain[name], step[name]) + slack, name


@torch.no_grad()
def test_rg_lru_admits_nothing_where_it_keeps_all():
    recurrence = built("rg_lru", 3)
    arguments, _ = inputs(recurrence, 20)
    recurrence.gate_scale.zero_()
    for bias in (-20.0, -30.0, -100.0, -1000.0):
        recurrence.gate_bias.fill_(bias)
        expected = equation(recurrence, arguments, torch.ones(3, 20, dtype=torch.bool))[0]
        difference = called(recurrence, arguments, None) - expected
        assert float(difference.abs().max()) < 1e-5
    assert float(called(recurrence, arguments, None).abs().max()) == 0


def test_rwkv6_survives_gates_beyond_every_range():
    recurrence = built("rwkv6", 3).float()
    arguments, writes = inputs(recurrence, 20)
    recurrence.gate_bias.data[:, ::2] = 1000
    exact = gradients(recurrence.double(), arguments, lambda leaves: equation(recurrence, leaves, writes)[0])
    ours = gradients(recurrence.float(), [x.float() for x in arguments], lambda x: called(recurrence, x, writes))
    for name, value in exact.items():
        assert distance(ours[name], value) < 1e-5, name


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_half_precision_parameters_are_computed_in_float32(case):
    recurrence = built(case, 3).bfloat16()
    arguments, writes = inputs(recurrence, 20)
    halves = [x.bfloat16() for x in arguments]
    ours = called(recurrence, halves, writes)
    assert ours.dtype == torch.float32
    expected = equation(recurrence.double(), [x.double() for x in halves], writes)[0]
    assert distance(ours.double(), expected) < 1e-2


def test_a_mass_that_could_be_negative_is_refused():
    layer = AttentionLayer(2, 2, WIDTH, WIDTH, scale=1.0)
    for options, named in (({}, "normalize: true"), ({"normalize": False, "mix": "softmax"}, "mix: softmax")):
        config = MixerConfig(layers=[0], feature_map="identity", **options)
        with pytest.raises(ValueError, match=named):
            build_recurrence(config, layer)


def test_every_recurrence_has_an_equation():
    assert EQUATIONS.keys() == RECURRENCES.keys()


def test_gates_from_values_of_another_width_are_refused():
    layer = AttentionLayer(query_heads=2, key_value_heads=2, key_width=8, value_width=12, scale=1.0)
    with pytest.raises(ValueError, match="as wide as keys"):
        build_recurrence(MixerConfig(layers=[0], gate_source="v"), layer)
