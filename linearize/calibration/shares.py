"""`mixer.landmarks_by`: which layers get many landmarks and which few, all together as many as with equal shares.

What a layer's heads read with N landmarks differs by dy from what they read with everything. The gradients g of one
pass back through the pretrained model, per text, tell to first order what all that follows makes of dy:

    loss     sum over a text's tokens of (g . dy)^2 / 2, with g of the summed loss: the divergence from the pretrained
             model in the empirical Fisher metric, where a plain g . dy has no expectation
    recall   g . dy, with g of minus the log-probability of a needle's answer, where it is positive

so that no layer has to be run through the rest of the model. N is tried at a few numbers, what lies between is
interpolated, and slots go where they take away most per slot.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from linearize.calibration.weights import output_projection
from linearize.model import MixerConfig
from linearize.model.mixer.mixer import Mixer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from linearize.families import Projections
    from linearize.model import LinearizedForCausalLM
    from linearize.model.attention import LinearizedAttention
    from linearize.probe.needles import Needle
    from linearize.recipe import MixerSpec

LENGTH = 2048
"""Tokens of a text, where the model has learned as many positions: enough that equal shares lose something."""
TEXTS = 4
# Of an even share.
_TRIED = (0.125, 0.5, 1.5, 4.0)
# Slots that are given at once, and the fewest that a layer with landmarks has.
_STEP = 16
# Nats of an answer's token beside nats of a text's: needles are rare. Chosen on validation text and needles.
_RECALL = 0.02
_LEAST = 1e-6


@dataclass(frozen=True)
class Curve:
    """Loss of one layer by its number of landmarks, in nats per token.

    Attributes:
        numbers: of landmarks, rising.
        loss, recall: at each of them, never rising.
    """

    numbers: Sequence[int]
    loss: Sequence[float]
    recall: Sequence[float]

    def cost(self, number: int, *, recall: bool) -> float:
        """Loss, geometrically interpolated, and a share of recall, linearly; beyond the ends as at the ends."""
        at = min(max(number, self.numbers[0]), self.numbers[-1])
        place = next(i for i, (_, end) in enumerate(pairwise(self.numbers)) if at <= end)
        low, high = self.numbers[place : place + 2]
        part = (at - low) / (high - low)
        ends = [math.log(self.loss[i] + _LEAST) for i in (place, place + 1)]
        found = math.exp(ends[0] + part * (ends[1] - ends[0]))
        if recall:
            found += _RECALL * (self.recall[place] + part * (self.recall[place + 1] - self.recall[place]))
        return found


def curves(
    model: LinearizedForCausalLM,
    spec: MixerSpec,
    layers: Sequence[int],
    texts: Sequence[Tensor],
    needles: Sequence[Needle],
    *,
    say: Callable[[str], None] = lambda line: None,
) -> dict[int, Curve]:
    """Layer -> what it loses by its number of landmarks.

    Args:
        model: converted with nothing to convert, in eval mode: the pretrained model.
        spec: its window, sinks and landmarks are those of an even share.
        texts: `[L]` token ids each.
    """
    numbers = sorted({max(round(share * spec.landmarks), 1) for share in _TRIED})
    losses = {layer: torch.zeros(len(numbers), dtype=torch.float64) for layer in layers}
    falls = {layer: torch.zeros(len(numbers), dtype=torch.float64) for layer in layers}
    counted = sum(len(ids) - 1 for ids in texts)

    def of_text(layer: int, changes: Tensor) -> None:
        losses[layer] += changes.square().sum(-1) / 2 / counted

    def of_needle(layer: int, changes: Tensor) -> None:
        falls[layer] += changes.sum(-1).clamp_min(0) / len(needles)

    jobs: list[tuple[Tensor, range | None]] = [(ids, None) for ids in texts]
    jobs += [(torch.tensor(needle.ids), needle.answer) for needle in needles]
    for done, (ids, answer) in enumerate(jobs):
        say(f"landmarks: text {done + 1} of {len(jobs)}")
        tell = of_text if answer is None else of_needle
        with _watched(model, spec, layers, numbers, tell):
            _pass_back(model, ids.to(model.device), answer)
    found = {}
    for layer in layers:
        loss, recall = (x.cummin(0).values.tolist() for x in (losses[layer], falls[layer]))
        found[layer] = Curve(numbers, loss, recall)
    return found


def share_landmarks(found: Mapping[int, Curve], landmarks: int, *, recall: bool) -> dict[int, int]:
    """Layer -> its landmarks, together no more than `landmarks` for each: slots go, a few at a time, where a few or a
    run of them takes away most per slot; a curve may be flat before it falls."""
    total = landmarks * len(found)
    shares = dict.fromkeys(sorted(found), min(_STEP, landmarks))
    spare = total - sum(shares.values())
    while spare >= _STEP:
        gains: list[tuple[float, int, int]] = []
        for layer, number in shares.items():
            now = found[layer].cost(number, recall=recall)
            for run in {1, 2, 4, 8, 16, spare // _STEP}:
                if (more := run * _STEP) <= spare and number + more <= found[layer].numbers[-1]:
                    gains.append(((now - found[layer].cost(number + more, recall=recall)) / more, -layer, more))
        if not gains:
            break
        gain, layer, more = max(gains)
        if gain <= 0:
            break
        shares[-layer] += more
        spare -= more
    # Nothing more to be gained, as far as was looked: the rest is shared evenly.
    return {layer: number + spare // len(shares) for layer, number in shares.items()}


def _pass_back(model: LinearizedForCausalLM, ids: Tensor, answer: range | None) -> None:
    """Gradients of a text's summed loss, or of minus the mean log-probability of the answer's tokens."""
    first = 0 if answer is None else answer.start - 1
    end = len(ids) - 1 if answer is None else answer.stop - 1
    with torch.enable_grad():
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=len(ids) - first).logits[0]
        rows = logits[: end - first].float()
        reduction = "sum" if answer is None else "mean"
        F.cross_entropy(rows, ids[first + 1 : end + 1], reduction=reduction).backward()


@contextmanager
def _watched(
    model: LinearizedForCausalLM,
    spec: MixerSpec,
    layers: Sequence[int],
    numbers: Sequence[int],
    tell: Callable[[int, Tensor], None],
) -> Iterator[None]:
    """Inside, `tell(layer, changes)` is called for each layer in a pass back: `changes` `[numbers, L]` is what the
    objective would rise by, token by token, to first order. Blocks are run again on the way back, one at a time, so
    that there is room for one layer's attention alone."""
    handles: list[Any] = []
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    blocks = [block for block, _ in model.attention_layers[0].family.attention_modules(model)]
    checkpoints = bool(model.supports_gradient_checkpointing)
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.enable_input_require_grads()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for block in blocks:
                block.training = True  # the block alone: nothing in it drops out
        for layer in layers:
            handles += _watch(model.attention_layers[layer], layer, spec, numbers, tell)
        yield
    finally:
        model.disable_input_require_grads()
        for handle in handles:
            handle.remove()
        for layer in layers:
            model.attention_layers[layer].observer = None
        if checkpoints:
            model.gradient_checkpointing_disable()
            for block in blocks:
                block.training = False
        for parameter in frozen:
            parameter.requires_grad_(True)


