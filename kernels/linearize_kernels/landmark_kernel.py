"""The kernel of `landmark_triton.py`: one program per row and key/value head.

Channels come in two halves, because a byte of 4-bit codes holds channel i and i + D / 2. A product of two tiles in
half precision is the sum of three: what half precision keeps of each, and what it leaves of one times the other. So
codes, scales and weights lose nothing that float32 keeps.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused step needs triton: pip install triton") from error

from linearize_kernels.step_kernel import _tanh


@triton.jit
def _product(a, b, c, OPERAND: tl.constexpr):
    """c + a b for float32 tiles."""
    if tl.float32 == OPERAND:
        return tl.dot(a, b, c, input_precision="ieee")
    a_first, b_first = a.to(OPERAND), b.to(OPERAND)
    c = tl.dot(a_first, (b - b_first.to(tl.float32)).to(OPERAND), c)
    c = tl.dot((a - a_first.to(tl.float32)).to(OPERAND), b_first, c)
    return tl.dot(a_first, b_first, c)


@triton.jit
def _turned(x, SIZE: tl.constexpr, OPERAND: tl.constexpr):
    """The rows of `x` `[N, SIZE]` times the Hadamard matrix of 1 and -1, which half precision keeps."""
    i = tl.arange(0, SIZE)
    common = i[:, None] & i[None, :]
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    matrix = (1.0 - 2.0 * (common & 1).to(tl.float32)).to(OPERAND)
    if tl.float32 == OPERAND:
        return tl.dot(x, matrix, input_precision="tf32x3")
    first = x.to(OPERAND)
    return tl.dot(first, matrix, tl.dot((x - first.to(tl.float32)).to(OPERAND), matrix))


@triton.jit
def _turned_halves(low, high, D: tl.constexpr, SIZE: tl.constexpr, OPERAND: tl.constexpr):
    """Tokens `[N, D]`, in halves `[N, SIZE]`, times the Hadamard matrix / sqrt(D)."""
    # Halves are added after the products, whose operands keep what codes stand for.
    low, high = _turned(low, SIZE, OPERAND), _turned(high, SIZE, OPERAND)
    return (low + high) * (D**-0.5), (low - high) * (D**-0.5)


@triton.jit
def _bfloat16(x):
    """Rounded to bfloat16, in float32; the interpreter's conversion does not round."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _in_type(x, TYPE: tl.constexpr):
    """Rounded to a type, in float32."""
    if tl.bfloat16 == TYPE:
        return _bfloat16(x)
    return x.to(TYPE).to(tl.float32)


