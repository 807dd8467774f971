"""The interface of the fused decoding step: a layer's sizes, options and tensors.

    window   the new key and value take a slot of the ring; softmax over the ring and the visible sinks
    state    S = g ⊙ S + φ(k)ᵀ [v, 1] , with the new token or with the one that the window lets go
    out      mix(window, φ(q) S)

`linearize.model.mixer.Mixer` has the same in plain torch, and is its reference. The kernel is in `step_triton.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Part = dict[str, "Tensor"]


@dataclass(frozen=True)
class Step:
    """The fixed side of a step.

    Attributes:
        window, sinks: W, and how many first tokens are kept as they leave the window.
        scale: multiplies the scores, which become `softcap * tanh(scores / softcap)` where there is one.
        gate: x = gate_scale * Pool(source) + gate_bias per `channel` or per `head` and log g = logsigmoid(x) / divisor;
            `retention` is log(1 - 2^(-5-head)), `none` is 0. None: there is no recurrence at all.
        gate_sign: -1 takes -x, so that log g = -softplus(x) / divisor.
        gate_scale, gate_bias: where they are not learned.
        gate_bound: γ, and γ + (1 - γ) g takes the place of g.
        source: what the gate is built from: `k`, `q` (the mean of a group's queries) or `v`.
        features: the feature map of queries and keys; `exp` and `learned` are [softmax(x), softmax(-x)].
        writes_gate: 1 - g is written in the place of φ(k).
        covers_all: the state takes the new token; otherwise the one that leaves the window, from token `sinks` on.
        rope: whether the recurrence's queries and keys have positions.
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
    """The learned side, float32; None where the layer has none of the kind.

    Attributes:
        gate_scale, gate_bias: `[K, D or 1]`. gate_projection, feature_projection: `[K, D, D]`, applied as x P.
        mix: `[H, V]` for `learned`, `[H]` for `softmax`.
    """

    gate_scale: Tensor | None = None
    gate_bias: Tensor | None = None
    gate_projection: Tensor | None = None
    feature_projection: Tensor | None = None
    mix: Tensor | None = None
