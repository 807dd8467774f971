"""The choices that a recipe leaves to measurements, and their checks, which need a configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linearize.conversion.swap import mixers_for
from linearize.errors import RecipeError
from linearize.families import family_of
from linearize.sources.limits import context_of

if TYPE_CHECKING:
    from linearize.model import MixerConfig
    from linearize.recipe import MixerSpec, Recipe

SCORE_LENGTH, SCORE_WINDOWS = 768, 3
"""The least length of a text for a learned score, in tokens and in windows: only queries beyond the window tell what a
token's loss costs."""

SHARE_LENGTH = 2048
"""Tokens of a text by which landmarks are shared out, unless the context is shorter: equal shares lose there."""


def selects(recipe: Recipe) -> bool:
    """True if the recipe leaves a choice to `select`."""
    mixer = recipe.mixer
    fits = mixer.landmark_score == "learned" or mixer.memory_dtype == "int4"
    return mixer.keep.budget is not None or mixer.landmarks_by is not None or fits


def check_choices(recipe: Recipe, config: Any) -> None:
    """Refuse landmarks that could not be measured on texts within the model's context.

    Args:
        config: of the pretrained model.

    Raises:
        RecipeError: the window leaves too little of a text, or window and landmarks read all of it.
    """
    spec = recipe.mixer
    sections = converted_sections(spec, config)
    landmarks = [one for one in sections.values() if one.landmarks]
    if spec.landmark_score == "learned" and landmarks:
        widest = max(one.window or 1 for one in landmarks)
        length = score_length(config, widest)
        if length < 2 * widest:
            raise RecipeError(
                f"mixer.landmark_score: learned fits to what queries read beyond the window, and a window of "
                f"{widest:,} leaves too little of texts of {length:,} tokens, the model's context: set mixer.window to "
                f"at most {length // 2:,}, or landmark_score: novelty"
            )
    elif spec.landmarks_by is not None and not {*sections} <= {*spec.landmark_layers}:
        length = text_length(config, SHARE_LENGTH)
        if length <= spec.window + spec.sinks + spec.landmarks:
            raise RecipeError(
                f"mixer.landmarks_by: a text of {length:,} tokens is read exactly, so there is nothing to share out: "
                "lower mixer.landmarks"
            )


def converted_sections(spec: MixerSpec, config: Any) -> dict[int, MixerConfig]:
    """Converted layer -> its mixer section, fitted to the layer."""
    # After a probe the teacher is already a `LinearizedForCausalLM`.
    base = config.text_config if config.model_type == "linearized" else config
    layers = family_of(base).layers(base)
    return {
        index: section.fitted(layers[index])
        for section in mixers_for(spec, layers)
        for index in section.layers
        if section.converts(layers[index])
    }


def text_length(config: Any, most: int) -> int:
    """Tokens of a text: `most`, or the model's context if that is less."""
    return min(most, context_of(config) or most)


def score_length(config: Any, window: int) -> int:
    """Tokens of a text for a learned score beside a window."""
    return text_length(config, max(SCORE_LENGTH, SCORE_WINDOWS * window))
