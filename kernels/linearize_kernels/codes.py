"""Keys and values in 8 and 4 bits, and attention's products with them.

    8 bits   x ≈ scale · c ,  c in -127..127
    4 bits   Hx ≈ scale · level(c) ,  level(c) = 3/4 c + c³/256 ,  c in -8..7

H is the Hadamard matrix / sqrt(D), which spreads outliers over the channels (QuaRot, arXiv 2404.00456). A token has one
scale per head, in bfloat16. In 4 bits levels are closer together near 0, where most of the turned channels are. The
channel furthest from 0 has c = -8, so the scale has the other sign; it is then set so that x times what its codes stand
for is |x|²: less would flatten every softmax a little. Of normally distributed channels, 64 a head, it loses 0.0074 of
the squares, equal steps 0.0104.

H is symmetric and orthogonal, so q · x = Hq · Hx, and sums of values are turned back once: neither keys nor values are
turned one by one. A decoded tensor has the same codes again, so rounding twice is rounding once (in 4 bits but for the
rounding of the turn).
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

_LEAST_SCALE = 1e-30
_SLANT = 1.0003
_FEW = 2**12


class Codes(NamedTuple):
    """A tensor `[..., D]` in 8 or 4 bits.

    Attributes:
        codes: `[..., D]` int8, or `[..., D / 2]` uint8 with the codes of channels i and i + D / 2, plus 8, in the low
            and the high bits.
        scale: `[..., 1]` bfloat16.
    """

    codes: Tensor
    scale: Tensor

    @property
    def packed(self) -> bool:
        """True in 4 bits."""
        return self.codes.dtype == torch.uint8


def refuse_width(width: int) -> None:
    """Refuse a width of heads that 4 bits do not take.

    Raises:
        ValueError: the width is odd, so two codes do not share a byte.
    """
    if width % 2:
        raise ValueError(f"4 bits need heads of an even width, and this one's is {width}")


def encode(x: Tensor, bits: int) -> Codes:
    """`x` `[..., D]` in 8 or 4 bits."""
    if x.is_meta:  # there a reduction imports sympy and torch._dynamo, which takes seconds
        return room_for_codes(x.shape, bits, x.device)
    codes, scale = _coded(x.to(computing_dtype(x)), bits)
    if bits == 8:
        return Codes(codes.to(torch.int8), scale)
    refuse_width(x.shape[-1])
    low, high = codes.add_(8).to(torch.uint8).chunk(2, -1)
    return Codes(low | (high << 4), scale)


def _coded(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The numbers c of `x` `[..., D]`, in the dtype of `x`, and its scales `[..., 1]`."""
    many = x.is_cpu and x.numel() > _FEW  # a norm and `aminmax` are one launch, but there ten times slower
    if bits == 8:
        most = x.abs().amax(-1, keepdim=True) if many else torch.linalg.vector_norm(x, math.inf, -1, keepdim=True)
        # The scale is rounded by at most 2^-9, which takes no code beyond the largest. What is not finite has a scale
        # that is not finite.
        scale = most.mul_(1 / 127).clamp_min_(_LEAST_SCALE).bfloat16()
        return (x / scale).round_(), scale
    x = turned(x)
    low, high = (x.amin(-1, True), x.amax(-1, True)) if many else x.aminmax(dim=-1, keepdim=True)
    # Turned 8-bit codes often have |low| = |high|, where rounding would choose the sign; none have this ratio.
    most = torch.where(high > low * -_SLANT, high, low).mul_(-1 / 8)
    scale = most.masked_fill_(most.abs() < _LEAST_SCALE, _LEAST_SCALE).bfloat16()
    x = x / scale
    square = x * x
    # The inverse of `level` to 0.03 of a step: few codes are not the nearest, and all forms choose alike.
    codes = (square * (3 / 65536)).sub_(1 / 128).mul_(square).add_(21 / 16).mul_(x).round_().clamp_(-8, 7)
    common = x.mul_(_level(codes)).sum(-1, True)
    return codes, (scale * torch.where(common > 0, square.sum(-1, True) / common, 1)).bfloat16()


def room_for_codes(shape: Sequence[int], bits: int, device: torch.device) -> Codes:
    """Uninitialised codes of a tensor of a shape `[..., D]`; if all are 0, so is what they stand for.

    Raises:
        ValueError: the width does not go with the bits.
    """
    *rows, width = shape
    if bits == 4:
        refuse_width(width)

    def empty(last: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*rows, last, dtype=dtype, device=device)

    codes = empty(width, torch.int8) if bits == 8 else empty(width // 2, torch.uint8)
    return Codes(codes, empty(1, torch.bfloat16))


def decode(held: Codes, dtype: torch.dtype) -> Tensor:
    """The tensor `[..., D]` that codes stand for."""
    levels = _levels(held, dtype).mul_(held.scale)
    return turned(levels) if held.packed else levels


def rounded(x: Tensor, bits: int) -> Tensor:
    """`x` as it is decoded again, in the computing dtype. The gradient passes straight through."""
    found: Tensor = _Rounded.apply(x.to(computing_dtype(x)), bits)  # type: ignore[no-untyped-call]
    return found


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        codes, scale = _coded(x, bits)
        return codes.mul_(scale) if bits == 8 else turned(_level(codes).mul_(scale))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def key_scores(q: Tensor, k: Tensor | Codes) -> Tensor:
    """q · k `[B, K, Q, S]` for queries `[B, K, Q, D]` and keys `[B, S, K, D]`."""
    if isinstance(k, Tensor):
        return q @ k.to(q.dtype).permute(0, 2, 3, 1)
    q = turned(q) if k.packed else q
    return (q @ _levels(k, q.dtype).permute(0, 2, 3, 1)).mul_(k.scale.permute(0, 2, 3, 1))


def value_sums(shares: Tensor, v: Tensor | Codes) -> Tensor:
    """Sums of values `[B, S, K, V]` by weights `[B, K, Q, S]`: `[B, K, Q, V]`."""
    if isinstance(v, Tensor):
        return shares @ v.to(shares.dtype).transpose(1, 2)
    sums = (shares * v.scale.permute(0, 2, 3, 1)) @ _levels(v, shares.dtype).transpose(1, 2)
    return turned(sums) if v.packed else sums


def turned(x: Tensor) -> Tensor:
    """Hx for `x` `[..., D]`: in blocks of the largest power of two that divides D."""
    width = x.shape[-1]
    size = width & -width
    matrix = _hadamard(size, x.dtype, x.device)
    # The matrix is symmetric, so its rows are its columns.
    return product(x, matrix) if size == width else product(x.unflatten(-1, (-1, size)), matrix).flatten(-2)


def _levels(held: Codes, dtype: torch.dtype) -> Tensor:
    """Decode codes in units of their scales: `[..., D]`."""
    if not held.packed:
        return held.codes.to(dtype)
    return _level(torch.cat([held.codes & 15, held.codes >> 4], -1).to(dtype).sub_(8))


def _level(codes: Tensor) -> Tensor:
    return (codes * codes).mul_(1 / 256).add_(0.75).mul_(codes)


@cache
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A normal tensor, because calls with and without inference mode share it.
    with torch.inference_mode(False), torch.no_grad():
        matrix: Tensor = torch.ones(1, 1, dtype=dtype, device=device)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        scaled: Tensor = matrix / size**0.5
        return scaled
