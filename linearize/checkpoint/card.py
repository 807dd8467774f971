"""The model card of a converted checkpoint."""

from __future__ import annotations

import html
import json
import re
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags: [linearize, gated-linear-attention, recurrent]
{matter}---

# {name}

{base}, with its attention replaced by a softmax window and a gated linear recurrence (made by `linearize` {version}).
{memory}

| | |
|---|---|
{mixers}
{start}{training}
## How to load it

```python
import linearize  # without the package: leave this out, and pass trust_remote_code=True for the model
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({quoted})
tokenizer = AutoTokenizer.from_pretrained({quoted}, trust_remote_code=False)  # needs no code
```

`linearize.json` says how this checkpoint was made and holds the SHA-256 of each file.
{measured}"""
_NOT_MEASURED = """
What the conversion cost in quality is not written here; measure it:
{evaluate}.
"""

_HEADINGS = {
    "selection": "What keeps softmax or sees farther, and why",
    "calibration": "Calibration, before any training (`calibration.md` has each layer)",
}


@dataclass(frozen=True)
class CardFacts:
    """Content of a card that the checkpoint itself does not hold.

    Attributes:
        licence: keys of the base model's front matter that begin with `license`; they apply to this model too.
        sections: further sections as Markdown, such as results and the recipe.
    """

    licence: Mapping[str, str] = field(default_factory=dict)
    sections: Sequence[str] = ()


def model_card(
    name: str,
    provenance: dict[str, Any],
    mixers: list[dict[str, Any]],
    state_bytes: int,
    growth_bytes: int,
    facts: CardFacts | None = None,
) -> str:
    """Build the card's Markdown.

    Args:
        name: the checkpoint's name.
        provenance: the content of `linearize.json`.
        mixers: the configuration's mixer sections.
        state_bytes: memory per sequence that does not depend on its length, in bytes.
        growth_bytes: additional bytes per token in layers and heads that keep softmax over the whole past.
        facts: further content; without it the card states that nothing was measured.
    """
    base = provenance["base"]
    facts = facts or CardFacts()
    rows = [f"| layers {ranges(m['layers'])} | {_words(m)} |" for m in mixers]
    stages = provenance.get("stages", [])
    start = "".join(
        f"\n{_HEADINGS[name]}:\n\n" + "".join(f"- {line}\n" for line in lines)
        for name, lines in provenance.get("start", {}).items()
    )
    training = "\n".join(
        f"Trained: {stage['objective']}, {stage['tokens']:,} tokens of {_text(stage['data'])}." for stage in stages
    )
    evaluate = _code(f"linearize eval {shlex.quote(name)}")
    matter = {**({"base_model": base["model"]} if base["kind"] == "hub" else {}), **facts.licence}
    return _TEMPLATE.format(
        name=_text(name),
        quoted=json.dumps(name),
        base=_text(base["model"] if base["kind"] == "hub" else base["name"]),
        matter="".join(f"{key}: {_yaml(value)}\n" for key, value in matter.items()),
        version=provenance["versions"]["linearize"],
        memory=(
            f"Its memory is {state_bytes:,} bytes per sequence and, where softmax is kept, {growth_bytes:,} per token."
            if growth_bytes
            else f"Its memory does not grow with the context: {state_bytes:,} bytes per sequence, whatever its length."
        ),
        mixers="\n".join(rows),
        start=start,
        training=f"\n{training}\n" if training else "",
        measured="".join(f"\n{section}" for section in facts.sections) or _NOT_MEASURED.format(evaluate=evaluate),
    )


def _text(value: str) -> str:
    """Put a foreign name on one line and escape its Markdown and HTML."""
    line = html.escape(" ".join(value.split()), quote=False)
    return re.sub(r"([\\`*\[\]|~#$]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def _code(value: str) -> str:
    """A code span that stays valid with backticks in `value`."""
    line = " ".join(value.split())
    if "`" not in line:
        return f"`{line}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", line))))
    return f"{fence} {line} {fence}"


def _yaml(value: str) -> str:
    return value if re.fullmatch(r"[\w./-]+", value) else json.dumps(value)


def _words(mixer: dict[str, Any]) -> str:
    if mixer["window"] is None:
        return "pretrained attention, kept"
    heads = mixer.get("softmax_heads")
    slots, stored = mixer.get("landmarks"), mixer.get("memory_dtype", "auto")
    return (
        f"{mixer['recurrence']}, window {mixer['window']}, sinks {mixer['sinks']}, "
        f"{f'landmarks {slots}, ' if slots else ''}mix {mixer['mix']}, covers {mixer['covers']}"
        f"{'' if stored == 'auto' else f', memory in {stored}'}"
        f"{f'; key/value heads {ranges(heads)} keep softmax' if heads else ''}"
    )


def ranges(layers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
