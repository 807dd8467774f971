"""The compiler takes the kernels of Liger attention for Hopper, and they fit its shared memory; no GPU is needed.

The interpreter lets pass what the compiler refuses, as a variable that changes its shape in a loop.
"""

from __future__ import annotations

import importlib.util
import os

import linearize_kernels.liger as liger
import pytest
import torch
from linearize_kernels.liger import liger_attention
from linearize_kernels.liger_options import Columns, Gate, LigerOptions

pytestmark = [
    pytest.mark.triton,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs triton, and its compiler",
    ),
]
SHARED_MEMORY = 232448  # bytes that a block may ask for on compute capability 9.0
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}


@pytest.mark.parametrize(
    ("width", "group", "mix", "gates", "dtype"),
    [(128, 4, "learned", "key", torch.bfloat16)],
)
def test_kernels_compile_for_hopper(width, group, mix, gates, dtype, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    sizes: dict[str, int] = {}

    def compile_only(kernel, *args, grid, warmup, num_warps=4, **kwargs):
        values = dict(zip([p.name for p in kernel.params], args, strict=False)) | kwargs
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        plain = {int: "i32", float: "fp32"}
        signature = {
            p.name: "constexpr"
            if p.is_constexpr
            else POINTERS[values[p.name].dtype]
            if isinstance(values[p.name], torch.Tensor)
            else plain[type(values[p.name])]
            for p in kernel.params
        }
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        sizes[kernel.__name__] = compiled.metadata.shared

    monkeypatch.setattr(liger, "_interpreted", lambda: True)
    monkeypatch.setattr(JITFunction, "run", compile_only)

    def zeros(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(*shape, dtype=of, requires_grad=True)

    gate = Gate(zeros(1, width, of=torch.float32), zeros(1, width, of=torch.float32))
    outputs, _ = liger_attention(
        zeros(100, group, width),
        zeros(100, 1, width),
        zeros(100, 1, width),
        zeros(100, group, width),
        zeros(100, 1, width),
        gate if gates == "key" else zeros(100, 1, width),
        LigerOptions(64, 0.1, mix=mix),
        mix_weight=zeros(group, width, of=torch.float32) if mix == "learned" else zeros(group, of=torch.float32),
        columns=Columns(zeros(1, 4, 1, width), zeros(1, 4, 1, width), 4),
    )
    outputs.float().sum().backward()
    assert len(sizes) == 11
    assert max(sizes.values()) <= SHARED_MEMORY
