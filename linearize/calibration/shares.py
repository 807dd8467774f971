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
"""Tokens of a text, unless the model has fewer learned positions: long enough that equal shares lose something."""
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
        with _watched(model, spec, layers, numbers, tell):
            _pass_back(model, ids.to(model.device), answer)
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


def _pass_back(model: LinearizedForCausalLM, ids: Tensor, answer: range | None) -> None:
    """Backward pass of a text's summed loss, or of minus the mean log-probability of the answer's tokens."""
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
    """In this context a backward pass calls `tell(layer, changes)` for each layer: `changes` `[numbers, L]` is the
    first-order rise of the objective, per token. Gradient checkpointing recomputes one block at a time, so memory holds
    the attention of one layer only."""
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
                block.training = True  # of the block module only, so no dropout inside becomes active
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
    """Register the hooks of one layer for `_watched`."""
    seen: list[tuple[Projections, Tensor | None]] = []

    def observe(new: Projections, lengths: Tensor | None) -> None:
        seen[:] = [(type(new)(*(None if x is None else x.detach() for x in new)), lengths)]

    def before_output(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        whole: Tensor = arguments[0]
        if not whole.requires_grad:
            return
        new, lengths = seen[0]
        everything = whole.detach()  # a hook that refers to its own tensor would leak it

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
    """A mixer of window, sinks and landmarks, without a recurrence."""
    window = spec.windows.get(layer, spec.window)
    config = MixerConfig(
        layers=[layer],
        recurrence="none",
        window=window,
        sinks=spec.sinks,
        landmarks=number,
        memory_dtype=spec.memory_dtype,
    )
    return Mixer(config, attention.layer).eval()
