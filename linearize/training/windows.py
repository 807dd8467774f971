"""Window dropout: layers whose window is hidden for a forward pass, so that their recurrence has to answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from linearize.model import LinearizedForCausalLM


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
