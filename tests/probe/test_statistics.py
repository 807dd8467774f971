"""What heads attend to, against plain arithmetic on the attention weights that transformers returns."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from linearize.families import family_of
from linearize.model import LinearizedForCausalLM
from linearize.probe import statistics
from linearize.probe.statistics import Tally, mass_on, observed
from tests.model.test_families import ROWS, build, every_row, text

LENGTH, WINDOW, SINKS = 60, 12, 3


def eager_weights(row: str, ids: torch.Tensor) -> list[torch.Tensor]:
    """Per layer `[H, T, T]` float64."""
    # Made anew: Falcon's layers cannot change their implementation, and forget the causal mask in the other one.
    config = copy.deepcopy(build(row).config)
    teacher = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    teacher.load_state_dict(build(row).state_dict())
    with torch.no_grad():
        return [weights[0].double() for weights in teacher(ids, output_attentions=True).attentions]


def tallied(row: str, ids: torch.Tensor, window: int = WINDOW, **more: torch.Tensor) -> list[Tally]:
    model = LinearizedForCausalLM.from_teacher(copy.deepcopy(build(row)), [])
    tallies = [Tally(layer, window, SINKS) for layer in family_of(model.config.text_config).layers(model.config)]
    with torch.no_grad(), observed(model, lambda index: tallies[index]):
        model(ids, use_cache=False, **more)
    assert all(attention.observer is None for attention in model.attention_layers)
    return tallies


def expected(weights: torch.Tensor, window: int = WINDOW) -> dict[str, list[float]]:
    """The statistics of each head from `[H, T, T]` weights, number by number."""
    heads, tokens = weights.shape[:2]
    queries = range(window + SINKS, tokens)
    found: dict[str, list[float]] = {"window": [], "sinks": [], "beyond": [], "entropy": [], "half_life": []}
    for head in range(heads):
        sums = dict.fromkeys(("window", "sinks", "beyond", "entropy"), 0.0)
        lags = [0.0] * tokens
        for query in queries:
            for key, weight in enumerate(weights[head, query, : query + 1].tolist()):
                place = "sinks" if key < SINKS else "window" if key > query - window else "beyond"
                sums[place] += weight
                sums["entropy"] -= weight * math.log(weight) if weight > 0 else 0.0
                if key >= SINKS:
                    lags[query - key] += weight
        for name, total in sums.items():
            found[name].append(total / len(queries))
        half, reached, distance = sum(lags) / 2, 0.0, -1
        while reached < half * (1 - 1e-9):
            distance += 1
            reached += lags[distance]
        found["half_life"].append(distance)
    return found


def check(tally: Tally, plain: dict[str, list[float]]) -> None:
    heads = tally.heads(torch.zeros(tally.layer.query_heads))
    for name, values in plain.items():
        assert [getattr(one, name) for one in heads] == pytest.approx(values, rel=0, abs=1e-5), name
    for one in heads:
        assert one.window + one.sinks + one.beyond == pytest.approx(1, abs=1e-5)


@every_row
def test_statistics_are_those_of_the_weights(row):
    (ids,) = text(LENGTH)
    for tally, weights in zip(tallied(row, ids), eager_weights(row, ids), strict=True):
        assert tally.queries == LENGTH - WINDOW - SINKS
        check(tally, expected(weights))


def test_the_rows_above_have_groups_windows_and_a_cap():
    layers = [layer for row in ("llama", "gemma2") for layer in family_of(build(row).config).layers(build(row).config)]
    assert any(layer.query_heads > layer.key_value_heads for layer in layers)
    assert {layer.window is None for layer in layers} == {True, False} and any(layer.softcap for layer in layers)
    assert "gemma2" in ROWS


def test_blocks_of_queries_change_nothing(monkeypatch):
    (ids,) = text(LENGTH)
    whole = tallied("gemma2", ids)
    monkeypatch.setattr(statistics, "_LONGEST_BLOCK", 7)
    for one, other in zip(whole, tallied("gemma2", ids), strict=True):
        assert one.queries == other.queries
        none = torch.zeros(one.layer.query_heads)
        for a, b in zip(one.heads(none), other.heads(none), strict=True):
            assert vars(a) == pytest.approx(vars(b), abs=1e-6)


def test_a_windows_own_layer_has_nothing_beyond_a_window_as_wide():
    (ids,) = text(LENGTH)
    (heads, _) = (tally.heads(torch.zeros(6)) for tally in tallied("mistral, sliding", ids, window=25))
    assert all(one.window == pytest.approx(1, abs=1e-6) and one.sinks == one.beyond == 0 for one in heads)


def test_packed_documents_count_one_by_one():
    one, other = text(40, 20)
    ids = torch.cat([one, other], 1)
    positions = torch.cat([torch.arange(40), torch.arange(20)])[None]
    alone = zip(eager_weights("llama", one), eager_weights("llama", other), strict=True)
    for tally, weights in zip(tallied("llama", ids, position_ids=positions), alone, strict=True):
        assert tally.queries == 25 + 5
        first, second = map(expected, weights)
        mixed = {n: [(25 * a + 5 * b) / 30 for a, b in zip(first[n], second[n], strict=True)] for n in first}
        mixed.pop("half_life")
        check(tally, mixed)


def test_mass_on_some_keys():
    (ids,) = text(LENGTH)
    model = LinearizedForCausalLM.from_teacher(copy.deepcopy(build("gemma2")), [])
    layers, found = family_of(model.config.text_config).layers(model.config), {}

    def observer(index):
        return lambda new, lengths: found.update({index: mass_on(layers[index], new, range(50, 55), range(36, 40))})

    with torch.no_grad(), observed(model, observer):
        model(ids, use_cache=False)
    for index, weights in enumerate(eager_weights("gemma2", ids)):
        torch.testing.assert_close(found[index], weights[:, 50:55, 36:40].sum(-1).mean(1), rtol=0, atol=1e-6)
