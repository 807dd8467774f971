"""`linearize eval`: what a model scores, beside its teacher and the baseline that costs no training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from linearize.cli.console import (
    DtypeOption,
    JsonOption,
    ModelArgument,
    TrustOption,
    check_dtype,
    examples,
    print_json,
    status,
)
from linearize.cli.libraries import quiet_libraries

EPILOG = examples(
    "linearize eval ./tuned --baseline teacher,window",
    "linearize eval ./tuned --tasks piqa,arc_easy,lambada --limit 200 --data ./data",
    "linearize eval HuggingFaceTB/SmolLM2-135M-Instruct --tasks wikitext2 --json",
)


def evaluate(
    model: ModelArgument,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            metavar="NAME,...",
            help="piqa, arc_easy, arc_challenge, hellaswag, winogrande, lambada, wikitext2, held_out. If left out: the "
            "rows that fine-tuning held out where the folder has some, otherwise every task.",
        ),
    ] = "",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N items of each task.")] = None,
    baseline: Annotated[
        str,
        typer.Option("--baseline", metavar="NAME,...", help="teacher, window (the teacher's window and sinks alone)."),
    ] = "",
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="Folder of the tasks' files; the Hub if left out.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences per forward pass.")] = 8,
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score a model, converted or not, with lm-eval and on held-out rows.

    Figures come with their standard error and, where a teacher is beside them, with the percent of the teacher's.
    """
    check_dtype(dtype)
    quiet_libraries()
    from linearize.conversion.source import find_source
    from linearize.evaluation.report import report_data, report_table
    from linearize.evaluation.systems import evaluate as score

    source = find_source(model, trust_remote_code=trust_remote_code)
    scores = score(
        source,
        _names(tasks),
        baselines=_names(baseline),
        data=data,
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
        say=status,
    )
    if as_json:
        print_json({"model": source.reference, "limit": limit, **report_data(scores)})
    else:
        Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(report_table(scores))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
