"""A converted model's state after a text: read the text once, then continue it any number of times.

    state = State.read(model, tokenizer(manual, return_tensors="pt").input_ids)
    state.save("manual.state", model)
    state = State.load("manual.state", model)  # in another process, on another day
    answer = state.generate(model, question_ids, max_new_tokens=50)

A state has the size of the model's memory, whatever the length of the text, unless layers or heads of the model keep
softmax over the whole past: what these remember grows with the text, and the file with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from linearize.generation import statefile
from linearize.generation.prompt import _cache, _converted, prepared, read_through, without_last

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from transformers import DynamicCache

    from linearize.model import LayerMemory


@dataclass(frozen=True, eq=False)
class State:
    """The memory of B texts and their last tokens.

    Attributes:
        cache: one `LayerMemory` per layer, with every token but the last of each text.
        last: `[B, 1]` the last tokens, which the model has yet to read: what comes next depends on them.
    """

    cache: DynamicCache
    last: Tensor

    @property
    def layers(self) -> list[LayerMemory]:
        """The memory of each layer."""
        held: list[LayerMemory] = self.cache.layers
        return held

    @property
    def tokens(self) -> Tensor:
        """`[B]` how many tokens each text has, pads not counted."""
        return self.layers[0].counts.to(self.last.device) + 1

    @property
    def nbytes(self) -> int:
        """Bytes of the memory, all layers and rows together."""
        return sum(layer.nbytes for layer in self.layers)

    @classmethod
    def read(
        cls,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: State | None = None,
        into: Sequence[LayerMemory] | None = None,
    ) -> State:
        """Reads texts, in pieces, so that memory does not depend on their length.

        Args:
            model: a converted model, also inside a `PeftModel`.
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 0 at pads, which may stand anywhere; None where there are none.
            state: of B rows, what came before; it is not changed. A row may have no new token then.
            into: memories of B rows to write over, which are the new state's; by default new ones.

        Raises:
            DataError: a row has no tokens, or `state` another number of rows.
            StateError: the model was not converted.
        """
        cache, ids, real = prepared(model, input_ids, attention_mask, state, into)
        last, ids, real = without_last(ids, real)
        read_through(model, cache, ids, real)
        return cls(cache, last.to(model.device))

    def fork(self, copies: int = 1) -> State:
        """An independent copy. With `copies` above 1 each row comes so many times, its copies side by side: one prefix
        for many continuations."""
        memories = [layer.clone() for layer in self.layers]
        for memory in memories:
            memory.batch_repeat_interleave(copies)
        return State(_cache(memories), self.last.repeat_interleave(copies, 0))

    def generate(
        self, model: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any
    ) -> Any:
        """Continues the texts with new tokens, or straight on, and leaves the state as it is.

        Args:
            input_ids, attention_mask: what to read first, see `read`.
            options: of transformers' `generate`. What looks back over the text there does not see what was read
                before, for a state does not keep the tokens: `repetition_penalty` sees `input_ids` and what is written,
                what is left to transformers the last token and what is written.

        Returns:
            the new tokens alone `[B, N]`, or B times `num_return_sequences` rows. With `return_dict_in_generate`,
            transformers' output with these as its `sequences`; where there were no beams,
            `State(output.past_key_values, output.sequences[:, -1:])` is the state after them, of rows that did not
            end early.

        `linearize.generation.engine` writes what `linearize.generation.sampling` supports; transformers writes the
        rest, such as beams.

        Raises:
            DataError, StateError: see `read`.
        """
        from linearize.generation.engine import Engine
        from linearize.generation.sampling import Sampling

        converted = _converted(model)
        streamer, asked = options.get("streamer"), {n: x for n, x in options.items() if n != "streamer"}
        sampling = Sampling.of(asked.pop("generation_config", None) or converted.generation_config, asked)
        if sampling is not None:
            whole = bool(options.get("return_dict_in_generate"))
            if streamer is not None:
                streamer.put(self.last.cpu())
            written = Engine(model).generate(
                sampling,
                input_ids,
                attention_mask,
                state=self,
                write=None if streamer is None else streamer.put,
                keep=whole,
            )
            if streamer is not None:
                streamer.end()
            if written.state is None:
                return written.tokens
            return GenerateDecoderOnlyOutput(sequences=written.tokens, past_key_values=written.state.cache)
        state = self if input_ids is None else State.read(model, input_ids, attention_mask, self)
        settings = options.get("generation_config") or converted.generation_config
        widths = [options.get(name, getattr(settings, name)) for name in ("num_beams", "num_return_sequences")]
        # generate() repeats ids and positions for beams and samples, and leaves the cache to us.
        cache = state.fork(max(width or 1 for width in widths)).cache
        # Positions must be given: generate() would count them from a mask over the whole text, pads and all. And a
        # mask longer than the ids is how it is told that the ids are new; how much longer does not matter.
        output = model.generate(
            state.last,
            attention_mask=state.last.new_ones(state.last.shape[0], 2),
            position_ids=state.tokens[:, None] - 1,
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        if isinstance(output, Tensor):
            return output[:, 1:]
        output.sequences = output.sequences[:, 1:]
        return output

    def save(self, path: str | os.PathLike[str], model: Any) -> int:
        """Writes a safetensors file, beside its place first, so that an interruption leaves an old file as it was.

        Args:
            model: the one that read the text; only with it can the file be loaded.

        Returns:
            bytes of the file: the same for a text of any length, see the head of this module.

        Raises:
            OutputError: the folder is missing or closed, something else than a state is there, or the disk is full.
            StateError: the state is another model's, or has values that are not finite.
        """
        layers = [layer.clone() for layer in self.layers]
        return statefile.write(_absolute(path), _converted(model), layers, self.last)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> State:
        """Reads a file that `save` wrote, onto the devices of `model`. Everything is verified before it is used: names
        and shapes from the file's head, before its data are read, then the data.

        Raises:
            StateError: no such file; not a state, cut off or damaged; another model's.
        """
        memories, last = statefile.read(_absolute(path), _converted(model))
        return cls(_cache(memories), last)


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(path).expanduser().absolute()
