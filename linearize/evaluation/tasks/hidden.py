"""Logits of a text some positions at a time, because all of them take gigabytes with a large vocabulary.

A text is read up to the last hidden states. The model's own forward then makes logits of a few of them, with the output
scales and softcaps of its architecture.

Dimensions: B rows, T tokens a row, N positions read, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Logits that exist at one time: 32 MB in float32, and a few times that while they are compared.
LOGITS = 2**23
# Rows times tokens of one forward pass. The hidden layer of an MLP of width 14,336 takes 0.23 GB of them in float32.
TOKENS = 4096
# Rows times new tokens times all tokens: entries of an attention mask, which PyTorch turns into floats on a CPU.
_MASK = 2**24
# Rows times tokens of prompts that are continued together: their cache stays while they are written.
PROMPTS = 4 * TOKENS
_SHORTEST = 64


class Hidden:
    """The last hidden states of some tokens.

    Attributes:
        states: `[B, N, D]`.
        cache: what the model returned as its cache; None without one.
    """

    def __init__(self, model: Any, states: Tensor, cache: Any, output: type[Any] | None) -> None:
        self.states, self.cache = states, cache
        self.model, self._output = model, output

    def logits(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits `[n, V]` in the model's dtype, at n positions."""
        chosen = self.states[rows.to(self.states.device), columns.to(self.states.device)]
        if self._output is None:  # a model without a body of its own: these are logits already
            return chosen
        given, body = _rebuilt(self._output, chosen[None]), _body(self.model)
        before = body.__dict__.get("forward")  # accelerate puts its own there
        body.forward = lambda *_, **__: given
        try:
            ids = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            del body.forward
            if before is not None:
                body.forward = before
        return found

    def slices(self) -> Iterator[tuple[int, Tensor]]:
        """(start, float32 logits `[B, n, V]` of the positions start, start + 1, ...), all positions in their order."""
        rows, width = self.states.shape[:2]
        length = positions_at_once(self.model, rows)
        for start in range(0, width, length):
            columns = torch.arange(start, min(start + length, width))
            logits = self.logits(torch.arange(rows).repeat_interleave(len(columns)), columns.repeat(rows))
            yield start, logits.float().view(rows, len(columns), -1)


def hidden_states(model: Any, **inputs: Any) -> Hidden:
    """One forward pass of a causal LM, in which it makes the logits of each row's last position alone."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    body, taken = _body(model), list[tuple[type[Any], Tensor]]()
    if body is model:
        whole = model(**inputs)
        return Hidden(model, whole.logits, getattr(whole, "past_key_values", None), None)

    def take(_: Any, __: Any, output: Any) -> Any:
        taken.append((type(output), output[0]))
        return _replaced(output, output[0][:, -1:])

    handle = body.register_forward_hook(take)
    try:
        cache = getattr(model(**inputs), "past_key_values", None)
    finally:
        handle.remove()
    return Hidden(model, taken[0][1], cache, taken[0][0])


def logits_at(
    model: Any, rows: Tensor, columns: Tensor, *, through: Callable[..., Any] | None = None, **inputs: Any
) -> Tensor:
    """Logits `[n, V]` of one forward pass of a causal LM at n positions; no others are made.

    Args:
        rows, columns: `[n]` indexes, on the model's device.
        through: what is called, if it is not the model but wraps it.
    """
    body, call = _body(model), through or model
    if body is model:
        every: Tensor = call(**inputs).logits
        return every[rows, columns]
    handle = body.register_forward_hook(lambda _, __, output: _replaced(output, output[0][rows, columns][None]))
    try:
        chosen: Tensor = call(**inputs).logits
    finally:
        handle.remove()
    return chosen[0]


def pieces(
    model: Any,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    cache: Any = None,
    first: int = 0,
    keep_cache: bool = False,
) -> Iterator[tuple[int, Hidden]]:
    """Read texts piece by piece on a cache, as one forward pass would read them.

    Args:
        model: in eval mode, called without gradients.
        ids: `[B, T]`, on any device.
        mask: `[B, P + T]` of real tokens, those of the cache included, or None for no pads.
        positions: position ids `[B, T]`; None leaves them to the model.
        cache: a cache of P tokens to go on from; None starts a text.
        first: the first position whose state is wanted.
        keep_cache: return a cache even where one piece is enough.

    Yields:
        (start, states of the positions start, start + 1, ...), from `first` on.
    """
    rows, length = ids.shape
    past = 0 if mask is None else mask.shape[1] - length
    step = max(_SHORTEST, min(TOKENS // rows, _MASK // (rows * (past + length))))
    start = 0
    while start < length:
        stop = min(start + step, length)
        found = _piece(model, ids, mask, positions, cache, start, stop, keep_cache or stop < length or start > 0)
        if found.cache is None and stop < length:  # the model has no cache to go on from
            start, stop = 0, length
            found = _piece(model, ids, mask, positions, cache, start, stop, False)
        cache, wanted = found.cache, max(start, first)
        if wanted < stop:
            found.states = found.states[:, wanted - start :]
            yield wanted, found
        start = stop


def _piece(
    model: Any,
    ids: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    cache: Any,
    start: int,
    stop: int,
    use_cache: bool,
) -> Hidden:
    inputs: dict[str, Any] = {"input_ids": ids[:, start:stop].to(model.device), "use_cache": use_cache}
    if mask is not None:
        inputs["attention_mask"] = mask[:, : mask.shape[1] - ids.shape[1] + stop]
    if positions is not None:
        inputs["position_ids"] = positions[:, start:stop]
    if cache is not None:
        inputs["past_key_values"] = cache
    return hidden_states(model, **inputs)


def read(model: Any, ids: Tensor, *, first: int = 0, **options: Any) -> Hidden:
    """The states of the positions from `first` on; arguments as for `pieces`."""
    found = [piece for _, piece in pieces(model, ids, first=first, **options)]
    found[-1].states = torch.cat([piece.states for piece in found], 1)
    return found[-1]


def positions_at_once(model: Any, rows: int = 1) -> int:
    """The number of positions, in each of `rows` rows, whose logits may exist at one time."""
    return max(1, LOGITS // (rows * int(model.config.get_text_config().vocab_size)))


def rows_at_once(longest: int, most: int, tokens: int | None = None) -> int:
    """The number of rows, of up to `longest` tokens each, that go through the model together: at most `most`, and of
    at most `tokens` in all (by default `TOKENS`)."""
    return max(1, min(most, (tokens or TOKENS) // max(1, longest)))


def _body(model: Any) -> Any:
    """The module that makes the last hidden states."""
    return model.base_model


def _replaced(output: Any, states: Tensor) -> Any:
    """Put other hidden states into a body's output."""
    if isinstance(output, tuple):
        return (states, *output[1:])
    return type(output)(**{**output, "last_hidden_state": states})


def _rebuilt(output: type[Any], states: Tensor) -> Any:
    return (states,) if issubclass(output, tuple) else output(last_hidden_state=states)
