"""The machine code for Hopper of the kernels that read a whole text with landmarks; no GPU is needed."""

from __future__ import annotations

import pytest
import torch

from evals.kernels.compiled import BLOCK_SHARED_MEMORY, compile_launch
from evals.kernels.landmarks import READING, landmark_launches
from evals.speed.operators import KERNELS_TAKE, of_a_layer, taking
from linearize.recipe import load_recipe
from tests.kernels.test_step_compiles import pytestmark

__all__ = ["pytestmark"]

# Query heads, key/value heads, width. Groups of 4, 3 and 1.
LLAMA, SMOLLM2, GPT2, GEMMA = (32, 8, 128), (9, 3, 64), (12, 12, 64), (8, 4, 256)
CODED = {"memory_dtype": "int4", "landmark_score": "learned"}


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        (LLAMA, torch.bfloat16, CODED),
        (SMOLLM2, torch.bfloat16, {}),
        pytest.param(GPT2, torch.bfloat16, {"memory_dtype": "int8"}, marks=pytest.mark.slow),
        pytest.param(LLAMA, torch.bfloat16, {}, marks=pytest.mark.slow),
        pytest.param(SMOLLM2, torch.float16, CODED, marks=pytest.mark.slow),
        pytest.param(GEMMA, torch.bfloat16, {}, marks=pytest.mark.slow),
    ],
)
def test_a_text_spills_nothing_and_uses_tensor_cores(shape, dtype, options):
    for launch in landmark_launches(shape, 2048, 1035, dtype=dtype, **options):
        program = compile_launch(launch)
        assert program.spills == 0 and program.shared <= BLOCK_SHARED_MEMORY, program
        assert program.tensor_cores == "wgmma" or launch.name not in READING, program


def test_one_program_serves_every_length_and_numbers_of_slots_up_to_a_power_of_2():
    keys = {
        launch.key
        for tokens, slots in ((400, 993), (2048, 1035), (4096, 2016))
        for launch in landmark_launches(SMOLLM2, tokens, slots)
    }
    assert len(keys) == 4


def test_launches_of_a_prompt_do_not_depend_on_its_length():
    mixer = load_recipe("default").mixer
    short, long = (of_a_layer(mixer, taking(tokens), KERNELS_TAKE) for tokens in (200, 600))
    assert short == long and sum(long.values()) <= 55
    assert all(long[f"landmark_{name}_kernel"] == 1 for name in ("pool", "choose", "read", "keep"))
