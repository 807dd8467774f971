"""Select the files of a checkpoint's folder to share, and refuse what must stay local: training data, paths, tokens."""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from linearize.hub.paths import is_local_path, local_paths, strings

if TYPE_CHECKING:
    from collections.abc import Iterator

PRIVATE = ("held_out.safetensors",)
"""Rows of the training data that fine-tuning holds out for `linearize eval`."""
# Entries are pieces of text and can look like anything, a path included.
_VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"}
_BINARY = {".safetensors", ".bin", ".gguf", ".model", ".png", ".pt"}
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
# Files that describe a checkpoint; their sentences may contain commands or file names. Other data, such as chat
# templates, come from the base model; there only a value that is a path as a whole counts as local.
_TOLD = {".md", ".yaml", ".yml", ".jsonl", ".svg"}
_TOLD_DATA = {"linearize.json", "calibration.json", "selection.json"}


@dataclass(frozen=True)
class Finding:
    """Content that should not be shared.

    Attributes:
        file: name in the folder.
        what: a description.
        secret: True if sharing it does harm that cannot be undone.
    """

    file: str
    what: str
    secret: bool = False


def shared_files(folder: Path) -> list[str]:
    """Files of a checkpoint, relative to its folder, without hidden files."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path.as_posix() for path in found if not any(part.startswith((".", "__pycache__")) for part in path.parts)]


def local_things(folder: Path) -> list[Finding]:
    """Find files and texts in the folder that belong only to this machine or its user."""
    found = [Finding(name, "holds rows of the training data") for name in PRIVATE if (folder / name).is_file()]
    for name in shared_files(folder):
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            found.append(Finding(name, "is a link to a file elsewhere"))
            continue
        if path.suffix not in _BINARY:
            found += _in_text(name, path.read_text(encoding="utf-8", errors="replace"))
    return found


def _in_text(name: str, text: str) -> Iterator[Finding]:
    own = os.environ.get("HF_TOKEN")
    if _TOKEN.search(text) or (own and own in text):
        yield Finding(name, "holds an access token", secret=True)
    if Path(name).name in _VOCABULARIES:
        return
    paths = [value for value in _strings(name, text) if is_local_path(value)]
    if Path(name).suffix in _TOLD or Path(name).name in _TOLD_DATA:
        # Authors edit cards and may mention URLs of servers such as /v1/chat/completions.
        paths += [path for path in local_paths(text) if Path(name).suffix != ".md" or _starts_here(path)]
    paths += [place for place in _places() if place in text]
    if paths:
        yield Finding(name, f"names a path of this machine ({paths[0]})")


def _starts_here(path: str) -> bool:
    """True if the path's first folder exists on this machine."""
    return not path.startswith("/") or Path(*Path(path).parts[:2]).exists()


def _places() -> list[str]:
    """Folders that identify this machine in any text."""
    found = {Path.home(), Path.cwd(), Path(tempfile.gettempdir())}
    return [f"{place}/" for place in sorted(found) if len(place.parts) > 1]


def _strings(name: str, text: str) -> Iterator[str]:
    """Yield every string value in a data file; nothing for other files."""
    try:
        match Path(name).suffix:
            case ".json":
                yield from strings(json.loads(text))
            case ".jsonl":
                for line in text.splitlines():
                    yield from strings(json.loads(line))
            case ".yaml" | ".yml":
                # Read parse events, not values, because nested aliases can expand without bound.
                events = yaml.parse(text, Loader=yaml.SafeLoader)
                yield from (event.value for event in events if isinstance(event, yaml.ScalarEvent))
    except (ValueError, RecursionError, yaml.YAMLError):
        return
