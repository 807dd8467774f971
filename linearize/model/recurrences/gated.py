"""Recurrences of the form S_t = diag(g_t) S_{t-1} + k_tᵀ v_t, o_t = q_t S_t. They differ in the gate, in the written
key, and in the order of write and read. All run on one kernel, `linearize_kernels.gla`.

φ is the recipe's feature map; σ is the logistic function; x is the gate's input, scale * Pool(k) + bias.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from linearize_kernels import gla, gla_step
from torch import Tensor, nn

from linearize.model.recurrences.base import GateWidth, Recurrence, as_computed, held, keep, silenced

if TYPE_CHECKING:
    from linearize.families.base import AttentionLayer
    from linearize.model.configuration import MixerConfig
    from linearize.model.memory import Part


class Gated(Recurrence):
    """The shared part of these recurrences; subclasses define the gate and the written key."""

    def __init__(self, config: MixerConfig, layer: AttentionLayer, depth: float = 0.0) -> None:
        super().__init__(config, layer, depth)
        divides = config.normalize or config.mix == "softmax"
        if divides and self.has_mass and config.feature_map == "identity":
            option = "normalize: true" if config.normalize else "mix: softmax"
            raise ValueError(f"{option} needs a feature map that is never negative, not identity")

    def state(self, batch: int, device: torch.device) -> Part:
        # The last column holds the mass: it is the state of a value that is always 1.
        shape = (batch, self.key_value_heads, self.feature_width, self.value_width + 1)
        return {"state": torch.zeros(shape, dtype=torch.float32, device=device)}

    def written(self, k: Tensor, log_gate: Tensor) -> Tensor:
        """The written key for the projected keys `k` `[R, L, K, D]`: the feature map, unless a subclass replaces it."""
        return self.features(k)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, source: Tensor, writes: Tensor | None, state: Part | None
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, source = as_computed(q, k, v, source)
        in_place = self.in_place(q.shape[1], state)
        if in_place and writes is None and type(self).written is Gated.written:
            assert state is not None  # noqa: S101 - for the type checker; `in_place` has looked
            v, gate = torch.constant_pad_nd(v, (0, 1), 1.0), self.per_feature(self.gate(source))
            read = gla_step(self.features(q), self.features(k), v, gate, state["state"])
            return read[..., :-1], read[..., -1]
        log_gate = self.log_gate(source)
        k, log_gate = silenced(writes, self.written(k, log_gate), self.per_feature(log_gate))
        q, v = self.features(q), torch.constant_pad_nd(v, (0, 1), 1.0)
        if in_place:
            assert state is not None  # noqa: S101 - for the type checker; `in_place` has looked
            read = gla_step(q, k, v, log_gate.exp(), state["state"])
        else:
            read, final = gla(q, k, v, log_gate, held(state), form=self.form)
            keep(state, state=final)
        return read[..., :-1], read[..., -1]


class GatedLinearAttention(Gated):
    """GLA with Liger's gate: log g = logsigmoid(x) / divisor, per channel; φ(k) is written.

    With scale 1, bias 0 and divisor 16 this is the gate of Liger's released code.
    """

    paper: ClassVar[str] = "GLA, arXiv 2312.06635; Liger, arXiv 2503.01496"


class LinearAttention(Gated):
    """S_t = S_{t-1} + φ(k_t)ᵀ v_t, without any decay: the baseline of the other recurrences."""

    paper: ClassVar[str] = "Linear attention, arXiv 2006.16236"
    gates: ClassVar[GateWidth] = "none"
    update_flops: ClassVar[int] = 2

    def log_gate(self, source: Tensor) -> Tensor:
        return source.new_zeros(*source.shape[:-1], 1)


class Retention(Gated):
    """A fixed decay per head, γ_h = 1 - 2^(-5-h)."""

    paper: ClassVar[str] = "RetNet, arXiv 2307.08621"
    gates: ClassVar[GateWidth] = "none"

    def log_gate(self, source: Tensor) -> Tensor:
        head = torch.arange(self.key_value_heads, dtype=source.dtype, device=source.device)
        return torch.log1p(-torch.exp2(-5 - head))[:, None].expand(*source.shape[:-1], 1)


class GatedRetention(Gated):
    """One gate per head: log g = logsigmoid(x) / divisor."""

    paper: ClassVar[str] = "Gated retention (YOCO), arXiv 2405.05254"
    gates: ClassVar[GateWidth] = "head"


class HGRN2(Gated):
    """g = γ + (1 - γ) σ(x)^(1/divisor) per channel, and 1 - g is written instead of the key; γ is the recipe's lower
    bound in the last layer, 0 in the first, and grows linearly in between. (Liger's released code has γ = 0.)"""

    paper: ClassVar[str] = "HGRN2, arXiv 2404.07904"
    mapped: ClassVar[str] = "q"

    def written(self, k: Tensor, log_gate: Tensor) -> Tensor:
        return self.per_feature(-torch.expm1(log_gate))


class Mamba2(Gated):
    """One gate per head: g = exp(-softplus(x) / divisor)."""

    paper: ClassVar[str] = "Mamba-2, arXiv 2405.21060"
    gates: ClassVar[GateWidth] = "head"
    gate_start: ClassVar[tuple[float, float]] = (0.1, -5.0)

    def log_gate(self, source: Tensor) -> Tensor:
        return -F.softplus(self.gate_input(source)) / self.config.gate_divisor


class RWKV6(Gated):
    """g = exp(-exp(x) / divisor) per channel. A token reads the state before its own write, and itself with a bonus u:

    o_t = q_t (S_{t-1} + diag(u) k_tᵀ v_t)

    u = exp(log_bonus), so the mass stays positive; u starts at 1.
    """

    paper: ClassVar[str] = "RWKV-6, arXiv 2404.05892"
    gate_start: ClassVar[tuple[float, float]] = (0.1, -5.0)
    log_bonus: nn.Parameter

    def initial_values(self) -> dict[str, Tensor]:
        return super().initial_values() | {
            "log_bonus": torch.zeros(self.key_value_heads, self.feature_width, device="cpu")
        }

    def log_gate(self, source: Tensor) -> Tensor:
        # exp(-exp(10)) is 0 in every dtype; a larger input would only overflow float32.
        return -self.gate_input(source).clamp_max(10).exp() / self.config.gate_divisor

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, source: Tensor, writes: Tensor | None, state: Part | None
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, source = as_computed(q, k, v, source)
        k, log_gate = silenced(writes, self.features(k), self.per_feature(self.log_gate(source)))
        q, v = self.features(q), F.pad(v, (0, 1), value=1.0)
        before = held(state)
        # `gla` reads after the write of the same token, so query t + 1 is moved to token t and its output back.
        read, final = gla(torch.cat([q[:, 1:], q[:, :1]], 1), k, v, log_gate, before, form=self.form)
        grouped = q.unflatten(2, (self.key_value_heads, -1))  # [R, L, K, G, D]
        first = torch.zeros_like(read[:, :1]) if before is None else (grouped[:, 0] @ before).flatten(1, 2)[:, None]
        own = (grouped * (self.log_bonus.exp() * k).unsqueeze(3)).sum(-1, keepdim=True) * v.unsqueeze(3)
        read = torch.cat([first, read[:, :-1]], 1) + own.flatten(2, 3)
        keep(state, state=final)
        return read[..., :-1], read[..., -1]


class MLSTM(Gated):
    """A forget gate f = σ(x) and an exponential input gate i = exp(input_scale * Pool(k) + input_bias) per head:

    C_t = f_t C_{t-1} + i_t φ(k_t)ᵀ v_t ,  n_t = f_t n_{t-1} + i_t φ(k_t) ,  o_t = φ(q_t) C_t / max(|φ(q_t)·n_t|, 1)

    Both sums are divided by exp(m_t), m_t = max(log f_t + m_{t-1}, log i_t), so that no gate can overflow.
    """

    paper: ClassVar[str] = "xLSTM, arXiv 2405.04517"
    gates: ClassVar[GateWidth] = "head"
    has_mass: ClassVar[bool] = False
    input_scale: nn.Parameter
    input_bias: nn.Parameter

    def initial_values(self) -> dict[str, Tensor]:
        zeros = torch.zeros(self.key_value_heads, 1, device="cpu")
        return super().initial_values() | {"input_scale": zeros, "input_bias": zeros.clone()}

    def state(self, batch: int, device: torch.device) -> Part:
        log_scale = torch.zeros(batch, self.key_value_heads, 1, dtype=torch.float32, device=device)
        return {**super().state(batch, device), "log_scale": log_scale}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, source: Tensor, writes: Tensor | None, state: Part | None
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, source = as_computed(q, k, v, source)
        log_gate = self.log_gate(source)
        write = self.input_scale * source.mean(-1, keepdim=True) + self.input_bias  # [R, L, K, 1]
        k, log_gate = silenced(writes, self.features(k), log_gate)
        if writes is not None:
            write = write.masked_fill(~writes[:, :, None, None], -math.inf)
        # A common factor of both sums cancels in the output, so it needs no gradient.
        with torch.no_grad():
            forgotten = log_gate.double().cumsum(1)
            start = held(state, "log_scale")
            start = forgotten.new_zeros(forgotten[:, 0].shape) if start is None else start.double()
            highest = torch.cummax(torch.cat([start[:, None], write.double() - forgotten], 1), 1).values
            log_scale = highest + F.pad(forgotten, (0, 0, 0, 0, 1, 0))  # [R, 1 + L, K, 1]
            before, after = log_scale[:, :-1], log_scale[:, 1:]
        # Differences of possibly large numbers: subtract in float64, then round to float32.
        read, final = gla(
            self.features(q),
            k * (write.double() - after).to(q.dtype).exp(),
            F.pad(v, (0, 1), value=1.0),
            (log_gate.double() + before - after).to(q.dtype),
            held(state),
            form=self.form,
        )
        keep(state, state=final, log_scale=log_scale[:, -1])
        floor = (-after).exp().to(q.dtype).repeat_interleave(q.shape[2] // self.key_value_heads, 2)
        return read[..., :-1] / torch.maximum(read[..., -1:].abs(), floor), None


class LightNet(Gated):
    """Each channel is a running softmax over all tokens so far with x as its logits: g_t = exp(L_{t-1} - L_t), and
    exp(x_t - L_t) is written instead of the key; L_t = log Σ_{s<=t} exp(x_s)."""

    paper: ClassVar[str] = "LightNet, arXiv 2405.21022"
    mapped: ClassVar[str] = "q"
    gate_start: ClassVar[tuple[float, float]] = (1.0, 0.0)

    def state(self, batch: int, device: torch.device) -> Part:
        shape = (batch, self.key_value_heads, self.key_width)
        return {
            **super().state(batch, device),
            "log_sum": torch.zeros(shape, dtype=torch.float32, device=device),
            "started": torch.zeros(batch, dtype=torch.float32, device=device),  # 1 once log_sum is valid
        }

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, source: Tensor, writes: Tensor | None, state: Part | None
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, source = as_computed(q, k, v, source)
        logits = self.gate_input(source).double()
        if writes is not None:
            logits = logits.masked_fill(~writes[:, :, None, None], _NOTHING)
        start = logits.new_full(logits[:, :1].shape, _NOTHING)
        if state is not None:
            started = state["started"][:, None, None, None] > 0
            start = torch.where(started, state["log_sum"][:, None].double(), start)
        log_sums = torch.logcumsumexp(torch.cat([start, logits], 1), 1)
        before, after = log_sums[:, :-1], log_sums[:, 1:]
        write = (logits - after).exp().to(q.dtype)
        log_gate = torch.where(before > _NOTHING / 2, before - after, 0).to(q.dtype)  # an empty state has no decay
        write, log_gate = silenced(writes, self.per_feature(write), self.per_feature(log_gate))
        read, final = gla(self.features(q), write, F.pad(v, (0, 1), value=1.0), log_gate, held(state), form=self.form)
        if state is not None:
            wrote = torch.ones_like(state["started"]) if writes is None else writes.any(1).to(state["started"])
            keep(state, state=final, log_sum=after[:, -1], started=torch.maximum(state["started"], wrote))
        return read[..., :-1], read[..., -1]


class GateLoop(Gated):
    """A complex gate per channel, g_t = σ(x_t) exp(i θ_t), θ_t = phase * k_t: written entries rotate as they decay, and
    the output is the real part:

    o_t = Σ_s Σ_d φ(q_t)_d φ(k_s)_d exp(c_td - c_sd) cos(Θ_td - Θ_sd) v_s ,  c, Θ the running sums of log σ(x) and θ

    The cosine of a difference is a sum of two products, so each complex channel runs as two real ones. The divisor
    applies to log σ.
    """

    paper: ClassVar[str] = "GateLoop, arXiv 2311.01927"
    has_mass: ClassVar[bool] = False
    phase: nn.Parameter

    def initial_values(self) -> dict[str, Tensor]:
        phase = torch.full((self.key_value_heads, self.key_width), 0.01, device="cpu")
        return super().initial_values() | {"phase": phase}

    def state(self, batch: int, device: torch.device) -> Part:
        heads, width = self.key_value_heads, self.key_width
        shape = (batch, heads, 2 * self.feature_width, self.value_width)
        return {
            "state": torch.zeros(shape, dtype=torch.float32, device=device),
            "angle": torch.zeros(batch, heads, width, dtype=torch.float32, device=device),
        }

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, source: Tensor, writes: Tensor | None, state: Part | None
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, source = as_computed(q, k, v, source)
        k, log_gate, turn = silenced(writes, self.features(k), self.log_gate(source), self.phase * source)
        angle = turn.double().cumsum(1)
        if (start := held(state, "angle")) is not None:
            angle = angle + start[:, None].double()
        angle = torch.remainder(angle, 2 * math.pi)
        cos, sin, log_gate = (self.per_feature(x.to(q.dtype)) for x in (angle.cos(), angle.sin(), log_gate))
        group = q.shape[2] // self.key_value_heads
        q, k = self.features(q), torch.cat([k * cos, k * sin], -1)
        q = torch.cat([q * cos.repeat_interleave(group, 2), q * sin.repeat_interleave(group, 2)], -1)
        read, final = gla(q, k, v, torch.cat([log_gate, log_gate], -1), held(state), form=self.form)
        keep(state, state=final, angle=angle[:, -1])
        return read, None


_NOTHING = -1e30  # the logit of a token that does not write
