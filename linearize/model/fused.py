"""A mixer said in the terms of the fused kernels, or why it cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linearize_kernels import Step, StepWeights

if TYPE_CHECKING:
    from linearize.model.configuration import MixerConfig
    from linearize.model.mixer import Mixer

# What has a gate of its own in the recurrences that the kernels know, and the sign of the gate's input.
_GATES: dict[str, tuple[Any, float]] = {
    "gla": ("channel", 1.0),
    "hgrn2": ("channel", 1.0),
    "gated_retention": ("head", 1.0),
    "mamba2": ("head", -1.0),
    "retention": ("retention", 1.0),
    "linear": ("none", 1.0),
}


def refusal(config: MixerConfig) -> str | None:
    """Why no fused kernel takes a mixer of this configuration; None if one does."""
    if config.recurrence not in (*_GATES, "none"):
        return f"no fused kernel for {config.recurrence}"
    return None


def step_of(mixer: Mixer) -> Step:
    """What a decoding step of `mixer` is; it must not be refused."""
    config, recurrence = mixer.config, mixer.recurrence
    window: dict[str, Any] = {
        "window": mixer.window,
        "sinks": config.sinks,
        "scale": mixer.layer.scale,
        "softcap": mixer.layer.softcap,
    }
    if recurrence is None:
        return Step(**window)
    gate, sign = _GATES[config.recurrence]
    return Step(
        **window,
        gate=gate,
        gate_sign=sign,
        gate_scale=recurrence.gate_scale_start,
        gate_bias=recurrence.gate_bias_start,
        gate_divisor=config.gate_divisor,
        gate_bound=config.lower_bound * recurrence.depth if config.recurrence != "mamba2" else 0.0,
        source="k" if config.gate_source == "random" else config.gate_source,
        features=config.feature_map,
        qk_norm=config.qk_norm,
        writes_gate=config.recurrence == "hgrn2",
        covers_all=config.covers == "all",
        rope=config.rope,
        normalize=config.normalize,
        mix=config.mix,
    )


def step_weights(mixer: Mixer) -> StepWeights:
    """The parameters that go with `step_of`."""
    if mixer.recurrence is None:
        return StepWeights()
    own = mixer.recurrence._parameters
    return StepWeights(
        own.get("gate_scale"),
        own.get("gate_bias"),
        own.get("gate_projection"),
        own.get("feature_projection"),
        mixer._parameters.get("mix_weight"),
    )
