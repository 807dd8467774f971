"""What windows read exactly, and window dropout: layers whose window is hidden for a forward pass, so that their
recurrence has to answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from linearize.model import LinearizedForCausalLM
    from linearize.model.mixer import Mixer
    from linearize.training.rows import Rows


def exact_reach(mixer: Mixer) -> int:
    """How many first tokens of a row leave the recurrence nothing to answer."""
    # The window that it has now: it may be hidden.
    return replace(mixer.config, window=mixer.window).exact_tokens if mixer.config.covers == "evicted" else 0


def nothing_to_recall(student: LinearizedForCausalLM, rows: Rows) -> str | None:
    """What to tell where every recurrence stays out of all of `rows`, since no document is longer than what window and
    sinks read; None where one has something to learn."""
    mixers = [layer.mixer for layer in student.attention_layers if layer.mixer is not None]
    reaches = [exact_reach(mixer) for mixer in mixers if mixer.recurrence is not None]
    longest = int(rows.position_ids.max()) + 1
    if not reaches or longest > min(reaches):
        return None
    return (
        f"the longest document has {longest:,} tokens, and window and sinks read {min(reaches):,} exactly: the "
        "recurrence has nothing to learn from such text; take longer texts, or a smaller mixer.window"
    )


class WindowDropout(TrainerCallback):
    """Draws anew for each forward pass, and leaves all windows as they were when training ends.

    A hidden window holds its last token alone. What it would have held is in the state then, also with `covers:
    evicted`, so the layer still has the whole past: sinks and state answer for it.

    Args:
        share: how often a layer's window is hidden, 0 to 1.
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

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for mixer, window in self.mixers:
            mixer.window = window
