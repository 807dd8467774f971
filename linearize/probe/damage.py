"""The damage of windowing a part of the model: one layer, or one key/value head with its queries.

All measurements use one model in memory, the pretrained model as a `LinearizedForCausalLM`, and replace one layer's
attention at a time. No weight is copied or loaded again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from linearize.conversion.swap import mixers_for
from linearize.errors import RecipeError
from linearize.evaluation.heldout import Estimate, score_rows
from linearize.evaluation.tasks.task import evaluating, mean_and_error
from linearize.model import MixerConfig
from linearize.model.attention import LinearizedAttention
from linearize.probe.needles import answer_log_probability
from linearize.recipe.schema import KeepSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from linearize.data.rows import Rows
    from linearize.families import AttentionLayer
    from linearize.model import LinearizedForCausalLM
    from linearize.probe.needles import Needle
    from linearize.recipe import MixerSpec

# Tokens of a forward pass; limits the memory of its logits.
_BATCH_TOKENS = 2048


Heads = Mapping[int, Sequence[int]]
"""Layer -> key/value heads in it."""
NO_HEADS: Heads = MappingProxyType({})


class Part(NamedTuple):
    """A layer, or one of its key/value heads with the query heads that share it."""

    layer: int
    head: int | None = None


@dataclass(frozen=True)
class Reading:
    """A model's losses on the text and the needles, in nats per token.

    Attributes:
        loss: `[rows]` float64, cross entropy of each row.
        recall: `[needles]` float64, log-probability of each answer.
    """

    loss: Tensor
    recall: Tensor


@dataclass(frozen=True)
class Damage:
    """Losses above the pretrained model's, in nats per token: means and standard errors of differences, paired by row
    and by needle.

    Attributes:
        loss: rise of the loss on the text.
        recall: fall of the log-probability of the needles' answers.
    """

    loss: Estimate
    recall: Estimate

    def total(self, with_recall: bool) -> Estimate:
        """Loss plus recall; the loss alone without `with_recall`."""
        if not with_recall:
            return self.loss
        errors = [error for error in (self.loss.stderr, self.recall.stderr) if error is not None]
        return Estimate(self.loss.mean + self.recall.mean, math.hypot(*errors) if len(errors) == 2 else None)


def read(model: LinearizedForCausalLM, rows: Rows, needles: Sequence[Needle]) -> Reading:
    """Score all rows and needles.

    Raises:
        ModelError: logits are not finite.
    """
    batch = max(1, _BATCH_TOKENS // rows.input_ids.shape[1])
    loss = score_rows(model, rows, batch_size=batch).loss
    with evaluating(model), torch.inference_mode():
        recall = [answer_log_probability(model, needle) for needle in needles]
    return Reading(loss, torch.tensor(recall, dtype=torch.float64))


def damage(base: Reading, other: Reading) -> Damage:
    """The losses of `other` minus those of `base`; without needles the loss of recall is 0."""
    rise, fall = (other.loss - base.loss).tolist(), (base.recall - other.recall).tolist()
    recall = Estimate(*mean_and_error(fall)) if fall else Estimate(0.0, None)
    return Damage(Estimate(*mean_and_error(rise)), recall)


def convertible_layers(layers: Sequence[AttentionLayer], spec: MixerSpec, keep: KeepSpec | None = None) -> list[int]:
    """The layers that a conversion with this window changes, apart from those that `keep` names.

    Raises:
        RecipeError: there are none.
    """
    plain = {"recurrence": "none", "covers": "evicted", "landmarks": 0, "landmark_layers": {}}
    bare = spec.model_copy(update={"keep": keep or KeepSpec(), **plain})
    sections = mixers_for(bare, layers)
    found = sorted(index for section in sections for index in section.layers if section.converts(layers[index]))
    if not found:
        raise RecipeError(
            f"mixer.window {spec.window}: no layer sees farther than that, so there is nothing to probe; lower it"
        )
    return found


def parts_of(
    layers: Sequence[AttentionLayer], convertible: Sequence[int], kind: str, heads: Heads = NO_HEADS
) -> list[Part]:
    """The parts to window one at a time: `layers` or `heads`, without the `heads` that are kept anyway.

    Raises:
        RecipeError: heads of layers with a sliding window, because no recipe can keep these.
    """
    if kind == "layers":
        return [Part(index) for index in convertible]
    if any(layers[index].window is not None for index in convertible):
        raise RecipeError("the layers have sliding windows of their own, so single heads cannot be kept; probe layers")
    return [
        Part(index, head)
        for index in convertible
        for head in range(layers[index].key_value_heads)
        if head not in heads.get(index, ())
    ]


@contextmanager
def windowed(
    model: LinearizedForCausalLM, kept: Mapping[int, Sequence[int]], *, window: int, sinks: int
) -> Iterator[None]:
    """In this context some layers attend to their last `window` tokens and the first `sinks` only.

    Args:
        kept: layer -> its key/value heads that keep attending to everything.
    """
    owners = model.attention_layers
    places = {index: owners[index].family.attention_modules(model)[index] for index in kept}
    try:
        for index, heads in kept.items():
            (owner, name), whole = places[index], owners[index]
            config = MixerConfig(
                layers=[index], recurrence="none", window=window, sinks=sinks, softmax_heads=list(heads)
            )
            setattr(owner, name, LinearizedAttention(whole, whole.family, whole.layer, config, index).eval())
        yield
    finally:
        for index, (owner, name) in places.items():
            setattr(owner, name, owners[index])


def all_but(part: Part, layers: Sequence[AttentionLayer], heads: Heads = NO_HEADS) -> dict[int, list[int]]:
    """The argument of `windowed` that windows this part alone, except `heads` of its layer."""
    every = range(layers[part.layer].key_value_heads)
    if part.head is None:
        return {part.layer: sorted({*heads.get(part.layer, ())})}
    return {part.layer: [head for head in every if head != part.head]}


def everything_but(parts: Sequence[Part], convertible: Sequence[int], heads: Heads = NO_HEADS) -> dict[int, list[int]]:
    """The argument of `windowed` that windows all convertible layers except these parts and `heads`."""
    whole = {part.layer for part in parts if part.head is None}
    kept = {index: sorted({*heads.get(index, ())}) for index in convertible if index not in whole}
    for part in parts:
        if part.head is not None:
            kept[part.layer].append(part.head)
    return kept
