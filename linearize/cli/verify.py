"""`linearize verify`: check that a converted model computes one function, however it is called."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from linearize.cli.console import (
    DtypeOption,
    JsonOption,
    ModelArgument,
    check_dtype,
    examples,
    print_json,
    status,
    status_line,
)
from linearize.cli.libraries import quiet_libraries
from linearize.errors import VerificationError, counted

if TYPE_CHECKING:
    from linearize.verification import Check, Verification

EPILOG = examples(
    "linearize verify ./converted",
    "linearize verify ./tuned --dtype bfloat16 --steps 4096",
    "linearize verify ./tuned --steps 64 --json",
)


def verify(
    model: ModelArgument,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            min=1,
            help="Length of the rows, more than window, sinks and slots. If left out: three of the widest window, but "
            "at least 192, and at most 2,048 unless a window made by conversion needs more; slots that take more than "
            "512 tokens to fill are then lowered for all but three checks.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Single decode steps of the drift check; two rows' length if left out."),
    ] = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Check that a converted model computes one function, however it is called.

    Whole, in chunks, token by token, padded, packed, in a batch, as beams, saved and loaded: all must give the same
    logits, in a memory that does not grow. Uses random tokens; the exit status is 1 if a check fails.
    """
    check_dtype(dtype)
    quiet_libraries()
    from linearize.jobs.verify import verify as run_checks
    from linearize.sources.source import find_source

    with status_line("verifying") as tick:
        found = run_checks(model, tokens=tokens, steps=steps, dtype=dtype, tick=tick)
    source = find_source(model)
    if as_json:
        print_json({"model": source.reference, **_data(found)})
    else:
        Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(_table(found))
    for words in _remarks(found):
        status(words)
    if found.failed:
        raise VerificationError(
            f"{source.name}: {len(found.failed)} of {len(found.checks)} checks failed: {', '.join(found.failed)}; "
            "do not call the model in these ways"
        )


def _data(found: Verification) -> dict[str, Any]:
    return {
        "passed": not found.failed,
        "failed": found.failed,
        "dtype": found.dtype,
        "tokens": found.tokens,
        "steps": found.steps,
        "woken_layers": found.woken,
        "full_tokens": found.full_tokens,
        "recurrence_moves_logits_by": found.moved,
        "distance_from_wider_type": found.distance,
        "checks": [
            {
                "name": check.name,
                "holds": check.holds,
                "passed": check.passed,
                "error": check.error,
                "tolerance": check.tolerance,
                "detail": check.detail,
            }
            for check in found.checks
        ],
    }


def _table(found: Verification) -> Table:
    table = Table("check", "property")
    for name in ("worst error", "allowed", ""):
        table.add_column(name, justify="right")
    for check in found.checks:
        # Square brackets in an exception's text must not be parsed as markup.
        words = Text(check.holds + (f"\n{check.detail}" if check.detail else ""))
        table.add_row(check.name, words, f"{check.error:.1e}", _allowed(check), "ok" if check.passed else "FAILED")
    return table


def _allowed(check: Check) -> str:
    return f"{check.tolerance:.1e}" if check.tolerance else "exact"


def _remarks(found: Verification) -> list[str]:
    from linearize.verification.subject import FEW_SLOTS
    from linearize.verification.verify import FLOAT32_TOLERANCE, HALF_FLOOR

    remarks = []
    if found.full_tokens is not None:
        remarks.append(
            f"decode to drift ran with at most {FEW_SLOTS} slots per head and the same weights, so that slots fill in"
            f" {found.tokens} tokens; reload, memory and full size ran with all slots; --tokens N runs all checks so"
        )
    if found.woken:
        remarks.append(
            f"mix weights of {counted(found.woken, 'layer', 'layers')} were raised during the checks, so that the "
            f"recurrence changes the logits by {100 * (found.moved or 0):.1f} %, and restored after them"
        )
    times, least = (4, FLOAT32_TOLERANCE) if found.dtype == "float32" else (2, HALF_FLOOR)
    if found.distance is not None and times * found.distance > least:
        sharper = "; --dtype float32 gives a smaller tolerance" if found.distance > 0.05 else ""
        remarks.append(
            f"rounding to {found.dtype} alone changes the logits by {100 * found.distance:.2g} %; the tolerance is "
            f"{'twice' if times == 2 else 'four times'} as much{sharper}"
        )
    return remarks
