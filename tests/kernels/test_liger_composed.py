"""The composed Liger attention against the layer's own mixer, on rows that start and rows that continue."""

from __future__ import annotations

import itertools

import pytest
import torch
from linearize_kernels.liger import liger_attention, liger_attention_composed, unsupported
from linearize_kernels.liger_options import Columns, Gate, LigerOptions
from torch import Tensor

from linearize.families.base import AttentionLayer, Projections
from linearize.model.configuration import MixerConfig
from linearize.model.memory import LayerMemory
from linearize.model.mixer.mixer import Mixer

LENGTHS = (19, 4, 31)
HEADS, GROUPS, WIDTH, VALUES, WINDOW, SINKS = 6, 2, 8, 5, 7, 3


def make_mixer(**options) -> Mixer:
    layer = AttentionLayer(
        query_heads=HEADS, key_value_heads=GROUPS, key_width=WIDTH, value_width=VALUES, scale=0.4, softcap=9.0
    )
    config = MixerConfig(layers=[0], window=WINDOW, sinks=SINKS, gate_bias=1.0, gate_scale=1.0, **options)
    mixer = Mixer(config, layer).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in mixer.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return mixer


def projections(tokens: int) -> Projections:
    generator = torch.Generator().manual_seed(0)
    widths = {"q": (HEADS, WIDTH), "k": (GROUPS, WIDTH), "v": (GROUPS, VALUES)}
    new = {n: torch.randn(3, tokens, *w, dtype=torch.float64, generator=generator) for n, w in widths.items()}
    rotated = [torch.randn(new[n].shape, dtype=torch.float64, generator=generator) for n in "qk"]
    return Projections(new["q"], new["k"], new["v"], *rotated)


def flat(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])


def options_of(mixer: Mixer) -> LigerOptions:
    config, layer = mixer.config, mixer.layer
    return LigerOptions(
        config.window, layer.scale, layer.softcap, config.mix, config.covers, config.normalize, config.feature_map
    )


@pytest.mark.parametrize(
    ("covers", "mix", "normalize"),
    list(itertools.product(("evicted", "all"), ("fixed", "learned", "softmax"), (True, False))),
)
def test_composed_equals_the_mixer(covers, mix, normalize):
    mixer = make_mixer(covers=covers, mix=mix, normalize=normalize)
    new, lengths = projections(max(LENGTHS)), torch.tensor(LENGTHS)
    starts = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    weight = getattr(mixer, "mix_weight", None)
    gate = Gate(mixer.recurrence.gate_scale, mixer.recurrence.gate_bias)
    memory = LayerMemory(mixer.parts(3, torch.float64, torch.device("cpu")), 3, torch.device("cpu"))
    memory.parts["state"]["state"] = memory.parts["state"]["state"].double()
    with torch.no_grad():
        expected = flat(mixer(new, lengths, memory), lengths)
        first = new.k_rotated[:, :SINKS], new.v[:, :SINKS]
        operands = [flat(x, lengths) for x in (new.q_rotated, new.k_rotated, new.v, new.q, new.k)]
        outputs, state = liger_attention_composed(
            *operands, gate, options_of(mixer), mix_weight=weight, columns=Columns(*first, SINKS), rows=starts
        )
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(state, memory.parts["state"]["state"])


@pytest.mark.parametrize("covers", ["evicted", "all"])
@pytest.mark.parametrize("cut", [2, 8, 12])
def test_composed_continues_a_cache_as_the_mixer_does(covers, cut):
    mixer = make_mixer(covers=covers, mix="learned")
    new = projections(24)
    memory = LayerMemory(mixer.parts(3, torch.float64, torch.device("cpu")), 3, torch.device("cpu"))
    memory.parts["state"]["state"] = memory.parts["state"]["state"].double()
    gate = Gate(mixer.recurrence.gate_scale, mixer.recurrence.gate_bias)
    with torch.no_grad():
        expected = mixer(new, None, None)
        mixer(Projections(*(x[:, :cut] for x in new)), None, memory)
        state = memory.parts["state"]["state"].clone()

        def with_past(x: Tensor) -> Tensor:
            before = torch.nn.functional.pad(x[:, max(cut - WINDOW, 0) : cut], (0, 0, 0, 0, max(WINDOW - cut, 0), 0))
            return torch.cat([before, x[:, cut:]], 1).flatten(0, 1)

        outputs, final = liger_attention_composed(
            new.q_rotated[:, cut:].flatten(0, 1),
            with_past(new.k_rotated),
            with_past(new.v),
            new.q[:, cut:].flatten(0, 1),
            with_past(new.k),
            gate,
            options_of(mixer),
            mix_weight=mixer.mix_weight,
            columns=Columns(new.k_rotated[:, :SINKS], new.v[:, :SINKS], SINKS),
            rows=3,
            counts=torch.full((3,), cut),
            initial_state=state,
        )
        memory.advance(cut, None)
        mixer(Projections(*(x[:, cut:] for x in new)), None, memory)
    torch.testing.assert_close(outputs.unflatten(0, (3, -1)), expected[:, cut:])
    torch.testing.assert_close(final, memory.parts["state"]["state"])


def operands(dtype: torch.dtype = torch.float32, width: int = 8, heads: int = 2) -> list:
    rn = [torch.zeros(4, n, width, dtype=dtype) for n in (heads, 1, 1, heads, 1)]
    return [*rn, torch.zeros(4, 1, 1)]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (operands(torch.float64), "float64 inputs"),
        (operands(width=272), "heads wider than 256"),
        (operands(heads=17), "more than 16 query heads per key/value head"),
        ([operands()[0].half(), *operands()[1:]], "queries, keys and values of different dtypes"),
    ],
)
def test_what_the_kernels_do_not_take_is_told_beforehand(arguments, reason):
    options = LigerOptions(4, 1.0, mix="fixed")
    assert unsupported(*arguments, options) == reason
    with pytest.raises(ValueError, match=f"do not take {reason}"):
        liger_attention(*arguments, options)


def test_tensors_on_the_cpu_are_for_the_composed_form(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert unsupported(*operands(), LigerOptions(4, 1.0, mix="fixed")) == "tensors on cpu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": LigerOptions(0, 1.0, mix="fixed")}, "window of 0"),
        ({"options": LigerOptions(4, 1.0, mix="learned")}, r"mix: learned takes a mix_weight \[2, 8\]"),
        ({"rows": 3}, "4 tokens do not make 3 rows"),
        ({"counts": torch.zeros(1)}, r"k is \[4, 1, 8\]; expected \[8, 1, 8\]"),
        ({"initial_state": torch.zeros(1, 1, 8, 8)}, "initial_state"),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(change, message):
    arguments = {"options": LigerOptions(4, 1.0, mix="fixed")} | change
    with pytest.raises(ValueError, match=message):
        liger_attention_composed(*operands(), **arguments)
