"""A probe from beginning to end: text and needles, attention of each head, damage of windowing, and the choice."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal

import torch

from linearize.checkpoint.write import versions
from linearize.conversion.swap import check_convertible
from linearize.data.load import load_data
from linearize.errors import DataError, ModelError
from linearize.evaluation.progress import duration
from linearize.families import family_of
from linearize.model import LinearizedForCausalLM
from linearize.probe.damage import (
    Damage,
    Part,
    Reading,
    all_but,
    convertible_layers,
    damage,
    everything_but,
    parts_of,
    read,
    windowed,
)
from linearize.probe.needles import Needle, answer_log_probability, make_needles
from linearize.probe.selection import SURE, Budget, budget_bytes, choose, keep_section, part_bytes
from linearize.probe.statistics import HeadStatistics, Tally, mass_on, observed
from linearize.recipe import SELF, DataSpec, KeepSpec, SourceSpec
from linearize.sources.limits import check_length, context_of
from linearize.sources.source import Source, load_config, load_model, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from linearize.data.rows import Rows
    from linearize.families import AttentionLayer, Projections
    from linearize.recipe import Recipe

DEFAULT_CONTEXT = 8192
LEAST_ROWS = 2
"""The minimum for a standard error."""
Kind = Literal["layers", "heads", "none"]


@dataclass(frozen=True)
class ProbeOptions:
    """Options of a probe: its text and its measurements.

    Attributes:
        text: `self` (the teacher generates it), `builtin`, a file, or a data set of the Hub, with its field and so on,
            as in recipes.
        tokens: tokens of text, at least two rows; the same number is read again in texts with needles.
        length: tokens of a row, and of a text with a needle.
        damage: the parts to window one at a time: `layers`, `heads` (key/value heads), or `none`.
        by: the damage that counts: `recall` is that of loss and recall together, `loss` that of loss alone.
        budget: the limit of the kept caches; None is a tenth of the teacher's cache, or one part if that is larger.
        context: tokens of a sequence at which the budget holds; None is the length that the model was trained on.
        seed: the seed of the text and of the needles.
        keep: layers and heads that are kept anyway: they are never windowed, and not among the parts to choose from.
            Its budget is ignored.
        reserved, purpose: arguments of `load_data` for the text.
    """

    text: SourceSpec = field(default_factory=lambda: SourceSpec(source=SELF))
    tokens: int = 4096
    length: int = 512
    damage: Kind = "layers"
    by: Literal["recall", "loss"] = "recall"
    budget: Budget | None = None
    context: int | None = None
    seed: int = 0
    keep: KeepSpec = field(default_factory=KeepSpec)
    reserved: Mapping[str, int] = field(default_factory=dict)
    purpose: str = ""


@dataclass(frozen=True)
class Kept:
    """The chosen layers or heads.

    Attributes:
        parts: best first; empty if no damage is significant.
        section: the recipe's `mixer.keep`, with the parts that are kept anyway.
        nbytes: bytes of the parts' caches at `context` tokens.
        budget: the limit of `nbytes`.
        context: tokens of a sequence.
        damage: the remaining damage when all other parts are windowed; None if nothing is kept.
    """

    parts: list[Part]
    section: dict[str, Any]
    nbytes: int
    budget: int
    context: int
    damage: Damage | None


@dataclass
class Probe:
    """The figures of a probe.

    Attributes:
        layers: the attention of each layer.
        convertible: the layers that a conversion would change and that are not kept anyway.
        heads: for each layer, the statistics of its query heads.
        queries: the number of queries that these are means over.
        source: a readable name of the text.
        teacher: loss and recall of the pretrained model.
        parts: the damage of windowing each part alone.
        windowed: the damage of windowing all of them; None if no damage was measured.
        recall_counts: True if recall is part of the damage: it is requested, and windowing everything lowers it.
        sizes: bytes of each part's cache at `kept.context` tokens.
    """

    model: str
    options: ProbeOptions
    window: int
    sinks: int
    layers: list[AttentionLayer]
    convertible: list[int]
    heads: list[list[HeadStatistics]]
    queries: int
    rows: int
    needles: int
    source: str
    teacher: Reading
    parts: dict[Part, Damage] = field(default_factory=dict)
    sizes: dict[Part, int] = field(default_factory=dict)
    windowed: Damage | None = None
    recall_counts: bool = False
    kept: Kept | None = None
    command: str = ""
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def ranked(self) -> list[Part]:
        """The parts by their damage, largest first."""
        return sorted(self.parts, key=lambda part: self.parts[part].total(self.recall_counts).mean, reverse=True)


def run_probe(
    source: Source,
    recipe: Recipe,
    options: ProbeOptions,
    *,
    progress: Callable[[str, str, int, int], None] = lambda system, task, done, total: None,
    say: Callable[[str], None] = lambda line: None,
    command: str = "",
    teacher: PreTrainedModel | None = None,
    tokenizer: Any = None,
) -> Probe:
    """Probe a pretrained model.

    Args:
        recipe: gives window, sinks and dtype; its `mixer.keep` is ignored (`options.keep` is not).
        progress: see `runner.Progress`.
        teacher, tokenizer: those of `source`, if already loaded; the teacher is changed in place.

    Raises:
        ModelError: the model cannot be read or converted, or its logits are not finite.
        RecipeError: no layer is wider than the window, or the budget is smaller than any part.
        DataError: the text cannot be read, or is too short for the window.
    """
    config = load_config(source) if teacher is None else teacher.config
    if config.model_type == "linearized":
        raise ModelError(f"{source.name}: is a converted model already; probe its base model")
    check_convertible(config, source)
    spec, layers, named = recipe.mixer, family_of(config).layers(config), options.keep.heads
    convertible = convertible_layers(layers, spec, options.keep)
    if options.length <= spec.window + spec.sinks:
        raise DataError(
            f"rows of {options.length:,} tokens have nothing beyond a window of {spec.window:,} and {spec.sinks} "
            "sinks: raise --length of `linearize probe`, or lower mixer.window"
        )
    tokenizer, teacher = tokenizer or load_tokenizer(source), teacher or load_model(source, dtype=recipe.dtype)
    check_length(teacher, options.length, "--length")
    context = options.context or context_of(config) or DEFAULT_CONTEXT
    parts = [] if options.damage == "none" else parts_of(layers, convertible, options.damage, named)
    itemsize = teacher.dtype.itemsize
    sizes = {part: part_bytes(part, layers, itemsize, context, named) for part in parts}
    cache = sum(part_bytes(Part(index), layers, itemsize, context) for index in range(len(layers)))
    budget = budget_bytes(options.budget, sizes, cache, context) if parts else 0

    text = load_data(
        DataSpec.of(options.text, tokens=max(options.tokens, LEAST_ROWS * options.length), held_out=0),
        tokenizer=tokenizer,
        length=options.length,
        seed=options.seed,
        teacher=lambda: teacher,
        reserved=options.reserved,
        purpose=options.purpose,
        progress=say,
    )
    if len(text.train) < LEAST_ROWS:
        raise DataError(
            f"{text.source}: a single row of {options.length:,} tokens does not tell how sure its figures are: lower "
            "--length, or use more text"
        )
    needles = make_needles(
        tokenizer,
        tokenizer.batch_decode(text.train.input_ids.tolist(), skip_special_tokens=True),
        count=len(text.train),
        length=options.length,
        window=spec.window,
        sinks=spec.sinks,
        seed=options.seed,
    )
    # Without mixers this is the pretrained model, with attention that can be observed and replaced.
    bench = _Bench(
        LinearizedForCausalLM.from_teacher(teacher, []), layers, text.train, needles, spec.window, spec.sinks
    )
    started = time.monotonic()
    heads, queries = bench.attend()
    seconds = time.monotonic() - started
    found = Probe(
        model=source.reference,
        options=options,
        window=spec.window,
        sinks=spec.sinks,
        layers=layers,
        convertible=convertible,
        heads=heads,
        queries=queries,
        rows=len(text.train),
        needles=len(needles),
        source=text.source,
        teacher=bench.base,
        sizes=sizes,
        command=command,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=versions(),
    )
    if not parts:
        return found

    passes = len(parts) + 2
    say(f"damage: {passes} passes over text and needles, about {duration(passes * seconds)}")
    costs: list[Damage] = []
    for kept in (everything_but([], convertible, named), *(all_but(part, layers, named) for part in parts)):
        progress("damage", f"by {options.damage}", len(costs), passes)
        costs.append(bench.damage(kept))
    found.windowed, found.parts = costs[0], dict(zip(parts, costs[1:], strict=True))
    lost = found.windowed.recall
    found.recall_counts = options.by == "recall" and lost.mean > SURE * (lost.stderr or 0.0)
    totals = {part: one.total(found.recall_counts) for part, one in found.parts.items()}
    chosen = choose(totals, sizes, budget)
    progress("damage", f"by {options.damage}", passes - 1, passes)
    left = bench.damage(everything_but(chosen, convertible, named)) if chosen else None
    nbytes = sum(sizes[part] for part in chosen)
    found.kept = Kept(chosen, keep_section(chosen, layers, options.keep), nbytes, budget, context, left)
    return found


@dataclass
class _Bench:
    """A model with its rows and needles; `base` is its reading without any windowing."""

    model: LinearizedForCausalLM
    layers: Sequence[AttentionLayer]
    rows: Rows
    needles: Sequence[Needle]
    window: int
    sinks: int
    base: Reading = field(init=False)

    def attend(self) -> tuple[list[list[HeadStatistics]], int]:
        """Read everything once and set `base`. Returns each head's statistics and the number of queries.

        Raises:
            DataError: no document of the text is long enough.
        """
        tallies = [Tally(layer, self.window, self.sinks) for layer in self.layers]
        with observed(self.model, lambda index: tallies[index]):
            loss = read(self.model, self.rows, []).loss
        queries = tallies[0].queries
        if not queries:
            raise DataError(
                f"no document of the text has more than {self.window + self.sinks:,} tokens, so nothing lies beyond "
                "window and sinks: use longer texts or a narrower window"
            )
        masses = [torch.zeros(layer.query_heads, dtype=torch.float64) for layer in self.layers]
        recall = [self._look(needle, masses) for needle in self.needles]
        self.base = Reading(loss, torch.tensor(recall, dtype=torch.float64))
        return [one.heads(mass / len(recall)) for one, mass in zip(tallies, masses, strict=True)], queries

    def _look(self, needle: Needle, masses: list[Tensor]) -> float:
        """Add each head's attention mass on this needle to `masses`; returns the log-probability of its answer."""

        def observer(index: int) -> Callable[[Projections, Tensor | None], None]:
            def look(new: Projections, lengths: Tensor | None) -> None:
                masses[index] += mass_on(self.layers[index], new, needle.asking, needle.value)

            return look

        with observed(self.model, observer), torch.inference_mode():
            return answer_log_probability(self.model, needle)

    def damage(self, kept: dict[int, list[int]]) -> Damage:
        """The damage of windowing; `kept` as in `windowed`."""
        with windowed(self.model, kept, window=self.window, sinks=self.sinks):
            return damage(self.base, read(self.model, self.rows, self.needles))
