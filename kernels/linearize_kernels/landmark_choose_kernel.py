"""The kernel that chooses the tokens in the slots for a whole text: one program per row and key/value head.

A program goes from block to block, because each merge needs the attention that the queries before it paid. Between two
merges it makes two passes over the keys: the first finds each query's softmax, the second sums weights by key. Weights
by key cannot be rescaled as those by query are, because each query has its own scale; and scores of a block kept in
memory would be more to move than its keys.

Tokens have an origin: 0 to N - 1 for those in the slots at the start, N + p for place p of the text. They lie in a pool
`[sinks, slots, text, leaving]`, whose last part holds the text's tokens as the slots store them, if they differ.
"""

from linearize_kernels.landmark_kernel import tl, triton
from linearize_kernels.landmark_merge_kernel import _lowest, _ranks
from linearize_kernels.step_kernel import _tanh

# Scalars that vary with the prompt; Triton compiles no program of its own for some of their values.
VARYING = ["first", "length", "places", "slots", "merges", "start", "ahead", "before", "offset"]


@triton.jit
def _near(j, block, slots, places, SINKS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr):
    """Sinks and window of a block, side by side: the rows in the pool, and the first places whose queries read them."""
    place = tl.where(j < SINKS, j, block * BLOCK + j) - SINKS
    there = (j < SINKS + ROOM) & (place < places)
    at = tl.where(there & (j >= SINKS), SINKS + slots + place, tl.minimum(j, SINKS))
    return at, tl.where(there, place, 2147483647)


@triton.jit
def _kept(n, table, filled, slots, ahead, SINKS: tl.constexpr):
    """The rows in the pool of the tokens in the slots `n`."""
    origin = tl.load(table + n, mask=n < filled, other=0)
    return SINKS + origin + tl.where(origin >= slots, ahead, 0)


