"""For the site: what pages link to beside them in the repository is named there, since the site does not have it."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`[text](../path)` as text with the path."""
    return _OUTSIDE.sub(lambda found: _named(found[1], found[2]), markdown)


def _named(text: str, path: str) -> str:
    plain = text.strip("`")
    return f"`{path}`" if path.startswith(plain) or path.endswith(plain) else f"{text} in `{path}`"
