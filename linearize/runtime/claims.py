"""Locks for outputs: one job at a time per output. A second job is refused, and a dead job's leftovers are removed.

Uses `fcntl.flock`, not the package `filelock`, because `filelock` lacks a shared lock on the same file, which the cache
needs, and leaves its lock file behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from linearize.errors import OutputError

try:
    import fcntl
except ImportError:  # on Windows, where outputs are not locked
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator

PARTIAL, OLD = "partial", "old"
_HELD: dict[Path, int] = {}
_WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def beside(target: Path, kind: str) -> Path:
    """This process's path beside `target` for the unfinished result (`PARTIAL`) or for the replaced one (`OLD`)."""
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}")


def final_name(path: Path) -> str:
    """The final name of `path`: the name of its target if `beside` made it, else its own."""
    path = Path(os.path.abspath(path))
    staged = re.fullmatch(rf"\.(.+)\.{PARTIAL}-\d+", path.name)
    return staged[1] if staged else path.name


@contextmanager
def claimed(target: Path | None, *, wait: bool = False, name: str = "") -> Iterator[None]:
    """Hold the exclusive right to write the file or folder `target` during the block.

    The lock is `flock` on a file beside `target`; it ends with its process, so a dead job blocks no one. A dead job's
    staged files are removed, and a result that it was replacing is restored. A process may claim the same target again
    inside the block. Parent folders created for the lock are removed if they stay empty.

    Args:
        target: None for no output; then the block is a no-op.
        wait: wait for the other job instead of raising; for outputs that jobs share.
        name: names the target in the error; by default its path.

    Raises:
        OutputError: another job holds the lock, or `target` cannot be written.
    """
    if target is None:
        yield
        return
    target = Path(os.path.abspath(target.expanduser()))
    if target in _HELD:
        _HELD[target] += 1
        try:
            yield
        finally:
            _HELD[target] -= 1
        return
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        with _lock(target, wait, name):
            _HELD[target] = 1
            try:
                _clear(target)
                yield
            finally:
                del _HELD[target]
    finally:
        for folder in made:  # innermost folder first
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextmanager
def _lock(target: Path, wait: bool, name: str) -> Iterator[None]:
    path = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = _acquire(path, wait, name or str(target))
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {(error.strerror or str(error)).lower()}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # under the lock, so a process that has just opened the file detects the removal
        os.close(file)


class SharedLock:
    """A lock that several processes can hold at once; released when the object is deleted."""

    def __init__(self, file: int) -> None:
        self._file = file

    def __del__(self) -> None:
        os.close(self._file)


def shared_lock(path: Path) -> SharedLock | None:
    """Take a shared lock on the file `path`, which is created with its folder; None if the system has no locks or the
    path is not writable."""
    while fcntl is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = SharedLock(file := os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(file), path.stat()):
                return lock
        except FileNotFoundError:  # another process removed the file or its folder between the calls
            continue
        except OSError:
            break
    return None


@contextmanager
def locked_alone(path: Path) -> Iterator[bool]:
    """Take the exclusive lock on the file `path` without waiting; yields False if another process holds it. Until the
    block ends no other process can take it."""
    if fcntl is None:
        yield True
        return
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            alone = error.errno in _WITHOUT_LOCKS
        else:
            alone = True
        yield alone


def _acquire(path: Path, wait: bool, name: str) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                owner = os.pread(file, 200, 0).decode(errors="replace").strip()
                os.close(file)
                raise OutputError(
                    f"{name}: another job is writing there{f' ({owner})' if owner else ''}; wait for it, or name "
                    "another place"
                ) from None
            if error.errno not in _WITHOUT_LOCKS:
                os.close(file)
                raise
        # The owner may have removed the file between the calls; then the lock is on an unlinked file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                os.ftruncate(file, 0)
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return file
        os.close(file)


def _clear(target: Path) -> None:
    """Remove killed jobs' leftovers beside `target`."""
    for old in _leftovers(target, OLD):
        if not target.exists():
            old.rename(target)
        else:
            _remove(old)
    for partial in _leftovers(target, PARTIAL):
        _remove(partial)


def _leftovers(target: Path, kind: str) -> list[Path]:
    start = f".{target.name}.{kind}-"
    return [
        path for path in target.parent.iterdir() if path.name.startswith(start) and path.name[len(start) :].isdigit()
    ]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
