"""The mix of window and recurrence in the Triton kernels of Liger attention, and its backward kernel.

The outputs are y + w share (o / m - y). The backward pass computes the window's outputs y and the reads o / m anew, as
`[N, H, V]`, beside numbers of each query row in `rows` `[5, N, H]`:

    0 normaliser   log of the window's denominator
    1 delta        Σ_v dy_v y_v less the gradient of the normaliser, as in flash attention
    2 share        the recurrence's share of the output, before a learned weight
    3 pull         share / m: the gradient of o is pull * dout (times a learned weight); at first 1 / m
    4 dm           the gradient of its mass m
"""

from __future__ import annotations

from linearize_kernels.liger_tiles import VARYING, tl, triton


@triton.jit
def inverse_masses(mass, live, MIX: tl.constexpr, NORMALIZE: tl.constexpr):
    """The factor that normalises each query row's read; 0 for a row without a read."""
    if NORMALIZE or MIX == "softmax":
        inverse = 1.0 / tl.maximum(mass, 1.1754943508222875e-38)
        inverse = tl.where(live & (mass > 0.0), inverse, 0.0)
    else:
        inverse = tl.where(live, 1.0 + mass * 0.0, 0.0)
    return inverse


@triton.jit
def shares(inverse, normaliser, weight, MIX: tl.constexpr):
    """For each query row, the recurrence's share of the output, before a learned weight; and, with `mix: softmax`, the
    ratio of mass to denominator, and its logarithm."""
    share = tl.where(inverse > 0.0, 1.0, 0.0)
    log_ratio = share
    ratio = share
    if MIX == "fixed":
        share = share * 0.5
    if MIX == "softmax":
        log_ratio = -tl.log(tl.maximum(inverse, 1.1754943508222875e-38)) - normaliser
        ratio = tl.exp(tl.minimum(log_ratio, 60.0))
        share = share * weight * ratio / (1.0 + tl.abs(weight) * ratio)
    return share, ratio, log_ratio


@triton.jit
def head_weights(mix_weight, head, u, V: tl.constexpr):
    """The mix weights of one head, as a row."""
    return tl.load(mix_weight + head * V + u, mask=u < V, other=0.0).to(tl.float32)[None, :]


@triton.jit
def row_weights(mix_weight, of_head, u, real, V: tl.constexpr):
    """The mix weights of query rows of different heads."""
    there = real[:, None] & (u < V)[None, :]
    return tl.load(mix_weight + of_head[:, None] * V + u[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def write_mixed(
    y,
    normaliser,
    read,
    inverse,
    learned,
    mix_weight,
    outputs,
    rows,
    entry,
    of_head,
    u,
    real,
    leads,
    entries,
    V: tl.constexpr,
    MIX: tl.constexpr,
    APART: tl.constexpr,
):
    """Write the outputs of query rows; with APART the window's alone and, where `leads`, the numbers of the rows.

    `learned` are weights of channels, a row or one per query row."""
    inside = real[:, None] & (u < V)[None, :]
    weight = inverse * 0.0
    if MIX == "softmax":
        weight = tl.load(mix_weight + of_head, mask=real, other=0.0).to(tl.float32)
    share, _ratio, _log = shares(inverse, normaliser, weight, MIX)
    if APART & leads:
        tl.store(rows + entry, normaliser, mask=real)
        tl.store(rows + 2 * entries + entry, share, mask=real)
        tl.store(rows + 3 * entries + entry, inverse, mask=real)
    if not APART:
        share = share[:, None]
        if MIX == "learned":
            share = share * learned
        y = y + share * (read.to(tl.float32) - y)
    tl.store(outputs + entry[:, None] * V + u[None, :], y.to(outputs.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def mix_gradients(
    windows,
    reads,
    mix_weight,
    doutputs,
    rows,
    dweight,
    entries,
    H: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    TILE: tl.constexpr,
    MIX: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Delta, pull and dm of a head's tile of queries; and the tile's gradient of the mix weights, into `dweight`
    `[tiles, H, V or 1]`."""
    head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    u = tl.arange(0, BV)
    real = token * H < entries
    entry = tl.where(real, token * H + head, 0)
    there = real[:, None] & (u < V)[None, :]
    at = entry[:, None] * V + u[None, :]
    y = tl.load(windows + at, mask=there, other=0.0).to(tl.float32)
    read = tl.load(reads + at, mask=there, other=0.0).to(tl.float32)
    dout = tl.load(doutputs + at, mask=there, other=0.0).to(tl.float32)
    through = dout
    if MIX == "learned":
        through = dout * head_weights(mix_weight, head, u, V)
    share = tl.load(rows + 2 * entries + entry, mask=real, other=0.0)
    inverse = tl.load(rows + 3 * entries + entry, mask=real, other=0.0)
    pull = share * inverse
    of_y, of_read = tl.sum(through * y, 1), tl.sum(through * read, 1)
    delta = tl.sum(dout * y, 1) - share * of_y
    dm = pull * 0.0
    if NORMALIZE or MIX == "softmax":
        dm = -pull * of_read
    to = tl.program_id(0) * H + head
    if MIX == "learned":
        of_weight = tl.sum(tl.where((inverse > 0.0)[:, None], dout * (read - y), 0.0), 0)
        tl.store(dweight + to * V + u, of_weight, mask=u < V)
    if MIX == "softmax":
        normaliser = tl.load(rows + entry, mask=real, other=0.0)
        weight = tl.load(mix_weight + head).to(tl.float32)
        _share, ratio, log_ratio = shares(inverse, normaliser, weight, MIX)
        rest = 1.0 + tl.abs(weight) * ratio
        of_share = tl.where(inverse > 0.0, of_read - of_y, 0.0)
        of_ratio = tl.where(log_ratio <= 60.0, of_share * share / rest, 0.0)
        dm += of_ratio * inverse
        delta += of_ratio
        tl.store(dweight + to, tl.sum(of_share * (ratio / rest) / rest, 0))
    tl.store(rows + entries + entry, delta, mask=real)
    tl.store(rows + 3 * entries + entry, pull, mask=real)
    tl.store(rows + 4 * entries + entry, dm, mask=real)


@triton.jit
def load_dreads(doutputs, learned, rows, entry, u, real, entries, V: tl.constexpr, MIX: tl.constexpr):
    """For query rows, the gradients of the recurrence's reads."""
    there = real[:, None] & (u < V)[None, :]
    dread = tl.load(doutputs + entry[:, None] * V + u[None, :], mask=there, other=0.0).to(tl.float32)
    dread = dread * tl.load(rows + 3 * entries + entry, mask=real, other=0.0)[:, None]
    if MIX == "learned":
        dread = dread * learned
    return dread


@triton.jit
def load_head_dreads(
    doutputs, mix_weight, rows, entry, head, u, real, entries, V: tl.constexpr, MIX: tl.constexpr, OPERAND: tl.constexpr
):
    """`load_dreads` of one head, as an operand."""
    learned = 1.0
    if MIX == "learned":
        learned = head_weights(mix_weight, head, u, V)
    return load_dreads(doutputs, learned, rows, entry, u, real, entries, V, MIX).to(OPERAND)


@triton.jit
def load_row_dreads(doutputs, mix_weight, rows, entry, of_head, u, real, entries, V: tl.constexpr, MIX: tl.constexpr):
    """`load_dreads` of query rows of different heads."""
    learned = 1.0
    if MIX == "learned":
        learned = row_weights(mix_weight, of_head, u, real, V)
    return load_dreads(doutputs, learned, rows, entry, u, real, entries, V, MIX)