@triton.jit
def _tokens_at(x, at, d, WIDTH: tl.constexpr, ROW: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `at` of a pool, `[N, BLOCK_D]`."""
    where = x + at.to(tl.int64)[:, None] * ROW + d[None, :]
    if BLOCK_D == WIDTH:
        return tl.load(where)
    return tl.load(where, mask=(d < WIDTH)[None, :], other=0.0)


@triton.jit
def _queries_at(q, at, member, inside, d, q_token, q_head, D: tl.constexpr, WIDTH: tl.constexpr):
    """Queries `[Q, WIDTH]`, as often side by side as keys are."""
    where = q + at.to(tl.int64)[:, None] * q_token + member[:, None] * q_head + (d % D)[None, :]
    return tl.load(where, mask=inside[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def _pool_scores(
    queries, pool, at, d, scale, softcap, WIDTH: tl.constexpr, ROW: tl.constexpr, TURNED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of the keys `at`, `[queries, keys]`, or `[keys, queries]` if `TURNED`; without a softcap not scaled."""
    keys = _tokens_at(pool, at, d, WIDTH, ROW, BLOCK_D)
    if TURNED:
        found = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
    else:
        found = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    return softcap * _tanh(found * (scale / softcap)) if HAS_SOFTCAP else found


@triton.jit
def _add_scores(found, top, mass, factor):
    """Add `[Q, N]` scores to a running softmax: weights, what shrinks the sums so far, and the softmax. `factor` is
    what scores are scaled by, times log2(e)."""
    highest = tl.maximum(top, tl.max(found, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest) * factor
    shrink = tl.exp2(top * factor - safe)
    weights = tl.exp2(found * factor - safe[:, None])
    return weights, shrink, highest, mass * shrink + tl.sum(weights, 1)


@triton.jit
def _choose_block(
    table, received, novelty, number, lost, lists, first, place, weight, slots,
    W: tl.constexpr, BLOCK: tl.constexpr, FADING: tl.constexpr, LEAST_ATTENTION: tl.constexpr,
    LEAST_SPREAD: tl.constexpr, MOST_AGAINST: tl.constexpr, TELLS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Merge the block of the text at `place`, whose first token has the number `first`. `table` is the one before."""
    c = tl.arange(0, CANDIDATES)
    is_slot, is_new = c < slots, (c >= slots) & (c < slots + BLOCK)
    at = tl.where(is_slot, c, c + place)
    origin = tl.load(table + c, mask=is_slot, other=-1)
    origin = tl.where(is_new, at, origin)
    tokens = tl.load(number + c, mask=is_slot, other=0)
    tokens = tl.where(is_new, first + c - slots, tokens)
    static = tl.load(novelty + at, mask=is_slot | is_new, other=0.0)
    attention = tl.load(received + at, mask=is_slot | is_new, other=0.0)
    rank = _ranks(
        c, static, attention, tokens, first + BLOCK - 1, weight, slots, W, BLOCK, FADING, LEAST_ATTENTION,
        LEAST_SPREAD, MOST_AGAINST,
    )  # fmt: skip
    goes = _lowest(rank, BLOCK)
    turn = tl.cumsum(goes, 0) - goes  # tokens before it that go
    from_slots = tl.sum(tl.where(is_slot, goes, 0), 0)
    tl.store(lists + c - slots - turn + from_slots, at, mask=is_new & (goes == 0))
    if TELLS:
        tl.store(lists + BLOCK + turn, tokens, mask=goes > 0)
        tl.store(lists + 2 * BLOCK + turn, origin, mask=goes > 0)
    tl.debug_barrier()
    # The kept tokens of the block take the free places in order.
    free = is_slot & (goes > 0)
    comes = tl.load(lists + turn, mask=free, other=0)
    origin = tl.where(free, comes, origin)
    tl.store(table + slots + c, origin, mask=is_slot)
    tl.store(number + c, first + comes - slots - place, mask=free)
    tl.store(novelty + c, tl.load(novelty + comes, mask=free, other=0.0), mask=free)
    given = tl.load(received + comes, mask=free, other=0.0)
    tl.store(received + c, tl.where(free, given, attention) * FADING, mask=is_slot)
    if TELLS:
        # Those that go, in text order: empty slots, whose number is 0, first.
        i = tl.arange(0, BLOCK)
        mine, theirs = tl.load(lists + BLOCK + i)[:, None], tl.load(lists + BLOCK + i)[None, :]
        earlier = (theirs < mine) | ((theirs == mine) & (i[None, :] < i[:, None]))
        tl.store(lost + tl.sum(earlier.to(tl.int32), 1), tl.load(lists + 2 * BLOCK + i))


@triton.jit(do_not_specialize=VARYING)
def landmark_choose_kernel(
    q, pool, received, novelty, number, table, lost, lists, sums, before, offset, total,
    q_row, q_token, q_head, pool_row, scale, factor, softcap, weight,
    first, length, places, slots, merges, start, ahead,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr, BLOCK: tl.constexpr,
    FADING: tl.constexpr, LEAST_ATTENTION: tl.constexpr, LEAST_SPREAD: tl.constexpr, MOST_AGAINST: tl.constexpr,
    RAGGED: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TELLS: tl.constexpr,
    LAST: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr, CANDIDATES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    ROOM: tl.constexpr = W + BLOCK - 1
    NEAR: tl.constexpr = (SINKS + ROOM + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    WIDTH: tl.constexpr = PIECES * D
    ROW: tl.constexpr = K * WIDTH
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    mine = row * K + head
    q += row * q_row + head * G * q_head
    pool += row * pool_row + head * WIDTH
    received += mine * (slots + places)
    novelty += mine * (slots + merges * BLOCK)
    number += mine * slots
    table += mine * (merges + 1) * slots
    lost += mine * merges * BLOCK
    lists += mine * 3 * BLOCK
    sums += mine * (NEAR + CANDIDATES + BLOCK_N)
    end, merged, least = first + length, before, offset
    if RAGGED:
        merged, least = tl.load(before + row).to(tl.int32), tl.load(offset + row).to(tl.int32)
    if HAS_TOTAL:
        end = tl.load(total + row).to(tl.int32)
    own = tl.minimum(tl.maximum(end - W, 0) // BLOCK, merges)
    d, j, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)

    c = tl.arange(0, CANDIDATES)
    held = tl.load(number + c, mask=c < slots, other=0)
    tl.store(table + c, tl.where(held > 0, c, -1), mask=c < slots)
    for tile in range(start, own + 1):
        block = tl.maximum(tile, 0)
        tl.debug_barrier()
        if tile > 0:
            _choose_block(
                table + (tile - 1) * slots, received, novelty, number, lost + (tile - 1) * BLOCK, lists,
                SINKS + 1 + (merged + tile - 1) * BLOCK, (tile - 1) * BLOCK, weight, slots, W, BLOCK, FADING,
                LEAST_ATTENTION, LEAST_SPREAD, MOST_AGAINST, TELLS, CANDIDATES,
            )  # fmt: skip
            tl.debug_barrier()
        now = table + block * slots
        filled = tl.minimum(slots, (merged + block) * BLOCK)
        # Attention of the queries before the next merge.
        queries_left = BLOCK * G
        if not LAST:
            queries_left = tl.where(tile == merges, 0, BLOCK * G)
        for part in range(0, queries_left, BLOCK_Q):
            i = part + tl.arange(0, BLOCK_Q)
            place = W - 1 + tile * BLOCK + i // G
            inside = (i < BLOCK * G) & (place >= first) & (place < first + length)
            real = inside & (place >= least) & (place < end)
            queries = _queries_at(q, place - first, i % G, inside, d, q_token, q_head, D, WIDTH)
            top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
            mass = tl.zeros([BLOCK_Q], tl.float32)
            for column in range(0, SINKS + ROOM, BLOCK_N):
                at, reads = _near(column + n, block, slots, places, SINKS, ROOM, BLOCK)
                found = _pool_scores(queries, pool, at, d, scale, softcap, WIDTH, ROW, False, HAS_SOFTCAP, PRECISION,
                                     BLOCK_D)  # fmt: skip
                found = tl.where(reads[None, :] <= place[:, None], found, float("-inf"))
                _, _, top, mass = _add_scores(found, top, mass, factor)
            for slot in range(0, filled, BLOCK_N):
                at = _kept(slot + n, now, filled, slots, ahead, SINKS)
                found = _pool_scores(queries, pool, at, d, scale, softcap, WIDTH, ROW, False, HAS_SOFTCAP, PRECISION,
                                     BLOCK_D)  # fmt: skip
                found = tl.where((slot + n < filled)[None, :], found, float("-inf"))
                _, _, top, mass = _add_scores(found, top, mass, factor)
            log = tl.where(real, top * factor + tl.log2(tl.where(real, mass, 1.0)), float("inf"))
            for column in range(0, SINKS + ROOM, BLOCK_N):
                at, reads = _near(column + n, block, slots, places, SINKS, ROOM, BLOCK)
                found = _pool_scores(queries, pool, at, d, scale, softcap, WIDTH, ROW, True, HAS_SOFTCAP, PRECISION,
                                     BLOCK_D)  # fmt: skip
                counts = reads[:, None] <= place[None, :] - W // 4  # near queries do not count
                weights = tl.where(counts, tl.exp2(found * factor - log[None, :]), 0.0)
                tl.store(sums + column + n, tl.sum(weights, 1))
            for slot in range(0, filled, BLOCK_N):
                at = _kept(slot + n, now, filled, slots, ahead, SINKS)
                found = _pool_scores(queries, pool, at, d, scale, softcap, WIDTH, ROW, True, HAS_SOFTCAP, PRECISION,
                                     BLOCK_D)  # fmt: skip
                tl.store(sums + NEAR + slot + n, tl.sum(tl.exp2(found * factor - log[None, :]), 1))
            tl.debug_barrier()
            own_place = block * BLOCK + j
            counted = (j < ROOM) & (own_place < places)
            more = tl.load(sums + SINKS + j, mask=counted, other=0.0)
            to = received + slots + own_place
            tl.store(to, tl.load(to, mask=counted, other=0.0) + more, mask=counted)
            more = tl.load(sums + NEAR + c, mask=c < filled, other=0.0)
            tl.store(received + c, tl.load(received + c, mask=c < filled, other=0.0) + more, mask=c < filled)
            tl.debug_barrier()
    # Merges that the row's tokens do not reach.
    kept = tl.load(table + own * slots + c, mask=c < slots, other=-1)
    i = tl.arange(0, BLOCK)
    for block in range(own, merges):
        tl.store(table + (block + 1) * slots + c, kept, mask=c < slots)
        if TELLS:
            tl.store(lost + block * BLOCK + i, i * 0 - 1)
