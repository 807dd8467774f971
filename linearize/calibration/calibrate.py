"""Calibration of a converted model: layer by layer, with the teacher's hidden states beside the student's.

Two decisions select what is kept. In each layer it is the error on held-out rows. For each ingredient it is the whole
model's loss on these rows and its recall of needles; an ingredient that improves neither is dropped.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch

from linearize.calibration.blocks import Blocks, texts_of
from linearize.calibration.closed import Ridge
from linearize.calibration.layer import LayerFit, LayerResult, projection_weight
from linearize.calibration.reading import asked, read_by_block, read_states
from linearize.calibration.weights import MIXER, OUTPUT, output_projection
from linearize.data.load import load_data
from linearize.errors import DataError
from linearize.probe.damage import Damage, Reading, damage
from linearize.probe.needles import make_needles
from linearize.probe.selection import SURE
from linearize.recipe import DataSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from torch import Tensor
    from transformers import PreTrainedModel

    from linearize.calibration.blocks import Call, Text
    from linearize.calibration.weights import Weights
    from linearize.data.rows import Rows, TrainingData
    from linearize.model import LinearizedForCausalLM
    from linearize.probe.needles import Needle
    from linearize.recipe.schema import CalibrateSpec

_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge penalties to try, in units of the mean square of an input channel over all tokens."""


@dataclass
class Ingredient:
    """Effect of one part of the calibration on the whole model.

    Attributes:
        name: `mixer` or `output`.
        change: rise of the loss on held-out rows, and fall of the log-probability of needles' answers; negative is
            better.
        kept: True if the ingredient was kept.
    """

    name: str
    change: Damage
    kept: bool


@dataclass
class Calibration:
    """Result of a calibration.

    Attributes:
        layers: the steps tried and kept, by layer.
        ridge: by layer, the share of the output's error on held-out rows that remains after ridge regression; 1 if the
            weight was not changed.
        readings: those of the teacher, the converted model, the calibrated model, and, if it has a recurrence, the same
            with the recurrence silent.
        needles: the number of needles; 0 if the rows are too short for one.
    """

    source: str
    tokens: int
    length: int
    held_out: int
    needles: int
    inputs: str
    seed: int
    layers: list[LayerResult] = field(default_factory=list)
    ridge: dict[int, float] = field(default_factory=dict)
    readings: dict[str, Reading] = field(default_factory=dict)
    ingredients: list[Ingredient] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def recall_counts(self) -> bool:
        """True if the needles are usable: the teacher finds them better than the converted model."""
        lost = damage(self.readings["teacher"], self.readings["converted"]).recall
        return lost.mean > SURE * (lost.stderr or 0.0)


class _Stream(NamedTuple):
    """Texts during the layer-by-layer pass: hidden states of teacher and student, and the blocks' arguments. The first
    `rows` are rows of text; needles follow."""

    rows: int
    teacher: list[Tensor]
    student: list[Tensor]
    calls: list[list[Call]]


def calibration_text(
    spec: CalibrateSpec,
    tokenizer: Any,
    teacher: PreTrainedModel | None,
    *,
    seed: int,
    say: Callable[[str], None],
    reserved: Mapping[str, int] = MappingProxyType({}),
) -> TrainingData:
    """The text to fit to, and the held-out rows.

    Args:
        teacher: generates the text if `spec.source` is `self`.
        reserved: rows that stages hold out; see `reserved_tokens`.

    Raises:
        DataError: the text cannot be read, or is too short.
    """
    data = DataSpec.of(spec.text, tokens=spec.tokens, held_out=spec.held_out)
    writes = None if teacher is None else lambda: teacher
    return load_data(
        data,
        tokenizer=tokenizer,
        length=spec.length,
        seed=seed,
        teacher=writes,
        reserved=reserved,
        purpose="calibrate",
        progress=say,
    )


