"""The parameters of a mixer, and the methods that every path of its computation calls.

`mixer.py` implements the methods. `step.py`, `fused.py`, `trial.py` and `linearize.model.landmarks` take a
`MixerBase`, so none of them imports `mixer.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from linearize_kernels.codes import refuse_width
from torch import Tensor, nn

from linearize.model.configuration import room
from linearize.model.recurrences import build_recurrence, register

if TYPE_CHECKING:
    from collections.abc import Callable

    from linearize.families.base import AttentionLayer, Projections
    from linearize.model.configuration import MixerConfig
    from linearize.model.memory import LayerMemory, Part

ExactColumns = tuple[Tensor, Tensor, Tensor]
"""Keys `[R, M, K, D]`, values `[R, M, K, V]` and visibility `[R or 1, L, M]` of the sinks, for `window_attention`."""


class MixerBase(nn.Module, ABC):
    """Holds the layer's few own parameters.

    Args:
        config: the layer's mixer section, fitted to the layer.
        layer: the heads that it mixes.
        depth: the place of the layer in the model, 0 for the first layer and 1 for the last.

    Attributes:
        kind: equal for mixers that compute the same function of their weights.
        branches_off: the branches that are switched off: `recurrence`, `window` (with its sinks), or both. Evaluation
            sets it to measure the other branch alone. It is not saved with a checkpoint.
        sum_of_ranks: set if this mixer has some of the layer's heads, and other ranks have the rest: takes this rank's
            terms of a learned score `[R, L, all heads]`, and returns the sums over ranks for its own heads.

    Raises:
        ValueError: options that do not go together.
    """

    mix_weight: nn.Parameter
    score_weight: nn.Parameter
    key_scale: nn.Parameter
    key_shift: nn.Parameter
    branches_off: frozenset[str] = frozenset()
    sum_of_ranks: Callable[[Tensor], Tensor] | None = None

    def __init__(self, config: MixerConfig, layer: AttentionLayer, depth: float = 0.0) -> None:
        super().__init__()
        if config.window is None:
            raise ValueError("a mixer needs a window; a layer without one keeps its softmax attention")
        self.config, self.layer, self.window = config, layer, config.window
        self.kind = repr((replace(config, layers=[], softmax_heads=[]), layer))
        self.recurrence = build_recurrence(config, layer, depth)
        if config.landmarks and self.recurrence is not None and config.covers == "all":
            raise ValueError("landmarks need covers: evicted, for a state of all tokens holds them already")
        if config.landmarks and config.memory_dtype == "int4":
            for width in (layer.key_width, layer.value_width):
                refuse_width(width)
        if self.recurrence is not None and config.mix == "softmax" and not self.recurrence.has_mass:
            raise ValueError(f"mix: softmax needs a recurrence with a normaliser, which {config.recurrence} has not")
        register(self, self._own_start())

    @abstractmethod
    def forward(
        self, new: Projections, lengths: Tensor | None, memory: LayerMemory | None, *, fused: bool | None = None
    ) -> Tensor:
        """Mix L new tokens of R rows; continue `memory` if one is given and update its parts in place.

        Args:
            new: projections `[R, L, ...]`, each row's real tokens first.
            lengths: `[R]` real tokens per row; None means L in all.
            fused: True and False pin the fused kernels and plain PyTorch; None takes the kernels if they pass.

        Returns:
            `[R, L, H, V]` float32; meaningless past a row's length.
        """

    @abstractmethod
    def parts(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Part]:
        """An empty memory for `batch` rows: tensors whose size depends on the configuration alone."""

    @abstractmethod
    def in_code(self, new: Projections, *, keys: bool = True) -> Projections:
        """Keys as they are coded, and queries to match; without `keys`, queries alone."""

    @abstractmethod
    def source(self, new: Projections) -> Tensor:
        """The input of the new tokens' gates, `[R, L, K, D or V]`."""

    @abstractmethod
    def sinks(self, new: Projections) -> ExactColumns | None:
        """The sinks of rows that start with `new`; None if no token has left the window."""

    @abstractmethod
    def mix(self, y: Tensor, normaliser: Tensor | None, read: Tensor, mass: Tensor | None) -> Tensor:
        """Join the exact branch with the recurrence.

        Args:
            y: `[R, L, H, V]`, the outputs of softmax attention.
            normaliser: `[R, L, H]`, the log of their denominator, for `mix: softmax`.
            read: `[R, L, H, V]`, the outputs of the recurrence.
            mass: `[R, L, H, 1]`, their mass; None if the recurrence has none.
        """

    def _own_start(self) -> dict[str, Tensor]:
        own = {
            "mix_weight": self._mix_start(),
            "score_weight": self._score_start(),
            **self._coding_start(),
        }
        return {name: value for name, value in own.items() if value is not None}

    def _mix_start(self) -> Tensor | None:
        """The start of the mix weight. At 0 the mixer returns the window alone, and the gradient is not 0."""
        heads, width = self.layer.query_heads, self.layer.value_width
        shape = {"learned": (heads, width), "softmax": (heads,)}.get(self.config.mix)
        return None if self.recurrence is None or shape is None else torch.zeros(shape, device="cpu")

    def _score_start(self) -> Tensor | None:
        """The start of a learned score, which `convert` fits: 0. The columns are keys, values and a constant."""
        if not self.config.landmarks or self.config.landmark_score != "learned":
            return None
        heads, width = self.layer.key_value_heads, self.layer.key_width + self.layer.value_width
        return torch.zeros(heads, heads * width + 1, device="cpu")

    def _coding_start(self) -> dict[str, Tensor | None]:
        """The start of the channels' scale and shift before keys are coded, which `convert` fits; see `Mixer.in_code`.
        A state reads keys as they are."""
        if self.config.memory_dtype == "auto" or self.recurrence is not None:
            return {}
        shape = (self.layer.key_value_heads, self.layer.key_width)
        return {"key_scale": torch.ones(shape, device="cpu"), "key_shift": torch.zeros(shape, device="cpu")}

    def initial_values(self) -> dict[str, Tensor]:
        """The start of each own parameter."""
        values = self._own_start()
        if self.recurrence is not None:
            values |= {f"recurrence.{name}": value for name, value in self.recurrence.initial_values().items()}
        return values

    @classmethod
    def check(cls, config: MixerConfig, layer: AttentionLayer) -> None:
        """Build the mixer on the meta device.

        Raises:
            ValueError: options that do not go together.
        """
        if config.window is not None:
            with torch.device("meta"):
                cls(config, layer)

    @property
    def flops(self) -> int:
        """Floating-point operations of a decoding step with a full window and full sinks; see `Recurrence.flops`."""
        window = room(self.window) if self.config.landmarks else self.window
        exact = self.layer.flops_per_key * (window + self.config.sinks + self.config.landmarks)
        if self.recurrence is None:
            return exact
        heads = self.layer.key_value_heads
        return exact + heads * self.recurrence.flops(self.layer.query_heads // heads)
