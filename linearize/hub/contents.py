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
"""Rows of the training data, which fine-tuning holds out for `linearize eval`."""
# Their entries are pieces of text, and may look like anything.
_VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"}
_BINARY = {".safetensors", ".bin", ".gguf", ".model", ".png", ".pt"}
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
# What is told of a checkpoint, and so may quote a command or name a file within a sentence. Other data, such as chat
# templates, are the base model's, and only a value that is a path as a whole is of some machine.
_TOLD = {".md", ".yaml", ".yml", ".jsonl", ".svg"}
_TOLD_DATA = {"linearize.json", "calibration.json", "selection.json"}


@dataclass(frozen=True)
class Finding:
    """Something that should not be shared.

    Attributes:
        file: where it is, in the folder.
        what: in words.
        secret: whether sharing it does harm that cannot be taken back.
    """

    file: str
    what: str
    secret: bool = False


def shared_files(folder: Path) -> list[str]:
    """The files of a checkpoint, relative to its folder; hidden ones are no part of it."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path.as_posix() for path in found if not any(part.startswith((".", "__pycache__")) for part in path.parts)]


def local_things(folder: Path) -> list[Finding]:
    """Files and texts in the folder that belong to this machine or its user alone."""
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
        # People write cards, and tell there of servers' addresses too: /v1/chat/completions.
        paths += [path for path in local_paths(text) if Path(name).suffix != ".md" or _starts_here(path)]
    paths += [place for place in _places() if place in text]
    if paths:
        yield Finding(name, f"names a path of this machine ({paths[0]})")


def _starts_here(path: str) -> bool:
    """True if the path's first folder exists on this machine."""
    return not path.startswith("/") or Path(*Path(path).parts[:2]).exists()


def _places() -> list[str]:
    """Folders that tell of this machine wherever they stand in a text."""
    found = {Path.home(), Path.cwd(), Path(tempfile.gettempdir())}
    return [f"{place}/" for place in sorted(found) if len(place.parts) > 1]


def _strings(name: str, text: str) -> Iterator[str]:
    """Every string that a document holds as a value; none of files that are not data."""
    try:
        match Path(name).suffix:
            case ".json":
                yield from strings(json.loads(text))
            case ".jsonl":
                for line in text.splitlines():
                    yield from strings(json.loads(line))
            case ".yaml" | ".yml":
                # Not its values: aliases in them could stand for more than there is time to look at.
                events = yaml.parse(text, Loader=yaml.SafeLoader)
                yield from (event.value for event in events if isinstance(event, yaml.ScalarEvent))
    except (ValueError, RecursionError, yaml.YAMLError):
        return
