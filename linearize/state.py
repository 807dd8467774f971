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

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput

from linearize import statefile
from linearize.errors import DataError, StateError
from linearize.model import LayerMemory, LinearizedForCausalLM
from linearize.model.memory import recount

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

# A long text is read in pieces, so that peak memory does not depend on its length either. So many tokens of all rows
# together keep the device busy; not measured on a GPU yet.
_PIECE = {"cpu": 2048, "cuda": 8192}
_SHORTEST = 256  # a piece has a whole window to bring along


def prefill_chunk(device: torch.device, rows: int = 1) -> int:
    """Number of tokens of each of `rows` texts that are read at once."""
    return max(_PIECE.get(device.type, _PIECE["cpu"]) // max(rows, 1), _SHORTEST)


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

        What `linearize.sampling` follows is written by `linearize.decoding`; the rest, such as beams, by transformers.

        Raises:
            DataError, StateError: see `read`.
        """
        from linearize.decoding import Engine
        from linearize.sampling import Sampling

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


def prepared(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    state: State | None,
    into: Sequence[LayerMemory] | None,
) -> tuple[DynamicCache, Tensor, Tensor | None]:
    """Memories as they are before a text is read, its tokens `[B, T]`, and which of them are real (None: all). The
    arguments are those of `State.read`."""
    converted = _converted(model)
    ids, rows = input_ids, input_ids.shape[0]
    real = None if attention_mask is None else (attention_mask.to(ids.device) != 0).long()
    if state is None:
        memories = statefile.empty_memories(converted, rows) if into is None else list(into)
        for memory in into or ():
            memory.reset()
    elif state.last.shape[0] == rows:
        memories = [layer.clone() for layer in state.layers] if into is None else list(into)
        if into is not None:
            for memory, earlier in zip(into, state.layers, strict=True):
                memory.take(earlier)
            recount(into)
        ids = torch.cat([state.last.to(ids), ids], 1)
        real = None if real is None else torch.cat([real.new_ones(rows, 1), real], 1)
    else:
        raise DataError(
            f"the state has {state.last.shape[0]} rows and input_ids {rows}; state.fork(copies) repeats rows"
        )
    some = torch.full((rows,), ids.shape[1] > 0) if real is None else real.any(1)
    if not bool(some.all()):
        raise DataError(f"row {int(some.int().argmin())} of the prompt has no tokens; give each row some")
    return _cache(memories), ids, real


def read_through(model: Any, cache: DynamicCache, ids: Tensor, real: Tensor | None) -> Tensor | None:
    """Reads a text piece by piece, from where it lies; the logits after its last column, `[B, vocabulary]`, if any."""
    chunk, out = prefill_chunk(model.device, ids.shape[0]), None
    with torch.no_grad():
        for start in range(0, ids.shape[1], chunk):
            own = slice(start, start + chunk)
            piece, mask = ids[:, own].to(model.device), None if real is None else real[:, own].to(model.device)
            out = model(piece, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return None if out is None else out.logits[:, -1]


def without_last(ids: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The last token of each row `[B, 1]`, then the tokens before it and which of these are real (None: all)."""
    if real is None:
        return ids[:, -1:].clone(), ids[:, :-1], None
    at = (real * torch.arange(1, ids.shape[1] + 1, device=ids.device)).argmax(1, keepdim=True)
    last, real = ids.gather(1, at), real.scatter(1, at, 0)
    columns = real.any(0)
    return last, ids[:, columns], real[:, columns]


def _converted(model: Any) -> LinearizedForCausalLM:
    converted = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(converted, LinearizedForCausalLM):
        raise StateError(
            f"{type(model).__name__} is not a converted model, so it has no state to keep; convert it first"
        )
    return converted


def _cache(memories: Sequence[LayerMemory]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = list(memories)
    return cache


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(path).expanduser().absolute()
