"""`mixer.landmarks_by`: the number of landmarks of each layer, with the same total as equal shares.

With N landmarks instead of the whole past, the output of a layer's heads changes by dy. One backward pass per text
through the pretrained model gives the gradients g, from which the effect of dy follows to first order:

    loss     sum over a text's tokens of (g . dy)^2 / 2, with g of the summed loss: the divergence from the pretrained
             model in the empirical Fisher metric. (The expectation of a plain g . dy is 0.)
    recall   g . dy, with g of minus the log-probability of a needle's answer, if positive

So no layer needs passes of its own through the rest of the model. A few values of N are measured and those between are
interpolated; then slots go to the layers where they lower the cost most per slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from linearize.calibration.backward import pass_back, watched
from linearize.model import MixerConfig
from linearize.model.mixer.mixer import Mixer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from linearize.calibration.backward import Watched
    from linearize.model import LinearizedForCausalLM
    from linearize.model.attention import LinearizedAttention
    from linearize.probe.needles import Needle
    from linearize.recipe import MixerSpec

TEXTS = 4
# As multiples of an equal share.
_TRIED = (0.125, 0.5, 1.5, 4.0)
# Slots per increment, and the minimum of a layer.
_STEP = 16
# Weight of a nat of an answer's token against a nat of text, because needles are rare. Tuned on validation data.
_RECALL = 0.02
_LEAST = 1e-6


@dataclass(frozen=True)
class Curve:
    """Cost of one layer by its number of landmarks, in nats per token.

    Attributes:
        numbers: increasing numbers of landmarks.
        loss, recall: the cost at each of them, never increasing.
    """

    numbers: Sequence[int]
    loss: Sequence[float]
    recall: Sequence[float]

    def cost(self, number: int, *, recall: bool) -> float:
        """Loss, geometrically interpolated, plus weighted recall, linearly interpolated; constant beyond the ends."""
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
    """The cost of each layer by its number of landmarks.

    Args:
        model: the pretrained model as a `LinearizedForCausalLM` without mixers, in eval mode.
        spec: the mixer section, with window, sinks and the landmarks of an equal share.
        layers: the layers to measure.
        texts: `[L]` token ids each.
        needles: texts for recall; may be empty.
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

        def read(layer: int, seen: Watched, tell: Callable[[int, Tensor], None] = tell) -> None:
            changes = []
            for number in numbers:
                mixer = _exact(model.attention_layers[layer], spec, layer, number)
                less = mixer(seen.new, seen.lengths, None).flatten(2)
                changes.append(((less - seen.heads).double() * seen.gradient.double()).sum(-1)[0])
            tell(layer, torch.stack(changes).cpu())

        with watched(model, layers, read):
            place = torch.arange(len(ids), device=model.device)
            asked = place >= 0 if answer is None else (place >= answer.start) & (place < answer.stop)
            pass_back(model, ids.to(model.device), asked, mean=answer is not None)
    found = {}
    for layer in layers:
        loss, recall = (x.cummin(0).values.tolist() for x in (losses[layer], falls[layer]))
        found[layer] = Curve(numbers, loss, recall)
    return found


def share_landmarks(found: Mapping[int, Curve], landmarks: int, *, recall: bool) -> dict[int, int]:
    """Layer -> its landmarks; the total is at most `landmarks` per layer. A greedy choice: each round gives a layer the
    run of slots with the largest gain per slot. Long runs are tried too, because a curve may be flat at first."""
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
    # No run improves any layer: distribute the rest evenly.
    return {layer: number + spare // len(shares) for layer, number in shares.items()}


def _exact(attention: LinearizedAttention, spec: MixerSpec, layer: int, number: int) -> Mixer:
    """A mixer of window, sinks and landmarks, without a recurrence."""
    window = spec.windows.get(layer, spec.window)
    config = MixerConfig(
        layers=[layer],
        recurrence="none",
        window=window,
        sinks=spec.sinks,
        landmarks=number,
    )
    return Mixer(config, attention.layer).eval()
