"""Recovery on a teacher so small that two cores reach 20 million tokens: a model of 0.66M weights and its own stories.

    python -m evals.recovery.stories DIR --teacher FOLDER                   budgets 0 and 0.2M with three seeds, and 2M
    python -m evals.recovery.stories DIR --teacher FOLDER --budgets 20M --systems liger,gla,control

The teacher (raincandy-u/TinyStories-656K: two layers, context 512) writes all text. A window of 16 tokens makes it
need a memory. Every system has the same text, tokens, rows and seed, LoRA of rank 8, and steps of 4,096 tokens. Each is
scored on held-out stories beside the teacher, the window of equal bytes, and itself without its recurrence:

    loss, kl   mean over tokens with at least `FAR` tokens before them: what no window here covers
    recalled   loss on rare tokens whose last occurrence in the story is at least `FAR` tokens back
    name       share of stories in which the name from the first sentence is the most likely next token when somebody
               is thanked at the end

A finished cell is skipped, so the same command continues an interrupted run.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from evals.recovery.__main__ import tokens_of
from evals.recovery.telling import token_axis
from evals.recurrences.toy import surroundings, write
from linearize.conversion.swap import window_baseline
from linearize.data.selftext import self_written_documents
from linearize.evaluation.baselines import equal_bytes, memory_bytes, silence
from linearize.evaluation.tasks.task import mean_and_error
from linearize.jobs.convert import convert
from linearize.jobs.finetune import finetune
from linearize.recipe import load_recipe
from linearize.report.plots import Axis, Lines, Plot, Series
from linearize.runtime.files import staged_file
from linearize.sources.source import find_source, load_model, load_tokenizer
from linearize.training.workfolder import is_resumable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).parent / "systems"
WINDOW, LENGTH, FAR = 16, 512, 64
BUCKETS = (0, 16, 32, 64, 128, 256, LENGTH)
_ROWS = 16
_FREQUENT = 256
"""The most frequent tokens of the text are not asked to be recalled."""
_QUESTION = ' Her mom smiled and said, "Thank you,'
_NAME = re.compile(r"\bnamed ([A-Z][a-z]+)\b")

# System -> the recipe that it is based on, and its changes.
_DISTILLED = [f"{HERE / 'ours.yaml'}", f"mixer.window={WINDOW}"]
SYSTEMS: dict[str, list[str]] = {
    "liger": [f"{HERE / 'liger.yaml'}", f"mixer.window={WINDOW}"],
    "lolcats": [f"{HERE / 'lolcats.yaml'}", f"mixer.window={WINDOW}"],
    "window": [*_DISTILLED, "mixer.recurrence=none"],
    # In the bytes of the recurrences below, and trained as they are.
    "wide": [*_DISTILLED, "mixer.recurrence=none", f"mixer.window={2 * WINDOW}"],
    "gla": _DISTILLED,
    "hgrn2": [*_DISTILLED, "mixer.recurrence=hgrn2"],
    "gated_deltanet": [*_DISTILLED, "mixer.recurrence=gated_deltanet", "mixer.feature_map=identity"],
    # The gates that the pretrained keys give, not trained.
    "gated_deltanet_fixed": [
        *_DISTILLED,
        "mixer.recurrence=gated_deltanet",
        "mixer.feature_map=identity",
        "mixer.gate.learned=false",
    ],
    "kda": [*_DISTILLED, "mixer.recurrence=kda", "mixer.feature_map=identity"],
    "slots": [*_DISTILLED, "mixer.recurrence=none", "mixer.landmarks=16"],
    # The bytes of a state as more slots.
    "slots_wide": [*_DISTILLED, "mixer.recurrence=none", "mixer.landmarks=23"],
    "slots_gla": [*_DISTILLED, "mixer.landmarks=16", "mixer.rope=true", "mixer.mix=softmax"],
    "slots_gated_deltanet": [
        *_DISTILLED,
        "mixer.landmarks=16",
        "mixer.rope=true",
        "mixer.recurrence=gated_deltanet",
        "mixer.feature_map=identity",
    ],
    # A window over everything is the teacher: what the training text and LoRA alone do to it.
    "control": [f"{HERE / 'liger.yaml'}", "mixer.recurrence=none", f"mixer.window={LENGTH}"],
}

# Those in the bytes of `wide`.
WITH_STATE = ("gla", "hgrn2", "gated_deltanet", "kda")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.recovery.stories", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="where everything is kept")
    parser.add_argument("--teacher", required=True, help="the folder of TinyStories-656K")
    parser.add_argument("--budgets", default="0,0.2M,2M", help="training tokens, such as 0.2M")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of budgets up to 0.2M; larger ones have one")
    parser.add_argument("--text", type=float, default=4e6, help="different training tokens; larger budgets repeat them")
    parser.add_argument("--stories", type=int, default=200, help="held-out stories")
    given = parser.parse_args(arguments)
    unknown = set(given.systems.split(",")) - set(SYSTEMS)
    if unknown:
        parser.error(f"no system {', '.join(sorted(unknown))}: known are {', '.join(SYSTEMS)}")
    study = Study(given.folder.resolve(), given.teacher, round(given.text), given.stories)
    for budget in given.budgets.split(","):
        for system in given.systems.split(","):
            for seed in range(given.seeds if 0 < tokens_of(budget) <= 200_000 else 1):
                study.cell(system, budget, seed)
    study.tell()


class Study:
    """The folder of the study: text, checkpoints, a JSON file for each cell, and the tables.

    Args:
        text: the number of different training tokens.
        stories: the number of held-out stories.
    """

    def __init__(self, folder: Path, teacher: str, text: int, stories: int) -> None:
        self.folder, self.source = folder, find_source(teacher)
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.source)
        self.teacher: PreTrainedModel = load_model(self.source).eval()
        documents = self_written_documents(
            self.teacher, self.tokenizer, tokens=text, seed=0, batch_size=256, progress=_say
        )
        self.text = folder / f"text-{text}.jsonl"
        # The longest of the last documents are held out; they are not trained on.
        tail = max(8 * stories, 1)
        long = [ids for ids in documents[-tail:] if len(ids) >= 2 * FAR + FAR // 2]
        self.held_out = [torch.tensor(ids) for ids in long[:stories]]
        if not self.text.is_file():
            lines = (json.dumps({"text": self.tokenizer.decode(ids[1:-1])}) for ids in documents[:-tail])
            with staged_file(self.text) as staging:
                staging.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.tokens = sum(len(ids) for ids in documents[:-tail])
        counts = Counter(token for ids in documents[:-tail] for token in ids)
        self.frequent = torch.tensor([token for token, _ in counts.most_common(_FREQUENT)])
        self.recalled = [_recalled(ids, self.frequent) for ids in self.held_out]
        self.questions = list(self._questions())
        self.expected = list(self._logits(self.teacher, self.held_out))

    def _questions(self) -> Iterator[tuple[Tensor, int]]:
        """The prompts of held-out stories that name somebody, and the first token of the name."""
        for ids in self.held_out:
            text = self.tokenizer.decode(ids[1:])
            found = _NAME.search(text)
            if found is None:
                continue
            # The name's later occurrences are replaced, so that only the first one tells.
            cut = self.tokenizer.decode(ids[1 : 2 * FAR + 1])
            head, rest = cut[: found.end()], cut[found.end() :]
            asked = head + re.sub(rf"\b{found[1]}\b", "the friend", rest).rstrip() + _QUESTION
            # A token may hold a space or two words: the prompt is what two continuations have in common.
            named, other = (
                self.tokenizer(f"{asked} {name}.", add_special_tokens=False)["input_ids"] for name in (found[1], "Qz")
            )
            place = next((at for at, (a, b) in enumerate(zip(named, other, strict=False)) if a != b), 0)
            if found.end() < len(cut) and place:
                yield torch.tensor([int(ids[0]), *named[:place]]), named[place]

    def cell(self, system: str, budget: str, seed: int) -> None:
        """Train and score one system."""
        name = f"{system}-{budget}-{seed}"
        path = self.folder / "cells" / f"{name}.json"
        if path.is_file():
            return
        _say(f"{name}: starts")
        target, tokens = self.folder / name, tokens_of(budget)
        base, *changes = SYSTEMS[system]
        recipe = load_recipe(
            base, [f"model={self.source.reference}", f"seed={seed}", *changes, *self._stages(base, tokens)]
        )
        if not target.is_dir():
            if tokens:
                finetune(recipe, target, resume=is_resumable(target, recipe), say=_say)
            else:
                convert(str(self.source.reference), target, recipe=recipe, say=_say)
        model = load_model(find_source(str(target))).eval()
        found: dict[str, Any] = {"system": system, "budget": tokens, "seed": seed}
        found |= {
            "bytes": sum(
                constant for constant, _ in memory_bytes(self.teacher.config, model.config.mixers, torch.float32)
            )
        }
        found["scores"] = {"model": self.score(model)}
        if seed == 0:
            config = self.teacher.config
            # The swap changes the model that it is given.
            wide = window_baseline(load_model(self.source), equal_bytes(config, model.config.mixers, torch.float32))
            found["scores"]["window_bytes"] = self.score(wide)
            found["scores"]["no_recurrence"] = self.score(silence(model, ["recurrence"]))
        write(path, found)

    def _stages(self, base: str, tokens: int) -> list[str]:
        """The settings that give each stage its share of the budget; a text that is shorter is read several times."""
        stages = load_recipe(base).stages
        shares = [(stage.data.tokens or 0) * stage.epochs for stage in stages]
        settings = []
        for number, (stage, share) in enumerate(zip(stages, shares, strict=True)):
            mine = max(tokens * share / sum(shares), LENGTH)
            epochs = max(stage.epochs, math.ceil(mine / self.tokens))
            data = {"source": str(self.text), "tokens": max(round(mine / epochs), 4 * LENGTH), "held_out": 4}
            place = f"stages.{number}"
            settings.append(f"{place}.epochs={epochs}")
            settings += [f"{place}.data={json.dumps(data)}", f"{place}.length={LENGTH}", f"{place}.batch_tokens=4096"]
            settings += [f"{place}.micro_batch=8"]
        return settings

    @torch.no_grad()
    def _logits(self, model: PreTrainedModel, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """The logits of each row, `[T, V]`; rows are read `_ROWS` at a time, padded on the right."""
        for first in range(0, len(rows), _ROWS):
            some = rows[first : first + _ROWS]
            ids = pad_sequence(list(some), batch_first=True)
            mask = pad_sequence([torch.ones_like(row) for row in some], batch_first=True)
            for row, logits in zip(some, model(ids, attention_mask=mask, use_cache=False).logits, strict=True):
                yield logits[: len(row)]

    def score(self, model: PreTrainedModel) -> dict[str, Any]:
        """The figures of a model: means over tokens, with their standard errors over stories."""
        items, rows = self.items(model)
        buckets = {}
        for first, end in itertools.pairwise(BUCKETS):
            values = torch.cat([row[first:end] for row in rows])
            if len(values):
                buckets[str(first)] = round(float(values.mean()), 5)
        return {**{figure: mean_and_error(values) for figure, values in items.items()}, "loss_by_position": buckets}

    def items(self, model: PreTrainedModel) -> tuple[dict[str, list[float]], list[Tensor]]:
        """The values that each figure of `FIGURES` averages, and the losses `[T - 1]` of each story."""
        items: dict[str, list[float]] = {figure: [] for figure in FIGURES}
        rows: list[Tensor] = []
        read = self._logits(model, self.held_out)
        for ids, wanted, asked, logits in zip(self.held_out, self.expected, self.recalled, read, strict=True):
            loss = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
            kl = F.kl_div(logits[:-1].log_softmax(-1), wanted[:-1].log_softmax(-1), reduction="none", log_target=True)
            rows.append(loss)
            items["loss"].append(float(loss[FAR:].mean()))
            items["kl"].append(float(kl.sum(-1)[FAR:].mean()))
            items["recalled"] += [float(loss[place - 1]) for place in asked]
        answers = self._logits(model, [prompt for prompt, _ in self.questions])
        for logits, (_, name) in zip(answers, self.questions, strict=True):
            items["name"].append(float(int(logits[-1].argmax()) == name))
        return items, rows

    def _paired(self) -> list[dict[str, Any]]:
        """Each trained recurrence minus the trained window of its bytes, and minus GLA, over the same stories, with
        errors of the differences."""
        found = []
        folders = {
            path.name: path
            for path in sorted(self.folder.iterdir())
            if (path / "config.json").is_file() and not path.name.endswith(".training")
        }
        for name, folder in folders.items():
            system, budget, seed = name.rsplit("-", 2)
            for minus in ("wide", "gla"):
                beside = folders.get(f"{minus}-{budget}-{seed}")
                if beside is None or system not in WITH_STATE or system == minus or not tokens_of(budget):
                    continue
                (mine, own), (other, others) = (
                    self.items(load_model(find_source(str(one))).eval()) for one in (folder, beside)
                )
                found.append(
                    {
                        "system": system,
                        "budget": tokens_of(budget),
                        "seed": int(seed),
                        "minus": minus,
                        **{figure: difference(mine[figure], other[figure]) for figure in FIGURES},
                        "loss_by_position": {
                            str(first): difference(
                                *(
                                    [float(row[first:end].mean()) for row in rows if len(row) > first]
                                    for rows in (own, others)
                                )
                            )
                            for first, end in itertools.pairwise(BUCKETS)
                            if any(len(row) > first for row in own)
                        },
                    }
                )
        return found

    def tell(self) -> None:
        """Write `results.json`, `results.md` and a plot of each figure."""
        cells = [
            json.loads(path.read_text(encoding="utf-8")) for path in sorted((self.folder / "cells").glob("*.json"))
        ]
        found = {
            **surroundings(),
            "teacher": self.source.name,
            "stories": len(self.held_out),
            "recalled_tokens": sum(map(len, self.recalled)),
            "questions": len(self.questions),
            "scores": {"teacher": self.score(self.teacher)},
            "paired": self._paired(),
            "cells": cells,
        }
        write(self.folder / "results.json", found)
        (self.folder / "results.md").write_text(markdown(found), encoding="utf-8")
        for figure in FIGURES:
            (self.folder / f"{figure}.svg").write_text(plot(found, figure), encoding="utf-8")
        print(markdown(found))


def difference(mine: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The mean of `mine - other`, and its standard error."""
    mean, error = mean_and_error([a - b for a, b in zip(mine, other, strict=True)])
    return round(mean, 5), round(error, 5)


