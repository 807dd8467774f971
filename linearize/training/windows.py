"""The tokens that windows read exactly, and window dropout, which hides a layer's window for a forward pass so that its
recurrence has to answer."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from linearize.data.rows import NO_LOSS
from linearize.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from linearize.data.rows import Rows
    from linearize.model import LinearizedForCausalLM
    from linearize.model.mixer.mixer import Mixer
    from linearize.recipe.schema import Stage


def exact_reach(mixer: Mixer) -> int:
    """The number of first tokens of a row that a mixer reads without its recurrence."""
    # The window in use: it may be hidden.
    return replace(mixer.config, window=mixer.window).exact_tokens if mixer.config.covers == "evicted" else 0


def nothing_to_recall(student: LinearizedForCausalLM, rows: Rows) -> str | None:
    """A line that says so where no document in `rows` is longer than the tokens that window and sinks read: every
    recurrence gets a gradient of 0 then. None where one has something to learn."""
    mixers = [layer.mixer for layer in student.attention_layers if layer.mixer is not None]
    reaches = [exact_reach(mixer) for mixer in mixers if mixer.recurrence is not None]
    longest = int(rows.position_ids.max()) + 1
    if not reaches or longest > min(reaches):
        return None
    raised = ", raise the stage's length" if longest == rows.input_ids.shape[1] else ""
    return (
        f"the longest document has {longest:,} tokens, and window and sinks read {min(reaches):,} exactly: the "
        f"recurrence has nothing to learn from such text; take longer texts (data.source){raised}, or convert with a "
        "smaller mixer.window"
    )


def check_something_to_learn(
    student: LinearizedForCausalLM, rows: Rows, stage: Stage, *, adapters: bool, untrained: bool
) -> str | None:
    """`nothing_to_recall`, unless a stage has nothing at all to learn.

    Args:
        adapters: the recipe has some, so that a stage of `train: lora` has more than its mixers to train.
        untrained: the student's weights are still its teacher's.

    Raises:
        DataError: no token carries loss, or the stage trains its mixers alone, or by an objective that is 0 while the
            student does as its teacher does.
    """
    if set(stage.weights) != {"align"} and not bool((rows.labels != NO_LOSS).any()):
        raise DataError(
            f"no token of the rows carries loss, because prompts fill rows of {rows.input_ids.shape[1]:,} tokens; "
            "raise the stage's length"
        )
    if stage.hide_window or (warning := nothing_to_recall(student, rows)) is None:
        return None
    objectives = set(stage.weights)
    if stage.train == "mixer" or (stage.train == "lora" and not adapters):
        raise DataError(f"{warning}; this stage trains nothing but the recurrence")
    if objectives == {"align"} or (objectives == {"distill"} and untrained):
        raise DataError(
            f"{warning}; objective: {objectives.pop()} is 0 on such text, so that nothing else learns either"
        )
    return warning


class WindowDropout:
    """A context that hides windows anew for each forward pass; all windows are as before when it ends.

    A hidden window holds its last token alone. The tokens that it would have held are in the state then, also with
    `covers: evicted`, so the layer still has the whole past: sinks and state answer for it.

    Args:
        share: probability that a layer's window is hidden, 0 to 1.
    """

    def __init__(self, student: LinearizedForCausalLM, share: float) -> None:
        mixers = [layer.mixer for layer in student.attention_layers if layer.mixer is not None]
        self.mixers = [(m, m.window) for m in mixers if m.recurrence is not None and share > 0]
        self.share = share

    def draw(self) -> None:
        """Hides some windows until the next draw: a backward pass may run the layers again."""
        if self.mixers:
            # The CPU's generator, which checkpoints keep.
            hidden = (torch.rand(len(self.mixers)) < self.share).tolist()
            for (mixer, window), hides in zip(self.mixers, hidden, strict=True):
                mixer.window = 1 if hides else window

    @contextmanager
    def shown(self) -> Iterator[None]:
        """All windows as configured within the block, and as drawn after it."""
        drawn = [mixer.window for mixer, _ in self.mixers]
        self._set([window for _, window in self.mixers])
        try:
            yield
        finally:
            self._set(drawn)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._set([window for _, window in self.mixers])

    def _set(self, windows: list[int]) -> None:
        for (mixer, _), window in zip(self.mixers, windows, strict=True):
            mixer.window = window
