"""The README's picture, its table of results and that of the site, from committed figures. Writes `docs/picture.svg`,
`docs/picture-narrow.svg` for phones, and the tables.

    python -m evals.picture

Memory and losses are those of `evals/slots` (counted in 16 bits), core accuracies those of `evals/smollm2`, speed is
that of `evals/speed/smollm2-cpu.json`.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.slots.presses import PRESSES
from evals.slots.systems import TEACHER
from evals.slots.telling import above, mean, read_by_all
from evals.smollm2.__main__ import core as accuracy
from linearize.evaluation.results.results import read_results
from linearize.report.formatting import readable_bytes, readable_length
from linearize.report.plots import Axis, Lines, Plot, Series

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EVALS = Path(__file__).parent
README, DOCS = EVALS.parent / "README.md", EVALS.parent / "docs"
SPEED = EVALS / "speed" / "smollm2-cpu.json"
SMOLLM2, QWEN = "slots/smollm2.json", "slots/qwen2.5-0.5b.json"
ROWS = (
    ("SmolLM2-135M: teacher", SMOLLM2, (TEACHER,)),
    ("`default`", SMOLLM2, ("default", "slots")),
    ("`small`", SMOLLM2, ("small",)),
    ("window of equal bytes", SMOLLM2, ("window",)),
    ("Qwen2.5-Coder-0.5B: `default`", QWEN, ("default", "slots")),
)
"""Title, file, and the kinds of the system in it."""
CORE = {"SmolLM2-135M: teacher": ("window-gla", "teacher"), "`default`": ("default", "model")}
"""Title -> the folder of `evals/smollm2` and the system in it with the five core accuracies."""
_LENGTH = 2048
_NEEDLES, _LOSSES = f"niah_single_2 {_LENGTH}", {"wikitext2": "WikiText-2", "book": "a book"}
_LENGTHS = (512, 2048, 8192, 32_768)


def figures(file: str) -> dict[str, Any]:
    """The figures of a file below `evals`; without any if it is not there."""
    path = EVALS / file
    found: dict[str, Any] = {"systems": {}, "values": {}}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else found


def system_in(found: Mapping[str, Any], kinds: Sequence[str]) -> str | None:
    """The system of one of some kinds with the most slots."""
    named = [name for name, one in found["systems"].items() if one["kind"] in kinds]
    return max(named, key=lambda name: found["systems"][name]["slots"], default=None)


def bytes_per_token(found: Mapping[str, Any]) -> int:
    """Bytes of a token in the teacher's cache in 16 bits: a memory's bytes by its whole tokens, to the next multiple of
    256, which both models' caches are."""
    one = next(one for one in found["systems"].values() if one["bytes"])
    return round(one["bytes"] / one["tokens"] / 256) * 256


