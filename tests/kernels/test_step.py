"""The fused step against the mixer's own plain torch: outputs and memories, from an empty memory on.

Without a GPU under TRITON_INTERPRET=1 (`make test-kernels`), where a program takes tens of milliseconds: hence the
small shapes. With one, on the GPU.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.families.base import AttentionLayer, Projections
from linearize.model.configuration import MixerConfig
from linearize.model.memory import LayerMemory
from linearize.model.mixer.fused import refusal
from linearize.model.mixer.mixer import Mixer
from tests.model.test_layer import KINDS, close, converted, in_pieces

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
WINDOW, SINKS, STEPS = 4, 2, 9
# Row 0 has every token, row 1 pads before and between, and row 2 starts when the others' windows are full.
LENGTHS = torch.tensor([[1] * STEPS, [0, 1, 1, 0, 1, 1, 1, 1, 1], [0] * 6 + [1] * 3])

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
    ),
]


def make_layer(group: int = 2, heads: int = 2, width: int = 8, values: int = 8, softcap: float | None = None):
    return AttentionLayer(group * heads, heads, width, values, 0.4, softcap)


STEPPING = {
    name: options
    for name, options in KINDS.items()
    if "softmax" not in name.split()[:1] or name == "softmax"
    if refusal("step", MixerConfig(layers=[0], **options), make_layer()) is None
}


def make_mixer(layer: AttentionLayer, **options) -> Mixer:
    torch.manual_seed(0)
    mixer = Mixer(MixerConfig(**{"layers": [0], "window": WINDOW, "sinks": SINKS, **options}), layer, depth=0.7)
    for parameter in mixer.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return mixer.to(DEVICE).eval()


def tokens_of(layer: AttentionLayer, rows: int, tokens: int, dtype: torch.dtype, seed: int = 1) -> Projections:
    generator = torch.Generator().manual_seed(seed)
    heads, groups, width, values = layer.query_heads, layer.key_value_heads, layer.key_width, layer.value_width
    shapes = ((heads, width), (groups, width), (groups, values), (heads, width), (groups, width))
    drawn = (torch.randn(rows, tokens, *shape, generator=generator) for shape in shapes)
    return Projections(*(x.to(DEVICE, dtype) for x in drawn))


def empty(mixer: Mixer, rows: int, dtype: torch.dtype) -> LayerMemory:
    memory = LayerMemory(mixer.parts(rows, dtype, DEVICE), rows, DEVICE)
    if dtype == torch.float64:
        for name, x in memory.parts.get("state", {}).items():
            memory.parts["state"][name] = x.double()
    return memory


@torch.no_grad()
def run(mixer: Mixer, new: Projections, lengths: Tensor | None, memory: LayerMemory) -> Tensor:
    """Step by step; outputs of tokens that are not real are left out."""
    outputs = []
    for t in range(new.q.shape[1]):
        own = None if lengths is None else lengths[:, t].to(DEVICE)
        mixed = mixer(Projections(*(x[:, t : t + 1] for x in new)), own, memory)
        memory.advance(1, own)
        assert bool(mixed.isfinite().all())
        outputs.append(mixed[:, 0] if own is None else mixed[:, 0][own > 0])
    return torch.cat(outputs).double()


def three_ways(mixer: Mixer, new: Projections, lengths: Tensor | None, monkeypatch) -> list[dict[str, Tensor]]:
    """Outputs and memories of plain torch in float64, plain torch in the given dtype, and the kernel."""
    found = []
    exact = Projections(*(x.double() for x in new))
    for kernels, given in (("torch", exact), ("torch", new), ("triton", new)):
        monkeypatch.setenv("LINEARIZE_KERNELS", kernels)
        memory = empty(mixer, new.q.shape[0], given.q.dtype)
        outputs = run(mixer, given, lengths, memory)
        found.append({"outputs": outputs, **{name: x.double().clone() for name, x in memory.tensors()}})
    return found


def assert_no_worse_than_twice_plain_torch(found: list[dict[str, Tensor]]) -> None:
    exact, plain, fused = found
    for name, reference in exact.items():
        largest = float(reference.abs().max()) + 1e-30
        theirs, ours = (float((x[name] - reference).abs().max()) / largest for x in (plain, fused))
        assert ours <= 2 * theirs + 1e-6, (name, ours, theirs)


@pytest.mark.parametrize("kind", STEPPING)
def test_steps_equal_plain_torch(kind, monkeypatch):
    layer = make_layer(heads=1)
    mixer = make_mixer(layer, **{**STEPPING[kind], "window": WINDOW, "softmax_heads": []} | _sinks(STEPPING[kind]))
    new = tokens_of(layer, 3, STEPS, torch.float32)
    assert_no_worse_than_twice_plain_torch(three_ways(mixer, new, LENGTHS, monkeypatch))


def _sinks(options: dict) -> dict:
    return {"sinks": min(options.get("sinks", SINKS), SINKS)}


def test_every_kind_that_has_a_kernel_is_here():
    assert {"window", "default", "softmax", "fixed", "liger", "liger-hgrn2", "gates from queries"} <= STEPPING.keys()
    assert {"random gates", "mamba2", "retention", "gated_retention", "linear"} <= STEPPING.keys()


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"group": 3, "width": 12, "values": 20, "softcap": 3.0}, {"mix": "softmax", "feature_map": "exp"}),
        ({"group": 1, "width": 80, "values": 96, "heads": 1}, {"window": 70, "covers": "all", "mix": "softmax"}),
        ({"group": 4, "width": 16, "values": 16, "heads": 1}, {"recurrence": "hgrn2", "lower_bound": 0.9, "sinks": 0}),
        ({"group": 2, "width": 6, "values": 6}, {"window": 1, "sinks": 1, "gate_source": "v", "qk_norm": True}),
        ({"group": 2}, {"recurrence": "mamba2", "gate_source": "q", "covers": "all", "gate_divisor": 2.0}),
    ],
)
def test_widths_and_options(shape, options, monkeypatch):
    layer = make_layer(**shape)
    mixer = make_mixer(layer, **options)
    new = tokens_of(layer, 2, 6, torch.float32)
    assert_no_worse_than_twice_plain_torch(three_ways(mixer, new, LENGTHS[:2, :6], monkeypatch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, monkeypatch):
    layer = make_layer(heads=1)
    new = tokens_of(layer, 2, STEPS, dtype)
    assert_no_worse_than_twice_plain_torch(three_ways(make_mixer(layer, mix="softmax"), new, None, monkeypatch))


@pytest.mark.parametrize(("strength", "source"), [(1e-3, 1.0), (100.0, 30.0)])
def test_gates_at_the_ends_of_their_range(strength, source, monkeypatch):
    layer = make_layer(heads=1)
    mixer = make_mixer(layer, gate_learned=False, gate_scale=strength, gate_bias=0.0 if source > 1 else 15.0)
    new = tokens_of(layer, 2, STEPS, torch.float32)
    new = new._replace(k=new.k * source)
    assert_no_worse_than_twice_plain_torch(three_ways(mixer, new, None, monkeypatch))


@pytest.mark.parametrize("kind", ["default", "liger"])
def test_what_was_never_written_is_never_read(kind, monkeypatch):
    """Ring and sinks full of NaN, and so are new tensors."""
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    layer = make_layer(heads=1)
    mixer, new = make_mixer(layer, **{**KINDS[kind], "window": WINDOW}), tokens_of(layer, 2, STEPS, torch.float32)
    clean, poisoned = empty(mixer, 2, torch.float32), empty(mixer, 2, torch.float32)
    expected = run(mixer, new, LENGTHS[1:], clean)
    for part in ("window", "sinks"):
        for x in poisoned.parts.get(part, {}).values():
            x.fill_(float("nan"))
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: make(*a, **k).fill_(float("nan")))
    assert torch.equal(run(mixer, new, LENGTHS[1:], poisoned), expected)
    assert torch.equal(poisoned.parts["state"]["state"], clean.parts["state"]["state"])


def test_a_pad_changes_no_bit_and_two_runs_are_the_same(monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    layer = make_layer(heads=1)
    mixer, new = make_mixer(layer, mix="softmax"), tokens_of(layer, 2, STEPS, torch.float32)
    memories = [empty(mixer, 2, torch.float32) for _ in range(2)]
    first, second = (run(mixer, new, None, memory) for memory in memories)
    assert torch.equal(first, second)
    before = {name: x.clone() for name, x in memories[0].tensors()}
    run(mixer, Projections(*(x[:, :1] for x in new)), torch.zeros(2, 1, dtype=torch.long), memories[0])
    assert all(torch.equal(x, before[name]) for name, x in memories[0].tensors())
    assert all(torch.equal(x, before[name]) for name, x in memories[1].tensors())


def test_a_layer_takes_one_launch_and_moves_no_tensor(monkeypatch):
    from linearize_kernels import step_triton

    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    grids, kernel = [], step_triton.step_kernel

    class Counting:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(step_triton, "step_kernel", Counting())
    layer = make_layer()
    mixer, memory = make_mixer(layer), None
    memory = empty(mixer, 2, torch.float32)
    addresses = [x.data_ptr() for _, x in memory.tensors()]
    run(mixer, tokens_of(layer, 2, 3, torch.float32), None, memory)
    assert grids == [(2, layer.key_value_heads)] * 3
    assert [x.data_ptr() for _, x in memory.tensors()] == addresses


def test_gradients_and_silent_branches_take_plain_torch(monkeypatch):
    from linearize_kernels import step_triton

    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    monkeypatch.setattr(step_triton, "step_kernel", None)
    layer = make_layer()
    mixer = make_mixer(layer)
    new = tokens_of(layer, 1, 1, torch.float32)
    wanted = type(new)(*(x.clone().requires_grad_() for x in new))
    assert mixer(wanted, None, empty(mixer, 1, torch.float32)).requires_grad
    mixer.branches_off = frozenset({"recurrence"})
    run(mixer, new, None, empty(mixer, 1, torch.float32))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["default", "softmax head"])
def test_a_converted_model_is_one_function(teacher, ids, kind, monkeypatch):
    """Whole, in chunks and step by step with the kernels, and in plain torch."""
    changes = {**KINDS[kind], "window": 5, "sinks": 2, "mix": "softmax"}
    model, ids = converted(teacher, **changes).to(DEVICE), ids.to(DEVICE)
    monkeypatch.setenv("LINEARIZE_KERNELS", "torch")
    expected = model(ids, use_cache=False).logits
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    close(model(ids, use_cache=False).logits, expected)
    close(in_pieces(model, ids, [1, 9, 1, 3]), expected)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    padded = ids.masked_fill(mask == 0, 3)
    first = model(padded[:, :12], attention_mask=mask[:, :12], use_cache=True)
    second = model(padded[:, 12:13], attention_mask=mask[:, :13], past_key_values=first.past_key_values)
    monkeypatch.setenv("LINEARIZE_KERNELS", "torch")
    alone = model(ids[1:, 4:13], use_cache=False).logits
    close(torch.cat([first.logits[1:, 4:], second.logits[1:]], 1), alone)


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    """As small as a model of grouped heads gets: every program counts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(5, 64, (2, 14), generator=torch.Generator().manual_seed(0))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_cuda_graph_replays_the_step(monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    layer = make_layer(width=64, values=64)
    mixer, new = make_mixer(layer), tokens_of(layer, 2, 12, torch.bfloat16)
    plain, captured = empty(mixer, 2, torch.bfloat16), empty(mixer, 2, torch.bfloat16)
    expected = run(mixer, new, None, plain)
    token = Projections(*(x[:, :1].clone() for x in new))
    graph, outputs = torch.cuda.CUDAGraph(), []
    with torch.no_grad():
        mixer(token, None, empty(mixer, 2, torch.bfloat16))  # compiled before it is captured
        with torch.cuda.graph(graph):
            mixed = mixer(token, None, captured)
            captured.advance(1, None)
        captured.reset()
        for t in range(12):
            for held, x in zip(token, new, strict=True):
                held.copy_(x[:, t : t + 1])
            graph.replay()
            outputs.append(mixed[:, 0].clone())
    assert torch.equal(torch.cat(outputs).double(), expected)
