"""The subset of YAML that recipes use, parsed into plain values with their line numbers.

Narrower than YAML 1.1: one document, no tags, anchors or aliases, no duplicate keys; `yes` and `12:30` are text.
Wider in one place: `1e-3` is a number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

if TYPE_CHECKING:
    from collections.abc import Callable

Path = tuple[str | int, ...]
"""Path of a value: keys and list indices from the top of the document."""

_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]{1,4})?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]{1,4})?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]{1,4}|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
# (type, pattern, possible first characters). At most 100 digits, because Python limits the length of ints it parses.
_PLAIN_SCALARS: tuple[tuple[str, re.Pattern[str], list[str]], ...] = (
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9][0-9_]{0,99}$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
)
_TAG = "tag:yaml.org,2002:"


def _number(text: str) -> str:
    text = text.replace("_", "")
    return text.replace(".", "", 1) if text.lower().lstrip("+-") in (".inf", ".nan") else text


_VALUES: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(_number(text)),
    "float": lambda text: float(_number(text)),
    "str": str,
}


class DocumentError(Exception):
    """The text is not in the subset. `line` counts from 1; None if there is no line to name."""

    def __init__(self, message: str, line: int | None) -> None:
        super().__init__(message)
        self.line = line


@dataclass
class Document:
    """A parsed document: its value, and the line (from 1) of every key and list item."""

    value: Any
    lines: dict[Path, int] = field(default_factory=dict)


class _Resolver(BaseResolver):
    pass


class _Loader(Reader, Scanner, Parser, Composer, _Resolver):
    """PyYAML's pure-Python front end without its constructors, so no tag can build an object."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver.__init__(self)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if getattr(event, "anchor", None) is not None:
            raise DocumentError("anchors and aliases are not allowed in a recipe; write the value out", line)
        if getattr(event, "tag", None) is not None:
            raise DocumentError("tags (!...) are not allowed in a recipe; write a plain value", line)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes any text that this reader or a YAML 1.1 reader would parse as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Single quotes fold line breaks, and PyYAML treats U+0085 and similar as one: escape unprintable characters.
    return dumper.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
for _name, _pattern, _first in _PLAIN_SCALARS:
    _Resolver.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


def parse_document(text: str) -> Document:
    """Parse one document.

    Raises:
        DocumentError: with a one-line message.
    """
    try:
        node = _Loader(text).get_single_node()
        document = Document(None)
        if node is not None:
            document.value = _build(node, (), document.lines)
        return document
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise DocumentError("a control character is not allowed in a recipe; save it as plain text", line) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise DocumentError(f"not valid YAML: {problem}", mark.line + 1 if mark else None) from None
    except RecursionError:
        raise DocumentError("nested too deeply", None) from None


def _build(node: yaml.Node, path: Path, lines: dict[Path, int]) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        built: dict[str | int, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = _build(key_node, (*path, "?"), {})
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise DocumentError("a key must be plain text", line)
            if key in built:
                first = lines[(*path, key)]
                raise DocumentError(f"{key}: key given twice (first on line {first}); remove one", line)
            # The key's own line, not the value's, because an editor should jump to the key.
            lines[(*path, key)] = line
            built[key] = _build(value_node, (*path, key), lines)
        return built
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, index), lines) for index, item in enumerate(node.value)]
    return _VALUES[node.tag.removeprefix(_TAG)](node.value)


def write_document(value: Any) -> str:
    """YAML text of plain values; `parse_document` reads the same values back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=10_000)
