"""The forward kernels of Liger attention over chunks: 64 tokens for some query heads of a key/value head at a time.

A chunk whose decay is weak needs one factor per query and one per key, both relative to half of the chunk's decay. They
are computed once for all query heads, and then all products are those of tensor cores. Chunks with strong decays are
left to the kernels over sub-chunks, which compute each decay by itself.

Arrays between these kernels are `rise` `[P, K, F]` in float32, the factors of a chunk's queries, each in the row of the
key that has its place in the stream; and, as operands of products, `folded` `[P, K, F]`, key features times their
factors, and `entering` `[slots, K, F, V]`, the states, decayed by half of their chunk. Loops load them anew for each
head: a tile that is kept over a loop takes registers. For the same reason such a loop is `disable_licm`.
"""

from __future__ import annotations

from linearize_kernels.liger_forward import read_window
from linearize_kernels.liger_mix import head_weights, inverse_masses, write_mixed
from linearize_kernels.liger_tiles import (
    VARYING,
    decay,
    features,
    load_reads,
    log_gates,
    open_tile,
    operand,
    tl,
    triton,
    weak,
    written_keys,
)


@triton.jit
def open_chunk(
    tiles,
    n,
    before,
    starts,
    counts,
    slots,
    totals,
    lag,
    K: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """The chunk of the n-th tile of a list whose rows begin `before` chunks before the stream.

    Returns its first token of the stream; the tile's row, head, start, length and count (see `open_tile`); and its row
    in `[slots * K, ...]`, its log decay `[BF]` and the number of features to read from its state. The last two are 0
    outside of the stream."""
    tile, row, head, start, length, count = open_tile(tiles, n, starts, counts, K, COUNTED)
    i = (tile - before) * CHUNK
    within = (i >= 0) & (i < length - lag)
    wide = tl.where(within, F, 0)
    slot = (tl.load(slots + row).to(tl.int64) + tl.where(within, i // CHUNK, 0)) * K + head
    f = tl.arange(0, BF)
    return i, row, head, start, length, count, slot, tl.load(totals + slot * F + f, mask=f < wide, other=0.0), wide


@triton.jit(do_not_specialize=VARYING)
def chunk_factors(
    k,
    stats,
    gate,
    gate_scale,
    gate_bias,
    divisor,
    tiles,
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
    BLOCK: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTMAX: tl.constexpr,
    FROM_KEY: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    COUNTED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Compute a block of features of `rise`, `folded` and `entering` of a chunk of weak decay."""
    i, row, head, start, length, count, slot, total, _wide = open_chunk(
        tiles, tl.program_id(0), 0, starts, counts, slots, totals, lag, K, F, BF, CHUNK, COUNTED
    )
    if i + lag >= length:
        return
    if not weak(total, EXACT):
        return
    f = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.load(totals + slot * F + f, mask=f < F, other=0.0)
    place = i + tl.arange(0, CHUNK)
    within = place < length - lag
    writes = within & (count + place - ahead >= least)
    offset = (tl.where(within, start + (row + 1) * past + place - ahead, 0) * K + head)[:, None]
    mask = writes[:, None] & (f < F)
    log_gate = log_gates(gate, k, gate_scale, gate_bias, divisor, offset, head, f, mask, F, FROM_KEY, PER_CHANNEL)
    from_middle = tl.cumsum(log_gate, 0) - total * 0.5
    key = features(k, stats, offset, f, mask, keys * K, F, SOFTMAX) * decay(-from_middle, EXACT)
    inside = within[:, None] & (f < F)
    tl.store(rise + offset * F + f, decay(from_middle, EXACT), mask=inside)
    tl.store(folded + offset * F + f, key.to(folded.dtype.element_ty), mask=inside)
    f_row = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    half = decay(tl.load(totals + slot * F + f_row, mask=f_row < F, other=0.0) * 0.5, EXACT)[:, None]
    for block in tl.range(0, V, BV, disable_licm=True):
        u = block + tl.arange(0, BV)[None, :]
        at = (slot * F + f_row[:, None]) * V + u
        of_state = (f_row < F)[:, None] & (u < V)
        state = tl.load(states + at, mask=of_state, other=0.0) * half
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
    tiles,
    starts,
    counts,
    slots,
    masses,
    totals,
    rise,
    folded,
    entering,
    outputs,
    apart,
    faded,
    rows,
    entries,
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
    APART: tl.constexpr,
):
    """Window, recurrence and mix for some heads of the queries that read a chunk of weak decay, or no state.

    With APART, for the backward pass: the window's outputs into `outputs`, the normalised reads into `apart`, the query
    features times their factors into `faded` `[N, H, F]`, and numbers of the rows (see `liger_mix`).
    """
    G: tl.constexpr = H // K
    TILES: tl.constexpr = (G + HEADS - 1) // HEADS
    # Tiles are aligned with the stream; queries before it have no state to read, so the first tiles have negative `i`.
    n, before = tl.program_id(0) // TILES, (lag + CHUNK - 1) // CHUNK
    i, row, head, start, length, count, slot, total, wide = open_chunk(
        tiles, n, before, starts, counts, slots, totals, lag, K, F, BF, CHUNK, COUNTED
    )
    if i + lag >= length:
        return
    if not weak(total, EXACT):
        return
    d, u = tl.arange(0, BD)[None, :], tl.program_id(2) * BV + tl.arange(0, BV)
    stream, first_key = length - lag, start + (row + 1) * past
    s = i + tl.arange(0, CHUNK)
    writes, offset = written_keys(s, stream, count - ahead, least, first_key - ahead, head, K)
    x = tl.arange(0, HEADS * CHUNK)
    place = i + x % CHUNK
    t = place + lag
    member = tl.program_id(0) % TILES * HEADS + x // CHUNK
    real = (t >= 0) & (t < length) & (member < G)
    of_head = head * G + member
    entry = tl.where(real, (start + t) * H + of_head, 0)
    query = entry[:, None]
    reads = load_reads(q, query, real, F, BF, SOFTMAX)
    reads = reads * load_rise(rise, place, stream, first_key, ahead, head, K, F, BF)
    mass = tl.sum(reads * load_mass(masses, slot, total, wide, F, BF, EXACT)[None, :], 1)
    reads = operand(reads, OPERAND)
    leads = tl.program_id(2) == 0
    if APART & leads:
        f = tl.arange(0, BF)[None, :]
        tl.store(faded + query * F + f, reads.to(faded.dtype.element_ty), mask=real[:, None] & (f < F))
    pairs = tl.dot(reads, tl.trans(load_keys(folded, offset, writes, F, BF)), input_precision=PRECISION)
    pairs = tl.where(place[:, None] >= s[None, :], pairs, 0.0)
    mass += tl.sum(pairs, 1)
    read = tl.dot(reads, load_state(entering, slot, wide, u, F, V, BF), input_precision=PRECISION)
    read += tl.dot(operand(pairs, OPERAND), load_values(v, offset, writes, u, V, OPERAND), input_precision=PRECISION)
    live = real & (i >= 0)
    if EVICTED:
        live = live & (count + t - window >= least)
    inverse = inverse_masses(mass, live, MIX, NORMALIZE)
    # As an operand it needs half of the registers while the window's outputs are computed.
    read = operand(read * inverse[:, None], OPERAND)
    if APART:
        there = real[:, None] & (u < V)[None, :]
        tl.store(apart + query * V + u[None, :], read.to(apart.dtype.element_ty), mask=there)
    low = tl.maximum(i + lag - window + 1, -tl.minimum(count, past))
    high = tl.minimum(i + lag + CHUNK, length)
    rotated = tl.load(q_rotated + query * D + d, mask=real[:, None] & (d < D), other=0.0)
    y, normaliser = read_window(
        *(rotated, k_rotated, v, column_k, column_v, column_exists, t, count, row, head, first_key, low, high, u),
        *(window, scale, softcap, K, D, V, BD, BV, BM, KEYS, COLUMNS, SINKS, EXISTS, CAPPED, OPERAND, PRECISION),
    )
    learned = 1.0
    if MIX == "learned":
        lead = head * G + tl.program_id(0) % TILES * HEADS
        learned = head_weights(mix_weight, lead, u, V)
        if HEADS == 2:
            other = head_weights(mix_weight, tl.minimum(lead + 1, H - 1), u, V)
            learned = tl.where((x < CHUNK)[:, None], learned, other)
    write_mixed(
        *(y, normaliser, read, inverse, learned, mix_weight, outputs, rows),
        *(entry, of_head, u, real, leads, entries, V, MIX, APART),
    )
