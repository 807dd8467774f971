"""Optimizers: float32 copies of what is trained in less, and windows that are hidden at random."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from linearize.errors import RecipeError
from linearize.recipe import Stage
from linearize.training.optimizers import MasterWeights, build_optimizer
from linearize.training.trainer import stage_arguments


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


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [("wsd", [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 0.293]), ("constant", [0, 0.5, *[1] * 8])],
)
def test_schedules(tmp_path, schedule, shape):
    from transformers import get_scheduler

    settings = stage_arguments(stage(schedule=schedule, warmup=0.2, batch_tokens=64), 10, tmp_path, 0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = get_scheduler(
        settings.lr_scheduler_type,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=settings.max_steps,
        scheduler_specific_kwargs=settings.lr_scheduler_kwargs,
    )
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(shape, abs=2e-3)
