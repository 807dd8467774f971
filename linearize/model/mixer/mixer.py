"""The layer on one page: softmax over window and sinks, a gated recurrence over the rest, and their mix.

    y_t   softmax over the last W tokens and the first M (sinks), with the family's positions
    o_t   the outputs of the recurrence, without positions; its gate comes from the pretrained keys
    out   mix(y_t, o_t)

With `covers: evicted` the state receives a token when the token leaves the window: query t reads the state after token
t - W, so window, sinks and state count every token of the past once.

`forward` computes this for several tokens in plain PyTorch. The other paths compute the same function:

    window.py           the window and the sinks of rows that continue a memory
    step.py             one token per row
    fused.py            window, sinks, recurrence and mix in one kernel; `trial.py` checks the kernel on the device
    landmarks/          exact slots for some of the tokens that leave the window
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from linearize_kernels import window_attention
from linearize_kernels.codes import rounded
from linearize_kernels.window import TINY, mix_outputs
from torch import Tensor

from linearize.model.landmarks.prompt import codes_prompt
from linearize.model.landmarks.slots import kept_names, landmark_parts
from linearize.model.memory import clear
from linearize.model.mixer.base import ExactColumns, MixerBase
from linearize.model.mixer.fused import fused_attention, fused_step, fuses
from linearize.model.mixer.step import step, steps
from linearize.model.mixer.window import fill, slide, starts
from linearize.model.precision import empty_slots, exact_bits

if TYPE_CHECKING:
    from linearize.families.base import Projections
    from linearize.model.layout import Layout
    from linearize.model.memory import LayerMemory, Part


class Mixer(MixerBase):
    """Window, sinks and recurrence on rows of real tokens; see `MixerBase` for its arguments."""

    def forward(
        self, new: Projections, lengths: Tensor | None, memory: LayerMemory | None, *, fused: bool | None = None
    ) -> Tensor:
        """Mix L new tokens `[R, L, ...]` to `[R, L, H, V]`; see `MixerBase.forward` for the arguments."""
        fused = fuses(self, new, memory) if fused is None else fused
        new = self._as_stored(new, memory, fused=fused)
        if self.config.landmarks or fused or steps(self, new, lengths, memory):
            return self._alternative(new, lengths, memory, fused)
        config, recurrence, window, tokens = self.config, self.recurrence, self.window, new.q.shape[1]

        # Keys and values: those of the new tokens, the sinks, and the tokens that leave the window.
        writes: Tensor | None = None  # [R or 1, E], True for the tokens that the state receives; None means all
        empty: Tensor | None = None  # [R or 1, E], True for queries whose state is empty; None means none of them
        if memory is None or starts(memory, lengths):
            k_rotated, v, exists, columns = new.k_rotated, new.v, None, self.sinks(new)
            # Token s leaves the window with query s + W; all rows have the same sinks, which are skipped.
            skip, left = config.sinks if lengths is None else 0, max(tokens - window, 0)
            first, source = window + skip, self.source(new)[:, skip:left]
            k_evicted, v_evicted = (new.k_rotated if config.rope else new.k)[:, skip:left], new.v[:, skip:left]
            if lengths is not None:
                index = torch.arange(left, device=v.device)[None]
                writes, empty = (index < lengths[:, None] - window) & (index >= config.sinks), index < config.sinks
            if memory is not None:
                fill(self, new, memory)
        else:
            span = slide(self, new, lengths, memory)
            k_rotated, v, exists, columns = span.k_rotated, span.v, span.exists, span.columns
            first, source, writes = span.evicted.first, span.evicted.source, span.evicted.writes
            k_evicted, v_evicted = span.evicted.k_rotated if config.rope else span.evicted.k, span.evicted.v
            empty = None if writes is None else span.evicted.index < config.sinks

        # Softmax over the window and the sinks.
        y, log = window_attention(
            new.q_rotated,
            k_rotated,
            v,
            window=window,
            scale=self.layer.scale,
            key_exists=exists,
            columns=columns,
            softcap=self.layer.softcap,
            normaliser=config.mix == "softmax",
        )
        if "window" in self.branches_off:
            y = torch.zeros_like(y)
        if recurrence is None or "recurrence" in self.branches_off:
            return y

        # The recurrence: query `first` + t reads the state after its t-th token is written.
        if config.covers == "all":
            k_evicted, v_evicted, source = new.k_rotated if config.rope else new.k, new.v, self.source(new)
            first, empty = 0, None
            writes = None if lengths is None else torch.arange(tokens, device=y.device) < lengths[:, None]
        if v_evicted.shape[1] == 0:
            return y
        q = (new.q_rotated if config.rope else new.q)[:, first:]
        state = memory.parts["state"] if memory is not None else None
        read, mass = recurrence.in_segments(q, k_evicted, v_evicted, source, writes, state)

        # The mix.
        log = None if log is None else log[:, first:]
        mixed = self.mix(y[:, first:], log, read, None if mass is None else mass[..., None])
        if empty is not None:
            mixed = torch.where(empty[:, :, None, None], y[:, first:], mixed)
        return torch.cat([y[:, :first], mixed], 1) if first else mixed

    def documents(self, new: Projections, layout: Layout) -> Tensor | None:
        """Mix packed documents `[B, T, ...]` to `[B, T, H, V]`, pads included; None if no fused kernel runs."""
        if self.config.landmarks or not fuses(self, new, None):
            return None
        return fused_attention(self, self._as_stored(new, None), None, None, documents=layout.runs)

    def _as_stored(self, new: Projections, memory: LayerMemory | None, *, fused: bool = False) -> Projections:
        """The projections as a memory in 8 or 4 bits stores them, so every reader of a token sees the same."""
        if fused and memory is not None and self.config.landmarks and (new.q.shape[1] == 1 or codes_prompt(self, new)):
            return new  # those kernels code keys and values themselves
        steps = memory is not None and new.q.shape[1] == 1 and not torch.is_grad_enabled()
        if self.config.memory_dtype == "auto" or (steps and self.config.landmarks):
            return new  # with landmarks a step codes its token itself
        new = self.in_code(new)
        if steps and self.config.covers == "evicted":
            return new  # a step reads its own token from the memory, but for a state of all tokens
        return new._replace(**{name: self._rounded(getattr(new, name)) for name in self._kept() if name != "source"})

    def in_code(self, new: Projections, *, keys: bool = True) -> Projections:
        """Keys as they are coded, `scale * k + shift` per channel, and queries divided by the scale; without `keys`, a
        kernel codes those.

        The scale changes no score, and the shift moves all scores of a query alike, so the softmax stays the same."""
        if "key_scale" not in self._parameters:
            return new
        scale, shift = (x.detach().to(new.k_rotated.dtype) for x in (self.key_scale, self.key_shift))
        q = (new.q_rotated.unflatten(2, (len(scale), -1)) / scale[:, None]).flatten(2, 3)
        k = torch.addcmul(shift, scale, new.k_rotated) if keys else new.k_rotated
        return new._replace(q_rotated=q, k_rotated=k)

    def _rounded(self, x: Tensor) -> Tensor:
        bits = exact_bits(self.config)
        return rounded(x, bits) if bits else x

    def sinks(self, new: Projections) -> ExactColumns | None:
        sinks, left = self.config.sinks, new.q.shape[1] - self.window
        if not sinks or left <= 0:
            return None
        number = torch.arange(sinks, device=new.q.device)
        leaving = torch.arange(new.q.shape[1], device=new.q.device)[None, :, None] - self.window
        # Sinks that have not left the window are not visible in the columns.
        k, v = (x.index_select(1, number.clamp(max=left - 1)) for x in (new.k_rotated, new.v))
        return k, v, number <= leaving

    def source(self, new: Projections) -> Tensor:
        kind = self.config.gate_source
        if kind == "q":
            averaged: Tensor = new.q.unflatten(2, (self.layer.key_value_heads, -1)).mean(3)
            return self._rounded(averaged) if self.config.covers == "evicted" else averaged
        return new.v if kind == "v" else new.k

    def mix(self, y: Tensor, normaliser: Tensor | None, read: Tensor, mass: Tensor | None) -> Tensor:
        if "window" in self.branches_off:
            if mass is None or not (self.config.normalize or self.config.mix == "softmax"):
                return read
            return torch.where(mass > 0, read / mass.clamp_min(TINY), 0)
        return mix_outputs(
            y,
            normaliser,
            read,
            mass,
            mix=self.config.mix,
            normalize=self.config.normalize,
            weight=self._parameters.get("mix_weight"),
        )

    def _alternative(self, new: Projections, lengths: Tensor | None, memory: LayerMemory | None, fused: bool) -> Tensor:
        """`forward` by another path."""
        if self.config.landmarks and not (fused and memory is not None and new.q.shape[1] == 1):
            # A lazy import, because its `torch.compiler.disable` imports torch._dynamo, which takes two seconds.
            from linearize.model.landmarks.chunks import landmark_attention

            attended: Tensor = landmark_attention(self, new, lengths, memory, fused=fused)
            return attended
        if memory is None or new.q.shape[1] > 1:
            return fused_attention(self, new, lengths, memory)
        return fused_step(self, new, lengths, memory) if fused else step(self, new, memory)

    def parts(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Part]:
        """An empty memory for `batch` rows: tensors whose size depends on the configuration alone."""

        def slots(count: int, *names: str, bits: int = exact_bits(self.config)) -> Part:
            part: Part = {}
            for name in names:
                part |= empty_slots(self.layer, name, (batch, count), dtype, device, bits)
            return part

        if self.config.landmarks:
            parts = landmark_parts(self, slots, batch, device)
        else:
            parts = {"window": slots(self.window, *self._kept())}
            if self.config.sinks:
                parts["sinks"] = slots(self.config.sinks, "k_rotated", "v")
        clear(*parts.values())
        if self.recurrence is not None:
            state = self.recurrence.state(batch, device)
            parts["state"] = {name: x.double() if dtype == torch.float64 else x for name, x in state.items()}
        return parts

    def _kept(self) -> tuple[str, ...]:
        """The names of the tensors that the memory keeps per token."""
        if self.config.landmarks:
            return kept_names(self)
        # The state receives a token when it leaves the window, so the window keeps the tensors that the state takes.
        waits = self.recurrence is not None and self.config.covers == "evicted"
        more = ("k", "source") if waits and self.config.gate_source == "q" else ("k",) if waits else ()
        return ("k_rotated", *more, "v")
