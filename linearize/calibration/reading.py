"""Score a model on rows of text and on needles with at most one of its blocks in memory."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from linearize.calibration.blocks import texts_of
from linearize.evaluation.heldout import score_rows
from linearize.evaluation.tasks.task import evaluating
from linearize.probe.damage import Reading
from linearize.probe.needles import answer_log_probability

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linearize.calibration.blocks import Blocks
    from linearize.data.rows import Rows
    from linearize.probe.needles import Needle


def read_by_block(blocks: Blocks, rows: Rows, needles: Sequence[Needle], *, teacher: bool = False) -> Reading:
    """`linearize.probe.damage.read` block by block: all texts pass one block before the next is opened.

    Args:
        teacher: use the pretrained attention in all blocks.

    Raises:
        ModelError: logits are not finite.
    """
    asked = [(torch.tensor(needle.ids), torch.arange(len(needle.ids))) for needle in needles]
    hidden, calls = blocks.enter([*texts_of(rows), *asked])
    for index in range(len(blocks)):
        with blocks.weights.block(index), blocks.as_teacher(index) if teacher else nullcontext(), torch.no_grad():
            for number, call in enumerate(calls):
                hidden[number] = blocks.run(index, hidden[number], call[index])
    loss, recall = [], []
    with blocks.weights.outside():
        for number, states in enumerate(hidden[: len(rows)]):
            with blocks.leaving(states):
                loss.append(score_rows(blocks.model, rows[number : number + 1], batch_size=1).loss)
        for needle, states in zip(needles, hidden[len(rows) :], strict=True):
            with blocks.leaving(states), evaluating(blocks.model), torch.inference_mode():
                recall.append(answer_log_probability(blocks.model, needle))
    return Reading(torch.cat(loss), torch.tensor(recall, dtype=torch.float64))
