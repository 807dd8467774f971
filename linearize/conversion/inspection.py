"""`linearize inspect`: read from a configuration alone the architecture, the layers to convert, and memory and FLOPs
before and after.

FLOPs count one decoding step of the token mixers, summed over layers: attention over the cached tokens, and the update
and reading of a state (`Recurrence.flops`). Projections and feed-forward layers are left out, because they are the same
before and after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from linearize.conversion.swap import mixers_for
from linearize.errors import ModelError, RecipeError
from linearize.families import family_of
from linearize.model.attention import LinearizedAttention
from linearize.model.configuration import LinearizedConfig
from linearize.model.mixer.fused import decide_mixer
from linearize.model.positions import rotary_notes
from linearize.model.recurrences import RECURRENCES
from linearize.sources.limits import context_of
from linearize.sources.source import Source, load_config

if TYPE_CHECKING:
    from linearize.families import AttentionLayer, Family
    from linearize.recipe import MixerSpec

LENGTHS = (1_024, 8_192, 131_072, 1_048_576)
FLOPS_LENGTHS = LENGTHS[:3]


@dataclass(frozen=True)
class _Subject:
    """A model's configuration and the facts derived from it.

    Attributes:
        config: of the base model.
        mixers: the mixers of a converted checkpoint; None for any other model.
        held: dtype of keys and values in a cache.
        positions: sentences on the conversion of rotary positions that depend on a text's length.
    """

    source: Source
    config: Any
    mixers: list[Any] | None
    family: Family
    layers: list[AttentionLayer]
    held: torch.dtype
    positions: list[str]

    def head(self) -> dict[str, Any]:
        """Facts that do not depend on the mixer."""
        first = self.layers[0]
        return {
            "model": self.source.reference,
            "converted": self.mixers is not None,
            "family": self.family.name,
            "architecture": self.config.model_type,
            "layers": len(self.layers),
            "query_heads": first.query_heads,
            "key_value_heads": first.key_value_heads,
            "key_width": first.key_width,
            "value_width": first.value_width,
            "vocabulary": self.config.vocab_size,
            "positions": self.positions,
            "trained_length": context_of(self.config),
            "dtype": str(self.held).removeprefix("torch."),
            "rotary_scaling": rotary_scaling(self.config),
        }

    def bytes_per_token(self, layer: AttentionLayer, heads: int) -> int:
        return heads * (layer.key_width + layer.value_width) * self.held.itemsize

    def teacher_bytes(self, tokens: int) -> int:
        """Bytes of the pretrained model's cache after `tokens` tokens."""
        return sum(
            min(tokens, layer.window or tokens) * self.bytes_per_token(layer, layer.key_value_heads)
            for layer in self.layers
        )

    def teacher_flops(self, tokens: int) -> int:
        """FLOPs of the pretrained model's attention over `tokens` tokens."""
        return sum(min(tokens, layer.window or tokens) * layer.flops_per_key for layer in self.layers)

    def costs(self, attentions: list[LinearizedAttention]) -> dict[str, Any]:
        """Bytes of one sequence and FLOPs of one step: the constant part, and the growth per token of context."""
        parts: dict[str, int] = {}
        for attention in attentions:
            for name, tensors in attention.memory(1, self.held, torch.device("meta")).parts.items():
                size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
                parts[name] = parts.get(name, 0) + size
        growing = [(a.layer, len(a.softmax_heads)) for a in attentions]
        return {
            "state_bytes": sum(parts.values()),
            "state_parts": parts,
            "growth_bytes_per_token": sum(self.bytes_per_token(layer, heads) for layer, heads in growing),
            "flops": sum(attention.mixer.flops for attention in attentions if attention.mixer),
            "growth_flops_per_token": sum(
                layer.flops_per_key * heads // layer.key_value_heads for layer, heads in growing
            ),
        }


