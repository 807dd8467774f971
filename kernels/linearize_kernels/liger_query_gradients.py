"""The backward kernels of Liger attention over queries.

With A_ts = φ(q_t)·(decay from s to t ⊙ φ(k_s)) and the outputs y + w (o / m - y), each query row gets

    delta    Σ_v dy_v y_v less the gradient of the log of the window's denominator, as in flash attention
    share    the recurrence's share of the output, before a learned weight
    pull     share / m: the gradient of o is pull * dout (times a learned weight)
    dm       the gradient of its mass m

The kernels over keys read these. The gradient of the running decay is φ(q_t) dφ(q_t) less φ(k_s) dφ(k_s), over pairs
s < t; a token's own pair has no decay, so its terms cancel and are left out.
"""

from __future__ import annotations

from linearize_kernels.liger_forward import read_recurrence, read_window, shares, tiles_of_queries
from linearize_kernels.liger_tiles import (
    VARYING,
    decay,
    features,
    halves,
    log_gates,
    per_row,
    softmax_rows,
    tl,
    triton,
    weak,
)


@triton.jit
def ratio_gradients(mass, normaliser, share, divides, weight, of_read, of_y, held):
    """For `mix: softmax`, the gradients of the log of mass over denominator, and of the mix weight, for each row;
    `of_read` is that of the normalised read."""
    log_ratio = tl.log(divides) - normaliser
    ratio = tl.exp(tl.minimum(log_ratio, 60.0))
    rest = 1.0 + tl.abs(weight) * ratio
    of_share = tl.where(held & (mass > 0.0), of_read - of_y, 0.0)
    return tl.where(log_ratio <= 60.0, of_share * share / rest, 0.0), of_share * (ratio / rest) / rest


