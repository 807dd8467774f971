"""Keys and values in 8 and 4 bits, and attention's products with them.

    8 bits   one symmetric scale per token and head:  x ≈ scale · c ,  c in -127..127
    4 bits   Hx ≈ scale · c + zero ,  c in 0..15, with scale and zero per group of up to 32 channels; H is the
             Hadamard matrix / sqrt(D), which spreads outliers over the channels (QuaRot, arXiv 2404.00456)

H is symmetric and orthogonal, so q · x = Hq · Hx, and sums of values are turned back once: neither keys nor values are
turned one by one. Scales and zeros are bfloat16. A decoded tensor has the same codes again, so rounding twice is
rounding once (in 4 bits but for the rounding of the turn).
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from linearize_kernels.decay import computing_dtype
from linearize_kernels.products import product

if TYPE_CHECKING:
    from collections.abc import Sequence

GROUP = 32
"""The most channels that share a scale in 4 bits."""
_LEAST_SCALE = 1e-30
_FEW = 2**12
_FINEST = 2.0**-7
"""The smallest scale of a group in 4 bits, relative to its zero: below it the zero's own rounding would show."""


class Codes(NamedTuple):
    """A tensor `[..., D]` in 8 or 4 bits.

    Attributes:
        codes: `[..., D]` int8, or `[..., D / 2]` uint8 with channel i in the low bits and i + D / 2 in the high ones.
        scale: `[..., 1]`, or `[..., groups]` in 4 bits; bfloat16.
        zero: `[..., groups]` bfloat16; None in 8 bits.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def groups_of(width: int) -> int:
    """The number of groups of a head of this width in 4 bits.

    Raises:
        ValueError: the width is odd, so two codes do not share a byte.
    """
    if width % 2:
        raise ValueError(f"4 bits need heads of an even width, and this one's is {width}")
    return width // math.gcd(width, GROUP)


def encode(x: Tensor, bits: int) -> Codes:
    """`x` `[..., D]` in 8 or 4 bits."""
    if x.is_meta:  # there a reduction imports sympy and torch._dynamo, which takes seconds
        return room_for_codes(x.shape, bits, x.device)
    steps, scale, zero = _levels(x.to(computing_dtype(x)), bits)
    if zero is None:
        return Codes(steps.to(torch.int8), scale, None)
    low, high = steps.to(torch.uint8).flatten(-2).chunk(2, -1)
    return Codes(low | (high << 4), scale[..., 0], zero[..., 0])


def _levels(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The codes of `x` as numbers, `[..., D]` or `[..., groups, channels]`, with scales and zeros of as many axes."""
    # A norm and `aminmax` are one launch, but for many rows on a CPU ten times slower than `amax` and `amin`.
    many = x.is_cpu and x.numel() > _FEW
    if bits == 8:
        # Rounded to 8 bits, the scale is at most 2^-9 too small, so no code exceeds 127. What is not finite has a scale
        # that is not finite.
        most = x.abs().amax(-1, keepdim=True) if many else torch.linalg.vector_norm(x, math.inf, -1, keepdim=True)
        scale = most.mul_(1 / 127).clamp_min_(_LEAST_SCALE).bfloat16()
        return (x / scale).round_(), scale, None
    grouped = turned(x).unflatten(-1, (groups_of(x.shape[-1]), -1))
    if many:
        least, most = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    else:
        least, most = grouped.aminmax(dim=-1, keepdim=True)
    zero = least.bfloat16()
    base = zero.to(x.dtype)
    scale = torch.maximum((most - least) / 15, base.abs() * _FINEST).clamp_min_(_LEAST_SCALE).bfloat16()
    return grouped.sub_(base).div_(scale).round_().clamp_(0, 15), scale, zero


