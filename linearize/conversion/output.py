"""Results that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from linearize.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator


_RESULTS = ("config.json", "linearize.json", "report.json", "probe.json")
"""Of these every folder that linearize writes has one."""


@contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends without an error.

    It is made at once, so that a place that cannot be written is found before any work is done.

    Raises:
        OutputError: `target` exists (and `overwrite` is not set), cannot be made, or the disk is full.
    """
    target = Path(os.path.abspath(target.expanduser()))
    check_free(target, overwrite=overwrite)
    staging = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {_plain(error)}") from error
    try:
        with _told(target):
            yield staging
            _replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes the file `target` (instead of one that is there) when the block ends without
    an error.

    Raises:
        OutputError: see `check_file`; or the disk is full.
    """
    target = Path(os.path.abspath(target.expanduser()))
    check_file(target)
    staging = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        with _told(target):
            yield staging
            _flush(staging)
            staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """Turns what a disk can do wrong into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
            raise OutputError(f"{target}: cannot be written: {_plain(error)}; nothing was left there") from error
        raise
    except Exception as error:
        # safetensors reports a full disk as an error of its own.
        if "No space left" in str(error):
            raise OutputError(
                f"{target}: cannot be written: no space left on the disk; nothing was left there"
            ) from error
        raise


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


def check_free(target: Path, *, overwrite: bool) -> None:
    """Refuses a place that is taken, unless it may be overwritten."""
    if target.is_file():
        raise OutputError(f"{target}: is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise OutputError(f"{target}: exists and is not empty; pass --overwrite to replace it")
        if not any((target / name).is_file() for name in _RESULTS):
            raise OutputError(f"{target}: does not look like a result of linearize; it will not be overwritten")


def _replace(staging: Path, target: Path) -> None:
    """Puts `staging` in the place of `target`; the old one goes only when the new one is there."""
    readers = staging.stat().st_mode & 0o444  # as the user's umask has it; safetensors lets only its owner read a file
    for path in staging.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | readers)
            _flush(path)
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _plain(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
