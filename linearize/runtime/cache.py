"""`$LINEARIZE_CACHE`: its entries, its size limit, and the removal of least recently used entries.

An entry is a file (a text) or a folder of files (a teacher's logits, a model's results). Only names that linearize
generates are counted and removed, so a cache folder may hold other files. Links are not followed.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from linearize.errors import OutputError, counted
from linearize.report.formatting import readable_bytes
from linearize.runtime.claims import claimed, final_name, locked_alone, shared_lock
from linearize.runtime.folders import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LIMIT = "LINEARIZE_CACHE_LIMIT"
DEFAULT_LIMIT = 10_000_000_000
_LOCK = ".lock"
_KEY = r"[0-9a-f]{32}"


@dataclass(frozen=True)
class Kind:
    """A folder of the cache.

    Attributes:
        about: a short description of its entries.
        entry: pattern of an entry's name.
        file: pattern of file names in a folder entry; None if entries are files.
    """

    about: str
    entry: str
    file: str | None = None


KINDS = {
    "teacher-logits": Kind("most likely tokens of a teacher, for distill", _KEY, r"\d{6}\.safetensors"),
    "self-text": Kind("text that a model wrote", rf"{_KEY}\.safetensors"),
    "evaluation": Kind("results of single items", _KEY, rf"{_KEY}\.jsonl"),
    "task-names": Kind("names of lm-eval's tasks", rf"{_KEY}\.json"),
}


@dataclass
class Entry:
    """A file or folder of the cache, removed as a whole.

    Attributes:
        path: its file or folder.
        nbytes: bytes of its files, unfinished ones included.
        used: time of the last use, in seconds since 1970.
        files: the files of a folder entry.
    """

    kind: str
    path: Path
    nbytes: int = 0
    used: float = 0.0
    files: list[Path] = field(default_factory=list)

    @property
    def name(self) -> str:
        """`kind/name`, as in `linearize cache`."""
        return f"{self.kind}/{self.path.name}"


def limit() -> int:
    """The cache's size limit in bytes.

    Raises:
        OutputError: the environment variable is not a size.
    """
    text = os.environ.get(LIMIT, "").strip()
    if not text:
        return DEFAULT_LIMIT
    size = bytes_of(text)
    if size is None:
        raise OutputError(f"{LIMIT}={text}: expected a size, such as 500MB or 20GB")
    return size


def bytes_of(text: str) -> int | None:
    """Bytes of a size such as `20GB` or `20GiB`; None if `text` is not a size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kKmMgGtT])(i?))?[bB]?\s*", text)
    if match is None:
        return None
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index((match[2] or " ").lower()))


def entries() -> list[Entry]:
    """All entries, least recently used first."""
    found = [entry for kind in KINDS for entry in _entries_of(kind)]
    return sorted(found, key=lambda entry: (entry.used, entry.name))


def used(path: Path) -> None:
    """Set the entry's time of last use to now."""
    with contextlib.suppress(OSError):
        os.utime(path)


def hold(folder: Path) -> object | None:
    """Protect the entry `folder` from removal while the returned object lives; creates the folder if needed.

    Returns:
        a lock, or None if the file system has no locks or the folder is not writable.
    """
    used(folder)
    return shared_lock(folder / _LOCK)


def make_room(kept: Path, say: Callable[[str], None] = lambda _: None) -> list[Entry]:
    """Remove least recently used entries until the cache is within its limit.

    Args:
        kept: the entry just written; it stays, as do entries that a process holds or writes.
        say: receives one line if entries were removed.

    Returns:
        the removed entries.
    """
    allowed, found = limit(), entries()
    excess = sum(entry.nbytes for entry in found) - allowed
    removed = []
    for entry in found:
        if excess <= 0:
            break
        if entry.path != kept and remove(entry):
            removed.append(entry)
            excess -= entry.nbytes
    if removed:
        freed = sum(entry.nbytes for entry in removed)
        number = counted(len(removed), "least recently used entry", "least recently used entries")
        say(
            f"cache: removed {number}, {readable_bytes(freed)}, to stay within "
            f"{readable_bytes(allowed)} ({LIMIT} changes that)"
        )
    return removed


def remove(entry: Entry) -> bool:
    """Remove an entry; False if a process holds or writes it, or the file system refuses."""
    try:
        if KINDS[entry.kind].file is None:
            with claimed(entry.path):  # also removes a killed process's leftovers
                entry.path.unlink(missing_ok=True)
            return True
        with locked_alone(entry.path / _LOCK) as alone:
            if not alone:
                return False
            for path in [*entry.files, entry.path / _LOCK]:
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the folder still holds other files
                entry.path.rmdir()
    except (OSError, OutputError):
        return False
    return True


def in_use(entry: Entry) -> bool:
    """True if a process holds or writes the entry."""
    is_file = KINDS[entry.kind].file is None
    lock = entry.path.with_name(f".{entry.path.name}.lock") if is_file else entry.path / _LOCK
    if not lock.exists():
        return False
    with locked_alone(lock) as alone:
        return not alone


def named(names: Iterable[str]) -> list[Entry]:
    """Find entries by a kind, by `kind/name`, or by a unique beginning of `kind/name`.

    Raises:
        OutputError: a name matches no entry, or several.
    """
    found, chosen = entries(), dict[str, Entry]()
    for name in names:
        fitting = [entry for entry in found if name == entry.kind or entry.name.startswith(name)]
        if not name or (not fitting and name not in KINDS):
            raise OutputError(f"{name or repr(name)}: no such entry of the cache; `linearize cache ls` shows them")
        if len(fitting) > 1 and name not in KINDS:
            raise OutputError(f"{name}: {len(fitting)} entries of the cache begin so; write more of the name")
        chosen |= {entry.name: entry for entry in fitting}
    return list(chosen.values())


def _entries_of(kind: str) -> list[Entry]:
    spec, top, found = KINDS[kind], cache_folder() / kind, dict[str, Entry]()
    for item in [] if top.is_symlink() else _scan(top):
        name = final_name(top / item.name)
        if not re.fullmatch(spec.entry, name) or item.is_dir(follow_symlinks=False) != (spec.file is not None):
            continue
        entry = found.setdefault(name, Entry(kind, top / name))
        parts = [item] if spec.file is None else [part for part in _scan(Path(item.path)) if _is_ours(part, spec.file)]
        with contextlib.suppress(OSError):  # the entry was removed meanwhile
            stats = [part.stat(follow_symlinks=False) for part in parts]
            entry.nbytes += sum(stat.st_size for stat in stats)
            times = [stat.st_mtime for stat in (item.stat(follow_symlinks=False), *stats)]
            entry.used = max(entry.used, *times)
        entry.files += [Path(part.path) for part in parts if spec.file is not None]
    return list(found.values())


def _is_ours(part: os.DirEntry[str], pattern: str) -> bool:
    name = final_name(Path(part.path))
    lock = re.fullmatch(r"\.(.+)\.lock", name)
    return part.is_file(follow_symlinks=False) and re.fullmatch(pattern, lock[1] if lock else name) is not None


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []
