"""`linearize bench`: tokens per second and memory by context length, for a model and its teacher."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from linearize.cli.console import (
    JsonOption,
    OverwriteOption,
    RecipeOption,
    SetOption,
    TrustOption,
    begin,
    check_dtype,
    examples,
    print_json,
    status,
)
from linearize.report.formatting import readable_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

EPILOG = examples(
    "linearize bench ./tuned",
    "linearize bench ./tuned --lengths 512,8k,32k --int8",
    "linearize bench ./tuned --lengths 512 --train 512,2k",
    "linearize bench --config llama-3-8b --lengths 1k,32k,128k,1M --batches 1,16 -o report",
    "linearize bench --config llama-3-8b --layers 4 --lengths 1k,8k",
)


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A converted checkpoint, or a pretrained model, converted in memory. Left out with --config.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str, typer.Option("--against", metavar="teacher|none", help="Measure the teacher too, or not.")
    ] = "teacher",
    config: Annotated[
        str | None,
        typer.Option(
            "--config", metavar="NAME", help="Random weights in the shape of a published model: llama-3-8b, …"
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option("--layers", min=1, help="Keep only the first N layers, so that the model fits into memory."),
    ] = None,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,N,…", help="Tokens of context; 8k is 8,192 and 1M is 1,048,576.")
    ] = "1k,4k,16k,64k,256k,1M",
    batches: Annotated[str, typer.Option("--batches", metavar="N,N,…", help="Sequences per batch.")] = "1",
    prefill_up_to: Annotated[
        str | None,
        typer.Option(
            "--prefill-up-to",
            metavar="N",
            help="Longest length of the prefill; 0 for none. By default 4k on a CPU, 64k on a GPU.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=1, help="Decoded tokens per run. By default 8 on a CPU, 128 on a GPU.", show_default=False
        ),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Runs, of which the median counts.")] = 5,
    int8: Annotated[bool, typer.Option("--int8", help="Also time the model with int8 weights (on a CPU).")] = False,
    train: Annotated[
        str | None,
        typer.Option(
            "--train",
            metavar="N,N,…",
            help="Lengths at which a step of LoRA fine-tuning is timed too; none if left out.",
            show_default=False,
        ),
    ] = None,
    recipe: RecipeOption = "default",
    overrides: SetOption = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Dtype of weights and caches: auto, float32, bfloat16 or float16.")
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", "--report", metavar="DIR", help="Write the figures and plots there.", show_default=False
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure speed and memory of decoding, prefill and training, for a model and its teacher.

    Teacher and model share their weights and run in turns; the first run of
    each is not counted, and medians are shown. The teacher uses SDPA, which
    selects FlashAttention if available.

    The converted model decodes with the decoding engine, on a GPU as a CUDA
    graph that is replayed for each token. "of roof" is the share of memory
    bandwidth that a decoding step uses: the bytes of weights and memory that
    it must move, relative to the bytes that a large copy moves in that time.
    The copy is measured in the same run.

    Decoding after a long context does not read that context: the teacher's
    cache is filled with random keys and values of that length, the model's
    memory with random contents of its fixed size. Prefill is measured on
    random tokens. If a cache does not fit into memory, the row names a
    length that does.

    --train times steps of LoRA fine-tuning of model and teacher, on --batches
    rows of random tokens: forward, cross-entropy, backward and AdamW, with
    the adapters of the default recipe. The adapters are added to copies that
    share the frozen weights; the model does not change.
    """
    check_dtype(dtype)
    if (model is None) == (config is None):
        raise typer.BadParameter("give a MODEL, or a --config for random weights, and not both")
    if against not in ("teacher", "none"):
        raise typer.BadParameter(f"--against {against}: expected teacher or none")
    chosen = {name: _numbers(name, text) for name, text in (("--lengths", lengths), ("--batches", batches))}
    trained = () if train is None else _numbers("--train", train, least=2)
    limit = None if prefill_up_to is None else _number("--prefill-up-to", prefill_up_to)
    settings = begin(recipe, overrides, output, overwrite=overwrite)
    from linearize.benchmark.bench import Plan
    from linearize.jobs.bench import bench as measure

    plan = Plan(
        lengths=chosen["--lengths"],
        batches=chosen["--batches"],
        prefill_up_to=limit,
        steps=steps,
        repeats=repeats,
        teacher=against == "teacher",
        int8=int8,
        train=trained,
    )

    facts = measure(
        model,
        settings,
        plan,
        config=config,
        layers=layers,
        dtype=dtype,
        output=output,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        say=status,
    )
    if as_json:
        print_json(facts)
    else:
        _show(facts)


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def _number(option: str, text: str) -> int:
    found = re.fullmatch(r"(\d+)([kKmM]?)", text.strip())
    if found is None:
        raise typer.BadParameter(f"{option} {text}: expected a number such as 512, 8k or 1M")
    return int(found[1]) * _UNITS[found[2].lower()]


