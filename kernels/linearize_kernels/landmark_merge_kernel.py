"""The kernel that merges a block into the slots: one program per row and key/value head.

It ranks slots and block, gives the kept tokens of the block the places of the slots that lose theirs, and moves the
window on by a block. Rows whose next token merges no block do not change.
"""

from linearize_kernels.landmark_kernel import _bfloat16, _half, _level, _nearest, _turned_halves, tl, triton


@triton.jit
def _leaving(novelty, j, there, head, K: tl.constexpr, SPAN: tl.constexpr, REACH: tl.constexpr):
    """The static scores of the block's tokens `j`: the mean over `REACH` tokens on either side."""
    total = j.to(tl.float32) * 0.0
    count = total
    for offset in range(-REACH, REACH + 1):
        at = j + offset
        inside = there & (at >= 0) & (at < SPAN)
        total += tl.load(novelty + at * K + head, mask=inside, other=0.0)
        count += tl.where(inside, 1.0, 0.0)
    return total / tl.maximum(count, 1.0)


@triton.jit
def _standardised(x, exists, count, least):
    apart = tl.where(exists, x - tl.sum(tl.where(exists, x, 0.0), 0) / count, 0.0)
    return apart / tl.maximum(tl.sqrt(tl.sum(apart * apart, 0) / count), least)


