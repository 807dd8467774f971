"""`linearize bench`: tokens per second and memory by context length, for a model and its teacher."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

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
from linearize.runtime.interruption import Interrupted

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
            "--output", "-o", "--report", metavar="DIR", help="Write a page, figures and plots.", show_default=False
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

    Stopped by Ctrl-C or SIGTERM, it shows and writes the lengths that it has
    measured.
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
    if facts["stopped_by"] is not None:
        kept = f"what was measured is in {output / 'report.html'}" if output is not None else ""
        raise Interrupted(facts["stopped_by"], kept)
    if output is not None:
        status(f"report: {output / 'report.html'}")


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


def _show(facts: dict[str, Any]) -> None:
    from linearize.benchmark.page import page_of

    out, page = Console(highlight=False, soft_wrap=True), page_of(facts)
    width = max(len(name) for name, _ in page.facts)
    for name, text in page.facts:
        out.print(f"{name:{width}}  {text}", markup=False)
    for section in page.sections:
        for grid in section.grids:
            table = Table(*grid.header)
            for column in table.columns:
                column.justify = "right"
            for row in grid.rows:
                table.add_row(*row)
            out.print(table)
        for _, sentences in section.told:
            for sentence in sentences:
                out.print(sentence, markup=False)
