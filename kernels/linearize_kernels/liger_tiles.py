"""Tile helpers of the Triton kernels of Liger attention: gates, features, decays and scores.

A decay is the exponential of a sum of log-gates over exactly the tokens that it spans, never of a difference of longer
sums, except in tiles whose whole decay is weak. So gates of any strength stay finite, and a strong gate does not cancel
the digits of weak ones.

`offset = key * K + head` is a key's row in arrays `[P, K, width]`. A False mask loads 0, the feature and the log-gate
of a token that is not written.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton kernels need triton: pip install triton") from error

# Scalars that vary with the prompt: a program per value that is 1 or a multiple of 16 would be compiled while serving.
VARYING = ["entries", "keys", "past", "lag", "ahead", "least"]


@triton.jit
def open_tile(tiles, n, starts, counts, K: tl.constexpr, COUNTED: tl.constexpr):
    """The n-th tile of a list `[tiles, 2]`: its number within its row, and the row; a program's key/value head; and the
    row's start, its length and its tokens before its first query."""
    row, head = tl.load(tiles + 2 * n), tl.program_id(1)
    start = tl.load(starts + row).to(tl.int64)
    length = (tl.load(starts + row + 1).to(tl.int64) - start).to(tl.int32)
    count = tl.load(counts + row).to(tl.int32) if COUNTED else length * 0
    return tl.load(tiles + 2 * n + 1), row, head, start, length, count


@triton.jit
def written_keys(place, stream, number, least, first_key, head, K: tl.constexpr):
    """For places of a row's stream: True for a token that is written into the state, and its key's row as a column.

    Place 0 of the stream is key `first_key`, and token `number` of its row."""
    writes = (place >= 0) & (place < stream) & (number + place >= least)
    return writes, (tl.where(writes, first_key + place, 0) * K + head)[:, None]


@triton.jit
def log_gates(
    gate,
    k,
    gate_scale,
    gate_bias,
    divisor,
    offset,
    head,
    f,
    mask,
    F: tl.constexpr,
    FROM_KEY: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):
    """Log-gates of the keys at `offset`, channels `f`: given, or -softplus(-(scale k + bias)) / divisor."""
    if FROM_KEY:
        raw = tl.load(k + offset * F + f, mask=mask, other=0.0).to(tl.float32)
        inside = f < F
        scale = tl.load(gate_scale + head * F + f, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(gate_bias + head * F + f, mask=inside, other=0.0).to(tl.float32)
        result = log_sigmoid(scale * raw + bias) / divisor
    elif PER_CHANNEL:
        result = tl.load(gate + offset * F + f, mask=mask, other=0.0).to(tl.float32)
    else:
        result = tl.load(gate + offset + f * 0, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, result, 0.0)


@triton.jit
def log_sigmoid(x):
    # log(1 + e) as 2 artanh(e / (2 + e)), because log(1 + e) rounds away the digits of a gate near 1.
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)
    y = z * z
    series = 1.0 / 13.0 + y * (1.0 / 15.0)
    series = 1.0 / 9.0 + y * (1.0 / 11.0 + y * series)
    series = 1.0 / 5.0 + y * (1.0 / 7.0 + y * series)
    series = 1.0 + y * (1.0 / 3.0 + y * series)
    return tl.minimum(x, 0.0) - 2.0 * z * series


@triton.jit
def features(x, stats, offset, f, mask, keys, F: tl.constexpr, SOFTMAX: tl.constexpr):
    """φ of the keys at `offset`, channels `f`; `stats` holds each key's maximum and the inverse of its sum of
    exponentials."""
    raw = tl.load(x + offset * F + f, mask=mask, other=0.0).to(tl.float32)
    if SOFTMAX:
        largest = tl.load(stats + offset)
        inverse = tl.load(stats + keys + offset)
        raw = tl.exp(raw - largest) * inverse
    return tl.where(mask, raw, 0.0)


@triton.jit
def softmax_rows(x, inside):
    """Softmax along the last axis of a tile, 0 outside."""
    x = tl.where(inside, x, -float("inf"))
    x = tl.exp(x - tl.max(x, 1)[:, None])
    return x * (1.0 / tl.sum(x, 1))[:, None]


@triton.jit
def load_reads(q, query, real, F: tl.constexpr, BF: tl.constexpr, SOFTMAX: tl.constexpr):
    """φ of query rows."""
    f = tl.arange(0, BF)[None, :]
    reads = tl.load(q + query * F + f, mask=real[:, None] & (f < F), other=0.0).to(tl.float32)
    if SOFTMAX:
        reads = softmax_rows(reads, f < F)
    return reads


@triton.jit
def decay(log, EXACT: tl.constexpr):
    """exp(log) for log <= 80. The hardware's exponential has an error of 2^-22; EXACT is accurate to float32's last
    digit."""
    if EXACT:
        log = tl.maximum(log, -200.0)
        whole = tl.floor(log * 1.4426950408889634 + 0.5)
        rest = log - whole * 0.693145751953125
        rest = rest - whole * 1.4286068203094172e-06
        result = 1.0 / 120.0 + rest * (1.0 / 720.0 + rest * (1.0 / 5040.0))
        result = 1.0 / 6.0 + rest * (1.0 / 24.0 + rest * result)
        result = 1.0 + rest * (1.0 + rest * (0.5 + rest * result))
        # In two steps, because 2^whole alone can underflow although the product does not.
        half = tl.floor(whole * 0.5)
        result = result * tl.exp2(half) * tl.exp2(whole - half)
    else:
        result = tl.exp(log)
    return result


@triton.jit
def weak(total, EXACT: tl.constexpr):
    """True if decays within a tile of the log decay `total` may be products of one factor per query and one per key.

    Either factor is then far from float32's limits. With EXACT, differences of sums keep float32's digits too.
    """
    return tl.min(total) >= (-8.0 if EXACT else -60.0)


@triton.jit
def operand(x, OPERAND: tl.constexpr):
    """A tile as an operand of a product."""
    return x.to(OPERAND)


@triton.jit
def tanh(x):
    # The quotient loses digits near 0; the series does not.
    y = x * x
    series = 62.0 / 2835.0 - y * (1382.0 / 155925.0)
    series = -1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * series))
    return tl.where(tl.abs(x) < 0.4, x + x * y * series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def capped(scores, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        scores = softcap * tanh(scores / softcap)
    return scores


@triton.jit
def per_row(x, G: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Repeat a tile of tokens `[TOKENS, WIDTH]` for rows of query heads `[G * TOKENS, WIDTH]`, heads outermost."""
    return tl.reshape(tl.broadcast_to(x[None, :, :], (G, TOKENS, WIDTH)), (G * TOKENS, WIDTH))


@triton.jit
def halves(x):
    """The left and the right half of a tile `[X, WIDTH]`."""
    width: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, width)), (0, 2, 1)))


__all__ = [
    "VARYING",
    "capped",
    "decay",
    "features",
    "halves",
    "load_reads",
    "log_gates",
    "log_sigmoid",
    "open_tile",
    "operand",
    "per_row",
    "softmax_rows",
    "tanh",
    "tl",
    "triton",
    "weak",
    "written_keys",
]
