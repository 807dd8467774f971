"""The C functions of a CPU: landmarks in prompts, pieces and steps against plain torch; and a machine without them."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from linearize_kernels import dispatch, native
from linearize_kernels.products import product
from torch import Tensor, nn

from linearize.families.base import AttentionLayer, Projections
from linearize.model import LayerMemory, MixerConfig
from linearize.model.landmarks import exact, step, training
from linearize.model.mixer.mixer import Mixer

CPU = torch.device("cpu")
STEPS = [1] * 40
RAGGED = [[90, 30, 0], [2, 90, 90], [50, 0, 90], *([1, 1, int(place % 3 == 0)] for place in range(40))]
CASES = {
    # query heads, key/value heads, their widths, scale, softcap; options of the mixer; pieces, or the rows' lengths
    "novelty": ((4, 2, 8, 8, 0.125), {}, [2, 40, 1, 1, 66, *STEPS, 90]),
    "rows of different lengths": ((4, 2, 8, 8, 0.125), {"landmarks": 40}, RAGGED),
    "nine query heads, three key/value heads": ((9, 3, 64, 64, 0.125), {"landmarks": 70, "window": 64}, [200, *STEPS]),
    "more slots than tokens": ((6, 2, 32, 32, 0.2), {"landmarks": 300}, [100, *STEPS, 80]),
    "one key/value head, wide": ((8, 1, 128, 96, 0.1), {"landmarks": 50, "window": 1, "sinks": 0}, [130, *STEPS]),
    "no head is shared, 256 channels": ((2, 2, 256, 256, 0.06), {"landmarks": 33, "window": 33}, [130, *STEPS]),
    "softcap, widths of values": ((4, 2, 16, 10, 0.25, 2.0), {"landmarks": 33}, [100, *STEPS, 60]),
    "int8": ((4, 2, 16, 16, 0.25), {"memory_dtype": "int8"}, [100, *STEPS]),
    "int8, a learned score": ((4, 2, 12, 10, 0.25), {"memory_dtype": "int8", "landmark_score": "learned"}, RAGGED),
    "int4": ((4, 2, 32, 64, 0.2), {"memory_dtype": "int4", "landmarks": 40}, [100, *STEPS]),
    "int4, a learned score": ((9, 3, 64, 64, 0.125), {"memory_dtype": "int4", "landmark_score": "learned"}, RAGGED),
    "int4, odd groups": ((4, 2, 96, 12, 0.1), {"memory_dtype": "int4", "landmark_score": "learned"}, [100, *STEPS]),
    "a state": ((4, 2, 8, 8, 0.125), {"recurrence": "gla", "mix": "softmax", "landmarks": 33}, [100, *STEPS, 90]),
    "a state, ragged": ((4, 2, 8, 8, 0.125), {"recurrence": "gla", "mix": "softmax", "rope": True}, RAGGED),
    "a state, int8": ((4, 2, 8, 8, 0.125), {"recurrence": "gla", "memory_dtype": "int8"}, [100, *STEPS]),
}


@pytest.fixture(autouse=True)
def _compiled():
    if (reason := native.native_refusal()) is not None:
        pytest.skip(reason)


def mixer_of(heads: tuple, options: dict) -> Mixer:
    config = {"layers": [0], "window": 16, "sinks": 4, "landmarks": 20, "recurrence": "none", **options}
    mixer = Mixer(MixerConfig(**config), AttentionLayer(*heads))
    for name, parameter in mixer.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return mixer


def drawn(layer: AttentionLayer, rows: int, tokens: int) -> Projections:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        (layer.query_heads, layer.key_width),
        (layer.key_value_heads, layer.key_width),
        (layer.key_value_heads, layer.value_width),
    )
    return Projections(*(torch.randn(rows, tokens, *shape, generator=generator) for shape in (q, k, v, q, k)))


@torch.no_grad()
def found(mixer: Mixer, new: Projections, pieces: list, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and memory after the pieces; where rows have lengths, outputs of pads are left out."""
    mixer, new = mixer.to(dtype), Projections(*(x.to(dtype) for x in new))
    rows, start, outputs = len(new.q), 0, []
    memory = LayerMemory(mixer.parts(rows, dtype, CPU), rows, CPU)
    for piece in pieces:
        lengths = torch.tensor(piece) if isinstance(piece, list) else None
        stop = start + (max(piece) if isinstance(piece, list) else piece)
        mixed = mixer(Projections(*(x[:, start:stop] for x in new)), lengths, memory)
        memory.advance(stop - start, lengths)
        real = torch.ones(rows, stop - start, dtype=torch.bool)
        real = real if lengths is None else torch.arange(stop - start) < lengths[:, None]
        outputs.append(mixed[real].double())
        start = stop
    held = {name: x.double() for name, x in memory.tensors()}
    return {"outputs": torch.cat(outputs)} | held


