"""The kernels before and after those that read a text with landmarks: one lays tokens out, rounded to what their codes
stand for, and one writes window, sinks and slots in codes. One program per tile of tokens, key/value head, and keys or
values.

The pool `[sinks, slots, text, leaving]` is that of `landmark_choose_kernel.py`. Tiles do not cross its parts.
"""

from linearize_kernels.landmark_kernel import _bfloat16, _half, _in_type, _level, _nearest, _turned_halves, tl, triton
from linearize_kernels.landmark_merge_kernel import _coded, _store_coded


@triton.jit
def _scales_of(low, high):
    """The scales of tokens in 8 bits, `[N]`, from the halves of their channels."""
    most = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    scale = _bfloat16(tl.maximum(most * (1.0 / 127.0), 1e-30))
    return tl.where(tl.sum(low - low + high - high, 1) == 0.0, scale, float("nan"))


@triton.jit
def _new_half(
    x, at, token, head, h, there, key_scale, key_shift, HALF: tl.constexpr, D: tl.constexpr, CODED: tl.constexpr
):  # fmt: skip
    """One half of the channels of new tokens, `[N, H]`, keys as they are coded."""
    d = HALF * (D // 2) + h
    inside = h < D // 2
    held = tl.load(x + at[:, None] * token + (head * D + d)[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    values = held.to(tl.float32)
    if CODED:
        # As in `landmark_step_kernel`.
        TYPE: tl.constexpr = x.dtype.element_ty
        scale = _in_type(tl.load(key_scale + head * D + d, mask=inside, other=0.0), TYPE)
        shift = _in_type(tl.load(key_shift + head * D + d, mask=inside, other=0.0), TYPE)
        values = tl.where(there[:, None], _in_type(shift[None, :] + scale[None, :] * values, TYPE), 0.0)
    return values


@triton.jit
def _rounded(low, high):
    """Turned tokens, in halves, as 4 bits store them."""
    low, high, scale = _coded(low, high)
    return _level(low) * scale[:, None], _level(high) * scale[:, None]


@triton.jit
def _store_pieces(x, into, inside, D: tl.constexpr, PIECES: tl.constexpr):
    """Write numbers as operands, and with two pieces what operands leave of them `D` entries further on."""
    first = x.to(into.dtype.element_ty)
    tl.store(into, first, mask=inside)
    if PIECES == 2:
        tl.store(into + D, (x - first.to(tl.float32)).to(into.dtype.element_ty), mask=inside)


@triton.jit
def _pool_tile(
    x, token, key_scale, key_shift, plain, plain_token, inputs,
    sink, sink_scale, near, near_scale, slot, slot_scale, pool,
    tile, head, count, filled, offset, length, places, slots, leaving, input_token,
    K: tl.constexpr, D: tl.constexpr, SINKS: tl.constexpr, NEAR_BITS: tl.constexpr, SLOT_BITS: tl.constexpr,
    CODED: tl.constexpr, LEARNED: tl.constexpr, KEYS: tl.constexpr, PIECES: tl.constexpr,
    OPERAND: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of a row's pool, of keys or values."""
    n, h = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_H)
    sink_tiles = (SINKS + BLOCK_N - 1) // BLOCK_N
    slot_tiles = (slots + BLOCK_N - 1) // BLOCK_N
    text_tiles = (places + BLOCK_N - 1) // BLOCK_N
    in_sinks = tile < sink_tiles
    in_slots = (tile >= sink_tiles) & (tile < sink_tiles + slot_tiles)
    leaves = tile >= sink_tiles + slot_tiles + text_tiles
    start = tl.where(in_sinks, 0, tl.where(in_slots, sink_tiles, sink_tiles + slot_tiles))
    start = tl.where(leaves, sink_tiles + slot_tiles + text_tiles, start)
    at = (tile - start) * BLOCK_N + n  # within the part
    ahead = tl.where(in_sinks, 0, tl.where(in_slots, SINKS, SINKS + slots))
    ahead = tl.where(leaves, SINKS + slots + places, ahead)
    size = tl.where(in_sinks, SINKS, tl.where(in_slots, slots, places))
    size = tl.where(leaves, leaving, size)
    inside = at < size
    into = pool + (ahead + at).to(tl.int64)[:, None] * (K * PIECES * D) + (head * PIECES * D + h)[None, :]
    mask = inside[:, None] & (h < D // 2)[None, :]
    if in_slots:
        there = inside & (at < filled)
        where = (at * K + head).to(tl.int64)
        low = _half(slot, slot_scale, where, h, there, 0, D, SLOT_BITS)
        high = _half(slot, slot_scale, where, h, there, 1, D, SLOT_BITS)
        if SLOT_BITS == 4:
            low, high = _turned_halves(low, high, D, BLOCK_H, OPERAND)
        _store_pieces(low, into, mask, D, PIECES)
        _store_pieces(high, into + D // 2, mask, D, PIECES)
    else:
        order = at - tl.where(in_sinks, count, offset)  # among the new tokens
        arrives = inside & (order >= 0) & (order < length)
        fresh = order.to(tl.int64)
        low = _new_half(x, fresh, token, head, h, arrives, key_scale, key_shift, 0, D, CODED)
        high = _new_half(x, fresh, token, head, h, arrives, key_scale, key_shift, 1, D, CODED)
        if NEAR_BITS == 8:
            scale = _scales_of(low, high)[:, None]
            low, high = _nearest(low / scale) * scale, _nearest(high / scale) * scale
        where = (at * K + head).to(tl.int64)
        held = inside & (order < tl.where(in_sinks, 0, -2147483648))
        if SINKS > 0:
            low += _half(sink, sink_scale, where, h, held, 0, D, NEAR_BITS)
            high += _half(sink, sink_scale, where, h, held, 1, D, NEAR_BITS)
        held = inside & (order < tl.where(in_sinks, -2147483648, 0))
        low += _half(near, near_scale, where, h, held, 0, D, NEAR_BITS)
        high += _half(near, near_scale, where, h, held, 1, D, NEAR_BITS)
        if LEARNED:
            first, second = low, high
            if KEYS:
                first = _new_half(plain, fresh, plain_token, head, h, arrives, plain, plain, 0, D, False)
                second = _new_half(plain, fresh, plain_token, head, h, arrives, plain, plain, 1, D, False)
            given = inputs + fresh[:, None] * input_token + (head * D + h)[None, :]
            told = (arrives & (at < tl.where(leaves, 0, size)))[:, None] & (h < D // 2)[None, :]
            tl.store(given, first, mask=told)
            tl.store(given + D // 2, second, mask=told)
        if SLOT_BITS == 4:  # noqa: SIM102 - this is the compiler's condition
            if leaves:
                low, high = _turned_halves(low, high, D, BLOCK_H, OPERAND)
                low, high = _rounded(low, high)
                low, high = _turned_halves(low, high, D, BLOCK_H, OPERAND)
        _store_pieces(low, into, mask, D, PIECES)
        _store_pieces(high, into + D // 2, mask, D, PIECES)


# Scalars that vary with prompt or layer; Triton compiles no program of its own for some of their values.
_VARYING = ["places", "slots", "before", "offset", "sink_row", "near_row", "slot_row"]


@triton.jit(do_not_specialize=[*_VARYING, "length", "leaving", "tiles"])
def landmark_pool_kernel(
    k_rotated, v, k, key_scale, key_shift, inputs, pool_k, pool_v,
    sink_k, sink_k_scale, sink_v, sink_v_scale, near_k, near_k_scale, near_v, near_v_scale,
    slot_k, slot_k_scale, slot_v, slot_v_scale, before, offset,
    k_rotated_row, k_rotated_token, v_row, v_token, k_row, k_token, sink_row, near_row, slot_row,
    length, places, slots, leaving, tiles,
    K: tl.constexpr, D: tl.constexpr, V: tl.constexpr, SINKS: tl.constexpr, BLOCK: tl.constexpr,
    NEAR_BITS: tl.constexpr, SLOT_BITS: tl.constexpr,
    RAGGED: tl.constexpr, CODED: tl.constexpr, LEARNED: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    OPERAND: tl.constexpr = tl.float32 if WHOLE else tl.bfloat16
    PACKED: tl.constexpr = 2 if SLOT_BITS == 4 else 1
    row = tl.program_id(0).to(tl.int64) // tiles
    tile, head = tl.program_id(0) % tiles, tl.program_id(1)
    merged, first = before, offset
    if RAGGED:
        merged, first = tl.load(before + row).to(tl.int32), tl.load(offset + row).to(tl.int32)
    filled = tl.minimum(merged * BLOCK, slots)
    count = first + SINKS + merged * BLOCK  # tokens before the new ones
    whole = SINKS + slots + places + leaving
    inputs += row * length * (K * (D + V))
    if tl.program_id(2) == 0:
        _pool_tile(
            k_rotated + row * k_rotated_row, k_rotated_token, key_scale, key_shift, k + row * k_row, k_token, inputs,
            sink_k + row * sink_row * D, sink_k_scale + row * sink_row,
            near_k + row * near_row * D, near_k_scale + row * near_row,
            slot_k + row * slot_row * (D // PACKED), slot_k_scale + row * slot_row,
            pool_k + row * whole * (K * PIECES * D),
            tile, head, count, filled, first, length, places, slots, leaving, K * (D + V),
            K, D, SINKS, NEAR_BITS, SLOT_BITS, CODED, LEARNED, True, PIECES, OPERAND, BLOCK_H, BLOCK_N,
        )  # fmt: skip
    else:
        _pool_tile(
            v + row * v_row, v_token, key_scale, key_shift, v, v_token, inputs + K * D,
            sink_v + row * sink_row * V, sink_v_scale + row * sink_row,
            near_v + row * near_row * V, near_v_scale + row * near_row,
            slot_v + row * slot_row * (V // PACKED), slot_v_scale + row * slot_row,
            pool_v + row * whole * (K * PIECES * V),
            tile, head, count, filled, first, length, places, slots, leaving, K * (D + V),
            K, V, SINKS, NEAR_BITS, SLOT_BITS, False, LEARNED, False, PIECES, OPERAND, BLOCK_U, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _pooled_half(pool, at, head, h, there, HALF: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr):
    """One half of the channels of tokens of a pool, `[N, H]` float32."""
    mask = there[:, None] & (h < D // 2)[None, :]
    where = pool + at.to(tl.int64)[:, None] * (K * PIECES * D) + (head * PIECES * D + HALF * (D // 2) + h)[None, :]
    x = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    if PIECES == 2:
        x += tl.load(where + D, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _store_near(
    low, high, into, into_scale, at, h, there, D: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Write tokens at rows `at`; `into` has 8 bits or the model's dtype."""
    mask = there[:, None] & (h < D // 2)[None, :]
    where = into + at[:, None] * D + h[None, :]
    if BITS == 8:
        scale = _scales_of(low, high)
        tl.store(into_scale + at, scale.to(into_scale.dtype.element_ty), mask=there)
        low, high = _nearest(low / scale[:, None]), _nearest(high / scale[:, None])
    tl.store(where, low.to(into.dtype.element_ty), mask=mask)
    tl.store(where + D // 2, high.to(into.dtype.element_ty), mask=mask)


@triton.jit
def _keep_tile(
    pool, sink, sink_scale, near, near_scale, slot, slot_scale, table,
    part, at, head, done, count, end, merged, slots,
    K: tl.constexpr, D: tl.constexpr, SINKS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
    NEAR_BITS: tl.constexpr, SLOT_BITS: tl.constexpr, PIECES: tl.constexpr,
    OPERAND: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of a row's sinks (part 0), window (1) or slots (2), of keys or values."""
    h, where = tl.arange(0, BLOCK_H), (at * K + head).to(tl.int64)
    if part == 2:
        origin = tl.load(table + at, mask=at < slots, other=-1)
        comes = origin >= slots  # the others are there
        low = _pooled_half(pool, SINKS + origin, head, h, comes, 0, K, D, PIECES)
        high = _pooled_half(pool, SINKS + origin, head, h, comes, 1, K, D, PIECES)
        if SLOT_BITS == 4:
            _store_coded(low, high, slot, slot_scale, where, comes, D, OPERAND, BLOCK_H)
        else:
            _store_near(low, high, slot, slot_scale, where, h, comes, D, SLOT_BITS)
    elif part == 1:
        place = at + done * BLOCK
        there = (at < ROOM) & (place < end)
        low = _pooled_half(pool, SINKS + slots + place, head, h, there, 0, K, D, PIECES)
        high = _pooled_half(pool, SINKS + slots + place, head, h, there, 1, K, D, PIECES)
        _store_near(low, high, near, near_scale, where, h, at < ROOM, D, NEAR_BITS)
    elif SINKS > 0:
        comes = (at < SINKS) & (at >= count) & (at < end + SINKS + merged * BLOCK)
        low = _pooled_half(pool, at, head, h, comes, 0, K, D, PIECES)
        high = _pooled_half(pool, at, head, h, comes, 1, K, D, PIECES)
        _store_near(low, high, sink, sink_scale, where, h, comes, D, NEAR_BITS)


@triton.jit(do_not_specialize=[*_VARYING, "merges", "end", "novelty_row"])
def landmark_keep_kernel(
    pool_k, pool_v, table, novelty, received, static, number,
    sink_k, sink_k_scale, sink_v, sink_v_scale,
    near_k, near_k_scale, near_v, near_v_scale, near_novelty, near_received,
    slot_k, slot_k_scale, slot_v, slot_v_scale, slot_novelty, slot_received, slot_number,
    before, offset, total, pool_row, v_row, novelty_row, sink_row, near_row, slot_row, end, places, slots, merges,
    K: tl.constexpr, D: tl.constexpr, V: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, BLOCK: tl.constexpr,
    NEAR_BITS: tl.constexpr, SLOT_BITS: tl.constexpr,
    RAGGED: tl.constexpr, HAS_TOTAL: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    OPERAND: tl.constexpr = tl.float32 if WHOLE else tl.bfloat16
    PACKED: tl.constexpr = 2 if SLOT_BITS == 4 else 1
    ROOM: tl.constexpr = W + BLOCK - 1
    SINK_TILES: tl.constexpr = (SINKS + BLOCK_N - 1) // BLOCK_N
    NEAR_TILES: tl.constexpr = (ROOM + BLOCK_N - 1) // BLOCK_N
    tiles = SINK_TILES + NEAR_TILES + (slots + BLOCK_N - 1) // BLOCK_N
    row = tl.program_id(0).to(tl.int64) // tiles
    tile, head = tl.program_id(0) % tiles, tl.program_id(1)
    merged, first, stop = before, offset, end
    if RAGGED:
        merged, first = tl.load(before + row).to(tl.int32), tl.load(offset + row).to(tl.int32)
    if HAS_TOTAL:
        stop = tl.load(total + row).to(tl.int32)
    done = tl.minimum(tl.maximum(stop - W, 0) // BLOCK, merges)
    count = first + SINKS + merged * BLOCK
    part = tl.where(tile < SINK_TILES, 0, tl.where(tile < SINK_TILES + NEAR_TILES, 1, 2))
    tile -= tl.where(part == 0, 0, tl.where(part == 1, SINK_TILES, SINK_TILES + NEAR_TILES))
    at = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mine = row * K + head
    table += (mine * (merges + 1) + merges) * slots
    if tl.program_id(2) == 0:
        _keep_tile(
            pool_k + row * pool_row, sink_k + row * sink_row * D, sink_k_scale + row * sink_row,
            near_k + row * near_row * D, near_k_scale + row * near_row,
            slot_k + row * slot_row * (D // PACKED), slot_k_scale + row * slot_row,
            table, part, at, head, done, count, stop, merged, slots,
            K, D, SINKS, ROOM, BLOCK, NEAR_BITS, SLOT_BITS, PIECES, OPERAND, BLOCK_H, BLOCK_N,
        )  # fmt: skip
        received += mine * (slots + places)
        if part == 2:
            there, to = at < slots, (row * slots + at) * K + head
            tl.store(slot_received + to, tl.load(received + at, mask=there), mask=there)
            static += mine * (slots + merges * BLOCK)
            tl.store(slot_novelty + to, tl.load(static + at, mask=there), mask=there)
            tl.store(slot_number + to, tl.load(number + mine * slots + at, mask=there), mask=there)
        elif part == 1:
            place, to = at + done * BLOCK, (row * ROOM + at) * K + head
            there = (at < ROOM) & (place < stop)
            attention = tl.load(received + slots + place, mask=there, other=0.0)
            tl.store(near_received + to, attention, mask=at < ROOM)
            fresh = tl.load(novelty + row * novelty_row + place * K + head, mask=there, other=0.0)
            tl.store(near_novelty + to, fresh, mask=at < ROOM)
    else:
        _keep_tile(
            pool_v + row * v_row, sink_v + row * sink_row * V, sink_v_scale + row * sink_row,
            near_v + row * near_row * V, near_v_scale + row * near_row,
            slot_v + row * slot_row * (V // PACKED), slot_v_scale + row * slot_row,
            table, part, at, head, done, count, stop, merged, slots,
            K, V, SINKS, ROOM, BLOCK, NEAR_BITS, SLOT_BITS, PIECES, OPERAND, BLOCK_U, BLOCK_N,
        )  # fmt: skip
