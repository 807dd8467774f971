"""`linearize cache`: show and remove cached results of earlier runs."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import typer

from linearize.cli.console import JsonOption, examples, print_json, status
from linearize.errors import OutputError, counted
from linearize.report.formatting import readable_bytes
from linearize.runtime import cache
from linearize.runtime.folders import cache_folder

app = typer.Typer(
    help="Show and remove cached results: teacher logits, generated text, results of evaluations.",
    no_args_is_help=True,
    epilog=examples("linearize cache ls", "linearize cache rm teacher-logits", "linearize cache rm --all"),
)


@app.command("ls", epilog=examples("linearize cache ls", "linearize cache ls --json"))
def list_entries(as_json: JsonOption = False) -> None:
    """List the entries of $LINEARIZE_CACHE, the least recently used first.

    When the total exceeds $LINEARIZE_CACHE_LIMIT (10GB by default), a write removes entries from the top of the list.
    Entries in use stay.
    """
    found = cache.entries()
    total, limit = sum(entry.nbytes for entry in found), cache.limit()
    sizes = {kind: [entry.nbytes for entry in found if entry.kind == kind] for kind in cache.KINDS}
    if as_json:
        print_json(
            {
                "folder": str(cache_folder()),
                "bytes": total,
                "limit_bytes": limit,
                "kinds": {kind: {"entries": len(own), "bytes": sum(own)} for kind, own in sizes.items()},
                "entries": [_facts(entry) for entry in found],
            }
        )
        return
    width = max((len(entry.name) for entry in found), default=0)
    for entry in found:
        used = f"{datetime.fromtimestamp(entry.used):%Y-%m-%d %H:%M}"
        busy = "  in use" if cache.in_use(entry) else ""
        print(f"{entry.name:{width}}  {readable_bytes(entry.nbytes):>9}  {used}{busy}")
    for kind, spec in cache.KINDS.items():
        if own := sizes[kind]:
            status(f"{kind} ({spec.about}): {readable_bytes(sum(own))} in {counted(len(own), 'entry', 'entries')}")
    status(f"{cache_folder()}: {readable_bytes(total)} of at most {readable_bytes(limit)} ({cache.LIMIT})")


@app.command("rm", epilog=examples("linearize cache rm self-text teacher-logits/0a1b", "linearize cache rm --all"))
def remove_entries(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME...]", help="Names of entries as in `ls`, prefixes of names, or kinds."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All entries.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove entries without asking. Entries in use stay, and are listed."""
    if bool(names) == everything:
        raise typer.BadParameter("give names of entries or kinds, or --all")
    chosen = cache.entries() if everything else cache.named(names or ())
    removed, kept = list[cache.Entry](), list[cache.Entry]()
    for entry in chosen:
        (removed if cache.remove(entry) else kept).append(entry)
    if as_json:
        print_json({"removed": [_facts(entry) for entry in removed], "kept": [entry.name for entry in kept]})
    else:
        for entry in removed:
            print(entry.name)
        number = counted(len(removed), "entry", "entries")
        status(f"removed {number}, {readable_bytes(sum(entry.nbytes for entry in removed))}")
    if kept:
        told = f"{kept[0].name}{f' and {len(kept) - 1:,} more' if len(kept) > 1 else ''}"
        if not everything:
            raise OutputError(
                f"{told}: not removed, because a job uses it or the disk refuses; try again after the job"
            )
        status(f"kept, because a job uses it or the disk refuses: {told}")


def _facts(entry: cache.Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "kind": entry.kind,
        "bytes": entry.nbytes,
        "last_used": datetime.fromtimestamp(entry.used).astimezone().isoformat(timespec="seconds"),
    }
