"""Liger attention in one operation: softmax over a window and exact columns, a gated recurrence, and their mix.

    y_t   softmax over the last W tokens and the columns that t reads, queries and keys with positions
    S_t = diag(g_t) S_{t-1} + φ(k_t)ᵀ [v_t, 1]        [o_t, m_t] = φ(q_t) S_t        without positions
    out   mix(y_t, o_t / m_t)

The R rows are concatenated without padding, so packed documents are ordinary rows. N is the number of tokens of all
rows, P the number of keys. P = N for rows without a cache. For rows that continue a cache, P = N + R W: each row's own
keys follow the W keys before its first token, oldest first. F is the width of the recurrence's queries and keys, M the
number of columns.

`liger_attention` runs the Triton kernels; `liger_attention_composed` computes the same in plain torch on any device.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize_kernels.dispatch import interpreted
from linearize_kernels.gla import gla_chunkwise
from linearize_kernels.liger_options import Columns, Gate, LigerOptions, longest_row, row_starts
from linearize_kernels.window import mix_outputs, window_attention

# Shared memory in bytes of the largest kernel for heads of 256 channels in two-byte dtypes, or of 128 in four-byte
# dtypes; other heads take 99328.
_WIDE_SHARED_MEMORY = 164864


def liger_attention(
    q_rotated: Tensor,
    k_rotated: Tensor,
    v: Tensor,
    q: Tensor,
    k: Tensor,
    gate: Tensor | Gate,
    options: LigerOptions,
    *,
    mix_weight: Tensor | None = None,
    columns: Columns | None = None,
    rows: Tensor | int = 1,
    counts: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the fused kernels, with gradients for every floating-point tensor.

    Args:
        q_rotated: `[N, H, D]`, positions already encoded. k_rotated: `[P, K, D]`. v: `[P, K, V]`.
        q: `[N, H, F]` and k: `[P, K, F]`, the recurrence's queries and keys, both before the feature map.
        gate: log-gates `[P, K, F or 1]` (<= 0), or a `Gate` that builds them from `k`.
        mix_weight: `[H, V]` for `mix: learned`, `[H]` for `mix: softmax`.
        columns: sinks and other exact columns.
        rows: `cu_seqlens`, int32 `[R + 1]`, the start of each row of queries and the end of the last one; or a number
            of rows of equal length. Their tiles are kept with the tensor, so layers should share it.
        counts: `[R]` tokens of each row before its first query; given if and only if rows continue a cache (P > N). Of
            the W keys before a row, those before its token 0 are ignored.
        initial_state: `[R, K, F, V + 1]`, the last column the mass; None is zeros.

    Returns:
        outputs `[N, H, V]` in the dtype of the inputs, and the state `[R, K, F, V + 1]`, float32, after the last query.
        With `covers: evicted` it lacks the row's last W tokens.

    Raises:
        ValueError: the kernels do not support the case (see `unsupported`), or shapes do not match.
    """
    arguments = (q_rotated, k_rotated, v, q, k, gate, options)
    more = (mix_weight, columns, rows, counts, initial_state)
    if (reason := unsupported(*arguments, mix_weight=mix_weight, columns=columns)) is not None:
        raise ValueError(f"the Triton kernels do not take {reason}; use liger_attention_composed")
    _check(*arguments, *more)
    from linearize_kernels.liger_autograd import fused

    return fused(*arguments, *more)


