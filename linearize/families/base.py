"""What a family has to say about its architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Projections(NamedTuple):
    """What the pretrained weights make of T tokens, before any attention.

    Attributes:
        q, k, v: `[B, T, H, D]`, `[B, T, K, D]`, `[B, T, K, V]`, with biases and q/k norms, without positions.
        q_rotated, k_rotated: q and k with the family's position encoding; the same tensors where it has none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_rotated: Tensor
    k_rotated: Tensor


class Family(ABC):
    """One architecture; stateless. `attention` below is the family's own attention module, pretrained."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]

    def refusal(self, config: Any) -> str | None:
        """Why a model of this configuration cannot be converted, in a few words; None where it can."""
        return None

    @abstractmethod
    def attention_modules(self, model: nn.Module) -> list[tuple[nn.Module, str]]:
        """For each layer the module that owns the attention, and the attention's attribute name in it."""

    @abstractmethod
    def heads(self, config: Any) -> tuple[int, int, int, int]:
        """Query heads H, key/value heads K, key width D and value width V per head."""

    @abstractmethod
    def scale(self, attention: nn.Module) -> float:
        """What the family multiplies q·k with."""

    @abstractmethod
    def project(
        self, attention: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> Projections:
        """Queries, keys and values of `hidden_states` `[B, T, width]`."""

    @abstractmethod
    def output(self, attention: nn.Module, heads: Tensor) -> Tensor:
        """The output projection of `heads` `[B, T, H, V]`."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (RoPE, arXiv 2104.09864) on `x` `[B, T, heads, D]`, halves paired; cos, sin `[B, T, D]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(2) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(2)
