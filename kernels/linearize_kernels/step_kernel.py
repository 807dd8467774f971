"""The fused step's kernel: one program per row and key/value head.

Only one program accesses a head's ring, sinks and state. A barrier precedes each write to data that several of its
threads read. Scores and sums of values are products of tensor cores, whose tile a group of query heads fills in part:
bfloat16 products are exact in float32, and a weight enters as the sum of two bfloat16 numbers. The other products of
thin matrices are sums.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused step needs triton: pip install triton") from error


@triton.jit
def _log1p(x):
    """log(1 + x), accurate for small x: the rounding of 1 + x cancels (Kahan)."""
    one = 1.0 + x
    exact = one == 1.0
    return tl.where(exact, x, tl.log(one) * (x / tl.where(exact, 1.0, one - 1.0)))


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, by the same method."""
    power = tl.exp(x)
    exact = power == 1.0
    least = power - 1.0
    inner = exact | (least == -1.0)
    return tl.where(exact, x, tl.where(inner, least, least * (x / tl.log(tl.where(inner, 0.5, power)))))


@triton.jit
def _tanh(x):
    """tanh(x), by its series near 0, where 1 - exp(-2x) loses digits."""
    square = x * x
    near = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    decay = tl.exp(-2 * tl.abs(x))
    far = (1 - decay) / (1 + decay)
    return tl.where(square < 0.04, near, tl.where(x < 0, -far, far))


