"""The Triton kernels of Liger attention against the composed form in float64: outputs, states, all gradients.

Without a GPU they run in Triton's interpreter (`TRITON_INTERPRET=1`, set before triton is imported) on small shapes.
With one, the same file runs the whole grid of widths, lengths and dtypes: `pytest -m triton tests/kernels`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from linearize_kernels.liger import liger_attention, liger_attention_composed
from linearize_kernels.liger_options import Columns, Gate, LigerOptions, tile_list
from torch import Tensor, nn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or not (INTERPRETED or ON_GPU),
        reason="needs triton, and a GPU or TRITON_INTERPRET=1",
    ),
]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        lengths: tokens of each row; several rows of one length are a plain batch.
        counts: tokens of each row before its first, where rows continue a cache.
        width, features, values: D, F and V. heads: K. group: G.
        gates: `weak` steps, `strong` ones of -300 beside weak ones, one per `head`, or built from the `key`; `border`:
            chunks on either side of the decays from which chunks, and sub-chunks, are no product of two factors.
        sinks, extra: exact columns, those that are sinks and the others.
    """

    lengths: tuple[int, ...]
    window: int = 8
    counts: tuple[int, ...] | None = None
    width: int = 16
    features: int = 16
    values: int = 16
    heads: int = 1
    group: int = 2
    gates: str = "weak"
    sinks: int = 2
    extra: int = 0
    covers: str = "evicted"
    mix: str = "learned"
    normalize: bool = True
    feature_map: str = "softmax"
    softcap: float | None = None
    dtype: torch.dtype = torch.float32

    @property
    def options(self) -> LigerOptions:
        return LigerOptions(
            self.window,
            self.width**-0.5,
            self.softcap,
            self.mix,
            self.covers,
            self.normalize,
            self.feature_map,
        )

    @property
    def rows(self) -> Tensor | int:
        if len(set(self.lengths)) == 1:
            return len(self.lengths)
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=DEVICE)


