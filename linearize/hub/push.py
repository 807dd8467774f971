"""`linearize push`: check a checkpoint before the upload."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from linearize import __version__
from linearize.errors import HubError, OutputError
from linearize.hub.contents import Finding, local_things, shared_files
from linearize.runtime.claims import claimed
from linearize.runtime.files import sha256
from linearize.runtime.folders import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from linearize.hub.upload import Upload

CARD = "README.md"
_PROVENANCE = "linearize.json"


@dataclass(frozen=True)
class Parcel:
    """The files and repository of a push.

    Attributes:
        folder: the checkpoint's folder.
        files: name -> bytes.
        card: the model card's text.
        findings: reasons against sharing.
    """

    folder: Path
    files: dict[str, int]
    card: str
    findings: list[Finding]


def pack(folder: Path) -> Parcel:
    """Inspect a checkpoint's folder.

    Raises:
        HubError: the folder is not a checkpoint.
    """
    if not folder.is_dir():
        raise HubError(f"{folder}: no such folder; name the checkpoint's: linearize push REPO FOLDER")
    missing = [name for name in (_PROVENANCE, "config.json", CARD) if not (folder / name).is_file()]
    if missing:
        raise HubError(f"{folder}: has no {missing[0]}, so it is not a checkpoint that linearize wrote")
    files = {name: (folder / name).stat().st_size for name in shared_files(folder)}
    return Parcel(
        folder,
        files,
        (folder / CARD).read_text(encoding="utf-8", errors="replace"),
        [*local_things(folder), *_changed(folder, files)],
    )


def check(parcel: Parcel, *, force: bool) -> None:
    """Refuse content that should not be shared. `force` allows it, except for tokens.

    Raises:
        HubError: names the content.
    """
    serious = [finding for finding in parcel.findings if finding.secret or not force]
    if not serious:
        return
    first = min(serious, key=lambda finding: not finding.secret)
    more = f" (and {len(serious) - 1} more)" if len(serious) > 1 else ""
    way = (
        "take it out, and make it invalid if it was ever shared"
        if first.secret
        else f"write a folder to share: linearize export {parcel.folder} {parcel.folder}-export; or pass --force"
    )
    raise HubError(f"{parcel.folder}: {first.file} {first.what}{more}; {way}")


def push(
    folder: Path,
    repo: str,
    *,
    failed: Callable[[], Sequence[str]],
    public: bool = False,
    force: bool = False,
    message: str | None = None,
    confirm: Callable[[Parcel, str, bool], None] = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> Upload:
    """Upload a checkpoint to the Hub in one commit.

    Args:
        failed: verifies the model and returns the names of failed checks.
        public: make the repository public; otherwise it is private, and an existing public one is refused.
        force: push even if checks fail or files should not be shared.
        confirm: called before the upload with the parcel, the repository's full name, and True if it will be private;
            raises to cancel.

    Raises:
        HubError: the folder may not be pushed, or the Hub refuses.
        OutputError: another push to the repository is running on this machine, or a disk is full.
    """
    from linearize.hub.upload import Hub

    parcel = pack(folder)
    check(parcel, force=force)
    hub = Hub()
    repo = hub.full_name(repo)
    with _alone(repo):
        hub.check_room()
        private = hub.check(repo, public=public)
        confirm(parcel, repo, not public if private is None else private)
        if names := failed():
            told = f"{folder}: {len(names)} of its checks failed: {', '.join(names)}"
            if not force:
                raise HubError(f"{told}; see linearize verify {folder}, or pass --force to push it all the same")
            say(f"{told}; pushed all the same")
        if private and public:
            say(f"{repo}: is private, and stays so; its settings on the Hub can change that")
        return hub.upload(
            folder,
            list(parcel.files),
            repo,
            public=public,
            message=message or f"Upload {folder.resolve().name} (linearize {__version__})",
            say=say,
        )


def _alone(repo: str) -> AbstractContextManager[None]:
    """Lock out other pushes to `repo` from this machine; a no-op if the file system has no locks."""
    try:
        folder = cache_folder() / "pushes"
        folder.mkdir(parents=True, exist_ok=True)
    except (OutputError, OSError):
        return nullcontext()
    if not os.access(folder, os.W_OK):
        return nullcontext()
    return claimed(folder / repo.replace("/", "--"), name=repo)


def _changed(folder: Path, files: dict[str, int]) -> list[Finding]:
    """Files that differ from `linearize.json` or are missing in it; the card may be edited."""
    try:
        written: dict[str, Any] = json.loads((folder / _PROVENANCE).read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        written = {}
    if not isinstance(written, dict) or not written:
        return [Finding(_PROVENANCE, "does not say what belongs to the checkpoint")]
    lost = [Finding(name, "is missing, though linearize.json names it") for name in written if name not in files]
    edited = [
        Finding(name, "is not as it was written (linearize.json has another SHA-256)")
        for name, digest in written.items()
        if name in files and name != CARD and sha256(folder / name) != digest
    ]
    # Git's `.gitattributes` is hidden, and so not among the files.
    strangers = [name for name in files if name not in written and name not in (_PROVENANCE, CARD)]
    return [*lost, *edited, *(Finding(name, "is not among the files that linearize.json names") for name in strangers)]
