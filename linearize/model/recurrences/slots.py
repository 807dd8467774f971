"""Recurrences with gates per slot or per value channel. They run on `linearize_kernels.gated_values`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from linearize_kernels import gated_values, gated_values_step, gla, gla_step
from torch import Tensor, nn

from linearize.model.recurrences.base import GateWidth, Recurrence, as_computed, held, keep, silenced

if TYPE_CHECKING:
    from linearize.families.base import AttentionLayer
    from linearize.model.configuration import MixerConfig
    from linearize.model.memory import Part


class GatedSlotAttention(Recurrence):
    """A softmax over M slots, each a gated average of keys and of values:

    K̃_t = diag(g_t) K̃_{t-1} + (1 - g_t)ᵀ k_t ,  Ṽ_t = diag(g_t) Ṽ_{t-1} + (1 - g_t)ᵀ v_t ,  o_t = softmax(q_t K̃_tᵀ) Ṽ_t

    with one gate per slot, log g = logsigmoid(x) / divisor, x from the keys pooled to M channels. Queries and keys pass
    through the recipe's feature map (the paper uses the identity). M is the recipe's `slots`, or the width of a head.
    """

    paper: ClassVar[str] = "GSA, arXiv 2409.07146"
    gates: ClassVar[GateWidth] = "slot"

    def state(self, batch: int, device: torch.device) -> Part:
        heads, zeros = self.key_value_heads, torch.zeros
        return {
            "keys": zeros(batch, heads, self.feature_width, self.slots, dtype=torch.float32, device=device),
            # The last column holds the mass.
            "values": zeros(batch, heads, self.slots, self.value_width + 1, dtype=torch.float32, device=device),
        }

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, source: Tensor, writes: Tensor | None, state: Part | None
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, source = as_computed(q, k, v, source)
        (log_gate,) = silenced(writes, self.log_gate(source))
        write = -torch.expm1(log_gate)
        k, v = silenced(writes, self.features(k), F.pad(v, (0, 1), value=1.0))
        if self.in_place(q.shape[1], state):
            assert state is not None  # noqa: S101 - for the type checker; `in_place` has looked
            gate = log_gate.exp()
            scores = gated_values_step(self.features(q), k, write, gate, state["keys"])
            read = gla_step(scores.softmax(-1), write, v, gate, state["values"])
            return read[..., :-1], read[..., -1]
        scores, keys = gated_values(self.features(q), k, write, log_gate, held(state, "keys"), form=self.form)
        read, values = gla(scores.softmax(-1), write, v, log_gate, held(state, "values"), form=self.form)
        keep(state, keys=keys, values=values)
        return read[..., :-1], read[..., -1]


class Elementwise(Recurrence):
    """A gated average of the values per channel, h_t = g_t ⊙ h_{t-1} + i_t ⊙ v_t; the query scales each channel of the
    output: o_t = 2 σ(q_t) ⊙ h_t."""

    gates: ClassVar[GateWidth] = "value"
    has_mass: ClassVar[bool] = False
    mapped: ClassVar[str] = ""

    def __init__(self, config: MixerConfig, layer: AttentionLayer, depth: float = 0.0) -> None:
        super().__init__(config, layer, depth)
        if self.key_width != self.value_width:
            raise ValueError("an elementwise recurrence needs keys and values of the same width")

    def state(self, batch: int, device: torch.device) -> Part:
        shape = (batch, self.key_value_heads, 1, self.value_width)
        return {"state": torch.zeros(shape, dtype=torch.float32, device=device)}

    def admitted(self, v: Tensor, source: Tensor, log_gate: Tensor) -> Tensor:
        """i_t ⊙ v_t."""
        return -torch.expm1(log_gate) * v

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, source: Tensor, writes: Tensor | None, state: Part | None
    ) -> tuple[Tensor, Tensor | None]:
        q, v, source = as_computed(q, v, source)
        log_gate = self.log_gate(source)
        log_gate, admitted = silenced(writes, log_gate, self.admitted(v, source, log_gate))
        one = torch.ones_like(v[..., :1])
        average, final = gated_values(one, one, admitted, log_gate, held(state), form=self.form)  # [R, L, K, V]
        keep(state, state=final)
        opened = 2 * q.sigmoid().unflatten(2, (self.key_value_heads, -1)) * average.unsqueeze(3)
        return opened.flatten(2, 3), None


class MinGRU(Elementwise):
    """g_t = σ(x)^(1/divisor), i_t = 1 - g_t."""

    paper: ClassVar[str] = "minGRU, arXiv 2410.01201"


class RGLRU(Elementwise):
    """log g_t = -c softplus(Λ) r_t with r_t = σ(x) and c = 8;  i_t = sqrt(1 - g_t²) σ(input_scale * k + input_bias).

    Λ is learned per channel. It starts so that a full step (r = 1) keeps 0.9 to 0.999 of the state, evenly spaced over
    the channels of a head.
    """

    paper: ClassVar[str] = "RG-LRU (Griffin), arXiv 2402.19427"
    gate_start: ClassVar[tuple[float, float]] = (0.1, 0.0)
    decay: nn.Parameter
    input_scale: nn.Parameter
    input_bias: nn.Parameter

    def initial_values(self) -> dict[str, Tensor]:
        shape = (self.key_value_heads, self.value_width)
        kept = torch.linspace(0.9, 0.999, self.value_width, device="cpu")
        return super().initial_values() | {
            "decay": torch.expm1(-kept.log() / _SHARPNESS).log().expand(shape).clone(),  # softplus(Λ) = -log(kept) / c
            "input_scale": torch.zeros(shape, device="cpu"),
            "input_bias": torch.full(shape, 5.0, device="cpu"),
        }

    def log_gate(self, source: Tensor) -> Tensor:
        reset = self.gate_input(source).sigmoid()
        return -_SHARPNESS * F.softplus(self.decay) * reset / self.config.gate_divisor

    def admitted(self, v: Tensor, source: Tensor, log_gate: Tensor) -> Tensor:
        # sqrt(1 - g²) has an infinite slope at g = 1, to which a weak gate rounds, so roots below 1e-6 are linear.
        share = -torch.expm1(2 * log_gate)
        root = torch.where(share < 1e-12, share * 1e6, share.clamp_min(1e-12).sqrt())
        return root * (self.input_scale * source + self.input_bias).sigmoid() * v


_SHARPNESS = 8.0
