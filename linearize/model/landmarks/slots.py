"""Landmarks: exact keys and values beside window and sinks, chosen online among the tokens that leave the window.

Tokens after the sinks are numbered in blocks of `BLOCK`. Query t attends, under one softmax, to

    sinks       the first M tokens
    landmarks   N slots per key/value head, of the blocks that all of the last W tokens have left behind
    window      every token of the later blocks up to t: the last W at least, and W + BLOCK - 1 at most

and reads the state, where there is a recurrence. When the next query leaves another block behind, the block's tokens
and those in the slots are ranked, the N of highest rank are in the slots from then on, and the others go into the
state in the order of the text. Between two merges nothing but the window changes, so all queries of a block are
answered at once, and merging token by token, in chunks and in one go is the same sequence of merges.

A token's rank is the sum of two scores, each standardised over the candidates of its head:

    novelty     minus the cosine between its key, without positions, and the mean of its head's keys of length 1
                before it (KeyDiff, arXiv 2504.15364): what is unlike the rest of the text. Averaged over the tokens
                up to `REACH` places away, for what is to be recalled comes in runs
    attention   the log of the attention it receives of a query, its head's queries together: a mean over queries at
                least W / 4 tokens later, for what nearby tokens make of it says little about what distant ones will,
                in which a block of queries counts `FADING` of the one after it (as H2O, arXiv 2306.14048, which has
                neither). It counts against a token by `MOST_AGAINST` at most: what is to be recalled is often read
                by nobody until it is asked for

Ranks are not differentiated; gradients reach the keys and values that are kept.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.model.configuration import BLOCK, room

if TYPE_CHECKING:
    from collections.abc import Callable

    from linearize.families.base import Projections
    from linearize.model.memory import Part
    from linearize.model.mixer.base import MixerBase

REACH = 2
FADING = 0.8
MOST_AGAINST = 1.0
_SCORES = ("novelty", "received")
_LEAST_ATTENTION, _LEAST_SPREAD = 1e-5, 1e-6


def landmark_parts(mixer: MixerBase, empty: Callable[..., Part], batch: int, device: torch.device) -> dict[str, Part]:
    """The exact parts of `Mixer.parts` with landmarks; `empty` makes room for so many tokens' tensors of some names.
    Tokens are numbered from 1 in `number`; 0 is an empty slot."""
    layer, slots = mixer.layer, mixer.config.landmarks

    def part(count: int, *names: str, **scores: torch.dtype) -> Part:
        shape = (batch, count, layer.key_value_heads)
        return empty(count, *names) | {
            name: torch.zeros(shape, dtype=kind, device=device) for name, kind in scores.items()
        }

    names, scores = kept_names(mixer), dict.fromkeys(_SCORES, torch.float32)
    parts = {"window": part(room(mixer.window), *names, **scores)}
    parts["landmarks"] = part(slots, *names, **scores, number=torch.int32)
    if mixer.config.sinks:
        parts["sinks"] = empty(mixer.config.sinks, "k_rotated", "v")
    width = (batch, layer.key_value_heads, layer.key_width)
    parts["keys"] = {"sum": torch.zeros(width, dtype=torch.float32, device=device)}
    return parts


def kept_names(mixer: MixerBase) -> tuple[str, ...]:
    """The tensors kept of a token: those that attention reads, and those that the state takes if the token loses its
    slot."""
    config = mixer.config
    if mixer.recurrence is None:
        return ("k_rotated", "v")
    return ("k_rotated", *(() if config.rope else ("k",)), *(("source",) if config.gate_source == "q" else ()), "v")


@overload
def merges(mixer: MixerBase, tokens: int) -> int: ...
@overload
def merges(mixer: MixerBase, tokens: Tensor) -> Tensor: ...
@overload
def merges(mixer: MixerBase, tokens: Tensor | int) -> Tensor | int: ...
def merges(mixer: MixerBase, tokens: Tensor | int) -> Tensor | int:
    """How many blocks have been merged for the last of that many tokens of a row."""
    left = tokens - mixer.window - mixer.config.sinks
    return max(left, 0) // BLOCK if isinstance(left, int) else left.clamp_min(0) // BLOCK


def novelty(k: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The novelty of tokens with keys `k` `[R, L, K, D]`; earlier keys, of length 1, sum up to `before` `[R, K, D]`.

    Returns:
        minus the cosine between each key and the mean before it, `[R, L, K]`, and the sums after each, `[R, L, K, D]`.
    """
    unit = F.normalize(k.detach().float(), dim=-1)
    sums = before[:, None] + unit.cumsum(1)
    return -F.cosine_similarity(unit, sums - unit, dim=-1), sums


