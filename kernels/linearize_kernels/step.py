"""The interface of the fused decoding step: a layer's sizes, options and tensors.

    window   the new key and value take a slot of the ring; softmax over the ring and the visible sinks
    state    S = g ⊙ S + φ(k)ᵀ [v, 1] , with the new token or with the one that leaves the window
    out      mix(window, φ(q) S)

The reference in plain PyTorch is `linearize.model.mixer.mixer.Mixer`. The kernel is in `step_triton.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Step:
    """The constants of a step.

    Attributes:
        window, sinks: W, and the number of first tokens that stay readable after they leave the window.
        scale: multiplies the scores. softcap: scores become `softcap * tanh(scores / softcap)`.
        gate: x = gate_scale * Pool(source) + gate_bias per `channel` or per `head`, and log g = logsigmoid(x) /
            divisor; `retention` is log(1 - 2^(-5-head)), `none` is 0. None: the layer has no recurrence.
        gate_sign: -1 negates x, so log g = -softplus(x) / divisor.
        gate_scale, gate_bias: their values if they are not learned.
        gate_bound: γ; the gate is γ + (1 - γ) g.
        source: input of the gate: `k`, `q` (the mean of a group's queries) or `v`.
        features: the feature map of queries and keys; `exp` and `learned` are [softmax(x), softmax(-x)].
        writes_gate: True writes 1 - g instead of φ(k).
        covers_all: True writes the new token into the state; False writes the one that leaves the window, from token
            `sinks` on.
        rope: True if the recurrence's queries and keys have positions.
        normalize, mix: as in a recipe's mixer section.
    """

    window: int
    sinks: int
    scale: float
    softcap: float | None = None
    gate: Literal["channel", "head", "retention", "none"] | None = None
    gate_sign: float = 1.0
    gate_scale: float = 1.0
    gate_bias: float = 0.0
    gate_divisor: float = 1.0
    gate_bound: float = 0.0
    source: Literal["k", "q", "v"] = "k"
    features: Literal["softmax", "exp", "elu", "identity", "learned"] = "softmax"
    qk_norm: bool = False
    writes_gate: bool = False
    covers_all: bool = False
    rope: bool = False
    normalize: bool = True
    mix: Literal["fixed", "learned", "softmax"] = "fixed"


@dataclass(frozen=True)
class StepWeights:
    """The learned tensors of a step, float32; None if the layer has no such tensor.

    Attributes:
        gate_scale, gate_bias: `[K, D or 1]`. gate_projection, feature_projection: `[K, D, D]`, applied as x P.
        mix: `[H, V]` for `learned`, `[H]` for `softmax`.
    """

    gate_scale: Tensor | None = None
    gate_bias: Tensor | None = None
    gate_projection: Tensor | None = None
    feature_projection: Tensor | None = None
    mix: Tensor | None = None
