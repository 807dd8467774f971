"""The backward kernel of Liger attention over sub-chunks of queries, where decays are strong; see `liger_mix` for the
numbers of queries.

With A_ts = φ(q_t)·(decay from s to t ⊙ φ(k_s)), the gradient of the running decay is φ(q_t) dφ(q_t) less
φ(k_s) dφ(k_s), over pairs s < t; a token's own pair has no decay, so its terms cancel and are left out.
"""

from __future__ import annotations

from linearize_kernels.liger_forward import tokens_of_tile
from linearize_kernels.liger_mix import load_row_dreads
from linearize_kernels.liger_tiles import (
    VARYING,
    decay,
    features,
    halves,
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
def query_gradients(
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
    states,
    masses,
    totals,
    doutputs,
    dq,
    dlog,
    rows,
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
    """Gradients of queries without positions; `dlog` is `[parts, P, K, F]`. TILED: only in chunks that `chunk_queries`
    leaves out."""
    tile, row, head, start, length, count = open_tile(tiles, tl.program_id(0), starts, counts, K, COUNTED)
    first, last, slot = tokens_of_tile(tile, slots, totals, length, lag, row, head, K, F, BF, CHUNK, SUB, TILED, EXACT)
    for i in range(first, last, SUB):
        first_key, number = start + (row + 1) * past - ahead, count - ahead
        x = tl.arange(0, GROUP * SUB)
        t = i + lag + x % SUB
        turn, token = x % SUB, tl.arange(0, SUB)
        part = tl.program_id(2)
        member = part * GROUP + x // SUB
        real = (t >= 0) & (t < length) & (member < H // K)
        of_head = head * (H // K) + member
        entry = tl.where(real, (start + t) * H + of_head, 0)
        query = entry[:, None]
        f, u = tl.arange(0, BF)[None, :], tl.arange(0, BV)
        # The state's part decays over the chunk, and each key adds its part.
        dreads = tl.zeros((GROUP * SUB, BF), tl.float32)
        if i >= 0:
            reads = load_reads(q, query, real, F, BF, SOFTMAX)
            dread = load_row_dreads(doutputs, mix_weight, rows, entry, of_head, u, real, entries, V, MIX)
            dm = tl.load(rows + 4 * entries + entry, mask=real, other=0.0)
            f_column = tl.arange(0, BF)[:, None]
            if BF * BV > 128 * 128:
                left, right = halves(dread)
                w = tl.arange(0, BV // 2)[None, :]
                origin = states + (slot * F + f_column) * V + w
                state = tl.load(origin, mask=(f_column < F) & (w < V), other=0.0)
                before = tl.dot(left, tl.trans(state), input_precision=PRECISION)
                state = tl.load(origin + BV // 2, mask=(f_column < F) & (w + BV // 2 < V), other=0.0)
                before += tl.dot(right, tl.trans(state), input_precision=PRECISION)
            else:
                origin = states + (slot * F + f_column) * V + u[None, :]
                state = tl.load(origin, mask=(f_column < F) & (u < V)[None, :], other=0.0)
                before = tl.dot(dread, tl.trans(state), input_precision=PRECISION)
            before += dm[:, None] * tl.load(masses + slot * F + f, mask=f < F, other=0.0)
            for near in range((i % CHUNK) // SUB):
                place = i // CHUNK * CHUNK + near * SUB + token
                writes, offset = written_keys(place, i, number, least, first_key, head, K)
                mask = writes[:, None] & (f < F)
                end = i // CHUNK * CHUNK + (near + 1) * SUB
                follows, next_offset = written_keys(place + 1, end, number, least, first_key, head, K)
                next_mask = follows[:, None] & (f < F)
                key = features(k, stats, offset, f, mask, keys * K, F, SOFTMAX)
                follow = log_gates(
                    gate, k, gate_scale, gate_bias, divisor, next_offset, head, f, next_mask, F, FROM_KEY, PER_CHANNEL
                )
                own = log_gates(
                    gate, k, gate_scale, gate_bias, divisor, offset, head, f, mask, F, FROM_KEY, PER_CHANNEL
                )
                key = key * decay(tl.cumsum(follow, 0, reverse=True), EXACT)
                values = tl.load(v + offset * V + u[None, :], mask=writes[:, None] & (u < V)[None, :], other=0.0)
                pairs = tl.dot(dread, tl.trans(values.to(tl.float32)), input_precision=PRECISION) + dm[:, None]
                before = before * decay(tl.sum(own, 0)[None, :], EXACT)
                before += tl.dot(pairs, key, input_precision=PRECISION)

            writes, offset = written_keys(i + token, length - lag, number, least, first_key, head, K)
            mask = writes[:, None] & (f < F)
            own_values = tl.load(v + offset * V + u[None, :], mask=writes[:, None] & (u < V)[None, :], other=0.0)
            own_pairs = tl.dot(dread, tl.trans(own_values.to(tl.float32)), input_precision=PRECISION) + dm[:, None]
            own_gates = log_gates(
                gate, k, gate_scale, gate_bias, divisor, offset, head, f, mask, F, FROM_KEY, PER_CHANNEL
            )
            own_total = tl.sum(own_gates, 0)[None, :]
            if weak(own_total, EXACT):
                running = tl.cumsum(own_gates, 0)
                middle = own_total * 0.5
                key_m = features(k, stats, offset, f, mask, keys * K, F, SOFTMAX) * decay(middle - running, EXACT)
                strict = tl.where(turn[:, None] > token[None, :], own_pairs, 0.0)
                before = before * per_row(decay(running, EXACT), GROUP, SUB, BF)
                before += per_row(decay(running - middle, EXACT), GROUP, SUB, BF) * tl.dot(
                    strict, key_m, input_precision=PRECISION
                )
            else:
                for s in range(tl.minimum(length - lag - i, SUB)):
                    writes_s = (i + s < length - lag) & (number + i + s >= least)
                    offset_s = tl.where(writes_s, first_key + i + s, 0) * K + head
                    mask_s = f < tl.where(writes_s, F, 0)
                    key_s = features(k, stats, offset_s, f, mask_s, keys * K, F, SOFTMAX)
                    gate_s = log_gates(
                        gate, k, gate_scale, gate_bias, divisor, offset_s, head, f, mask_s, F, FROM_KEY, PER_CHANNEL
                    )
                    pair = tl.sum(tl.where((token == s)[None, :], own_pairs, 0.0), 1)[:, None]
                    faded = before * decay(gate_s, EXACT)
                    later = (turn >= s)[:, None]
                    before = tl.where(later, faded + tl.where((turn > s)[:, None], pair * key_s, 0.0), before)
            of_decay = tl.sum(tl.reshape(reads * before, (GROUP, SUB, BF)), 0)
            tl.store(dlog + part.to(tl.int64) * keys * K * F + offset * F + f, of_decay, mask=mask)
            own_key = features(k, stats, offset, f, mask, keys * K, F, SOFTMAX)
            own_pair = tl.sum(tl.where(token[None, :] == turn[:, None], own_pairs, 0.0), 1)
            dreads = before + own_pair[:, None] * per_row(own_key, GROUP, SUB, BF)
            if SOFTMAX:
                dreads = reads * (dreads - tl.sum(reads * dreads, 1)[:, None])
        tl.store(dq + query * F + f, dreads.to(dq.dtype.element_ty), mask=real[:, None] & (f < F))
