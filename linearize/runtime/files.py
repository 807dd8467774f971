"""Results that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from linearize.errors import OutputError
from linearize.runtime.claims import OLD, PARTIAL, beside, claimed

if TYPE_CHECKING:
    from collections.abc import Iterator


_RESULTS = ("linearize.json", "report.json", "probe.json")
"""Every folder that linearize writes has one of these files; a pretrained model's folder has none."""

_SPARE = 16_000_000
"""Bytes on top of weights: tokenizer, code, pages."""


@contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends without an error.

    It is made at once, so that a place that cannot be written is found before any work is done.

    Raises:
        OutputError: `target` exists (and `overwrite` is not set), cannot be made, another job is making it, or the disk
            is full.
    """
    target = Path(os.path.abspath(target.expanduser()))
    check_free(target, overwrite=overwrite)
    with claimed(target):
        check_free(target, overwrite=overwrite)  # as it is now that nobody else can change it
        staging = beside(target, PARTIAL)
        try:
            staging.mkdir()
        except OSError as error:
            raise OutputError(f"{target}: cannot be written: {_plain(error)}") from error
        try:
            with telling(target, inside=staging):
                yield staging
                _replace(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes the file `target` (instead of one that is there) when the block ends without
    an error.

    Raises:
        OutputError: see `check_file`; or another job is writing it, or the disk is full.
    """
    target = Path(os.path.abspath(target.expanduser()))
    check_file(target)
    with claimed(target):
        staging = beside(target, PARTIAL)
        try:
            with telling(target, inside=target.parent):
                yield staging
                flush(staging)
                staging.replace(target)
                flush(target.parent)
        finally:
            staging.unlink(missing_ok=True)


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """A folder to write files into, which are put into `folder` when the block ends without an error: each in one step,
    instead of one of its name that is there. Other files of `folder` stay.

    Raises:
        OutputError: the folder cannot be made, or the disk is full.
    """
    folder = Path(os.path.abspath(folder.expanduser()))
    made = not folder.exists()
    staging = folder / f".{PARTIAL}-{os.getpid()}"
    try:
        with telling(
            folder, "nothing was left there" if made else "what was there before is as it was", inside=staging
        ):
            folder.mkdir(parents=True, exist_ok=True)
            staging.mkdir()
            yield staging
            for path in sorted(staging.iterdir()):
                flush(path)
                path.replace(folder / path.name)
            flush(folder)
            made = False
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if made:
            with suppress(OSError):
                folder.rmdir()


def check_space(target: Path, nbytes: int) -> None:
    """Refuses a disk that has no room for `nbytes` at `target`, before the work whose result they are.

    Raises:
        OutputError: with what is needed and what is free.
    """
    target = Path(os.path.abspath(target.expanduser()))
    nearest = next(folder for folder in (target, *target.parents) if folder.is_dir())
    free = shutil.disk_usage(nearest).free
    if free < nbytes + _SPARE:
        raise OutputError(
            f"{target}: {(nbytes + _SPARE) / 1e6:,.0f} MB are needed, and {free / 1e6:,.0f} MB are free on that disk; "
            "free some space, or name a folder on another disk"
        )


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENOTDIR}
# safetensors and torch report a full disk as errors of their own.
_FULL = ("No space left", "file write failed", "failed writing file", "unexpected pos")


@contextmanager
def telling(target: Path, left: str = "nothing was left there", *, inside: Path | None = None) -> Iterator[None]:
    """Turns what a disk can do wrong into one line.

    Args:
        left: what there is of the result now.
        inside: the folder that is written into, `target` if left out; that it vanishes is told, too.

    Raises:
        OutputError: instead of what was raised.
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            why = _plain(error)
        elif any(words in str(error) for words in _FULL):
            why = "no space left on device"
        elif not (inside or target).exists():
            why, left = "the folder is gone", "somebody removed it meanwhile"
        else:
            raise
        raise OutputError(f"{target}: cannot be written: {why}; {left}") from error


def check_file(target: Path) -> None:
    """Refuses a place where no file can be written.

    Raises:
        OutputError: a folder is there, or its own folder is missing or closed.
    """
    parent = target.parent
    if target.is_dir():
        raise OutputError(f"{target}: is a folder; name a file")
    if not parent.is_dir():
        raise OutputError(f"{target}: there is no folder {parent}; make it first")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{target}: the folder {parent} cannot be written to; name another")


def check_writable(target: Path, *, below: Path | None = None) -> None:
    """Refuses the folder `target` where it, or the nearest folder that is there already, cannot be written to.

    Args:
        below: a folder that has to be writable instead of `target`.

    Raises:
        OutputError: a file stands in the way, or permissions do.
    """
    place = Path(os.path.abspath((below or target).expanduser()))
    nearest = next(folder for folder in (place, *place.parents) if folder.exists())
    if not nearest.is_dir():
        raise OutputError(f"{target}: cannot be written: {nearest} is a file, and not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: cannot be written: the folder {nearest} is closed to you; name another")


def check_free(target: Path, *, overwrite: bool) -> None:
    """Refuses a place that cannot be written, or that is taken and may not be overwritten.

    Raises:
        OutputError: see above.
    """
    check_writable(target, below=Path(os.path.abspath(target.expanduser())).parent)
    if target.is_file():
        raise OutputError(f"{target}: is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise OutputError(f"{target}: exists and is not empty; pass --overwrite to replace it")
        if not any((target / name).is_file() for name in _RESULTS):
            raise OutputError(f"{target}: does not look like a result of linearize; it will not be overwritten")


def _replace(staging: Path, target: Path) -> None:
    """Puts `staging` in the place of `target`; at no moment is neither the old nor the new one there."""
    readers = staging.stat().st_mode & 0o444  # as the user's umask has it; safetensors lets only its owner read a file
    for path in staging.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | readers)
        flush(path)
    flush(staging)
    if not target.exists():
        staging.rename(target)
    elif not _exchange(staging, target):
        old = beside(target, OLD)
        try:
            target.rename(old)
            staging.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    flush(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step, where the system and the file system can (Linux's renameat2)."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap is not None and swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def flush(path: Path) -> None:
    """Has a file's content, or a folder's names, written to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        # Some file systems have no sync for folders.
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(file)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _plain(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
