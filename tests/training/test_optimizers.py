"""Optimizers: float32 copies of what is trained in less, and windows that are hidden at random."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from linearize.errors import RecipeError
from linearize.recipe import Stage
from linearize.training.optimizers import MasterWeights, build_optimizer, rate_at


def stage(**keys):
    return Stage.model_validate({"objective": "distill", "data": {"source": "self"}, "length": 64, **keys})


def test_small_steps_on_bfloat16_weights_add_up():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    own = nn.Parameter(torch.ones(4))
    optimizer = build_optimizer(stage(lr=1e-4, mixer_lr=1e-3), [weight], [own])
    assert isinstance(optimizer, MasterWeights)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1e-3]
    plain = torch.ones(4, dtype=torch.bfloat16)
    for _ in range(100):
        weight.grad, own.grad = torch.ones_like(weight), torch.ones_like(own)
        optimizer.step()
        optimizer.zero_grad()
        assert weight.grad is None and own.grad is None
        plain -= 1e-4
    assert bool((plain == 1).all())  # what every step alone comes to
    torch.testing.assert_close(weight.float(), torch.full((4,), 0.99), rtol=0, atol=2**-8)
    torch.testing.assert_close(own.detach(), torch.full((4,), 0.9), rtol=0, atol=1e-5)


SCHEDULES = ("constant", "linear", "cosine", "wsd")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 0.05, 0.5, 0.9, 1])
def test_every_step_of_every_schedule_trains_and_one_has_the_peak_rate(schedule, warmup):
    for steps in range(1, 31):
        rates = [rate_at(step, schedule=schedule, steps=steps, warmup=warmup) for step in range(steps)]
        assert min(rates) > 0 and max(rates) == 1, (steps, rates)
        assert 0 <= rate_at(steps, schedule=schedule, steps=steps, warmup=warmup) <= 1  # what is set after the last one


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_after_the_warm_up_the_rates_are_those_of_transformers(schedule):
    """The warm-up is a step ahead, because transformers' begins at 0."""
    names = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}
    for steps, warmup in ((20, 0.05), (137, 0.1), (10, 0)):
        first = math.ceil(warmup * steps)
        more = {"num_decay_steps": math.ceil(steps / 5), "decay_type": "1-sqrt"} if schedule == "wsd" else None
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1)
        made = get_scheduler(names.get(schedule, schedule), optimizer, first, steps, scheduler_specific_kwargs=more)
        expected = [made.lr_lambdas[0](step + 1 if step < first else step) for step in range(steps)]
        found = [rate_at(step, schedule=schedule, steps=steps, warmup=warmup) for step in range(steps)]
        assert found == pytest.approx(expected, abs=1e-12)


def test_float32_weights_have_no_copies_and_copies_are_saved():
    assert type(build_optimizer(stage(), [nn.Parameter(torch.ones(2))], [])) is torch.optim.AdamW
    weights = [nn.Parameter(torch.full((3,), 1.003, dtype=torch.bfloat16)) for _ in range(2)]
    first, second = (build_optimizer(stage(), [weight], []) for weight in weights)
    for _ in range(3):
        weights[0].grad = torch.full((3,), 0.1, dtype=torch.bfloat16)
        first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    weights[1].data.copy_(weights[0].data)
    for optimizer, weight in ((first, weights[0]), (second, weights[1])):
        weight.grad = torch.full((3,), 0.2, dtype=torch.bfloat16)
        optimizer.step()
    assert torch.equal(first.masters[0], second.masters[0]) and torch.equal(*weights)
    assert not torch.equal(first.masters[0], weights[0].float())


def test_an_optimizer_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="adamw8bit: needs a GPU"):
        build_optimizer(stage(optimizer="adamw8bit"), [nn.Parameter(torch.ones(2))], [])
