"""The kernels of `block.py`. Arithmetic is float32; each result is rounded once."""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the block's kernels need triton: pip install triton") from error

from linearize_kernels.step_kernel import _tanh


@triton.jit
def _centred(x, inside, size, KIND: tl.constexpr):
    """`x` without its mean, for a layer norm."""
    if KIND == "layer":
        x = tl.where(inside, x - tl.sum(x, 0) / size, 0.0)
    return x


@triton.jit
def _weighted(x, weight, bias, n, inside, offset, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    if HAS_WEIGHT:
        x *= tl.load(weight + n, mask=inside, other=0.0).to(tl.float32) + offset
    if HAS_BIAS:
        x += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def residual_norm_kernel(
    x,
    delta,
    h,
    y,
    after_weight,
    after_bias,
    before_weight,
    before_bias,
    factor,
    after_eps,
    before_eps,
    after_offset,
    before_offset,
    N: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    STORES: tl.constexpr,
    AFTER: tl.constexpr,
    AFTER_WEIGHT: tl.constexpr,
    AFTER_BIAS: tl.constexpr,
    BEFORE: tl.constexpr,
    BEFORE_WEIGHT: tl.constexpr,
    BEFORE_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    inside = n < N
    whole = tl.load(x + row * N + n, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        change = tl.load(delta + row * N + n, mask=inside, other=0.0).to(tl.float32)
        if AFTER is not None:
            change = _centred(change, inside, N, AFTER)
            change *= 1.0 / tl.sqrt(tl.sum(change * change, 0) / N + after_eps)
            change = _weighted(change, after_weight, after_bias, n, inside, after_offset, AFTER_WEIGHT, AFTER_BIAS)
        whole += factor * change
    if STORES:
        stored = whole.to(h.dtype.element_ty)
        tl.store(h + row * N + n, stored, mask=inside)
        whole = stored.to(tl.float32)
    if BEFORE is not None:
        whole = _centred(whole, inside, N, BEFORE)
        whole *= 1.0 / tl.sqrt(tl.sum(whole * whole, 0) / N + before_eps)
        whole = _weighted(whole, before_weight, before_bias, n, inside, before_offset, BEFORE_WEIGHT, BEFORE_BIAS)
        tl.store(y + row * N + n, whole.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _channels(
    x,
    bias,
    weight,
    c,
    inside,
    shift,
    scale,
    offset,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Channels `c` of a head at `x`, with bias and norm; `bias` and `weight` are those of the head."""
    values = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        values += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if KIND is not None:
        values = (values - shift) * scale
        if HAS_WEIGHT:
            values *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32) + offset
    return values


@triton.jit
def _head(
    x, out, turned, bias, weight, cos, sin, head, eps, offset,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HAS_BIAS: tl.constexpr, KIND: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, BY_HEAD: tl.constexpr, WIDE: tl.constexpr, TURN: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head of a row: `x`, `out` and `turned` are the row's, `[HEADS, D]`."""
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    shift, scale = 0.0, 1.0
    if KIND is not None:
        if WIDE:
            n = tl.arange(0, BLOCK_N)
            first, size = 0, HEADS * D
        else:
            n = d
            first, size = head * D, D
        there = n < size
        values = tl.load(x + first + n, mask=there, other=0.0).to(tl.float32)
        if HAS_BIAS:
            values += tl.load(bias + first + n, mask=there, other=0.0).to(tl.float32)
        if KIND == "layer":
            shift = tl.sum(values, 0) / size
            values = tl.where(there, values - shift, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / size + eps)
    own = head * D
    if BY_HEAD:
        weight += own
    if HAS_BIAS:
        bias += own
    values = _channels(x + own, bias, weight, d, inside, shift, scale, offset, HAS_BIAS, KIND, HAS_WEIGHT)
    if HAS_BIAS or KIND is not None:
        tl.store(out + own + d, values.to(out.dtype.element_ty), mask=inside)
    if TURN is not None:
        if TURN == "halves":
            first_of_two = d < R // 2
            partner = tl.where(first_of_two, d + R // 2, d - R // 2)
        else:
            first_of_two = d % 2 == 0
            partner = tl.where(first_of_two, d + 1, d - 1)
        place = d // 2 if TURN == "pairs of halves" else d
        turns = d < R
        other = _channels(x + own, bias, weight, partner, turns, shift, scale, offset, HAS_BIAS, KIND, HAS_WEIGHT)
        other = tl.where(first_of_two, -other, other)
        c = tl.load(cos + place, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + place, mask=turns, other=0.0).to(tl.float32)
        tl.store(
            turned + own + d, (values * c + tl.where(turns, other, 0.0) * s).to(turned.dtype.element_ty), mask=inside
        )


@triton.jit
def turned_heads_kernel(
    q, k, v, q_out, k_out, v_out, q_turned, k_turned, q_bias, k_bias, v_bias, q_weight, k_weight, cos, sin,
    counts, before, lengths,
    q_row, k_row, v_row, table_row, eps, offset,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, V: tl.constexpr, R: tl.constexpr, HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr, HAS_WEIGHT: tl.constexpr, BY_HEAD: tl.constexpr, WIDE: tl.constexpr, TURN: tl.constexpr,
    COUNTS: tl.constexpr, HAS_LENGTHS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    cos += row * table_row
    sin += row * table_row
    if head < H:
        _head(q + row * q_row, q_out + row * H * D, q_turned + row * H * D, q_bias, q_weight, cos, sin, head, eps,
              offset, H, D, R, HAS_BIAS, KIND, HAS_WEIGHT, BY_HEAD, WIDE, TURN, BLOCK_D, BLOCK_Q)  # fmt: skip
    elif head < H + K:
        _head(k + row * k_row, k_out + row * K * D, k_turned + row * K * D, k_bias, k_weight, cos, sin, head - H, eps,
              offset, K, D, R, HAS_BIAS, KIND, HAS_WEIGHT, BY_HEAD, WIDE, TURN, BLOCK_D, BLOCK_K)  # fmt: skip
    elif HAS_BIAS:
        e = tl.arange(0, BLOCK_V)
        at = (head - H - K) * V + e
        values = tl.load(v + row * v_row + at, mask=e < V, other=0.0).to(tl.float32)
        values += tl.load(v_bias + at, mask=e < V, other=0.0).to(tl.float32)
        tl.store(v_out + row * K * V + at, values.to(v_out.dtype.element_ty), mask=e < V)
    if COUNTS and head == 0:
        count = tl.load(counts + row)
        tl.store(before + row, count)
        tl.store(counts + row, count + (tl.load(lengths + row) if HAS_LENGTHS else 1))


@triton.jit
def activated_kernel(x, y, N: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    WIDTH: tl.constexpr = 2 * N if GATED else N
    gate = tl.load(x + row * WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        value = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "relu":
        value = tl.maximum(gate, 0.0)
    elif ACTIVATION == "gelu":
        value = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        value = 0.5 * gate * (1.0 + _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    if GATED:
        value *= tl.load(x + row * WIDTH + N + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * N + i, value.to(y.dtype.element_ty), mask=inside)
