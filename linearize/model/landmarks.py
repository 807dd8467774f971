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
                up to it (KeyDiff, arXiv 2504.15364): what is unlike the rest of the text. Averaged over the tokens
                up to `REACH` places away, for what is to be recalled comes in runs
    attention   the log of the attention it receives of a query, its head's queries together: a mean over queries at
                least W / 2 tokens later, for what nearby tokens make of it says little about what distant ones will,
                in which a block of queries counts `FADING` of the one after it (as H2O, arXiv 2306.14048, which has
                neither). It counts against a token by `MOST_AGAINST` at most: what is to be recalled is often read
                by nobody until it is asked for

Ranks are not differentiated; gradients reach the keys and values that are kept.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from linearize.families.base import Projections
    from linearize.model.memory import LayerMemory, Part
    from linearize.model.mixer import Mixer

BLOCK = 32
REACH = 3
FADING = 0.9
MOST_AGAINST = 0.5
_SCORES = ("novelty", "received")
_LEAST_ATTENTION, _LEAST_SPREAD = 1e-5, 1e-6


def room(window: int) -> int:
    """The most tokens that a window of that width holds: a block stays until all of it has left."""
    return window + BLOCK - 1


def landmark_parts(mixer: Mixer, empty: Callable[..., Part], batch: int, device: torch.device) -> dict[str, Part]:
    """The exact parts of `Mixer.parts` with landmarks; `empty` makes room for so many tokens' tensors of some names.
    Tokens are numbered from 1 in `number`; 0 is an empty slot."""
    layer, slots = mixer.layer, mixer.config.landmarks

    def part(count: int, *names: str, **scores: torch.dtype) -> Part:
        shape = (batch, count, layer.key_value_heads)
        return empty(count, *names) | {
            name: torch.zeros(shape, dtype=kind, device=device) for name, kind in scores.items()
        }

    names, scores = _names(mixer), dict.fromkeys(_SCORES, torch.float32)
    parts = {"window": part(room(mixer.window), *names, **scores)}
    parts["landmarks"] = part(slots, *names, **scores, number=torch.int32)
    if mixer.config.sinks:
        parts["sinks"] = empty(mixer.config.sinks, "k_rotated", "v")
    width = (batch, layer.key_value_heads, layer.key_width)
    parts["keys"] = {"sum": torch.zeros(width, dtype=torch.float32, device=device)}
    return parts


def _names(mixer: Mixer) -> tuple[str, ...]:
    """What is kept of a token: what attention reads, and what the state will ask for should the token lose its slot."""
    config = mixer.config
    if mixer.recurrence is None:
        return ("k_rotated", "v")
    return ("k_rotated", *(() if config.rope else ("k",)), *(("source",) if config.gate_source == "q" else ()), "v")


@torch.compiler.disable(reason="which tokens are kept, and when, depends on what they are")
def landmark_attention(mixer: Mixer, new: Projections, lengths: Tensor | None, memory: LayerMemory | None) -> Tensor:
    """`Mixer.forward` with landmarks."""
    if memory is not None and new.q.shape[1] == 1 and not torch.is_grad_enabled():
        return _step(mixer, new, lengths, memory)
    return _chunk(mixer, new, lengths, memory)


def merges(mixer: Mixer, tokens: Tensor | int) -> Tensor | int:
    """How many blocks have been merged for the last of that many tokens of a row."""
    left = tokens - mixer.window - mixer.config.sinks
    return max(left, 0) // BLOCK if isinstance(left, int) else left.clamp_min(0) // BLOCK


# -- ranks ------------------------------------------------------------------------------------------------------------


