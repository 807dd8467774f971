"""The backward kernels of Liger attention over chunks of weak decays; see `liger_chunks` for the tiles, and
`liger_mix` for the numbers of queries.

`chunk_outputs` computes query features times their factors anew, as `faded` `[N, H, F]`. With p_ts = faded_t · folded_s
and its gradient dp_ts = dread_t · v_s + dm_t, over s <= t:

    chunk_reads     gradients of the incoming state      Σ_t fadedᵀ dread
    chunk_values    gradients of values                  Σ_t p_ts dread_t, and of the outgoing state
    chunk_keys      gradients of folded keys             Σ_t dp_ts faded_t, and of the outgoing state
    chunk_queries   gradients of faded queries           Σ_s dp_ts folded_s, and of the incoming state
"""

from __future__ import annotations

from linearize_kernels.liger_chunks import load_keys, load_mass, load_rise, load_state, load_values, open_chunk
from linearize_kernels.liger_mix import load_head_dreads
from linearize_kernels.liger_tiles import (
    VARYING,
    decay,
    features,
    load_reads,
    operand,
    tl,
    triton,
    weak,
    written_keys,
)


@triton.jit
def load_faded(faded, entry, real, F: tl.constexpr, BF: tl.constexpr):
    """Query features times their factors."""
    f = tl.arange(0, BF)[None, :]
    return tl.load(faded + entry[:, None] * F + f, mask=real[:, None] & (f < F), other=0.0)


@triton.jit
def load_masses(rows, entry, real, entries):
    """The gradients of the masses of queries."""
    return tl.load(rows + 4 * entries + entry, mask=real, other=0.0)


