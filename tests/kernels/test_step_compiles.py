"""The machine code of a decoding step's kernels for Hopper, as a launch on a GPU specialises them; no GPU is needed."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from evals.kernels.compiled import compile_launch, recording
from evals.speed.operators import KERNELS_TAKE, launching, of_a_layer
from linearize.conversion.swap import convert_model
from linearize.families.base import AttentionLayer, Projections
from linearize.model.configuration import MixerConfig
from linearize.model.memory import LayerMemory
from linearize.model.mixer.fused import fused_step
from linearize.model.mixer.mixer import Mixer
from linearize.recipe import MixerSpec, load_recipe
from tests.model.test_families import _built

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs triton, and its compiler",
    ),
]
HALF = torch.bfloat16
# Query heads, key/value heads, width, window, sinks.
LLAMA, SMOLLM2, GEMMA = (32, 8, 128, 64, 4), (9, 3, 64, 64, 4), (8, 4, 256, 64, 4)


def empty(*shape: int, of: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=of, device="meta")


def step_launches(shape: tuple[int, ...], **options):
    from linearize_kernels import Step, StepWeights, step_triton

    heads, groups, width, window, sinks = shape
    features = width * (2 if options.get("features") in ("exp", "learned") else 1)
    weights = StepWeights(
        *(empty(groups, width, of=torch.float32) for _ in range(2)),
        feature_projection=empty(groups, width, width, of=torch.float32),
        mix=empty(heads, *([width] if options["mix"] == "learned" else []), of=torch.float32),
    )
    parts = {
        "window": {name: empty(1, window, groups, width) for name in ("k_rotated", "k", "v")},
        "sinks": {name: empty(1, sinks, groups, width) for name in ("k_rotated", "v")},
        "state": {"state": empty(1, groups, features, width + 1, of=torch.float32)},
    }
    new = tuple(empty(1, 1, n, width) for n in (heads, groups, groups, heads, groups))
    count = empty(1, of=torch.long)
    with recording() as found:
        step_triton.step_triton(
            Step(window=window, sinks=sinks, scale=1.0, **options), weights, new, parts, count, count, dtype=HALF
        )
    return found


@pytest.mark.parametrize(
    ("shape", "options", "spills"),
    [
        (LLAMA, {"gate": "channel", "mix": "learned"}, 0),
        (SMOLLM2, {"gate": "channel", "mix": "softmax", "features": "learned", "qk_norm": True}, 0),
        (LLAMA, {"mix": "learned"}, 0),
    ],
)
def test_the_step_spills_nothing_and_uses_tensor_cores(shape, options, spills):
    (launch,) = step_launches(shape, **options)
    program = compile_launch(launch)
    assert program.spills <= spills and program.tensor_cores == "mma.sync", program


def block_launches(heads: int, groups: int, width: int, model: int, inner: int):
    """One launch of each kernel with all of its options, and one with Llama's."""
    from linearize_kernels.block import HeadNorms, Norm, activated, residual_norm, turned_heads

    x, count = empty(1, model), empty(1, of=torch.long)
    rms, layer = Norm("rms", empty(model), 1e-6), Norm("layer", empty(model), 1e-6, empty(model))
    own = HeadNorms(*(Norm("rms", empty(width), 1e-6, offset=1.0) for _ in range(2)), wide=False)
    wide = HeadNorms(*(Norm("rms", empty(n * width), 1e-6) for n in (heads, groups)), wide=True)
    projected = tuple(empty(1, n, width) for n in (heads, groups, groups))
    biases = tuple(empty(n * width) for n in (heads, groups, groups))
    table = (empty(1, 1, width), empty(1, 1, width))
    with recording() as found:
        residual_norm(x, None, before=rms, fused=True)
        residual_norm(x, x, before=rms, fused=True)
        residual_norm(x, x, after=layer, before=layer, factor=0.5, fused=True)
        turned_heads(projected, None, None, table, "halves", count, count, fused=True)
        turned_heads(projected, biases, own, table, "pairs of halves", count, count, fused=True)
        turned_heads(projected, None, wide, table, "pairs", count, None, fused=True)
        for activation in ("silu", "gelu", "gelu_tanh"):
            activated(empty(1, 2 * inner), activation, gated=True, fused=True)
    return found


