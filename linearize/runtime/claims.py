"""One job at a time for each output: a second one is refused, and what a dead one left is cleared away.

`fcntl.flock` directly, not the package `filelock`: that has no shared lock on the same file, which the cache needs, and
leaves its lock file beside the output.
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
except ImportError:  # not on Windows, where nothing keeps two jobs apart
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator

PARTIAL, OLD = "partial", "old"
_HELD: dict[Path, int] = {}
_WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def beside(target: Path, kind: str) -> Path:
    """Where this process keeps what is to become `target` (`PARTIAL`), or what was there (`OLD`)."""
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}")


def final_name(path: Path) -> str:
    """The name that `path` has in the end: that of its target where `beside` staged it, else its own."""
    path = Path(os.path.abspath(path))
    staged = re.fullmatch(rf"\.(.+)\.{PARTIAL}-\d+", path.name)
    return staged[1] if staged else path.name


@contextmanager
def claimed(target: Path | None, *, wait: bool = False, name: str = "") -> Iterator[None]:
    """The right to write the file or folder `target`, for as long as the block lasts.

    The lock is the system's (flock, on a file beside `target`), which ends with its process: what a dead job leaves
    keeps nobody out. What it had staged is removed, and a result that it was about to replace is put back. A process
    may claim the same place again inside the block. Folders that had to be made for it go again if they stay empty.

    Args:
        target: None where nothing is going to be written, and nothing is claimed.
        wait: until the other job is done with it, which is for what two jobs may share.
        name: of the place in what is said to whom it is refused, if not its path.

    Raises:
        OutputError: another job has it, or nothing can be written there.
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
        for folder in made:  # the innermost first
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
            path.unlink()  # while the lock is held: who has just opened the file sees that it is gone
        os.close(file)


class SharedLock:
    """A lock that several processes hold at once; it ends with the object."""

    def __init__(self, file: int) -> None:
        self._file = file

    def __del__(self) -> None:
        os.close(self._file)


def shared_lock(path: Path) -> SharedLock | None:
    """A shared lock on the file `path`, made with its folder; None without locks, or where nothing can be written."""
    while fcntl is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = SharedLock(file := os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(file), path.stat()):
                return lock
        except FileNotFoundError:  # the file or its folder was removed between two calls
            continue
        except OSError:
            break
    return None


@contextmanager
def locked_alone(path: Path) -> Iterator[bool]:
    """Yields True if no process holds the lock on the file `path`; then none can take it until the block ends."""
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
        # Its owner may have removed the file between the two calls; then the lock is on nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                os.ftruncate(file, 0)
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return file
        os.close(file)


def _clear(target: Path) -> None:
    """Clears away what jobs that were killed left beside `target`."""
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