def _numbers(option: str, text: str, least: int = 1) -> tuple[int, ...]:
    numbers = tuple(dict.fromkeys(_number(option, part) for part in text.split(",")))
    if min(numbers) < least:
        raise typer.BadParameter(f"{option} {text}: expected numbers from {least} on")
    return numbers


_KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "decode": ("writes", "writing", ("of roof", "cache")),
    "prefill": ("reads", "reading", ("first token",)),
    "train": ("trains", "training", ()),
}
"""A kind's verb, its title in the table, and its additional columns."""


def _show(facts: dict[str, Any]) -> None:
    out = Console(highlight=False, soft_wrap=True)
    mixer, layers, whole = facts["mixers"][0], facts["layers"], facts["layers_of_the_whole"]
    cut = f"{layers} of its {whole} layers" if layers != whole else f"{layers} layers"
    weights = ", ".join(f"{name} {readable_bytes(size)}" for name, size in facts["weights_bytes"].items())
    rows = {
        "model": f"{facts['model']}, {cut}, {facts['dtype']}"
        + (", random weights" if facts["weights"] == "random" else ""),
        "mixer": f"{mixer['recurrence']}, window {mixer['window']}, {mixer['sinks']} sinks",
        "machine": f"{facts['device']}, {facts['threads']} threads, torch {facts['versions'].get('torch', '?')}",
        "weights": weights,
    }
    for name, text in rows.items():
        out.print(f"{name:8} {text}", markup=False)
    for kind in _KINDS:
        if chosen := [row for row in facts["rows"] if row["kind"] == kind]:
            out.print(_table(kind, chosen))
    told = set()
    for row in facts["rows"]:
        place = (row["kind"] == "train", row["system"], row["batch"], row["tokens"])
        if "skipped" in row and place not in told:
            told.add(place)
            out.print(
                f"{row['system']} at {row['tokens']:,} tokens, batch {row['batch']}: {row['skipped']}", markup=False
            )
    for system, kinds in facts["ahead_from"].items():
        for kind, found in kinds.items():
            for batch, tokens in found.items():
                if any(row["kind"] == kind and str(row["batch"]) == batch for row in facts["rows"]):
                    verb = _KINDS[kind][0]
                    where = f"from {tokens:,} tokens on" if tokens else "at no length measured"
                    out.print(f"{system}, batch {batch}: {verb} faster than the teacher {where}", markup=False)


def _table(kind: str, rows: Sequence[dict[str, Any]]) -> Table:
    _, title, more = _KINDS[kind]
    teacher = {(row["batch"], row["tokens"]): row for row in rows if row["system"] == "teacher"}
    table = Table("batch", "tokens", title, "tok/s", "x teacher", *more, "peak memory")
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        place = row["batch"], row["tokens"]
        cells = ["no room"] if "skipped" in row else _cells(row, teacher.get(place))
        cells += ["–"] * (len(table.columns) - 3 - len(cells))
        table.add_row(str(row["batch"]), f"{row['tokens']:,}", row["system"], *cells)
    return table


def _cells(row: dict[str, Any], teacher: dict[str, Any] | None) -> list[str]:
    ratio = "–"
    if teacher is not None and teacher is not row and "skipped" not in teacher:
        ratio = f"{row['tokens_per_second'] / teacher['tokens_per_second']:.2f}"
    if row["kind"] == "decode":
        more = [f"{100 * row['roof_share']:.0f} %", readable_bytes(row["cache_bytes"])]
    else:
        more = [f"{row['first_token_seconds']:.2f} s"] if row["kind"] == "prefill" else []
    peak = "–" if row["peak_bytes"] is None else readable_bytes(row["peak_bytes"])
    return [f"{row['tokens_per_second']:,.1f}", ratio, *more, peak]
