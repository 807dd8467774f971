"""Swap a pretrained model's attention for mixers, and check beforehand that it can be done.

The checks and `mixers_for` need only a configuration. Functions that build a model import transformers' modeling
modules lazily, because the import takes seconds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from linearize.errors import DataError, ModelError, RecipeError
from linearize.families import family_of
from linearize.model.configuration import CODING, MixerConfig
from linearize.model.mixer.mixer import Mixer
from linearize.sources.limits import context_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from linearize.families import AttentionLayer
    from linearize.model import LinearizedForCausalLM
    from linearize.recipe import MixerSpec, Recipe
    from linearize.sources.source import Source

BASELINE_SINKS = 4
"""The least number of sinks in `window_sections`."""


def mixers_for(spec: MixerSpec, layers: Sequence[AttentionLayer]) -> list[MixerConfig]:
    """Resolve a recipe's mixer section for these attention layers; one section per distinct kind of layer.

    A layer with its own sliding window already has bounded memory. Such layers keep their attention if other layers
    attend to the whole past; if all layers slide, all are converted.

    Raises:
        RecipeError: `keep`, `windows` or `landmark_layers` names a missing layer or head; `windows` names a layer that
            is not converted; landmarks are set for sliding layers; or no layer is left to convert.
    """
    count = len(layers)
    named_layers = {
        "keep": {*spec.keep.layers, *spec.keep.heads},
        "windows": {*spec.windows},
        "landmark_layers": {*spec.landmark_layers},
    }
    for key, named in named_layers.items():
        for index in sorted(named):
            if index not in range(count):
                raise RecipeError(f"mixer.{key}: there is no layer {index}; the model has 0 to {count - 1}")
    for index, chosen in sorted(spec.keep.heads.items()):
        for head in chosen:
            if head not in range(layers[index].key_value_heads):
                most = layers[index].key_value_heads - 1
                raise RecipeError(
                    f"mixer.keep.heads.{index}: there is no key/value head {head}; the layer has 0 to {most}"
                )
    full = [index for index in range(count) if layers[index].window is None]
    _check_landmarks(spec, layers)
    softmax = spec.keep.whole(count)
    kept = {*softmax, *(set(range(count)) - set(full) if full else ())}
    for index in sorted(kept & {*spec.windows}):
        why = "is kept as softmax by mixer.keep" if index in softmax else "has a sliding window of its own, which stays"
        raise RecipeError(f"mixer.windows: layer {index} {why}, so no other window is used there; leave it out")
    common = MixerConfig(
        layers=[],
        recurrence=spec.recurrence,
        window=spec.window,
        sinks=spec.sinks,
        mix=spec.mix,
        covers=spec.covers,
        feature_map=spec.feature_map,
        normalize=spec.normalize,
        rope=spec.rope,
        qk_norm=spec.qk_norm,
        slots=spec.slots,
        memory_dtype=spec.memory_dtype,
        negative_eigenvalues=spec.negative_eigenvalues,
        landmark_score=spec.landmark_score,
        gate_source=spec.gate.source,
        lower_bound=spec.gate.lower_bound,
        gate_scale=spec.gate.scale,
        gate_bias=spec.gate.bias,
        gate_divisor=spec.gate.divisor,
        gate_learned=spec.gate.learned,
    )
    kinds: dict[tuple[tuple[int, ...], int, int] | None, MixerConfig] = {}
    for index in range(count):
        heads = None if index in kept else tuple(sorted(set(spec.keep.heads.get(index, ()))))
        window = spec.window if heads is None else spec.windows.get(index, spec.window)
        if heads is None:
            kind, fresh = None, MixerConfig(layers=[], recurrence="none", window=None, sinks=0)
        else:
            kind = heads, window, spec.landmark_layers.get(index, spec.landmarks)
            fresh = replace(common, layers=[], window=window, softmax_heads=list(heads), landmarks=kind[2])
            try:
                fitted = fresh.fitted(layers[index])
            except ValueError as error:
                raise RecipeError(f"mixer.keep.heads.{index}: {error}") from error
            try:
                Mixer.check(fitted, layers[index])
            except ValueError as error:
                raise RecipeError(f"mixer: {error}") from error
        kinds.setdefault(kind, fresh).layers.append(index)
    sections = sorted(kinds.values(), key=lambda section: (section.window is None, len(section.softmax_heads)))
    if not any(section.converts(layers[index]) for section in sections for index in section.layers) and (
        softmax or spec.keep.heads
    ):
        raise RecipeError("mixer.keep: nothing is left to convert")
    given = spec.landmarks or any(spec.landmark_layers.values())
    if given and spec.landmark_layers and not any(section.landmarks for section in sections):
        raise RecipeError(
            "mixer.landmark_layers: no converted layer is left with a landmark; give some layers landmarks, or take a "
            "recipe without"
        )
    return sections


def _check_landmarks(spec: MixerSpec, layers: Sequence[AttentionLayer]) -> None:
    """Raises:
    RecipeError: landmarks for layers with their own sliding window, because these never attend beyond it.
    """
    for index, number in sorted(spec.landmark_layers.items()):
        if number and layers[index].window is not None:
            raise RecipeError(
                f"mixer.landmark_layers: layer {index} has a sliding window of its own and sees nothing beyond it, so "
                "it has no landmarks; leave it out"
            )
    if spec.landmarks and all(layer.window is not None for layer in layers):
        widest = max(layer.window or 1 for layer in layers)
        raise RecipeError(
            "mixer.landmarks: all layers of this model have sliding windows of their own and see nothing beyond them, "
            f"so none has landmarks; take the recipe window-gla with mixer.window below {widest:,}"
        )


def check_convertible(config: Any, source: Source, spec: MixerSpec | None = None) -> None:
    """Raises:
    ModelError: the model is already converted, or its architecture is not supported.
    RecipeError: `spec` does not fit the model.
    """
    if config.model_type == "linearized":
        raise ModelError(f"{source.name}: is a converted model already; finetune or eval it as it is")
    try:
        family = family_of(config)
    except ValueError as error:
        raise ModelError(f"{source.name}: {error}") from error
    if spec is not None:
        mixers_for(spec, family.layers(config))


def check_reach(recipe: Recipe, config: Any) -> None:
    """Refuse a recipe that converts no layer or has more landmarks than the model's context has tokens, and calibration
    or landmark sharing if no text is longer than the tokens that the mixer reads exactly.

    Args:
        config: of the pretrained model.

    Raises:
        DataError: rows of `calibrate.length` tokens are too short.
        RecipeError: the window is too wide, or the model's context too short.
    """
    spec, layers = recipe.mixer, family_of(config).layers(config)
    sections = mixers_for(spec, layers)
    converted = {index: one for one in sections for index in one.layers if one.converts(layers[index])}
    context = context_of(config)
    if not converted:
        widest = max(layer.window or 1 for layer in layers)
        raise RecipeError(
            f"mixer.window: {spec.window:,} tokens are no fewer than the sliding window of {widest:,} that this model "
            f"has itself, so nothing would be converted: set it below {widest:,}"
        )
    reach = min(one.exact_tokens for one in converted.values())
    measures = recipe.calibrate is not None or spec.landmarks_by is not None
    if measures and context is not None and context <= reach:
        landmarks = f" and {spec.landmarks:,} landmarks" if spec.landmarks else ""
        raise RecipeError(
            f"mixer: a window of {spec.window:,}, {spec.sinks:,} sinks{landmarks} read the first {reach:,} tokens of a "
            f"text exactly, and this model's context is {context:,} tokens: lower "
            f"{'mixer.landmarks or ' if landmarks else ''}mixer.window, or take the recipe window-gla"
        )
    if recipe.calibrate is not None and recipe.calibrate.length <= reach:
        raise DataError(
            f"calibrate.length {recipe.calibrate.length:,}: the first {reach:,} tokens are all read exactly, so such "
            "rows leave the recurrence nothing to answer: raise it"
        )
    for index, one in sorted(converted.items()):
        if context is not None and one.landmarks > context:
            key = f"landmark_layers.{index}" if index in spec.landmark_layers else "landmarks"
            raise RecipeError(
                f"mixer.{key}: {one.landmarks:,} landmarks, and this model's context is {context:,} tokens: choose "
                "fewer, or take the recipe window-gla"
            )


def convert_model(teacher: PreTrainedModel, spec: MixerSpec) -> LinearizedForCausalLM:
    """Swap the attention of `teacher` in place; see `LinearizedForCausalLM.from_teacher`."""
    from linearize.model import LinearizedForCausalLM

    base = teacher.config.text_config if isinstance(teacher, LinearizedForCausalLM) else teacher.config
    return LinearizedForCausalLM.from_teacher(teacher, mixers_for(spec, family_of(base).layers(base)))


def window_sections(mixers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`mixers` reduced to window, sinks and kept softmax heads, so models with the same window share one baseline."""
    # The baseline always has sinks, because a window without them is too weak a comparison and they cost almost
    # nothing.
    # It stores its tokens as the model does; only another storage than `auto` is named, as in older checkpoints.
    kept = ("layers", "window", "softmax_heads")
    return [
        {
            **{name: mixer[name] for name in kept if name in mixer},
            "recurrence": "none",
            "covers": "evicted",
            "sinks": max(mixer["sinks"], BASELINE_SINKS),
            **{name: kind for name, kind in mixer.items() if name == "memory_dtype" and kind != "auto"},
        }
        if mixer["window"] is not None
        else mixer
        for mixer in mixers
    ]


def window_baseline(
    teacher: PreTrainedModel, mixers: Sequence[dict[str, Any]], coding: Mapping[str, Tensor] | None = None
) -> LinearizedForCausalLM:
    """Convert `teacher` in place by `window_sections(mixers)`: the baseline that needs no training.

    Args:
        coding: of the converted model, so that the baseline stores keys as that model does; see `coding_of`.
    """
    from linearize.model import LinearizedForCausalLM

    model = LinearizedForCausalLM.from_teacher(teacher, [MixerConfig(**section) for section in window_sections(mixers)])
    own = coding_of(model)
    for name, value in (coding or {}).items():
        if name in own:
            own[name].copy_(value)
    return model


def coding_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters that scale and shift keys before they are coded, by name."""
    return {name: x.detach() for name, x in model.named_parameters() if name.endswith(CODING)}


def converted_layers(model: LinearizedForCausalLM) -> int:
    """Number of layers whose pretrained attention is replaced."""
    config = model.config
    layers = family_of(config.text_config).layers(config.text_config)
    return sum(config.mixer_of(index).converts(layer) for index, layer in enumerate(layers))
