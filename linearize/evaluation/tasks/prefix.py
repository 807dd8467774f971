"""Log-likelihoods of continuations, with one pass over what they share.

The choices of a question share its text, and the questions of a few-shot task share their solved examples. The shared
tokens are read once, and what follows them goes on from copies of the cache. A row's logits are those of reading it
alone, up to the rounding of sums in another order.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from linearize.evaluation.tasks.hidden import Hidden, positions_at_once, read, rows_at_once
from linearize.model.memory import LayerMemory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Contexts that start with as many equal tokens are taken to have a beginning that is worth reading once.
MIN_SHARED = 64
# Bytes of the copies of caches that exist at one time.
_COPIED = 2**28
_COPYABLE = (DynamicLayer, DynamicSlidingWindowLayer, LayerMemory)
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Query:
    """A continuation to score.

    Attributes:
        tokens: the model's input: context and continuation without its last token.
        targets: the continuation; its tokens are predicted at the last positions of `tokens`.
    """

    tokens: Tokens
    targets: Tokens

    @property
    def context(self) -> Tokens:
        """Tokens that predict the first target."""
        return self.tokens[: len(self.tokens) - len(self.targets) + 1]


@dataclass
class Group:
    """Queries with one beginning.

    Attributes:
        prefix: the tokens that all of them start with, at least one.
        rests: the tokens after it -> the numbers of the queries that have these.
    """

    prefix: Tokens
    rests: dict[Tokens, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, prefix: Tokens, queries: Sequence[Query], members: Sequence[int]) -> Group:
        group = cls(prefix)
        for number in members:
            group.rests.setdefault(queries[number].tokens[len(prefix) :], []).append(number)
        return group

    @property
    def cost(self) -> int:
        """Tokens to read."""
        return len(self.prefix) + sum(map(len, self.rests))


def common_length(rows: Sequence[Tokens]) -> int:
    """Number of tokens that all rows begin with."""
    first, last = min(rows), max(rows)  # in the order of their tokens, where all others are between them
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def plan(queries: Sequence[Query], members: Sequence[int] | None = None) -> list[Group]:
    """Groups of the members, by number (all queries by default), that together read few tokens."""
    contexts: dict[Tokens, list[int]] = {}
    for number in range(len(queries)) if members is None else members:
        contexts.setdefault(queries[number].context, []).append(number)
    clusters: dict[Tokens, list[Tokens]] = {}
    for context in contexts:
        clusters.setdefault(context[:MIN_SHARED], []).append(context)
    groups: list[Group] = []
    for cluster in clusters.values():
        apart = []
        for context in cluster:
            group = Group.of(context, queries, contexts[context])
            if len(group.rests) == 1:  # one pass then reads all of it
                group = Group.of(queries[contexts[context][0]].tokens, queries, contexts[context])
            apart.append(group)
        beginning = cluster[0][: common_length(cluster)]
        together = Group.of(beginning, queries, [number for context in cluster for number in contexts[context]])
        groups += [together] if together.cost < sum(group.cost for group in apart) else apart
    return groups


@torch.no_grad()
def log_likelihoods(
    model: Any, queries: Sequence[Query], *, batch_size: int, max_length: int, share: bool = True
) -> list[tuple[float, bool]]:
    """Per query: the summed log-probability of its targets in nats, and True if each target is the most likely token.

    Args:
        model: a causal LM on its device, in eval mode.
        batch_size: rows per forward pass, fewer where they are long.
        max_length: the model's context; position ids stay below it.
        share: read what queries share once. A model whose cache cannot be copied row by row reads each by itself.
    """
    everyone = range(len(queries))
    groups = plan(queries) if share else [Group.of(queries[n].tokens, queries, [n]) for n in everyone]
    groups.sort(key=lambda group: -len(group.prefix))
    answers = _Answers(queries)
    while groups:
        batch = groups[: rows_at_once(len(groups[0].prefix), batch_size)]
        groups = groups[len(batch) :]
        ids, mask = _left_padded([group.prefix for group in batch], model.device)
        width, lengths = ids.shape[1], mask.sum(1)
        pads = [width - len(group.prefix) for group in batch]
        rows = [(index, rest) for index, group in enumerate(batch) for rest in group.rests if rest]
        asked = [
            (index, pads[index] + at, target, number)
            for index, group in enumerate(batch)
            for members in group.rests.values()
            for number in members
            for at, target in answers.positions(number)
            if at < len(group.prefix)
        ]
        first = min((column for _, column, _, _ in asked), default=width - 1)
        beginning = read(
            model,
            ids,
            mask=mask,
            positions=(mask.cumsum(1) - 1).clamp_min(0),
            first=first,
            keep_cache=bool(rows),
        )
        if rows and not _is_copyable(beginning.cache):
            # A cache of another kind may be a recurrent state, which pads on the left would change.
            return log_likelihoods(model, queries, batch_size=1, max_length=max_length, share=False)
        answers.add(beginning, [(index, column - first, target, number) for index, column, target, number in asked])
        rows.sort(key=lambda row: -len(row[1]))
        most = min(batch_size, max(1, _COPIED * len(batch) // max(1, _nbytes(beginning.cache)))) if rows else 0
        while rows:
            piece = rows[: rows_at_once(len(rows[0][1]), most)]
            rows = rows[len(piece) :]
            chosen = torch.tensor([index for index, _ in piece], device=ids.device)
            longest = len(piece[0][1])
            new = torch.tensor([[*rest, *[0] * (longest - len(rest))] for _, rest in piece], device=ids.device)
            # Pads on the right can reach nothing before them, so they need no mask.
            after = read(
                model,
                new,
                mask=torch.cat([mask[chosen], torch.ones_like(new)], 1),
                positions=(lengths[chosen, None] + torch.arange(longest, device=ids.device)).clamp_max(max_length - 1),
                cache=_rows(beginning.cache, chosen),
                keep_cache=True,
            )
            answers.add(
                after,
                [
                    (row, at - len(batch[index].prefix), target, number)
                    for row, (index, rest) in enumerate(piece)
                    for number in batch[index].rests[rest]
                    for at, target in answers.positions(number)
                    if at >= len(batch[index].prefix)
                ],
            )
    return list(zip(answers.nats, answers.likeliest, strict=True))


class _Answers:
    """The answers of `log_likelihoods` so far, by query."""

    def __init__(self, queries: Sequence[Query]) -> None:
        self.queries = queries
        self.nats, self.likeliest = [0.0] * len(queries), [True] * len(queries)

    def positions(self, number: int) -> Iterator[tuple[int, int]]:
        """(position in the query's tokens, the target that it predicts)."""
        query = self.queries[number]
        return enumerate(query.targets, start=len(query.tokens) - len(query.targets))

    def add(self, hidden: Hidden, asked: Sequence[tuple[int, int, int, int]]) -> None:
        """Score targets by the states that predict them.

        Args:
            asked: (row, column, target, query). Choices of one token ask about one place.
        """
        places: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for row, column, target, number in asked:
            places.setdefault((row, column), []).append((target, number))
        size, found = positions_at_once(hidden.model), list(places.items())
        for start in range(0, len(found), size):
            part = found[start : start + size]
            where = torch.tensor([place for place, _ in part])
            log_probabilities = F.log_softmax(hidden.logits(where[:, 0], where[:, 1]).float(), dim=-1)
            of = [(index, target) for index, (_, wanted) in enumerate(part) for target, _ in wanted]
            at, wanted_there = torch.tensor(of, device=log_probabilities.device).unbind(1)
            nats = log_probabilities[at, wanted_there].tolist()
            likely = (log_probabilities.argmax(-1)[at] == wanted_there).tolist()
            numbers = [number for _, wanted in part for _, number in wanted]
            for number, value, same in zip(numbers, nats, likely, strict=True):
                self.nats[number] += value
                self.likeliest[number] &= same


def _nbytes(cache: Cache) -> int:
    """Bytes of a cache that can be copied."""
    layers: list[Any] = list(cache.layers)
    return sum(x.nbytes if isinstance(x, LayerMemory) else x.keys.nbytes + x.values.nbytes for x in layers)


def _left_padded(rows: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask `[B, L]`. On this side of a text a sliding window counts the same tokens as without pads."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*[0] * (longest - len(row)), *row] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
    return ids, mask.long()


def _is_copyable(cache: Any) -> bool:
    return isinstance(cache, Cache) and all(type(layer) in _COPYABLE for layer in cache.layers)


def _rows(cache: Cache, indices: Tensor) -> Cache:
    """A copy of some rows, which may repeat; the cache itself stays as it is."""
    copied = copy.copy(cache)
    copied.layers = []
    for layer in cache.layers:
        if isinstance(layer, LayerMemory):
            copied.layers.append(layer.rows(indices))
        else:
            copied.layers.append(copy.copy(layer))
            copied.layers[-1].batch_select_indices(indices)
    return copied