@triton.jit(do_not_specialize=VARYING)
def query_gradients(
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
    starts,
    counts,
    slots,
    states,
    masses,
    totals,
    doutputs,
    dq,
    dweight,
    dlog,
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
):
    """Gradients of queries without positions and, per tile, of mix weights; `rows` `[5, N, H]` receives normaliser,
    delta, share, pull, dm.

    `dlog` is `[parts, P, K, F]` and `dweight` `[tiles, H, V or 1]`; `entries` is N * H. TILED: only in chunks
    that the kernels of `liger_chunk_gradients` leave out.
    """
    row, head = tl.program_id(1) // K, tl.program_id(1) % K
    start = tl.load(starts + row).to(tl.int64)
    length = tl.load(starts + row + 1).to(tl.int64) - start
    count = tl.load(counts + row).to(tl.int64) if COUNTED else length * 0
    first, last, slot = tiles_of_queries(slots, totals, length, lag, row, head, K, F, BF, CHUNK, SUB, TILED, EXACT)
    for i in range(first, last, SUB):
        first_key = start + (row + 1) * past
        x = tl.arange(0, GROUP * SUB)
        t = i + lag + x % SUB
        turn, token = x % SUB, tl.arange(0, SUB)
        part = tl.program_id(2)
        member = part * GROUP + x // SUB
        real = (t >= 0) & (t < length) & (member < H // K)
        entry = tl.where(real, (start + t) * H + head * (H // K) + member, 0)
        query = entry[:, None]
        d, f, u = tl.arange(0, BD)[None, :], tl.arange(0, BF)[None, :], tl.arange(0, BV)
        low = tl.maximum(i + lag - window + 1, -tl.minimum(count, past))
        high = tl.minimum(i + lag + SUB, length)
        rotated = tl.load(q_rotated + query * D + d, mask=real[:, None] & (d < D), other=0.0)
        there = real[:, None] & (u < V)[None, :]
        dout = tl.load(doutputs + query * V + u[None, :], mask=there, other=0.0).to(tl.float32)
        reads = tl.load(q + query * F + f, mask=real[:, None] & (f < F), other=0.0).to(tl.float32)
        if SOFTMAX:
            reads = softmax_rows(reads, f < F)

        # Recompute the forward pass.
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
        read = tl.zeros((GROUP * SUB, BV), tl.float32)
        mass = tl.zeros((GROUP * SUB,), tl.float32)
        live = real & (i >= 0)
        if i >= 0:
            read, mass = read_recurrence(
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
                length - lag,
                count - ahead,
                least,
                first_key,
                ahead,
                head,
                u,
                keys,
                K,
                F,
                V,
                BF,
                BV,
                GROUP,
                CHUNK,
                SUB,
                SOFTMAX,
                FROM_KEY,
                PER_CHANNEL,
                PRECISION,
                EXACT,
            )
        if EVICTED:
            live = live & (count + t - window >= least)

        # Backward through the mix.
        weight = mass * 0.0
        if MIX == "softmax":
            weight = tl.load(mix_weight + head * (H // K) + member, mask=real, other=0.0).to(tl.float32)
        share, divides = shares(mass, normaliser, weight, live, MIX, NORMALIZE)
        pull = share / divides
        through = dout
        if MIX == "learned":
            channel = (head * (H // K) + member)[:, None] * V + u[None, :]
            through = dout * tl.load(mix_weight + channel, mask=there, other=0.0).to(tl.float32)
        of_y, of_read = tl.sum(through * y, 1), tl.sum(through * read, 1)
        delta = tl.sum(dout * y, 1) - share * of_y
        dm = mass * 0.0
        # Tiles of all rows are concatenated; each row has spare tiles for incomplete ones at its ends.
        tile = tl.maximum(i // SUB + (lag + SUB - 1) // SUB, 0)
        tile = (start // SUB + 3 * row + tile) * H + head * (H // K) + part * GROUP
        if NORMALIZE or MIX == "softmax":
            dm = -pull * of_read / divides
        if MIX == "learned":
            of_weight = tl.where((share > 0.0)[:, None], dout * (read / divides[:, None] - y), 0.0)
            of_weight = tl.sum(tl.reshape(of_weight, (GROUP, SUB, BV)), 1)
            g = tl.arange(0, GROUP)
            to = (tile + g)[:, None] * V + u[None, :]
            tl.store(dweight + to, of_weight, mask=(part * GROUP + g < H // K)[:, None] & (u < V)[None, :])
        if MIX == "softmax":
            of_ratio, of_share = ratio_gradients(
                mass, normaliser, share, divides, weight, of_read / divides, of_y, live
            )
            dm += of_ratio / divides
            delta += of_ratio
            of_weight = tl.sum(tl.reshape(of_share, (GROUP, SUB)), 1)
            g = tl.arange(0, GROUP)
            tl.store(dweight + tile + g, of_weight, mask=part * GROUP + g < H // K)
        tl.store(rows + entry, normaliser, mask=real)
        tl.store(rows + entries + entry, delta, mask=real)
        tl.store(rows + 2 * entries + entry, share, mask=real)
        tl.store(rows + 3 * entries + entry, pull, mask=real)
        tl.store(rows + 4 * entries + entry, dm, mask=real)

        # Backward through the recurrence: the state's part decays over the chunk, and each key adds its part.
        dreads = tl.zeros((GROUP * SUB, BF), tl.float32)
        if i >= 0:
            dread = pull[:, None] * through
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
            number = count - ahead
            for near in range((i % CHUNK) // SUB):
                place = i // CHUNK * CHUNK + near * SUB + token
                writes = number + place >= least
                offset = (tl.where(writes, first_key + place - ahead, 0) * K + head)[:, None]
                mask = writes[:, None] & (f < F)
                follows = (token < SUB - 1) & (number + place + 1 >= least)
                next_offset = (tl.where(follows, first_key + place + 1 - ahead, 0) * K + head)[:, None]
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

            place = i + token
            writes = (place < length - lag) & (number + place >= least)
            offset = (tl.where(writes, first_key + place - ahead, 0) * K + head)[:, None]
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
                    offset_s = tl.where(writes_s, first_key + i + s - ahead, 0) * K + head
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