def rotary_scaling(config: Any) -> list[dict[str, Any]]:
    """The rotary scaling in force: one entry for all layers, or one per kind of layer with scaling; empty without
    scaling.

    An entry has the `type` and `factor` of `rope_parameters`, the `layers` (`all`, or a kind of `layer_types`), and the
    context lengths `before` (None if the configuration lacks it) and `after`.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {kind: part for kind, part in rope.items() if isinstance(part, dict)} or {"all": rope}
    longest = context_of(config)
    found = []
    for layers, parameters in kinds.items():
        kind, factor = parameters.get("rope_type", "default"), parameters.get("factor")
        if kind == "default":
            continue
        before, after = parameters.get("original_max_position_embeddings"), longest
        if kind == "dynamic" and longest and factor:  # only this type's configuration gives the shorter length
            before, after = longest, int(longest * factor)
        found.append({"layers": layers, "type": kind, "factor": factor, "before": before, "after": after})
    return found


def weightless_layers(config: LinearizedConfig) -> list[LinearizedAttention]:
    """Build the attention layers of this configuration on the meta device; bytes and FLOPs do not depend on weights."""
    base: Any = config.text_config
    family = family_of(base)
    with torch.device("meta"):
        return [
            LinearizedAttention(torch.nn.Module(), family, layer, config.mixer_of(index), index)
            for index, layer in enumerate(family.layers(base))
        ]


def inspect_model(source: Source, spec: MixerSpec, *, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Facts about `source`, and the result of converting it with `spec`.

    Args:
        spec: the mixer to convert with; ignored for a converted checkpoint, which has its own.
        dtype: of the caches; by default the checkpoint's own.

    Raises:
        ModelError: the configuration cannot be read, or the architecture is not supported.
        RecipeError: the mixer does not fit the model.
    """
    subject = _read(source, dtype)
    layers = subject.layers
    mixers = mixers_for(spec, layers) if subject.mixers is None else subject.mixers
    asked = LinearizedConfig(text_config=subject.config, mixers=mixers)
    attentions = weightless_layers(asked)
    costs = subject.costs(attentions)
    state, growth = costs["state_bytes"], costs["growth_bytes_per_token"]
    return {
        **subject.head(),
        "converted_layers": sum(asked.mixer_of(i).converts(layer) for i, layer in enumerate(layers)),
        "own_window_layers": [
            i for i, layer in enumerate(layers) if layer.window is not None and not asked.mixer_of(i).converts(layer)
        ],
        "softmax_layers": [i for i, a in enumerate(attentions) if a.mixer is None],
        "softmax_heads": {i: a.softmax_heads for i, a in enumerate(attentions) if a.mixer and a.softmax_heads},
        "mixers": asked.mixers,
        "kernels": _kernels(attentions, subject.held),
        **costs,
        "teacher_bytes_per_token": subject.teacher_bytes(1),
        "lengths": [
            {
                "tokens": n,
                "teacher_bytes": subject.teacher_bytes(n),
                "converted_bytes": state + n * growth,
                "ratio": subject.teacher_bytes(n) / (state + n * growth),
                "teacher_flops": subject.teacher_flops(n),
                "converted_flops": costs["flops"] + n * costs["growth_flops_per_token"],
            }
            for n in LENGTHS
        ],
    }


def _kernels(attentions: list[LinearizedAttention], dtype: torch.dtype) -> dict[str, dict[str, dict[str, str]]]:
    """Device -> part of the work -> the kernels that run the first converted layer there, and the reason."""
    mixer = next((attention.mixer for attention in attentions if attention.mixer is not None), None)
    if mixer is None:
        return {}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        device: {
            part: {"kernels": decision.kernels, "why": decision.why}
            for part, decision in decide_mixer(mixer.config, mixer.layer, device, dtype).items()
        }
        for device in devices
    }


def compare_mixers(
    source: Source, specs: dict[str, MixerSpec], *, dtype: torch.dtype | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compare the costs of several mixers for `source`.

    Args:
        specs: name -> mixer.
        dtype: of the caches; by default the checkpoint's own.

    Returns:
        the facts about the model, with its own costs under `teacher`; and one row per entry of `specs`, in order:
        `name` and costs, or `name` and `refused`, the reason that the mixer does not fit.

    Raises:
        ModelError: as `inspect_model`; or the model is already converted.
        RecipeError: none of `specs` fits.
    """
    subject = _read(source, dtype)
    if subject.mixers is not None:
        raise ModelError(f"{source.name}: is a converted model already; name its base model to compare recurrences")
    rows: list[dict[str, Any]] = []
    for name, spec in specs.items():
        try:
            config = LinearizedConfig(text_config=subject.config, mixers=mixers_for(spec, subject.layers))
        except RecipeError as error:
            rows.append({"name": name, "refused": str(error)})
        else:
            rows.append({"name": name, **subject.costs(weightless_layers(config))})
    if rows and all("refused" in row for row in rows):
        raise RecipeError(rows[0]["refused"])
    teacher = [
        {"tokens": n, "bytes": subject.teacher_bytes(n), "flops": subject.teacher_flops(n)} for n in FLOPS_LENGTHS
    ]
    return {**subject.head(), "teacher": teacher}, rows


def every_recurrence(spec: MixerSpec) -> dict[str, MixerSpec]:
    """`spec` with each recurrence in turn, and with `none`."""
    return {name: spec.model_copy(update={"recurrence": name}) for name in ("none", *RECURRENCES)}


def _read(source: Source, dtype: torch.dtype | None) -> _Subject:
    outer = load_config(source)
    converted = outer.model_type == "linearized"
    config = outer.text_config if converted else outer
    try:
        family = family_of(config)
    except ValueError as error:
        raise ModelError(f"{source.name}: {error}") from error
    held = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    return _Subject(
        source, config, outer.mixers if converted else None, family, family.layers(config), held, rotary_notes(config)
    )
