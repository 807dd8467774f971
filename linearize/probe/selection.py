"""Choose the layers or key/value heads to keep as softmax, by damage per byte of their cache."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from linearize.errors import RecipeError
from linearize.probe.damage import NO_HEADS
from linearize.recipe.schema import BUDGET, KeepSpec
from linearize.report.formatting import readable_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from linearize.evaluation.heldout import Estimate
    from linearize.families import AttentionLayer
    from linearize.probe.damage import Heads, Part

DEFAULT_SHARE = 0.1
SURE = 2.0
"""Standard errors above zero from which a damage is significant."""

_COMMENT_WIDTH = 110
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Budget:
    """Limit on the kept caches of one sequence: a share of the pretrained model's cache, or bytes."""

    share: float | None = None
    nbytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`10%`, `500000`, `1.5MB`, `2 GiB`.

        Raises:
            RecipeError: anything else.
        """
        match = BUDGET.fullmatch(text)
        number, unit = (float(match[1]), (match[2] or "").lower()) if match else (0.0, "")
        if match and unit == "%" and 0 < number <= 100:
            return cls(share=number / 100)
        if match and unit in _UNITS and number > 0:
            return cls(nbytes=int(number * _UNITS[unit]))
        raise RecipeError(f"budget {text}: expected a share of the teacher's cache or bytes, such as 10% or 2MB")

    def at(self, cache_bytes: int) -> int:
        """The budget in bytes, given the size of the pretrained model's cache."""
        return self.nbytes if self.nbytes is not None else int((self.share or 0.0) * cache_bytes)


def part_bytes(
    part: Part, layers: Sequence[AttentionLayer], itemsize: int, context: int, heads: Heads = NO_HEADS
) -> int:
    """Bytes that keeping `part` adds to one sequence's cache of `context` tokens that already holds `heads`."""
    layer = layers[part.layer]
    added = layer.key_value_heads - len({*heads.get(part.layer, ())}) if part.head is None else 1
    tokens = context if layer.window is None else min(context, layer.window)
    return tokens * added * (layer.key_width + layer.value_width) * itemsize


def budget_bytes(budget: Budget | None, sizes: Mapping[Part, int], cache_bytes: int, context: int) -> int:
    """The budget in bytes; the default is a tenth of the pretrained model's cache, at least the smallest part.

    Raises:
        RecipeError: it is smaller than every part.
    """
    smallest = min(sizes.values())
    if budget is None:
        return max(Budget(share=DEFAULT_SHARE).at(cache_bytes), smallest)
    found = budget.at(cache_bytes)
    if found < smallest:
        part = next(part for part in sizes if sizes[part] == smallest)
        what = "a layer" if part.head is None else "a key/value head"
        raise RecipeError(
            f"a budget of {readable_bytes(found)} keeps nothing: at {context:,} tokens {what} takes "
            f"{readable_bytes(smallest)}; raise the budget, or lower the context"
        )
    return found


def choose(totals: Mapping[Part, Estimate], sizes: Mapping[Part, int], budget: int) -> list[Part]:
    """The parts to keep, best first: by damage per byte, as long as they fit.

    Only damage of more than `SURE` standard errors counts. At least one part is not chosen, because a conversion must
    convert something.
    """
    real = [part for part, total in totals.items() if total.mean > SURE * (total.stderr or 0.0)]
    chosen: list[Part] = []
    for part in sorted(real, key=lambda part: totals[part].mean / sizes[part], reverse=True):
        if sizes[part] <= budget and len(chosen) < len(totals) - 1:
            chosen.append(part)
            budget -= sizes[part]
    return chosen


def keep_section(
    parts: Sequence[Part], layers: Sequence[AttentionLayer], keep: KeepSpec | None = None
) -> dict[str, Any]:
    """The recipe's `mixer.keep` for these parts and those of `keep`; a layer with all heads kept is listed whole."""
    keep = keep or KeepSpec()
    whole = {*keep.layers, *(part.layer for part in parts if part.head is None)}
    heads = {index: {*kept} for index, kept in keep.heads.items()}
    for part in parts:
        if part.head is not None:
            heads.setdefault(part.layer, set()).add(part.head)
    whole |= {index for index, kept in heads.items() if len(kept) == layers[index].key_value_heads}
    some = {index: sorted(heads[index]) for index in sorted(heads) if index not in whole}
    named = {"layers": sorted(whole), "every": keep.every, "heads": some}
    return {key: value for key, value in named.items() if value}


def fragment(keep: Mapping[str, Any], comments: Sequence[str]) -> str:
    """A recipe of `mixer.keep` alone, preceded by comments."""
    wrapped = [part for line in comments for part in textwrap.wrap(line, _COMMENT_WIDTH, break_long_words=False)]
    lines = [*(f"# {line}" for line in wrapped), "mixer:", "  keep:", *(f"    {k}: {v}" for k, v in keep.items())]
    return "\n".join(lines) + "\n"


def set_option(keep: Mapping[str, Any]) -> str:
    """`mixer.keep` as a value of `--set`."""
    return f"mixer.keep={{{', '.join(f'{key}: {value}' for key, value in keep.items())}}}"