def table() -> str:
    """Markdown: a row for each of `ROWS`."""
    losses = [f"{name}, nats" for name in _LOSSES.values()]
    heads = ["", "memory", "needles", "core accuracy, %", *losses]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for title, file, kinds in ROWS:
        found = figures(file)
        system = system_in(found, kinds)
        if system is None:
            continue
        held = found["systems"][system]["bytes"]
        size = readable_bytes(held) if held else f"{readable_bytes(2048 * bytes_per_token(found))} at 2,048 tokens"
        texts = list(found["values"].get(_NEEDLES, {}).get(system, {}).values())
        needles = f"{round(sum(texts))} of {len(texts)}" if texts else "not run"
        core = accuracy(read_results(EVALS / "smollm2" / CORE[title][0]), CORE[title][1]) if title in CORE else "–"
        cells = [title, size, needles, core, *(_loss(found, task, system) for task in _LOSSES)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def site_table() -> str:
    """Markdown of `docs/results.md`: a column for each system of SmolLM2, so that it fits a phone."""
    found = figures(SMOLLM2)
    systems = {title.split(": ")[-1]: system_in(found, kinds) for title, file, kinds in ROWS if file == SMOLLM2}
    sizes = [found["systems"][system]["bytes"] for system in systems.values()]
    rows = [["SmolLM2-135M", *systems], ["memory", *(readable_bytes(size) if size else "grows" for size in sizes)]]
    for name, column in _SITE_LOSSES.items():
        cells = [_part(found, column, system) for system in systems.values()]
        rows.append([name, *(cell.replace("-", "−") for cell in cells)])
    for name, column in _SITE_NEEDLES.items():
        texts = [list(found["values"].get(column, {}).get(system, {}).values()) for system in systems.values()]
        rows.append([name, *(f"{round(sum(one))} of {len(one)}" if one else "not run" for one in texts)])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" if row[0] != "---" else "|---" * len(row) + "|" for row in rows)


_SITE_LOSSES = {
    "WikiText-2, 2,048 tokens": "wikitext2_whole 2048",
    "a book, 2,048": "book_whole 2048",
    "a book, 4,096": "book_whole 4096",
    "a book, 8,192": "book_whole 8192",
}
_SITE_NEEDLES = {
    "needles in essays, 2,048": "niah_single_2 2048",
    "needles in essays, 4,096": "niah_single_2 4096",
    "needles in essays, 8,192": "niah_single_2 8192",
    "needles in noise, 2,048": "niah_single_1 2048",
    "needles in noise, 4,096": "niah_single_1 4096",
    "long needles, 2,048": "niah_single_3 2048",
    "long needles, 4,096": "niah_single_3 4096",
    "one of several keys, 2,048": "niah_multikey_1 2048",
    "one of several keys, 4,096": "niah_multikey_1 4096",
}


def _loss(found: Mapping[str, Any], task: str, system: str) -> str:
    """The loss of whole texts, in brackets that of their ends."""
    parts = [_part(found, f"{task}{which} {_LENGTH}", system) for which in ("_whole", "")]
    return parts[0] if parts[0] == "not run" else f"{parts[0]} ({parts[1]})".replace("-", "−")


def _part(found: Mapping[str, Any], column: str, system: str) -> str:
    """The teacher's loss, or the difference from it."""
    cell = mean(found, column, system)
    value = above(found, column, system) if system != TEACHER else cell and cell[0]
    return "not run" if value is None else f"{value:{'.4f' if system == TEACHER else '+.4f'}}"


def picture(wide: bool = False) -> str:
    """The SVG as a stand-alone file: memory, speed, and loss over memory; side by side if `wide`."""
    found = figures(SMOLLM2)
    default = system_in(found, ("default", "slots"))
    size = 0 if default is None else found["systems"][default]["bytes"]
    tokens = Axis("context (tokens)", readable_length, log=True, ticks=_LENGTHS)
    bytes_ = Axis("memory of a sequence (16 bits)", lambda value: readable_bytes(value).replace(".0 ", " "), log=True)
    memory = Lines(
        tokens,
        bytes_,
        [
            Series("teacher", [(float(n), float(n * bytes_per_token(found)), None) for n in _LENGTHS], 0),
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
        Axis("tokens written per second", lambda value: f"{value:g}", limits=(0, 42)),
        [
            Series(name, sorted((float(n), pace, None) for (own, n), pace in best.items() if own == name), look)
            for look, name in ((0, "teacher"), (3, "window-gla"))
        ],
    )
    columns = [f"{task} {_LENGTH}" for task in _LOSSES]
    shown = {
        system: one
        for system, one in found["systems"].items()
        if one["bytes"] and one["kind"] not in PRESSES and None not in [above(found, key, system) for key in columns]
    }
    points: dict[str, list[tuple[float, float, None]]] = {"default": [], "window": []}
    for system, one in shown.items():
        gaps = [above(found, key, system, read_by_all(found, key, shown)) for key in columns]
        lost = statistics.fmean(gap for gap in gaps if gap is not None)
        points["window" if one["kind"] == "window" else "default"].append((float(one["bytes"]), lost, None))
    loss = Lines(
        Axis("memory of a sequence", bytes_.write),
        Axis("nats per token above the teacher", lambda value: f"{value:.2f}"),
        [Series(name, sorted(line), look) for look, (name, line) in enumerate(points.items(), 1) if line],
    )
    title = "SmolLM2-135M: memory, speed, and loss by memory"
    words = (
        "Untrained. default: slots; window: the teacher's latest tokens alone; window-gla: window and recurrence. "
        "Speed in float32 on two cores."
    )
    return Plot("picture", title, [memory, speed, loss], words, wide).alone


_TIMED = {"teacher": "teacher", "teacher-onednn": "teacher", "model": "window-gla"}


def facts() -> list[str]:
    """The README's sentences about the default: its bytes, and the tokens of the teacher's cache in as many."""
    found = figures(SMOLLM2)
    one = found["systems"][str(system_in(found, ("default", "slots")))]
    return [f"in {readable_bytes(one['bytes'])}, where", f"below {one['tokens']} tokens"]


def main() -> None:
    (DOCS / "picture.svg").write_text(picture(wide=True), encoding="utf-8")
    (DOCS / "picture-narrow.svg").write_text(picture(), encoding="utf-8")
    for page, found in ((README, table()), (DOCS / "results.md", site_table())):
        before = page.read_text(encoding="utf-8")
        start = before.index(found.split("\n")[0])
        after = before[start:].partition("\n\n")[2]
        page.write_text(f"{before[:start]}{found}\n\n{after}", encoding="utf-8")
        print(found)


if __name__ == "__main__":
    main()
