"""Slots beside what people use to cut a cache: `python -m evals.slots MODEL --data DATA --work DIR` measures a recipe
of ours at several sizes, a window and kvpress's presses at the same bytes, and the pretrained model.

Every text's result is kept in the figures' file as it comes, so a run may be ended and goes on where it was; `--tasks`,
`--systems`, `--slots`, `--lengths` and `--limit` choose a piece. Converted models lie in `--work` and are made once.
`--table` and `--plots` tell the figures that are there, of the chosen tasks, lengths and systems.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from pathlib import Path
from typing import Any

from evals.recurrences.toy import write
from evals.slots.presses import PRESSES, Presses
from evals.slots.systems import Ours, System, ablations_of, ask, load, score, systems_of
from evals.slots.telling import chosen, plots, table
from evals.slots.texts import READING, TASKS, texts_of
from linearize.sources.source import find_source, load_tokenizer

FIGURES = Path(__file__).with_name("figures.json")
SLOTS = (128, 256, 512, 1024)
LENGTHS = (2048, 4096, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.slots", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, nargs="?", help="the folder of the pretrained model")
    parser.add_argument("--data", type=Path, help="the folder of the evaluation tasks' files")
    parser.add_argument("--work", type=Path, help="where converted models go")
    parser.add_argument("--recipe", default="default", help="ours (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="laid over the recipe")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of %(default)s")
    parser.add_argument("--systems", default="*", help="patterns of names such as SnapKV@*, separated by commas")
    parser.add_argument("--ablations", action="store_true", help="measure ours without one ingredient each, instead")
    parser.add_argument("--slots", default=",".join(map(str, SLOTS)), help="landmarks (default: %(default)s)")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=10, help="texts of each task and length (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of weights and products (default: %(default)s)")
    parser.add_argument("--kvpress", help="the Python of an environment that has kvpress; without it no press is run")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no text after so many")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="where the figures go (default: beside this)")
    parser.add_argument("--table", action="store_true", help="print the table of the figures that are there")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the plots of the figures that are there")
    arguments = parser.parse_args()
    if not arguments.table and not arguments.plots:
        if arguments.model is None or arguments.data is None or arguments.work is None:
            parser.error("name the model's folder, --data and --work; or --table, or --plots DIR")
        measure(arguments)
    figures = chosen(
        json.loads(arguments.figures.read_text(encoding="utf-8")),
        arguments.tasks.split(","),
        [int(one) for one in arguments.lengths.split(",")],
        arguments.systems.split(","),
    )
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        for plot in plots(figures):
            (arguments.plots / f"{plot.name}.svg").write_text(plot.alone, encoding="utf-8")
    print(table(figures))


def measure(arguments: argparse.Namespace) -> None:
    """Score the chosen systems on the chosen texts; texts in the figures' file are not scored again."""
    ends = time.monotonic() + 60 * arguments.minutes
    ours = Ours(arguments.recipe, tuple(arguments.set))
    slots, lengths = ([int(one) for one in given.split(",")] for given in (arguments.slots, arguments.lengths))
    patterns = arguments.systems.split(",")
    if arguments.ablations:
        every = [system for count in slots for system in ablations_of(arguments.model, ours, count)]
    else:
        every = systems_of(arguments.model, ours, slots)
    measured = [system for system in every if any(fnmatch.fnmatchcase(system.name, pattern) for pattern in patterns)]
    tokenizer = load_tokenizer(find_source(str(arguments.model)))
    texts = {
        f"{task} {length}": texts_of(tokenizer, task, length, arguments.limit, arguments.data)
        for length in lengths
        for task in arguments.tasks.split(",")
    }
    figures = _figures(arguments)
    for system in measured:
        press = system.kind in PRESSES
        if press and not arguments.kvpress:
            _say(f"{system.name}: not run, because --kvpress is not given")
            continue
        known = {"kind": system.kind, "slots": system.slots, "bytes": system.nbytes, "tokens": system.tokens}
        figures["systems"][system.name] = known
        _run(system, texts, figures, arguments, tokenizer, ends)
        if time.monotonic() > ends:
            break


def _run(
    system: System,
    texts: dict[str, list[Any]],
    figures: dict[str, Any],
    arguments: argparse.Namespace,
    tokenizer: Any,
    ends: float,
) -> None:
    """Score one system; the model is loaded only if a text is not scored yet."""
    model, presses = None, Presses(arguments.kvpress or "", arguments.model, arguments.dtype)
    try:
        for column, items in texts.items():
            task, length = column.split()
            reads = task in READING and system.kind not in PRESSES
            values, whole = (
                figures["values"].setdefault(name, {}).setdefault(system.name, {}) if kept else {}
                for name, kept in ((column, True), (f"{task}_whole {length}", reads))
            )
            for text in items:
                if (text.key in values and (text.key in whole or not reads)) or time.monotonic() > ends:
                    continue
                try:
                    if system.kind in PRESSES:
                        value = ask(presses, tokenizer, system, text)
                    else:
                        if model is None:
                            model = load(system, arguments.model, arguments.work, arguments.dtype, _say)
                        value = score(model, tokenizer, text)
                except RuntimeError as error:
                    # One press that cannot read this model or length leaves the others.
                    figures["failed"][f"{system.name}, {column}"] = str(error)
                    _say(f"{system.name}, {column}: {error}")
                    break
                values[text.key] = round(value.value, 6)
                if value.whole is not None:
                    whole[text.key] = round(value.whole, 6)
                write(arguments.figures, figures)
            if values:
                _say(f"{system.name}, {column}: {sum(values.values()) / len(values):.4f} of {len(values)}")
    finally:
        presses.close()


def _figures(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures that are there, or none.

    Raises:
        SystemExit: they are of another model or dtype.
    """
    about = {"model": arguments.model.resolve().name, "dtype": arguments.dtype}
    if not arguments.figures.is_file():
        return {**about, "systems": {}, "values": {}, "failed": {}}
    found: dict[str, Any] = json.loads(arguments.figures.read_text(encoding="utf-8"))
    if {name: found[name] for name in about} != about:
        raise SystemExit(f"{arguments.figures}: has the figures of {found['model']} in {found['dtype']}; name another")
    return found


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
