"""The objectives over tokens, against their definitions."""

from __future__ import annotations

import pytest
import torch

from linearize.training import objective
from linearize.training.objective import TopK, counted, token_losses, top_k_of


@pytest.fixture(params=[3, None], ids=["in chunks", "whole"], autouse=True)
def chunks(request, monkeypatch):
    """Chunks of three positions, of which the last is not full, and one chunk for all."""
    if request.param:
        monkeypatch.setattr(objective, "_chunk", lambda logits: request.param)


def at_counted(logits, labels):
    """`[N, V]` of `[B, T, V]`."""
    at = counted(labels)
    return logits[at.rows, at.columns]


def losses(student, labels, teacher, weights, temperature=1.0):
    """`token_losses` of all logits `[B, T, V]`."""
    told = at_counted(teacher, labels) if isinstance(teacher, torch.Tensor) else teacher
    return token_losses(at_counted(student, labels), counted(labels).targets, told, weights, temperature)


def test_objectives_against_their_definitions():
    student, teacher = (torch.randn(2, 9, 31, dtype=torch.float64).requires_grad_() for _ in range(2))
    labels = torch.randint(0, 31, (2, 9))
    labels[0, 3:5] = -100
    expected = {"sft": 0.0, "distill": 0.0}
    for row in range(2):
        for t in range(8):
            if labels[row, t + 1] != -100:
                p, q = (teacher[row, t] / 2).softmax(-1), (student[row, t] / 2).softmax(-1)
                expected["distill"] += 4 * float((p * (p / q).log()).sum())
                expected["sft"] -= float(student[row, t].softmax(-1)[labels[row, t + 1]].log())
    for name, value in expected.items():
        found = losses(student, labels, teacher, {name: 1.0}, temperature=2.0)
        assert float(found) == pytest.approx(value, rel=1e-5)
    torch.autograd.gradcheck(
        lambda s: losses(s, labels, teacher, {"sft": 0.25, "distill": 0.5}, temperature=2.0), student
    )
    both = losses(student, labels, teacher, {"sft": 0.25, "distill": 0.5}, temperature=2.0)
    assert float(both) == pytest.approx(0.25 * expected["sft"] + 0.5 * expected["distill"], rel=1e-5)


def top_k_by_hand(student, teacher, labels, k, temperature):
    """KL over the teacher's k most likely tokens and one more for all others, by plain sums."""
    total = 0.0
    for p, q in zip(*(at_counted(x, labels) for x in (teacher, student)), strict=True):
        p, q = ((x / temperature).softmax(-1) for x in (p, q))
        known = p.argsort(descending=True)[:k]
        others = torch.ones_like(p, dtype=torch.bool)
        others[known] = False
        p, q = (torch.cat([x[known], x[others].sum()[None]]) for x in (p, q))
        total = total + temperature**2 * (p * (p / q).log()).sum()
    return total


@pytest.mark.parametrize("k", [1, 7])
def test_all_but_the_top_tokens_count_as_one(k):
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(2, 9, 31, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    labels = torch.randint(0, 31, (2, 9))
    labels[0, 3:5] = -100
    expected = top_k_by_hand(student, teacher, labels, k, 2.0)
    (gradient,) = torch.autograd.grad(expected, student)
    top = top_k_of(at_counted(teacher, labels), k, 2.0)
    found = losses(student, labels, top, {"distill": 1.0}, temperature=2.0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], gradient, rtol=1e-9, atol=1e-12)
    assert float(found) < float(losses(student, labels, teacher, {"distill": 1.0}, temperature=2.0))


def test_all_tokens_on_top_are_the_whole_divergence_and_certainty_stays_finite():
    student, teacher = torch.randn(1, 5, 11).requires_grad_(), torch.randn(1, 5, 11)
    teacher[0, 2, 3] = 200.0  # nothing is left for the others
    labels = torch.randint(0, 11, (1, 5))
    whole = losses(student, labels, teacher, {"distill": 1.0})
    (gradient,) = torch.autograd.grad(whole, student)
    for k in (11, 99):
        found = losses(student, labels, top_k_of(at_counted(teacher, labels), k, 1.0), {"distill": 1.0})
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(found, student)[0], gradient, rtol=1e-5, atol=1e-6)
    few = top_k_of(at_counted(teacher, labels), 2, 1.0)
    halved = TopK(few.tokens, few.log.half())
    for top in (few, halved):
        found = losses(student, labels, top, {"distill": 1.0})
        assert bool(torch.isfinite(found)) and bool(torch.isfinite(torch.autograd.grad(found, student)[0]).all())


@pytest.mark.parametrize("gap", [10, 80, 88, 104, 1e3, 1e5])
def test_a_student_that_gives_the_rest_nothing_has_finite_gradients(gap):
    """float32 against autograd in float64, at any gap between the k tokens and all others."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(4, 31, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(0, 31, (4,))
    top = top_k_of(teacher, 4, 1.0)
    student.scatter_add_(1, top.tokens, torch.full_like(top.log[:, :-1], gap))
    wide = student.clone().requires_grad_()
    q_log = wide.log_softmax(-1)
    others = torch.ones_like(q_log, dtype=torch.bool).scatter(1, top.tokens, False)
    rest = q_log.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)
    expected = (top.log.exp() * (top.log - torch.cat([q_log.gather(1, top.tokens), rest], 1))).sum()
    (gradient,) = torch.autograd.grad(expected, wide)
    narrow = student.float().requires_grad_()
    found = token_losses(narrow, targets, TopK(top.tokens, top.log.float()), {"distill": 1.0})
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    # Logits of 1e5 hold 2^-7 of a nat in float32.
    atol = 1e-5 if gap <= 1e3 else 1e-2
    torch.testing.assert_close(torch.autograd.grad(found, narrow)[0].double(), gradient, rtol=0, atol=atol)
    assert float(gradient.abs().max()) > 0.1


def test_tokens_that_the_teacher_rules_out_cost_nothing():
    teacher, labels = torch.randn(1, 5, 11), torch.randint(0, 11, (1, 5))
    teacher[..., 7:] = -torch.inf
    for student in (torch.randn(1, 5, 11), torch.randn(1, 5, 11).index_fill(2, torch.tensor([8]), -torch.inf)):
        student.requires_grad_()
        for said in (teacher, top_k_of(at_counted(teacher, labels), 7, 1.0)):
            found = losses(student, labels, said, {"distill": 1.0})
            assert bool(torch.isfinite(found)) and bool(torch.isfinite(torch.autograd.grad(found, student)[0]).all())


def test_a_chunk_is_of_megabytes(monkeypatch):
    monkeypatch.undo()
    for vocabulary, positions in ((512, 2048), (49_152, 21), (151_936, 8)):
        assert objective._chunk(torch.empty(1, vocabulary)) == positions
    assert objective._chunk(torch.empty(1, 512, device="meta")) == 64  # launches cost more than memory
