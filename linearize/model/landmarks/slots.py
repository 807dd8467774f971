"""Landmarks: exact keys and values beside window and sinks, chosen online among the tokens that leave the window.

Tokens after the sinks are numbered in blocks of `BLOCK`. Query t attends, under one softmax, to

    sinks       the first M tokens
    landmarks   N slots per key/value head, filled from the blocks that have left the window
    window      all tokens of the later blocks up to t: at least the last W, at most W + BLOCK - 1

and reads the state, if the mixer has a recurrence. A block is merged when its last token leaves the window. A merge
ranks the block's tokens together with those in the slots. The N of highest rank take the slots; the others are written
into the state in text order. Slots and state do not change between two merges, so all queries of a block are computed
at once, and any split of a text into calls makes the same merges. In 4 bits a block is rounded when it is merged, also
the tokens that get no slot.

A token's rank is the sum of two scores, each standardised over the candidates of its head. The first is given with
the token, the second follows from what attends to it:

    novelty     minus the cosine between its key, without positions, and the mean of the head's earlier keys, each
                scaled to length 1 (KeyDiff, arXiv 2504.15364). Averaged over the tokens up to `REACH` places away,
                because facts worth recalling span several tokens
    or learned  an affine map of the layer's keys and values (`landmark_score: learned`), fitted by `convert` to the log
                of the cost of losing the token. Attention counts `BESIDE_LEARNED` times beside it
    attention   the log of the mean attention weight it receives per query, summed over its head's queries (as H2O,
                arXiv 2306.14048, without the two changes that follow). Only queries at least W / 4 tokens later
                count, because the weights of near queries predict those of distant ones poorly. A block of queries
                weighs `FADING` times the next block. The score is clipped below at -`MOST_AGAINST`, because a token
                may receive no attention until the text returns to it

Ranks are not differentiated; gradients reach the keys and values that are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.model.configuration import BLOCK, room
from linearize.model.memory import Joint
from linearize.model.precision import exact_bits, names_in_part, rounded_part, slot_bits

if TYPE_CHECKING:
    from collections.abc import Callable

    from linearize.families.base import Projections
    from linearize.model.memory import Part
    from linearize.model.mixer.base import MixerBase

REACH = 2
FADING = 0.8
MOST_AGAINST = 1.0
BESIDE_LEARNED = 0.5
SCORES = ("novelty", "received", "number")
"""Tensors of the slots beside those of the tokens; the window has the first two."""
LEAST_ATTENTION, LEAST_SPREAD = 1e-5, 1e-6


def landmark_parts(mixer: MixerBase, empty: Callable[..., Part], batch: int, device: torch.device) -> dict[str, Part]:
    """The tensors of `Mixer.parts` with landmarks, not initialised. `number` counts tokens from 1; 0: an empty slot.

    Args:
        empty: makes tensors for a number of tokens and some tensor names; `bits` other than the window's.
    """
    layer, slots = mixer.layer, mixer.config.landmarks

    def with_scores(part: Part, count: int, **scores: torch.dtype) -> Part:
        shape = (batch, count, layer.key_value_heads)
        return part | {name: torch.empty(shape, dtype=kind, device=device) for name, kind in scores.items()}

    names, scores, width = kept_names(mixer), dict.fromkeys(SCORES[:2], torch.float32), room(mixer.window)
    parts = {"window": with_scores(empty(width, *names), width, **scores)}
    kept = empty(slots, *names, bits=slot_bits(mixer.config))
    parts["landmarks"] = with_scores(kept, slots, **scores, number=torch.int32)
    if mixer.config.sinks:
        parts["sinks"] = empty(mixer.config.sinks, "k_rotated", "v")
    if mixer.config.landmark_score == "novelty":
        shape = (batch, layer.key_value_heads, layer.key_width)
        parts["keys"] = {"sum": torch.empty(shape, dtype=torch.float32, device=device)}
    return parts


def kept_names(mixer: MixerBase) -> tuple[str, ...]:
    """The names of the tensors kept per token: the inputs of attention, and the inputs of the state, which receives
    the token if it loses its slot."""
    config = mixer.config
    if mixer.recurrence is None:
        return ("k_rotated", "v")
    return ("k_rotated", *(() if config.rope else ("k",)), *(("source",) if config.gate_source == "q" else ()), "v")


def joint_parts(mixer: MixerBase) -> tuple[Joint]:
    """The tensors that a step reads as one: sinks, window, and the slots if they have the same codes."""
    bits = exact_bits(mixer.config)
    near = (*(["sinks"] if mixer.config.sinks else []), "window")
    parts = (*near, "landmarks") if slot_bits(mixer.config) == bits else near
    return (Joint(parts, names_in_part(("k_rotated", "v"), bits)),)


@overload
def merges(mixer: MixerBase, tokens: int) -> int: ...
@overload
def merges(mixer: MixerBase, tokens: Tensor) -> Tensor: ...
@overload
def merges(mixer: MixerBase, tokens: Tensor | int) -> Tensor | int: ...
def merges(mixer: MixerBase, tokens: Tensor | int) -> Tensor | int:
    """The number of blocks merged when the last of `tokens` tokens of a row is a query."""
    left = tokens - mixer.window - mixer.config.sinks
    return max(left, 0) // BLOCK if isinstance(left, int) else left.clamp_min(0) // BLOCK


def novelty(k: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The novelty of tokens with keys `k` `[R, L, K, D]`.

    Args:
        before: `[R, K, D]` the sum of the earlier keys, each scaled to length 1.

    Returns:
        minus the cosine between each key and the mean of those before it, `[R, L, K]`, and the sum after each key,
        `[R, L, K, D]`.
    """
    unit = F.normalize(k.detach().float(), dim=-1)
    sums = before[:, None] + unit.cumsum(1)
    return -F.cosine_similarity(unit, sums - unit, dim=-1), sums


