"""`linearize push`: verify a checkpoint and upload it to the Hub."""

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
    """Upload a checkpoint to the Hub in one commit, after verification.

    Args:
        repo: OWNER/NAME; the default owner is the logged-in user.
        folder: a checkpoint for sharing, written by `export`.
        public: make the repository public; by default it is private.
        force: push even if checks fail, or if the folder contains local paths or rows of the training data.
        message: the commit message.
        steps: decode steps of the drift check of `verify`.
        confirm: called with the parcel, the repository, and True if it is private; raises to stop.
        tick: see `verify`.
        say: called with each progress line.

    Raises:
        HubError: the folder must not be pushed, or the Hub refuses a request.
        OutputError: another push to the repository is running on this machine, or a disk is full.
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
    """The local part of `push`: pack the folder, and refuse content that must not be published.

    Raises:
        HubError: the folder must not be pushed.
    """
    parcel = pack(folder)
    check(parcel, force=force)
    return parcel
