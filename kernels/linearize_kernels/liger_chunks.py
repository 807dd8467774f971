"""The forward kernels of Liger attention over chunks: 64 tokens for some query heads of a key/value head at a time.

A chunk whose decay is weak needs one factor per query and one per key, both relative to half of the chunk's decay. They
are computed once for all query heads, and then all products are those of tensor cores. Chunks with strong decays are
left to the kernels over sub-chunks, which compute each decay by itself.

Arrays between these kernels are `rise` `[P, K, F]` in float32, the factors of a chunk's queries, each in the row of the
key that has its place in the stream; and, as operands of products, `folded` `[P, K, F]`, key features times their
factors, and `entering` `[slots, K, F, V]`, the states, decayed by half of their chunk. Loops load them anew for each
head: a tile that is kept over a loop takes registers.
"""

from __future__ import annotations

from linearize_kernels.liger_forward import read_window, shares
from linearize_kernels.liger_tiles import VARYING, decay, features, log_gates, operand, softmax_rows, tl, triton, weak


@triton.jit
def open_chunk(
    starts,
    counts,
    slots,
    totals,
    i,
    lag,
    K: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """A program's row and key/value head, the row's start, length and count; and, for the chunk at token `i` of the
    stream, its row in `[slots * K, ...]`, its log decay `[BF]` and the number of features to read from its state. The
    last two are 0 outside of the stream."""
    row, head = tl.program_id(1) // K, tl.program_id(1) % K
    start = tl.load(starts + row).to(tl.int64)
    length = (tl.load(starts + row + 1).to(tl.int64) - start).to(tl.int32)
    count = tl.load(counts + row).to(tl.int32) if COUNTED else length * 0
    within = (i >= 0) & (i < length - lag)
    wide = tl.where(within, F, 0)
    slot = (tl.load(slots + row).to(tl.int64) + tl.where(within, i // CHUNK, 0)) * K + head
    f = tl.arange(0, BF)
    return row, head, start, length, count, slot, tl.load(totals + slot * F + f, mask=f < wide, other=0.0), wide


@triton.jit(do_not_specialize=VARYING)
def chunk_factors(
    k,
    stats,
    gate,
    gate_scale,
    gate_bias,
    divisor,
    starts,
    counts,
    slots,
    totals,
    states,
    rise,
    folded,
    entering,
    keys,
    past,
    lag,
    ahead,
    least,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTMAX: tl.constexpr,
    FROM_KEY: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    COUNTED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Compute `rise`, `folded` and `entering` of a chunk of weak decay."""
    i = tl.program_id(0) * CHUNK
    row, head, start, length, count, slot, total, _wide = open_chunk(
        starts, counts, slots, totals, i, lag, K, F, BF, CHUNK, COUNTED
    )
    if i + lag >= length:
        return
    if not weak(total, EXACT):
        return
    f = tl.arange(0, BF)[None, :]
    place = i + tl.arange(0, CHUNK)
    within = place < length - lag
    writes = within & (count + place - ahead >= least)
    offset = (tl.where(within, start + (row + 1) * past + place - ahead, 0) * K + head)[:, None]
    mask = writes[:, None] & (f < F)
    log_gate = log_gates(gate, k, gate_scale, gate_bias, divisor, offset, head, f, mask, F, FROM_KEY, PER_CHANNEL)
    from_middle = tl.cumsum(log_gate, 0) - total[None, :] * 0.5
    key = features(k, stats, offset, f, mask, keys * K, F, SOFTMAX) * decay(-from_middle, EXACT)
    inside = within[:, None] & (f < F)
    tl.store(rise + offset * F + f, decay(from_middle, EXACT), mask=inside)
    tl.store(folded + offset * F + f, key.to(folded.dtype.element_ty), mask=inside)
    half = decay(total * 0.5, EXACT)
    u = tl.arange(0, BV)[None, :]
    at = (slot * F + tl.arange(0, BF)[:, None]) * V + u
    of_state = (tl.arange(0, BF) < F)[:, None] & (u < V)
    state = tl.load(states + at, mask=of_state, other=0.0) * half[:, None]
    tl.store(entering + at, state.to(entering.dtype.element_ty), mask=of_state)


@triton.jit
def load_keys(folded, offset, writes, F: tl.constexpr, BF: tl.constexpr):
    """Folded keys of a chunk."""
    f = tl.arange(0, BF)[None, :]
    return tl.load(folded + offset * F + f, mask=writes[:, None] & (f < F), other=0.0)


@triton.jit
def load_values(v, offset, writes, u, V: tl.constexpr, OPERAND: tl.constexpr):
    """Values of a chunk."""
    return operand(tl.load(v + offset * V + u[None, :], mask=writes[:, None] & (u < V)[None, :], other=0.0), OPERAND)


@triton.jit
def load_state(entering, slot, wide, u, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr):
    """The state at a chunk's start, decayed by half of the chunk."""
    f = tl.arange(0, BF)[:, None]
    return tl.load(entering + (slot * F + f) * V + u[None, :], mask=(f < wide) & (u < V)[None, :], other=0.0)


@triton.jit
def load_mass(masses, slot, total, wide, F: tl.constexpr, BF: tl.constexpr, EXACT: tl.constexpr):
    """The mass at a chunk's start, decayed by half of the chunk."""
    f = tl.arange(0, BF)
    return tl.load(masses + slot * F + f, mask=f < wide, other=0.0) * decay(total * 0.5, EXACT)


@triton.jit
def load_reads(q, query, real, F: tl.constexpr, BF: tl.constexpr, SOFTMAX: tl.constexpr):
    """φ of query rows."""
    f = tl.arange(0, BF)[None, :]
    reads = tl.load(q + query * F + f, mask=real[:, None] & (f < F), other=0.0).to(tl.float32)
    if SOFTMAX:
        reads = softmax_rows(reads, f < F)
    return reads


@triton.jit
def load_rise(rise, place, stream, first_key, ahead, head, K: tl.constexpr, F: tl.constexpr, BF: tl.constexpr):
    """Factors of the queries at places of the stream; 0 outside of it."""
    f = tl.arange(0, BF)[None, :]
    within = (place >= 0) & (place < stream)
    offset = (tl.where(within, first_key + place - ahead, 0) * K + head)[:, None]
    return tl.load(rise + offset * F + f, mask=within[:, None] & (f < F), other=0.0)


@triton.jit(do_not_specialize=VARYING)
def chunk_outputs(
    q_rotated,
    k_rotated,
    v,
    q,
    column_k,
    column_v,
    column_exists,
    mix_weight,
    starts,
    counts,
    slots,
    masses,
    totals,
    rise,
    folded,
    entering,
    outputs,
    window,
    past,
    lag,
    ahead,
    least,
    scale,
    softcap,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SINKS: tl.constexpr,
    EXISTS: tl.constexpr,
    CAPPED: tl.constexpr,
    MIX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EVICTED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    COUNTED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Window, recurrence and mix for the queries that read a chunk of weak decays, or no state."""
    G: tl.constexpr = H // K
    # Tiles are aligned with the stream; queries before it have no state to read, so the first tiles have negative `i`.
    i = (tl.program_id(0) - (lag + CHUNK - 1) // CHUNK) * CHUNK
    row, head, start, length, count, slot, total, wide = open_chunk(
        starts, counts, slots, totals, i, lag, K, F, BF, CHUNK, COUNTED
    )
    if i + lag >= length:
        return
    if not weak(total, EXACT):
        return
    d, u = tl.arange(0, BD)[None, :], tl.program_id(2) * BV + tl.arange(0, BV)
    first_key = start + (row + 1) * past
    s = i + tl.arange(0, CHUNK)
    writes = (s >= 0) & (s < length - lag) & (count - ahead + s >= least)
    offset = (tl.where(writes, first_key + s - ahead, 0) * K + head)[:, None]
    mass_at_start = load_mass(masses, slot, total, wide, F, BF, EXACT)
    low = tl.maximum(i + lag - window + 1, -tl.minimum(count, past))
    high = tl.minimum(i + lag + CHUNK, length)
    x = tl.arange(0, HEADS * CHUNK)
    place = i + x % CHUNK
    t = place + lag
    for first in range(0, G, HEADS):
        member = first + x // CHUNK
        real = (t >= 0) & (t < length) & (member < G)
        query = tl.where(real, (start + t) * H + head * G + member, 0)[:, None]
        # The window comes between pairs and reads, so that fewer registers are needed at once.
        reads = load_reads(q, query, real, F, BF, SOFTMAX)
        reads = reads * load_rise(rise, place, length - lag, first_key, ahead, head, K, F, BF)
        mass = tl.sum(reads * mass_at_start[None, :], 1)
        reads = operand(reads, OPERAND)
        key = load_keys(folded, offset, writes, F, BF)
        pairs = tl.dot(reads, tl.trans(key), input_precision=PRECISION)
        pairs = tl.where(place[:, None] >= s[None, :], pairs, 0.0)
        mass += tl.sum(pairs, 1)
        pairs = operand(pairs, OPERAND)
        rotated = tl.load(q_rotated + query * D + d, mask=real[:, None] & (d < D), other=0.0)
        y, normaliser = read_window(
            rotated,
            k_rotated,
            v,
            column_k,
            column_v,
            column_exists,
            t,
            count,
            row,
            head,
            first_key,
            low,
            high,
            u,
            window,
            scale,
            softcap,
            K,
            D,
            V,
            BD,
            BV,
            BM,
            KEYS,
            COLUMNS,
            SINKS,
            EXISTS,
            CAPPED,
            OPERAND,
            PRECISION,
        )
        if i >= 0:
            state = load_state(entering, slot, wide, u, F, V, BF)
            read = tl.dot(reads, state, input_precision=PRECISION)
            values = load_values(v, offset, writes, u, V, OPERAND)
            read += tl.dot(pairs, values, input_precision=PRECISION)
            live = real
            if EVICTED:
                live = real & (count + t - window >= least)
            weight = mass * 0.0
            if MIX == "softmax":
                weight = tl.load(mix_weight + head * G + member, mask=real, other=0.0).to(tl.float32)
            share, divides = shares(mass, normaliser, weight, live, MIX, NORMALIZE)
            inverse = (1.0 / divides)[:, None]
            share = share[:, None]
            if MIX == "learned":
                channel = (head * G + member)[:, None] * V + u[None, :]
                learned = tl.load(mix_weight + channel, mask=real[:, None] & (u < V)[None, :], other=0.0)
                share = share * learned.to(tl.float32)
            y = y + share * (read * inverse - y)
        to = outputs + query * V + u[None, :]
        tl.store(to, y.to(outputs.dtype.element_ty), mask=real[:, None] & (u < V)[None, :])
