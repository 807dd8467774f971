"""`mixer.landmark_score: learned`: a token's score from the layer's keys and values, fitted to the cost of losing it.

Without token s in the softmax, query t of a head reads o + a / (1 - a) (o - v_s) instead of o; a is the weight of s.
With the gradient g of an objective by o, the first-order rise of the objective, over the heads that share v_s, is

    e_ts = sum over heads of a / (1 - a) g . (o - v_s)

and the cost of losing s is the sum of |e_ts| over the queries t with s outside their window. The objective is the
pretrained model's loss on two kinds of texts, because ordinary text seldom asks for a token again:

    text     running text, all tokens
    recall   answers to questions about facts hidden in running text

The score is a ridge regression of the log of the cost, in units of its mean over a text and head. It is compared within
a head only. From the same costs follows what a layer loses by its number of landmarks, for `mixer.landmarks_by`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.calibration.backward import Watched, pass_back, watched
from linearize.data.recalltext import facts
from linearize.model.landmarks.slots import score_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from linearize.families.base import AttentionLayer
    from linearize.model import LinearizedForCausalLM, MixerConfig

ROWS = 8
"""Rows of text: each hides facts, and half of them are running text too."""
CONTEXT = 6
"""Landmarks are shared out for contexts of this many times their number of tokens, if the model's is not shorter."""
_TOLD = 0.6  # of a text with questions; the rest is for the questions
_TOKENS_PER_FACT = 80
_RIDGE = 0.02
_FLOOR = 0.03
_LEAST = 1e-12
_LEAST_REST = 0.02
_QUERIES = 128  # at once
_PARTS = 40  # of the tokens of a text, for shares
_LEAST_PARTS = 1


class Lesson(NamedTuple):
    """A text to fit to.

    Attributes:
        ids: its token ids.
        counted: `[L]`, True for tokens whose loss counts.
        told: the number of first tokens that are scored.
        recall: True if the objective is recall.
    """

    ids: Tensor
    counted: Tensor
    told: int
    recall: bool


def lessons(tokenizer: Any, rows: Sequence[Tensor], seed: int, window: int) -> list[Lesson]:
    """Texts with facts and questions in each row of token ids, and every second row as it is."""
    found: list[Lesson] = []
    for number, row in enumerate(rows):
        rng = random.Random(f"{seed} score {number}")  # noqa: S311 - to be repeated
        if (asking := _recall(tokenizer, row.tolist(), rng)) is not None:
            found.append(asking)
        if number % 2 == 0:
            counted = torch.arange(len(row)) >= len(row) // 8
            found.append(Lesson(row, counted, max(len(row) - window, 1), recall=False))
    return found


