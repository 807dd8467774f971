"""Fuzzers of the file readers: `python -m evals.fuzz` reads many mutated files, `--table` prints the results.

A crash is any exception but a one-line error, or the acceptance of an invalid file. A hang is a file that takes more
than two seconds of CPU time. A leak is a file descriptor or a file that stays, or memory that keeps growing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hypothesis import HealthCheck, Phase, given, seed, settings

from evals.fuzz.mutation import mutated
from evals.fuzz.readers import Reader, readers
from linearize.runtime.memory import resident_bytes

if TYPE_CHECKING:
    from types import FrameType

FIGURES = Path(__file__).parent / "fuzz.json"
SECONDS = 2.0
BYTES = 50_000_000
ROUND = 1_000


class Hung(BaseException):
    """A file took too long. A BaseException, because handlers of the reader must not catch it."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=30_000, help="files to try on each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", help="only this one; figures of others stay")
    parser.add_argument("--table", action="store_true", help="print the table of the figures that are here")
    arguments = parser.parse_args()
    if not arguments.table:
        rows = []
        for name, reader in readers().items():
            if arguments.reader not in (None, name):
                rows += [row for row in json.loads(FIGURES.read_text())["rows"] if row["reader"] == name]
                continue
            rows.append({"reader": name, **fuzz(reader, arguments.inputs, arguments.seed)})
            print(row_of(rows[-1]), flush=True)
        FIGURES.write_text(json.dumps({"seed": arguments.seed, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table())
    if any(row["crashes"] or row["hangs"] or row["leaks"] for row in json.loads(FIGURES.read_text())["rows"]):
        raise SystemExit(1)


def fuzz(reader: Reader, inputs: int, number: int = 0) -> dict[str, Any]:
    """Read `inputs` files with a reader and count the failures."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    sizes: list[int] = []
    started = time.process_time()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        reader.takes(folder, reader.seeds[0])  # warm-up: imports and caches
        gc.collect()
        gc.freeze()  # exclude existing objects from later collections
        descriptors = _descriptors()

        def attempt(content: bytes) -> None:
            counts["inputs"] += 1
            try:
                with _alarm():
                    counts["taken"] += reader.takes(folder, content)
            except Hung:
                counts["hangs"] += 1
                wrong.append(f"hang: {content[:200]!r}")
            except Exception as error:
                counts["crashes"] += 1
                wrong.append(f"{type(error).__name__}: {error}: {content[:200]!r}")

        made_of = mutated(reader.seeds)
        try:
            # hypothesis stores what it tried, so memory is measured between rounds.
            for begun in range(0, inputs, ROUND):
                options = settings(
                    max_examples=min(ROUND, inputs - begun), deadline=None, database=None, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )  # fmt: skip
                seed(number + begun)(options(given(made_of)(attempt)))()
                gc.collect()
                sizes.append(resident_bytes())
        finally:
            gc.unfreeze()
        leaks = len(list(folder.iterdir())) + max(0, _descriptors() - descriptors)
    # The first quarter may fill caches; after that memory must stay constant.
    grown = max(0, sizes[-1] - sizes[len(sizes) // 4]) if sizes else 0
    return {
        "inputs": counts["inputs"],
        "taken": counts["taken"],
        "crashes": counts["crashes"],
        "hangs": counts["hangs"],
        "leaks": leaks + (grown > BYTES),
        "grown_bytes": grown,
        "seconds": round(time.process_time() - started, 1),
        "wrong": wrong[:10],
    }


class _alarm:
    """Raises `Hung` in the block after a limit of CPU time."""

    def __enter__(self) -> None:
        def ring(_: int, __: FrameType | None) -> NoReturn:
            raise Hung

        self.before = signal.signal(signal.SIGVTALRM, ring)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, self.before)


def _descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def table() -> str:
    """The figures as Markdown."""
    rows = json.loads(FIGURES.read_text(encoding="utf-8"))["rows"]
    lines = ["| reader | inputs tried | taken as sound | crashes | hangs | leaks |", "|---|---:|---:|---:|---:|---:|"]
    return "\n".join([*lines, *map(row_of, rows)])


def row_of(row: dict[str, Any]) -> str:
    counts = (f"{row[name]:,}" for name in ("inputs", "taken", "crashes", "hangs", "leaks"))
    return f"| {row['reader']} | {' | '.join(counts)} |"


if __name__ == "__main__":
    main()
