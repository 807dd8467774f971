"""Delta rules: recurrences that subtract the state's current output for a key before they write. All run on one
kernel, `linearize_kernels.delta_rule`.

k̂ is the feature map of the key, scaled to length 1, as is q̂; σ is the logistic function; x is the gate's input.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from linearize_kernels import delta_rule, delta_rule_step
from torch import Tensor, nn

from linearize.model.recurrences.base import GateWidth, Recurrence, as_computed, held, keep, silenced

if TYPE_CHECKING:
    from linearize.model.memory import Part


class Delta(Recurrence):
    """The shared part of the delta rules: unit queries and keys, a state without a mass."""

    has_mass: ClassVar[bool] = False
    update_flops: ClassVar[int] = 5

    def state(self, batch: int, device: torch.device) -> Part:
        shape = (batch, self.key_value_heads, self.feature_width, self.value_width)
        return {"state": torch.zeros(shape, dtype=torch.float32, device=device)}

    def unit_features(self, x: Tensor) -> Tensor:
        """The feature map, scaled to length 1."""
        return F.normalize(self.features(x), dim=-1, eps=1e-6)

    def corrected(
        self, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, a: Tensor, b: Tensor, state: Part | None
    ) -> Tensor:
        """Run `delta_rule` from `state` on and store the final state in it."""
        if self.in_place(q.shape[1], state):
            assert state is not None  # noqa: S101 - for the type checker; `in_place` has looked
            return delta_rule_step(q, k, v, log_gate.exp(), a, b, state["state"])
        read, final = delta_rule(q, k, v, log_gate, a, b, held(state), form=self.form)
        keep(state, state=final)
        return read


class KimiDeltaAttention(Delta):
    """S_t = (I - β_t k̂_tᵀ k̂_t) diag(g_t) S_{t-1} + β_t k̂_tᵀ v_t ,  o_t = q̂_t S_t

    log g = logsigmoid(x) / divisor per channel; β = σ(y) per head, y = write_scale * Pool(k) + write_bias. With
    `negative_eigenvalues` β is 2 σ(y). A β above 1 reflects the state along the key, so it can track parity
    (arXiv 2411.12537).
    """

    paper: ClassVar[str] = "KDA (Kimi Linear), arXiv 2510.26692"
    write_scale: nn.Parameter
    write_bias: nn.Parameter

    def initial_values(self) -> dict[str, Tensor]:
        shape = (self.key_value_heads, 1)
        return super().initial_values() | {
            "write_scale": torch.zeros(shape, device="cpu"),
            # β starts at 1/2 with or without negative eigenvalues: σ(0), or 2 σ(-log 3).
            "write_bias": torch.full(shape, -math.log(3) if self.config.negative_eigenvalues else 0.0, device="cpu"),
        }

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, source: Tensor, writes: Tensor | None, state: Part | None
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, source = as_computed(q, k, v, source)
        strength = torch.sigmoid(self.write_scale * source.mean(-1, keepdim=True) + self.write_bias)  # β [R, L, K, 1]
        if self.config.negative_eigenvalues:
            strength = 2 * strength
        k = self.unit_features(k)
        log_gate, strength = silenced(writes, self.per_feature(self.log_gate(source)), strength)
        written = strength * k
        gate, q = log_gate.exp(), self.unit_features(q)
        return self.corrected(q, written, v, log_gate, gate * k, -written, state), None


class GatedDeltaNet(KimiDeltaAttention):
    """As KDA, with one gate per head:  S_t = g_t (I - β_t k̂_tᵀ k̂_t) S_{t-1} + β_t k̂_tᵀ v_t."""

    paper: ClassVar[str] = "Gated DeltaNet, arXiv 2412.06464"
    gates: ClassVar[GateWidth] = "head"


class RWKV7(Delta):
    """S_t = diag(w_t) S_{t-1} - (a_t ⊙ k̂_t)ᵀ (k̂_t S_{t-1}) + k̃_tᵀ v_t ,  o_t = q̂_t S_t + (q̂_t · (ρ ⊙ k̃_t)) v_t

    w = exp(-exp(-1/2) σ(x) / divisor) and a = σ(rate_scale * k + rate_bias) per channel;
    k̃ = k̂ ⊙ (1 + (a - 1) ⊙ replacement), where the paper uses the projected key instead of k̂; ρ is a learned bonus that
    starts at 0.
    """

    paper: ClassVar[str] = "RWKV-7, arXiv 2503.14456"
    gate_start: ClassVar[tuple[float, float]] = (0.1, -5.0)
    update_flops: ClassVar[int] = 7
    rate_scale: nn.Parameter
    rate_bias: nn.Parameter
    replacement: nn.Parameter
    bonus: nn.Parameter

    def initial_values(self) -> dict[str, Tensor]:
        shape, features = (self.key_value_heads, self.key_width), (self.key_value_heads, self.feature_width)
        return super().initial_values() | {
            "rate_scale": torch.zeros(shape, device="cpu"),
            "rate_bias": torch.zeros(shape, device="cpu"),
            "replacement": torch.ones(features, device="cpu"),
            "bonus": torch.zeros(features, device="cpu"),
        }

    def log_gate(self, source: Tensor) -> Tensor:
        return -math.exp(-0.5) * torch.sigmoid(self.gate_input(source)) / self.config.gate_divisor

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, source: Tensor, writes: Tensor | None, state: Part | None
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, source = as_computed(q, k, v, source)
        q, k = self.unit_features(q), self.unit_features(k)
        rate = self.per_feature(torch.sigmoid(self.rate_scale * source + self.rate_bias))
        k, log_gate = silenced(writes, k, self.per_feature(self.log_gate(source)))
        written = k * (1 + (rate - 1) * self.replacement)
        read = self.corrected(q, written, v, log_gate, k, -rate * k, state)
        own = (q.unflatten(2, (self.key_value_heads, -1)) * (self.bonus * written).unsqueeze(3)).sum(-1, keepdim=True)
        return read + (own * v.unsqueeze(3)).flatten(2, 3), None