@triton.jit(do_not_specialize=VARYING)
def chunk_reads(
    faded,
    mix_weight,
    tiles,
    starts,
    counts,
    slots,
    totals,
    doutputs,
    rows,
    dstates,
    dmasses,
    entries,
    lag,
    H: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    MIX: tl.constexpr,
    COUNTED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Compute the gradient of a chunk's incoming state from the chunk's queries, into the chunk's slot."""
    G: tl.constexpr = H // K
    i, _row, head, start, length, _count, slot, total, _wide = open_chunk(
        tiles, tl.program_id(0), 0, starts, counts, slots, totals, lag, K, F, BF, CHUNK, COUNTED
    )
    if i + lag >= length:
        return
    if not weak(total, EXACT):
        return
    f, u = tl.arange(0, BF), tl.program_id(2) * BV + tl.arange(0, BV)
    t = i + lag + tl.arange(0, CHUNK)
    real = t < length
    dstate, dmass = tl.zeros((BF, BV), tl.float32), tl.zeros((BF,), tl.float32)
    for member in tl.range(G, disable_licm=True):
        entry = tl.where(real, (start + t) * H + head * G + member, 0)
        dread = load_head_dreads(
            doutputs, mix_weight, rows, entry, head * G + member, u, real, entries, V, MIX, OPERAND
        )
        fading = load_faded(faded, entry, real, F, BF)
        dmass += tl.sum(fading.to(tl.float32) * load_masses(rows, entry, real, entries)[:, None], 0)
        dstate += tl.dot(tl.trans(operand(fading, OPERAND)), dread, input_precision=PRECISION)
    half = decay(total * 0.5, EXACT)
    to = dstates + (slot * F + f[:, None]) * V + u[None, :]
    tl.store(to, dstate * half[:, None], mask=(f < F)[:, None] & (u < V)[None, :])
    if tl.program_id(2) == 0:
        tl.store(dmasses + slot * F + f, dmass * half, mask=f < F)


@triton.jit(do_not_specialize=VARYING)
def chunk_values(
    faded,
    mix_weight,
    tiles,
    starts,
    counts,
    slots,
    totals,
    folded,
    doutputs,
    rows,
    dstates,
    state_dv,
    entries,
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
    COUNTED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Gradients of a block of a chunk's values, `state_dv` in float32, through the pairs and the outgoing state."""
    G: tl.constexpr = H // K
    i, row, head, start, length, count, slot, total, wide = open_chunk(
        tiles, tl.program_id(0), 0, starts, counts, slots, totals, lag, K, F, BF, CHUNK, COUNTED
    )
    if i + lag >= length:
        return
    if not weak(total, EXACT):
        return
    f, u = tl.arange(0, BF)[:, None], tl.program_id(2) * BV + tl.arange(0, BV)
    s = i + tl.arange(0, CHUNK)
    first_key = start + (row + 1) * past - ahead
    writes, offset = written_keys(s, length - lag, count - ahead, least, first_key, head, K)
    real = s + lag < length
    # The outgoing state's part, relative to half of the chunk's decay as the keys are.
    inside = (f < wide) & (u < V)[None, :]
    dstate = tl.load(dstates + (slot * F + f) * V + u[None, :], mask=inside, other=0.0)
    dstate = operand(dstate * decay(total * 0.5, EXACT)[:, None], OPERAND)
    dvalues = tl.dot(load_keys(folded, offset, writes, F, BF), dstate, input_precision=PRECISION)
    for member in tl.range(G, disable_licm=True):
        entry = tl.where(real, (start + s + lag) * H + head * G + member, 0)
        fading = operand(load_faded(faded, entry, real, F, BF), OPERAND)
        key = load_keys(folded, offset, writes, F, BF)
        # Keys are the rows of the products, so none has to be transposed.
        pairs = tl.dot(key, tl.trans(fading), input_precision=PRECISION)
        pairs = operand(tl.where(s[:, None] <= s[None, :], pairs, 0.0), OPERAND)
        dread = load_head_dreads(
            doutputs, mix_weight, rows, entry, head * G + member, u, real, entries, V, MIX, OPERAND
        )
        dvalues += tl.dot(pairs, dread, input_precision=PRECISION)
    tl.store(state_dv + offset * V + u[None, :], dvalues, mask=writes[:, None] & (u < V)[None, :])


@triton.jit(do_not_specialize=VARYING)
def chunk_keys(
    v,
    k,
    faded,
    stats,
    mix_weight,
    tiles,
    starts,
    counts,
    slots,
    totals,
    rise,
    folded,
    doutputs,
    rows,
    dstates,
    dmasses,
    dk,
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
    """Gradients of a chunk's keys, `dk` in float32, through the pairs and the outgoing state.

    `dlog` receives that of the running decay through the pairs, less the queries' part; and `flow` φ(k) times the
    outgoing state's part of `dk`.
    """
    G: tl.constexpr = H // K
    i, row, head, start, length, count, slot, total, wide = open_chunk(
        tiles, tl.program_id(0), 0, starts, counts, slots, totals, lag, K, F, BF, CHUNK, COUNTED
    )
    if i + lag >= length:
        return
    if not weak(total, EXACT):
        return
    f, u = tl.arange(0, BF), tl.arange(0, BV)
    s = i + tl.arange(0, CHUNK)
    first_key = start + (row + 1) * past - ahead
    writes, offset = written_keys(s, length - lag, count - ahead, least, first_key, head, K)
    real = s + lag < length
    dkey = tl.zeros((CHUNK, BF), tl.float32)
    for member in tl.range(G, disable_licm=True):
        entry = tl.where(real, (start + s + lag) * H + head * G + member, 0)
        dpairs = tl.zeros((CHUNK, CHUNK), tl.float32)
        for block in tl.range(0, V, BV, disable_licm=True):
            values = load_values(v, offset, writes, block + u, V, OPERAND)
            dread = load_head_dreads(
                doutputs, mix_weight, rows, entry, head * G + member, block + u, real, entries, V, MIX, OPERAND
            )
            dpairs += tl.dot(values, tl.trans(dread), input_precision=PRECISION)
        dpairs += load_masses(rows, entry, real, entries)[None, :]
        dpairs = operand(tl.where(s[:, None] <= s[None, :], dpairs, 0.0), OPERAND)
        fading = operand(load_faded(faded, entry, real, F, BF), OPERAND)
        dkey += tl.dot(dpairs, fading, input_precision=PRECISION)
    mask = writes[:, None] & (f < F)[None, :]
    at = offset * F + f[None, :]
    key = load_keys(folded, offset, writes, F, BF).to(tl.float32)
    tl.store(dlog + at, -key * dkey, mask=mask)
    # The outgoing state's part, relative to half of the chunk's decay as the keys are.
    half = decay(total * 0.5, EXACT)
    of_state = tl.zeros((CHUNK, BF), tl.float32)
    for block in tl.range(0, V, BV, disable_licm=True):
        inner = (f < wide)[:, None] & (block + u < V)[None, :]
        dstate = tl.load(dstates + (slot * F + f[:, None]) * V + block + u[None, :], mask=inner, other=0.0)
        values = load_values(v, offset, writes, block + u, V, OPERAND)
        dstate = operand(dstate * half[:, None], OPERAND)
        of_state += tl.dot(values, tl.trans(dstate), input_precision=PRECISION)
    of_state += (tl.load(dmasses + slot * F + f, mask=f < wide, other=0.0) * half)[None, :]
    tl.store(flow + at, of_state * key, mask=mask)
    dkey = (dkey + of_state) / tl.load(rise + at, mask=mask, other=1.0)
    if SOFTMAX:
        phi = features(k, stats, offset, f[None, :], mask, keys * K, F, SOFTMAX)
        dkey = phi * (dkey - tl.sum(phi * dkey, 1)[:, None])
    tl.store(dk + at, dkey, mask=mask)


@triton.jit(do_not_specialize=VARYING)
def chunk_queries(
    v,
    q,
    faded,
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
    doutputs,
    rows,
    dq,
    dlog,
    entries,
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
    """Gradients of a chunk's queries without positions, through its state and the pairs within it; and the queries'
    part of the running decay's gradient, added to `dlog`. `dq` may be the memory of `faded`."""
    G: tl.constexpr = H // K
    n, before = tl.program_id(0), (lag + CHUNK - 1) // CHUNK
    i, row, head, start, length, count, slot, total, wide = open_chunk(
        tiles, n, before, starts, counts, slots, totals, lag, K, F, BF, CHUNK, COUNTED
    )
    if i + lag >= length:
        return
    if not weak(total, EXACT):
        return
    f, u = tl.arange(0, BF), tl.arange(0, BV)
    s = i + tl.arange(0, CHUNK)
    stream, first_key = length - lag, start + (row + 1) * past
    writes, offset = written_keys(s, stream, count - ahead, least, first_key - ahead, head, K)
    t = s + lag
    real = (t >= 0) & (t < length)
    of_decay = tl.zeros((CHUNK, BF), tl.float32)
    for member in tl.range(G, disable_licm=True):
        entry = tl.where(real, (start + t) * H + head * G + member, 0)
        dm = load_masses(rows, entry, real, entries)
        dfaded = dm[:, None] * load_mass(masses, slot, total, wide, F, BF, EXACT)[None, :]
        dpairs = tl.zeros((CHUNK, CHUNK), tl.float32) + dm[:, None]
        for block in tl.range(0, V, BV, disable_licm=True):
            dread = load_head_dreads(
                doutputs, mix_weight, rows, entry, head * G + member, block + u, real, entries, V, MIX, OPERAND
            )
            values = load_values(v, offset, writes, block + u, V, OPERAND)
            dpairs += tl.dot(dread, tl.trans(values), input_precision=PRECISION)
            state = load_state(entering, slot, wide, block + u, F, V, BF)
            dfaded += tl.dot(dread, tl.trans(state), input_precision=PRECISION)
        dpairs = operand(tl.where(s[:, None] >= s[None, :], dpairs, 0.0), OPERAND)
        dfaded += tl.dot(dpairs, load_keys(folded, offset, writes, F, BF), input_precision=PRECISION)
        # The rounded factors, as in the keys' part, so that what cancels between both does.
        of_decay += load_faded(faded, entry, real, F, BF).to(tl.float32) * dfaded
        dreads = dfaded * load_rise(rise, s, stream, first_key, ahead, head, K, F, BF)
        if SOFTMAX:
            reads = load_reads(q, entry[:, None], real, F, BF, SOFTMAX)
            dreads = reads * (dreads - tl.sum(reads * dreads, 1)[:, None])
        to = dq + entry[:, None] * F + f[None, :]
        tl.debug_barrier()  # `faded`, whose memory `dq` may be, has been read by all threads
        tl.store(to, dreads.to(dq.dtype.element_ty), mask=real[:, None] & (f < F)[None, :])
    at = dlog + offset * F + f[None, :]
    mask = writes[:, None] & (f < F)[None, :]
    tl.store(at, of_decay + tl.load(at, mask=mask, other=0.0), mask=mask)
