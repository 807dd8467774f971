"""The backward kernels of Liger attention over the window and the exact columns; see `liger_mix` for the numbers of
queries."""

from __future__ import annotations

from linearize_kernels.liger_forward import columns_seen
from linearize_kernels.liger_mix import head_weights
from linearize_kernels.liger_tiles import VARYING, capped, open_tile, operand, tl, triton


@triton.jit
def attention_gradients(
    q,
    keys,
    values,
    dy,
    normaliser,
    delta,
    seen,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The weights of query rows over a tile of keys, and the gradients of their scores; `normaliser` and `delta` are
    `[X, 1]`. With queries and keys exchanged, and so `dy` and `values`, both are transposed, and these are `[1, X]`."""
    scores = tl.dot(operand(q, OPERAND), tl.trans(keys.to(OPERAND)), input_precision=PRECISION) * scale
    scores = capped(scores, softcap, CAPPED)
    weights = tl.where(seen, tl.exp(scores - normaliser), 0.0)
    pulls = tl.dot(dy.to(OPERAND), tl.trans(values.to(OPERAND)), input_precision=PRECISION)
    gradients = weights * (pulls - delta) * scale
    if CAPPED:
        slope = scores / softcap
        gradients = gradients * (1.0 - slope * slope)
    return weights, gradients


@triton.jit
def window_pull(
    doutputs,
    mix_weight,
    rows,
    entry,
    of_head,
    u,
    real,
    entries,
    V: tl.constexpr,
    MIX: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """The gradient of the window's outputs of one query head, `[X, BV]`."""
    there = real[:, None] & (u < V)[None, :]
    dout = tl.load(doutputs + entry[:, None] * V + u[None, :], mask=there, other=0.0).to(tl.float32)
    share = tl.load(rows + 2 * entries + entry)[:, None]
    if MIX == "learned":
        share = share * head_weights(mix_weight, of_head, u, V)
    return operand(dout - share * dout, OPERAND)


@triton.jit(do_not_specialize=VARYING)
def window_queries(
    q_rotated,
    k_rotated,
    v,
    column_k,
    column_v,
    column_exists,
    mix_weight,
    tiles,
    starts,
    counts,
    doutputs,
    rows,
    dq_rotated,
    parts_k,
    parts_v,
    entries,
    window,
    past,
    scale,
    softcap,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SINKS: tl.constexpr,
    EXISTS: tl.constexpr,
    CAPPED: tl.constexpr,
    MIX: tl.constexpr,
    COUNTED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a head's tile of a row's queries with positions, through window and columns; and the tile's parts of
    the columns' gradients, `[tiles, H, M, D or V]`."""
    G: tl.constexpr = H // K
    tile, row, head, start, length, count = open_tile(tiles, tl.program_id(0) // G, starts, counts, K, COUNTED)
    of_head = head * G + tl.program_id(0) % G
    first = tile * TILE
    if first >= length:
        return
    d, u = tl.arange(0, BD)[None, :], tl.arange(0, BV)[None, :]
    t = first + tl.arange(0, TILE)
    real = t < length
    first_key = start + (row + 1) * past
    low = tl.maximum(first - window + 1, -tl.minimum(count, past))
    high = tl.minimum(first + TILE, length)
    entry = tl.where(real, (start + t) * H + of_head, 0)
    query = entry[:, None]
    rotated = operand(tl.load(q_rotated + query * D + d, mask=real[:, None] & (d < D), other=0.0), OPERAND)
    channel = tl.arange(0, BV)
    dy = window_pull(doutputs, mix_weight, rows, entry, of_head, channel, real, entries, V, MIX, OPERAND)
    normaliser = tl.load(rows + entry)[:, None]
    delta = tl.load(rows + entries + entry)[:, None]
    drotated = tl.zeros((TILE, BD), tl.float32)
    if COLUMNS > 0:
        m = tl.arange(0, BM)
        column = ((row * COLUMNS + m).to(tl.int64) * K + head)[:, None]
        exact_k = tl.load(column_k + column * D + d, mask=(m < COLUMNS)[:, None] & (d < D), other=0.0)
        exact_v = tl.load(column_v + column * V + u, mask=(m < COLUMNS)[:, None] & (u < V), other=0.0)
        visible = columns_seen(column_exists, t, count, row, window, BM, COLUMNS, SINKS, EXISTS)
        exact, dexact = attention_gradients(
            rotated, exact_k, exact_v, dy, normaliser, delta, visible, scale, softcap, CAPPED, OPERAND, PRECISION
        )
        dexact = operand(dexact, OPERAND)
        drotated = tl.dot(dexact, operand(exact_k, OPERAND), input_precision=PRECISION)
        dcolumn_k = tl.dot(tl.trans(rotated), dexact, input_precision=PRECISION)
        dcolumn_v = tl.dot(tl.trans(dy), operand(exact, OPERAND), input_precision=PRECISION)
        part = (((start // TILE + row + tile) * H + of_head) * COLUMNS + m)[None, :]
        d_column, u_column = tl.arange(0, BD)[:, None], tl.arange(0, BV)[:, None]
        inside = (m < COLUMNS)[None, :]
        tl.store(parts_k + part * D + d_column, dcolumn_k, mask=inside & (d_column < D))
        tl.store(parts_v + part * V + u_column, dcolumn_v, mask=inside & (u_column < V))
    for block in tl.range(low, high, KEYS, disable_licm=True):
        s = block + tl.arange(0, KEYS)
        at = (tl.where(s < high, first_key + s, 0) * K + head)[:, None]
        window_k = tl.load(k_rotated + at * D + d, mask=(s < high)[:, None] & (d < D), other=0.0)
        window_v = tl.load(v + at * V + u, mask=(s < high)[:, None] & (u < V), other=0.0)
        seen = (s < high)[None, :] & (s[None, :] <= t[:, None]) & (s[None, :] > t[:, None] - window)
        if BD * BV > 128 * 128:
            # Loaded anew, because tiles that are kept over the loop take registers.
            turned = tl.load(q_rotated + query * D + d, mask=real[:, None] & (d < D), other=0.0)
            pull = window_pull(doutputs, mix_weight, rows, entry, of_head, channel, real, entries, V, MIX, OPERAND)
        else:
            turned, pull = rotated, dy
        _weights, dscores = attention_gradients(
            turned, window_k, window_v, pull, normaliser, delta, seen, scale, softcap, CAPPED, OPERAND, PRECISION
        )
        drotated += tl.dot(operand(dscores, OPERAND), operand(window_k, OPERAND), input_precision=PRECISION)
    tl.store(dq_rotated + query * D + d, drotated.to(dq_rotated.dtype.element_ty), mask=real[:, None] & (d < D))


@triton.jit(do_not_specialize=VARYING)
def window_keys(
    q_rotated,
    k_rotated,
    v,
    mix_weight,
    tiles,
    starts,
    counts,
    doutputs,
    rows,
    dk_rotated,
    dv,
    state_dv,
    entries,
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
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    CAPPED: tl.constexpr,
    MIX: tl.constexpr,
    COUNTED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of a row's keys with positions, and of their values: `state_dv`, the recurrence's part, is
    added."""
    G: tl.constexpr = H // K
    tile, row, head, start, length, count = open_tile(tiles, tl.program_id(0), starts, counts, K, COUNTED)
    first = tile * TILE - past
    if first >= length:
        return
    d, u = tl.arange(0, BD)[None, :], tl.arange(0, BV)[None, :]
    place = first + tl.arange(0, TILE)
    there = place < length
    first_key = start + (row + 1) * past
    exists = there & (count + place >= 0)
    at = (tl.where(there, first_key + place, 0) * K + head)[:, None]
    window_k = operand(tl.load(k_rotated + at * D + d, mask=exists[:, None] & (d < D), other=0.0), OPERAND)
    values = operand(tl.load(v + at * V + u, mask=exists[:, None] & (u < V), other=0.0), OPERAND)
    drotated = tl.zeros((TILE, BD), tl.float32)
    dvalues = tl.zeros((TILE, BV), tl.float32)
    low, high = tl.maximum(first, 0), tl.minimum(first + TILE - 1 + window, length)
    for block in tl.range(low, high, QUERIES, disable_licm=True):
        t = block + tl.arange(0, QUERIES)
        real = t < high
        seen = exists[:, None] & real[None, :]
        seen = seen & (place[:, None] <= t[None, :]) & (place[:, None] > t[None, :] - window)
        for member in tl.range(G, disable_licm=True):
            entry = tl.where(real, (start + t) * H + head * G + member, 0)
            rotated = tl.load(q_rotated + entry[:, None] * D + d, mask=real[:, None] & (d < D), other=0.0)
            dy = window_pull(
                doutputs, mix_weight, rows, entry, head * G + member, tl.arange(0, BV), real, entries, V, MIX, OPERAND
            )
            # Keys are the rows of the products, so none has to be transposed.
            weights, dscores = attention_gradients(
                window_k,
                rotated,
                dy,
                values,
                tl.load(rows + entry)[None, :],
                tl.load(rows + entries + entry)[None, :],
                seen,
                scale,
                softcap,
                CAPPED,
                OPERAND,
                PRECISION,
            )
            dvalues += tl.dot(operand(weights, OPERAND), dy, input_precision=PRECISION)
            drotated += tl.dot(operand(dscores, OPERAND), operand(rotated, OPERAND), input_precision=PRECISION)
    tl.store(dk_rotated + at * D + d, drotated.to(dk_rotated.dtype.element_ty), mask=there[:, None] & (d < D))
    writes = (place + ahead >= 0) & (place + ahead < length - lag) & (count + place >= least)
    dvalues += tl.load(state_dv + at * V + u, mask=writes[:, None] & (u < V), other=0.0)
    tl.store(dv + at * V + u, dvalues.to(dv.dtype.element_ty), mask=there[:, None] & (u < V))


@triton.jit
def sum_tiles(
    parts,
    result,
    first,
    tiles,
    row,
    head,
    H: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum `parts` `[tiles, H, M, W]` over a row's tiles and a group's heads into `result` `[R, M, K, W]`."""
    G: tl.constexpr = H // K
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < COLUMNS * W
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(0, tiles * G, 8):
        n = block + tl.arange(0, 8)[:, None]
        at = ((first + n // G) * H + head * G + n % G) * COLUMNS * W + entry[None, :]
        total += tl.sum(tl.load(parts + at, mask=(n < tiles * G) & inside[None, :], other=0.0), 0)
    to = ((row * COLUMNS + entry // W).to(tl.int64) * K + head) * W + entry % W
    tl.store(result + to, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def sum_columns(
    parts_k,
    parts_v,
    starts,
    dcolumn_k,
    dcolumn_v,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of a row's exact columns, from the parts of its tiles of queries."""
    row, head = tl.program_id(0) // K, tl.program_id(0) % K
    start = tl.load(starts + row).to(tl.int64)
    tiles = (tl.load(starts + row + 1).to(tl.int64) - start + TILE - 1) // TILE
    first = start // TILE + row
    sum_tiles(parts_k, dcolumn_k, first, tiles, row, head, H, K, D, COLUMNS, BLOCK)
    sum_tiles(parts_v, dcolumn_v, first, tiles, row, head, H, K, V, COLUMNS, BLOCK)
