"""`mixer.keep.budget` chooses the layers or key/value heads that keep softmax, by the damage of windowing each alone,
as `linearize probe` measures it. `mixer.landmarks_by` distributes landmarks among the layers (`shares.py`),
`mixer.landmark_score: learned` fits what chooses them (`scores.py`), and their codes are fitted to keys and queries
(`coding.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from linearize.calibration import coding, scores
from linearize.calibration.shares import TEXTS, curves, share_landmarks
from linearize.conversion.choices import (
    SHARE_LENGTH,
    check_choices,
    converted_sections,
    score_length,
    text_length,
)
from linearize.data.load import load_data, reserved_tokens
from linearize.errors import RecipeError
from linearize.families import family_of
from linearize.model import LinearizedForCausalLM
from linearize.probe import Budget, Probe, ProbeOptions, run_probe
from linearize.probe.damage import convertible_layers, parts_of
from linearize.probe.needles import make_needles
from linearize.probe.telling import basis
from linearize.recipe import BUILTIN, DataSpec, KeepSpec, SourceSpec
from linearize.sources.limits import context_of, learned_positions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor
    from transformers import PreTrainedModel

    from linearize.data.rows import TrainingData
    from linearize.probe.damage import Part
    from linearize.recipe import Recipe
    from linearize.sources.source import Source

# Of text, and the same number in texts with needles. One pass over all of them per layer.
_TOKENS = 2048
_PURPOSE = "select"


class Choices(NamedTuple):
    """The choices of `select`.

    Attributes:
        recipe: the recipe with the choices named in it.
        probe: the measurement behind `keep.budget`, or None.
        why: the reasons in lines.
        fitted: layer -> the values of its mixer's own parameters, by name.
    """

    recipe: Recipe
    probe: Probe | None
    why: list[str]
    fitted: dict[int, dict[str, Tensor]]


def select(
    source: Source, recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any, *, say: Callable[[str], None]
) -> Choices:
    """Make the choices that the recipe leaves open.

    Args:
        teacher: its attention is replaced in place by an equal, replaceable one; convert it as the pretrained model.

    Raises:
        RecipeError: the budget holds nothing, there is nothing to choose from, or no text is long enough to choose by.
        DataError: there is no text to measure on.
    """
    probe, why = None, list[str]()
    check_choices(recipe, teacher.config)
    if recipe.mixer.keep.budget is not None:
        recipe, probe, why = _by_damage(source, recipe, teacher, tokenizer, say=say)
    fitted: dict[int, dict[str, Tensor]] = {}
    if recipe.mixer.memory_dtype != "auto":
        fitted = _coding(recipe, teacher, tokenizer, say=say)
    if recipe.mixer.landmark_score == "learned":
        recipe, weights, told = _scores(recipe, teacher, tokenizer, say=say)
        why += told
        for layer, weight in weights.items():
            fitted.setdefault(layer, {})["score_weight"] = weight
    elif recipe.mixer.landmarks_by is not None:
        recipe, told = _landmarks(recipe, teacher, tokenizer, say=say)
        why += told
    return Choices(recipe, probe, why, fitted)


def _by_damage(
    source: Source, recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any, *, say: Callable[[str], None]
) -> tuple[Recipe, Probe, list[str]]:
    """Spend `keep.budget` on layers or heads that the recipe does not keep anyway."""
    keep = recipe.mixer.keep
    assert keep.budget is not None  # noqa: S101 - for the type checker; called only with one
    layers = family_of(teacher.config).layers(teacher.config)
    parts = parts_of(layers, convertible_layers(layers, recipe.mixer, keep), keep.unit, keep.heads)
    if len(parts) == 1:
        raise RecipeError(
            f"mixer.keep.budget: {_named_part(parts[0])} is all that is left to convert, so there is nothing to "
            "choose from; leave the budget out"
        )
    length = ProbeOptions.length
    options = ProbeOptions(
        text=_text(recipe),
        tokens=_TOKENS,
        length=min(length, learned_positions(teacher) or length),
        damage=keep.unit,
        by=keep.by,
        budget=Budget.parse(keep.budget),
        context=keep.context,
        seed=recipe.seed,
        keep=keep,
        reserved=reserved_tokens(recipe.stages),
        purpose=_PURPOSE,
    )
    say(f"select: measuring what each of the {options.damage} is worth")
    probe = run_probe(source, recipe, options, say=say, teacher=teacher, tokenizer=tokenizer)
    assert probe.kept is not None  # noqa: S101 - damage was measured
    keep = KeepSpec(**probe.kept.section)
    windows, why = recipe.mixer.windows, basis(probe)
    if unused := sorted(keep.whole(len(layers)) & {*windows}):
        windows = {layer: windows[layer] for layer in windows if layer not in unused}
        named = ", ".join(map(str, unused))
        why.append(f"Windows: those of mixer.windows for layers {named} are dropped, because these layers are kept.")
    mixer = recipe.mixer.model_copy(update={"keep": keep, "windows": windows})
    return recipe.model_copy(update={"mixer": mixer}), probe, why


def _text(recipe: Recipe) -> SourceSpec:
    # The built-in text takes no time; text by the teacher takes minutes.
    return recipe.calibrate.text if recipe.calibrate else SourceSpec(source=BUILTIN)


def _named_part(part: Part) -> str:
    return f"layer {part.layer}" if part.head is None else f"key/value head {part.head} of layer {part.layer}"


def _rows(recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any, count: int, length: int, say: Any) -> TrainingData:
    return load_data(
        DataSpec.of(_text(recipe), tokens=count * length, held_out=0),
        tokenizer=tokenizer,
        length=length,
        seed=recipe.seed,
        teacher=lambda: teacher,
        reserved=reserved_tokens(recipe.stages),
        purpose=_PURPOSE,
        progress=say,
    )


def _coding(
    recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any, *, say: Callable[[str], None]
) -> dict[int, dict[str, Tensor]]:
    """Fit the scale and shift of keys before they are coded, and check the keys that a recurrence beside landmarks
    reads. Only layers with landmarks or without a recurrence have either."""
    sections = {
        layer: one
        for layer, one in converted_sections(recipe.mixer, teacher.config).items()
        if one.landmarks or one.recurrence == "none"
    }
    if not sections:
        return {}
    length = text_length(teacher.config, coding.LENGTH)
    row = _rows(recipe, teacher, tokenizer, 1, length, say).train.input_ids[0]
    return coding.fit_coding(LinearizedForCausalLM.from_teacher(teacher, []).eval(), sections, row)


@torch.no_grad()
def put_fitted(model: LinearizedForCausalLM, fitted: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Set own parameters of mixers, by layer and name. A layer that was left without a landmark has no score."""
    for layer, values in fitted.items():
        mixer = model.attention_layers[layer].mixer
        assert mixer is not None  # noqa: S101 - only converted layers are fitted
        own = dict(mixer.named_parameters(recurse=False))
        for name, value in values.items():
            if name != "score_weight" or name in own:
                own[name].copy_(value)


