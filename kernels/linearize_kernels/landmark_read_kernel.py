"""The kernel that reads for a whole text with slots: one program per row, block of queries and key/value head.

The tokens of a block are gathered through the table that `landmark_choose_kernel.py` writes.
"""

from linearize_kernels.landmark_choose_kernel import (
    VARYING,
    _add_scores,
    _kept,
    _near,
    _pool_scores,
    _queries_at,
    _tokens_at,
)
from linearize_kernels.landmark_kernel import tl, triton


@triton.jit
def _add_values(
    weights, pool_v, at, u, y, V: tl.constexpr, V_ROW: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    weights = weights.to(pool_v.dtype.element_ty)
    y = tl.dot(weights, _tokens_at(pool_v, at, u, V, V_ROW, BLOCK_V), y, input_precision=PRECISION)
    if PIECES == 2:
        y = tl.dot(weights, _tokens_at(pool_v + V, at, u, V, V_ROW, BLOCK_V), y)
    return y


@triton.jit(do_not_specialize=[*VARYING, "tiles"])
def landmark_read_kernel(
    q, pool, pool_v, table, out, logs, before,
    q_row, q_token, q_head, pool_row, v_row, scale, factor, softcap,
    first, length, places, slots, merges, start, ahead, tiles,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, W: tl.constexpr, SINKS: tl.constexpr,
    BLOCK: tl.constexpr, RAGGED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LOGS: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    ROOM: tl.constexpr = W + BLOCK - 1
    WIDTH: tl.constexpr = PIECES * D
    ROW: tl.constexpr = K * WIDTH
    V_ROW: tl.constexpr = K * PIECES * V
    row = tl.program_id(0).to(tl.int64) // tiles
    tile = start + (tl.program_id(0) % tiles)
    head = tl.program_id(1)
    block = tl.maximum(tile, 0)
    q += row * q_row + head * G * q_head
    pool += row * pool_row + head * WIDTH
    pool_v += row * v_row + head * PIECES * V
    table += ((row * K + head) * (merges + 1) + block) * slots
    merged = before
    if RAGGED:
        merged = tl.load(before + row).to(tl.int32)
    filled = tl.minimum(slots, (merged + block) * BLOCK)
    d, u, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    i = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    place = W - 1 + tile * BLOCK + i // G
    inside = (i < BLOCK * G) & (place >= first) & (place < first + length)
    queries = _queries_at(q, place - first, i % G, inside, d, q_token, q_head, D, WIDTH)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_Q], tl.float32)
    y = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    for column in range(0, SINKS + ROOM, BLOCK_N):
        at, reads = _near(column + n, block, slots, places, SINKS, ROOM, BLOCK)
        found = _pool_scores(queries, pool, at, d, scale, softcap, WIDTH, ROW, False, HAS_SOFTCAP, PRECISION,
                             BLOCK_D)  # fmt: skip
        found = tl.where(reads[None, :] <= place[:, None], found, float("-inf"))
        weights, shrink, top, mass = _add_scores(found, top, mass, factor)
        y = _add_values(weights, pool_v, at, u, y * shrink[:, None], V, V_ROW, PIECES, PRECISION, BLOCK_V)
    for slot in range(0, filled, BLOCK_N):
        at = _kept(slot + n, table, filled, slots, ahead, SINKS)
        found = _pool_scores(queries, pool, at, d, scale, softcap, WIDTH, ROW, False, HAS_SOFTCAP, PRECISION,
                             BLOCK_D)  # fmt: skip
        found = tl.where((slot + n < filled)[None, :], found, float("-inf"))
        weights, shrink, top, mass = _add_scores(found, top, mass, factor)
        y = _add_values(weights, pool_v, at, u, y * shrink[:, None], V, V_ROW, PIECES, PRECISION, BLOCK_V)
    asker = ((row * length + place - first) * K + head) * G + i % G
    mass = tl.where(inside, mass, 1.0)
    answer = out + asker[:, None] * V + u[None, :]
    tl.store(answer, y / mass[:, None], mask=inside[:, None] & (u < V)[None, :])
    if LOGS:
        tl.store(logs + asker, (top * factor + tl.log2(mass)) * 0.6931471805599453, mask=inside)