@triton.jit
def _nearest(x):
    """The nearest integer, halves to even, of |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _scale_of(x):
    """The scale of a vector in 8 bits; NaN if a channel is not finite, because `max` leaves NaN out."""
    scale = _bfloat16(tl.maximum(tl.max(tl.abs(x), 0) * (1.0 / 127.0), 1e-30))
    return tl.where(tl.sum(x - x, 0) == 0.0, scale, float("nan"))


@triton.jit
def _level(c):
    """Decode 4-bit numbers c, -8 to 7, in units of their scales."""
    return c * (c * c * (1.0 / 256.0) + 0.75)


@triton.jit
def _half(x, scale, at, h, there, HALF: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """One half of the channels of the tokens `at`, `[N, H]`; `HALF` is 0 or 1."""
    inside = there[:, None] & (h < D // 2)[None, :]
    if BITS == 4:
        held = tl.load(x + at[:, None] * (D // 2) + h[None, :], mask=inside, other=0)
        values = _level(((held >> (4 * HALF)) & 15).to(tl.float32) - 8.0)
    else:
        channel = HALF * (D // 2) + h
        values = tl.load(x + at[:, None] * D + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if BITS > 0:
        values *= tl.load(scale + at, mask=there, other=0.0).to(tl.float32)[:, None]
    return values


@triton.jit
def _attend_piece(
    q_low, q_high, top, total, y_low, y_high, scores, asker, first,
    k, k_scale, v, v_scale, head, place, there, softcap,
    K: tl.constexpr, D: tl.constexpr, V: tl.constexpr, P: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the tokens at `place` of a part to a running softmax, and keep their scores from place `first` on."""
    at = (place * K + head).to(tl.int64)
    h, u, g = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_U), tl.arange(0, BLOCK_Q)
    found = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    found = _product(q_low, tl.trans(_half(k, k_scale, at, h, there, 0, D, BITS)), found, OPERAND)
    found = _product(q_high, tl.trans(_half(k, k_scale, at, h, there, 1, D, BITS)), found, OPERAND)
    if HAS_SOFTCAP:
        found = softcap * _tanh(found / softcap)
    found = tl.where(there[None, :], found, float("-inf"))
    tl.store(scores + asker[:, None] * P + (first + place)[None, :], found, mask=(g < G)[:, None] & there[None, :])
    highest = tl.maximum(top, tl.max(found, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)  # no token yet
    shrink = tl.exp(top - safe)
    weights = tl.exp(found - safe[:, None])
    total = total * shrink + tl.sum(weights, 1)
    y_low = _product(weights, _half(v, v_scale, at, u, there, 0, V, BITS), y_low * shrink[:, None], OPERAND)
    y_high = _product(weights, _half(v, v_scale, at, u, there, 1, V, BITS), y_high * shrink[:, None], OPERAND)
    return highest, total, y_low, y_high, shrink


@triton.jit
def _receive(received, scores, asker, first, place, there, counts, top, total, head, K: tl.constexpr, P: tl.constexpr,
             G: tl.constexpr, BLOCK_Q: tl.constexpr):  # fmt: skip
    """Add the weights of the tokens at `place` to what they have received, where `counts`."""
    g = tl.arange(0, BLOCK_Q)
    read = (g < G)[:, None] & there[None, :]
    found = tl.load(scores + asker[:, None] * P + (first + place)[None, :], mask=read, other=float("-inf"))
    weights = tl.where(read, tl.exp(found - top[:, None]) / total[:, None], 0.0)
    at = received + place * K + head
    held = tl.load(at, mask=there & counts, other=0.0)
    tl.debug_barrier()
    tl.store(at, held + tl.sum(weights, 0), mask=there & counts)


@triton.jit
def _store_token(x, scale, into, into_scale, at, d, D: tl.constexpr, BITS: tl.constexpr, writes):
    """Write a token's vector at row `at`; `into` has 8 bits or the model's dtype."""
    mask = d < tl.where(writes, D, 0)
    if BITS == 8:
        codes = _nearest(x / scale)
        tl.store(into + at * D + d, codes.to(tl.int8), mask=mask)
        tl.store(into_scale + at, scale.to(into_scale.dtype.element_ty), mask=writes)
    else:
        tl.store(into + at * D + d, x.to(into.dtype.element_ty), mask=mask)


@triton.jit
def landmark_step_kernel(
    q, k, v, q_rotated, k_rotated, out, scores,
    sink_k, sink_k_scale, sink_v, sink_v_scale,
    window_k, window_k_scale, window_v, window_v_scale, window_novelty, window_received,
    slot_k, slot_k_scale, slot_v, slot_v_scale, slot_received, slot_number,
    sums, score_weight, key_scale, key_shift, counts, lengths,
    k_row, v_row, q_rotated_row, k_rotated_row, sink_row, window_row, slot_row,
    scale, softcap,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, NEAR_BITS: tl.constexpr, SLOT_BITS: tl.constexpr,
    LEARNED: tl.constexpr, CODED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = k_rotated.dtype.element_ty
    OPERAND: tl.constexpr = tl.float32 if WHOLE else tl.bfloat16
    ROOM: tl.constexpr = W + BLOCK - 1
    P: tl.constexpr = SINKS + ROOM + SLOTS
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    count = tl.load(counts + row)
    real = count >= 0
    if HAS_LENGTHS:
        real = tl.load(lengths + row) > 0
    after = tl.where(real, count + 1, count)
    merged = tl.maximum(after - W - SINKS, 0) // BLOCK
    place = (count - SINKS - merged * BLOCK).to(tl.int32)  # of the new token in the window; below 0 it is a sink
    # Each part of the row; `near` and slots may be pieces of one tensor.
    sink_k, sink_v = sink_k + row * sink_row * D, sink_v + row * sink_row * V
    sink_k_scale, sink_v_scale = sink_k_scale + row * sink_row, sink_v_scale + row * sink_row
    window_k, window_v = window_k + row * window_row * D, window_v + row * window_row * V
    window_k_scale, window_v_scale = window_k_scale + row * window_row, window_v_scale + row * window_row
    PACKED: tl.constexpr = 2 if SLOT_BITS == 4 else 1
    slot_k, slot_v = slot_k + row * slot_row * (D // PACKED), slot_v + row * slot_row * (V // PACKED)
    slot_k_scale, slot_v_scale = slot_k_scale + row * slot_row, slot_v_scale + row * slot_row
    window_novelty, window_received = window_novelty + row * ROOM * K, window_received + row * ROOM * K
    slot_received, slot_number = slot_received + row * SLOTS * K, slot_number + row * SLOTS * K

    # The new token, as it is stored.
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    new_k = tl.load(k_rotated + row * k_rotated_row + head * D + d, mask=d < D, other=0.0).to(tl.float32)
    if CODED:
        # Prompts are coded in the model's dtype.
        shift = _in_type(tl.load(key_shift + head * D + d, mask=d < D, other=0.0), TYPE)
        new_k *= _in_type(tl.load(key_scale + head * D + d, mask=d < D, other=0.0), TYPE)
        new_k = _in_type(shift + new_k, TYPE)
    new_v = tl.load(v + row * v_row + head * V + e, mask=e < V, other=0.0).to(tl.float32)
    in_window = real & (place >= 0)
    in_sinks = real & (place < 0)
    at = tl.maximum(place, 0) * K + head
    k_scale, v_scale = _scale_of(new_k), _scale_of(new_v)
    _store_token(new_k, k_scale, window_k, window_k_scale, at, d, D, NEAR_BITS, in_window)
    _store_token(new_v, v_scale, window_v, window_v_scale, at, e, V, NEAR_BITS, in_window)
    if SINKS > 0:
        at = tl.minimum(tl.maximum(place + SINKS, 0), SINKS - 1) * K + head
        _store_token(new_k, k_scale, sink_k, sink_k_scale, at, d, D, NEAR_BITS, in_sinks)
        _store_token(new_v, v_scale, sink_v, sink_v_scale, at, e, V, NEAR_BITS, in_sinks)

    # Its static score.
    if LEARNED:
        weight = score_weight + head * (K * (D + V) + 1)
        novelty = tl.load(weight + K * (D + V))
        for other in range(K):
            key = tl.load(k + row * k_row + other * D + d, mask=d < D, other=0.0).to(tl.float32)
            novelty += tl.sum(key * tl.load(weight + other * D + d, mask=d < D, other=0.0), 0)
            value = tl.load(v + row * v_row + other * V + e, mask=e < V, other=0.0).to(tl.float32)
            if NEAR_BITS == 8:
                value_scale = _scale_of(value)
                value = _nearest(value / value_scale) * value_scale
            novelty += tl.sum(value * tl.load(weight + K * D + other * V + e, mask=e < V, other=0.0), 0)
    else:
        key = tl.load(k + row * k_row + head * D + d, mask=d < D, other=0.0).to(tl.float32)
        key = key / tl.maximum(tl.sqrt(tl.sum(key * key, 0)), 1e-12)
        sum_at = sums + (row * K + head) * D + d
        before = tl.load(sum_at, mask=d < D, other=0.0)
        long = tl.maximum(tl.sqrt(tl.sum(before * before, 0)), 1e-8)
        one = tl.maximum(tl.sqrt(tl.sum(key * key, 0)), 1e-8)
        novelty = -tl.sum(key * before, 0) / (long * one)
        tl.debug_barrier()
        tl.store(sum_at, before + key, mask=d < tl.where(real, D, 0))
    tl.store(window_novelty + tl.maximum(place, 0) * K + head, novelty, mask=in_window)
    tl.debug_barrier()  # other threads read the token from the memory

    # Queries, in halves, scaled.
    g = tl.arange(0, BLOCK_Q)
    h, u = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_U)
    asking = (g < G)[:, None] & (h < D // 2)[None, :]
    from_q = q_rotated + row * q_rotated_row + (head * G + g)[:, None] * D + h[None, :]
    q_low = tl.load(from_q, mask=asking, other=0.0).to(tl.float32)
    q_high = tl.load(from_q + D // 2, mask=asking, other=0.0).to(tl.float32)
    if CODED:
        divisor = key_scale + head * D + h
        q_low = q_low / _in_type(tl.load(divisor, mask=h < D // 2, other=1.0), TYPE)[None, :]
        q_high = q_high / _in_type(tl.load(divisor + D // 2, mask=h < D // 2, other=1.0), TYPE)[None, :]
    q_low *= scale
    q_high *= scale
    asker = (row * K + head) * G + g
    low: tl.constexpr = float("-inf")
    top = tl.full([BLOCK_Q], low, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    y_low = tl.zeros([BLOCK_Q, BLOCK_U], tl.float32)
    y_high = tl.zeros([BLOCK_Q, BLOCK_U], tl.float32)
    if SINKS > 0:
        m = tl.arange(0, BLOCK_M)
        seen = (m < SINKS) & (m - SINKS <= place)
        top, total, y_low, y_high, _ = _attend_piece(
            q_low, q_high, top, total, y_low, y_high, scores, asker, 0, sink_k, sink_k_scale, sink_v,
            sink_v_scale, head, m, seen, softcap, K, D, V, P, G, NEAR_BITS, HAS_SOFTCAP, OPERAND,
            BLOCK_H, BLOCK_U, BLOCK_Q, BLOCK_M,
        )  # fmt: skip
    for first in range(0, ROOM, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        there = (n < ROOM) & (n <= place)
        top, total, y_low, y_high, _ = _attend_piece(
            q_low, q_high, top, total, y_low, y_high, scores, asker, SINKS, window_k, window_k_scale,
            window_v, window_v_scale, head, n, there, softcap, K, D, V, P, G, NEAR_BITS, HAS_SOFTCAP,
            OPERAND, BLOCK_H, BLOCK_U, BLOCK_Q, BLOCK_N,
        )  # fmt: skip

    # Slots in 4 bits are turned, so the queries are too, and the sum of values is turned back.
    s_low = tl.zeros([BLOCK_Q, BLOCK_U], tl.float32)
    s_high = tl.zeros([BLOCK_Q, BLOCK_U], tl.float32)
    if SLOT_BITS == 4:
        q_low, q_high = _turned_halves(q_low, q_high, D, BLOCK_H, OPERAND)
    for first in range(0, SLOTS, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        there = n < SLOTS
        there = there & (tl.load(slot_number + n * K + head, mask=there, other=0) != 0)
        top, total, s_low, s_high, shrink = _attend_piece(
            q_low, q_high, top, total, s_low, s_high, scores, asker, SINKS + ROOM, slot_k, slot_k_scale,
            slot_v, slot_v_scale, head, n, there, softcap, K, D, V, P, G, SLOT_BITS,
            HAS_SOFTCAP, OPERAND, BLOCK_H, BLOCK_U, BLOCK_Q, BLOCK_N,
        )  # fmt: skip
        y_low *= shrink[:, None]
        y_high *= shrink[:, None]
    if SLOT_BITS == 4:
        s_low, s_high = _turned_halves(s_low, s_high, V, BLOCK_U, OPERAND)
    inverse = 1.0 / total
    answer = out + asker[:, None] * V + u[None, :]
    answered = (g < G)[:, None] & (u < V // 2)[None, :]
    tl.store(answer, ((y_low + s_low) * inverse[:, None]).to(out.dtype.element_ty), mask=answered)
    tl.store(answer + V // 2, ((y_high + s_high) * inverse[:, None]).to(out.dtype.element_ty), mask=answered)

    # What the tokens received.
    tl.debug_barrier()  # other threads read the scores back
    for first in range(0, ROOM, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        there = (n < ROOM) & (n <= place)
        distant = place - n >= tl.where(real, W // 4, P)
        _receive(window_received, scores, asker, SINKS, n, there, distant, top, total, head, K, P, G, BLOCK_Q)
    for first in range(0, SLOTS, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        there = n < SLOTS
        there = there & (tl.load(slot_number + n * K + head, mask=there, other=0) != 0)
        counting = n >= tl.where(real, 0, P)
        _receive(slot_received, scores, asker, SINKS + ROOM, n, there, counting, top, total, head, K, P, G, BLOCK_Q)


__all__ = ["_bfloat16", "_half", "_in_type", "_nearest", "_turned_halves", "landmark_step_kernel", "tl", "triton"]
