"""The contenders: this package's fused kernels, a composition of other kernels, and full attention.

    fused      window, sinks, recurrence and mix in one operation, as in the recipe `default`
    composed   Liger's sum of two: flash-linear-attention's `chunk_gla` (keys, values and gates repeated per query head,
               because it does not support grouped heads) and softmax over the window by FlexAttention
    causal     softmax over everything: PyTorch's FlashAttention

Each is a function without arguments that computes the outputs. In a dry run on a CPU, plain PyTorch replaces the
kernels of other packages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from linearize_kernels import Step, StepWeights, gla
from linearize_kernels.liger import liger_attention
from linearize_kernels.liger_options import Columns, Gate, LigerOptions
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from evals.kernels.work import Shape

Run = Callable[[], Tensor]
CONTENDERS = ("fused", "composed", "causal")


@dataclass
class Inputs:
    """The projections of R texts of T tokens, `[R, T, heads, D]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_rotated: Tensor
    k_rotated: Tensor
    gate_scale: Tensor
    gate_bias: Tensor
    mix_weight: Tensor

    def leaves(self) -> list[Tensor]:
        return list(vars(self).values())


def draw(shape: Shape, length: int, rows: int, device: torch.device, dtype: torch.dtype, *, grad: bool) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        x = torch.randn(*size, generator=generator, device=device).to(dtype)
        return x.requires_grad_(grad)

    heads, groups, width = shape.query_heads, shape.key_value_heads, shape.width

    def small(*size: int, value: float) -> Tensor:
        return torch.full(size, value, device=device).requires_grad_(grad)

    q, k, v, q_rotated, k_rotated = (random(rows, length, n, width) for n in (heads, groups, groups, heads, groups))
    # The gates' initial values in the recipe.
    scale, bias = small(groups, width, value=0.1), small(groups, width, value=5.0)
    return Inputs(q, k, v, q_rotated, k_rotated, scale, bias, small(heads, width, value=0.3))


def prefill(name: str, shape: Shape, inputs: Inputs) -> Run:
    """A contender over whole texts."""
    return {"fused": _fused, "composed": _composed, "causal": _causal}[name](shape, inputs)


def _fused(shape: Shape, x: Inputs) -> Run:
    options = LigerOptions(window=shape.window, scale=shape.width**-0.5)
    rows = x.q.shape[0]

    def run() -> Tensor:
        columns = Columns(x.k_rotated[:, : shape.sinks], x.v[:, : shape.sinks], shape.sinks)
        flat = [t.flatten(0, 1) for t in (x.q_rotated, x.k_rotated, x.v, x.q, x.k)]
        outputs, _ = liger_attention(
            *flat, Gate(x.gate_scale, x.gate_bias), options, mix_weight=x.mix_weight, columns=columns, rows=rows
        )
        return outputs

    return run


def _composed(shape: Shape, x: Inputs) -> Run:
    run_gla = _gla(x.q.device)
    window = _window(shape, x.q.shape[1], x.q.device)
    group = shape.group

    def run() -> Tensor:
        keys, values = (t.repeat_interleave(group, 2) for t in (x.k, x.v))
        gates = F.logsigmoid(x.gate_scale * x.k + x.gate_bias).repeat_interleave(group, 2)
        read, _ = run_gla(x.q.softmax(-1), keys.softmax(-1), values, gates.to(x.v.dtype))
        return 0.5 * window(x.q_rotated, x.k_rotated, x.v) + 0.5 * read

    return run


def _gla(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    if device.type != "cuda":
        return gla
    from fla.ops.gla import chunk_gla

    return partial(chunk_gla, scale=1.0)


def _causal(shape: Shape, x: Inputs) -> Run:
    def run() -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (x.q_rotated, x.k_rotated, x.v))
        with _flash(q.device):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2)

    return run


def _flash(device: torch.device) -> Any:
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION] if device.type == "cuda" else [SDPBackend.MATH])


def _window(shape: Shape, length: int, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Softmax over the last W tokens, `[R, T, heads, D]` in and out."""
    if device.type != "cuda":
        token = torch.arange(length, device=device)
        seen = (token <= token[:, None]) & (token > token[:, None] - shape.window)

        def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)

        return masked
    blocks, attend = _flex(length, shape.window)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y: Tensor = attend(q, k, v, block_mask=blocks, enable_gqa=True)
        return y.transpose(1, 2)

    return flex


@cache
def _flex(length: int, window: int) -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - window)

    return create_block_mask(seen, None, None, length, length, device="cuda"), torch.compile(flex_attention)


def step(name: str, shape: Shape, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> Run:
    """A contender for one more token per row after `length` of them."""
    make = {"fused": _fused_step, "composed": _composed_step, "causal": _causal_step}[name]
    return make(shape, draw(shape, 1, batch, device, dtype, grad=False), length)


def _kept(shape: Shape, x: Inputs, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of earlier tokens, `[B, N, K, D]`."""
    size = (x.k.shape[0], tokens, shape.key_value_heads, shape.width)
    k, v = (torch.randn(size, device=x.k.device).to(x.k.dtype) for _ in range(2))
    return k, v


def _fused_step(shape: Shape, x: Inputs, length: int) -> Run:
    from linearize_kernels.step_triton import step_triton

    (k, v), (sink_k, sink_v) = (_kept(shape, x, n) for n in (shape.window, shape.sinks))
    state = torch.rand(
        x.q.shape[0], shape.key_value_heads, shape.width, shape.width + 1, device=x.q.device, dtype=torch.float32
    )
    parts = {
        "window": {"k_rotated": k, "k": k.clone(), "v": v},
        "sinks": {"k_rotated": sink_k, "v": sink_v},
        "state": {"state": state},
    }
    counts = torch.full((x.q.shape[0],), length, device=x.q.device)
    fixed = Step(shape.window, shape.sinks, shape.width**-0.5, gate="channel", mix="learned")
    weights = StepWeights(gate_scale=x.gate_scale, gate_bias=x.gate_bias, mix=x.mix_weight)
    return lambda: step_triton(fixed, weights, (x.q, x.k, x.v, x.q_rotated, x.k_rotated), parts, counts)


def _composed_step(shape: Shape, x: Inputs, length: int) -> Run:
    if x.q.device.type == "cuda":
        from fla.ops.gla import fused_recurrent_gla as one_token
    else:
        one_token = _one_token
    k, v = _kept(shape, x, shape.window)
    group, slot = shape.group, length % shape.window
    state = torch.rand(x.q.shape[0], shape.query_heads, shape.width, shape.width, device=x.q.device)

    def run() -> Tensor:
        nonlocal state
        k[:, slot], v[:, slot] = x.k_rotated[:, 0], x.v[:, 0]
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (x.q_rotated, k, v)), enable_gqa=True)
        keys, values = (t.repeat_interleave(group, 2) for t in (x.k, x.v))
        gates = F.logsigmoid(x.gate_scale * x.k + x.gate_bias).repeat_interleave(group, 2)
        read, state = one_token(
            x.q.softmax(-1), keys.softmax(-1), values, gk=gates, scale=1.0, initial_state=state, output_final_state=True
        )
        return 0.5 * y.transpose(1, 2) + 0.5 * read

    return run


def _one_token(q: Tensor, k: Tensor, v: Tensor, *, gk: Tensor, initial_state: Tensor, **_: Any) -> Any:
    return gla(q, k, v, gk, initial_state)


def _causal_step(shape: Shape, x: Inputs, length: int) -> Run:
    k, v = _kept(shape, x, length)

    def run() -> Tensor:
        k[:, -1], v[:, -1] = x.k_rotated[:, 0], x.v[:, 0]
        q = x.q_rotated.transpose(1, 2)
        with _flash(q.device):
            return F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)

    return run
