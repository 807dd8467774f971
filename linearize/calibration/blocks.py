"""The blocks of a model, called one at a time on rows of text.

Calibration runs two streams of hidden states through the model layer by layer, the teacher's and the student's. So each
block is called directly, with the positions and masks that the whole model passes to it. At most one block is open
(loaded) at a time, and the weights outside of blocks are then closed, because the weights may be in files.

Dimensions: L tokens of a row, C the model's width.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.calibration.weights import output_projection
from linearize.model import MixerConfig
from linearize.model.attention import LinearizedAttention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from linearize.calibration.weights import Weights
    from linearize.data.rows import Rows
    from linearize.families import Projections
    from linearize.model.memory import LayerMemory

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a block other than its hidden states."""

Text = tuple[Tensor, Tensor]
"""Token ids `[L]` and their positions `[L]`."""


class Blocks:
    """The decoder blocks of a model, first layer first.

    Attributes:
        weights: the model's weights.
        attentions: the `LinearizedAttention` of each layer.
        teachers: the pretrained attention of each layer, with the same weights.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights, self.model = weights, weights.model
        self.attentions = self.model.attention_layers
        self._places = self.attentions[0].family.attention_modules(self.model)
        self.teachers = [_pretrained(attention) for attention in self.attentions]
        self._tuples: bool | None = None

    def __len__(self) -> int:
        return len(self._places)

    @torch.no_grad()
    def enter(self, texts: Sequence[Text]) -> tuple[list[Tensor], list[list[Call]]]:
        """The hidden states `[1, L, C]` at the first block, one per text, and the arguments of each block."""
        hidden: list[Tensor] = []
        calls: list[list[Call]] = []

        def passing(layer: int, given: Tensor, call: Call) -> Tensor:
            if layer == 0:
                hidden.append(given)
                calls.append([])
            calls[-1].append(call)
            return given

        self._find_tuples(texts[0])
        with self.weights.outside(), self._standing_in(passing):
            for text in texts:
                self._call(text)
        return hidden, calls

    @contextmanager
    def leaving(self, hidden: Tensor) -> Iterator[None]:
        """In this context the model computes its logits from `hidden` `[1, L, C]`, whatever its input tokens.
        `weights.outside` must be open."""
        with self._standing_in(lambda _, __, ___: hidden):
            yield

    def run(self, layer: int, hidden: Tensor, call: Call, *, heads: Tensor | None = None) -> Tensor:
        """The output of a block for `hidden`.

        Args:
            heads: the result of `heads` for the same arguments; no attention is computed then.
        """
        if heads is not None:
            with self._reading(layer, heads):
                return self.run(layer, hidden, call)
        arguments, keywords = call
        result = self._places[layer][0](hidden, *arguments, **keywords)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def projections(self, layer: int, hidden: Tensor, call: Call) -> tuple[Projections, Tensor | None]:
        """Queries, keys and values of the layer's attention, as rows of real tokens, and their lengths (None: all)."""
        attention, seen = self._attention(layer), []

        def observe(new: Projections, lengths: Tensor | None) -> None:
            seen.append((new, lengths))
            raise _Seen

        attention.observer = observe
        try:
            with suppress(_Seen):
                self.run(layer, hidden, call)
        finally:
            attention.observer = None
        (found,) = seen
        return found

    def heads(self, layer: int, hidden: Tensor, call: Call) -> Tensor:
        """The input of the layer's output projection, `[1, L, H V]`."""
        seen: list[Tensor] = []
        attention = self._attention(layer)

        def observe(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0])
            raise _Seen

        handle = output_projection(attention).register_forward_pre_hook(observe)
        try:
            with suppress(_Seen):
                self.run(layer, hidden, call)
        finally:
            handle.remove()
        (found,) = seen
        return found

    @contextmanager
    def _reading(self, layer: int, heads: Tensor) -> Iterator[None]:
        """In this context the layer's output projection is given `heads`, and nothing is mixed."""
        attention = self._attention(layer)

        def nothing(new: Projections, lengths: Tensor | None, memory: LayerMemory | None) -> Tensor:
            return new.v.new_zeros(*new.q.shape[:3], new.v.shape[-1])

        handle = output_projection(attention).register_forward_pre_hook(lambda *_: (heads,))
        attention.__dict__["mix"] = nothing
        try:
            yield
        finally:
            del attention.__dict__["mix"]
            handle.remove()

    @contextmanager
    def as_teacher(self, layer: int) -> Iterator[None]:
        """In this context the layer has its pretrained attention."""
        try:
            self._put(layer, self.teachers[layer])
            yield
        finally:
            self._put(layer, self.attentions[layer])

    def teacher_step(
        self, layer: int, hidden: Tensor, call: Call, *, attention_output: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The output of the pretrained block for `hidden`, and its attention's contribution if requested."""
        seen: list[Tensor] = []
        handle = self.teachers[layer].register_forward_hook(lambda _, __, output: seen.append(output[0]))
        try:
            with self.as_teacher(layer):
                after = self.run(layer, hidden, call)
        finally:
            handle.remove()
        return after, seen[0] if attention_output else None

    def _attention(self, layer: int) -> LinearizedAttention:
        owner, name = self._places[layer]
        attention: LinearizedAttention = getattr(owner, name)
        return attention

    def _put(self, layer: int, attention: LinearizedAttention) -> None:
        owner, name = self._places[layer]
        setattr(owner, name, attention)

    def _call(self, text: Text) -> None:
        ids, positions = (x[None].to(self.weights.device) for x in text)
        self.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)

    def _find_tuples(self, text: Text) -> None:
        """Find out if blocks return their hidden states in a tuple, as in some families."""
        if self._tuples is not None:
            return
        seen: list[tuple[Tensor, Call]] = []

        def look(_: int, given: Tensor, call: Call) -> Tensor:
            seen.append((given, call))
            raise _Seen

        with self.weights.outside(), self._standing_in(look), suppress(_Seen):
            self._call((text[0][:2], text[1][:2]))
        ((hidden, (arguments, keywords)),) = seen
        with self.weights.block(0):
            self._tuples = isinstance(self._places[0][0](hidden, *arguments, **keywords), tuple)

    @contextmanager
    def _standing_in(self, block: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
        """In this context `block(layer, hidden, call)` runs instead of every block."""

        def at(layer: int) -> Callable[..., Any]:
            def forward(*arguments: Any, **keywords: Any) -> Any:
                given = arguments[0] if arguments else keywords.pop("hidden_states")
                output = block(layer, given, (arguments[1:], keywords))
                return (output,) if self._tuples else output

            return forward

        blocks: list[Any] = [block for block, _ in self._places]
        try:
            for layer, one in enumerate(blocks):
                one.forward = at(layer)
            yield
        finally:
            for one in blocks:
                del one.forward


class _Seen(Exception):
    """Stops a forward pass once the observed tensor is known."""


def texts_of(rows: Rows) -> list[Text]:
    """Each row as a text."""
    return list(zip(rows.input_ids, rows.position_ids, strict=True))


def _pretrained(attention: LinearizedAttention) -> LinearizedAttention:
    """The same layer with its pretrained attention; the weights are shared."""
    kept = MixerConfig(layers=[attention.layer_idx], recurrence="none", window=None, sinks=0)
    twin = LinearizedAttention(attention, attention.family, attention.layer, kept, attention.layer_idx)
    return twin.to(next(attention.parameters()).device).eval()