@triton.jit
def _scores(q, keys, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores of `[G, D]` with `[N, D]`: `[G, N]`."""
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    if HAS_SOFTCAP:
        scores = softcap * _tanh(scores / softcap)
    return scores


@triton.jit
def _attend(scores, values, top, total, y):
    """Add scores `[G, N]` and values `[N, V]` to a running softmax: its maximum, sum and weighted sum of values."""
    highest = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp(top - highest)
    weights = tl.exp(scores - highest[:, None])
    total = total * shrink + tl.sum(weights, 1)
    y = _weighted_sum(weights, values, y * shrink[:, None])
    return highest, total, y


@triton.jit
def _weighted_sum(weights, values, y):
    """`y` plus `[G, N]` by `[N, V]`."""
    first = weights.to(values.dtype)
    y = tl.dot(first, values, y, input_precision="ieee")
    if values.dtype != tl.float32:
        y = tl.dot((weights - first.to(tl.float32)).to(values.dtype), values, y)
    return y


@triton.jit
def _projected(
    x, at, there, weights, d, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_I: tl.constexpr, D: tl.constexpr
):
    """Rows x[at] `[R, D]` times weights `[D, D]`, at columns `d` `[F]`."""
    result = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    for first in range(0, D, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        part = tl.load(x + at[:, None] + i[None, :], mask=there[:, None] & (i < D)[None, :], other=0.0).to(tl.float32)
        block = tl.load(weights + i[:, None] * D + d[None, :], mask=(i < D)[:, None] & (d < D)[None, :], other=0.0)
        result += tl.sum(part[:, :, None] * block[None, :, :], 1)
    return result


@triton.jit
def _features(
    x,
    at,
    there,
    weights,
    f,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_I: tl.constexpr,
    D: tl.constexpr,
    FEATURES: tl.constexpr,
    QK_NORM: tl.constexpr,
):
    """The feature map of rows x[at], `[R, F]`; columns from BLOCK_D on are features of -x."""
    d = f % BLOCK_D
    inside = (d < D)[None, :]
    first = (f < BLOCK_D)[None, :]
    rows = tl.load(x + at[:, None] + d[None, :], mask=there[:, None] & inside, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(tl.where(first, rows * rows, 0.0), 1))
    if FEATURES == "learned":
        rows = _projected(x, at, there, weights, d, BLOCK_R, BLOCK_F, BLOCK_I, D)
    if QK_NORM:
        rows = rows / tl.maximum(length, 1e-6)[:, None]
    if FEATURES == "elu":
        rows = tl.where(inside, tl.where(rows > 0, rows + 1.0, tl.exp(tl.minimum(rows, 0.0))), 0.0)
    elif FEATURES != "identity":
        low: tl.constexpr = float("-inf")
        rows = tl.where(inside, tl.where(first, rows, -rows), low)
        top = tl.where(first, tl.max(tl.where(first, rows, low), 1)[:, None], 0.0)
        if BLOCK_F > BLOCK_D:
            top = tl.where(first, top, tl.max(tl.where(first, low, rows), 1)[:, None])
        rows = tl.exp(rows - top)
        total = tl.sum(tl.where(first, rows, 0.0), 1)[:, None]
        if BLOCK_F > BLOCK_D:
            total = tl.where(first, total, tl.sum(tl.where(first, 0.0, rows), 1)[:, None])
        rows = rows / total
    return rows


@triton.jit
def step_kernel(
    q,
    k,
    v,
    q_rotated,
    k_rotated,
    out,  # [B, H, V]
    window_out,  # [B, H, V] float32: the window's output
    window_log,  # [B, H] float32: the log of its denominator
    ring_k_rotated,
    ring_k,
    ring_source,
    ring_v,
    sink_k,
    sink_v,
    state,
    counts,
    lengths,
    gate_scale,
    gate_bias,
    gate_projection,
    feature_projection,
    mix_weight,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    q_rotated_row,
    q_rotated_head,
    k_rotated_row,
    k_rotated_head,
    scale,
    softcap,
    gate_sign,
    fixed_gate_scale,
    fixed_gate_bias,
    gate_divisor,
    gate_bound,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    SINKS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    GATE: tl.constexpr,
    LEARNED_GATE: tl.constexpr,
    HAS_PROJECTION: tl.constexpr,
    HAS_BOUND: tl.constexpr,
    SOURCE: tl.constexpr,
    FEATURES: tl.constexpr,
    QK_NORM: tl.constexpr,
    WRITES_GATE: tl.constexpr,
    COVERS_ALL: tl.constexpr,
    ROPE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MIX: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + row)
    real = count >= 0
    if HAS_LENGTHS:
        real = tl.load(lengths + row) > 0
    index = count - W  # number of the token that leaves the window
    slot = count % W
    held = (row * W + slot) * K + head
    leaves = real & (index >= 0)
    # Widths of loads and stores: `real_*` are 0 unless the token is real, `left_*` unless a token leaves the window.
    real_d, real_e = tl.where(real, D, 0), tl.where(real, V, 0)
    left_d, left_e = tl.where(leaves, D, 0), tl.where(leaves, V, 0)

    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    low: tl.constexpr = float("-inf")
    queries = (head * G + g).to(tl.int64)
    q_at = row * q_row + queries * q_head
    q_rotated_at = row * q_rotated_row + queries * q_rotated_head
    k_at = row * k_row + head * k_head
    v_at = row * v_row + head * v_head
    k_rotated_at = row * k_rotated_row + head * k_rotated_head

    # Window and sinks. The ring is read as after the update: the new token replaces the oldest.
    OPERAND: tl.constexpr = tl.float32 if WHOLE else q_rotated.dtype.element_ty
    asking = tl.arange(0, BLOCK_Q)
    asked_at = row * q_rotated_row + (head * G + asking).to(tl.int64) * q_rotated_head
    asked = tl.load(
        q_rotated + asked_at[:, None] + d[None, :], mask=(asking < G)[:, None] & (d < D)[None, :], other=0.0
    )
    asked = asked.to(OPERAND)
    new_k = tl.load(k_rotated + k_rotated_at + d, mask=d < D, other=0.0).to(ring_k_rotated.dtype.element_ty)
    new_v = tl.load(v + v_at + e, mask=e < V, other=0.0).to(ring_v.dtype.element_ty)
    top = tl.full([BLOCK_Q], low, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    y = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    for first in range(0, W, BLOCK_W):
        place = first + tl.arange(0, BLOCK_W)
        at = (row * W + place) * K + head
        kept = (place < W) & (place < count)
        new = place == tl.where(real, slot, -1)
        keys = tl.load(ring_k_rotated + at[:, None] * D + d[None, :], mask=kept[:, None] & (d < D)[None, :], other=0.0)
        keys = tl.where(new[:, None], new_k[None, :], keys).to(OPERAND)
        values = tl.load(ring_v + at[:, None] * V + e[None, :], mask=kept[:, None] & (e < V)[None, :], other=0.0)
        values = tl.where(new[:, None], new_v[None, :], values).to(OPERAND)
        scores = _scores(asked, keys, scale, softcap, HAS_SOFTCAP)
        scores = tl.where(((place < W) & (place <= count))[None, :], scores, low)
        top, total, y = _attend(scores, values, top, total, y)
    if SINKS > 0:
        place = tl.arange(0, BLOCK_M)
        at = (row * SINKS + place) * K + head
        kept = (place < SINKS) & (place < index)
        new = place == tl.where(leaves, index, -1)
        old_k = tl.load(ring_k_rotated + held * D + d, mask=d < left_d, other=0.0)
        old_v = tl.load(ring_v + held * V + e, mask=e < left_e, other=0.0)
        keys = tl.load(sink_k + at[:, None] * D + d[None, :], mask=kept[:, None] & (d < D)[None, :], other=0.0)
        keys = tl.where(new[:, None], old_k[None, :], keys).to(OPERAND)
        values = tl.load(sink_v + at[:, None] * V + e[None, :], mask=kept[:, None] & (e < V)[None, :], other=0.0)
        values = tl.where(new[:, None], old_v[None, :], values).to(OPERAND)
        scores = _scores(asked, keys, scale, softcap, HAS_SOFTCAP)
        scores = tl.where(((place < SINKS) & (place <= index))[None, :], scores, low)
        top, total, y = _attend(scores, values, top, total, y)
    asker = row * (K * G) + head * G + asking
    y = y / total[:, None]
    answered = (asking < G)[:, None] & (e < V)[None, :]
    tl.store(out + asker[:, None] * V + e[None, :], y.to(out.dtype.element_ty), mask=answered)
    if GATE is not None:
        tl.store(window_out + asker[:, None] * V + e[None, :], y, mask=answered)
        if MIX == "softmax":
            tl.store(window_log + asker, top + tl.log(total), mask=asking < G)
            tl.debug_barrier()  # other threads read it back

    # The state. Rows with an empty state keep the window's output.
    LEAST: tl.constexpr = -W if COVERS_ALL else SINKS
    if GATE is not None and index >= LEAST:
        f = tl.arange(0, BLOCK_F)
        channel = f % BLOCK_D
        inside = channel < D
        state_row = (f // BLOCK_D) * D + channel
        one = tl.arange(0, 1)
        there = one < tl.where(real, 1, 0)
        everyone = g < G

        # The gate, and the written key and value: zeros and a gate of 1 if the token is not real.
        gate_weights = gate_projection + head * D * D
        map_weights = feature_projection + head * D * D
        if SOURCE == "q" and COVERS_ALL:
            if HAS_PROJECTION:
                # The mean of projections equals the projection of the mean.
                several = _projected(q, q_at, everyone, gate_weights, channel, BLOCK_G, BLOCK_F, BLOCK_I, D)
            else:
                several = tl.load(
                    q + q_at[:, None] + channel[None, :], mask=everyone[:, None] & inside[None, :], other=0.0
                )
            source = tl.sum(several.to(tl.float32), 0) / G
            if not HAS_PROJECTION:
                source = source.to(q.dtype.element_ty).to(tl.float32)
        else:
            if SOURCE == "v":
                origin = (v + v_at) if COVERS_ALL else (ring_v + held * V)
            elif SOURCE == "q":
                origin = ring_source + held * D
            else:
                origin = (k + k_at) if COVERS_ALL else (ring_k + held * D)
            if HAS_PROJECTION:
                source = tl.sum(
                    _projected(origin, one, there, gate_weights, channel, 1, BLOCK_F, BLOCK_I, D),
                    0,
                )
            else:
                source = tl.load(origin + channel, mask=channel < real_d, other=0.0).to(tl.float32)
        log_gate = tl.zeros([BLOCK_F], tl.float32)
        if GATE == "retention":
            log_gate += _log1p(-tl.exp2(-5.0 - head.to(tl.float32)))
        elif GATE != "none":
            if GATE == "head":
                source = tl.zeros([BLOCK_F], tl.float32) + tl.sum(tl.where(inside & (f < BLOCK_D), source, 0.0), 0) / D
            if LEARNED_GATE:
                gate_at = (head * D + channel) if GATE == "channel" else (head + channel * 0)
                x = tl.load(gate_scale + gate_at, mask=inside, other=0.0) * source
                x += tl.load(gate_bias + gate_at, mask=inside, other=0.0)
            else:
                x = fixed_gate_scale * source + fixed_gate_bias
            x = gate_sign * x
            log_gate = (tl.minimum(x, 0.0) - _log1p(tl.exp(-tl.abs(x)))) / gate_divisor
            if HAS_BOUND:
                log_gate = _log1p((1.0 - gate_bound) * _expm1(log_gate))
        if WRITES_GATE:
            written = -_expm1(log_gate)
        else:
            if ROPE:
                key = (k_rotated + k_rotated_at) if COVERS_ALL else (ring_k_rotated + held * D)
            else:
                key = (k + k_at) if COVERS_ALL else (ring_k + held * D)
            features = _features(key, one, there, map_weights, f, 1, BLOCK_D, BLOCK_F, BLOCK_I, D, FEATURES, QK_NORM)
            written = tl.sum(features, 0)
        written = tl.where(channel < real_d, written, 0.0)
        gate = tl.where(real, tl.exp(log_gate), 1.0)

        if ROPE:
            reader, reader_at = q_rotated, q_rotated_at
        else:
            reader, reader_at = q, q_at
        mapped = _features(
            reader, reader_at, everyone, map_weights, f, BLOCK_G, BLOCK_D, BLOCK_F, BLOCK_I, D, FEATURES, QK_NORM
        )
        mapped = tl.where(inside[None, :], mapped, 0.0)

        # The mass, and the weight of the recurrence's output.
        HALVES: tl.constexpr = BLOCK_F // BLOCK_D
        rows = state + ((row * K + head) * (HALVES * D) + state_row) * (V + 1)
        mass_column = tl.load(rows + V, mask=inside, other=0.0) * gate + written
        mass = tl.sum(mapped * mass_column[None, :], 1)
        tiny: tl.constexpr = 1.1754943508222875e-38
        divisor = tl.full([BLOCK_G], 1.0, tl.float32)
        share = tl.full([BLOCK_G], 0.5 if MIX == "fixed" else 1.0, tl.float32)
        if MIX == "softmax":
            divisor = tl.maximum(mass, tiny)
            weight = tl.load(mix_weight + queries, mask=everyone, other=0.0)
            log = tl.load(window_log + row * (K * G) + queries, mask=everyone, other=0.0)
            ratio = tl.exp(tl.minimum(tl.log(divisor) - log, 60.0))
            share = tl.where(mass > 0, weight * ratio / (1.0 + tl.abs(weight) * ratio), 0.0)
        elif NORMALIZE:
            divisor = tl.maximum(mass, tiny)
            share = tl.where(mass > 0, share, 0.0)

        tl.debug_barrier()  # other threads read back `window_out`
        for first in range(0, V, BLOCK_V):
            column = first + tl.arange(0, BLOCK_V)
            if COVERS_ALL:
                value = tl.load(v + v_at + column, mask=column < V, other=0.0).to(tl.float32)
            else:
                value = tl.load(ring_v + held * V + column, mask=column < real_e, other=0.0).to(tl.float32)
            cells = rows[:, None] + column[None, :]
            tile = tl.load(cells, mask=inside[:, None] & (column < V)[None, :], other=0.0)
            tile = tile * gate[:, None] + written[:, None] * value[None, :]
            tl.debug_barrier()
            tl.store(cells, tile, mask=(channel < real_d)[:, None] & (column < V)[None, :])
            for j in tl.static_range(G):
                mine = g == j
                read = tl.sum(tl.sum(tl.where(mine[:, None], mapped, 0.0), 0)[:, None] * tile, 0)
                read = read / tl.sum(tl.where(mine, divisor, 0.0), 0)
                amount = tl.zeros([BLOCK_V], tl.float32) + tl.sum(tl.where(mine, share, 0.0), 0)
                if MIX == "learned":
                    amount *= tl.load(mix_weight + (head * G + j) * V + column, mask=column < V, other=0.0)
                answer = (row * (K * G) + head * G + j) * V + column
                window = tl.load(window_out + answer, mask=column < V, other=0.0)
                mixed = window + amount * (read - window)
                tl.store(out + answer, mixed.to(out.dtype.element_ty), mask=column < V)
        tl.store(rows + V, mass_column, mask=channel < real_d)

    # Last, because the code above must not read them: the arriving sink, and the new token's slot.
    tl.debug_barrier()
    if SINKS > 0:
        arrives = leaves & (index < SINKS)
        at = (row * SINKS + tl.maximum(index, 0)) * K + head
        tl.store(sink_k + at * D + d, old_k, mask=d < tl.where(arrives, D, 0))
        tl.store(sink_v + at * V + e, old_v, mask=e < tl.where(arrives, V, 0))
    tl.store(ring_k_rotated + held * D + d, new_k, mask=d < real_d)
    tl.store(ring_v + held * V + e, new_v, mask=e < real_e)
    if GATE is not None and not COVERS_ALL:
        plain = tl.load(k + k_at + d, mask=d < D, other=0.0).to(ring_k.dtype.element_ty)
        tl.store(ring_k + held * D + d, plain, mask=d < real_d)
        if SOURCE == "q":
            several = tl.load(q + q_at[:, None] + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
            mean = (tl.sum(several.to(tl.float32), 0) / G).to(q.dtype.element_ty)
            tl.store(ring_source + held * D + d, mean.to(ring_source.dtype.element_ty), mask=d < real_d)
