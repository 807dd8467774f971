"""Calibration of a converted model: layer after layer, with the teacher's hidden states beside the student's.

What is kept is decided twice: in each layer by its error on rows held out, and for each ingredient by the whole model's
loss on these rows and by its recall of needles. What does neither any good is taken back.
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
from linearize.calibration.reading import read_by_block
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

    from linearize.calibration.blocks import Call
    from linearize.calibration.weights import Weights
    from linearize.data.rows import Rows, TrainingData
    from linearize.model import LinearizedForCausalLM
    from linearize.probe.needles import Needle
    from linearize.recipe.schema import CalibrateSpec

_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge penalties that are tried, in mean squares of an input channel over all tokens."""


@dataclass
class Ingredient:
    """Effect of one part of the calibration on the whole model.

    Attributes:
        name: `mixer` or `output`.
        change: rise of the loss on rows held out and fall of the log-probability of needles' answers; negative is good.
        kept: whether it stayed.
    """

    name: str
    change: Damage
    kept: bool


@dataclass
class Calibration:
    """Result of a calibration.

    Attributes:
        layers: by layer, what was tried and kept.
        ridge: by layer, the share of the output's error that ridge regression left on rows held out; 1 where none.
        readings: of the teacher, of the model as converted and as calibrated, and calibrated without its recurrence.
        needles: how many; 0 where rows are too short to hide one.
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
    """Rows on their way through the model: hidden states of teacher and student, and what blocks are called with."""

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
    """The text to fit to, and the rows that decide.

    Args:
        teacher: which writes the text where `spec.source` is `self`.
        reserved: what stages hold out; see `reserved_tokens`.

    Raises:
        DataError: it cannot be read, or is too short.
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
    """Calibrates a model, which is as converted: in place if it is in memory, and what stays is `weights.chosen`.

    Args:
        text: what to fit to, and the rows that decide.
        needles: that decide as well.

    Raises:
        DataError: no document of the text reaches beyond window and sinks.
    """
    started = time.monotonic()
    blocks, held_out = Blocks(weights), text.held_out
    layers = _converted(blocks.model)
    _check_reach(blocks.model, layers, text)
    found = Calibration(text.source, text.train.tokens, spec.length, len(held_out), len(needles), spec.inputs, seed)

    def measure(name: str, *, teacher: bool = False) -> Reading:
        found.readings[name] = reading = read_by_block(blocks, held_out, needles, teacher=teacher)
        return reading

    measure("teacher", teacher=True)
    after = measure("converted")
    last = max(layers)
    train, held = (_enter(blocks, rows) for rows in (text.train, held_out))
    for index in range(last + 1):
        say(f"calibrate: layer {index + 1} of {last + 1}{_told(found.layers, started)}")
        with weights.block(index):
            _layer(blocks, index, train, held, spec, seed, found, fits=index in layers)
    del train, held

    say("calibrate: reading the rows held out")
    fitted = [MIXER, *([OUTPUT] if any(share < 1 for share in found.ridge.values()) else [])]
    for part in fitted:
        before = after
        weights.chosen.append(part)
        after = measure(part)
        if not _judge(found, part, before, after):
            weights.chosen.remove(part)
            after = before
    found.readings["calibrated"] = after
    mixers = [one.mixer for one in blocks.attentions if one.mixer is not None]
    for mixer in mixers:
        mixer.branches_off = frozenset({"recurrence"})
    measure("no recurrence")
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
    """Calibrates one layer, whose block is open, keeps what it fitted, and takes all rows through it."""
    attention = blocks.attentions[index]
    inputs = [stream.student if spec.inputs == "student" else stream.teacher for stream in (train, held)]
    if fits and attention.mixer is not None and attention.mixer.recurrence is not None:
        with torch.no_grad():
            decides = [blocks.projections(index, x, c[index]) for x, c in zip(inputs[1], held.calls, strict=True)]

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
        # The student's own states stay what they are until the layer is done.
        for stream in (train, held):
            outputs: list[Tensor] = []
            for number, call in enumerate(stream.calls):
                after, added = blocks.teacher_step(index, stream.teacher[number], call[index], attention_output=ridge)
                stream.teacher[number] = after
                if added is not None:
                    outputs.append(added)
            wanted.append(outputs)
        if ridge:
            found.ridge[index] = _ridge(blocks, index, train, held, wanted)
            blocks.weights.keep(OUTPUT, index)
        for stream in (train, held):
            for number, call in enumerate(stream.calls):
                stream.student[number] = blocks.run(index, stream.student[number], call[index])


def _ridge(blocks: Blocks, index: int, train: _Stream, held: _Stream, wanted: list[list[Tensor]]) -> float:
    """Fits the output projection to what the teacher's attention added; the share of the error that is left on the rows
    held out, 1 where none of the penalties lowers it and the weight stays."""
    module = output_projection(blocks.attentions[index])
    weight = projection_weight(module)

    def pairs(stream: _Stream, targets: list[Tensor]) -> Any:
        for student, call, target in zip(stream.student, stream.calls, targets, strict=True):
            heads = blocks.heads(index, student, call[index])[0]
            yield heads.double(), (target[0] - module(heads)).double()

    ridge = Ridge(weight.shape[1], weight.shape[0], weight.device)
    for heads, rest in pairs(train, wanted[0]):
        ridge.add(heads, rest)
    decides = list(pairs(held, wanted[1]))
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
    """True if an ingredient stays: it lowers the loss or raises recall, by more than chance, and costs the other less.
    The two are compared as shares of what the conversion had cost the model."""
    change, cost = damage(before, after), damage(found.readings["teacher"], found.readings["converted"])
    pairs = [(change.loss, cost.loss), *([(change.recall, cost.recall)] if found.recall_counts else [])]
    sure = any(one.mean < -SURE * (one.stderr or 0.0) for one, _ in pairs)
    # A conversion that had cost nothing leaves nothing to be gained.
    kept = sure and sum(one.mean / max(lost.mean, 1e-6) for one, lost in pairs) < 0
    found.ingredients.append(Ingredient(name, change, kept))
    return kept


def _enter(blocks: Blocks, rows: Rows) -> _Stream:
    hidden, calls = blocks.enter(texts_of(rows))
    return _Stream(list(hidden), list(hidden), calls)


def deciding_needles(model: LinearizedForCausalLM, tokenizer: Any, rows: Rows, seed: int) -> list[Needle]:
    """As many needles as rows, in their text and of their length; none where rows are too short to hide one."""
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
    DataError: no document is longer than what window, sinks and landmarks read all of.
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
    """The layers that do something else than their pretrained attention did."""
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