CASES = [
    *(
        Case((21,), covers=covers, mix=mix, normalize=normalize, values=24 if normalize else 16)
        for covers, mix, normalize in itertools.product(
            ("evicted", "all"), ("fixed", "learned", "softmax"), (True, False)
        )
        if normalize or mix != "softmax"  # which always divides
    ),
    Case((1,), covers="all", group=1),
    Case((5,), gates="key", group=3),
    Case((66, 3), window=16, group=3, gates="strong", values=24, sinks=3, extra=2),
    Case((130,), window=33, gates="key", group=1, sinks=0),
    Case((63,), window=64, covers="all", gates="strong", mix="softmax", normalize=False),
    Case((20, 9), window=8, counts=(3, 40), gates="key", extra=1),
    Case((17, 17), window=5, counts=(5, 0), covers="all", mix="softmax", heads=2),
    Case((40,), width=24, features=40, values=16, feature_map="identity", mix="fixed", normalize=False, gates="head"),
    Case((30,), softcap=3.0, gates="head", group=6, window=1, sinks=1),
    Case((200,), 33, gates="key", sinks=4, group=3),
    Case((64 * 4 + 8,), gates="border", sinks=0),
    *(Case((tokens, 8 + 64), gates="key", group=1, covers="evicted") for tokens in (7, 8, 9, 8 + 63, 8 + 65, 8 + 128)),
    Case((130, 70), 20, counts=(3, 40), gates="key", extra=1),
    # Wider than a block of values, and than what is kept over a loop.
    Case((70,), 16, width=136, features=136, values=136, gates="key"),
    Case((80,), dtype=torch.bfloat16, gates="key"),
    Case((80,), dtype=torch.float16, mix="softmax"),
]
if ON_GPU:
    SHAPES = [(64, 9, 3), (80, 4, 4), (96, 4, 2), (128, 8, 2), (256, 4, 2)]  # width, query heads, key/value heads
    HALF = (torch.bfloat16, torch.float16)
    CASES += [
        Case((tokens,), 64, None, width, width, width, keys, heads // keys, gates, 4, dtype=dtype, mix=mix)
        for (width, heads, keys), tokens, dtype, (gates, mix) in itertools.product(
            SHAPES, (63, 1000, 4096), HALF, (("key", "learned"), ("strong", "softmax"))
        )
    ]
    CASES += [
        Case((300, 1, 77), 64, None, width, width, width, keys, heads // keys, gates, 4, 3, covers=covers)
        for (width, heads, keys), gates, covers in itertools.product(SHAPES, ("key", "strong"), ("all", "evicted"))
    ]


def tensors(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """The float64 values that a case is about, those of the inputs' dtype being of that dtype's precision."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, draw: Callable[..., Tensor] = torch.randn) -> Tensor:
        return draw(*shape, generator=generator, dtype=torch.float64)

    rows, tokens, heads = len(case.lengths), sum(case.lengths), case.heads * case.group
    keys = tokens + (rows * case.window if case.counts else 0)
    values = {
        "q_rotated": random(tokens, heads, case.width),
        "k_rotated": random(keys, case.heads, case.width),
        "v": random(keys, case.heads, case.values),
        "q": random(tokens, heads, case.features),
        "k": random(keys, case.heads, case.features),
    }
    if case.feature_map == "identity":
        values |= {name: values[name].abs() for name in ("q", "k")}
    columns = case.sinks + case.extra
    if columns:
        values["column_k"] = random(rows, columns, case.heads, case.width)
        values["column_v"] = random(rows, columns, case.heads, case.values)
    values = {name: x.to(case.dtype).double() for name, x in values.items()}
    if case.gates == "key":
        values["scale"], values["bias"] = random(case.heads, case.features), 2 + random(case.heads, case.features)
    else:
        gate = -random(keys, case.heads, 1 if case.gates == "head" else case.features, draw=torch.rand)
        strengths = torch.tensor([0.0, 300.0, 0.01, 0.01, 0.0], dtype=torch.float64).repeat(keys)[:keys]
        values["gate"] = gate * (strengths[:, None, None] if case.gates == "strong" else 0.1)
        if case.gates == "border":
            steps = torch.tensor([0.99 * 8 / 64, 0.99 * 8 / 16, 1.01 * 8 / 64, 1.01 * 8 / 16], dtype=torch.float64)
            chunk = (torch.arange(keys) // 64).clamp_max(len(steps) - 1)
            values["gate"] = -steps[chunk, None, None].expand_as(gate).clone()
    if case.mix == "learned":
        values["mix_weight"] = random(heads, case.values, draw=torch.rand)
    if case.mix == "softmax":
        values["mix_weight"] = random(heads)  # of either sign
    values["initial_state"] = random(rows, case.heads, case.features, case.values + 1, draw=torch.rand)
    return {name: x.to(DEVICE) for name, x in values.items()}


OF_INPUT_DTYPE = ("q_rotated", "k_rotated", "v", "q", "k", "column_k", "column_v")
Operation = Callable[..., tuple[Tensor, Tensor]]


def call(operation: Operation, case: Case, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    columns = None
    if "column_k" in values:
        exists = None
        if case.extra:
            row = torch.arange(len(case.lengths), device=DEVICE)[:, None]
            exists = (row + torch.arange(case.extra, device=DEVICE)) % 3 != 1
        columns = Columns(values["column_k"], values["column_v"], case.sinks, exists)
    return operation(
        *(values[name] for name in ("q_rotated", "k_rotated", "v", "q", "k")),
        Gate(values["scale"], values["bias"], 1.5) if "scale" in values else values["gate"],
        case.options,
        mix_weight=values.get("mix_weight"),
        columns=columns,
        rows=case.rows,
        counts=None if case.counts is None else torch.tensor(case.counts, device=DEVICE),
        initial_state=values["initial_state"],
    )


def run(operation: Operation, case: Case, values: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs, final state, and gradients of a fixed functional of both."""
    other = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        name: x.to(dtype if name in OF_INPUT_DTYPE else other).clone().requires_grad_() for name, x in values.items()
    }
    outputs, state = call(operation, case, leaves)
    assert outputs.dtype == dtype
    assert state.dtype == other
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=other, device=DEVICE).view_as(outputs)
    gradients = torch.autograd.grad(
        (outputs * weights).sum() + state.square().sum(), leaves.values(), allow_unused=True
    )
    results = {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), gradients, strict=True)
    }
    return {"outputs": outputs.detach(), "state": state.detach(), **results}


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A result as a kernel would store it: the interpreter cuts the bits that bfloat16 lacks, and does not round."""
    if INTERPRETED and dtype == torch.bfloat16:
        return (x.float().view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype)


def error(result: Tensor, reference: Tensor) -> float:
    """Relative, or against a tenth where the reference is small; where it vanishes, as the gradient of a lone token's
    query does, against 1, the size of what cancels there: plain torch may meet 0 itself."""
    assert bool(result.isfinite().all())
    size = reference.norm()
    return float((result.double() - reference).norm() / (size.clamp_min(0.1) if size > 1e-12 else 1.0))


def tiled_as(monkeypatch, tiled: bool) -> None:
    """Chunks of weak decays as tiles, in every dtype or in none."""
    from linearize_kernels import liger_autograd

    monkeypatch.setattr(liger_autograd, "TILED", {torch.float32, torch.bfloat16, torch.float16} if tiled else set())


@pytest.mark.parametrize("tiled", [True, False], ids=["chunks", "sub-chunks"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_no_worse_than_twice_plain_torch(case, tiled, monkeypatch):
    if not ON_GPU:
        tiled_as(monkeypatch, tiled)
    elif not tiled:
        pytest.skip("a GPU takes tiles where they fit")
    values = tensors(case)
    reference = run(liger_attention_composed, case, values, torch.float64)
    truncates = INTERPRETED and case.dtype == torch.bfloat16
    plain = run(liger_attention_composed, case, values, torch.float32 if truncates else case.dtype)
    ours = run(liger_attention, case, values, case.dtype)
    for name, expected in reference.items():
        # Plain torch answers in float32 where a tensor is a parameter; what counts is the precision of the inputs.
        yardstick = error(stored(plain[name], case.dtype), expected)
        assert error(ours[name], expected) <= 2 * yardstick + 1e-6, name


@pytest.mark.parametrize("tiled", [True, False], ids=["chunks", "sub-chunks"])
@pytest.mark.parametrize("case", [Case((26, 7), gates="key", extra=1), Case((70,), window=3, covers="all")], ids=str)
def test_results_do_not_depend_on_what_memory_held(case, tiled, monkeypatch):
    """Bit for bit the same where every buffer starts as NaN: nothing is read before it is written, nor added up in an
    order of its own."""
    values = tensors(case)
    first = run(liger_attention, case, values, case.dtype)

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args, **kwargs) -> Tensor:
            result = make(*args, **kwargs)
            return result.fill_(float("nan")) if result.is_floating_point() else result

        return made

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    second = run(liger_attention, case, values, case.dtype)
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@pytest.mark.parametrize("more", [0, 8, -8])
@pytest.mark.parametrize("before", [0, 1])
def test_tiles_of_rows_are_listed(more, before):
    lengths = [1, 8, 24, 25, 15, 40]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    expected = [(r, n) for r, x in enumerate(lengths) for n in range(before + max(-(-(x + more) // 16), 0))]
    found = tile_list(starts, sum(lengths), starts.device, 16, more=more, before=before).tolist()
    assert [tuple(x) for x in found[: len(expected)]] == expected
    assert all(number * 16 > 2**20 for _, number in found[len(expected) :])
    equal = tile_list(3, 72, starts.device, 16, more=more, before=before)
    assert equal.tolist() == [[r, n] for r in range(3) for n in range(before + max(-(-(24 + more) // 16), 0))]


@pytest.mark.parametrize("covers", ["evicted", "all"])
def test_packed_rows_equal_the_rows_apart(covers):
    whole = Case((19, 4, 33), gates="key", covers=covers)
    values = tensors(whole)
    outputs, states = call(liger_attention, whole, {n: x.to(whole.dtype) for n, x in values.items()})
    starts = [0, *itertools.accumulate(whole.lengths)]
    for row, (start, stop) in enumerate(itertools.pairwise(starts)):
        apart = {n: x.to(whole.dtype) for n, x in values.items()}
        for name in ("q_rotated", "k_rotated", "v", "q", "k"):
            apart[name] = apart[name][start:stop]
        for name in ("column_k", "column_v", "initial_state"):
            apart[name] = apart[name][row : row + 1]
        one = dataclasses.replace(whole, lengths=(stop - start,))
        alone, state = call(liger_attention, one, apart)
        assert torch.equal(outputs[start:stop], alone)
        assert torch.equal(states[row], state[0])


@pytest.mark.parametrize("covers", ["evicted", "all"])
@pytest.mark.parametrize("cut", [3, 20])
def test_a_prompt_in_pieces_equals_it_whole(covers, cut):
    case = Case((37,), window=7, gates="strong", covers=covers)
    values = {n: x.to(case.dtype) for n, x in tensors(case).items()}
    # Sinks are the row's own first tokens here, so that both pieces read the same.
    values["column_k"], values["column_v"] = (values[n][None, : case.sinks] for n in ("k_rotated", "v"))
    outputs, final = call(liger_attention, case, values)

    def piece(start: int, stop: int, past: int) -> dict[str, Tensor]:
        part = dict(values)
        for name in ("q_rotated", "q"):
            part[name] = values[name][start:stop]
        for name in ("k_rotated", "v", "k", "gate"):
            before = values[name][max(start - past, 0) : start]
            missing = torch.full_like(values[name][: past - before.shape[0]], 1e3)  # never to be read
            part[name] = torch.cat([missing, before, values[name][start:stop]])
        return part

    first, state = call(liger_attention, dataclasses.replace(case, lengths=(cut,)), piece(0, cut, 0))
    rest = piece(cut, 37, case.window) | {"initial_state": state}
    second, end = call(liger_attention, dataclasses.replace(case, lengths=(37 - cut,), counts=(cut,)), rest)
    torch.testing.assert_close(torch.cat([first, second]), outputs)
    torch.testing.assert_close(end, final)


def test_rows_without_a_state_start_from_zeros():
    case = Case((12,), window=4)
    values = {n: x.to(case.dtype) for n, x in tensors(case).items()}
    zeros = call(liger_attention, case, values | {"initial_state": torch.zeros_like(values["initial_state"])})
    nothing = call(liger_attention, case, values | {"initial_state": None})
    assert all(torch.equal(a, b) for a, b in zip(zeros, nothing, strict=True))


class Layer(nn.Module):
    """Liger attention between projections, two query heads on one key/value head, with a residual."""

    def __init__(self, operation: Operation, covers: str, width: int = 16) -> None:
        super().__init__()
        self.operation, self.covers = operation, covers
        self.project, self.output = nn.Linear(width, 7 * width), nn.Linear(2 * width, width)
        self.mix_weight = nn.Parameter(torch.full((2, width), 0.3))
        self.scale, self.bias = nn.Parameter(torch.ones(1, width)), nn.Parameter(torch.full((1, width), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        projected = self.project(x).unflatten(-1, (7, width))
        q_rotated, q, k_rotated, k, v = projected.split([2, 2, 1, 1, 1], 1)
        options = LigerOptions(window=4, scale=width**-0.5, covers=self.covers)
        columns = Columns(k_rotated[None, :1], v[None, :1], 1)
        gate = Gate(self.scale, self.bias)
        arguments = (x.contiguous() for x in (q_rotated, k_rotated, v, q, k))
        heads, _ = self.operation(*arguments, gate, options, mix_weight=self.mix_weight, columns=columns)
        return x + self.output(heads.flatten(1))


def train(operation: Operation, steps: int) -> list[float]:
    """Learns to repeat what stood five tokens earlier, which is out of the window."""
    torch.manual_seed(0)
    covers = ("evicted",) if INTERPRETED else ("evicted", "all", "evicted")
    model = nn.Sequential(*(Layer(operation, c) for c in covers)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    losses = []
    for _ in range(steps):
        loss = (model(x)[5:] - x[:-5]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_a_model_learns_the_same_with_the_kernels_as_without():
    with_kernels, without = (train(operation, 60) for operation in (liger_attention, liger_attention_composed))
    assert without[-1] < 0.7 * without[0]
    assert with_kernels == pytest.approx(without, rel=1e-3)


def test_what_the_kernels_do_not_take_is_refused():
    case = Case((4,))
    with pytest.raises(ValueError, match="do not take float64 inputs"):
        call(liger_attention, case, tensors(case))