@triton.jit
def _ranks(
    c, novelty, received, number, newest, weight, slots, W: tl.constexpr, BLOCK: tl.constexpr, FADING: tl.constexpr,
    LEAST_ATTENTION: tl.constexpr, LEAST_SPREAD: tl.constexpr, MOST_AGAINST: tl.constexpr,
):  # fmt: skip
    """The ranks of the candidates `c`: the slots, then the block. Empty slots come first, and places that hold no
    candidate last.

    `number` is 0 for empty slots and places without a candidate; `newest` is that of the block's last token."""
    is_new = (c >= slots) & (c < slots + BLOCK)
    age = ((newest - number) // BLOCK).to(tl.float32)
    span = (W - W // 4 + BLOCK // 2) * 1.0
    faded = tl.exp2(age * tl.log2(age * 0.0 + FADING))
    queries = tl.where(is_new, span, faded * span + BLOCK * (1.0 - faded) / (1.0 - FADING))
    attention = tl.log(received / queries + LEAST_ATTENTION)
    exists = number > 0
    there = tl.maximum(tl.sum(tl.where(exists, 1.0, 0.0), 0), 1.0)
    rank = _standardised(novelty, exists, there, LEAST_SPREAD)
    rank += weight * tl.maximum(_standardised(attention, exists, there, LEAST_SPREAD), -MOST_AGAINST)
    rank = tl.where(exists, rank, c.to(tl.float32) - 1e6)
    return tl.where(c < slots + BLOCK, rank, float("inf"))


@triton.jit
def _lowest(rank, COUNT: tl.constexpr):
    """1 for the `COUNT` lowest ranks, else 0; of equal ones the first are lower."""
    bits = rank.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    # The integer of the last of them, bit by bit.
    bound = tl.where(tl.sum((order < 0).to(tl.int32), 0) < COUNT, 0, -2147483648)
    for turn in range(31):
        higher = bound + (1 << (30 - turn))
        bound = tl.where(tl.sum((order < higher).to(tl.int32), 0) < COUNT, higher, bound)
    lower, equal = (order < bound).to(tl.int32), (order == bound).to(tl.int32)
    left = COUNT - tl.sum(lower, 0)
    return lower + tl.where(tl.cumsum(equal, 0) <= left, equal, 0)


@triton.jit
def _code(x):
    """The 4-bit numbers, -8 to 7, of channels in units of their scales."""
    square = x * x
    c = _nearest(x * ((square * (3.0 / 65536.0) - 1.0 / 128.0) * square + 21.0 / 16.0))
    return tl.minimum(tl.maximum(c, -8.0), 7.0)


@triton.jit
def _coded(low, high):
    """Turned tokens, in halves, in 4 bits: numbers of each half, -8 to 7, and scales `[BLOCK]`; see `codes.py`."""
    most, least = tl.maximum(tl.max(low, 1), tl.max(high, 1)), tl.minimum(tl.min(low, 1), tl.min(high, 1))
    scale = tl.where(most > -1.0003 * least, most, least) * (-1.0 / 8.0)
    scale = _bfloat16(tl.where(tl.abs(scale) < 1e-30, 1e-30, scale))
    finite = tl.sum(low - low + high - high, 1) == 0.0
    low, high = low / scale[:, None], high / scale[:, None]
    low_c, high_c = _code(low), _code(high)
    square = tl.sum(low * low + high * high, 1)
    common = tl.sum(low * _level(low_c) + high * _level(high_c), 1)
    scale *= tl.where(common > 0, square / common, 1.0)
    return low_c, high_c, tl.where(finite, _bfloat16(scale), float("nan"))


@triton.jit
def _store_coded(
    low, high, into, into_scale, at, there, D: tl.constexpr, OPERAND: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """Write tokens, in halves `[BLOCK, BLOCK_H]`, in 4 bits at rows `at`."""
    h = tl.arange(0, BLOCK_H)
    low, high = _turned_halves(low, high, D, BLOCK_H, OPERAND)
    low, high, scale = _coded(low, high)
    mask = there[:, None] & (h < D // 2)[None, :]
    codes = (low + 8.0).to(tl.int32) | ((high + 8.0).to(tl.int32) << 4)
    tl.store(into + at[:, None] * (D // 2) + h[None, :], codes.to(tl.uint8), mask=mask)
    tl.store(into_scale + at, scale.to(into_scale.dtype.element_ty), mask=there)


@triton.jit
def _move_tokens(
    x, x_scale, into, into_scale, source, to, there, head,
    K: tl.constexpr, D: tl.constexpr, NEAR_BITS: tl.constexpr, SLOT_BITS: tl.constexpr,
    OPERAND: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Copy the window's tokens `source` into the slots `to`."""
    from_at, to_at = source * K + head, to * K + head
    if SLOT_BITS == 4:
        h = tl.arange(0, BLOCK_H)
        low = _half(x, x_scale, from_at, h, there, 0, D, NEAR_BITS)
        high = _half(x, x_scale, from_at, h, there, 1, D, NEAR_BITS)
        _store_coded(low, high, into, into_scale, to_at, there, D, OPERAND, BLOCK_H)
    else:
        d = tl.arange(0, BLOCK_D)
        mask = there[:, None] & (d < D)[None, :]
        tl.store(into + to_at[:, None] * D + d[None, :], tl.load(x + from_at[:, None] * D + d[None, :], mask=mask),
                 mask=mask)  # fmt: skip
        if SLOT_BITS == 8:
            tl.store(into_scale + to_at, tl.load(x_scale + from_at, mask=there), mask=there)


@triton.jit
def _shift(x, head, K: tl.constexpr, D: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Move the tokens `[ROOM, K, D]` of a head to the front by a block; what is free becomes 0."""
    d = tl.arange(0, BLOCK_D)
    for first in range(0, ROOM, BLOCK):
        n = first + tl.arange(0, BLOCK)
        at = x + (n * K + head)[:, None] * D + d[None, :]
        inside = (d < D)[None, :]
        held = tl.load(at + BLOCK * K * D, mask=inside & (n + BLOCK < ROOM)[:, None], other=0)
        tl.debug_barrier()
        tl.store(at, held, mask=inside & (n < ROOM)[:, None])


@triton.jit
def landmark_merge_kernel(
    window_k, window_k_scale, window_v, window_v_scale, window_novelty, window_received,
    slot_k, slot_k_scale, slot_v, slot_v_scale, slot_novelty, slot_received, slot_number,
    places, counts, lengths, window_row, slot_row, weight,
    K: tl.constexpr, D: tl.constexpr, V: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK: tl.constexpr, NEAR_BITS: tl.constexpr, SLOT_BITS: tl.constexpr, REACH: tl.constexpr,
    FADING: tl.constexpr, LEAST_ATTENTION: tl.constexpr, LEAST_SPREAD: tl.constexpr,
    MOST_AGAINST: tl.constexpr, HAS_LENGTHS: tl.constexpr, WHOLE: tl.constexpr, CANDIDATES: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    OPERAND: tl.constexpr = tl.float32 if WHOLE else tl.bfloat16
    ROOM: tl.constexpr = W + BLOCK - 1
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    count = tl.load(counts + row).to(tl.int32)
    left = count + 1 - W - SINKS
    if HAS_LENGTHS:
        left = tl.where(tl.load(lengths + row) > 0, left, 0)
    if (left >= BLOCK) & (left % BLOCK == 0):
        before = left // BLOCK - 1
        window_k, window_v = window_k + row * window_row * D, window_v + row * window_row * V
        window_k_scale, window_v_scale = window_k_scale + row * window_row, window_v_scale + row * window_row
        PACKED: tl.constexpr = 2 if SLOT_BITS == 4 else 1
        slot_k, slot_v = slot_k + row * slot_row * (D // PACKED), slot_v + row * slot_row * (V // PACKED)
        slot_k_scale, slot_v_scale = slot_k_scale + row * slot_row, slot_v_scale + row * slot_row
        window_novelty, window_received = window_novelty + row * ROOM * K, window_received + row * ROOM * K
        slot_novelty, slot_received = slot_novelty + row * SLOTS * K, slot_received + row * SLOTS * K
        slot_number += row * SLOTS * K
        places += (row * K + head) * 2 * BLOCK

        # Ranks: the slots first, then the block.
        c = tl.arange(0, CANDIDATES)
        j = c - SLOTS
        is_slot = c < SLOTS
        is_new = (j >= 0) & (j < BLOCK)
        at = c * K + head
        first = SINKS + 1 + before * BLOCK
        number = tl.load(slot_number + at, mask=is_slot, other=0)
        number = tl.where(is_new, first + j, number)
        novelty = tl.load(slot_novelty + at, mask=is_slot, other=0.0)
        SPAN: tl.constexpr = BLOCK + (REACH if REACH < W else W - 1)
        static = _leaving(window_novelty, j, is_new, head, K, SPAN, REACH)
        novelty += tl.where(is_new, static, 0.0)
        received = tl.load(slot_received + at, mask=is_slot, other=0.0)
        received += tl.load(window_received + j * K + head, mask=is_new, other=0.0)
        rank = _ranks(
            c, novelty, received, number, first + BLOCK - 1, weight, SLOTS, W, BLOCK, FADING, LEAST_ATTENTION,
            LEAST_SPREAD, MOST_AGAINST,
        )  # fmt: skip

        # The block's number of tokens of lowest rank go; the kept ones of the block take their places in order.
        lost = _lowest(rank, BLOCK)
        leaves, stays = tl.where(is_slot, lost, 0), tl.where(is_new, 1 - lost, 0)
        tl.store(places + tl.cumsum(leaves, 0) - 1, c, mask=leaves > 0)
        tl.store(places + BLOCK + tl.cumsum(stays, 0) - 1, j, mask=stays > 0)
        moved = tl.sum(stays, 0)
        tl.store(slot_received + at, received * FADING, mask=is_slot & (lost == 0))
        tl.debug_barrier()
        i = tl.arange(0, BLOCK)
        moves = i < moved
        to = tl.load(places + i, mask=moves, other=0)
        source = tl.load(places + BLOCK + i, mask=moves, other=0)
        to_at = to * K + head
        given = _leaving(window_novelty, source, moves, head, K, SPAN, REACH)
        tl.store(slot_novelty + to_at, given, mask=moves)
        given = tl.load(window_received + source * K + head, mask=moves, other=0.0)
        tl.store(slot_received + to_at, given * FADING, mask=moves)
        tl.store(slot_number + to_at, first + source, mask=moves)
        _move_tokens(
            window_k, window_k_scale, slot_k, slot_k_scale, source, to, moves, head, K, D, NEAR_BITS,
            SLOT_BITS, OPERAND, BLOCK, BLOCK_D, BLOCK_H,
        )  # fmt: skip
        _move_tokens(
            window_v, window_v_scale, slot_v, slot_v_scale, source, to, moves, head, K, V, NEAR_BITS,
            SLOT_BITS, OPERAND, BLOCK, BLOCK_V, BLOCK_U,
        )  # fmt: skip
        tl.debug_barrier()
        _shift(window_k, head, K, D, ROOM, BLOCK, BLOCK_D)
        _shift(window_v, head, K, V, ROOM, BLOCK, BLOCK_V)
        if NEAR_BITS == 8:
            _shift(window_k_scale, head, K, 1, ROOM, BLOCK, 1)
            _shift(window_v_scale, head, K, 1, ROOM, BLOCK, 1)
        _shift(window_novelty, head, K, 1, ROOM, BLOCK, 1)
        _shift(window_received, head, K, 1, ROOM, BLOCK, 1)