def _scores(
    recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any, *, say: Callable[[str], None]
) -> tuple[Recipe, dict[int, Tensor], list[str]]:
    """Fit the score of each layer with landmarks, and distribute the landmarks by it if the recipe asks for it."""
    spec, by = recipe.mixer, recipe.mixer.landmarks_by
    sections = {layer: one for layer, one in converted_sections(spec, teacher.config).items() if one.landmarks}
    if not sections:
        return recipe, {}, []
    widest = max(one.window or 1 for one in sections.values())
    length = score_length(teacher.config, widest)
    text = _rows(recipe, teacher, tokenizer, scores.ROWS, length, say)
    lessons = scores.lessons(tokenizer, list(text.train.input_ids), recipe.seed, widest)
    model = LinearizedForCausalLM.from_teacher(teacher, []).eval()
    known = scores.measure(model, sections, lessons, say=say)
    fitted = {layer: one.weight() for layer, one in known.items()}
    asked = sum(lesson.recall for lesson in lessons)
    why = [
        f"Landmarks: scores are fitted to what losing a token costs, in {len(lessons)} texts of up to {length:,} "
        f"tokens, {asked} of them with questions ({text.source})."
    ]
    if by is not None:
        chosen = {layer: one for layer, one in known.items() if layer not in spec.landmark_layers}
        least = min(one.window or 1 for one in sections.values())
        most = context - least - spec.sinks if (context := context_of(teacher.config)) else None
        shares = scores.shares(chosen, fitted, spec.landmarks, recall=by == "recall", most=most) if chosen else {}
        why += [_told(shares, spec.landmarks)] if shares else []
        named = {"landmarks_by": None, "landmark_layers": {**spec.landmark_layers, **shares}}
        recipe = recipe.model_copy(update={"mixer": spec.model_copy(update=named)})
    return recipe, fitted, why


def _told(shares: dict[int, int], equal: int) -> str:
    most = sorted(shares, key=lambda layer: -shares[layer])[:3]
    total, even = sum(shares.values()), equal * len(shares)
    all_of_them = f"as many as {equal:,} each" if total == even else f"{total:,}, where {equal:,} each are {even:,}"
    return (
        f"Landmarks: {', '.join(f'layer {layer} has {shares[layer]:,}' for layer in most)}, the fewest are "
        f"{min(shares.values()):,}; all together {all_of_them}."
    )


def _landmarks(
    recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any, *, say: Callable[[str], None]
) -> tuple[Recipe, list[str]]:
    """Distribute the landmarks among the layers."""
    spec, by = recipe.mixer, recipe.mixer.landmarks_by
    chosen = sorted(layer for layer in converted_sections(spec, teacher.config) if layer not in spec.landmark_layers)
    length = text_length(teacher.config, SHARE_LENGTH)
    if not chosen:  # the recipe names the number of every layer
        return recipe.model_copy(update={"mixer": spec.model_copy(update={"landmarks_by": None})}), []
    text = _rows(recipe, teacher, tokenizer, TEXTS, length, say)
    rows = text.train.input_ids
    needles = []
    if by == "recall":
        needles = make_needles(
            tokenizer,
            tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True),
            count=TEXTS,
            length=length,
            window=spec.window,
            sinks=spec.sinks,
            seed=recipe.seed,
        )
    model = LinearizedForCausalLM.from_teacher(teacher, []).eval()
    found = curves(model, spec, chosen, list(rows), needles, say=say)
    shares = share_landmarks(found, spec.landmarks, recall=bool(needles))
    even = dict.fromkeys(chosen, spec.landmarks)
    costs = [sum(found[layer].cost(n, recall=False) for layer, n in one.items()) for one in (even, shares)]
    why = [
        f"{_told(shares, spec.landmarks)} What they leave unread is estimated at {costs[1]:.4f} nats per token, with "
        f"equal shares at {costs[0]:.4f} ({len(rows)} texts, {len(needles)} needles, {length:,} tokens each, "
        f"{text.source})."
    ]
    mixer = spec.model_copy(update={"landmarks_by": None, "landmark_layers": {**spec.landmark_layers, **shares}})
    return recipe.model_copy(update={"mixer": mixer}), why
