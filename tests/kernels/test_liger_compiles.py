"""The machine code of Liger attention's kernels for Hopper, as a launch on a GPU specialises them; no GPU is needed.

The interpreter lets pass what the compiler refuses, and knows nothing of registers, tensor cores and shared memory.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

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
    *("key_statistics", "carry_states", "carry_gradients", "chunk_factors", "gate_gradients"),
    "sum_columns",
}
WIDTHS, GROUPS = (64, 128, 256), (1, 3, 4, 16)
QUICK = {(64, 3), (128, 4)}
SHAPES = [
    pytest.param(width, group, marks=[] if (width, group) in QUICK else pytest.mark.slow)
    for width in WIDTHS
    for group in GROUPS
]


def passes(width: int, group: int, **options):
    from evals.kernels.compiled import launches

    return launches(2 * group, 2, width, options.pop("tokens", 2048), **options)


@pytest.mark.parametrize(("width", "group"), SHAPES)
def test_programs_keep_to_their_bounds(width, group):
    from evals.kernels.compiled import BLOCK_SHARED_MEMORY, compile_launch

    for ahead, part in zip((True, False), passes(width, group), strict=True):
        for program in map(compile_launch, part):
            assert program.shared <= BLOCK_SHARED_MEMORY, program
            if program.name in KEY_BY_KEY:
                continue
            assert program.spills <= (0 if ahead and width <= 128 else 256), program
            assert program.tensor_cores == "wgmma" or program.name in WITHOUT_TILES, program


def test_one_program_serves_every_length():
    keys = set()
    for tokens in range(1001, 1017):
        keys |= {launch.key for part in passes(64, 3, tokens=tokens) for launch in part}
    assert len(keys) == sum(map(len, passes(64, 3)))