def pieces_and_tokens(pieces: list) -> tuple[int, int]:
    ragged = isinstance(pieces[0], list)
    return (len(pieces[0]), sum(map(max, pieces))) if ragged else (2, sum(pieces))


@pytest.mark.parametrize("case", CASES)
def test_float32_is_no_worse_than_twice_plain_torch(case, monkeypatch):
    heads, options, pieces = CASES[case]
    mixer = mixer_of(heads, options)
    new = drawn(mixer.layer, *pieces_and_tokens(pieces))
    ways = {}
    for kernels, dtype in (("torch", torch.float64), ("torch", torch.float32), ("native", torch.float32)):
        monkeypatch.setenv("LINEARIZE_KERNELS", kernels)
        ways[kernels, dtype] = found(mixer, new, pieces, dtype)
    exact, plain, ours = ways.values()
    assert torch.equal(ours["landmarks.number"], exact["landmarks.number"])
    for name, wanted in exact.items():
        if wanted.numel() == 0:
            continue
        error, allowed = (float((x[name] - wanted).abs().max()) for x in (ours, plain))
        assert error <= 2 * allowed + 1e-6 * float(wanted.abs().max()), name


def test_values_below_the_least_scale_are_zeros(monkeypatch):
    """In 8 bits they keep one code, and in 4 bits, turned, none."""
    heads, options, pieces = CASES["int4, a learned score"]
    mixer = mixer_of(heads, options)
    new = drawn(mixer.layer, *pieces_and_tokens(pieces))
    new.v.zero_()
    new.v[..., 0] = 1.2e-30
    monkeypatch.setenv("LINEARIZE_KERNELS", "native")
    assert all(bool(x.isfinite().all()) for x in found(mixer, new, pieces, torch.float32).values())


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"landmarks": 64, "memory_dtype": "int4"}, {"landmark_score": "learned"}])
def test_training_chooses_the_same_tokens(options, monkeypatch):
    mixer = mixer_of((4, 2, 8, 8, 0.125), options)
    new = drawn(mixer.layer, 2, 300)
    chosen = []
    for kernels in ("torch", "native"):
        monkeypatch.setenv("LINEARIZE_KERNELS", kernels)
        chosen.append(training._choose(mixer, new, fused=False))
    for plain, ours in zip(*chosen, strict=True):
        assert plain.dtype == ours.dtype and torch.equal(plain, ours)


