"""Names of models as users give them, looked for on disk. Nothing is opened, and no heavy package is imported."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import NamedTuple

from linearize.errors import ModelError


class OnDisk(NamedTuple):
    """The kind of entry that a name has on this machine; both are False for a Hub id."""

    folder: bool
    file: bool


def on_disk(reference: str) -> OnDisk:
    """Look for a model's name on disk.

    Raises:
        ModelError: it is a URL, or a path that does not exist.
    """
    if "://" in reference:
        named = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", reference)
        meant = (
            f"the model is {named[1]} there" if named else "give a Hub id such as ORG/NAME, a folder, or a .gguf file"
        )
        raise ModelError(f"{reference}: a URL, not a model; {meant}")
    path = Path(reference).expanduser()
    try:
        found = OnDisk(path.is_dir(), path.is_file())
    except OSError as error:  # the name is too long
        raise ModelError(f"{reference[:80]!r}: cannot be looked for: {error.strerror}") from None
    looks_local = reference.startswith((".", "/", "~")) or reference.count("/") > 1 or path.suffix == ".gguf"
    if not any(found) and (looks_local or (path.parent.is_dir() and "/" in reference)):
        advice = nearest(path) or "; give a Hub id, a model's folder, or a .gguf file"
        raise ModelError(f"{reference}: no such folder or file{advice}")
    return found


def nearest(path: Path) -> str:
    """A hint at the most similar name in the path's folder, which begins with a semicolon; empty if there is none."""
    parent = path.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {parent / close[0]}?" if close else ""
