"""Folders of the files shipped with the code (recipes, evaluation tasks), and the cache folder.

A wheel has shipped files under `linearize/_data`; a checkout (an editable install) uses the repository's own folders.
"""

from __future__ import annotations

import os
from pathlib import Path

from linearize.errors import OutputError

_PACKAGE = Path(__file__).resolve().parents[1]
_IN_CHECKOUT = {"recipes": "recipes", "tasks": "evals/tasks"}


def shipped_folder(name: str) -> Path:
    """The folder of shipped `recipes` or `tasks`."""
    packaged = _PACKAGE / "_data" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / _IN_CHECKOUT[name]


def cache_folder() -> Path:
    """The folder of cached results (`$LINEARIZE_CACHE`, else `~/.cache/linearize`).

    Raises:
        OutputError: the variable is not set, and the user has no home folder.
    """
    chosen = os.environ.get("LINEARIZE_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "linearize"
    except RuntimeError:
        raise OutputError("there is no home folder to keep results in; set HOME, or LINEARIZE_CACHE") from None
