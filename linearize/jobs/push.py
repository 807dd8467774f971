"""`linearize push`: verify a checkpoint and put it on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from linearize.hub.push import Parcel, check, pack
from linearize.hub.push import push as push_folder
from linearize.jobs.checks import check_numbers, quiet
from linearize.jobs.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from linearize.hub.upload import Upload


def push(
    repo: str,
    folder: str | Path,
    *,
    public: bool = False,
    force: bool = False,
    message: str | None = None,
    steps: int = 256,
    confirm: Callable[[Parcel, str, bool], None] = lambda *_: None,
    tick: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] = quiet,
) -> Upload:
    """Puts a checkpoint on the Hub in one commit, after it was verified.

    Args:
        repo: OWNER/NAME; who is logged in is the owner, if left out.
        folder: a checkpoint that is fit to be shared; `export` writes one.
        public: make the repository public; it is private otherwise.
        force: push though checks fail, or the folder has paths of this machine or rows of the training data.
        message: of the commit.
        steps: of the drift check of `verify`.
        confirm: called with what would be pushed, where, and whether that is private; raises to stop.
        tick: see `verify`.
        say: gets lines for the person at the terminal.

    Raises:
        HubError: the folder is not to be pushed, or the Hub does not do as asked.
        OutputError: another push to the repository is under way on this machine, or a disk is full.
    """
    check_numbers(1, steps=steps)
    return push_folder(
        Path(folder),
        repo,
        failed=lambda: verify(folder, steps=steps, tick=tick).failed,
        public=public,
        force=force,
        message=message,
        confirm=confirm,
        say=say,
    )


def plan_push(folder: Path, *, force: bool = False) -> Parcel:
    """`push` up to the first question to the Hub: pack the folder, and refuse what should not leave the machine.

    Raises:
        HubError: the folder is not to be pushed.
    """
    parcel = pack(folder)
    check(parcel, force=force)
    return parcel
