"""The forward kernels of Liger attention: each chunk's contribution to the state, the states between chunks, and the
outputs.

A row's stream is the sequence of tokens that its recurrence reads: with `covers: all` the row's own tokens; with
`evicted` first the W keys before the row (if it continues a cache), then its own. Query t reads after token i = t - lag
of the stream; this token's index among the row's own keys is i - ahead. Chunks are cut from the stream, so the keys of
a query's chunk are those that have just left its window.

Arrays between kernels have, for each row, one slot per chunk for the state at its start, and one slot for the final
state: states `[slots, K, F, V]`, masses `[slots, K, F]`, and totals `[slots, K, F]`, the logarithms of the chunks'
decays.
"""

from __future__ import annotations

from linearize_kernels.liger_mix import inverse_masses, row_weights, write_mixed
from linearize_kernels.liger_tiles import (
    VARYING,
    capped,
    decay,
    features,
    halves,
    load_reads,
    log_gates,
    open_tile,
    operand,
    per_row,
    tl,
    triton,
    weak,
    written_keys,
)


@triton.jit(do_not_specialize=VARYING)
def key_statistics(k, stats, keys, F: tl.constexpr, BF: tl.constexpr, ROWS: tl.constexpr):
    """Maximum and inverse sum of exponentials of each key `[keys, F]`, for the softmax over its channels."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tl.arange(0, BF)
    inside = (row < keys)[:, None] & (f < F)[None, :]
    x = tl.load(k + row[:, None] * F + f[None, :], mask=inside, other=-float("inf")).to(tl.float32)
    x = tl.where((row < keys)[:, None], x, 0.0)
    largest = tl.max(x, 1)
    total = tl.sum(tl.exp(x - largest[:, None]), 1)
    tl.store(stats + row, largest, mask=row < keys)
    tl.store(stats + keys + row, 1.0 / total, mask=row < keys)


@triton.jit(do_not_specialize=VARYING)
def write_chunks(
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
    states,
    masses,
    totals,
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
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Compute Σ_s exp(decay from s to the chunk's end) φ(k_s)ᵀ [v_s, 1] and the chunk's decay, into the chunk's
    slot."""
    chunk, row, head, start, length, count = open_tile(tiles, tl.program_id(0), starts, counts, K, COUNTED)
    stream = length - lag
    if chunk * CHUNK >= stream:
        return
    first_key, number = start + (row + 1) * past - ahead, count - ahead
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    f = tl.arange(0, BF)[None, :]
    u = tl.program_id(2) * BV + tl.arange(0, BV)[None, :]

    writes, offset = written_keys(i, stream, number, least, first_key, head, K)
    mask = writes[:, None] & (f < F)
    written = features(k, stats, offset, f, mask, keys * K, F, SOFTMAX)
    log_gate = log_gates(gate, k, gate_scale, gate_bias, divisor, offset, head, f, mask, F, FROM_KEY, PER_CHANNEL)
    # The decay from a token to the chunk's end is the sum over the tokens after it.
    end = tl.minimum(stream, (chunk + 1) * CHUNK)
    follows, next_offset = written_keys(i + 1, end, number, least, first_key, head, K)
    next_mask = follows[:, None] & (f < F)
    next_gate = log_gates(
        gate, k, gate_scale, gate_bias, divisor, next_offset, head, f, next_mask, F, FROM_KEY, PER_CHANNEL
    )
    written = written * decay(tl.cumsum(next_gate, 0, reverse=True), EXACT)
    values = tl.load(v + offset * V + u, mask=writes[:, None] & (u < V), other=0.0)
    values = operand(values, OPERAND)

    slot = (tl.load(slots + row).to(tl.int64) + chunk) * K + head
    f_column = tl.arange(0, BF)[:, None]
    # The values have the operand's precision, and two operands have almost all digits of a key.
    upper = operand(written, OPERAND)
    lower = operand(written - upper.to(tl.float32), OPERAND)
    product = tl.dot(tl.trans(upper), values, input_precision=PRECISION)
    if tl.float32 != OPERAND:
        product += tl.dot(tl.trans(lower), values, input_precision=PRECISION)
    tl.store(states + (slot * F + f_column) * V + u, product, mask=(f_column < F) & (u < V))
    if tl.program_id(2) == 0:
        f_row = tl.arange(0, BF)
        tl.store(masses + slot * F + f_row, tl.sum(written, 0), mask=f_row < F)
        tl.store(totals + slot * F + f_row, tl.sum(log_gate, 0), mask=f_row < F)


