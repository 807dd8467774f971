"""The README's picture and its table of results, from committed figures. Writes `docs/picture.svg`, prints the table.

    python -m evals.picture

Memory and losses are those of `evals/slots` (counted in 16 bits), speed is that of `evals/speed/smollm2-cpu.json`.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.slots.systems import TEACHER
from evals.slots.telling import mean
from linearize.report.formatting import readable_bytes, readable_length
from linearize.report.plots import Axis, Lines, Plot, Series

if TYPE_CHECKING:
    from collections.abc import Mapping

EVALS = Path(__file__).parent
TARGET = EVALS.parent / "docs" / "picture.svg"
SPEED = EVALS / "speed" / "smollm2-cpu.json"
INT8, INT4, QWEN = (f"slots/{name}.json" for name in ("smollm2", "smollm2-int4", "qwen2.5-0.5b"))
ROWS = (
    ("SmolLM2-135M: the teacher", INT4, TEACHER),
    ("`default`", INT8, "slots"),
    ("`default` in int4", INT4, "slots"),
    ("window of as many bytes", INT8, "window"),
    ("window of as many bytes as int4", INT4, "window"),
    ("Qwen2.5-Coder-0.5B: `default`", QWEN, "slots"),
)
"""Name, file, and the start of the system's name in it."""
_NEEDLES, _LOSSES = "niah_single_2 2048", {"wikitext2 2048": "WikiText-2", "book 2048": "a book"}
_LENGTHS = (512, 2048, 8192, 32_768)


def figures(file: str) -> dict[str, Any]:
    """The figures of a file below `evals`."""
    found: dict[str, Any] = json.loads((EVALS / file).read_text(encoding="utf-8"))
    return found


def system_in(found: Mapping[str, Any], kind: str) -> str | None:
    """The first system whose name begins with `kind`."""
    return next((name for name in found["systems"] if name.startswith(kind)), None)


def bytes_per_token() -> int:
    """Bytes of a token in SmolLM2's cache in 16 bits, from the cache that was measured in 32."""
    row = next(
        row
        for row in figures("speed/smollm2-cpu.json")["rows"]
        if row["system"] == "teacher" and row["kind"] == "decode"
    )
    return round(row["cache_bytes"] / row["tokens"]) // 2


def above(found: Mapping[str, Any], column: str, system: str) -> float | None:
    """Loss above the teacher's in nats per token, which `smollm2-int4.json` has for SmolLM2; None if not run."""
    own, teacher = mean(found, column, system), mean(figures(INT4), column, TEACHER)
    return own[0] - teacher[0] if own and teacher and found["model"] == figures(INT4)["model"] else None


def table() -> str:
    """Markdown: a row for each of `ROWS`."""
    heads = ["", "memory of a sequence", "needles found", *(f"{name}, nats" for name in _LOSSES.values())]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for title, file, kind in ROWS:
        found = figures(file)
        system = system_in(found, kind)
        if system is None:
            continue
        held = found["systems"][system]["bytes"]
        size = readable_bytes(held) if held else f"{readable_bytes(2048 * bytes_per_token())} at 2,048 tokens"
        texts = list(found["values"].get(_NEEDLES, {}).get(system, {}).values())
        needles = f"{round(sum(texts))} of {len(texts)}" if texts else "not run"
        losses = [_loss(found, column, system) for column in _LOSSES]
        lines.append(f"| {' | '.join([title, size, needles, *losses])} |")
    return "\n".join(lines)


def _loss(found: Mapping[str, Any], column: str, system: str) -> str:
    if system == TEACHER:
        cell = mean(found, column, system)
        return f"{cell[0]:.4f}" if cell else "not run"
    gap = above(found, column, system)
    return "not run" if gap is None else f"{gap:+.4f}".replace("-", "−")


def picture() -> str:
    """The SVG as a stand-alone file: memory, speed, and loss over memory."""
    default = figures(INT8)
    size = default["systems"][system_in(default, "slots")]["bytes"]
    tokens = Axis("context (tokens)", readable_length, log=True, ticks=_LENGTHS)
    bytes_ = Axis("memory of a sequence (16 bits)", lambda value: readable_bytes(value).replace(".0 ", " "), log=True)
    memory = Lines(
        tokens,
        bytes_,
        [
            Series("teacher", [(float(n), float(n * bytes_per_token()), None) for n in _LENGTHS], 0),
            Series("default", [(float(n), float(size), None) for n in _LENGTHS], 1),
        ],
    )
    rows = json.loads(SPEED.read_text(encoding="utf-8"))["rows"]
    best: dict[tuple[str, int], float] = {}
    for row in rows:
        if row["kind"] == "decode" and (name := _TIMED.get(row["system"])) is not None:
            key = name, row["tokens"]
            best[key] = max(best.get(key, 0.0), row["tokens_per_second"])
    speed = Lines(
        tokens,
        Axis("tokens written per second (float32, 2 cores)", lambda value: f"{value:g}", limits=(0, 42)),
        [
            Series(name, sorted((float(n), pace, None) for (own, n), pace in best.items() if own == name), look)
            for look, name in ((0, "teacher"), (3, "window-gla"))
        ],
    )
    points: dict[str, list[tuple[float, float, None]]] = {"default": [], "window": []}
    for file in (INT8, INT4):
        found = figures(file)
        for kind, name in (("slots", "default"), ("window", "window")):
            system = system_in(found, kind)
            gaps = [] if system is None else [above(found, column, system) for column in _LOSSES]
            if system is not None and gaps and None not in gaps:
                lost = statistics.fmean(gap for gap in gaps if gap is not None)
                points[name].append((float(found["systems"][system]["bytes"]), lost, None))
    sizes = sorted(x for line in points.values() for x, _, _ in line)
    loss = Lines(
        Axis("memory of a sequence", bytes_.write, ticks=sizes),
        Axis("loss of text above the teacher's (nats per token)", lambda value: f"{value:.2f}", limits=(0, 0.06)),
        [Series(name, sorted(line), look) for look, (name, line) in enumerate(points.items(), 1) if line],
    )
    title = "SmolLM2-135M: memory, speed, and loss by memory"
    words = "default and window: untrained, in int8 and (the smaller) slots in int4; window-gla: window and recurrence"
    return Plot("picture", title, [memory, speed, loss], words).alone


_TIMED = {"teacher": "teacher", "teacher-onednn": "teacher", "model": "window-gla"}


def main() -> None:
    TARGET.write_text(picture(), encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
