"""`mixer.keep.budget` and `mixer.reach`: which layers or key/value heads keep softmax, and which layers see farther
than others, by the damage of windowing each alone, measured as `linearize probe` does; and `mixer.landmarks_by`: which
layers get many landmarks (`shares.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linearize.calibration.shares import LENGTH, TEXTS, curves, share_landmarks
from linearize.conversion.convert import mixers_for
from linearize.conversion.limits import learned_positions
from linearize.errors import RecipeError
from linearize.families import family_of
from linearize.model import LinearizedForCausalLM
from linearize.probe import Budget, Probe, ProbeOptions, run_probe
from linearize.probe.damage import convertible_layers, parts_of
from linearize.probe.needles import make_needles
from linearize.probe.selection import SURE
from linearize.probe.telling import basis
from linearize.recipe import SELF, DataSpec, KeepSpec, SourceSpec
from linearize.training.data import load_data, reserved_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from transformers import PreTrainedModel

    from linearize.conversion.source import Source
    from linearize.evaluation.heldout import Estimate
    from linearize.probe.damage import Part
    from linearize.recipe import Recipe

# Of text, and as many in texts with needles: every layer is windowed once on all of them.
_TOKENS = 2048
_PURPOSE = "select"
# What a layer that recall does not need is left with, of an even share; below that many tokens none is cut.
_LEAST_SHARE, _LEAST_WINDOW = 4, 16


def selects(recipe: Recipe) -> bool:
    """Whether anything is left to be chosen."""
    return _probes(recipe) or recipe.mixer.landmarks_by is not None


def _probes(recipe: Recipe) -> bool:
    return recipe.mixer.keep.budget is not None or recipe.mixer.reach is not None


def select(
    source: Source, recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any, *, say: Callable[[str], None]
) -> tuple[Recipe, Probe | None, list[str]]:
    """`recipe` with what was chosen named in it, the probe behind that if there was one, and why, in lines.

    Args:
        teacher: made replaceable in place; convert it as if it were still the pretrained model.

    Raises:
        RecipeError: the budget holds nothing or has nothing to choose from, or single heads are to be kept and layers
            to reach farther.
        DataError: there is no text to measure on.
    """
    probe, why = None, list[str]()
    if _probes(recipe):
        recipe, probe, why = _by_damage(source, recipe, teacher, tokenizer, say=say)
    if recipe.mixer.landmarks_by is not None:
        recipe, told = _landmarks(recipe, teacher, tokenizer, say=say)
        why += told
    return recipe, probe, why


def _by_damage(
    source: Source, recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any, *, say: Callable[[str], None]
) -> tuple[Recipe, Probe | None, list[str]]:
    """Chooses what to keep, and windows, both among what the recipe does not keep in any case."""
    keep, reach = recipe.mixer.keep, recipe.mixer.reach
    if reach is not None and keep.unit == "heads" and keep.budget is not None:
        raise RecipeError("mixer.reach is shared out by layers; choose keep.unit: layers")
    unit = keep.unit if keep.budget is not None else "layers"
    layers = family_of(teacher.config).layers(teacher.config)
    parts = parts_of(layers, convertible_layers(layers, recipe.mixer, keep), unit, keep.heads)
    if len(parts) == 1:
        if keep.budget is not None:
            raise RecipeError(
                f"mixer.keep.budget: {_named_part(parts[0])} is all that is left to convert, so there is nothing to "
                "choose from; leave the budget out"
            )
        return _with_mixer(recipe, reach=None), None, [_alone(parts[0].layer)]
    length = ProbeOptions.length
    options = ProbeOptions(
        text=_text(recipe),
        tokens=_TOKENS,
        length=min(length, learned_positions(teacher) or length),
        damage=unit,
        by=keep.by,
        budget=None if keep.budget is None else Budget.parse(keep.budget),
        context=keep.context,
        seed=recipe.seed,
        keep=keep,
        reserved=reserved_tokens(recipe.stages),
        purpose=_PURPOSE,
    )
    say(f"select: measuring what each of the {options.damage} is worth")
    probe = run_probe(source, recipe, options, say=say, teacher=teacher, tokenizer=tokenizer)
    assert probe.kept is not None  # noqa: S101 - damage was measured
    changes: dict[str, Any] = {}
    why: list[str] = []
    if keep.budget is not None:
        changes["keep"] = keep = KeepSpec(**probe.kept.section)
        why += basis(probe)
        windows = recipe.mixer.windows
        if unused := sorted(keep.whole(len(layers)) & {*windows}):
            changes["windows"] = {layer: windows[layer] for layer in windows if layer not in unused}
            named = ", ".join(map(str, unused))
            why.append(
                f"Windows: those of mixer.windows for layers {named} are dropped, because these layers are kept."
            )
    if reach is not None:
        recall = {part.layer: one.recall for part, one in probe.parts.items() if part.layer not in keep.layers}
        changes["reach"] = None
        if len(recall) == 1:
            why.append(_alone(*recall))
        else:
            changes["windows"] = share_windows(recall, recipe.mixer.window, reach)
            why += _windows_told(changes["windows"], recipe.mixer.window, recall)
    return _with_mixer(recipe, **changes), probe, why


def _text(recipe: Recipe) -> SourceSpec:
    return recipe.calibrate.text if recipe.calibrate else SourceSpec(source=SELF)


def _with_mixer(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"mixer": recipe.mixer.model_copy(update=changes)})


def _named_part(part: Part) -> str:
    return f"layer {part.layer}" if part.head is None else f"key/value head {part.head} of layer {part.layer}"


def _alone(layer: int) -> str:
    return f"Windows: layer {layer} alone has one, so there is nothing to share out, and it stays as it is."


def _landmarks(
    recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any, *, say: Callable[[str], None]
) -> tuple[Recipe, list[str]]:
    """Shares landmarks out."""
    spec, by = recipe.mixer, recipe.mixer.landmarks_by
    # A probe has made it replaceable already.
    base: Any = teacher.config.text_config if isinstance(teacher, LinearizedForCausalLM) else teacher.config
    layers = family_of(base).layers(base)
    sections = mixers_for(spec, layers)
    chosen = sorted(
        index
        for section in sections
        for index in section.layers
        if section.converts(layers[index]) and index not in spec.landmark_layers
    )
    length = min(LENGTH, learned_positions(teacher) or LENGTH)
    reach = spec.window + spec.sinks + spec.landmarks
    if not chosen:  # the recipe names them all
        return recipe.model_copy(update={"mixer": spec.model_copy(update={"landmarks_by": None})}), []
    if length <= reach:
        raise RecipeError(
            f"mixer.landmarks_by: a text of {length:,} tokens is read exactly, so there is nothing to share out: lower "
            "mixer.landmarks"
        )
    text = load_data(
        DataSpec.of(_text(recipe), tokens=TEXTS * length, held_out=0),
        tokenizer=tokenizer,
        length=length,
        seed=recipe.seed,
        teacher=lambda: teacher,
        reserved=reserved_tokens(recipe.stages),
        purpose=_PURPOSE,
        progress=say,
    )
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
    most = sorted(shares, key=lambda layer: -shares[layer])[:3]
    why = [
        f"Landmarks: {', '.join(f'layer {layer} has {shares[layer]:,}' for layer in most)}, the fewest are "
        f"{min(shares.values())}; all together as many as {spec.landmarks} each. What they leave unread is estimated "
        f"at {costs[1]:.4f} nats per token, with equal shares at {costs[0]:.4f} ({len(rows)} texts, {len(needles)} "
        f"needles, {length:,} tokens each, {text.source})."
    ]
    mixer = spec.model_copy(update={"landmarks_by": None, "landmark_layers": {**spec.landmark_layers, **shares}})
    return recipe.model_copy(update={"mixer": mixer}), why


def share_windows(recall: Mapping[int, Estimate], window: int, reach: int) -> dict[int, int]:
    """Layer -> window, together no more tokens than `window` for each.

    Every layer first gets a part of an even share. Of the rest the layers that recall suffers most without take what
    they need to see `reach` tokens, one after the other; what is then left is shared evenly among the others.
    """
    least = min(window, max(window // _LEAST_SHARE, _LEAST_WINDOW))
    windows, spare = dict.fromkeys(sorted(recall), least), (window - least) * len(recall)
    sure = [layer for layer, one in recall.items() if one.mean > SURE * (one.stderr or 0.0)]
    for layer in sorted(sure, key=lambda layer: (-recall[layer].mean, layer)):
        more = min(max(reach - least, 0), spare)
        windows[layer] += more
        spare -= more
    others = [layer for layer in windows if windows[layer] == least]
    if others:
        for layer in others:
            windows[layer] += spare // len(others)
    return windows


def _windows_told(windows: Mapping[int, int], even: int, recall: Mapping[int, Estimate]) -> Sequence[str]:
    wide = sorted((layer for layer in windows if windows[layer] > even), key=lambda layer: -windows[layer])
    if not wide:
        return [f"Windows: {even} tokens each; no layer alone is sure to harm recall when it sees no more."]
    told = ", ".join(f"layer {layer} sees {windows[layer]:,} (fall {recall[layer].mean:.3f})" for layer in wide)
    rest = sorted({windows[layer] for layer in windows if layer not in wide})
    return [
        f"Windows: {told} tokens, the others {' or '.join(map(str, rest))}; all together as many as {even} each. They "
        "are those without which the log-probability of the needles' answers falls most, in nats per token."
    ]