@pytest.mark.parametrize("case", ["nine query heads, three key/value heads", "int4, a learned score", "a state"])
def test_results_do_not_depend_on_the_number_of_threads(case, monkeypatch):
    heads, options, pieces = CASES[case]
    mixer = mixer_of(heads, options)
    new = drawn(mixer.layer, *pieces_and_tokens(pieces))
    ways = []
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    for threads in (1, 2, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        ways.append(found(mixer, new, pieces, torch.float32))
    for way in ways[1:]:
        assert all(torch.equal(x, ways[0][name]) for name, x in way.items())


def _product(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.empty(len(weight))
    native.launch("product", native.packed(x.numel(), len(weight), x, weight, None, y))
    return y


def test_callers_at_the_same_time_and_forked_processes(monkeypatch):
    """Both have the results of a caller alone: the threads serve one call at a time, and a child has none of them."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    weight, x = torch.randn(700, 64), torch.randn(64)
    wanted = _product(x, weight)
    with ThreadPoolExecutor(4) as callers:
        assert all(torch.equal(y, wanted) for y in callers.map(lambda _: _product(x, weight), range(400)))
    child = os.fork()
    if not child:
        os._exit(0 if all(torch.equal(_product(x, weight), wanted) for _ in range(20)) else 1)
    assert os.waitpid(child, 0)[1] == 0


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 3])
def test_the_functions_run(threads, monkeypatch):
    """Prompts and steps take no product of plain torch, with as many threads as torch has."""
    mixer = mixer_of((4, 2, 8, 8, 0.125), {})
    new = drawn(mixer.layer, 3, 102)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    wanted = mixer(new, None, None)
    monkeypatch.setattr(exact, "Exact", None)
    monkeypatch.setattr(step, "_read_exact", None)
    memory = LayerMemory(mixer.parts(3, torch.float32, CPU), 3, CPU)
    for start, stop in itertools.pairwise((0, 100, 101, 102)):
        mixed = mixer(Projections(*(x[:, start:stop] for x in new)), None, memory)
        memory.advance(stop - start, None)
        torch.testing.assert_close(mixed, wanted[:, start:stop])


@torch.no_grad()
@pytest.mark.parametrize("landmarks", [0, 20])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_state_of_one_row_wakes_none_of_torchs_threads(rows, landmarks, monkeypatch):
    """C functions of the same step have as many as torch, and torch has them again after a step, also after one that
    fails."""
    mixer = mixer_of((4, 2, 8, 8, 0.125), {"recurrence": "gla", "landmarks": landmarks})
    new = drawn(mixer.layer, rows, 101)
    memory, last = LayerMemory(mixer.parts(rows, torch.float32, CPU), rows, CPU), Projections(*(x[:, -1:] for x in new))
    mixer(Projections(*(x[:, :100] for x in new)), None, memory)
    memory.advance(100, None)
    told, shared, fails = list[int](), list[int](), False
    threads, run, library = torch.get_num_threads(), mixer.recurrence.forward, native._function

    def watched(*given):
        told.append(torch.get_num_threads())
        if fails:
            raise MemoryError
        return run(*given)

    def watching(name):
        call, size = library(name)
        return lambda given, count: shared.append(count) or call(given, count), size

    monkeypatch.setattr(mixer.recurrence, "forward", watched)
    monkeypatch.setattr(native, "_function", watching)
    torch.set_num_threads(2)
    try:
        mixer(last, None, memory)
        fails = True
        with pytest.raises(MemoryError):
            mixer(last, None, memory)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert told == ([1, 1] if rows == 1 else [2, 2]) and shared == ([2, 2] if landmarks else [])


@pytest.mark.parametrize("bias", [False, True])
def test_products_of_one_row(bias, monkeypatch):
    linear, x = nn.Linear(517, 1001, bias=bias), torch.randn(1, 1, 517)
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    errors = []
    for kernels in ("torch", "native"):
        monkeypatch.setenv("LINEARIZE_KERNELS", kernels)
        with torch.no_grad():
            errors.append(float((product(x, linear.weight, linear.bias) - exact).abs().max()))
    assert errors[1] <= 2 * errors[0]
    assert product(x, linear.weight, linear.bias).requires_grad  # gradients go through torch


def without(monkeypatch, tmp_path, **environment: str) -> str | None:
    """The refusal with nothing compiled before, in an environment of its own."""
    for name, value in {"LINEARIZE_CACHE": str(tmp_path / "cache"), **environment}.items():
        monkeypatch.setenv(name, value)
    for held in (native._library, native._function, native.native_refusal):
        monkeypatch.setattr(native, held.__name__, native.cache(held.__wrapped__))
    monkeypatch.setattr(dispatch, "native_refusal", native.native_refusal)
    dispatch._decide.cache_clear()
    return native.native_refusal()


def test_what_is_compiled_is_kept_under_a_name_of_its_own(monkeypatch, tmp_path):
    assert without(monkeypatch, tmp_path) is None
    (kept,) = (tmp_path / "cache" / "native").iterdir()
    assert kept.suffix == ".so"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, b"", ""))
    assert "cannot compile" in str(without(monkeypatch, tmp_path))  # another compiler, by what it says of itself
    assert list((tmp_path / "cache" / "native").iterdir()) == [kept]


@torch.no_grad()
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "", "CC": "none"}, "there is no C compiler: install gcc or clang"),
        ({"CC": "false"}, "cannot compile the C sources: exit 1"),
        ({"LINEARIZE_CACHE": "/proc/none"}, "the C sources cannot be compiled"),
    ],
)
def test_without_a_compiler_plain_torch_runs(environment, reason, monkeypatch, tmp_path, caplog):
    with caplog.at_level(logging.DEBUG, "linearize_kernels"):
        assert reason in str(without(monkeypatch, tmp_path, **environment))
    assert reason in caplog.text and not [x for x in caplog.records if x.levelno > logging.DEBUG]
    decision = dispatch.decide("slots", CPU, torch.float32)
    assert decision.kernels == "torch" and reason in decision.why and not decision.lost
    mixer = mixer_of((4, 2, 8, 8, 0.125), {})
    assert mixer(drawn(mixer.layer, 1, 100), None, None).isfinite().all()
    dispatch._decide.cache_clear()


def test_float64_is_left_to_plain_torch(monkeypatch):
    assert dispatch.decide("slots", CPU, torch.float64).kernels == "torch"
    assert dispatch.decide("slots", CPU, torch.bfloat16).kernels == "native"
    monkeypatch.setenv("LINEARIZE_KERNELS", "torch")
    assert dispatch.decide("slots", CPU, torch.float32).kernels == "torch"