def calibrate(
    weights: Weights,
    text: TrainingData,
    spec: CalibrateSpec,
    *,
    needles: Sequence[Needle] = (),
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Calibrate a converted model. `weights.chosen` names the parts that are kept; a model in memory changes in place.

    Args:
        text: the rows to fit to, and the held-out rows that decide.
        needles: texts that also decide, by recall.

    Raises:
        DataError: no document of the text reaches beyond window and sinks.
    """
    started = time.monotonic()
    blocks, held_out = Blocks(weights), text.held_out
    layers = _converted(blocks.model)
    _check_reach(blocks.model, layers, text)
    found = Calibration(text.source, text.train.tokens, spec.length, len(held_out), len(needles), spec.inputs, seed)

    def measure(name: str) -> Reading:
        found.readings[name] = reading = read_by_block(blocks, held_out, needles)
        return reading

    after = measure("converted")
    last = max(layers)
    train = _enter(blocks, texts_of(text.train), len(text.train))
    # The ends of the two streams are readings of the pretrained model and of the model with all fits.
    held = _enter(blocks, [*texts_of(held_out), *map(asked, needles)], len(held_out))
    for index in range(last + 1):
        say(f"calibrate: layer {index + 1} of {last + 1}{_told(found.layers, started)}")
        with weights.block(index):
            _layer(blocks, index, train, held, spec, seed, found, fits=index in layers)
    del train
    for index in range(last + 1, len(blocks)):
        with weights.block(index), torch.no_grad():
            for number, call in enumerate(held.calls):
                for states in (held.teacher, held.student):
                    states[number] = blocks.run(index, states[number], call[index])
    found.readings["teacher"] = read_states(blocks, held.teacher, held_out, needles)
    whole = read_states(blocks, held.student, held_out, needles)
    del held

    say("calibrate: reading the rows held out")
    fitted = [MIXER] if found.layers else []
    if any(share < 1 for share in found.ridge.values()):
        fitted.append(OUTPUT)
    for part in fitted:
        before = after
        weights.chosen.append(part)
        if weights.chosen == fitted:
            found.readings[part] = after = whole
        else:
            after = measure(part)
        if not _judge(found, part, before, after):
            weights.chosen.remove(part)
            after = before
    found.readings["calibrated"] = after
    mixers = [one.mixer for one in blocks.attentions if one.mixer is not None and one.mixer.recurrence is not None]
    for mixer in mixers:
        mixer.branches_off = frozenset({"recurrence"})
    if mixers:
        measure("no recurrence")
    else:  # no reading opens the blocks with what was chosen
        for index in range(len(blocks)):
            with weights.block(index):
                pass
    for mixer in mixers:
        mixer.branches_off = frozenset()
    found.seconds = time.monotonic() - started
    return found


def _layer(
    blocks: Blocks,
    index: int,
    train: _Stream,
    held: _Stream,
    spec: CalibrateSpec,
    seed: int,
    found: Calibration,
    *,
    fits: bool,
) -> None:
    """Calibrate one layer, whose block is open; store its fit, and run all rows through the block."""
    attention = blocks.attentions[index]
    inputs = [stream.student if spec.inputs == "student" else stream.teacher for stream in (train, held)]
    if fits and attention.mixer is not None and attention.mixer.recurrence is not None:
        with torch.no_grad():
            rows = zip(inputs[1][: held.rows], held.calls[: held.rows], strict=True)
            decides = [blocks.projections(index, x, c[index]) for x, c in rows]

        @torch.no_grad()
        def row(number: int) -> Any:
            return blocks.projections(index, inputs[0][number], train.calls[number][index])

        fit = LayerFit(attention, blocks.teachers[index], row, len(inputs[0]), decides)
        found.layers.append(fit.run(index, steps=spec.steps, lr=spec.step_size, seed=seed + index))
        del fit, decides
        blocks.weights.keep(MIXER, index)
    ridge = fits and spec.ridge
    with torch.no_grad():
        wanted: list[list[Tensor]] = []
        # The student's states must not change until the layer's fits are done.
        for stream in (train, held):
            outputs: list[Tensor] = []
            for number, call in enumerate(stream.calls):
                after, added = blocks.teacher_step(index, stream.teacher[number], call[index], attention_output=ridge)
                stream.teacher[number] = after
                if added is not None:
                    outputs.append(added)
            wanted.append(outputs)
        heads: list[list[Tensor | None]] = [[None] * len(stream.calls) for stream in (train, held)]
        if ridge:
            for read, stream in zip(heads, (train, held), strict=True):
                for number, (x, call) in enumerate(zip(stream.student, stream.calls, strict=True)):
                    read[number] = blocks.heads(index, x, call[index])
            found.ridge[index] = _ridge(
                blocks, index, (heads[0], wanted[0]), (heads[1][: held.rows], wanted[1][: held.rows])
            )
            blocks.weights.keep(OUTPUT, index)
        for read, stream in zip(heads, (train, held), strict=True):
            for number, call in enumerate(stream.calls):
                stream.student[number] = blocks.run(index, stream.student[number], call[index], heads=read[number])
                read[number] = None


def _ridge(blocks: Blocks, index: int, train: tuple[Any, Any], held: tuple[Any, Any]) -> float:
    """Fit the output projection to the output of the teacher's attention. Returns the share of the error that remains
    on the held-out rows; 1 if no penalty lowers it and the weight stays.

    Args:
        train, held: for some rows, the inputs of the projection and the teacher's outputs.
    """
    module = output_projection(blocks.attentions[index])
    weight = projection_weight(module)

    def pairs(rows: tuple[Any, Any]) -> Any:
        for heads, target in zip(*rows, strict=True):
            yield heads[0].double(), (target[0] - module(heads[0])).double()

    ridge = Ridge(weight.shape[1], weight.shape[0], weight.device)
    for heads, rest in pairs(train):
        ridge.add(heads, rest)
    decides = list(pairs(held))
    before = sum(float(rest.square().sum()) for _, rest in decides)
    best, least = None, before
    for strength in _STRENGTHS:
        step = ridge.step(strength)
        error = sum(float((rest - heads @ step.T).square().sum()) for heads, rest in decides)
        if error < least:
            best, least = step, error
    if best is None:
        return 1.0
    with torch.no_grad():
        weight.add_(best.to(weight.dtype))
    return least / before


def _judge(found: Calibration, name: str, before: Reading, after: Reading) -> bool:
    """True if an ingredient is kept: it lowers the loss or raises recall significantly, and the other worsens by less.
    The two are compared as shares of the damage by the conversion."""
    change, cost = damage(before, after), damage(found.readings["teacher"], found.readings["converted"])
    pairs = [(change.loss, cost.loss), *([(change.recall, cost.recall)] if found.recall_counts else [])]
    sure = any(one.mean < -SURE * (one.stderr or 0.0) for one, _ in pairs)
    # Without any damage by the conversion there is nothing to regain.
    kept = sure and sum(one.mean / max(lost.mean, 1e-6) for one, lost in pairs) < 0
    found.ingredients.append(Ingredient(name, change, kept))
    return kept


def _enter(blocks: Blocks, texts: list[Text], rows: int) -> _Stream:
    hidden, calls = blocks.enter(texts)
    return _Stream(rows, list(hidden), list(hidden), calls)


def deciding_needles(model: LinearizedForCausalLM, tokenizer: Any, rows: Rows, seed: int) -> list[Needle]:
    """One needle per row, in the rows' text and of their length; none if the rows are too short for a needle."""
    widest = [model.config.mixer_of(index) for index in _converted(model)]
    texts = tokenizer.batch_decode(rows.input_ids.tolist(), skip_special_tokens=True)
    try:
        return make_needles(
            tokenizer,
            texts,
            count=len(rows),
            length=rows.input_ids.shape[1],
            window=min(one.window or 1 for one in widest),
            sinks=max(one.sinks for one in widest),
            seed=seed,
        )
    except DataError:
        return []


def _check_reach(model: LinearizedForCausalLM, layers: list[int], text: TrainingData) -> None:
    """Raises:
    DataError: all documents are short enough to be read exactly by window, sinks and landmarks.
    """
    reach = min(model.config.mixer_of(index).exact_tokens for index in layers)
    for kind, rows in (("to fit to", text.train), ("held out", text.held_out)):
        longest = int(rows.position_ids.max()) + 1
        if longest <= reach:
            raise DataError(
                f"{text.source}: the longest document of the text {kind} has {longest:,} tokens in a row, and the "
                f"first {reach:,} are all read exactly: raise calibrate.length, or use longer texts"
            )


def _converted(model: LinearizedForCausalLM) -> list[int]:
    """The layers that no longer compute their pretrained attention."""
    return [
        index
        for index, attention in enumerate(model.attention_layers)
        if attention.mixer is not None and model.config.mixer_of(index).converts(attention.layer)
    ]


def _told(layers: list[LayerResult], started: float) -> str:
    if not layers:
        return ""
    last = layers[-1]
    seconds = time.monotonic() - started
    return f" ({seconds:,.0f} s; layer {last.layer + 1} leaves {100 * last.error:.0f} % of its window's error)"
