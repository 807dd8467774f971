"""The tokens that windows read exactly, and window dropout: a layer without its window for a forward pass, so that
the output depends on the recurrence."""

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
    """The number of tokens at the start of a row that a mixer reads without its recurrence."""
    # `mixer.window` is 1 while the window is hidden.
    return replace(mixer.config, window=mixer.window).exact_tokens if mixer.config.covers == "evicted" else 0


def nothing_to_recall(student: LinearizedForCausalLM, rows: Rows) -> str | None:
    """A warning if no document in `rows` is longer than window and sinks, because every recurrence then gets a gradient
    of 0; None otherwise."""
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
    """The warning of `nothing_to_recall`, or an error if a stage has nothing at all to learn.

    Args:
        adapters: the recipe has adapters, so a stage of `train: lora` trains more than the mixers.
        untrained: the student's weights equal the teacher's.

    Raises:
        DataError: no token carries loss, or every trained parameter has a gradient of 0: the stage trains only mixers,
            or its objective is 0 because student and teacher are equal.
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
    """A context that hides windows at random in each forward pass, and restores all windows at its end.

    A hidden window holds one token. The other tokens go into the state, also with `covers: evicted`, so sinks and
    state still cover the whole past.

    Args:
        share: probability that a layer's window is hidden, 0 to 1.
    """

    def __init__(self, student: LinearizedForCausalLM, share: float) -> None:
        mixers = [layer.mixer for layer in student.attention_layers if layer.mixer is not None]
        self.mixers = [(m, m.window) for m in mixers if m.recurrence is not None and share > 0]
        self.share = share

    def draw(self) -> None:
        """Hide windows until the next draw, because a backward pass may run the layers again."""
        if self.mixers:
            # The CPU's generator, because checkpoints save its state.
            hidden = (torch.rand(len(self.mixers)) < self.share).tolist()
            for (mixer, window), hides in zip(self.mixers, hidden, strict=True):
                mixer.window = 1 if hides else window

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show all windows within the block, and hide the drawn ones again after it."""
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