@triton.jit
def carry_columns(
    states,
    totals,
    initial,
    final,
    starts,
    slots,
    lag,
    part,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    FROM_STATE: tl.constexpr,
    BACKWARD: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Carry `states` `[slots, K, F, V]`, the columns from COLUMN on of `initial` and `final`, `[R, K, F, COLUMNS]`."""
    row, head = tl.program_id(0) // K, tl.program_id(0) % K
    length = tl.load(starts + row + 1) - tl.load(starts + row)
    chunks = tl.maximum((length - lag + CHUNK - 1) // CHUNK, 0)
    entry = part * BLOCK + tl.arange(0, BLOCK)
    inside = entry < F * V
    f = entry // V
    edge = ((row * K + head).to(tl.int64) * F + f) * COLUMNS + COLUMN + entry % V
    if FROM_STATE:
        state = tl.load(initial + edge, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BLOCK,), tl.float32)
    slot = tl.load(slots + row).to(tl.int64) * K + head
    STEP: tl.constexpr = -K if BACKWARD else K
    if BACKWARD:
        slot += (chunks - 1) * K
    # Load four chunks at once, so only the arithmetic depends on the previous chunk.
    for n in range(0, chunks, 4):
        at = slot + n * STEP
        one = entry < tl.where(n + 1 < chunks, F * V, 0)
        two = entry < tl.where(n + 2 < chunks, F * V, 0)
        three = entry < tl.where(n + 3 < chunks, F * V, 0)
        w0 = tl.load(states + at * F * V + entry, mask=inside, other=0.0)
        w1 = tl.load(states + (at + STEP) * F * V + entry, mask=one, other=0.0)
        w2 = tl.load(states + (at + 2 * STEP) * F * V + entry, mask=two, other=0.0)
        w3 = tl.load(states + (at + 3 * STEP) * F * V + entry, mask=three, other=0.0)
        g0 = tl.load(totals + at * F + f, mask=inside, other=0.0)
        g1 = tl.load(totals + (at + STEP) * F + f, mask=one, other=0.0)
        g2 = tl.load(totals + (at + 2 * STEP) * F + f, mask=two, other=0.0)
        g3 = tl.load(totals + (at + 3 * STEP) * F + f, mask=three, other=0.0)
        tl.store(states + at * F * V + entry, state, mask=inside)
        state = state * decay(g0, EXACT) + w0
        tl.store(states + (at + STEP) * F * V + entry, state, mask=one)
        state = state * decay(g1, EXACT) + w1
        tl.store(states + (at + 2 * STEP) * F * V + entry, state, mask=two)
        state = state * decay(g2, EXACT) + w2
        tl.store(states + (at + 3 * STEP) * F * V + entry, state, mask=three)
        state = state * decay(g3, EXACT) + w3
    if not BACKWARD:
        tl.store(states + (slot + chunks * K) * F * V + entry, state, mask=inside)
    tl.store(final + edge, state, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def carry_states(
    states,
    masses,
    totals,
    initial,
    final,
    starts,
    slots,
    lag,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    FROM_STATE: tl.constexpr,
    BACKWARD: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Replace, in place, each chunk's contribution by the state at its start: S_{n+1} = exp(total_n) S_n + written_n.
    BACKWARD: the gradient of each chunk's incoming state by that of its outgoing state, from the last chunk on.

    Some programs handle states, the others masses; `initial` and `final` `[R, K, F, V + 1]` have both.
    """
    part = tl.program_id(1)
    blocks: tl.constexpr = (F * V + BLOCK - 1) // BLOCK
    if part < blocks:
        carry_columns(
            *(states, totals, initial, final, starts, slots, lag, part, K, F, V, 0, V + 1),
            *(CHUNK, BLOCK, FROM_STATE, BACKWARD, EXACT),
        )
    else:
        carry_columns(
            *(masses, totals, initial, final, starts, slots, lag, part - blocks, K, F, 1, V, V + 1),
            *(CHUNK, BLOCK, FROM_STATE, BACKWARD, EXACT),
        )


@triton.jit
def columns_seen(
    column_exists,
    t,
    count,
    row,
    window,
    BM: tl.constexpr,
    COLUMNS: tl.constexpr,
    SINKS: tl.constexpr,
    EXISTS: tl.constexpr,
):
    """`[X, BM]`: True for the columns that the queries at indices `t` of their row read."""
    m = tl.arange(0, BM)
    seen = (m < SINKS)[None, :] & (m[None, :] <= (count + t - window)[:, None])
    if EXISTS:
        others = tl.load(
            column_exists + row * (COLUMNS - SINKS) + m - SINKS, mask=(m >= SINKS) & (m < COLUMNS), other=0
        )
        seen = seen | (others != 0)[None, :]
    else:
        seen = seen | ((m >= SINKS) & (m < COLUMNS))[None, :]
    return seen


@triton.jit
def read_window(
    q,
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
    K: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SINKS: tl.constexpr,
    EXISTS: tl.constexpr,
    CAPPED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax of query rows `q` `[X, BD]`, at indices `t` `[X]` of their row, over columns and the keys low .. high.

    Returns the outputs `[X, BV]` of value channels `u`, and the log of the denominator `[X]`.
    """
    d = tl.arange(0, BD)
    most = tl.full(t.shape, -1.0e30, tl.float32)
    total = tl.zeros(t.shape, tl.float32)
    outputs = tl.zeros((q.shape[0], BV), tl.float32)
    if COLUMNS > 0:
        m = tl.arange(0, BM)
        column = ((row * COLUMNS + m).to(tl.int64) * K + head)[:, None]
        exact_k = tl.load(column_k + column * D + d[None, :], mask=(m < COLUMNS)[:, None] & (d < D)[None, :], other=0.0)
        exact_v = tl.load(column_v + column * V + u[None, :], mask=(m < COLUMNS)[:, None] & (u < V)[None, :], other=0.0)
        exact = tl.dot(q.to(OPERAND), tl.trans(exact_k.to(OPERAND)), input_precision=PRECISION) * scale
        exact = capped(exact, softcap, CAPPED)
        visible = columns_seen(column_exists, t, count, row, window, BM, COLUMNS, SINKS, EXISTS)
        exact = tl.where(visible, exact, -float("inf"))
        most = tl.maximum(most, tl.max(exact, 1))
        chances = tl.exp(exact - most[:, None])
        total = tl.sum(chances, 1)
        outputs = tl.dot(chances.to(OPERAND), exact_v.to(OPERAND), input_precision=PRECISION)
    for block in tl.range(low, high, KEYS, disable_licm=True):
        s = block + tl.arange(0, KEYS)
        there = s < high
        at = (tl.where(there, first_key + s, 0) * K + head)[:, None]
        keys = tl.load(k_rotated + at * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        values = tl.load(v + at * V + u[None, :], mask=there[:, None] & (u < V)[None, :], other=0.0)
        scores = tl.dot(q.to(OPERAND), tl.trans(keys.to(OPERAND)), input_precision=PRECISION) * scale
        scores = capped(scores, softcap, CAPPED)
        seen = there[None, :] & (s[None, :] <= t[:, None]) & (s[None, :] > t[:, None] - window)
        scores = tl.where(seen, scores, -float("inf"))
        before = most
        most = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.exp(before - most)
        weights = tl.exp(scores - most[:, None])
        total = total * shrink + tl.sum(weights, 1)
        outputs = outputs * shrink[:, None]
        outputs += tl.dot(weights.to(OPERAND), values.to(OPERAND), input_precision=PRECISION)
    total = tl.where(total > 0.0, total, 1.0)
    return outputs * (1.0 / total)[:, None], most + tl.log(total)


@triton.jit
def read_recurrence(
    reads,
    k,
    v,
    stats,
    gate,
    gate_scale,
    gate_bias,
    divisor,
    states,
    masses,
    slot,
    i,
    stream,
    number,
    least,
    first_key,
    head,
    u,
    keys,
    K: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    SUB: tl.constexpr,
    SOFTMAX: tl.constexpr,
    FROM_KEY: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Read the state after each token of a sub-chunk with its query features `reads` `[GROUP * SUB, BF]`. Returns
    outputs `[GROUP * SUB, BV]` of value channels `u`, and mass `[GROUP * SUB]`. The sub-chunk's first token is token
    `i` of the stream.

    Place 0 of the stream is key `first_key`, and token `number` of its row; `slot` is the chunk's row in arrays
    `[slots * K, ...]`.
    """
    f = tl.arange(0, BF)[None, :]
    token = tl.arange(0, SUB)
    turn = tl.arange(0, GROUP * SUB) % SUB  # index of a row's query within the sub-chunk
    writes, offset = written_keys(i + token, stream, number, least, first_key, head, K)
    mask = writes[:, None] & (f < F)
    values = tl.load(v + offset * V + u[None, :], mask=writes[:, None] & (u < V)[None, :], other=0.0).to(tl.float32)
    own = log_gates(gate, k, gate_scale, gate_bias, divisor, offset, head, f, mask, F, FROM_KEY, PER_CHANNEL)
    running = tl.cumsum(own, 0)
    total = tl.sum(own, 0)[None, :]
    scores = tl.zeros((GROUP * SUB, SUB), tl.float32)
    if weak(total, EXACT):
        # One factor per query and one per key, both relative to half of the sub-chunk's decay.
        middle = total * 0.5
        key = features(k, stats, offset, f, mask, keys * K, F, SOFTMAX) * decay(middle - running, EXACT)
        fading = reads * per_row(decay(running - middle, EXACT), GROUP, SUB, BF)
        scores = tl.dot(fading, tl.trans(key), input_precision=PRECISION)
        scores = tl.where(turn[:, None] >= token[None, :], scores, 0.0)
    else:
        # Key by key, last first: each query enters `fading` at its own token, then decays once per token.
        fading = tl.zeros((GROUP * SUB, BF), tl.float32)
        gates = tl.zeros((1, BF), tl.float32)
        last = tl.minimum(stream - i, SUB)
        for back in range(last):
            s = last - 1 - back
            place_s = i + s
            writes_s = (place_s < stream) & (number + place_s >= least)
            offset_s = tl.where(writes_s, first_key + place_s, 0) * K + head
            mask_s = f < tl.where(writes_s, F, 0)
            key_s = features(k, stats, offset_s, f, mask_s, keys * K, F, SOFTMAX)
            fading = tl.where((turn == s)[:, None], reads, fading * decay(gates, EXACT))
            score = tl.sum(fading * key_s, 1)
            scores = tl.where((token == s)[None, :], score[:, None], scores)
            gates = log_gates(
                gate, k, gate_scale, gate_bias, divisor, offset_s, head, f, mask_s, F, FROM_KEY, PER_CHANNEL
            )
    outputs = tl.dot(scores, values, input_precision=PRECISION)
    mass = tl.sum(scores, 1)

    # Earlier sub-chunks, nearest first: queries decay back to the start of the sub-chunk after it, keys forward to that
    # border.
    fading = reads * per_row(decay(running, EXACT), GROUP, SUB, BF)
    before = (i % CHUNK) // SUB
    for back in range(before):
        place = i - (back + 1) * SUB + token
        writes, offset = written_keys(place, stream, number, least, first_key, head, K)
        mask = writes[:, None] & (f < F)
        next_writes, next_offset = written_keys(place + 1, i - back * SUB, number, least, first_key, head, K)
        next_mask = next_writes[:, None] & (f < F)
        key = features(k, stats, offset, f, mask, keys * K, F, SOFTMAX)
        follow = log_gates(
            gate, k, gate_scale, gate_bias, divisor, next_offset, head, f, next_mask, F, FROM_KEY, PER_CHANNEL
        )
        own = log_gates(gate, k, gate_scale, gate_bias, divisor, offset, head, f, mask, F, FROM_KEY, PER_CHANNEL)
        key = key * decay(tl.cumsum(follow, 0, reverse=True), EXACT)
        values = tl.load(v + offset * V + u[None, :], mask=writes[:, None] & (u < V)[None, :], other=0.0).to(tl.float32)
        scores = tl.dot(fading, tl.trans(key), input_precision=PRECISION)
        outputs += tl.dot(scores, values, input_precision=PRECISION)
        mass += tl.sum(scores, 1)
        fading = fading * decay(tl.sum(own, 0)[None, :], EXACT)

    f_column = tl.arange(0, BF)[:, None]
    inside = (u < V)[None, :]
    if BF * BV > 128 * 128:
        # Load the state in two halves of its rows, because the whole does not fit into shared memory.
        upper, lower = halves(fading)
        f_column = tl.arange(0, BF // 2)[:, None]
        at = states + (slot * F + f_column) * V + u[None, :]
        outputs += tl.dot(upper, tl.load(at, mask=(f_column < F) & inside, other=0.0), input_precision=PRECISION)
        state = tl.load(at + BF // 2 * V, mask=(f_column + BF // 2 < F) & inside, other=0.0)
        outputs += tl.dot(lower, state, input_precision=PRECISION)
    else:
        state = tl.load(states + (slot * F + f_column) * V + u[None, :], mask=(f_column < F) & inside, other=0.0)
        outputs += tl.dot(fading, state, input_precision=PRECISION)
    mass += tl.sum(fading * tl.load(masses + slot * F + f, mask=f < F, other=0.0), 1)
    return outputs, mass


@triton.jit
def strong(totals, slot, i, stream, F: tl.constexpr, BF: tl.constexpr, EXACT: tl.constexpr):
    """True if token `i` of the stream is in a chunk of strong decay, whose row in `[slots * K, ...]` is `slot`."""
    f = tl.arange(0, BF)
    wide = tl.where((i >= 0) & (i < stream), F, 0)
    return weak(tl.load(totals + slot * F + f, mask=f < wide, other=0.0), EXACT) == 0


@triton.jit
def tokens_of_tile(
    tile,
    slots,
    totals,
    length,
    lag,
    row,
    head,
    K: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    CHUNK: tl.constexpr,
    SUB: tl.constexpr,
    TILED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Start and end of a tile's tokens of the stream, and their chunk's row in `[slots * K, ...]`: one sub-chunk or,
    with TILED, a chunk, and none of it if its decay is weak."""
    STEP: tl.constexpr = CHUNK if TILED else SUB
    first = (tile - (lag + STEP - 1) // STEP) * STEP
    stream = (length - lag).to(tl.int32)
    last = tl.minimum(first + STEP, stream)
    slot = (tl.load(slots + row).to(tl.int64) + tl.maximum(first, 0) // CHUNK) * K + head
    if TILED:
        last = tl.where(strong(totals, slot, first, stream, F, BF, EXACT), last, first)
    return first, last, slot


@triton.jit(do_not_specialize=VARYING)
def write_outputs_kernel(
    q_rotated,
    k_rotated,
    v,
    q,
    k,
    stats,
    gate,
    gate_scale,
    gate_bias,
    divisor,
    column_k,
    column_v,
    column_exists,
    mix_weight,
    tiles,
    starts,
    counts,
    slots,
    states,
    masses,
    totals,
    outputs,
    apart,
    rows,
    entries,
    keys,
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
    GROUP: tl.constexpr,
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
    FROM_KEY: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    COUNTED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    TILED: tl.constexpr,
    APART: tl.constexpr,
):
    """Window, recurrence and mix for one sub-chunk of tokens and the query heads of one key/value head. TILED: only in
    chunks that `chunk_outputs` leaves out. APART: as there."""
    tile, row, head, start, length, count = open_tile(tiles, tl.program_id(0), starts, counts, K, COUNTED)
    # Tiles are aligned with the stream; queries before the stream have no state to read, so the first tiles have
    # negative `i`.
    first, last, slot = tokens_of_tile(tile, slots, totals, length, lag, row, head, K, F, BF, CHUNK, SUB, TILED, EXACT)
    for i in range(first, last, SUB):
        first_key = start + (row + 1) * past
        x = tl.arange(0, GROUP * SUB)
        t = i + lag + x % SUB
        # The heads of a group can exceed one tile, and so can the value channels.
        blocks: tl.constexpr = (V + BV - 1) // BV
        member = tl.program_id(2) // blocks * GROUP + x // SUB
        real = (t >= 0) & (t < length) & (member < H // K)
        of_head = head * (H // K) + member
        entry = tl.where(real, (start + t) * H + of_head, 0)
        query = entry[:, None]
        d, u = tl.arange(0, BD)[None, :], tl.program_id(2) % blocks * BV + tl.arange(0, BV)

        low = tl.maximum(i + lag - window + 1, -tl.minimum(count, past))
        high = tl.minimum(i + lag + SUB, length)
        rotated = tl.load(q_rotated + query * D + d, mask=real[:, None] & (d < D), other=0.0)
        y, normaliser = read_window(
            *(rotated, k_rotated, v, column_k, column_v, column_exists, t, count, row, head, first_key, low, high, u),
            *(window, scale, softcap, K, D, V, BD, BV, BM, KEYS, COLUMNS, SINKS, EXISTS, CAPPED, OPERAND, PRECISION),
        )
        read = tl.zeros((GROUP * SUB, BV), tl.float32)
        inverse = tl.zeros((GROUP * SUB,), tl.float32)
        if i >= 0:
            reads = load_reads(q, query, real, F, BF, SOFTMAX)
            read, mass = read_recurrence(
                *(reads, k, v, stats, gate, gate_scale, gate_bias, divisor, states, masses, slot, i, length - lag),
                *(count - ahead, least, first_key - ahead, head, u, keys, K, F, V, BF, BV, GROUP, CHUNK, SUB),
                *(SOFTMAX, FROM_KEY, PER_CHANNEL, PRECISION, EXACT),
            )
            live = real
            if EVICTED:
                live = real & (count + t - window >= least)
            inverse = inverse_masses(mass, live, MIX, NORMALIZE)
            read = read * inverse[:, None]
        leads = tl.program_id(2) % blocks == 0
        if APART:
            there = real[:, None] & (u < V)[None, :]
            tl.store(apart + query * V + u[None, :], read.to(apart.dtype.element_ty), mask=there)
        learned = 1.0
        if MIX == "learned":
            learned = row_weights(mix_weight, of_head, u, real, V)
        write_mixed(
            *(y, normaliser, read, inverse, learned, mix_weight, outputs, rows),
            *(entry, of_head, u, real, leads, entries, V, MIX, APART),
        )
