"""The README's first figure, from measured results: memory and tokens per second by context length, for teacher and
converted model. Writes `docs/speed.svg`.

    python -m evals.speed.figure                 # from smollm2-cpu.json
    python -m evals.speed.figure FIGURES.json    # from another run of evals.speed, evals.speed.gpu or linearize bench
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from linearize.benchmark.page import overview

FIGURES = Path(__file__).parent / "smollm2-cpu.json"
TARGET = Path(__file__).parents[2] / "docs" / "speed.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("figures", nargs="?", type=Path, default=FIGURES, help="JSON with the rows of linearize bench")
    arguments = parser.parse_args()
    TARGET.write_text(figure(arguments.figures), encoding="utf-8")


def figure(figures: Path = FIGURES) -> str:
    """The SVG as a stand-alone file."""
    drawn = overview(json.loads(figures.read_text(encoding="utf-8")))
    if drawn is None:
        raise SystemExit(f"{figures}: has no two context lengths to draw")
    return drawn.alone


if __name__ == "__main__":
    main()
