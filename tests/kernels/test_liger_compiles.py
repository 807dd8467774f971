"""The machine code of Liger attention's kernels for Hopper, as a launch on a GPU specialises them; no GPU is needed.

The interpreter lets pass what the compiler refuses, and knows nothing of registers, tensor cores and shared memory.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

from evals.kernels import estimates, work
from evals.kernels.compiled import BLOCK_SHARED_MEMORY, compile_launch, launches, read_code

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs triton, and its compiler",
    ),
]
# For chunks of strong decays, key by key: slow, and rare.
KEY_BY_KEY = {"write_outputs_kernel", "query_gradients", "key_gradients", "keys_of_states", "read_chunks"}
# Their products are too small for wgmma, or there are none.
WITHOUT_TILES = {
    *("key_statistics", "carry_states", "chunk_factors", "mix_gradients", "gate_gradients", "sum_columns"),
}
# Bytes that kernels may spill; above a width of 128, these spill more.
AHEAD, BACK = 0, 256
# Forward, where a tile has one query head.
ONE_HEAD = {(128, 1): 96, (128, 3): 96}
WIDE = {"window_queries": 1152, "chunk_keys": 1280, "chunk_queries": 1792, "write_chunks": 256}
WIDTHS, GROUPS = (64, 128, 256), (1, 3, 4, 16)
QUICK = {(64, 3), (128, 4)}
SHAPES = [
    pytest.param(width, group, marks=[] if (width, group) in QUICK else pytest.mark.slow)
    for width in WIDTHS
    for group in GROUPS
]


def passes(width: int, group: int, tokens: int = 2048):
    """The launches on heads of Llama-3-8B for (128, 4), and of SmolLM2 for (64, 3)."""
    groups = 3 if group == 3 else 8
    return launches(groups * group, groups, width, tokens)


@pytest.mark.parametrize(("width", "group"), SHAPES)
def test_programs_keep_to_their_bounds(width, group):
    for ahead, part in zip((True, False), passes(width, group), strict=True):
        for program in map(compile_launch, part):
            assert program.shared <= BLOCK_SHARED_MEMORY, program
            if program.name in KEY_BY_KEY:
                continue
            most = ONE_HEAD.get((width, group), AHEAD) if ahead else BACK
            assert program.spills <= (most if width <= 128 else WIDE.get(program.name, BACK)), program
            if program.name not in WITHOUT_TILES:
                assert program.tensor_cores == "wgmma", program


def test_one_program_serves_every_length():
    keys = {launch.key for tokens in range(1001, 1017) for part in passes(64, 3, tokens) for launch in part}
    assert len(keys) == len({launch.key for part in passes(64, 3) for launch in part})


def test_launches():
    ahead, back = ([launch.name for launch in part] for part in passes(128, 4))
    assert len(ahead) <= 6 and len(back) <= 20


@pytest.mark.parametrize(("name", "forward", "backward", "ahead", "back"), [("llama-3-8b", 1.6e-3, 7e-3, 100, 410)])
def test_estimates_keep_to_their_bounds(name, forward, backward, ahead, back):
    """Seconds for 32,768 tokens as 16 texts, and KiB to and from memory per token."""
    found = estimates.passes(work.SHAPES[name], 2048, 16)
    seconds, moved = (
        {kind: sum(getattr(x, field) for x in part) for kind, part in found.items()} for field in ("estimate", "bytes")
    )
    assert seconds["forward"] <= forward and seconds["backward"] <= backward
    assert moved["forward"] / 1024 <= ahead and moved["backward"] / 1024 <= back


def test_a_listing_is_read():
    """Instructions belong to the innermost loop around them; a spill is a store and a load of a thread's own memory."""
    code = ["MOV R1, R2", "FFMA R1, R2, R3, R4", "STL.64 [R1], R2", "MUFU.EX2 R1, R2", "LDL R1, [R2]"]
    code += ["FADD R1, R2, R3", "@P0 BRA `(.L_x_1)", "@!P1 BRA `(.L_x_0)", "EXIT"]
    lines = [f"        /*{16 * n:04x}*/  {line} ;" for n, line in enumerate(code)]
    listing = "\n".join([".L_x_0:", *lines[:5], ".L_x_1:", *lines[5:]])
    names, loops, spills = read_code(listing)
    assert spills == 12 and names["FADD"] == names["MUFU"] == 1
    outside, outer, inner = loops
    assert outside.instructions == {"EXIT": 1} and inner.instructions == {"FADD": 1, "BRA": 1}
    assert outer.cycles["special"] == 8 and outer.instructions["STL"] == 1
