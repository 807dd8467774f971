"""Write results atomically: write beside the target, then rename into place."""

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


_RESULTS = ("linearize.json", "report.json", "probe.json", "bench.json")
"""Every folder that linearize writes contains one of these files; a pretrained model's folder contains none."""

_SPARE = 16_000_000
"""Bytes of a checkpoint besides weights: tokenizer, code, pages."""


@contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A staging folder that becomes `target` when the block ends without an error.

    The folder is created immediately, so an unwritable place raises before any work.

    Raises:
        OutputError: `target` exists (and `overwrite` is not set), cannot be created, is claimed by another job, or the
            disk is full.
    """
    target = Path(os.path.abspath(target.expanduser()))
    check_free(target, overwrite=overwrite)
    with claimed(target):
        check_free(target, overwrite=overwrite)  # checked under the lock, so the answer cannot change
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
    """A staging path that becomes the file `target` when the block ends without an error, and replaces an existing
    file.

    Raises:
        OutputError: see `check_file`; or another job is writing the file, or the disk is full.
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
    """A staging folder whose files move into `folder` when the block ends without an error. Each file moves atomically
    and replaces a file of the same name; other files of `folder` stay.

    Raises:
        OutputError: the folder cannot be created, or the disk is full.
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
    """Refuse a disk with less than `nbytes` free at `target`, before the work starts.

    Raises:
        OutputError: gives the needed and the free bytes.
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
# safetensors and torch raise their own exceptions for a full disk.
_FULL = ("No space left", "file write failed", "failed writing file", "unexpected pos")


@contextmanager
def telling(target: Path, left: str = "nothing was left there", *, inside: Path | None = None) -> Iterator[None]:
    """Turn file system errors into a one-line `OutputError`.

    Args:
        left: describes the partial result for the message.
        inside: the folder being written, by default `target`; if it has vanished, the message says so.

    Raises:
        OutputError: in place of the original error.
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
    """Refuse a path where no file can be written.

    Raises:
        OutputError: `target` is a folder, or its parent folder is missing or not writable.
    """
    parent = target.parent
    if target.is_dir():
        raise OutputError(f"{target}: is a folder; name a file")
    if not parent.is_dir():
        raise OutputError(f"{target}: there is no folder {parent}; make it first")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{target}: the folder {parent} cannot be written to; name another")


def check_writable(target: Path, *, below: Path | None = None) -> None:
    """Refuse the folder `target` if it, or else its nearest existing parent, is not writable.

    Args:
        below: a folder that has to be writable instead of `target`.

    Raises:
        OutputError: a file is in the way, or permissions are missing.
    """
    place = Path(os.path.abspath((below or target).expanduser()))
    nearest = next(folder for folder in (place, *place.parents) if folder.exists())
    if not nearest.is_dir():
        raise OutputError(f"{target}: cannot be written: {nearest} is a file, and not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: cannot be written: the folder {nearest} is closed to you; name another")


def check_free(target: Path, *, overwrite: bool) -> None:
    """Refuse a folder that is not writable, or that exists and may not be overwritten.

    Raises:
        OutputError: the path cannot be used.
    """
    check_writable(target, below=Path(os.path.abspath(target.expanduser())).parent)
    if target.is_file():
        raise OutputError(f"{target}: is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        ours = any((target / name).is_file() for name in _RESULTS)
        if not overwrite and not ours and (target / "config.json").is_file():
            raise OutputError(f"{target}: a model that linearize did not write; name another folder for the output")
        if not overwrite:
            raise OutputError(f"{target}: exists and is not empty; pass --overwrite to replace it")
        if not ours:
            raise OutputError(f"{target}: does not look like a result of linearize; it will not be overwritten")


def _replace(staging: Path, target: Path) -> None:
    """Replace `target` by `staging`. A crash at any moment leaves the old or the new folder on disk."""
    readers = staging.stat().st_mode & 0o444  # readers by the user's umask, because safetensors makes files owner-only
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
    """Swap two folders atomically with Linux's `renameat2`; False if the system or the file system lacks it."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap is not None and swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def flush(path: Path) -> None:
    """fsync a file's content, or a folder's entries."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        # Some file systems cannot sync folders.
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(file)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _plain(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
