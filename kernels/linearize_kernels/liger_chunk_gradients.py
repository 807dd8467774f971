"""The backward kernels of Liger attention over chunks of weak decays; see `liger_chunks` for the tiles, and
`liger_query_gradients` for the letters."""

from __future__ import annotations

from linearize_kernels.liger_chunks import (
    load_keys,
    load_mass,
    load_reads,
    load_rise,
    load_state,
    load_values,
    open_chunk,
)
from linearize_kernels.liger_forward import read_window, shares
from linearize_kernels.liger_query_gradients import ratio_gradients
from linearize_kernels.liger_tiles import VARYING, decay, features, operand, tl, triton, weak


@triton.jit
def load_through(doutputs, mix_weight, query, of_head, u, there, V: tl.constexpr, MIX: tl.constexpr):
    """For query rows: the outputs' gradients, and these times the learned weight."""
    dout = tl.load(doutputs + query * V + u[None, :], mask=there, other=0.0).to(tl.float32)
    through = dout
    if MIX == "learned":
        channel = of_head[:, None] * V + u[None, :]
        through = dout * tl.load(mix_weight + channel, mask=there, other=0.0).to(tl.float32)
    return dout, through


@triton.jit(do_not_specialize=VARYING)
def chunk_rows(
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
    doutputs,
    dweight,
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
    SUB: tl.constexpr,
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
    """Recompute the forward pass of a chunk's queries; `rows` `[5, N, H]` receives normaliser, delta, share, pull, dm,
    and `dweight` each tile's gradient of the mix weights."""
    G: tl.constexpr = H // K
    i = (tl.program_id(0) - (lag + CHUNK - 1) // CHUNK) * CHUNK
    row, head, start, length, count, slot, total, wide = open_chunk(
        starts, counts, slots, totals, i, lag, K, F, BF, CHUNK, COUNTED
    )
    if i + lag >= length:
        return
    if not weak(total, EXACT):
        return
    d, u = tl.arange(0, BD)[None, :], tl.arange(0, BV)
    first_key = start + (row + 1) * past
    s = i + tl.arange(0, CHUNK)
    writes = (s >= 0) & (s < length - lag) & (count - ahead + s >= least)
    offset = (tl.where(writes, first_key + s - ahead, 0) * K + head)[:, None]
    mass_at_start = load_mass(masses, slot, total, wide, F, BF, EXACT)
    low = tl.maximum(i + lag - window + 1, -tl.minimum(count, past))
    high = tl.minimum(i + lag + CHUNK, length)
    # Tiles are numbered as those of `query_gradients`, so that both write into one array.
    tile = tl.maximum(i // SUB + (lag + SUB - 1) // SUB, 0)
    tile = (start // SUB + 3 * row + tile) * H + head * G
    inside = (u < V)[None, :]
    x, g = tl.arange(0, HEADS * CHUNK), tl.arange(0, HEADS)
    place = i + x % CHUNK
    t = place + lag
    for first in range(0, G, HEADS):
        member = first + x // CHUNK
        real = (t >= 0) & (t < length) & (member < G)
        live = real & (i >= 0)
        if EVICTED:
            live = live & (count + t - window >= least)
        entry = tl.where(real, (start + t) * H + head * G + member, 0)
        query = entry[:, None]
        reads = load_reads(q, query, real, F, BF, SOFTMAX)
        reads = reads * load_rise(rise, place, length - lag, first_key, ahead, head, K, F, BF)
        mass = tl.sum(reads * mass_at_start[None, :], 1)
        reads = operand(reads, OPERAND)
        key = load_keys(folded, offset, writes, F, BF)
        pairs = tl.dot(reads, tl.trans(key), input_precision=PRECISION)
        pairs = tl.where(place[:, None] >= s[None, :], pairs, 0.0)
        mass += tl.sum(pairs, 1)
        state = load_state(entering, slot, wide, u, F, V, BF)
        read = tl.dot(reads, state, input_precision=PRECISION)
        values = load_values(v, offset, writes, u, V, OPERAND)
        read += tl.dot(operand(pairs, OPERAND), values, input_precision=PRECISION)
        weight = mass * 0.0
        if MIX == "softmax":
            weight = tl.load(mix_weight + head * G + member, mask=real, other=0.0).to(tl.float32)
        _share, divides = shares(mass, mass, weight, live, MIX, NORMALIZE)
        held = live & (mass > 0.0) if NORMALIZE or MIX == "softmax" else live
        # As an operand it needs half of the registers while the window's outputs are computed.
        read = operand(read * tl.where(held, 1.0 / divides, 0.0)[:, None], OPERAND)
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
        dout, through = load_through(doutputs, mix_weight, query, head * G + member, u, real[:, None] & inside, V, MIX)
        share, divides = shares(mass, normaliser, weight, live, MIX, NORMALIZE)
        pull = share / divides
        of_y, of_read = tl.sum(through * y, 1), tl.sum(through * read, 1)
        delta = tl.sum(dout * y, 1) - share * of_y
        dm = mass * 0.0
        if NORMALIZE or MIX == "softmax":
            dm = -pull * of_read
        to = tile + first + g
        if MIX == "learned":
            of_weight = tl.sum(tl.reshape(dout * (read - tl.where(held[:, None], y, 0.0)), (HEADS, CHUNK, BV)), 1)
            tl.store(dweight + to[:, None] * V + u[None, :], of_weight, mask=(first + g < G)[:, None] & inside)
        if MIX == "softmax":
            of_ratio, of_share = ratio_gradients(mass, normaliser, share, divides, weight, of_read, of_y, held)
            dm += of_ratio / divides
            delta += of_ratio
            tl.store(dweight + to, tl.sum(tl.reshape(of_share, (HEADS, CHUNK)), 1), mask=first + g < G)
        tl.store(rows + entry, normaliser, mask=real)
        tl.store(rows + entries + entry, delta, mask=real)
        tl.store(rows + 2 * entries + entry, share, mask=real)
        tl.store(rows + 3 * entries + entry, pull, mask=real)
        tl.store(rows + 4 * entries + entry, dm, mask=real)


@triton.jit
def load_dreads(
    doutputs,
    mix_weight,
    rows,
    entry,
    of_head,
    u,
    real,
    entries,
    V: tl.constexpr,
    MIX: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """For queries of one head: the gradients of the recurrence's reads, as an operand, and of their masses."""
    there = real[:, None] & (u < V)[None, :]
    dread = tl.load(doutputs + entry[:, None] * V + u[None, :], mask=there, other=0.0).to(tl.float32)
    dread = dread * tl.load(rows + 3 * entries + entry)[:, None]
    if MIX == "learned":
        dread = dread * tl.load(mix_weight + of_head * V + u, mask=u < V, other=0.0).to(tl.float32)
    return operand(dread, OPERAND), tl.load(rows + 4 * entries + entry, mask=real, other=0.0)


@triton.jit(do_not_specialize=VARYING)
def chunk_reads(
    q,
    mix_weight,
    starts,
    counts,
    slots,
    totals,
    rise,
    doutputs,
    rows,
    dstates,
    dmasses,
    entries,
    past,
    lag,
    ahead,
    H: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    MIX: tl.constexpr,
    SOFTMAX: tl.constexpr,
    COUNTED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Compute the gradient of a chunk's incoming state from the chunk's queries, into the chunk's slot."""
    G: tl.constexpr = H // K
    i = tl.program_id(0) * CHUNK
    row, head, start, length, _count, slot, total, _wide = open_chunk(
        starts, counts, slots, totals, i, lag, K, F, BF, CHUNK, COUNTED
    )
    if i + lag >= length:
        return
    if not weak(total, EXACT):
        return
    f, u = tl.arange(0, BF), tl.arange(0, BV)
    s = i + tl.arange(0, CHUNK)
    t = s + lag
    real = t < length
    first_key = start + (row + 1) * past
    dstate, dmass = tl.zeros((BF, BV), tl.float32), tl.zeros((BF,), tl.float32)
    for member in range(G):
        entry = tl.where(real, (start + t) * H + head * G + member, 0)
        dread, dm = load_dreads(doutputs, mix_weight, rows, entry, head * G + member, u, real, entries, V, MIX, OPERAND)
        faded = load_reads(q, entry[:, None], real, F, BF, SOFTMAX)
        faded = faded * load_rise(rise, s, length - lag, first_key, ahead, head, K, F, BF)
        dmass += tl.sum(faded * dm[:, None], 0)
        dstate += tl.dot(tl.trans(operand(faded, OPERAND)), dread, input_precision=PRECISION)
    half = decay(total * 0.5, EXACT)
    to = dstates + (slot * F + f[:, None]) * V + u[None, :]
    tl.store(to, dstate * half[:, None], mask=(f < F)[:, None] & (u < V)[None, :])
    tl.store(dmasses + slot * F + f, dmass * half, mask=f < F)


@triton.jit(do_not_specialize=VARYING)
def chunk_pairs(
    v,
    q,
    k,
    stats,
    mix_weight,
    starts,
    counts,
    slots,
    masses,
    totals,
    rise,
    folded,
    entering,
    doutputs,
    rows,
    dstates,
    dmasses,
    dq,
    dk,
    state_dv,
    flow,
    dlog,
    entries,
    keys,
    past,
    lag,
    ahead,
    least,
    H: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    MIX: tl.constexpr,
    SOFTMAX: tl.constexpr,
    COUNTED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Gradients of a chunk's queries and keys without positions, through its state and the pairs within it.

    `dk` and `state_dv` receive the gradients of keys and values, in float32; `dlog` that of the running decay through
    the pairs; and `flow` φ(k) times the outgoing state's part of `dk`.
    """
    G: tl.constexpr = H // K
    i = (tl.program_id(0) - (lag + CHUNK - 1) // CHUNK) * CHUNK
    row, head, start, length, count, slot, total, wide = open_chunk(
        starts, counts, slots, totals, i, lag, K, F, BF, CHUNK, COUNTED
    )
    if i + lag >= length:
        return
    if not weak(total, EXACT):
        return
    f, u = tl.arange(0, BF), tl.arange(0, BV)
    first_key = start + (row + 1) * past
    s = i + tl.arange(0, CHUNK)
    writes = (s >= 0) & (s < length - lag) & (count - ahead + s >= least)
    offset = (tl.where(writes, first_key + s - ahead, 0) * K + head)[:, None]
    mass_at_start = load_mass(masses, slot, total, wide, F, BF, EXACT)
    inside = (u < V)[None, :]
    t = s + lag
    real = (t >= 0) & (t < length)
    of_decay = tl.zeros((CHUNK, BF), tl.float32)
    dkey = tl.zeros((CHUNK, BF), tl.float32)
    dvalues = tl.zeros((CHUNK, BV), tl.float32)
    before = s[:, None] >= s[None, :]
    after = s[:, None] <= s[None, :]
    for member in range(G):
        entry = tl.where(real, (start + t) * H + head * G + member, 0)
        query = entry[:, None]
        dread, dm = load_dreads(doutputs, mix_weight, rows, entry, head * G + member, u, real, entries, V, MIX, OPERAND)
        faded = load_reads(q, query, real, F, BF, SOFTMAX)
        faded = operand(faded * load_rise(rise, s, length - lag, first_key, ahead, head, K, F, BF), OPERAND)
        key = load_keys(folded, offset, writes, F, BF)
        values = load_values(v, offset, writes, u, V, OPERAND)
        pairs = tl.dot(key, tl.trans(faded), input_precision=PRECISION)
        pairs = operand(tl.where(after, pairs, 0.0), OPERAND)
        dvalues += tl.dot(pairs, dread, input_precision=PRECISION)
        dpairs = tl.dot(values, tl.trans(dread), input_precision=PRECISION) + dm[None, :]
        dpairs = operand(tl.where(after, dpairs, 0.0), OPERAND)
        dkey += tl.dot(dpairs, faded, input_precision=PRECISION)
        dpairs = tl.dot(dread, tl.trans(values), input_precision=PRECISION) + dm[:, None]
        dpairs = operand(tl.where(before, dpairs, 0.0), OPERAND)
        state = load_state(entering, slot, wide, u, F, V, BF)
        dfaded = tl.dot(dread, tl.trans(state), input_precision=PRECISION)
        dfaded += tl.dot(dpairs, key, input_precision=PRECISION)
        dfaded += dm[:, None] * mass_at_start[None, :]
        # The rounded factors, as in the keys' part, so that what cancels between both does.
        of_decay += faded.to(tl.float32) * dfaded
        dreads = dfaded * load_rise(rise, s, length - lag, first_key, ahead, head, K, F, BF)
        if SOFTMAX:
            reads = load_reads(q, query, real, F, BF, SOFTMAX)
            dreads = reads * (dreads - tl.sum(reads * dreads, 1)[:, None])
        to = dq + query * F + f[None, :]
        tl.store(to, dreads.to(dq.dtype.element_ty), mask=real[:, None] & (f < F)[None, :])
    mask = writes[:, None] & (f < F)[None, :]
    at = offset * F + f[None, :]
    key = load_keys(folded, offset, writes, F, BF)
    values = load_values(v, offset, writes, u, V, OPERAND)
    tl.store(dlog + at, of_decay - key.to(tl.float32) * dkey, mask=mask)
    # The outgoing state's part, relative to half of the chunk's decay as the keys are.
    half = decay(total * 0.5, EXACT)
    inner = (f < wide)[:, None] & inside
    dstate = tl.load(dstates + (slot * F + f[:, None]) * V + u[None, :], mask=inner, other=0.0)
    dstate = operand(dstate * half[:, None], OPERAND)
    dvalues += tl.dot(key, dstate, input_precision=PRECISION)
    tl.store(state_dv + offset * V + u[None, :], dvalues, mask=writes[:, None] & inside)
    of_state = tl.dot(values, tl.trans(dstate), input_precision=PRECISION)
    of_state += (tl.load(dmasses + slot * F + f, mask=f < wide, other=0.0) * half)[None, :]
    tl.store(flow + at, of_state * key.to(tl.float32), mask=mask)
    dkey = (dkey + of_state) / tl.load(rise + at, mask=mask, other=1.0)
    if SOFTMAX:
        phi = features(k, stats, offset, f[None, :], mask, keys * K, F, SOFTMAX)
        dkey = phi * (dkey - tl.sum(phi * dkey, 1)[:, None])
    tl.store(dk + at, dkey, mask=mask)
