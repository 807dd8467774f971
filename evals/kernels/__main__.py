"""Forward, backward and step of the fused kernels, compared with their alternatives.

    python -m evals.kernels                 on a GPU; writes results/<device>.json and .svg
    python -m evals.kernels --dry-run       on any machine, with tiny shapes; not measurements
    python -m evals.kernels --estimate      on any machine with triton: the machine code for Hopper, and a model of it

Contenders run in turns and medians are kept. Each figure is given with its share of the roof measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(__file__).parent / "results"
DRY = "A dry run on tiny shapes: these figures are not measurements."


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.kernels", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on a CPU in Triton's interpreter")
    parser.add_argument("--estimate", action="store_true", help="compile for Hopper and estimate; needs no GPU")
    parser.add_argument("--turns", type=int, default=20, help="timed runs of each contender (default 20)")
    parser.add_argument("--out", type=Path, help="JSON to write; the plot goes beside it")
    arguments = parser.parse_args()
    if arguments.turns < 1:
        parser.error("--turns must be at least 1")
    if arguments.estimate:
        estimate(arguments.out or FOLDER / "estimates.json")
        return
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # set before any import, because triton reads it when it is imported

    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        parser.exit(1, "error: no CUDA device to measure; --dry-run shows what would be done\n")
    result = dry_run() if arguments.dry_run else measure(arguments.turns)
    out = arguments.out or (
        Path(tempfile.mkdtemp(prefix="kernels-")) / "dry-run.json"
        if arguments.dry_run
        else FOLDER / f"{re.sub('[^a-z0-9]+', '-', result['device'].lower()).strip('-')}.json"
    )
    if arguments.dry_run and FOLDER in out.resolve().parents:
        parser.exit(1, f"error: {out}: a dry run has no place among the results; name another folder\n")
    from evals.kernels.telling import markdown, plot
    from evals.recurrences.toy import write

    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, result)
    out.with_suffix(".svg").write_text(plot(result), encoding="utf-8")
    if arguments.dry_run:
        print(DRY)
    print(markdown(result))
    print(f"{out}\n{out.with_suffix('.svg')}", file=sys.stderr)


def estimate(out: Path) -> None:
    """Write the estimates of every shape, with those of what a user would compose, and print their sums."""
    import torch

    from evals.kernels import estimates, peers, work
    from evals.kernels.telling import compared, estimated
    from evals.recurrences.toy import write

    shapes = work.ESTIMATED.values()
    rows = [row for shape in shapes for row in estimates.table(shape, work.LENGTHS, work.TOKENS)]
    others = [
        row
        for shape in shapes
        for length in work.LENGTHS
        for row in peers.composed(shape, length, work.TOKENS // length)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    made = {key: surroundings(torch.device("cpu"), torch.bfloat16)[key] for key in ("command", "dtype", "versions")}
    write(out, {"note": estimates.NOTE, **made, "results": rows, "peers": others})
    print(f"{estimates.NOTE}\n\n{estimated(rows)}\n\n{compared(rows, others)}")
    print(out, file=sys.stderr)


def measure(turns: int) -> dict[str, Any]:
    """All measurements on the current GPU, in bfloat16."""
    import torch

    from evals.kernels import work

    device = torch.device("cuda")
    return _run(
        device,
        torch.bfloat16,
        (work.SHAPES, work.LENGTHS, work.TOKENS, work.STEP_BATCHES),
        turns=turns,
        warm_up=5,  # the first call compiles and autotunes, which takes minutes for some kernels
        roof={"size": 2**30, "side": 8192, "turns": turns},
    )


def dry_run() -> dict[str, Any]:
    """All code of `measure` once, on the CPU."""
    import torch

    from evals.kernels import work

    shapes = (work.DRY_SHAPES, work.DRY_LENGTHS, work.DRY_TOKENS, work.DRY_STEP_BATCHES)
    roof = {"size": 2**16, "side": 32, "turns": 1}
    return {"dry_run": True, "note": DRY} | _run(
        torch.device("cpu"), torch.float32, shapes, turns=1, warm_up=0, roof=roof
    )


def _run(device: Any, dtype: Any, cases: tuple[Any, ...], *, turns: int, warm_up: int, roof: dict[str, int]) -> Any:
    from evals.kernels import measure as measuring
    from evals.kernels.work import Work

    shapes, lengths, tokens, batches = cases
    clock = measuring.Clock(device)
    limits = measuring.roof(clock, dtype, **roof)
    results: list[dict[str, Any]] = []
    for shape in shapes.values():
        for length in lengths:
            results += _prefill(clock, dtype, shape, length, max(tokens // length, 1), turns, warm_up)
        for batch in batches:
            for length in lengths:
                results += _step(clock, dtype, shape, batch, length, turns, warm_up)
    for row in results:
        needed = Work(row["bytes"], row["flops"]).seconds(**limits)
        row["percent_of_roof"] = 100 * needed / row["seconds"]
    return {**surroundings(device, dtype), "turns": turns, "roof": limits, "results": results}


def _prefill(
    clock: Any, dtype: Any, shape: Any, length: int, rows: int, turns: int, warm_up: int
) -> list[dict[str, Any]]:
    """Forward and backward of all contenders on `rows` texts of `length` tokens."""

    from evals.kernels import contenders, estimates, work
    from evals.kernels.measure import in_turns, peak_bytes

    ahead, back = {}, {}
    for name in contenders.CONTENDERS:
        inputs = contenders.draw(shape, length, rows, clock.device, dtype, grad=True)
        run = contenders.prefill(name, shape, inputs)
        ahead[name] = partial(_without_gradients, run)
        back[name] = partial(_gradients, run, inputs.leaves())
    taken = {
        "forward": in_turns(clock, ahead, turns, warm_up),
        "backward": in_turns(clock, back, turns, warm_up),
    }
    whole = {name: peak_bytes(clock.device, lambda make=make: make()()) for name, make in back.items()}
    found = []
    for name in contenders.CONTENDERS:
        count = {"recurrence": name != "causal", "causal": name == "causal"}
        for kind, formula in (("forward", work.forward), ("backward", work.backward)):
            done = formula(shape, length, rows, dtype.itemsize, **count)
            where = {"shape": shape.name, "length": length, "rows": rows, "contender": name, "kind": kind}
            # Of both passes together, as in training.
            peak = whole[name] if kind == "backward" else None
            found.append({**where, **taken[kind][name], "bytes": done.bytes, "flops": done.flops, "peak_bytes": peak})
            if name == "fused" and clock.device.type == "cuda":
                found[-1]["estimate"] = estimates.seconds(shape, length, rows)[kind]
    return found


def _without_gradients(run: Callable[[], Any]) -> Callable[[], Any]:
    import torch

    def quiet() -> Any:
        with torch.no_grad():
            return run()

    return quiet


def _gradients(run: Callable[[], Any], leaves: list[Any]) -> Callable[[], Any]:
    """The backward pass of `run`, whose forward pass runs here."""
    import torch

    outputs = run()
    seed = torch.ones_like(outputs)
    return lambda: torch.autograd.grad(outputs, leaves, seed, allow_unused=True)


def _step(
    clock: Any, dtype: Any, shape: Any, batch: int, length: int, turns: int, warm_up: int
) -> list[dict[str, Any]]:
    """One token after `length` tokens."""
    import torch

    from evals.kernels import contenders, work
    from evals.kernels.measure import in_turns

    with torch.no_grad():
        runs = {
            name: contenders.step(name, shape, batch, length, clock.device, dtype) for name in contenders.CONTENDERS
        }
        made = {name: partial(_without_gradients, run) for name, run in runs.items()}
        taken = in_turns(clock, made, turns, warm_up)
    constant, growing = work.step(shape, batch, dtype.itemsize), work.causal_step(shape, batch, length, dtype.itemsize)
    found = []
    for name in contenders.CONTENDERS:
        done = growing if name == "causal" else constant
        where = {"shape": shape.name, "length": length, "rows": batch, "contender": name, "kind": "step"}
        found.append({**where, **taken[name], "bytes": done.bytes, "flops": done.flops, "peak_bytes": None})
    return found


def surroundings(device: Any, dtype: Any) -> dict[str, Any]:
    """Versions and settings that the figures depend on."""
    import torch

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    on_gpu = device.type == "cuda"
    return {
        "command": " ".join(["python -m evals.kernels", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "cuda": torch.version.cuda if on_gpu else None,
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("linearize", "torch", "triton", "flash-linear-attention")},
    }


if __name__ == "__main__":
    main()
