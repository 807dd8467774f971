"""The model under test, and the ways to call it."""

from __future__ import annotations

import itertools
import math
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize.errors import VerificationError
from linearize.sources.limits import learned_positions

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from transformers.cache_utils import Cache

    from linearize.model import LinearizedForCausalLM, MixerConfig
    from linearize.model.mixer.mixer import Mixer
    from linearize.sources.source import Source

ROWS = 3
_WINDOWS, _LEAST_TOKENS, _MOST_TOKENS = 3, 192, 2048
_SLACK = 16
FEW_SLOTS = 64
"""Landmarks per head during the checks of a model whose own take more than `_FULL` tokens to fill: with these, choosing
and merging begin after 163 tokens beside a window of 64 and 4 sinks."""
_FULL, _MOST_FULL = 512, 4096


class Subject:
    """A model under test, with rows of random tokens.

    Args:
        model: loaded from `source` in `dtype`, a key of `DTYPES` or `auto`.
        special: token ids that do not occur inside a text.
        tokens: row length; None for three times the widest window, at least 192, and then with `FEW_SLOTS` landmarks if
            the model's own take too many tokens to fill.
        steps: single decode steps of the drift check; None for two row lengths.
        tick: called by long checks with the completed steps and their total.

    Attributes:
        alone: logits `[T, V]` of one row of `ids` from one parallel forward without a cache; cached.
        stepped: logits `[T, V]` of the first row of `ids`, read token by token, and the cache after it; cached.
        tolerance: the maximum error of checks that are not exact; set later.
        doing: the name of the running check.
        full_tokens: the row length that fills every window and all landmarks, at most 4,096 and at most the model's
            positions; None unless the model has fewer landmarks than its own during the checks.

    Raises:
        VerificationError: `tokens` do not fill a window and its sinks, or exceed the model's positions.
    """

    def __init__(
        self,
        model: LinearizedForCausalLM,
        source: Source,
        *,
        dtype: str,
        special: Collection[int],
        tokens: int | None,
        steps: int | None,
        tick: Callable[[int, int], None],
    ) -> None:
        self.model, self.source, self.dtype, self.tick = model, source, dtype, tick
        self.tolerance, self.doing = 0.0, ""
        vocabulary = torch.arange(model.config.vocab_size)
        self._allowed = vocabulary[~torch.isin(vocabulary, torch.tensor(sorted(special), dtype=torch.long))]
        most = self._positions = learned_positions(model)
        widest, least, default = _lengths(model)
        self.full_tokens: int | None = None
        self._own: list[tuple[Mixer, MixerConfig]] = []
        if tokens is None and least > _FULL:
            self.full_tokens = min(least + _FULL, _MOST_FULL, most or _MOST_FULL)
            self._own = [(mixer, mixer.config) for mixer in _mixers(model) if mixer.config.landmarks > FEW_SLOTS]
            self._shrink()
            widest, least, default = _lengths(model)
        self.tokens = tokens or max(min(default, most or default), least)
        self.steps = steps or 2 * self.tokens
        if self.tokens < least:
            slots = any(mixer.config.landmarks for mixer in _mixers(model))
            exact = "window, sinks and slots" if slots else "window and sinks"
            raise VerificationError(
                f"{source.name}: {self.tokens} tokens do not fill its {exact}; give --tokens {least} or more"
            )
        if most is not None and self.tokens > most:
            raise VerificationError(f"{source.name}: has no more than {most} positions; give --tokens {most} or fewer")
        self.window = max(2, min(widest, self.tokens // 2))
        self.ids = self.random(ROWS, self.tokens, seed=0)
        self.forget()

    def forget(self) -> None:
        """Empty the caches of `alone` and `stepped`, after a change of the weights."""
        self.alone: Callable[[int], Tensor] = cache(lambda row: self.parallel(self.ids[row : row + 1])[0])
        self.stepped: Callable[[], tuple[Tensor, Cache]] = cache(self._steps)

    def _shrink(self) -> None:
        for mixer, own in self._own:
            mixer.config = replace(own, landmarks=FEW_SLOTS)

    def restore(self) -> None:
        """Give the model its own number of landmarks."""
        for mixer, own in self._own:
            mixer.config = own

    @contextmanager
    def full(self) -> Iterator[None]:
        """In this context the model has its own number of landmarks. `alone` must not be used in it."""
        self.restore()
        try:
            yield
        finally:
            self._shrink()

    @contextmanager
    def uncoded(self) -> Iterator[None]:
        """In this context keys and values are stored in the model's dtype, not as codes."""
        own = [(mixer, mixer.config) for mixer in _mixers(self.model)]
        for mixer, config in own:
            mixer.config = replace(config, memory_dtype="auto")
        self.forget()
        try:
            yield
        finally:
            for mixer, config in own:
                mixer.config = config
            self.forget()

    def random(self, rows: int, tokens: int, seed: int) -> Tensor:
        """Random token ids `[rows, tokens]` without special tokens."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self._allowed), (rows, tokens), generator=generator)
        return self._allowed[chosen].to(self.model.device)

    def at(self, start: int, tokens: int) -> dict[str, Tensor]:
        """Explicit `position_ids` if the text is longer than the model's positions; empty otherwise. Positions restart
        at 0, because memory and drift do not depend on them."""
        if self._positions is None:
            return {}
        positions = torch.arange(start, start + tokens, device=self.model.device) % self._positions
        return {"position_ids": positions[None]}

    def parallel(self, ids: Tensor, **options: Any) -> Tensor:
        """Logits `[B, T, V]` of one forward without a cache."""
        logits: Tensor = self.model(ids, use_cache=False, **options).logits
        return logits

    def read(self, ids: Tensor, sizes: Iterable[int], held: Cache | None = None) -> Iterator[tuple[Tensor, Cache]]:
        """Logits `[B, t, V]` of forwards that continue one cache, and the cache; `sizes` repeats until all tokens are
        read."""
        start, size = 0, itertools.cycle(sizes)
        while start < ids.shape[1]:
            piece = ids[:, start : start + next(size)]
            result = self.model(piece, past_key_values=held, use_cache=True)
            held, start = result.past_key_values, start + piece.shape[1]
            yield result.logits, held

    def pieces(self, ids: Tensor, sizes: Iterable[int], held: Cache | None = None) -> Tensor:
        """Logits `[B, T, V]` of `read`."""
        return torch.cat([logits for logits, _ in self.read(ids, sizes, held)], 1)

    def _steps(self) -> tuple[Tensor, Cache]:
        steps = [*self.read(self.ids[:1], [1])]
        return torch.cat([logits for logits, _ in steps], 1)[0], steps[-1][1]

    def padded(self, side: str, starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`lengths[b]` tokens of row b from `starts[b]` on, padded on `side`, and their mask. Pads are random tokens,
        so reading one changes the result."""
        width = max(lengths) + 7
        tokens = self.random(len(lengths), width, seed=1)
        mask = torch.zeros_like(tokens)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            first = {"left": width - length, "right": 0, "both": (width - length) // 2}[side]
            tokens[row, first : first + length] = self.ids[row, start : start + length]
            mask[row, first : first + length] = 1
        return tokens, mask


def _lengths(model: LinearizedForCausalLM) -> tuple[int, int, int]:
    """The widest window; the least row length that fills every converted window and its sinks; and the default row
    length. The default is `_WINDOWS` windows, at most `_MOST_TOKENS`. A model's own sliding windows count as the widest
    only if conversion set none."""
    mixers = _mixers(model)
    ours = [mixer for mixer in mixers if mixer.window != mixer.layer.window]
    widest = max((mixer.window for mixer in ours or mixers), default=0)
    least = max((mixer.config.exact_tokens for mixer in ours), default=0) + _SLACK
    return widest, least, max(_LEAST_TOKENS, min(_WINDOWS * widest, _MOST_TOKENS), least)


def _mixers(model: LinearizedForCausalLM) -> list[Mixer]:
    return [attention.mixer for attention in model.attention_layers if attention.mixer is not None]


def relative_error(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b| in float32; infinite for different shapes or values that are not finite."""
    a, b = a.float(), b.float()
    if a.shape != b.shape:
        return math.inf
    return ratio(largest(a - b), largest(b))


def largest(x: Tensor) -> float:
    """max |x|; infinite if a value is not finite."""
    # `aminmax` makes no copy of x, which may be all logits of a long text. It is NaN if a value is.
    least, most = (abs(float(end)) for end in x.aminmax())
    return max(least, most) if math.isfinite(least + most) else math.inf


def ratio(apart: float, size: float) -> float:
    """`apart / size`; infinite if one is not finite, or if only `size` is 0."""
    if not (math.isfinite(apart) and math.isfinite(size)):
        return math.inf
    return apart / size if size else (0.0 if apart == 0 else math.inf)
