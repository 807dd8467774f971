"""The base class of the recurrences: the gate from pretrained projections, the feature maps, and the state.

A recurrence is a module with the layer's few own parameters. It turns queries, keys and values into

    outputs [R, L, H, V]   the state's output for each query
    mass    [R, L, H]      the same sum with every value 1, if the recurrence has one

so that outputs / mass is an average of values, like the output of softmax attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.model.memory import store

if TYPE_CHECKING:
    from linearize_kernels import Form

    from linearize.families.base import AttentionLayer
    from linearize.model.configuration import MixerConfig
    from linearize.model.memory import Part

GateWidth = Literal["channel", "head", "slot", "value", "none"]


class Recurrence(nn.Module, ABC):
    """Base of all recurrences.

    Args:
        config: the layer's mixer section.
        layer: the heads that it mixes.
        depth: the relative depth of the layer, 0 for the first and 1 for the last.

    Attributes:
        paper: the source of the recurrence.
        gates: the axis of the gate: one gate per channel, head, slot or value channel, or none.
        gate_start: scale and bias of the gate where the recipe names none; they make it decay slowly.
        has_mass: True if its outputs are sums of values with non-negative weights.
        update_flops: floating-point operations of a step per entry of the state, reading aside; see `flops`.
        mapped: the inputs of the feature map: queries (`q`), keys (`k`), or both.
        form: pins a form of the kernels; None chooses by the length.
    """

    paper: ClassVar[str]
    gates: ClassVar[GateWidth] = "channel"
    gate_start: ClassVar[tuple[float, float]] = (0.1, 5.0)
    has_mass: ClassVar[bool] = True
    update_flops: ClassVar[int] = 3
    mapped: ClassVar[str] = "qk"
    gate_scale: nn.Parameter
    gate_bias: nn.Parameter
    gate_projection: nn.Parameter
    feature_projection: nn.Parameter

    def __init__(self, config: MixerConfig, layer: AttentionLayer, depth: float = 0.0) -> None:
        super().__init__()
        self.config, self.layer, self.depth = config, layer, depth
        self.key_value_heads, self.key_width, self.value_width = (
            layer.key_value_heads,
            layer.key_width,
            layer.value_width,
        )
        self.form: Form | None = None
        if config.gate_source == "v" and layer.value_width != layer.key_width:
            raise ValueError("gates from values need values as wide as keys; choose another gate source")
        register(self, self.initial_values())

    def initial_values(self) -> dict[str, Tensor]:
        """The start of each own parameter."""
        config, values = self.config, dict[str, Tensor]()
        if config.gate_learned and self.gates != "none":
            shape = (self.key_value_heads, self.gate_width)
            values["gate_scale"] = torch.full(shape, self.gate_scale_start, device="cpu")
            values["gate_bias"] = torch.full(shape, self.gate_bias_start, device="cpu")
        if config.gate_source == "random" and self.gates != "none":
            generator = torch.Generator("cpu").manual_seed(round(1000 * self.depth))
            square = (self.key_value_heads, self.key_width, self.key_width)
            drawn = torch.randn(square, generator=generator, device="cpu")
            values["gate_projection"] = drawn * self.key_width**-0.5
        if config.feature_map == "learned":
            eye = torch.eye(self.key_width, device="cpu")
            values["feature_projection"] = eye.expand(self.key_value_heads, -1, -1).clone()
        return values

    @property
    def gate_scale_start(self) -> float:
        return self.gate_start[0] if self.config.gate_scale is None else self.config.gate_scale

    @property
    def gate_bias_start(self) -> float:
        return self.gate_start[1] if self.config.gate_bias is None else self.config.gate_bias

    @cached_property
    def gate_width(self) -> int:
        """Gates per key/value head."""
        return {
            "channel": self.key_width,
            "head": 1,
            "slot": self.slots,
            "value": self.value_width,
            "none": 0,
        }[self.gates]

    @property
    def slots(self) -> int:
        return self.config.slots or self.key_width

    @cached_property
    def feature_width(self) -> int:
        """Width of queries and keys after the feature map."""
        return self.key_width * (2 if self.config.feature_map in ("exp", "learned") else 1)

    @abstractmethod
    def state(self, batch: int, device: torch.device) -> Part:
        """An empty state for `batch` rows, float32."""

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, source: Tensor, writes: Tensor | None, state: Part | None
    ) -> tuple[Tensor, Tensor | None]:
        """Write and read the state, token after token.

        Args:
            q: `[R, L, H, D]`. k, v: `[R, L, K, D]`, `[R, L, K, V]`, aligned with q: k[:, t] is written, then read.
            source: `[R, L, K, D]`, the tensor that the gate is computed from.
            writes: `[R, L]`, False where k[:, t] neither writes nor decays; None means all write.
            state: as `state()` makes it, updated in place; None starts from zeros and stores nothing.

        Returns:
            outputs `[R, L, H, V]` and mass `[R, L, H]` (None if the recurrence has none), float32.
        """

    def flops(self, group: int) -> int:
        """Floating-point operations of one decoding step of one key/value head that `group` query heads share.

        Per entry of the state's matrices (tensors `[B, K, rows, columns]`), counting a multiply-add as 2:

            3   gated: decay 1, write k_tᵀ v_t 2
            2   without a gate: write 2
            5   delta rule: decay 1, read k_t S 2, write k_tᵀ (v_t - k_t S) 2
            7   delta rule that corrects along another vector than it writes: one write more
            2   for each query head: read q_t S

        and 2 per weight of a learned feature map or a random gate. Operations on vectors (gates, normalising, bonuses)
        are left out: they are smaller by a factor of a head's width, except where the state is itself a vector.
        """
        matrices = (x for x in self.state(1, torch.device("meta")).values() if x.dim() == 4)
        entries = sum(x.shape[2] * x.shape[3] for x in matrices)
        projected = 0
        if self.config.feature_map == "learned":
            projected += self.mapped.count("q") * group + self.mapped.count("k")
        if self.config.gate_source == "random" and self.gates != "none":
            projected += 1
        return entries * (self.update_flops + 2 * group) + 2 * projected * self.key_width**2

    def in_segments(
        self, q: Tensor, k: Tensor, v: Tensor, source: Tensor, writes: Tensor | None, state: Part | None
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` in segments of `_SEGMENT` tokens if no gradient is needed. Intermediates then take memory for one
        segment only, and the allocator reuses them."""
        tokens = k.shape[1]
        if tokens <= _SEGMENT or torch.is_grad_enabled():
            result: tuple[Tensor, Tensor | None] = self(q, k, v, source, writes, state)
            return result
        state = self.state(k.shape[0], k.device) if state is None else state
        outputs: list[Tensor] = []
        for start in range(0, tokens, _SEGMENT):
            own = slice(start, start + _SEGMENT)
            written = None if writes is None else writes[:, own]
            read, mass = self(q[:, own], k[:, own], v[:, own], source[:, own], written, state)
            results = [read] if mass is None else [read, mass]
            if not outputs:
                # Preallocated, because pieces kept for a `cat` would be memory that no later segment can reuse.
                outputs = [x.new_empty(x.shape[0], tokens, *x.shape[2:]) for x in results]
            for whole, piece in zip(outputs, results, strict=True):
                whole[:, own] = piece
        return outputs[0], outputs[1] if len(outputs) > 1 else None

    def gate_input(self, source: Tensor) -> Tensor:
        """scale * Pool(source) + bias, `[R, L, K, gate_width]`; Pool averages neighbouring channels (Liger's)."""
        if "gate_projection" in self._parameters:
            source = torch.einsum("rlkd,kde->rlke", source, self.gate_projection.to(source.dtype))
        if self.gate_width == 1:
            source = source.mean(-1, keepdim=True)
        elif self.gate_width != source.shape[-1]:
            pooled = F.adaptive_avg_pool1d(source.flatten(2), self.key_value_heads * self.gate_width)
            source = pooled.unflatten(-1, (self.key_value_heads, self.gate_width))
        if "gate_scale" in self._parameters:
            return torch.addcmul(self.gate_bias, self.gate_scale, source)
        return self.gate_scale_start * source + self.gate_bias_start

    def log_gate(self, source: Tensor) -> Tensor:
        """log g = logsigmoid(x) / divisor, x the gate's input; with a lower bound γ, g is replaced by γ + (1 - γ) g."""
        log_gate = F.logsigmoid(self.gate_input(source))
        if self.config.gate_divisor != 1:
            log_gate = log_gate / self.config.gate_divisor
        bound = self.config.lower_bound * self.depth
        # γ + (1 - γ) g = 1 + (1 - γ)(g - 1): expm1 and log1p keep the small 1 - g of a gate near 1.
        return torch.log1p((1 - bound) * torch.expm1(log_gate)) if bound else log_gate

    def gate(self, source: Tensor) -> Tensor:
        """g itself, for one step. Over many tokens use `log_gate`, because g near 1 rounds 1 - g away."""
        plain = type(self).log_gate is Recurrence.log_gate and self.config.gate_divisor == 1
        if plain and not self.config.lower_bound * self.depth:
            return self.gate_input(source).sigmoid()
        return self.log_gate(source).exp()

    def in_place(self, tokens: int, state: Part | None) -> bool:
        """True if `forward` on this number of tokens may update `state` in place: one token, and no gradient."""
        return tokens == 1 and state is not None and self.form is None and not torch.is_grad_enabled()

    def features(self, x: Tensor) -> Tensor:
        """Apply the feature map to queries `[R, L, H, D]` or keys `[R, L, K, D]`."""
        if self.config.qk_norm:
            x = F.normalize(x, dim=-1, eps=1e-6)
        kind = self.config.feature_map
        if kind == "softmax":
            return x.softmax(-1)
        if kind == "learned":
            heads = x.unflatten(2, (self.key_value_heads, -1))
            x = torch.einsum("rlkgd,kde->rlkge", heads, self.feature_projection.to(x.dtype)).flatten(2, 3)
        if kind in ("exp", "learned"):
            return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
        return F.elu(x) + 1 if kind == "elu" else x

    def per_feature(self, x: Tensor) -> Tensor:
        """Repeat channels of the key `[..., D]` to the width of the features; a value per head `[..., 1]` stays."""
        return torch.cat([x, x], -1) if x.shape[-1] > 1 and self.feature_width != self.key_width else x


def register(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Register each value as a parameter. On the meta device only its shape exists, and loading fills it in."""
    for name, value in values.items():
        parameter = torch.empty(value.shape)
        if not parameter.is_meta:
            parameter.copy_(value)
        module.register_parameter(name, nn.Parameter(parameter))


def as_computed(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32; float64 stays."""
    return [x if x.dtype in (torch.float32, torch.float64) else x.float() for x in tensors]


def silenced(writes: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """The tensors `[R, L, ...]` with 0 at tokens that do not write."""
    if writes is None:
        return list(tensors)
    silent = ~writes[:, :, None, None]
    return [x.masked_fill(silent, 0) for x in tensors]


def held(state: Part | None, name: str = "state") -> Tensor | None:
    """One tensor of the initial state; None without a state."""
    if state is None:
        return None
    # A clone for autograd, because the tensor is overwritten in place before the backward pass reads it.
    return state[name].clone() if torch.is_grad_enabled() else state[name]


def keep(into: Part | None, **final: Tensor) -> None:
    """Store the final tensors of a call in the state."""
    if into is not None:
        for name, value in final.items():
            store(into, name, value)


# Tokens. In a small model every intermediate then stays below 32 MB, from which malloc no longer reuses memory.
_SEGMENT = 512