def unsupported(
    q_rotated: Tensor,
    k_rotated: Tensor,
    v: Tensor,
    q: Tensor,
    k: Tensor,
    gate: Tensor | Gate,
    options: LigerOptions,
    *,
    mix_weight: Tensor | None = None,
    columns: Columns | None = None,
) -> str | None:
    """The reason that the kernels cannot run, as words after "do not take"; None if they can.

    Triton's presence is checked last, without importing it.
    """
    dtype, device = q.dtype, q.device
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{str(dtype).removeprefix('torch.')} inputs"
    if any(x.dtype != dtype for x in (q_rotated, k_rotated, v, k)):
        return "queries, keys and values of different dtypes"
    if max(q_rotated.shape[-1], q.shape[-1], v.shape[-1]) > 256:
        return "heads wider than 256"
    if q.shape[1] // max(k.shape[1], 1) > 16:
        return "more than 16 query heads per key/value head"
    if columns is not None and columns.k.shape[1] > 128:
        return "more than 128 exact columns"
    if device.type != "cuda" and not interpreted():
        return f"tensors on {device.type}"
    tensors = [q_rotated, k_rotated, v, k, *(gate[:2] if isinstance(gate, Gate) else [gate])]
    tensors += [x for x in (mix_weight, *(columns[:2] if columns is not None else ())) if x is not None]
    if any(x.device != device for x in tensors):
        return "tensors on different devices"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if properties.major < 8:
            return "GPUs older than Ampere"
        wide = max(q_rotated.shape[-1], q.shape[-1], v.shape[-1]) * q.element_size() > 256
        if wide and getattr(properties, "shared_memory_per_block_optin", _WIDE_SHARED_MEMORY) < _WIDE_SHARED_MEMORY:
            return "heads of more than 256 bytes on a GPU with this little shared memory"
    return None if _has_triton() else "a machine without triton"


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def liger_attention_composed(
    q_rotated: Tensor,
    k_rotated: Tensor,
    v: Tensor,
    q: Tensor,
    k: Tensor,
    gate: Tensor | Gate,
    options: LigerOptions,
    *,
    mix_weight: Tensor | None = None,
    columns: Columns | None = None,
    rows: Tensor | int = 1,
    counts: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`liger_attention` in plain torch: the reference, and the fallback without triton. Computes in float32, or in
    float64 for float64 inputs (then the state is float64 too)."""
    _check(q_rotated, k_rotated, v, q, k, gate, options, mix_weight, columns, rows, counts, initial_state)
    window, dtype = options.window, torch.float64 if q.dtype == torch.float64 else torch.float32
    starts = row_starts(rows, q.shape[0], q.device)
    lengths, past = starts.diff(), 0 if counts is None else window
    tokens = longest_row(rows, q.shape[0])
    row = torch.arange(len(lengths), device=q.device)[:, None]
    place = torch.arange(past + tokens, device=q.device)
    real = place[:tokens] < lengths[:, None]
    number = place[:tokens] + (torch.zeros_like(lengths) if counts is None else counts)[:, None]
    of_query = (starts[:-1, None] + place[:tokens]).clamp_max(max(q.shape[0] - 1, 0))
    of_key = (starts[:-1, None] + row * past + place).clamp_max(max(k.shape[0] - 1, 0))

    q_rotated, q = (x[of_query] for x in (q_rotated, q))
    log_gate = gate if isinstance(gate, Tensor) else build_log_gate(k, gate)
    keys = (k_rotated, v, _features(k.to(dtype), options), log_gate.to(dtype))
    k_rotated, values, features, log_gate = (x[of_key] for x in keys)
    reads = _features(q.to(dtype), options)

    exists = None if counts is None else place >= (window - counts)[:, None]
    seen = None if columns is None else (columns.k, columns.v, _columns_seen(columns, number, window))
    y, normaliser = window_attention(
        q_rotated,
        k_rotated,
        values,
        window=window,
        scale=options.scale,
        key_exists=exists,
        columns=seen,
        softcap=options.softcap,
    )

    sinks = columns.sinks if columns is not None else 0
    if options.covers == "evicted":
        lag, stream, least = window - past, slice(0, max(past + tokens - window, 0)), sinks
        read_after = number - window
    else:
        lag, stream, least, read_after = 0, slice(past, None), 0, number
    state = initial_state
    if state is None:
        state = values.new_zeros(len(lengths), k.shape[1], k.shape[2], v.shape[-1] + 1, dtype=dtype)
    if lag >= tokens:
        return _flat(y, real).to(v.dtype), state.to(dtype)
    assert normaliser is not None  # noqa: S101 - for the type checker
    live = read_after[:, lag:] >= least
    silent = ~(live & real[:, lag:])[:, :, None, None]
    features, log_gate = (x[:, stream].masked_fill(silent, 0) for x in (features, log_gate))
    written = F.pad(values[:, stream], (0, 1), value=1.0)
    read, final = gla_chunkwise(reads[:, lag:], features, written, log_gate, state)
    mixed = mix_outputs(
        y[:, lag:],
        normaliser[:, lag:],
        read[..., :-1],
        read[..., -1:],
        mix=options.mix,
        normalize=options.normalize,
        weight=mix_weight,
    )
    mixed = torch.where(live[:, :, None, None], mixed, y[:, lag:])
    return _flat(torch.cat([y[:, :lag], mixed], 1), real).to(v.dtype), final


def build_log_gate(k: Tensor, gate: Gate) -> Tensor:
    """Log-gates `[P, K, F]` of keys `[P, K, F]`."""
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    inputs = gate.scale.to(dtype) * k.to(dtype) + gate.bias.to(dtype)
    return F.logsigmoid(inputs) / gate.divisor


def _features(x: Tensor, options: LigerOptions) -> Tensor:
    return x.softmax(-1) if options.feature_map == "softmax" else x


def _columns_seen(columns: Columns, number: Tensor, window: int) -> Tensor:
    """`[R, L, M]`: True for the columns that the query with number `[R, L]` reads."""
    sink = torch.arange(columns.sinks, device=number.device)
    others = columns.k.shape[1] - columns.sinks
    exists = columns.exists
    if exists is None:
        exists = number.new_ones(number.shape[0], others, dtype=torch.bool)
    gone = sink <= (number - window)[:, :, None]
    return torch.cat([gone, exists[:, None].expand(-1, number.shape[1], -1)], -1)


def _flat(x: Tensor, real: Tensor) -> Tensor:
    """The real tokens of `x` `[R, L, ...]`, concatenated over rows."""
    return x[real]


def _check(
    q_rotated: Tensor,
    k_rotated: Tensor,
    v: Tensor,
    q: Tensor,
    k: Tensor,
    gate: Tensor | Gate,
    options: LigerOptions,
    mix_weight: Tensor | None,
    columns: Columns | None,
    rows: Tensor | int,
    counts: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    """Raises:
    ValueError: shapes or options that do not match.
    """
    (tokens, heads, width), (keys, groups, value_width) = q_rotated.shape, v.shape
    features, rotated = k.shape[-1], k_rotated.shape[-1]
    count = rows if isinstance(rows, int) else rows.shape[0] - 1
    past = 0 if counts is None else options.window
    if options.window < 1:
        raise ValueError(f"a window of {options.window} tokens is none; it needs 1 or more")
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key/value heads evenly")
    if isinstance(rows, int) and tokens % rows:
        raise ValueError(f"{tokens} tokens do not make {rows} rows of the same length")
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("q", q, (tokens, heads, features)),
        ("k", k, (tokens + count * past, groups, features)),
        ("k_rotated", k_rotated, (keys, groups, width)),
        ("v", v, (tokens + count * past, groups, value_width)),
        ("counts", counts, (count,)),
        ("initial_state", initial_state, (count, groups, features, value_width + 1)),
    ]
    if isinstance(gate, Gate):
        expected += [("gate.scale", gate.scale, (groups, features)), ("gate.bias", gate.bias, (groups, features))]
    else:
        expected += [("gate", gate, (keys, groups, 1 if gate.shape[-1] == 1 else features))]
    if columns is not None:
        extra = columns.k.shape[1]
        if not 0 <= columns.sinks <= extra:
            raise ValueError(f"{columns.sinks} sinks cannot be among {extra} columns")
        expected += [
            ("columns.k", columns.k, (count, extra, groups, rotated)),
            ("columns.v", columns.v, (count, extra, groups, value_width)),
            ("columns.exists", columns.exists, (count, extra - columns.sinks)),
        ]
    weights = {"fixed": None, "learned": (heads, value_width), "softmax": (heads,)}[options.mix]
    if (mix_weight is None) != (weights is None):
        needs = "no mix_weight" if weights is None else f"a mix_weight {list(weights)}"
        raise ValueError(f"mix: {options.mix} takes {needs}")
    if weights is not None:
        expected.append(("mix_weight", mix_weight, weights))
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected {list(shape)}")


__all__ = [
    "Columns",
    "Gate",
    "LigerOptions",
    "liger_attention",
    "liger_attention_composed",
    "unsupported",
]