def _recall(tokenizer: Any, row: list[int], rng: random.Random) -> Lesson | None:
    """Facts hidden in a row and questions about them in another order; None if the row is too short."""

    def tokens(text: str) -> list[int]:
        encoded: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return encoded

    hidden = facts(rng, max(len(row) // _TOKENS_PER_FACT, 1))
    told, inside = round(_TOLD * len(row)), [tokens(fact) for fact, _, _ in hidden]
    room = told - sum(map(len, inside))
    if room <= len(inside):
        return None
    places = sorted(rng.sample(range(room), len(inside)))
    ids, last = list[int](), 0
    for place, fact in zip(places, inside, strict=True):
        ids += row[last:place] + fact
        last = place
    ids += row[last:room]
    counted = [False] * len(ids)
    for _, question, answer in rng.sample(hidden, len(hidden)):
        asks, answers = tokens(question), tokens(answer)
        if len(ids) + len(asks) + len(answers) > len(row):
            break
        ids += asks + answers
        counted += [False] * len(asks) + [True] * len(answers)
    return Lesson(torch.tensor(ids), torch.tensor(counted), told, recall=True) if any(counted) else None


@dataclass
class Layer:
    """The scored tokens of one layer and their costs.

    Attributes:
        inputs: for each lesson, `score_inputs` of the scored tokens, `[N, K (D + V)]`.
        costs: for each lesson, the cost of losing each of them, `[K, N]`.
        recall: for each lesson, if it is for recall.
    """

    inputs: list[Tensor] = field(default_factory=list)
    costs: list[Tensor] = field(default_factory=list)
    recall: list[bool] = field(default_factory=list)

    def weight(self) -> Tensor:
        """`score_weight` of the layer's mixer, by ridge regression."""
        heads, width, device = len(self.costs[0]), self.inputs[0].shape[1] + 1, self.inputs[0].device
        moments = torch.zeros(width, width, dtype=torch.float64, device=device)
        products = torch.zeros(width, heads, dtype=torch.float64, device=device)
        for inputs, cost in zip(self.inputs, self.costs, strict=True):
            x = F.pad(inputs.double(), (0, 1), value=1.0)
            share = cost.double() / cost.double().mean(1, keepdim=True).clamp_min(_LEAST)
            moments += x.T @ x
            products += x.T @ (share + _FLOOR).log().T
        ridge = _RIDGE * moments.diagonal().mean().clamp_min(_LEAST)
        moments.diagonal().add_(ridge)
        weight: Tensor = torch.linalg.solve(moments, products)
        return weight.T.float()

    def lost(self, weight: Tensor, *, recall: bool) -> Tensor:
        """The cost of the tokens that are lost if 0 to `_PARTS` parts of `_PARTS`, those with the highest scores, are
        kept, in the lessons of one kind, `[_PARTS + 1]`."""
        total = torch.zeros(_PARTS + 1, dtype=torch.float64)
        for inputs, cost, kind in zip(self.inputs, self.costs, self.recall, strict=True):
            if kind == recall:
                scores = F.linear(inputs.float(), weight[:, :-1].to(inputs.device), weight[:, -1].to(inputs.device))
                order = scores.T.argsort(-1, descending=True)
                caught = F.pad(cost.double().gather(-1, order).cumsum(-1), (1, 0))
                at = torch.linspace(0, cost.shape[1], _PARTS + 1).round().long()
                total += (caught[:, -1:] - caught[:, at.to(caught.device)]).sum(0).cpu()
        return total


def measure(
    model: LinearizedForCausalLM,
    sections: Mapping[int, MixerConfig],
    texts: Sequence[Lesson],
    *,
    say: Callable[[str], None] = lambda line: None,
) -> dict[int, Layer]:
    """The cost of losing each token, by layer.

    Args:
        model: the pretrained model as a `LinearizedForCausalLM` without mixers, in eval mode.
        sections: the mixer sections of the layers to measure.
    """
    found = {layer: Layer() for layer in sections}
    for number, lesson in enumerate(texts):
        say(f"landmarks: what losing a token costs, text {number + 1} of {len(texts)}")

        def read(layer: int, seen: Watched, lesson: Lesson = lesson) -> None:
            section, attention = sections[layer], model.attention_layers[layer]
            groups = range(attention.layer.key_value_heads)
            heads = [head for head in groups if head not in section.softmax_heads]
            scored = slice(section.sinks, lesson.told)
            known = found[layer]
            known.inputs.append(score_inputs(attention.select(seen.new, heads))[0, scored].bfloat16())
            known.costs.append(costs(seen, attention.layer, lesson.told, section.window or 1)[heads, scored])
            known.recall.append(lesson.recall)

        with watched(model, list(sections), read):
            pass_back(model, lesson.ids.to(model.device), lesson.counted.to(model.device))
    return found


def costs(seen: Watched, layer: AttentionLayer, told: int, window: int) -> Tensor:
    """The cost of losing each of the first `told` tokens, per key/value head, `[K, told]`."""
    new = seen.new
    groups, tokens = new.k.shape[2], new.k.shape[1]
    q, k, v = (x[0].transpose(0, 1).float() for x in (new.q_rotated, new.k_rotated, new.v))
    q = q.unflatten(0, (groups, -1))
    heads, gradient = (
        x[0].float().view(tokens, groups, -1, v.shape[-1]).permute(1, 2, 0, 3) for x in (seen.heads, seen.gradient)
    )
    along = (heads * gradient).sum(-1, keepdim=True)
    total: Tensor = q.new_zeros(groups, told)
    for start in range(window, tokens, _QUERIES):
        part = slice(start, min(start + _QUERIES, tokens))
        query = torch.arange(part.start, part.stop, device=q.device)[:, None]
        distance = query - torch.arange(part.stop, device=q.device)
        scores = torch.einsum("kgtd,ksd->kgts", q[:, :, part], k[:, : part.stop]) * layer.scale
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        share = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        moved = along[:, :, part] - torch.einsum("kgtd,ksd->kgts", gradient[:, :, part], v[:, : part.stop])
        rise = (share / (1 - share).clamp_min(_LEAST_REST) * moved).sum(1).abs() * (distance >= window)
        seen_tokens = min(part.stop, told)
        total[:, :seen_tokens] += rise[..., :seen_tokens].sum(1)
    return total


def shares(
    known: Mapping[int, Layer],
    weights: Mapping[int, Tensor],
    landmarks: int,
    *,
    recall: bool,
    most: int | None = None,
) -> dict[int, int]:
    """Layer -> its landmarks; the total is at most `landmarks` per layer. A greedy choice, as in `share_landmarks`:
    each round gives a layer the run of slots with the largest gain per slot.

    Args:
        recall: count the loss of recall as much as that of text, each as a share of what no landmark at all loses.
        most: the tokens of the model's context that slots can hold; None for any number.
    """
    context = CONTEXT * landmarks if most is None else min(CONTEXT * landmarks, most)
    lost = {layer: torch.zeros(_PARTS + 1, dtype=torch.float64) for layer in known}
    for kind in (False, True)[: 2 if recall else 1]:
        curves = {layer: one.lost(weights[layer], recall=kind) for layer, one in known.items()}
        whole = sum(float(curve[0]) for curve in curves.values())
        for layer, curve in curves.items():
            lost[layer] += curve / max(whole, _LEAST)
    have = dict.fromkeys(sorted(known), _LEAST_PARTS)
    spare = _PARTS * len(known) * landmarks // context - sum(have.values())
    while spare > 0:
        gains = [
            (float(lost[layer][parts] - lost[layer][parts + run]) / run, -layer, run)
            for layer, parts in have.items()
            for run in range(1, min(spare, _PARTS - parts) + 1)
        ]
        if not gains:
            break
        _, layer, run = max(gains)
        have[-layer] += run
        spare -= run
    slots = {layer: parts * context // _PARTS for layer, parts in have.items()}
    each, rest = divmod(landmarks * len(known) - sum(slots.values()), len(known))
    # Where a part is less than a slot, the layers that were rounded down most get what is left.
    lowered = sorted(slots, key=lambda layer: -(have[layer] * context % _PARTS))[: rest if context < _PARTS else 0]
    return {layer: min(number + each + (layer in lowered), context) for layer, number in slots.items()}