def novelty(k: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Of tokens with keys `k` `[R, L, K, D]`, after earlier ones whose keys of length 1 sum up to `before` `[R, K, D]`:
    how unlike the keys so far each is, `[R, L, K]`, and the sums after each, `[R, L, K, D]`."""
    sums = before[:, None] + F.normalize(k.detach().float(), dim=-1).cumsum(1)
    return -F.cosine_similarity(k.detach().float(), sums, dim=-1), sums


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
    queries = faded * (window - window // 2 + BLOCK // 2) + BLOCK * (1 - faded) / (1 - FADING)
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
    slots, others = ({name: _take(tensor, at) for name, tensor in candidates.items()} for at in (kept, lost))
    return slots | {"received": FADING * slots["received"]}, others


def _take(x: Tensor, at: Tensor) -> Tensor:
    """Slots `at` `[R, N, K]` of `x` `[R, S, K, ...]`, for each head its own."""
    return x.gather(1, at.view(*at.shape, *[1] * (x.dim() - 3)).expand(*at.shape, *x.shape[3:]))


def _where(rows: Tensor | None, a: Part, b: Part) -> Part:
    """`a` in those rows and `b` in the others."""
    if rows is None:
        return a
    return {name: torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, b[name]) for name, x in a.items()}


# -- attention --------------------------------------------------------------------------------------------------------


def _attend(
    mixer: Mixer, q: Tensor, keys: list[Tensor], values: list[Tensor], seen: list[Tensor | None]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Attention under one softmax over keys that lie in several tensors.

    Args:
        q: `[R, L, H, D]`.
        keys, values: each `[R, S, K, D or V]`.
        seen: of each which keys a query reads, to be broadcast to `[R, K, L, S]`; None is all.

    Returns:
        outputs `[R, L, H, V]`, the log of the softmax's denominator `[R, L, H]`, both float32 (or float64), and of each
        tensor what its keys received of each query, summed over a head's queries `[R, K, L, S]`.
    """
    rows, tokens, heads = q.shape[:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = keys[0].shape[2]
    q = q.to(dtype).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # [R, K, G, L, D]
    shape, flat = (rows, groups, heads // groups, tokens), q.flatten(2, 3)
    scores = []
    for k, mask in zip(keys, seen, strict=True):
        score = (flat @ k.to(dtype).permute(0, 2, 3, 1) * mixer.layer.scale).view(*shape, -1)
        if (cap := mixer.layer.softcap) is not None:
            score = cap * torch.tanh(score / cap)
        scores.append(score if mask is None else score.masked_fill(~mask.unsqueeze(2), -math.inf))
    joined = torch.cat(scores, -1)
    shares = joined.softmax(-1)
    pieces = shares.split([score.shape[-1] for score in scores], -1)
    read = [p.flatten(2, 3) @ v.to(dtype).transpose(1, 2) for p, v in zip(pieces, values, strict=True)]
    outputs = sum(read[1:], read[0]).view(*shape, -1).permute(0, 3, 1, 2, 4).flatten(2, 3)
    logs = joined.logsumexp(-1).permute(0, 3, 1, 2).flatten(2, 3)
    return outputs, logs, [piece.detach().sum(2) for piece in pieces]


def _join(mixer: Mixer, y: Tensor, log: Tensor, read: Tensor, mass: Tensor | None, empty: Tensor | None) -> Tensor:
    """The exact part's output with the state's; an empty state has no opinion, and the exact part stays as it is."""
    y = torch.zeros_like(y) if "window" in mixer.branches_off else y
    mixed = mixer.mix(
        y, log if mixer.config.mix == "softmax" else None, read, None if mass is None else mass[..., None]
    )
    return mixed if empty is None else torch.where(empty[:, :, None, None], y, mixed)


# -- several tokens ---------------------------------------------------------------------------------------------------


def _chunk(mixer: Mixer, new: Projections, lengths: Tensor | None, memory: LayerMemory | None) -> Tensor:
    """Any number of tokens, whole rows without a memory among them.

    Rows are laid out as they stand in their windows: place 0 is the first token of the first block that has not been
    merged, so that all rows come to the borders of blocks together. The first new token stands at `offset`, before 0 if
    it is a sink.
    """
    rows, tokens = new.q.shape[:2]
    config, window, sinks, device = mixer.config, mixer.window, mixer.config.sinks, new.v.device
    parts = memory.parts if memory is not None else mixer.parts(rows, new.v.dtype, device)
    count: Tensor | int = 0
    if memory is not None:
        count = memory.counts.clone() if memory.uniform is None else memory.uniform
    merged = merges(mixer, count)
    offset = count - sinks - merged * BLOCK
    total: Tensor | None = None  # places that are filled in each row; None means all
    if memory is not None and (lengths is not None or isinstance(offset, Tensor)):
        total = offset + (tokens if lengths is None else lengths)

    fresh, sums = novelty(new.k, parts["keys"]["sum"])
    arriving = _arriving(mixer, new, fresh)
    if isinstance(offset, int):
        held, first = max(offset, 0), offset
        seq = {n: torch.cat([x[:, :held], arriving[n][:, max(-offset, 0) :]], 1) for n, x in parts["window"].items()}
        q, q_state, here = new.q_rotated, new.q, None
    else:
        span = max(int(total.max()), 1)
        place = torch.arange(span, device=device)
        at = torch.where(place < offset[:, None], place, room(window) + place - offset[:, None])
        at = at.clamp(max=room(window) + tokens - 1)
        seq = {n: _rows(torch.cat([x, arriving[n].to(x.dtype)], 1), at) for n, x in parts["window"].items()}
        first = -sinks
        here = (torch.arange(first, span, device=device) - offset[:, None]).clamp(0, tokens - 1)
        q, q_state = _rows(new.q_rotated, here), _rows(new.q, here)
    exact = _sinks(mixer, new, lengths, memory, count)
    landmarks = parts["landmarks"]

    stop, at, block = first + q.shape[1], first, 0
    ys, logs, recall = [], [], _Recall(mixer, q_state if not config.rope else q, first)
    while at < stop:
        end = min(window - 1 + (block + 1) * BLOCK, stop)
        if block:
            leaving = {name: x[:, (block - 1) * BLOCK : block * BLOCK] for name, x in seq.items()}
            number = sinks + 1 + (merged + block - 1) * BLOCK
            leaving["number"] = _numbers(number, leaving["received"])
            leaving["novelty"] = smoothed(seq["novelty"][:, (block - 1) * BLOCK :], window)
            goes = None if total is None else total > window - 1 + block * BLOCK
            kept, lost = merge(landmarks, leaving, window)
            landmarks = _where(goes, kept, landmarks)
            recall.write(lost, goes)
        if end > at:
            local = slice(block * BLOCK, max(end, 0))
            filled = min(config.landmarks, (merged + block) * BLOCK) if isinstance(merged, int) else config.landmarks
            query = torch.arange(at, end, device=device)[:, None]
            keys, values = list[Tensor](), list[Tensor]()
            seen: list[Tensor | None] = []
            if sinks:
                keys, values = [exact["k_rotated"]], [exact["v"]]
                visible = torch.arange(sinks, device=device) <= query + sinks
                seen.append(visible[None, None] if at < 0 else None)
            if filled:
                keys.append(landmarks["k_rotated"][:, :filled])
                values.append(landmarks["v"][:, :filled])
                exists = landmarks["number"] > 0
                seen.append(None if isinstance(merged, int) else exists.transpose(1, 2)[:, :, None])
            keys.append(seq["k_rotated"][:, local])
            values.append(seq["v"][:, local])
            seen.append((torch.arange(local.start, local.stop, device=device) <= query)[None, None])
            y, log, received = _attend(mixer, q[:, at - first : end - first], keys, values, seen)
            if total is not None:
                real = query[:, 0] < total[:, None]
                if not isinstance(offset, int):
                    real = real & (query[:, 0] >= offset[:, None])
                received = [share * real[:, None, :, None] for share in received]
            distant = query - torch.arange(local.start, local.stop, device=device) >= window // 2
            seq["received"][:, local] += (received[-1] * distant).sum(2).transpose(1, 2).to(seq["received"].dtype)
            if filled:
                read = F.pad(received[-2].sum(2), (0, config.landmarks - filled)).transpose(1, 2)
                landmarks = landmarks | {"received": landmarks["received"] + read.to(landmarks["received"].dtype)}
            ys.append(y)
            logs.append(log)
            recall.read(at, end, (merged + block) * BLOCK - config.landmarks)
        at, block = end, block + 1

    y = torch.cat(ys, 1)
    if memory is not None:
        done = block - 1 if total is None else (total - window).clamp_min(0) // BLOCK
        _keep(mixer, memory, seq, done, landmarks, exact, sums, lengths)
    if mixer.recurrence is not None and "recurrence" not in mixer.branches_off:
        y = recall.join(y, torch.cat(logs, 1), memory)
    elif mixer.branches_off >= {"recurrence", "window"} or (
        mixer.recurrence is None and "window" in mixer.branches_off
    ):
        y = torch.zeros_like(y)
    if here is None:
        return y
    back = torch.arange(tokens, device=device) + offset[:, None] - first
    return _rows(y, back.clamp(max=y.shape[1] - 1))


class _Recall:
    """What the queries of a chunk read from the state, between the merges that write into it.

    Reading and writing are gathered and then run as one sequence, in which a token that is read for writes nothing.

    Args:
        q: the recurrence's queries `[R, L, H, D]`, of places from `first` on.
    """

    def __init__(self, mixer: Mixer, q: Tensor, first: int) -> None:
        self.mixer, self.q, self.first = mixer, q, first
        self.on = mixer.recurrence is not None and "recurrence" not in mixer.branches_off
        self.pieces: list[tuple[Part | None, Tensor | int]] = []
        self.spans: list[tuple[int, int, Tensor | int]] = []
        self.waiting: list[tuple[Part, Tensor]] = []

    def write(self, lost: Part, goes: Tensor | None) -> None:
        if self.on:
            writes = lost["number"][:, :, 0] > 0
            self.waiting.append((lost, writes if goes is None else writes & goes[:, None]))

    def read(self, start: int, end: int, written: Tensor | int) -> None:
        """Queries `start` to `end`, after `written` tokens in all (0 or less where there are none)."""
        if not self.on or (isinstance(written, int) and written <= 0):
            self.waiting = []
            return
        self.spans.append((start - self.first, end - self.first, written))
        self.pieces += [*self.waiting, (None, end - start)]
        self.waiting = []

    def join(self, y: Tensor, logs: Tensor, memory: LayerMemory | None) -> Tensor:
        if not self.spans:
            return torch.zeros_like(y) if "window" in self.mixer.branches_off else y
        recurrence = self.mixer.recurrence
        assert recurrence is not None  # noqa: S101 - for the type checker; `on` has looked
        rows, groups = y.shape[0], self.mixer.layer.key_value_heads
        width = self.mixer.layer.key_width
        qs, ks, vs, sources, writes, reads = [], [], [], [], [], list[Tensor]()
        spans, place, device = iter(self.spans), 0, y.device
        for lost, told in self.pieces:
            if lost is not None:
                k, v, source = stored(self.mixer, lost)
                qs.append(self.q.new_zeros(rows, BLOCK, self.q.shape[2], width))
                writes.append(told)
                length = BLOCK
            else:
                start, end, _ = next(spans)
                length = end - start
                qs.append(self.q[:, start:end])
                k, source = (self.q.new_zeros(rows, length, groups, width) for _ in range(2))
                v = y.new_zeros(rows, length, groups, self.mixer.layer.value_width)
                source = v if self.mixer.config.gate_source == "v" else source
                writes.append(torch.zeros(rows, length, dtype=torch.bool, device=device))
                reads.append(torch.arange(place, place + length, device=device))
            ks.append(k)
            vs.append(v)
            sources.append(source)
            place += length
        q, k, v, source, written = (torch.cat(x, 1) for x in (qs, ks, vs, sources, writes))
        state = memory.parts["state"] if memory is not None else None
        answers, mass = recurrence.in_segments(q, k, v, source, written, state)
        at = torch.cat(reads)
        first = self.spans[0][0]
        empty = None
        if any(isinstance(amount, Tensor) for *_, amount in self.spans):
            empty = torch.cat([(amount <= 0)[:, None].expand(-1, end - start) for start, end, amount in self.spans], 1)
        mixed = _join(
            self.mixer, y[:, first:], logs[:, first:], answers[:, at], None if mass is None else mass[:, at], empty
        )
        before = torch.zeros_like(y[:, :first]) if "window" in self.mixer.branches_off else y[:, :first]
        return torch.cat([before, mixed], 1) if first else mixed


def stored(mixer: Mixer, tokens: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and what gates are built from, as the state takes them, of tokens that lose their slots."""
    k = tokens["k_rotated" if mixer.config.rope else "k"]
    source = tokens.get("source", tokens["v"] if mixer.config.gate_source == "v" else k)
    return k, tokens["v"], source


def _arriving(mixer: Mixer, new: Projections, fresh: Tensor) -> Part:
    """The new tokens as the window keeps them."""
    given = {"k_rotated": new.k_rotated, "k": new.k, "v": new.v, "source": mixer.source(new)}
    names = _names(mixer)
    return {name: given[name] for name in names} | {"novelty": fresh, "received": torch.zeros_like(fresh)}


def _numbers(first: Tensor | int, like: Tensor) -> Tensor:
    """Numbers of a block's tokens `[R, BLOCK, K]`."""
    number = torch.arange(BLOCK, device=like.device)
    number = number + (first if isinstance(first, int) else first[:, None])
    return number.view(-1, BLOCK, 1).expand(like.shape).int()


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """Tokens `at` `[R, N]` of `x` `[R, T, ...]`."""
    return x.gather(1, at.view(*at.shape, *[1] * (x.dim() - 2)).expand(*at.shape, *x.shape[2:]))


def _sinks(
    mixer: Mixer, new: Projections, lengths: Tensor | None, memory: LayerMemory | None, count: Tensor | int
) -> Part:
    """Keys and values of the sinks `[R, M, K, D or V]` once the new tokens are there."""
    sinks, tokens = mixer.config.sinks, new.q.shape[1]
    if not sinks:
        return {}
    if memory is not None and isinstance(count, int) and count >= sinks:
        return memory.parts["sinks"]
    number = torch.arange(sinks, device=new.v.device)
    place = (number - (count if isinstance(count, int) else count[:, None])).expand(new.v.shape[0], -1)
    arrives = (place >= 0) & (place < (tokens if lengths is None else lengths[:, None]))
    taken = {name: _rows(getattr(new, name), place.clamp(0, tokens - 1)) for name in ("k_rotated", "v")}
    if memory is None:
        return taken
    held = memory.parts["sinks"]
    return {
        name: torch.where(arrives[:, :, None, None], x.to(held[name].dtype), held[name]) for name, x in taken.items()
    }


def _keep(
    mixer: Mixer,
    memory: LayerMemory,
    seq: Part,
    done: Tensor | int,
    landmarks: Part,
    exact: Part,
    sums: Tensor,
    lengths: Tensor | None,
) -> None:
    """Writes what a chunk ended with into the memory.

    Args:
        seq: the tokens by place; done: blocks of them that have been merged.
        sums: those of normalised keys after each new token.
    """
    span = next(iter(seq.values())).shape[1]
    for name, held in memory.parts["window"].items():
        if isinstance(done, int):
            left = seq[name][:, done * BLOCK :]
            held[:, : left.shape[1]] = left.detach()
        elif span:
            place = torch.arange(held.shape[1], device=held.device) + done[:, None] * BLOCK
            held.copy_(_rows(seq[name], place.clamp(max=span - 1)).detach())
    for name, held in memory.parts["landmarks"].items():
        if landmarks[name] is not held:
            held.copy_(landmarks[name].detach())
    for name, held in memory.parts.get("sinks", {}).items():
        if exact[name] is not held:
            held.copy_(exact[name].detach())
    total = memory.parts["keys"]["sum"]
    if lengths is None:
        total.copy_(sums[:, -1])
    else:
        total.copy_(_rows(torch.cat([total[:, None], sums], 1), lengths[:, None])[:, 0])


# -- one token --------------------------------------------------------------------------------------------------------


def _step(mixer: Mixer, new: Projections, lengths: Tensor | None, memory: LayerMemory) -> Tensor:
    """One token a row, the memory updated where it lies; no gradient."""
    config, parts, sinks = mixer.config, memory.parts, mixer.config.sinks
    window, landmarks = parts["window"], parts["landmarks"]
    count = memory.uniform if lengths is None else None
    recurs = mixer.recurrence is not None and "recurrence" not in mixer.branches_off
    fresh, sums = novelty(new.k, parts["keys"]["sum"])
    arriving = _arriving(mixer, new, fresh)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    seen: list[Tensor | None] = []
    if count is not None:
        merged = merges(mixer, count + 1)
        assert isinstance(merged, int)  # noqa: S101 - for the type checker
        if merged > merges(mixer, count):
            _merge_held(mixer, memory, sinks + 1 + (merged - 1) * BLOCK, None)
        place = count - sinks - merged * BLOCK
        for name, held in window.items() if place >= 0 else parts.get("sinks", {}).items():
            held[:, place if place >= 0 else count] = arriving[name][:, 0]
        if sinks:
            visible = min(count + 1, sinks)
            keys, values = [parts["sinks"]["k_rotated"][:, :visible]], [parts["sinks"]["v"][:, :visible]]
            seen = [None]
        filled, local = min(config.landmarks, merged * BLOCK), place + 1
        if filled:
            keys.append(landmarks["k_rotated"][:, :filled])
            values.append(landmarks["v"][:, :filled])
            seen.append(None)
        seen.append(None)
        written: Tensor | int = merged * BLOCK - config.landmarks
        parts["keys"]["sum"].copy_(sums[:, 0])
        local = max(local, 0)
        distant: Tensor | None = None
    else:
        counts = memory.counts
        real = torch.ones_like(counts, dtype=torch.bool) if lengths is None else lengths > 0
        before, merged = merges(mixer, counts), merges(mixer, counts + 1)
        assert isinstance(merged, Tensor) and isinstance(before, Tensor)  # noqa: S101 - for the type checker
        goes = real & (merged > before)
        # Only a device that does not have to be waited for is asked.
        if goes.device.type != "cpu" or bool(goes.any()):
            _merge_held(mixer, memory, sinks + 1 + (merged - 1) * BLOCK, goes)
        spot = counts - sinks - torch.where(real, merged, before) * BLOCK
        local = room(mixer.window)
        slot = torch.arange(local, device=counts.device)
        distant = ((spot[:, None] - slot >= mixer.window // 2) & real[:, None]).unsqueeze(-1)
        here = ((slot == spot[:, None]) & real[:, None]).unsqueeze(-1)
        for name, held in window.items():
            held.copy_(
                torch.where(here.view(*here.shape, *[1] * (held.dim() - 3)), arriving[name].to(held.dtype), held)
            )
        if sinks:
            number = torch.arange(sinks, device=counts.device)
            comes = ((number == counts[:, None]) & real[:, None])[:, :, None, None]
            for name, held in parts["sinks"].items():
                held.copy_(torch.where(comes, arriving[name].to(held.dtype), held))
                (keys if name == "k_rotated" else values).append(held)
            seen.append((number <= counts[:, None])[:, None, None])
        keys.append(landmarks["k_rotated"])
        values.append(landmarks["v"])
        seen += [(landmarks["number"] > 0).transpose(1, 2)[:, :, None], (slot <= spot[:, None])[:, None, None]]
        written = merged * BLOCK - config.landmarks
        parts["keys"]["sum"].copy_(torch.where(real[:, None, None], sums[:, 0], parts["keys"]["sum"]))
    keys.append(window["k_rotated"][:, :local])
    values.append(window["v"][:, :local])
    y, log, received = _attend(mixer, new.q_rotated, keys, values, seen)
    shares = [share[:, :, 0].transpose(1, 2) for share in received]
    if distant is None:
        distance = max(local - mixer.window // 2, 0)
        window["received"][:, :distance] += shares[-1][:, :distance]
        if filled:
            landmarks["received"][:, :filled] += shares[-2]
    else:
        window["received"] += shares[-1] * distant
        landmarks["received"] += shares[-2] * real[:, None, None]
    if not recurs:
        silent = "window" in mixer.branches_off
        return torch.zeros_like(y) if silent else y
    if isinstance(written, int) and written <= 0:
        return torch.zeros_like(y) if "window" in mixer.branches_off else y
    assert mixer.recurrence is not None  # noqa: S101 - for the type checker; `recurs` has looked
    nothing = torch.zeros(y.shape[0], 1, dtype=torch.bool, device=y.device)
    k, v, source = stored(mixer, arriving)
    read, mass = mixer.recurrence(new.q_rotated if config.rope else new.q, k, v, source, nothing, parts["state"])
    return _join(mixer, y, log, read, mass, None if isinstance(written, int) else (written <= 0)[:, None])


def _merge_held(mixer: Mixer, memory: LayerMemory, first: Tensor | int, goes: Tensor | None) -> None:
    """Merges the window's oldest block into the landmarks of the memory, in the rows that `goes` names, and moves the
    rest of the window to its place; `first` is the number of the block's first token."""
    window, landmarks = memory.parts["window"], memory.parts["landmarks"]
    block = {name: tensor[:, :BLOCK] for name, tensor in window.items()}
    block["novelty"] = smoothed(window["novelty"], mixer.window)
    kept, lost = merge(landmarks, block | {"number": _numbers(first, block["received"])}, mixer.window)
    for name, tensor in _where(goes, kept, landmarks).items():
        landmarks[name].copy_(tensor)
    for name, tensor in _where(goes, {n: x.roll(-BLOCK, 1) for n, x in window.items()}, window).items():
        window[name].copy_(tensor)
    if mixer.recurrence is not None and "recurrence" not in mixer.branches_off:
        writes = lost["number"][:, :, 0] > 0
        writes = writes if goes is None else writes & goes[:, None]
        k, v, source = stored(mixer, lost)
        q = k.repeat_interleave(mixer.layer.query_heads // mixer.layer.key_value_heads, 2)
        mixer.recurrence(q, k, v, source, writes, memory.parts["state"])
