"""The backward kernels of Liger attention over chunks and keys; see `liger_mix` for the numbers of queries.

The gradient of the state at a chunk's end is in the chunk's slot, `[slots, K, F, V]`, and `[slots, K, F]` for the mass;
the layout equals that of the states in `liger_forward`.
"""

from __future__ import annotations

from linearize_kernels.liger_forward import strong
from linearize_kernels.liger_mix import load_head_dreads, load_row_dreads
from linearize_kernels.liger_tiles import (
    VARYING,
    decay,
    features,
    load_reads,
    log_gates,
    open_tile,
    per_row,
    tl,
    triton,
    weak,
    written_keys,
)


@triton.jit(do_not_specialize=VARYING)
def read_chunks(
    q,
    k,
    gate,
    gate_scale,
    gate_bias,
    divisor,
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
    FROM_KEY: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    TILED: tl.constexpr,
):
    """Compute the gradient of a chunk's incoming state from its queries, into the chunk's slot. TILED: only in chunks
    that `chunk_reads` leaves out."""
    chunk, row, head, start, length, count = open_tile(tiles, tl.program_id(0), starts, counts, K, COUNTED)
    stream = length - lag
    if chunk * CHUNK >= stream:
        return
    slot = (tl.load(slots + row).to(tl.int64) + chunk) * K + head
    if TILED:
        leave = not strong(totals, slot, chunk * CHUNK, stream, F, BF, EXACT)
        if leave:
            return
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    f = tl.arange(0, BF)[None, :]
    u = tl.program_id(2) * BV + tl.arange(0, BV)
    first_key = start + (row + 1) * past - ahead
    writes, offset = written_keys(i, stream, count - ahead, least, first_key, head, K)
    mask = writes[:, None] & (f < F)
    log_gate = log_gates(gate, k, gate_scale, gate_bias, divisor, offset, head, f, mask, F, FROM_KEY, PER_CHANNEL)
    fade = decay(tl.cumsum(log_gate, 0), EXACT)
    dstate, dmass = tl.zeros((BF, BV), tl.float32), tl.zeros((BF,), tl.float32)
    real = i < stream
    for member in range(H // K):
        of_head = head * (H // K) + member
        entry = tl.where(real, (start + i + lag) * H + of_head, 0)
        reads = load_reads(q, entry[:, None], real, F, BF, SOFTMAX)
        reads = tl.where(real[:, None], reads * fade, 0.0)
        dread = load_head_dreads(doutputs, mix_weight, rows, entry, of_head, u, real, entries, V, MIX, tl.float32)
        dstate += tl.dot(tl.trans(reads), dread, input_precision=PRECISION)
        dmass += tl.sum(reads * tl.load(rows + 4 * entries + entry, mask=real, other=0.0)[:, None], 0)
    f_column = tl.arange(0, BF)[:, None]
    tl.store(dstates + (slot * F + f_column) * V + u[None, :], dstate, mask=(f_column < F) & (u < V)[None, :])
    if tl.program_id(2) == 0:
        f_row = tl.arange(0, BF)
        tl.store(dmasses + slot * F + f_row, dmass, mask=f_row < F)


@triton.jit(do_not_specialize=VARYING)
def keys_of_states(
    k,
    v,
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
    dstates,
    dmasses,
    dk,
    dv,
    flow,
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
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTMAX: tl.constexpr,
    FROM_KEY: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    TILED: tl.constexpr,
):
    """Compute the gradients `dk` and `dv`, in float32, of a chunk's key features and values from its outgoing state;
    and `flow` = φ(k) dk, each key's part of the state's gradient.

    Some programs handle value channels, the others key channels. TILED: only in chunks that `chunk_pairs` leaves out.
    """
    chunk, row, head, start, length, count = open_tile(tiles, tl.program_id(0), starts, counts, K, COUNTED)
    stream = length - lag
    if chunk * CHUNK >= stream:
        return
    slot = (tl.load(slots + row).to(tl.int64) + chunk) * K + head
    if TILED:
        leave = not strong(totals, slot, chunk * CHUNK, stream, F, BF, EXACT)
        if leave:
            return
    first_key = start + (row + 1) * past - ahead
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    writes, offset = written_keys(i, stream, count - ahead, least, first_key, head, K)
    end = tl.minimum(stream, (chunk + 1) * CHUNK)
    follows, next_offset = written_keys(i + 1, end, count - ahead, least, first_key, head, K)
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    part = tl.program_id(2)
    if part < blocks:
        f = tl.arange(0, BF)[None, :]
        u = part * BLOCK + tl.arange(0, BLOCK)[None, :]
        key = features(k, stats, offset, f, writes[:, None] & (f < F), keys * K, F, SOFTMAX)
        follow = log_gates(
            gate,
            k,
            gate_scale,
            gate_bias,
            divisor,
            next_offset,
            head,
            f,
            follows[:, None] & (f < F),
            F,
            FROM_KEY,
            PER_CHANNEL,
        )
        key = key * decay(tl.cumsum(follow, 0, reverse=True), EXACT)
        f_column = tl.arange(0, BF)[:, None]
        dstate = tl.load(dstates + (slot * F + f_column) * V + u, mask=(f_column < F) & (u < V), other=0.0)
        dvalues = tl.dot(key, dstate, input_precision=PRECISION)
        tl.store(dv + offset * V + u, dvalues, mask=writes[:, None] & (u < V))
    else:
        g = (part - blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
        w = tl.arange(0, BV)
        values = tl.load(v + offset * V + w[None, :], mask=writes[:, None] & (w < V)[None, :], other=0.0)
        later = log_gates(
            gate,
            k,
            gate_scale,
            gate_bias,
            divisor,
            next_offset,
            head,
            g,
            follows[:, None] & (g < F),
            F,
            FROM_KEY,
            PER_CHANNEL,
        )
        turned = tl.load(dstates + (slot * F + g) * V + w[:, None], mask=(g < F) & (w < V)[:, None], other=0.0)
        dkey = tl.dot(values.to(tl.float32), turned, input_precision=PRECISION)
        dkey += tl.load(dmasses + slot * F + g, mask=g < F, other=0.0)
        dkey = dkey * decay(tl.cumsum(later, 0, reverse=True), EXACT)
        inside = writes[:, None] & (g < F)
        tl.store(dk + offset * F + g, dkey, mask=inside)
        tl.store(flow + offset * F + g, dkey * features(k, stats, offset, g, inside, keys * K, F, SOFTMAX), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def key_gradients(
    v,
    q,
    k,
    stats,
    gate,
    gate_scale,
    gate_bias,
    divisor,
    mix_weight,
    tiles,
    starts,
    counts,
    slots,
    totals,
    doutputs,
    rows,
    dk,
    state_dv,
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
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    LOGS: tl.constexpr,
    CHUNK: tl.constexpr,
    SUB: tl.constexpr,
    MIX: tl.constexpr,
    SOFTMAX: tl.constexpr,
    FROM_KEY: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    TILED: tl.constexpr,
):
    """Gradients of one sub-chunk's keys and values through the pairs within its chunk.

    `dk` and `state_dv` hold the gradients from states, in float32, and receive the sums; the first of the LOGS parts of
    `dlog` becomes the gradient of the running decay. TILED: only in chunks that `chunk_pairs` leaves out.
    """
    tile, row, head, start, length, count = open_tile(tiles, tl.program_id(0), starts, counts, K, COUNTED)
    stream, number = length - lag, count - ahead
    first_key = start + (row + 1) * past - ahead
    STEP: tl.constexpr = CHUNK if TILED else SUB
    first = tile * STEP
    last = tl.minimum(first + STEP, stream)
    if TILED:
        slot = (tl.load(slots + row).to(tl.int64) + tile) * K + head
        last = tl.where(strong(totals, slot, first, stream, F, BF, EXACT), last, first)
    for i in range(first, last, SUB):
        token = tl.arange(0, SUB)
        x = tl.arange(0, GROUP * SUB)
        turn = x % SUB
        f, u = tl.arange(0, BF)[None, :], tl.arange(0, BV)
        writes, offset = written_keys(i + token, stream, number, least, first_key, head, K)
        mask, there = writes[:, None] & (f < F), writes[:, None] & (u < V)[None, :]
        written = tl.load(v + offset * V + u[None, :], mask=there, other=0.0).to(tl.float32)
        key = features(k, stats, offset, f, mask, keys * K, F, SOFTMAX)
        dkey = tl.zeros((SUB, BF), tl.float32)
        dvalues = tl.load(state_dv + offset * V + u[None, :], mask=there, other=0.0)
        itself = tl.zeros((SUB, BF), tl.float32)
        own_gates = log_gates(gate, k, gate_scale, gate_bias, divisor, offset, head, f, mask, F, FROM_KEY, PER_CHANNEL)
        running = tl.cumsum(own_gates, 0)
        own_total = tl.sum(own_gates, 0)[None, :]
        factored = weak(own_total, EXACT)
        # One factor per query and one per key, both relative to half of the sub-chunk's decay.
        middle = own_total * 0.5

        # Gradients from the queries of the same sub-chunk, as in `read_recurrence`.
        for part in range(PARTS):
            t = i + lag + turn
            member = part * GROUP + x // SUB
            real = (t < length) & (member < H // K)
            of_head = head * (H // K) + member
            entry = tl.where(real, (start + t) * H + of_head, 0)
            reads = load_reads(q, entry[:, None], real, F, BF, SOFTMAX)
            reads = tl.where(real[:, None], reads, 0.0)
            dread = load_row_dreads(doutputs, mix_weight, rows, entry, of_head, u, real, entries, V, MIX)
            dm = tl.load(rows + 4 * entries + entry, mask=real, other=0.0)
            pairs = tl.dot(dread, tl.trans(written), input_precision=PRECISION) + dm[:, None]
            scores = tl.zeros((GROUP * SUB, SUB), tl.float32)
            if factored:
                fall = decay(middle - running, EXACT)
                fading = reads * per_row(decay(running - middle, EXACT), GROUP, SUB, BF)
                scores = tl.dot(fading, tl.trans(key * fall), input_precision=PRECISION)
                scores = tl.where(turn[:, None] >= token[None, :], scores, 0.0)
                strict = tl.where(turn[:, None] > token[None, :], pairs, 0.0)
                dkey += fall * tl.dot(tl.trans(strict), fading, input_precision=PRECISION)
            else:
                fading = tl.zeros((GROUP * SUB, BF), tl.float32)
                gates = tl.zeros((1, BF), tl.float32)
                last = tl.minimum(stream - i, SUB)
                for back in range(last):
                    s = last - 1 - back
                    writes_s = (i + s < stream) & (number + i + s >= least)
                    offset_s = tl.where(writes_s, first_key + i + s, 0) * K + head
                    mask_s = f < tl.where(writes_s, F, 0)
                    key_s = features(k, stats, offset_s, f, mask_s, keys * K, F, SOFTMAX)
                    fading = tl.where((turn == s)[:, None], reads, fading * decay(gates, EXACT))
                    scores = tl.where((token == s)[None, :], tl.sum(fading * key_s, 1)[:, None], scores)
                    pair = tl.sum(tl.where((token == s)[None, :] & (turn > s)[:, None], pairs, 0.0), 1)
                    of_key = tl.sum(fading * pair[:, None], 0)
                    dkey += tl.where((token == s)[:, None], of_key[None, :], 0.0)
                    gates = log_gates(
                        gate, k, gate_scale, gate_bias, divisor, offset_s, head, f, mask_s, F, FROM_KEY, PER_CHANNEL
                    )
            dvalues += tl.dot(tl.trans(scores), dread, input_precision=PRECISION)
            own_pair = tl.sum(tl.where(token[None, :] == turn[:, None], pairs, 0.0), 1)
            itself += tl.sum(tl.reshape(reads * own_pair[:, None], (GROUP, SUB, BF)), 0)

        # Gradients from later sub-chunks of the chunk, nearest first: the keys decay to the start of each.
        end = tl.minimum(i + SUB, stream)
        follows, next_offset = written_keys(i + token + 1, end, number, least, first_key, head, K)
        next_mask = follows[:, None] & (f < F)
        follow = log_gates(
            gate, k, gate_scale, gate_bias, divisor, next_offset, head, f, next_mask, F, FROM_KEY, PER_CHANNEL
        )
        fade = decay(tl.cumsum(follow, 0, reverse=True), EXACT)
        end = tl.minimum((i // CHUNK + 1) * CHUNK, stream)
        for later in range(i + SUB, end, SUB):
            writes_l, offset_l = written_keys(later + token, stream, number, least, first_key, head, K)
            mask_l = writes_l[:, None] & (f < F)
            own = log_gates(
                gate, k, gate_scale, gate_bias, divisor, offset_l, head, f, mask_l, F, FROM_KEY, PER_CHANNEL
            )
            reach = decay(per_row(tl.cumsum(own, 0), GROUP, SUB, BF), EXACT)
            for part in range(PARTS):
                member_l = part * GROUP + x // SUB
                real_l = (later + turn < stream) & (member_l < H // K)
                of_head_l = head * (H // K) + member_l
                entry_l = tl.where(real_l, (start + later + lag + turn) * H + of_head_l, 0)
                reads_l = load_reads(q, entry_l[:, None], real_l, F, BF, SOFTMAX)
                reads_l = tl.where(real_l[:, None], reads_l * reach, 0.0)
                dread_l = load_row_dreads(doutputs, mix_weight, rows, entry_l, of_head_l, u, real_l, entries, V, MIX)
                dm_l = tl.load(rows + 4 * entries + entry_l, mask=real_l, other=0.0)
                scores_l = tl.dot(reads_l, tl.trans(key * fade), input_precision=PRECISION)
                dvalues += tl.dot(tl.trans(scores_l), dread_l, input_precision=PRECISION)
                pairs_l = tl.dot(dread_l, tl.trans(written), input_precision=PRECISION) + dm_l[:, None]
                dkey += fade * tl.dot(tl.trans(pairs_l), reads_l, input_precision=PRECISION)
            fade = fade * decay(tl.sum(own, 0)[None, :], EXACT)

        of_decay = tl.load(dlog + offset * F + f, mask=mask, other=0.0)
        for part in range(1, LOGS):
            of_decay += tl.load(dlog + (part * keys * K + offset) * F + f, mask=mask, other=0.0)
        tl.store(dlog + offset * F + f, of_decay - key * dkey, mask=mask)
        dkey += itself + tl.load(dk + offset * F + f, mask=mask, other=0.0)
        if SOFTMAX:
            dkey = key * (dkey - tl.sum(key * dkey, 1)[:, None])
        tl.store(dk + offset * F + f, dkey, mask=mask)
        tl.store(state_dv + offset * V + u[None, :], dvalues, mask=there)


@triton.jit(do_not_specialize=VARYING)
def gate_gradients(
    k,
    gate_scale,
    gate_bias,
    divisor,
    tiles,
    starts,
    counts,
    slots,
    states,
    masses,
    totals,
    dstates,
    dmasses,
    dlog,
    flow,
    dk,
    dgate,
    dscale,
    dbias,
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
    FROM_KEY: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    COUNTED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Convert gradients of running decays to gradients of log-gates, `dgate`, or of their inputs: adds to `dk`, and
    writes each chunk's part of `dscale` and `dbias`, `[slots, K, F]`."""
    chunk, row, head, start, length, count = open_tile(tiles, tl.program_id(0), starts, counts, K, COUNTED)
    stream = length - lag
    if chunk * CHUNK >= stream:
        return
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    f = tl.arange(0, BF)[None, :]
    first_key = start + (row + 1) * past - ahead
    writes, offset = written_keys(i, stream, count - ahead, least, first_key, head, K)
    mask = writes[:, None] & (f < F)
    slot = (tl.load(slots + row).to(tl.int64) + chunk) * K + head
    # A log-gate scales all products that span it: pairs of an earlier key and a query at or after it, and, in the
    # outgoing state, the incoming state and the earlier keys. The outgoing part is summed from these products directly.
    # Subtracting the rest from the total would cancel large numbers behind a strong gate and leave rounding errors.
    f_row = tl.arange(0, BF)
    mass = tl.load(masses + slot * F + f_row, mask=f_row < F, other=0.0)
    enters = mass * tl.load(dmasses + slot * F + f_row, mask=f_row < F, other=0.0)
    for block in range(0, V, BV):
        u = block + tl.arange(0, BV)[None, :]
        inside = (f_row < F)[:, None] & (u < V)
        at = (slot * F + f_row[:, None]) * V + u
        state = tl.load(states + at, mask=inside, other=0.0)
        enters += tl.sum(state * tl.load(dstates + at, mask=inside, other=0.0), 1)
    enters = enters * decay(tl.load(totals + slot * F + f_row, mask=f_row < F, other=0.0), EXACT)
    exists, previous = written_keys(i - 1, stream, count - ahead, least, first_key, head, K)
    exists = exists & (i > chunk * CHUNK)
    through = tl.load(flow + previous * F + f, mask=exists[:, None] & (f < F), other=0.0)
    of_decay = tl.load(dlog + offset * F + f, mask=mask, other=0.0)
    gradient = tl.cumsum(of_decay, 0, reverse=True) + tl.cumsum(through, 0) + enters[None, :]
    gradient = tl.where(mask, gradient, 0.0)
    if FROM_KEY:
        raw = tl.load(k + offset * F + f, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(gate_scale + head * F + f, mask=f < F, other=0.0).to(tl.float32)
        bias = tl.load(gate_bias + head * F + f, mask=f < F, other=0.0).to(tl.float32)
        gradient = gradient / (1.0 + tl.exp(scale * raw + bias)) / divisor
        before = tl.load(dk + offset * F + f, mask=mask, other=0.0)
        tl.store(dk + offset * F + f, before + gradient * scale, mask=mask)
        tl.store(dscale + slot * F + f_row, tl.sum(gradient * raw, 0), mask=f_row < F)
        tl.store(dbias + slot * F + f_row, tl.sum(gradient, 0), mask=f_row < F)
    elif PER_CHANNEL:
        tl.store(dgate + offset * F + f, gradient.to(dgate.dtype.element_ty), mask=mask)
    else:
        total = tl.sum(gradient, 1)[:, None]
        tl.store(dgate + offset, total.to(dgate.dtype.element_ty), mask=writes[:, None])
