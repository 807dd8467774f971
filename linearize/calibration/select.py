"""`mixer.keep.budget` and `mixer.reach`: which layers or key/value heads keep softmax, and which layers see farther
than others, by the damage of windowing each alone, measured as `linearize probe` does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linearize.errors import RecipeError
from linearize.probe import Budget, Probe, ProbeOptions, run_probe
from linearize.probe.selection import SURE
from linearize.probe.telling import basis
from linearize.recipe import SELF, KeepSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from transformers import PreTrainedModel

    from linearize.conversion.source import Source
    from linearize.evaluation.heldout import Estimate
    from linearize.recipe import Recipe

# Of text, and as many in texts with needles: every layer is windowed once on all of them.
_TOKENS = 2048
# What a layer that recall does not need is left with, of an even share; below that many tokens none is cut.
_LEAST_SHARE, _LEAST_WINDOW = 4, 16


def selects(recipe: Recipe) -> bool:
    """Whether anything is left to be chosen."""
    return recipe.mixer.keep.budget is not None or recipe.mixer.reach is not None


def select(
    source: Source, recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any, *, say: Callable[[str], None]
) -> tuple[Recipe, Probe, list[str]]:
    """`recipe` with what was chosen named in it, the probe behind that, and why, in lines.

    Args:
        teacher: made replaceable in place; convert it as if it were still the pretrained model.

    Raises:
        RecipeError: the budget holds nothing, or single heads are to be kept and layers to reach farther.
        DataError: there is no text to measure on.
    """
    keep, reach = recipe.mixer.keep, recipe.mixer.reach
    if reach is not None and keep.unit == "heads" and keep.budget is not None:
        raise RecipeError("mixer.reach is shared out by layers; choose keep.unit: layers")
    options = ProbeOptions(
        text=recipe.calibrate.source if recipe.calibrate else SELF,
        tokens=_TOKENS,
        damage=keep.unit if keep.budget is not None else "layers",
        by=keep.by,
        budget=None if keep.budget is None else Budget.parse(keep.budget),
        context=keep.context,
        seed=recipe.seed,
    )
    say(f"select: measuring what each of the {options.damage} is worth")
    probe = run_probe(source, recipe, options, say=say, teacher=teacher, tokenizer=tokenizer)
    assert probe.kept is not None  # noqa: S101 - damage was measured
    changes: dict[str, Any] = {}
    why: list[str] = []
    if keep.budget is not None:
        named = _named(keep, probe.kept.section)
        changes["keep"], keep = named, named
        why += basis(probe)
    if reach is not None:
        recall = {part.layer: one.recall for part, one in probe.parts.items() if part.layer not in keep.layers}
        changes |= {"reach": None, "windows": share_windows(recall, recipe.mixer.window, reach)}
        why += _windows_told(changes["windows"], recipe.mixer.window, recall)
    mixer = recipe.mixer.model_copy(update=changes)
    return recipe.model_copy(update={"mixer": mixer}), probe, why


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


def _named(keep: KeepSpec, chosen: Mapping[str, Any]) -> KeepSpec:
    """What the recipe named itself, and what was chosen."""
    heads = {layer: sorted({*found, *keep.heads.get(layer, [])}) for layer, found in chosen.get("heads", {}).items()}
    return KeepSpec(
        layers=sorted({*keep.layers, *chosen.get("layers", [])}), every=keep.every, heads={**keep.heads, **heads}
    )


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
