"""The recurrences: each reads its gate off the pretrained keys, keeps a state of fixed size, and has one row below.

A recurrence is a module with the layer's few own parameters. It turns queries, keys and values without positions into

    numerator [R, L, H, V]   what the state answers to each query
    mass      [R, L, H]      how much it summed up to say so (the same sum with every value 1)

so that numerator / mass is an average of values, as softmax attention's output is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from linearize_kernels import gla
from torch import Tensor, nn

if TYPE_CHECKING:
    from linearize.families.base import AttentionLayer
    from linearize.model.configuration import MixerConfig
    from linearize.model.memory import Part


class Recurrence(nn.Module, ABC):
    """Base of all recurrences.

    Args:
        config: the layer's mixer section.
        key_value_heads, key_width, value_width: K, D and V of the layer.
    """

    def __init__(self, config: MixerConfig, key_value_heads: int, key_width: int, value_width: int) -> None:
        super().__init__()
        self.config = config
        self.key_value_heads, self.key_width, self.value_width = key_value_heads, key_width, value_width

    def initial_values(self) -> dict[str, float]:
        """What each own parameter starts as."""
        return {}

    @abstractmethod
    def state(self, batch: int, device: torch.device) -> Part:
        """An empty state for `batch` rows."""

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, writes: Tensor | None, state: Part | None
    ) -> tuple[Tensor, Tensor]:
        """Reads and updates the state, token after token.

        Args:
            q: `[R, L, H, D]`. k, v: `[R, L, K, D]`, `[R, L, K, V]`, aligned with q: k[:, t] is written, then read.
            writes: `[R, L]`, False where k[:, t] neither writes nor decays; None means all write.
            state: as `state()` makes it, updated in place; None starts from nothing and keeps nothing.

        Returns:
            numerator and mass, float32.
        """


class GatedLinearAttention(Recurrence):
    """GLA (arXiv 2312.06635) with Liger's gate (arXiv 2503.01496).

    S_t = diag(g_t) S_{t-1} + φ(k_t)ᵀ v_t ,  o_t = φ(q_t) S_t ;
    log g = logsigmoid(scale * k + bias) / divisor, from the pretrained key projection; φ is the softmax over a head's
    channels, without positions. With scale 1, bias 0 and divisor 16 this is the gate of Liger's released code.
    """

    gate_scale: nn.Parameter | float
    gate_bias: nn.Parameter | float

    def __init__(self, config: MixerConfig, key_value_heads: int, key_width: int, value_width: int) -> None:
        super().__init__(config, key_value_heads, key_width, value_width)
        if config.gate_learned:
            shape = (key_value_heads, key_width)
            self.gate_scale = nn.Parameter(torch.full(shape, config.gate_scale))
            self.gate_bias = nn.Parameter(torch.full(shape, config.gate_bias))
        else:
            self.gate_scale, self.gate_bias = config.gate_scale, config.gate_bias

    def initial_values(self) -> dict[str, float]:
        if not self.config.gate_learned:
            return {}
        return {"gate_scale": self.config.gate_scale, "gate_bias": self.config.gate_bias}

    def state(self, batch: int, device: torch.device) -> Part:
        # The last column holds the mass: it is the state of a value that is always 1.
        shape = (batch, self.key_value_heads, self.key_width, self.value_width + 1)
        return {"state": torch.zeros(shape, dtype=torch.float32, device=device)}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, writes: Tensor | None, state: Part | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
        log_gate = F.logsigmoid(self.gate_scale * k + self.gate_bias) / self.config.gate_divisor
        q, k = q.softmax(-1), k.softmax(-1)
        if writes is not None:
            silent = ~writes[:, :, None, None]
            k, log_gate = k.masked_fill(silent, 0), log_gate.masked_fill(silent, 0)
        held = state["state"] if state else None
        if held is not None and torch.is_grad_enabled():
            held = held.clone()  # what is updated in place below is still wanted by the backward pass
        read, final = gla(q, k, F.pad(v, (0, 1), value=1.0), log_gate, held)
        if state is not None:
            state["state"].copy_(final.detach())
        return read[..., :-1], read[..., -1]


RECURRENCES: dict[str, type[Recurrence]] = {"gla": GatedLinearAttention}


def build_recurrence(config: MixerConfig, layer: AttentionLayer) -> Recurrence | None:
    """The recurrence that `config` names, for the heads of `layer`; None for `none`.

    Raises:
        ValueError: no recurrence of that name.
    """
    if config.recurrence == "none":
        return None
    if config.recurrence not in RECURRENCES:
        raise ValueError(f"unknown recurrence {config.recurrence!r}; there are: {', '.join(sorted(RECURRENCES))}")
    return RECURRENCES[config.recurrence](config, layer.key_value_heads, layer.key_width, layer.value_width)
