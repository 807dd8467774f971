"""The formulas for a recurrence's arithmetic, against a count of what its step does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.families import AttentionLayer
from linearize.model import MixerConfig
from linearize.model.mixer.mixer import Mixer
from linearize.model.recurrences import RECURRENCES, build_recurrence
from linearize.model.recurrences.slots import Elementwise

GROUP, WIDTH, VALUES = 3, 16, 24
# What the plain kernels do beyond the formula, FLOPs per entry of the state: one kernel serves all delta rules, so it
# writes twice (2); it serves gates of 1 as well (1); RWKV-6 reads once more for a token that is not there (2 G).
SURPLUS = {"gated_deltanet": 2, "kda": 2, "linear": 1, "rwkv6": 2 * GROUP}


class Count(TorchDispatchMode):
    """Counts matrix products, and elementwise products and sums of at least `smallest` entries, which leaves out what
    is done to vectors."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest, self.flops = smallest, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__.removesuffix("_")  # what is done in place is the same arithmetic
        if name == "baddbmm":
            self.flops += 2 * args[1].numel() * args[2].shape[-1]
        elif name in ("mm", "bmm"):
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        elif name in ("mul", "add", "sub", "addcmul") and out.numel() >= self.smallest:
            self.flops += out.numel()
        return out


def layer(values: int) -> AttentionLayer:
    return AttentionLayer(GROUP, 1, WIDTH, values, scale=0.25)


def counted(recurrence, values: int, smallest: int) -> int:
    q, k, v = torch.randn(1, 1, GROUP, WIDTH), torch.randn(1, 1, 1, WIDTH), torch.randn(1, 1, 1, values)
    state = recurrence.state(1, torch.device("cpu"))
    with torch.no_grad(), Count(smallest) as count:
        recurrence(q, k, v, k, None, state)
    return count.flops


@pytest.mark.parametrize("feature_map", ["softmax", "exp"])
@pytest.mark.parametrize("name", [name for name in RECURRENCES if not issubclass(RECURRENCES[name], Elementwise)])
def test_a_step_takes_what_the_formula_says(name, feature_map):
    recurrence = build_recurrence(MixerConfig([0], recurrence=name, feature_map=feature_map), layer(VALUES))
    entries = recurrence.flops(GROUP) // (recurrence.update_flops + 2 * GROUP)
    assert entries >= WIDTH * VALUES
    expected = recurrence.flops(GROUP) + SURPLUS.get(name, 0) * entries
    assert counted(recurrence, VALUES, WIDTH * WIDTH) == expected


@pytest.mark.parametrize("name", ["gla", "hgrn2", "lightnet", "kda"])
def test_learned_projections_are_counted(name):
    config = MixerConfig([0], recurrence=name, feature_map="learned", gate_source="random")
    plain = MixerConfig([0], recurrence=name, feature_map="exp")
    more = [build_recurrence(one, layer(VALUES)) for one in (config, plain)]
    taken = [counted(one, VALUES, WIDTH * WIDTH) for one in more]
    assert taken[0] - taken[1] == more[0].flops(GROUP) - more[1].flops(GROUP) > 0


@pytest.mark.parametrize("name", ["rg_lru", "mingru"])
def test_elementwise_recurrences_count_the_channels(name):
    recurrence = build_recurrence(MixerConfig([0], recurrence=name, feature_map="learned"), layer(WIDTH))
    assert recurrence.flops(GROUP) == WIDTH * (3 + 2 * GROUP)


def test_a_mixer_adds_window_and_sinks():
    mixer = Mixer(MixerConfig([0], window=8, sinks=2), AttentionLayer(6, 2, WIDTH, VALUES, scale=0.25))
    attention = 6 * 10 * 2 * (WIDTH + VALUES)
    assert mixer.flops == attention + 2 * mixer.recurrence.flops(3)
    assert Mixer(MixerConfig([0], "none", window=8, sinks=2), mixer.layer).flops == attention
