"""Compiles the fused step for a Hopper GPU on a machine without one: `python -m tests.kernels.compile_step`."""

from __future__ import annotations

import torch
import triton
from linearize_kernels import Step, StepWeights, step_triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CASES = {
    "llama-3-8b": ((32, 8, 128, 64, 4), {"gate": "channel", "mix": "learned"}),
    "smollm2": ((9, 3, 64, 64, 4), {"gate": "channel", "mix": "softmax", "features": "learned", "qk_norm": True}),
}
KERNEL = step_triton.step_kernel
_TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


class _Recorder:
    """Stands in for the kernel and notes what it would be launched with."""

    def __getitem__(self, grid):
        return self.record

    def record(self, *arguments, **constants) -> None:
        self.arguments, self.constants = arguments, constants


def compiled(case: str) -> dict:
    """The stages of the compiled kernel."""
    (heads, groups, width, window, sinks), options = CASES[case]
    features = width * (2 if options.get("features") in ("exp", "learned") else 1)
    weights = StepWeights(
        *(torch.zeros(groups, width) for _ in range(2)),
        feature_projection=torch.zeros(groups, width, width),
        mix=torch.zeros(heads, width) if options["mix"] == "learned" else torch.zeros(heads),
    )

    def half(*shape: int) -> torch.Tensor:
        return torch.zeros(1, *shape, width, dtype=torch.bfloat16)

    parts = {
        "window": {name: half(window, groups) for name in ("k_rotated", "k", "v")},
        "sinks": {name: half(sinks, groups) for name in ("k_rotated", "v")},
        "state": {"state": torch.zeros(1, groups, features, width + 1)},
    }
    new = tuple(half(1, n) for n in (heads, groups, groups, heads, groups))
    step_triton.step_kernel = recorder = _Recorder()
    step = Step(window=window, sinks=sinks, scale=1.0, **options)
    count = torch.zeros(1, dtype=torch.long)
    step_triton.step_triton(step, weights, new, parts, count, count)
    options = {name: recorder.constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    kinds = {int: "i32", float: "fp32"}
    signature = {
        name: _TYPES[x.dtype] if isinstance(x, torch.Tensor) else kinds[type(x)]
        for name, x in zip(KERNEL.arg_names, recorder.arguments, strict=False)
    }
    signature |= dict.fromkeys(recorder.constants, "constexpr")
    source = ASTSource(KERNEL, signature, recorder.constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


if __name__ == "__main__":
    for case in CASES:
        print(case, *compiled(case))