FIGURES = {"loss": "loss", "kl": "KL to the teacher", "recalled": "loss of recalled tokens", "name": "names, %"}


def markdown(found: dict[str, Any]) -> str:
    """The table: one row for each system and budget, with the mean over its seeds, then the references beside it."""
    lines = [f"| system | tokens | seeds | bytes | {' | '.join(FIGURES.values())} |", "|---" * (4 + len(FIGURES)) + "|"]

    def row(name: str, tokens: str, seeds: str, size: str, scores: list[dict[str, Any]]) -> str:
        columns = []
        for figure in FIGURES:
            scale, digits = (100, 1) if figure == "name" else (1, 4)
            values = [score[figure][0] * scale for score in scores]
            error = scores[0][figure][1] * scale
            spread = f", seeds ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            columns.append(f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}{spread}")
        return f"| {name} | {tokens} | {seeds} | {size} | {' | '.join(columns)} |"

    lines.append(row("teacher", "", "", "", [found["scores"]["teacher"]]))
    for system, budget in sorted({(cell["system"], cell["budget"]) for cell in found["cells"]}):
        same = [cell for cell in found["cells"] if (cell["system"], cell["budget"]) == (system, budget)]
        size = f"{same[0]['bytes']:,}"
        lines.append(row(system, f"{budget:,}", str(len(same)), size, [cell["scores"]["model"] for cell in same]))
        beside = next((cell["scores"] for cell in same if len(cell["scores"]) > 1), {})
        for name in ("window_bytes", "no_recurrence"):
            if name in beside:
                lines.append(row(f"{system}, {name}", f"{budget:,}", "", "", [beside[name]]))
    lines += ["", f"| trained | minus | tokens | {' | '.join(FIGURES.values())} |"]
    lines.append("|---" * (3 + len(FIGURES)) + "|")
    for pair in found["paired"]:
        scaled = ((figure, 100 if figure == "name" else 1, 1 if figure == "name" else 4) for figure in FIGURES)
        cells = [f"{pair[f][0] * scale:+.{digits}f} ± {pair[f][1] * scale:.{digits}f}" for f, scale, digits in scaled]
        lines.append(f"| {pair['system']} | {pair['minus']} | {pair['budget']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], figure: str) -> str:
    """An SVG of a figure over training tokens; the left edge is the untrained model."""
    budgets = sorted({cell["budget"] for cell in found["cells"]})
    places, x = token_axis(budgets)
    series = [Series("teacher", [(place, *found["scores"]["teacher"][figure]) for place in places.values()], 0)]
    for look, system in enumerate(sorted({cell["system"] for cell in found["cells"]}), 1):
        points = []
        for budget in budgets:
            scores = [
                cell["scores"]["model"][figure]
                for cell in found["cells"]
                if (cell["system"], cell["budget"]) == (system, budget)
            ]
            if scores:
                points.append((places[budget], statistics.fmean(value for value, _ in scores), scores[0][1]))
        series.append(Series(system, points, look))
    return Plot(figure, FIGURES[figure], [Lines(x, Axis("", lambda value: f"{value:g}"), series)]).alone


def _recalled(ids: Tensor, frequent: Tensor) -> list[int]:
    """The places of rare tokens that occurred before, the last time at least `FAR` tokens earlier."""
    places, last = [], dict[int, int]()
    rare = set(ids.tolist()) - set(frequent.tolist())
    for place, token in enumerate(ids.tolist()):
        if token in rare and token in last and place - last[token] >= FAR:
            places.append(place)
        last[token] = place
    return places


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