def static_scores(
    mixer: MixerBase, new: Projections, parts: dict[str, Part], inputs: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The score that a token has from its projection on, `[R, L, K]`: its novelty, or with a learned score an affine
    map of the layer's keys and values.

    Args:
        inputs: `score_inputs` of a learned score, if they are there.

    Returns:
        the scores, and the sum of keys after each token, as `novelty` returns it; None with a learned score.
    """
    own = mixer._parameters.get("score_weight")
    if own is None:
        return novelty(new.k, parts["keys"]["sum"])
    weight = own.detach().float()
    scores = F.linear(score_inputs(new) if inputs is None else inputs, weight[:, :-1], weight[:, -1])
    return scores if mixer.sum_of_ranks is None else mixer.sum_of_ranks(scores), None


def score_inputs(new: Projections) -> Tensor:
    """Keys, without positions, and values of all heads, `[R, L, K (D + V)]`: the inputs of a learned score."""
    return torch.cat([x.detach().flatten(2).float() for x in (new.k, new.v)], -1)


def leaving_scores(mixer: MixerBase, raw: Tensor, blocks: int) -> Tensor:
    """The static scores of the first `blocks` blocks of `raw` `[R, L, K]`, as their tokens leave the window,
    `[R, K, blocks * BLOCK]`."""
    if mixer.config.landmark_score == "learned":
        return raw[:, : blocks * BLOCK].transpose(1, 2)
    return smoothed(raw, mixer.window, blocks)


def smoothed(raw: Tensor, window: int, blocks: int) -> Tensor:
    """Novelty of the tokens of blocks, `[R, K, blocks * BLOCK]`: the mean of `raw` `[R, L, K]` over `REACH` tokens on
    either side, as far as they are in the window when the block leaves it."""
    span = BLOCK + min(REACH, window - 1)
    if not blocks:
        return raw[:, :0].transpose(1, 2)
    seen = raw[:, : (blocks - 1) * BLOCK + span].unfold(1, span, BLOCK).transpose(1, 2)  # [R, K, blocks, span]
    sums = F.pad(seen.cumsum(-1), (1, 0))
    place = torch.arange(BLOCK, device=raw.device)
    first, end = (place - REACH).clamp_min(0), (place + REACH + 1).clamp_max(span)
    return ((sums[..., end] - sums[..., first]) / (end - first)).flatten(2)


def take_by_head(x: Tensor, at: Tensor) -> Tensor:
    """Tokens or slots `at` `[R, N, K]` of `x` `[R, S, K, ...]`, separately for each head."""
    return x.gather(1, at.view(*at.shape, *[1] * (x.dim() - 3)).expand(*at.shape, *x.shape[3:]))


def where(rows: Tensor | None, a: Part, b: Part) -> Part:
    """`a` in the rows that are True in `rows` `[R]` (None: all), `b` in the others."""
    if rows is None:
        return a
    return {name: torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, b[name]) for name, x in a.items()}


def in_slots(mixer: MixerBase, tokens: Part) -> Part:
    """Tokens that leave the window as the slots store them, in values: rounded to 4 bits with `memory_dtype: int4`."""
    bits = slot_bits(mixer.config)
    return rounded_part(tokens, bits) if bits == 4 else tokens


def stored(mixer: MixerBase, tokens: Part) -> tuple[Tensor, Tensor, Tensor]:
    """The keys, values and gate inputs that the state receives for tokens without a slot."""
    k = tokens["k_rotated" if mixer.config.rope else "k"]
    source = tokens.get("source", tokens["v"] if mixer.config.gate_source == "v" else k)
    return k, tokens["v"], source


def arriving_of(mixer: MixerBase, new: Projections, fresh: Tensor) -> Part:
    """The window's tensors for the new tokens."""
    given = {"k_rotated": new.k_rotated, "k": new.k, "v": new.v, "source": mixer.source(new)}
    names = kept_names(mixer)
    return {name: given[name] for name in names} | {"novelty": fresh, "received": torch.zeros_like(fresh)}


def rows_of(x: Tensor, at: Tensor) -> Tensor:
    """Tokens `at` `[R, N]` of `x` `[R, T, ...]`."""
    return x.gather(1, at.view(*at.shape, *[1] * (x.dim() - 2)).expand(*at.shape, *x.shape[2:]))


def join(
    mixer: MixerBase, y: Tensor, log: Tensor | None, read: Tensor, mass: Tensor | None, empty: Tensor | None
) -> Tensor:
    """Mix the exact branch's outputs with the state's. Queries with an empty state keep the exact branch's output."""
    normaliser = log if mixer.config.mix == "softmax" else None
    mixed = mixer.mix(y, normaliser, read, None if mass is None else mass[..., None])
    return mixed if empty is None else torch.where(empty[:, :, None, None], y, mixed)
