"""`linearize push`: upload a checkpoint to the Hub, private by default."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearize.cli.console import JsonOption, YesOption, examples, print_json, status, status_line
from linearize.cli.libraries import quiet_libraries
from linearize.report.formatting import readable_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from linearize.hub.push import Parcel

EPILOG = examples(
    "linearize push me/smol-gla ./smol-gla",
    "linearize push me/smol-gla ./smol-gla --dry-run",
    "linearize push smol-gla ./smol-gla --public --yes",
)


def push(
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub; the default owner is the logged-in user.")
    ],
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER", help="The checkpoint; a folder of the repository's name if left out.", show_default=False
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public; by default it is private.")
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", "-m", metavar="TEXT", help="Commit message.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the card, the files and their sizes, and stop; no Hub request.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Push even if checks fail, or files contain local paths or training data."),
    ] = False,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Single decode steps of verify's drift check.")] = 256,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Push a checkpoint to the Hugging Face Hub in one commit, after verification.

    Shows the model card, the files and their sizes, and asks. Files with
    local paths or training data are refused (linearize export writes a folder
    without them), access tokens in files always. The same command continues
    an interrupted upload, without sending uploaded data again.
    """
    quiet_libraries(bars=sys.stderr.isatty())
    from linearize.errors import HubError
    from linearize.jobs.push import plan_push
    from linearize.jobs.push import push as publish

    chosen = folder or Path(repo.rpartition("/")[2])
    if dry_run:
        parcel = plan_push(chosen, force=force)
        if as_json:
            print_json({"repo": repo, "private": not public, "pushed": False, "files": parcel.files})
        else:
            _show(parcel, print)
        status(f"would push {_what(parcel, repo, private=not public)}; nothing was sent")
        return
    if not yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise HubError(f"{repo}: nothing is pushed unasked, and there is no terminal to ask at; pass --yes")

    def confirm(parcel: Parcel, name: str, private: bool) -> None:
        _show(parcel, status)
        if not yes:
            typer.confirm(f"push {_what(parcel, name, private)}?", abort=True, err=True)

    with status_line("verifying") as tick:
        done = publish(
            repo,
            chosen,
            public=public,
            force=force,
            message=message,
            steps=steps,
            confirm=confirm,
            tick=tick,
            say=status,
        )
    if as_json:
        facts = {"repo": done.repo, "private": done.private, "pushed": True, "changed": done.changed}
        print_json({**facts, "url": done.url, "commit": done.commit})
        return
    print(done.url)
    visible = "private" if done.private else "public"
    status(
        f"commit {done.commit[:8]}, {visible}; next: linearize verify {done.repo}"
        if done.changed
        else f"{done.repo} has these files already, in commit {done.commit[:8]} ({visible})"
    )


def _show(parcel: Parcel, say: Callable[[str], None]) -> None:
    for line in parcel.card.strip().splitlines():
        say(f"  {line}".rstrip())
    say("")
    for name, size in parcel.files.items():
        say(f"{readable_bytes(size):>9}  {name}")


def _what(parcel: Parcel, repo: str, private: bool) -> str:
    total = readable_bytes(sum(parcel.files.values()))
    return f"{len(parcel.files)} files, {total}, to {repo} ({'private' if private else 'public'})"
