"""Find absolute paths in texts, and remove their folders."""

from __future__ import annotations

import json
import re
from pathlib import PureWindowsPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

# A whole string: an absolute path with at least one folder, without characters of a sentence or a template.
_PATH = re.compile(
    r"(?:file://)?(?:~[\\/]+[^\n{}<>|*\\/]+|(?:/+|[A-Za-z]:[\\/]+)[^\n{}<>|*\\/]+[\\/]+[^\n{}<>|*\\/]+)"
    r"(?:[\\/]+[^\n{}<>|*\\/]+)*[\\/]*"
)
# A path within a text. It starts at a boundary, so owner/name, 1/2 and URLs do not match. It ends at white space, a
# quote, a bracket, or a separator of items.
_BEGIN = r"(?:(?<![\w/\\.~…%$*\])}])|(?<=\s-[A-Za-z])|(?<=^-[A-Za-z]))"
_NAME = r"(?:[^\s\\/{}<>|\"'`,;:()\[\]]|\([^\s\\/()]*\))"
_POSIX = rf"(?:{_NAME}|\\.)+"  # with escapes of a shell or of Markdown
_WITHIN = re.compile(
    r"(?<!\w)(?!file:)[A-Za-z][\w+.-]*://[^\s\"'`<>{}()\[\],;]+|(?P<path>"
    rf"{_BEGIN}(?:file://)?(?:~/+{_POSIX}|(?:(?<!:)/+|/(?!/)){_POSIX}/+{_POSIX})(?:/+{_POSIX})*/*"
    rf"|{_BEGIN}[A-Za-z]:(?:\\+|/(?!/)){_NAME}+(?:[\\/]+{_NAME}+)+[\\/]*)"
)
_QUOTED = re.compile(r"""(?<!\w)(["'`])((?:file://)?(?:/|~|[A-Za-z]:)(?:(?!\1)[^\n{}<>|*])+)\1""")


def is_local_path(text: str) -> bool:
    """True if a string is an absolute path, on this or another machine."""
    return _PATH.fullmatch(text) is not None


def local_paths(text: str) -> list[str]:
    """The absolute paths in a text; a path with spaces is found only in quotes."""
    quoted = [found[2] for found in _QUOTED.finditer(text) if is_local_path(found[2])]
    return quoted + [found["path"] for found in _WITHIN.finditer(text) if found["path"]]


def strings(value: Any) -> Iterator[str]:
    """Yield every string value in JSON data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


class Portable:
    """Replace each absolute path by its last part.

    Args:
        known: strings that may be paths with spaces; without them a text does not show where such a path ends.
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        odd = {text for text in known if is_local_path(text) and local_paths(text) != [text]}
        self.known = sorted(odd, key=len, reverse=True)

    def text(self, text: str) -> str:
        """Clean a text or a single path."""
        if is_local_path(text):
            return _last_part(text)
        for path in self.known:
            text = text.replace(path, _last_part(path))
        text = _QUOTED.sub(lambda found: _without_folders(found[2], found[1], found[0]), text)
        return _WITHIN.sub(lambda found: _last_part(found["path"]) if found["path"] else found[0], text)

    def data(self, value: Any) -> Any:
        """Clean the strings in JSON data."""
        if isinstance(value, dict):
            return {key: self.data(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.data(item) for item in value]
        return self.text(value) if isinstance(value, str) else value

    def file(self, path: Path) -> str:
        """Read and clean a text file."""
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.dumps(self.data(json.loads(text)), indent=1, ensure_ascii=False) + "\n"
        if path.suffix == ".jsonl":
            return "".join(self._line(line) for line in text.splitlines(keepends=True))
        return self.text(text)

    def _line(self, line: str) -> str:
        try:
            value = json.loads(line)
        except ValueError:  # an incomplete line
            return self.text(line)
        clean = self.data(value)
        return line if clean == value else json.dumps(clean, ensure_ascii=False) + "\n"


def _without_folders(path: str, quote: str, otherwise: str) -> str:
    return f"{quote}{_last_part(path)}{quote}" if is_local_path(path) else otherwise


def _last_part(path: str) -> str:
    return PureWindowsPath(path).name  # accepts both slashes