def _of_levels(steps: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Decode 4-bit codes to `[..., D]`; writes into `steps`."""
    return turned(steps.mul_(scale).add_(zero).flatten(-2))


def room_for_codes(shape: Sequence[int], bits: int, device: torch.device) -> Codes:
    """Uninitialised codes of a tensor of a shape `[..., D]`; if all are 0, so is what they stand for.

    Raises:
        ValueError: the width does not go with the bits.
    """
    *rows, width = shape

    def empty(last: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*rows, last, dtype=dtype, device=device)

    if bits == 8:
        return Codes(empty(width, torch.int8), empty(1, torch.bfloat16), None)
    groups = groups_of(width)
    return Codes(empty(width // 2, torch.uint8), empty(groups, torch.bfloat16), empty(groups, torch.bfloat16))


def decode(held: Codes, dtype: torch.dtype) -> Tensor:
    """The tensor `[..., D]` that codes stand for."""
    if held.zero is None:
        return held.codes.to(dtype).mul_(held.scale)
    return _of_levels(_steps(held, dtype), held.scale[..., None], held.zero[..., None])


def rounded(x: Tensor, bits: int) -> Tensor:
    """`x` as it is decoded again, in the computing dtype. The gradient passes straight through."""
    found: Tensor = _Rounded.apply(x.to(computing_dtype(x)), bits)  # type: ignore[no-untyped-call]
    return found


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        steps, scale, zero = _levels(x, bits)
        if zero is None:
            return steps.mul_(scale)
        return _of_levels(steps, scale, zero)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def key_scores(q: Tensor, k: Tensor | Codes) -> Tensor:
    """q · k `[B, K, Q, S]` for queries `[B, K, Q, D]` and keys `[B, S, K, D]`."""
    if isinstance(k, Tensor):
        return q @ k.to(q.dtype).permute(0, 2, 3, 1)
    if k.zero is None:
        return (q @ k.codes.to(q.dtype).permute(0, 2, 3, 1)).mul_(k.scale.permute(0, 2, 3, 1))
    # Scales and zeros act on the scores of a piece of the channels, of which there are fewer than channels. Low and
    # high bits are two products, so codes are not put side by side.
    scale, zero = _by_piece(k.scale, k.zero, q.dtype)  # [B, K, pieces, S]
    pieces = scale.shape[2]
    grouped: Tensor = turned(q).unflatten(-1, (pieces, -1)).transpose(2, 3)  # [B, K, pieces, Q, channels]
    of_zeros: Tensor = grouped.sum(-1).transpose(2, 3) @ zero
    low, high = (x.permute(0, 2, 3, 4, 1) for x in _low_and_high(k, pieces, q.dtype))
    low_scale, high_scale = scale.unsqueeze(3).chunk(2, 2)
    low_q, high_q = grouped.chunk(2, 2)
    of_low, of_high = low_q @ low, high_q @ high
    if pieces == 2:
        return of_zeros.unsqueeze(2).addcmul_(of_low, low_scale).addcmul_(of_high, high_scale).squeeze(2)
    return of_zeros.add_(of_low.mul_(low_scale).addcmul_(of_high, high_scale).sum(2))


def value_sums(shares: Tensor, v: Tensor | Codes) -> Tensor:
    """Sums of values `[B, S, K, V]` by weights `[B, K, Q, S]`: `[B, K, Q, V]`."""
    if isinstance(v, Tensor):
        return shares @ v.to(shares.dtype).transpose(1, 2)
    if v.zero is None:
        return (shares * v.scale.permute(0, 2, 3, 1)) @ v.codes.to(shares.dtype).transpose(1, 2)
    scale, zero = _by_piece(v.scale, v.zero, shares.dtype)  # [B, K, pieces, S]
    low, high = (x.permute(0, 2, 3, 1, 4) for x in _low_and_high(v, scale.shape[2], shares.dtype))
    low_shares, high_shares = (shares.unsqueeze(2) * scale.unsqueeze(3)).chunk(2, 2)
    found = torch.cat([(low_shares @ low).transpose(2, 3), (high_shares @ high).transpose(2, 3)], 3)
    return turned(found.add_((shares @ zero.transpose(2, 3)).unsqueeze(-1)).flatten(3))  # [B, K, Q, pieces, channels]


def turned(x: Tensor) -> Tensor:
    """Hx for `x` `[..., D]`: in blocks of the largest power of two that divides D."""
    width = x.shape[-1]
    size = width & -width
    matrix = _hadamard(size, x.dtype, x.device)
    # The matrix is symmetric, so its rows are its columns.
    return product(x, matrix) if size == width else product(x.unflatten(-1, (-1, size)), matrix).flatten(-2)


def _steps(held: Codes, dtype: torch.dtype) -> Tensor:
    """The codes of 4 bits `[..., groups, channels of a group]`, as numbers 0 to 15."""
    steps = torch.cat([held.codes & 15, held.codes >> 4], -1).to(dtype)
    grouped: Tensor = steps.unflatten(-1, (held.scale.shape[-1], -1))
    return grouped


def _low_and_high(held: Codes, pieces: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The codes of 4 bits as numbers, the low ones and the high ones, each `[B, S, K, pieces / 2, channels]`."""
    low, high = (held.codes & 15).to(dtype), (held.codes >> 4).to(dtype)
    shape = (pieces // 2, -1)
    return low.unflatten(-1, shape), high.unflatten(-1, shape)


def _by_piece(scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales and zeros `[B, S, K, groups]` as `[2, B, K, pieces, S]`: an even number of pieces, of one group each."""
    found = torch.stack([scale.permute(0, 2, 3, 1), zero.permute(0, 2, 3, 1)]).to(dtype)
    groups = scale.shape[-1]
    if groups == 1:
        return found.expand(-1, -1, -1, 2, -1)
    return found.repeat_interleave(2, 3) if groups % 2 else found


@cache
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A normal tensor, because calls with and without inference mode share it.
    with torch.inference_mode(False), torch.no_grad():
        matrix: Tensor = torch.ones(1, 1, dtype=dtype, device=device)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        scaled: Tensor = matrix / size**0.5
        return scaled