def _watch(
    attention: LinearizedAttention,
    layer: int,
    spec: MixerSpec,
    numbers: Sequence[int],
    tell: Callable[[int, Tensor], None],
) -> list[Any]:
    """Sets up one layer for `_watched`."""
    seen: list[tuple[Projections, Tensor | None]] = []

    def observe(new: Projections, lengths: Tensor | None) -> None:
        seen[:] = [(type(new)(*(None if x is None else x.detach() for x in new)), lengths)]

    def before_output(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        whole: Tensor = arguments[0]
        if not whole.requires_grad:
            return
        new, lengths = seen[0]
        everything = whole.detach()  # a hook that held its own tensor would never be let go

        @torch.no_grad()
        def arrived(gradient: Tensor) -> None:
            changes = []
            for number in numbers:
                read = _exact(attention, spec, layer, number)(new, lengths, None).flatten(2)
                changes.append(((read - everything).double() * gradient.double()).sum(-1)[0])
            tell(layer, torch.stack(changes).cpu())

        whole.register_hook(arrived)

    attention.observer = observe
    return [output_projection(attention).register_forward_pre_hook(before_output)]


def _exact(attention: LinearizedAttention, spec: MixerSpec, layer: int, number: int) -> Mixer:
    """Window, sinks and landmarks alone."""
    window = spec.windows.get(layer, spec.window)
    config = MixerConfig(layers=[layer], recurrence="none", window=window, sinks=spec.sinks, landmarks=number)
    return Mixer(config, attention.layer).eval()
