"""`linearize export`: a checkpoint as a folder that is fit to be shared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli.console import (
    DtypeOption,
    JsonOption,
    OverwriteOption,
    check_dtype,
    examples,
    parse_size,
    print_json,
    status,
)
from linearize.cli.libraries import quiet_libraries
from linearize.report.formatting import readable_bytes
from linearize.runtime.files import check_free

EPILOG = examples(
    "linearize export out/finetuned smol-gla --base HuggingFaceTB/SmolLM2-135M-Instruct",
    "linearize export tuned smol-gla --report report --dtype bfloat16",
    "linearize export tuned smol-gla-int8 --weights int8 --dtype bfloat16",
    "linearize export tuned smol-gla --name me/smol-gla --max-shard-size 500MB --license apache-2.0",
)


def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What convert, finetune or run wrote.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="DIR",
            help="Of eval --report or run: its tables go onto the card. Found by itself where run made FOLDER.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="ID",
            help="The base model's id on the Hub, if it was a file or folder.",
            show_default=False,
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="The base model's, if it does not say.", show_default=False),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", metavar="REPO", help="The model's name on its card; OUT's if left out.", show_default=False
        ),
    ] = None,
    shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="The most that a file of weights holds.")
    ] = "5GB",
    dtype: DtypeOption = "auto",
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="KIND",
            help="int8 or int4, for linear layers of integers; the cost is measured, and said on the card.",
            show_default=False,
        ),
    ] = None,
    outliers: Annotated[
        float | None,
        typer.Option(
            "--outliers",
            metavar="SHARE",
            min=0,
            max=1,
            help="Of a layer's inputs, how many keep their weights: those that cost most to round. 1/64 if left out.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="What the cost is measured on: a file, a Hub data set, or self: the model writes it. Rows that "
            "fine-tuning held out, if left out.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=2, help="Of that text; half to choose what is kept, half to measure.")
    ] = 8192,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint as a folder that is fit to be shared.

    Adapters are merged, weights are in shards, and the folder has the code to
    load it where linearize is not installed, and a card: recipe, measured
    tables beside the baselines, what was lost, base model and licence. Paths
    of this machine and rows of the training data stay behind.
    """
    check_dtype(dtype)
    parse_size(shard_size, "--max-shard-size")
    check_free(output, overwrite=overwrite)
    quiet_libraries()
    from linearize.jobs.export import export as write

    done = write(
        folder,
        output,
        report=report,
        base=base,
        licence=licence,
        name=name,
        shard_size=shard_size,
        dtype=dtype,
        weights=weights,
        outliers=outliers,
        text=text,
        tokens=tokens,
        overwrite=overwrite,
        say=status,
    )
    if as_json:
        print_json(
            {
                "output": str(output),
                "files": done.files,
                "base": done.base,
                "licence": done.licence,
                "measured": None if done.measured is None else str(done.measured),
                "quantized": done.cost,
            }
        )
        return
    print(output)
    status(f"{len(done.files)} files, {readable_bytes(sum(done.files.values()))}")
    if done.cost is not None:
        (was, now), apart = done.cost["perplexity"], done.cost["kl"]["mean"]
        status(f"{done.cost['weights']}: perplexity {was:.3f}, then {now:.3f}; divergence {apart:.4f} nats per token")
    if done.measured is None:
        status(
            f"its card has no figures; measure them, and export with --report DIR: linearize eval {folder} --report DIR"
        )
    if not done.licence:
        status("the base model's licence is not known; --license ID puts it onto the card")
    for finding in done.findings:
        status(f"{finding.file} {finding.what}")
    status(f"next: linearize push {name or output.resolve().name} {output}")
