"""What a stage minimises: cross-entropy with the text, divergence from the teacher, or a weighted sum of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from linearize.recipe import Objective

IGNORE = -100


def token_losses(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    weights: Mapping[Objective, float],
    temperature: float = 1.0,
) -> Tensor:
    """The sum over counted positions of the weighted objectives, in nats.

    Args:
        logits: `[B, T, V]` of the student; position t predicts labels[:, t + 1].
        labels: `[B, T]`, -100 where nothing is counted.
        teacher_logits: `[B, T, V]`, wanted by `distill` only.
        weights: of `sft` (cross-entropy) and `distill` (KL(teacher || student), softened by `temperature` and scaled
            by its square as Hinton et al. 2015 do, arXiv 1503.02531).
    """
    targets = labels[:, 1:].flatten()
    counted = targets != IGNORE
    student = logits[:, :-1].flatten(0, 1)[counted].float()
    loss = student.new_zeros(())
    if "sft" in weights:
        loss = loss + weights["sft"] * F.cross_entropy(student, targets[counted], reduction="sum")
    if "distill" in weights:
        if teacher_logits is None:
            raise ValueError("the objective `distill` needs the teacher's logits")
        teacher = teacher_logits[:, :-1].flatten(0, 1)[counted].float()
        teacher_log = torch.log_softmax(teacher / temperature, -1)
        student_log = torch.log_softmax(student / temperature, -1)
        divergence = F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
        loss = loss + weights["distill"] * temperature**2 * divergence
    return loss
