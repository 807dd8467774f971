"""The colours of plots on light and dark screens, and the conversion of matplotlib's SVG for a page."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

WIDTH = 460
"""Pixels across. A phone 390 pixels wide shows a plot at 358, where text of `FONT` pixels is 11.7 pixels high."""
FONT = 15
PAPER, INK, SOFT, GRID = "#ffffff", "#1f2328", "#59636e", "#e2e6ea"
SERIES = (INK, "#d55e00", "#0072b2", "#009e73", "#b0568f", "#c98a00", "#3d9fd6", "#8c564b")
_DARK = {
    PAPER: "#0f1419", INK: "#e6edf3", SOFT: "#9aa7b4", GRID: "#2b333c", "#d55e00": "#ff8a3d", "#0072b2": "#4aa8ff",
    "#009e73": "#2ec4a0", "#b0568f": "#e39ac6", "#c98a00": "#f2c14e", "#3d9fd6": "#9bdcff", "#8c564b": "#c79a8b",
}  # fmt: skip

# The dark theme applies to screens only, because paper is white.
STYLE = (
    ".plot text{font-family:system-ui,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif!important}"
    ".plot *{stroke-linejoin:round}@media screen and (prefers-color-scheme:dark){"
    + "".join(
        f'.plot [style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in _DARK.items()
        for what in ("fill", "stroke")
    )
    + "}"
)
"""The style sheet of plots: inside a stand-alone plot, once in a page with several."""


def settings(salt: str) -> dict[Any, Any]:
    """matplotlib's settings: text is not drawn as paths, `$` starts no formula, and ids depend on `salt` only."""
    return {
        "svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False,
        "font.size": FONT, "font.sans-serif": ["DejaVu Sans"], "text.color": INK,
        "figure.facecolor": PAPER, "axes.facecolor": PAPER, "axes.edgecolor": SOFT, "axes.labelcolor": SOFT,
        "axes.titlecolor": SOFT, "axes.titlesize": FONT, "axes.titlelocation": "left", "axes.titlepad": 9,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "grid.color": GRID,
        "xtick.color": SOFT, "ytick.color": SOFT, "ytick.major.size": 0, "image.cmap": "cividis", "image.lut": 32,
        "axes.axisbelow": True, "legend.frameon": False, "legend.borderpad": 0.1, "legend.borderaxespad": 0,
        "legend.columnspacing": 1, "lines.linewidth": 2, "lines.markersize": 6.5, "lines.markeredgewidth": 1.8,
    }  # fmt: skip


def element(
    svg: str,
    name: str,
    title: str,
    words: Sequence[str],
    titles: Mapping[str, Sequence[str]],
    size: tuple[float, float],
) -> str:
    """matplotlib's document as an `<svg>` for a page, with a title, a description, and ids unique to this plot.

    Args:
        words: sentences of the description.
        titles: group id -> one title of the group, or one for each path in it.
        size: the plot's width and height in pixels.
    """
    width, height = size
    # Drop matplotlib's style sheet, because it would apply to the whole page.
    body = "\n".join(map(clean, svg[svg.index("</defs>") + len("</defs>") :].strip().split("\n")))
    for group, texts in titles.items():
        start = body.index(">", body.index(f'<g id="{group}"')) + 1
        end = body.index("</g>", start)
        told = [f"<title>{escape(text)}</title>" for text in texts]
        paths = zip(body[start:end].split("/>"), told, strict=False)
        inner = told[0] + body[start:end] if len(told) == 1 else "".join(f"{path}>{one}</path>" for path, one in paths)
        body = body[:start] + inner + body[end:]
    body = re.sub(r">\s+<", "><", body)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', body))
    body = re.sub(r"<[^>]+>", lambda tag: _tag(tag[0], name, used), body)
    described = f"<desc>{escape(' '.join(words))}</desc>" if words else ""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" class="plot" '
        f'viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>{described}{body}'
    )


def clean(text: str) -> str:
    """Text without control characters."""
    return "".join(character for character in text if character.isprintable())


def escape(text: str) -> str:
    """Text without control characters, escaped for XML."""
    return html.escape(clean(text))


def _tag(tag: str, name: str, used: Container[str]) -> str:
    """A tag with ids prefixed by the plot's name, without unused ids, and with two decimals."""
    tag = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", tag)
    tag = re.sub(r'(url\(|href=")#', rf"\1#{name}-", tag)
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag)
    return re.sub(r"(\.\d\d)\d+", r"\1", tag)
