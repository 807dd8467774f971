"""`mixer.keep.budget`: which layers or key/value heads keep softmax, measured as `linearize probe` does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linearize.probe import Budget, Probe, ProbeOptions, run_probe
from linearize.recipe import SELF, KeepSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from transformers import PreTrainedModel

    from linearize.conversion.source import Source
    from linearize.recipe import Recipe

# Of text, and as many in texts with needles: every layer is windowed once on all of them.
_TOKENS = 2048


def select(
    source: Source, recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any, *, say: Callable[[str], None]
) -> tuple[Recipe, Probe]:
    """`recipe` with what is to be kept named in it, and the probe that says why.

    Args:
        teacher: made replaceable in place; convert it as if it were still the pretrained model.

    Raises:
        RecipeError: the budget holds nothing.
        DataError: there is no text to measure on.
    """
    keep = recipe.mixer.keep
    options = ProbeOptions(
        text=recipe.calibrate.source if recipe.calibrate else SELF,
        tokens=_TOKENS,
        damage=keep.unit,
        by=keep.by,
        budget=Budget.parse(keep.budget or ""),
        context=keep.context,
        seed=recipe.seed,
    )
    say(f"keep: measuring what each of the {keep.unit} is worth")
    probe = run_probe(source, recipe, options, say=say, teacher=teacher, tokenizer=tokenizer)
    assert probe.kept is not None  # noqa: S101 - damage was measured
    chosen = probe.kept.section
    heads = {layer: sorted({*found, *keep.heads.get(layer, [])}) for layer, found in chosen.get("heads", {}).items()}
    named = KeepSpec(
        layers=sorted({*keep.layers, *chosen.get("layers", [])}), every=keep.every, heads={**keep.heads, **heads}
    )
    mixer = recipe.mixer.model_copy(update={"keep": named})
    return recipe.model_copy(update={"mixer": mixer}), probe
