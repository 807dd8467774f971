"""Log-likelihoods of continuations, with one pass over what they share.

The choices of a question share its text, and the questions of a few-shot task share their solved examples. The shared
tokens are read once, and what follows them goes on from copies of the cache. A row's logits are those of reading it
alone, up to the rounding of sums in another order.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from linearize.evaluation.tasks.reading import pieces
from linearize.model.memory import LayerMemory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Contexts that start with as many equal tokens are taken to have a beginning that is worth reading once.
MIN_SHARED = 64
# Logits that exist at one time, positions times vocabulary: 256 MB in float32, and as much again inside the model.
_MOST_LOGITS = 2**26
# Of their positions, those whose float32 log-probabilities exist at one time.
_CHUNK = 64
_COPYABLE = (DynamicLayer, DynamicSlidingWindowLayer, LayerMemory)
_T = TypeVar("_T")
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Query:
    """A continuation to score.

    Attributes:
        tokens: what the model reads: context and continuation without its last token.
        targets: the continuation; its tokens are predicted at the last positions of `tokens`.
    """

    tokens: Tokens
    targets: Tokens

    @property
    def context(self) -> Tokens:
        """Tokens that are read before the first target is predicted."""
        return self.tokens[: len(self.tokens) - len(self.targets) + 1]


@dataclass
class Group:
    """Queries with one beginning.

    Attributes:
        prefix: the tokens that all of them start with, at least one.
        rests: what follows it -> the numbers of the queries that read just that.
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

    def tail(self, queries: Sequence[Query]) -> int:
        """Number of the prefix's last positions that predict a target."""
        return max(len(queries[n].targets) - len(rest) for rest, members in self.rests.items() for n in members)


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
        batch_size: rows per forward pass.
        max_length: the model's context; no position beyond it is asked for.
        share: read what queries share once. A model whose cache cannot be copied row by row reads each by itself.
    """
    positions = max(1, _MOST_LOGITS // model.config.get_text_config().vocab_size)
    answers: list[tuple[float, bool]] = [(0.0, False)] * len(queries)
    short = [number for number, query in enumerate(queries) if len(query.targets) <= positions]
    for number in sorted(set(range(len(queries))) - set(short)):
        answers[number] = _in_pieces(model, queries[number])
    groups = plan(queries, short) if share else [Group.of(queries[n].tokens, queries, [n]) for n in short]
    groups.sort(key=lambda group: -len(group.prefix))
    for batch in _fitting(groups, [group.tail(queries) for group in groups], batch_size, positions):
        keep = max(1, *(group.tail(queries) for group in batch))
        ids, mask = _left_padded([group.prefix for group in batch], model.device)
        lengths = mask.sum(1)
        rows = [(index, rest) for index, group in enumerate(batch) for rest in group.rests if rest]
        width = ids.shape[1]
        end, cache = _forward(
            model,
            list(range(width - keep, width)),
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            use_cache=bool(rows),
        )
        if rows and not _is_copyable(cache):
            # A cache of another kind may be a recurrent state, which pads on the left would change.
            return log_likelihoods(model, queries, batch_size=1, max_length=max_length, share=False)
        for index, group in enumerate(batch):
            for number in group.rests.get((), ()):
                answers[number] = _score(end[index], queries[number].targets)
        rows.sort(key=lambda row: -len(row[1]))
        for piece in _fitting(rows, [len(rest) for _, rest in rows], batch_size, positions):
            chosen = torch.tensor([index for index, _ in piece], device=ids.device)
            longest = len(piece[0][1])
            new = torch.tensor([[*rest, *[0] * (longest - len(rest))] for _, rest in piece], device=ids.device)
            asked = [[queries[n] for n in batch[index].rests[rest]] for index, rest in piece]
            columns = sorted(
                {
                    column
                    for (_, rest), members in zip(piece, asked, strict=True)
                    for query in members
                    for column in range(max(0, len(rest) - len(query.targets)), len(rest))
                }
            )
            # What is filled in on the right can reach nothing before it, so it needs no mask.
            after, _ = _forward(
                model,
                columns,
                input_ids=new,
                attention_mask=torch.cat([mask[chosen], torch.ones_like(new)], 1),
                position_ids=(lengths[chosen, None] + torch.arange(longest, device=ids.device)).clamp_max(
                    max_length - 1
                ),
                past_key_values=_rows(cache, chosen),
                use_cache=True,
            )
            place = {column: number for number, column in enumerate(columns)}
            for row, (index, rest) in enumerate(piece):
                for number in batch[index].rests[rest]:
                    targets = queries[number].targets
                    first = max(0, len(rest) - len(targets))
                    found = after[row, [place[column] for column in range(first, len(rest))]]
                    if len(targets) > len(rest):
                        found = torch.cat([end[index, -1:], found])
                    answers[number] = _score(found, targets)
    return answers


def _in_pieces(model: Any, query: Query) -> tuple[float, bool]:
    """Score a query with more targets than logits may exist at one time: its text is read piece by piece on a cache."""
    total, likeliest = 0.0, True
    first = len(query.tokens) - len(query.targets)
    ids = torch.tensor([query.tokens])
    for start, logits in pieces(model, ids, max(0, first)):
        targets = query.targets[start - first : start - first + logits.shape[1]]
        nats, likely = _score(logits[0], targets)
        total, likeliest = total + nats, likeliest and likely
    return total, likeliest


def _score(logits: Tensor, targets: Tokens) -> tuple[float, bool]:
    """Score logits `[>= T, V]`, whose last T rows predict the T targets."""
    wanted = torch.tensor(targets, device=logits.device)
    total, likeliest = 0.0, True
    for rows, tokens in zip(logits[-len(targets) :].split(_CHUNK), wanted.split(_CHUNK), strict=True):
        log_probabilities = F.log_softmax(rows, dim=-1, dtype=torch.float32)
        total += float(log_probabilities.gather(1, tokens[:, None]).sum())
        likeliest = likeliest and bool((log_probabilities.argmax(-1) == tokens).all())
    return total, likeliest


def _forward(model: Any, columns: list[int], **inputs: Any) -> tuple[Tensor, Any]:
    """Logits `[B, columns, V]` at some of the positions, and the cache."""
    wanted = torch.tensor(columns, device=model.device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        out = model(**inputs, logits_to_keep=wanted)
        return out.logits, out.past_key_values
    out = model(**inputs)
    return out.logits[:, wanted], out.past_key_values


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


def _fitting(items: Sequence[_T], tails: Sequence[int], size: int, positions: int) -> Iterator[Sequence[_T]]:
    """Batches of at most `size` rows, of fewer where rows times the longest tail would be more than `positions`."""
    start = 0
    while start < len(items):
        stop, most = start + 1, max(1, tails[start])
        while stop < len(items) and stop - start < size:
            most = max(most, tails[stop])
            if most * (stop + 1 - start) > positions:
                break
            stop += 1
        yield items[start:stop]
        start = stop
