"""A converted model's state after a text: read the text once, then continue it any number of times.

    state = State.read(model, tokenizer(manual, return_tensors="pt").input_ids)
    state.save("manual.state", model)
    state = State.load("manual.state", model)  # in another process, on another day
    answer = state.generate(model, question_ids, max_new_tokens=50)

A state has the size of the model's memory, independent of the text's length. If layers or heads keep softmax over the
whole past, their caches, and thus the state and its file, grow with the text.
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

    from transformers import DynamicCache

    from linearize.model import LayerMemory


@dataclass(frozen=True, eq=False)
class State:
    """The memory of B texts and their last tokens.

    Attributes:
        cache: one `LayerMemory` per layer, with every token but the last of each text.
        last: `[B, 1]` the last tokens, not yet read by the model, because the next tokens' logits come from them.
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
        """`[B]` tokens per text, without pads."""
        return self.layers[0].counts.to(self.last.device) + 1

    @property
    def nbytes(self) -> int:
        """Bytes of the memory over all layers and rows."""
        return sum(layer.nbytes for layer in self.layers)

    @classmethod
    def read(
        cls,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: State | None = None,
    ) -> State:
        """Read texts in pieces, so peak memory does not depend on their length.

        Args:
            model: a converted model, or a `PeftModel` around one.
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 0 at pads, in any position; None without pads.
            state: an earlier state of B rows to continue; it is not changed. With it a row may have no new token.

        Raises:
            DataError: a row has no tokens, or `state` has another number of rows.
            StateError: the model was not converted.
        """
        cache, ids, real = prepared(model, input_ids, attention_mask, state)
        last, ids, real = without_last(ids, real)
        read_through(model, cache, ids, real)
        return cls(cache, last.to(model.device))

    def fork(self, copies: int = 1) -> State:
        """An independent copy. With `copies` above 1 each row is repeated that many times in adjacent rows: one prefix
        for several continuations."""
        memories = [layer.clone() for layer in self.layers]
        for memory in memories:
            memory.batch_repeat_interleave(copies)
        return State(_cache(memories), self.last.repeat_interleave(copies, 0))

    def generate(
        self, model: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any
    ) -> Any:
        """Continue the texts, and leave the state unchanged.

        Args:
            input_ids, attention_mask: optional text to read first, see `read`.
            options: of transformers' `generate`. A state does not store tokens, so logits processors do not see the
                text that the state has read. `repetition_penalty` sees `input_ids` and the new tokens; with
                transformers' own loop, processors see the last token and the new tokens.

        Returns:
            the new tokens `[B, N]`, or B times `num_return_sequences` rows. With `return_dict_in_generate`,
            transformers' output whose `sequences` are the new tokens; without beams, `State(output.past_key_values,
            output.sequences[:, -1:])` is then the state of rows that did not end early.

        `linearize.generation.engine` runs the options that `linearize.generation.sampling` supports; transformers'
        `generate` runs others, such as beams.

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
        # `generate()` repeats ids and positions for beams and samples, but not the cache.
        cache = state.fork(max(width or 1 for width in widths)).cache
        # Positions are explicit, because `generate()` would count them from a mask over the whole text, pads included.
        # A mask longer than the ids marks the ids as new; its exact length does not matter.
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
        """Write the state to a safetensors file. The file is written beside `path` and then renamed, so an interruption
        keeps an old file intact.

        Args:
            model: the model that read the text; only the same model can load the file.

        Returns:
            bytes of the file, independent of the text's length; for exceptions see the head of this module.

        Raises:
            OutputError: the folder is missing or not writable, another kind of file exists at `path`, or the disk is
                full.
            StateError: the state belongs to another model, or has values that are not finite.
        """
        layers = [layer.clone() for layer in self.layers]
        return statefile.write(_absolute(path), _converted(model), layers, self.last)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> State:
        """Read a file from `save` onto the devices of `model`. Names and shapes in the file's head are verified before
        data is read, then the data.

        Raises:
            StateError: the file is missing, not a state, cut off, damaged, or another model's.
        """
        memories, last = statefile.read(_absolute(path), _converted(model))
        return cls(_cache(memories), last)


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(path).expanduser().absolute()
