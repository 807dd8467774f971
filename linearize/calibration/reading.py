"""Score a model on rows of text and on needles with at most one of its blocks in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from linearize.calibration.blocks import texts_of
from linearize.evaluation.heldout import score_rows
from linearize.evaluation.tasks.task import evaluating
from linearize.probe.damage import Reading
from linearize.probe.needles import answer_log_probability

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from linearize.calibration.blocks import Blocks, Text
    from linearize.data.rows import Rows
    from linearize.probe.needles import Needle


def read_by_block(blocks: Blocks, rows: Rows, needles: Sequence[Needle]) -> Reading:
    """`linearize.probe.damage.read` block by block: all texts pass one block before the next is opened.

    Raises:
        ModelError: logits are not finite.
    """
    hidden, calls = blocks.enter([*texts_of(rows), *map(asked, needles)])
    for index in range(len(blocks)):
        with blocks.weights.block(index), torch.no_grad():
            for number, call in enumerate(calls):
                hidden[number] = blocks.run(index, hidden[number], call[index])
    return read_states(blocks, hidden, rows, needles)


def asked(needle: Needle) -> Text:
    """A needle as a text."""
    return torch.tensor(needle.ids), torch.arange(len(needle.ids))


def read_states(blocks: Blocks, hidden: Sequence[Tensor], rows: Rows, needles: Sequence[Needle]) -> Reading:
    """The reading whose last block gives the hidden states `[1, L, C]`: those of the rows, then those of the needles.

    Raises:
        ModelError: logits are not finite.
    """
    loss, recall = [], []
    with blocks.weights.outside():
        for number, states in enumerate(hidden[: len(rows)]):
            with blocks.leaving(states):
                loss.append(score_rows(blocks.model, rows[number : number + 1], batch_size=1).loss)
        for needle, states in zip(needles, hidden[len(rows) :], strict=True):
            with blocks.leaving(states), evaluating(blocks.model), torch.inference_mode():
                recall.append(answer_log_probability(blocks.model, needle))
    return Reading(torch.cat(loss), torch.tensor(recall, dtype=torch.float64))