def smoothed(raw: Tensor, window: int) -> Tensor:
    """Novelty of a block's tokens `[R, BLOCK, K]` from those of the block and what follows it: the mean of `REACH`
    tokens on either side, as far as they are in the window when the block leaves it."""
    seen = raw[:, : BLOCK + min(REACH, window - 1)]
    sums = F.pad(seen.cumsum(1), (0, 0, 1, 0))
    place = torch.arange(BLOCK, device=raw.device)
    first, end = (place - REACH).clamp_min(0), (place + REACH + 1).clamp_max(seen.shape[1])
    return (sums[:, end] - sums[:, first]) / (end - first).view(-1, 1)


def ranks(candidates: Part, window: int) -> Tensor:
    """`[R, N + C, K]`: how much each candidate is worth keeping, minus infinity where there is none."""
    exists = candidates["number"] > 0
    count = exists.sum(1, keepdim=True).clamp_min(1)

    def standardised(score: Tensor) -> Tensor:
        score = score.masked_fill(~exists, 0)
        apart = (score - score.sum(1, keepdim=True) / count).masked_fill(~exists, 0)
        return apart / (apart.square().sum(1, keepdim=True) / count).sqrt().clamp_min(_LEAST_SPREAD)

    # All tokens of a block have been read by as many queries: in the window, and in the slots since.
    number = candidates["number"]
    faded = FADING ** ((number.amax(1, keepdim=True) - number) // BLOCK).float()
    queries = faded * (window - window // 4 + BLOCK // 2) + BLOCK * (1 - faded) / (1 - FADING)
    attention = (candidates["received"] / queries + _LEAST_ATTENTION).log()
    total = standardised(candidates["novelty"]) + standardised(attention).clamp_min(-MOST_AGAINST)
    return total.masked_fill(~exists, -math.inf)


def merge(landmarks: Part, block: Part, window: int) -> tuple[Part, Part]:
    """The slots after a block, and the `BLOCK` tokens that have none: those of 0 first, which are no tokens, then by
    number.

    Args:
        landmarks: `[R, N, K, ...]` as in the memory; block: the same of the block's tokens, all of them real.
    """
    candidates = {name: torch.cat([tensor, block[name].to(tensor.dtype)], 1) for name, tensor in landmarks.items()}
    with torch.no_grad():
        order = ranks(candidates, window).argsort(dim=1, descending=True, stable=True)
        kept, lost = order.split([landmarks["number"].shape[1], BLOCK], 1)
        lost = lost.gather(1, candidates["number"].gather(1, lost).argsort(dim=1, stable=True))
    slots, others = ({name: take_by_head(tensor, at) for name, tensor in candidates.items()} for at in (kept, lost))
    return slots | {"received": FADING * slots["received"]}, others


def take_by_head(x: Tensor, at: Tensor) -> Tensor:
    """Tokens or slots `at` `[R, N, K]` of `x` `[R, S, K, ...]`, for each head its own."""
    return x.gather(1, at.view(*at.shape, *[1] * (x.dim() - 3)).expand(*at.shape, *x.shape[3:]))


def where(rows: Tensor | None, a: Part, b: Part) -> Part:
    """`a` in those rows and `b` in the others."""
    if rows is None:
        return a
    return {name: torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, b[name]) for name, x in a.items()}


def stored(mixer: MixerBase, tokens: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and what gates are built from, as the state takes them, of tokens that lose their slots."""
    k = tokens["k_rotated" if mixer.config.rope else "k"]
    source = tokens.get("source", tokens["v"] if mixer.config.gate_source == "v" else k)
    return k, tokens["v"], source


def arriving_of(mixer: MixerBase, new: Projections, fresh: Tensor) -> Part:
    """The new tokens as the window keeps them."""
    given = {"k_rotated": new.k_rotated, "k": new.k, "v": new.v, "source": mixer.source(new)}
    names = kept_names(mixer)
    return {name: given[name] for name in names} | {"novelty": fresh, "received": torch.zeros_like(fresh)}


def numbers(first: Tensor | int, like: Tensor) -> Tensor:
    """Numbers of a block's tokens `[R, BLOCK, K]`."""
    number = torch.arange(BLOCK, device=like.device)
    number = number + (first if isinstance(first, int) else first[:, None])
    return number.view(-1, BLOCK, 1).expand(like.shape).int()


def rows_of(x: Tensor, at: Tensor) -> Tensor:
    """Tokens `at` `[R, N]` of `x` `[R, T, ...]`."""
    return x.gather(1, at.view(*at.shape, *[1] * (x.dim() - 2)).expand(*at.shape, *x.shape[2:]))


def join(mixer: MixerBase, y: Tensor, log: Tensor, read: Tensor, mass: Tensor | None, empty: Tensor | None) -> Tensor:
    """Mix the exact branch's outputs with the state's. Queries with an empty state keep the exact branch's output."""
    normaliser = log if mixer.config.mix == "softmax" else None
    mixed = mixer.mix(y, normaliser, read, None if mass is None else mass[..., None])
    return mixed if empty is None else torch.where(empty[:, :, None, None], y, mixed)
