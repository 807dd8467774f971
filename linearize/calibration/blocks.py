"""The blocks of a model, called one at a time on rows of text.

Calibration goes through the model layer by layer, with two streams of hidden states side by side: the teacher's, and
the student's. So each block is called by hand, with the positions and masks that the whole model would have passed.

Dimensions: L tokens of a row, C the model's width.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.model import MixerConfig
from linearize.model.attention import LinearizedAttention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from linearize.families import Projections
    from linearize.model import LinearizedForCausalLM
    from linearize.training.rows import Rows

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with beside its hidden states."""


class Blocks:
    """The decoder blocks of `model`, first layer first.

    Attributes:
        attentions: what stands in the place of each layer's attention.
        teachers: the pretrained attention of each layer, with the same weights.
    """

    def __init__(self, model: LinearizedForCausalLM) -> None:
        self.model, self.attentions = model, model.attention_layers
        self._places = self.attentions[0].family.attention_modules(model)
        self.teachers = [_pretrained(attention) for attention in self.attentions]

    def __len__(self) -> int:
        return len(self._places)

    def enter(self, rows: Rows) -> tuple[list[Tensor], list[list[Call]]]:
        """The hidden states `[1, L, C]` that reach the first block, row by row, and what each block is called with."""
        hidden: list[Tensor] = []
        calls: list[list[Call]] = []
        tuples = self._returning_tuples(rows)
        with self._passing(tuples, hidden, calls), torch.no_grad():
            for ids, positions in zip(rows.input_ids, rows.position_ids, strict=True):
                calls.append([])
                device = self.model.device
                self.model(
                    input_ids=ids[None].to(device),
                    position_ids=positions[None].to(device),
                    use_cache=False,
                    logits_to_keep=1,
                )
        return hidden, calls

    def run(self, layer: int, hidden: Tensor, call: Call) -> Tensor:
        """What a block makes of `hidden`."""
        arguments, keywords = call
        result = self._places[layer][0](hidden, *arguments, **keywords)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def projections(self, layer: int, hidden: Tensor, call: Call) -> tuple[Projections, Tensor | None]:
        """What the layer's attention would mix, as rows of real tokens with their lengths (None: all)."""
        attention, seen = self._attention(layer), []

        def observe(new: Projections, lengths: Tensor | None) -> None:
            seen.append((new, lengths))
            raise _Seen

        attention.observer = observe
        try:
            self.run(layer, hidden, call)
        except _Seen:
            pass
        finally:
            attention.observer = None
        (found,) = seen
        return found

    def heads(self, layer: int, hidden: Tensor, call: Call) -> Tensor:
        """What the layer's output projection gets, `[1, L, H V]`."""
        seen: list[Tensor] = []
        attention = self._attention(layer)

        def observe(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0])
            raise _Seen

        handle = output_projection(attention).register_forward_pre_hook(observe)
        try:
            self.run(layer, hidden, call)
        except _Seen:
            pass
        finally:
            handle.remove()
        (found,) = seen
        return found

    @contextmanager
    def as_teacher(self, *layers: int) -> Iterator[None]:
        """Inside, these layers (all, if none are named) have their pretrained attention."""
        chosen = layers or range(len(self))
        try:
            for layer in chosen:
                self._put(layer, self.teachers[layer])
            yield
        finally:
            for layer in chosen:
                self._put(layer, self.attentions[layer])

    def teacher_step(
        self, layer: int, hidden: Tensor, call: Call, *, attention_output: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What the pretrained block makes of `hidden`, and what its attention added where that is asked for."""
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

    def _returning_tuples(self, rows: Rows) -> list[bool]:
        """Which blocks return their hidden states in a tuple, as some families' do."""
        found: list[bool] = []
        handles = [
            block.register_forward_hook(lambda _, __, output: found.append(isinstance(output, tuple)))
            for block, _ in self._places
        ]
        try:
            with torch.no_grad():
                self.model(input_ids=rows.input_ids[:1, :2].to(self.model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return found

    @contextmanager
    def _passing(self, tuples: list[bool], hidden: list[Tensor], calls: list[list[Call]]) -> Iterator[None]:
        """Inside, blocks pass their hidden states on unchanged, and what they were called with is written down."""

        def passing(layer: int) -> Callable[..., Any]:
            def forward(*arguments: Any, **keywords: Any) -> Any:
                given = arguments[0] if arguments else keywords.pop("hidden_states")
                if layer == 0:
                    hidden.append(given)
                calls[-1].append((arguments[1:], keywords))
                return (given,) if tuples[layer] else given

            return forward

        blocks: list[Any] = [block for block, _ in self._places]
        try:
            for layer, block in enumerate(blocks):
                block.forward = passing(layer)
            yield
        finally:
            for block in blocks:
                del block.forward


class _Seen(Exception):
    """Everything that was wanted of a block has been seen."""


def output_projection(attention: LinearizedAttention) -> Any:
    """The module that takes the heads back to the model's width."""
    return getattr(attention, attention.family.projections["o"].rsplit(".", 1)[-1])


def _pretrained(attention: LinearizedAttention) -> LinearizedAttention:
    """The same layer with its pretrained attention; the weights are shared."""
    kept = MixerConfig(layers=[attention.layer_idx], recurrence="none", window=None, sinks=0)
    twin = LinearizedAttention(attention, attention.family, attention.layer, kept, attention.layer_idx)
    return twin.to(next(attention.parameters()).device).eval()