@pytest.mark.parametrize("shape", [(32, 8, 128, 4096, 14336), (9, 3, 64, 576, 1536), (8, 4, 256, 2304, 9216)])
def test_the_kernels_of_a_block_spill_nothing(shape):
    found = block_launches(*shape)
    assert len(found) == 9
    for launch in found:
        assert compile_launch(launch).spills == 0, launch.name


def test_one_program_serves_every_count():
    keys = {launch.key for _ in range(2) for launch in block_launches(9, 3, 64, 576, 1536)}
    assert len(keys) == 9


def landmark_launches(shape: tuple[int, ...], **options):
    heads, groups, width, window, sinks = shape
    layer = AttentionLayer(heads, groups, width, width, width**-0.5)
    config = MixerConfig(layers=[0], window=window, sinks=sinks, landmarks=1035, recurrence="none", **options)
    with torch.device("meta"):
        mixer = Mixer(config, layer)
        memory = LayerMemory(mixer.parts(1, HALF, torch.device("meta")), 1, torch.device("meta"))
    count = empty(1, of=torch.long)
    new = Projections(*(empty(1, 1, n, width) for n in (heads, groups, groups, heads, groups)))
    with recording() as found:
        fused_step(mixer, new, count, memory, counts=count, dtype=HALF)
    return found


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (LLAMA, {"memory_dtype": "int4", "landmark_score": "learned"}),
        (SMOLLM2, {"memory_dtype": "int4", "landmark_score": "learned"}),
        pytest.param(LLAMA, {"memory_dtype": "int8"}, marks=pytest.mark.slow),
        pytest.param(LLAMA, {}, marks=pytest.mark.slow),
    ],
)
def test_the_step_of_landmarks_spills_nothing_and_uses_tensor_cores(shape, options):
    merge, step = map(compile_launch, landmark_launches(shape, **options))
    assert merge.spills == step.spills == 0, (merge, step)
    assert step.tensor_cores == "mma.sync", step


@pytest.mark.parametrize(("recipe", "most"), [("window-gla", 9), ("default", 9)])
def test_launches_of_a_recorded_step(recipe, most):
    mixer = load_recipe(recipe).mixer
    assert sum(of_a_layer(mixer, launching(200), KERNELS_TAKE).values()) <= most
    assert sum(of_a_layer(mixer, launching(200, merges=True), KERNELS_TAKE).values()) <= most + bool(mixer.landmarks)


def launches_of(row: str) -> int:
    """Launches a layer of a recorded step, as the difference between two layers and one."""

    def count(layers: int) -> int:
        kinds = {"layer_types": ["sliding_attention"] * layers} if row in LISTED else {}
        teacher = _built.__wrapped__(row, num_hidden_layers=layers, **kinds)
        model = convert_model(teacher, MixerSpec(window=12, sinks=3))
        return sum(launching(30)(model).values())

    return count(2) - count(1)


LISTED = ("gemma3_text", "olmo3", "cohere2")  # their configurations name the kind of each layer
FEWER = {"llama": 9, "llama, biases": 9, "qwen2": 9, "qwen3": 9, "gemma": 9, "gemma2": 10, "gemma3_text": 10, "phi3": 9}
FEWER |= {"olmo": 9, "olmo2": 9, "smollm3": 9, "granite": 9, "glm": 9, "glm4": 10, "cohere": 9, "starcoder2": 10}
FEWER |= {"stablelm": 9, "olmo3": 9, "cohere2": 9}


@pytest.mark.parametrize("row", FEWER)
def test_launches_of_families(row):
    assert launches_of(row) <= FEWER[row]
