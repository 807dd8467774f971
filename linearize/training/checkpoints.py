"""Checkpoints that are whole or do not count: a manifest with each file's SHA-256, written last, then one rename."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from linearize.runtime.files import flush, sha256

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = "manifest.json"
_PREFIX = "checkpoint-"


def seal(staging: Path, target: Path, **facts: Any) -> None:
    """Makes a finished checkpoint in `staging` the checkpoint `target`: manifest, sync, rename, sync.

    Args:
        facts: what else the manifest says.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(staging.iterdir())
        if path.is_file()
    }
    (staging / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1) + "\n", encoding="utf-8")
    for path in staging.iterdir():
        flush(path)
    flush(staging)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(staging, target)
    flush(target.parent)


def manifest(checkpoint: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest, or None if it has no readable one."""
    try:
        found = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return found if isinstance(found["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a stage's folder, oldest first, by the sizes of their files."""
    found = [
        path
        for path in folder.glob(f"{_PREFIX}*")
        if path.name.removeprefix(_PREFIX).isdigit() and _fits(path, digests=False)
    ]
    return sorted(found, key=step_of)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a stage's folder whose files are what was written, by their digests."""
    return next((path for path in reversed(checkpoints(folder)) if _fits(path, digests=True)), None)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which it was written."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def _fits(checkpoint: Path, *, digests: bool) -> bool:
    told = manifest(checkpoint)
    if told is None or not told["files"]:
        return False
    try:
        return all(
            (checkpoint / name).stat().st_size == file["bytes"]
            and (not digests or sha256(checkpoint / name) == file["sha256"])
            for name, file in told["files"].items()
        )
    except (OSError, KeyError, TypeError):
        return False


def stage_to_resume(work: Path, stages: int) -> int:
    """The last stage that has a checkpoint."""
    return max((n for n in range(stages) if checkpoints(work / f"stage-{n}")), default=0)
