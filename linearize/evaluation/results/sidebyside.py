"""Several evaluations side by side, on the tasks they share: figures, paired differences, and why there are none."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from linearize.errors import DataError
from linearize.evaluation.results.pairing import (
    Difference,
    contributions,
    difference,
    difference_text,
    holm,
    p_text,
    same_items,
)
from linearize.evaluation.results.plots import plots_of
from linearize.evaluation.results.results import FILE_NAME, Results, SystemScores, read_results
from linearize.evaluation.results.telling import READING, limit_text, memory_section, suite_title
from linearize.report.formatting import heading, with_error
from linearize.report.pages import Grid, Page, Section

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from linearize.evaluation.tasks.task import TaskScore
    from linearize.report.plots import Plot


@dataclass(frozen=True)
class Pair:
    """A system of a later result minus one of the first result that has the task; labels as in `SideBySide.results`."""

    result: str
    system: str
    minus_result: str
    minus_system: str
    difference: Difference


@dataclass(frozen=True)
class SharedTask:
    """A task that several results have: by result and system its score, the differences, and what to know of them."""

    suite: str
    task: str
    metric: str
    higher_is_better: bool
    scores: dict[str, dict[str, TaskScore]]
    pairs: list[Pair]
    notes: list[str]


@dataclass(frozen=True)
class SideBySide:
    """Results by their label, the tasks that at least two of them have, and the names of the others."""

    results: dict[str, Results]
    tasks: list[SharedTask]
    left_out: list[str]


def read_all(paths: Sequence[Path]) -> dict[str, Results]:
    """Reads results, and gives each a label of its own: the name of its folder, or of its file.

    Raises:
        DataError: a file that is no results file, or one that is given twice.
    """
    files = [(path / FILE_NAME if path.is_dir() else path).resolve() for path in paths]
    if twice := [path for path, file in zip(paths, files, strict=True) if files.count(file) > 1]:
        raise DataError(f"{twice[0]} is given twice: results compared with themselves differ nowhere; give another")
    found: dict[str, Results] = {}
    for path in paths:
        folder = path if path.is_dir() else path.resolve().parent
        name = folder.resolve().name if path.is_dir() or path.name == FILE_NAME else path.stem
        label, number = name, 1
        while label in found:
            number += 1
            label = f"{name} ({number})"
        found[label] = read_results(path)
    return found


def put_side_by_side(results: dict[str, Results]) -> SideBySide:
    """Compares results on the tasks that at least two of them have.

    Of each later result a system is compared with the one of the same name in the first result that has the task, or,
    if there is none, with the last one there.

    Raises:
        DataError: they have no task in common.
    """
    by_task: dict[tuple[str, str], dict[str, dict[str, TaskScore]]] = {}
    for label, one in results.items():
        for key, scores in one.tasks().items():
            by_task.setdefault(key, {})[label] = scores
    shared = [_shared(results, scores) for scores in by_task.values() if len(scores) > 1]
    if not shared:
        raise DataError(f"{' and '.join(results)} have no task in common: nothing to compare")
    left_out = [f"{task} {metric}" for (task, metric), scores in by_task.items() if len(scores) < 2]
    return SideBySide(results, _corrected(shared), left_out)


def side_by_side_data(found: SideBySide) -> dict[str, Any]:
    """The comparison as plain data for JSON."""
    return {
        "results": [
            {"label": label, "model": one.model, "date": one.date, "limit": one.limit}
            for label, one in found.results.items()
        ],
        "tasks": [
            {
                "suite": task.suite,
                "task": task.task,
                "metric": task.metric,
                "higher_is_better": task.higher_is_better,
                "values": [
                    {"result": label, "system": name, "value": score.value, "stderr": score.stderr, "n": score.n}
                    for label, scores in task.scores.items()
                    for name, score in scores.items()
                ],
                "differences": [asdict(pair) for pair in task.pairs],
                "notes": task.notes,
            }
            for task in found.tasks
        ],
        "left_out": found.left_out,
    }


def side_by_side_page(found: SideBySide) -> Page:
    """The comparison for people."""
    facts = [(label, f"{one.model}, {one.date}{_limit(one)}") for label, one in found.results.items()]
    if found.left_out:
        facts.append(("only in one", ", ".join(found.left_out)))
    plots = plots_of(_merged(found))
    sections = []
    for suite in dict.fromkeys(task.suite for task in found.tasks):
        tasks = [task for task in found.tasks if task.suite == suite]
        sections.append(_section(suite, tasks, plots.get(suite, [])))
    sections += memory_section(plots)
    sections.append(Section("How to read this", [("In the tables", READING)]))
    return Page(f"{' and '.join(found.results)} side by side", facts, sections)


def _shared(results: dict[str, Results], by_label: dict[str, dict[str, TaskScore]]) -> SharedTask:
    base, *later = by_label
    first = next(iter(by_label[base].values()))
    pairs, notes = [], []
    for label in later:
        reason, remark = _pairing(results, by_label, base, label)
        notes += [text for text in (reason, remark) if text]
        for name, score in by_label[label].items():
            other = name if name in by_label[base] else list(by_label[base])[-1]
            found = None if reason else difference([(score, by_label[base][other])])
            if found is not None:
                pairs.append(Pair(label, name, base, other, found))
            elif not reason and contributions(score) is None:
                notes.append(
                    f"{label}, {name}: {score.metric} is not the mean of its items, so there is no paired test"
                )
            elif not reason:
                notes.append(f"{label}, {name}: its items do not match those of {base}, {other}; not paired")
    return SharedTask(first.suite, first.task, first.metric, first.higher_is_better, by_label, pairs, notes)


def _pairing(
    results: dict[str, Results], by_label: dict[str, dict[str, TaskScore]], base: str, label: str
) -> tuple[str, str]:
    """Why two results of a task cannot be paired (empty: they can), and what to know if they are."""
    one, other = (next(iter(by_label[name].values())) for name in (base, label))
    digests = [results[name].digests.get(one.task) for name in (base, label)]
    if one.n != other.n:
        return f"{base} has {one.n:,} items and {label} {other.n:,}: not comparable item by item", ""
    if None not in digests and digests[0] != digests[1]:
        return f"{base} and {label} differ in texts or settings: not comparable", ""
    if not same_items(one, other):
        return f"{base} and {label} have items of different kinds: not comparable item by item", ""
    if None in digests:
        return "", f"{base} and {label} are taken to have the same items: as many of the same kinds, but no digest"
    return "", ""


def _corrected(tasks: list[SharedTask]) -> list[SharedTask]:
    """Holm's correction over each suite's tests."""
    found = []
    for suite in dict.fromkeys(task.suite for task in tasks):
        members = [task for task in tasks if task.suite == suite]
        ps = [pair.difference.p for task in members for pair in task.pairs if pair.difference.p is not None]
        corrected = iter(holm(ps))
        for task in members:
            pairs = [
                pair
                if pair.difference.p is None
                else replace(pair, difference=replace(pair.difference, p_corrected=next(corrected)))
                for pair in task.pairs
            ]
            found.append(replace(task, pairs=pairs))
    return found


def _section(suite: str, tasks: list[SharedTask], plots: list[Plot]) -> Section:
    systems = list(
        dict.fromkeys((label, name) for task in tasks for label, scores in task.scores.items() for name in scores)
    )
    scores = []
    for label, name in systems:
        held = [(task.metric, task.scores.get(label, {}).get(name)) for task in tasks]
        cells = ("–" if s is None else with_error(s.value, s.stderr, metric) for metric, s in held)
        scores.append([f"{label}: {name}", *cells])
    headings = [heading(task.task, task.metric, task.higher_is_better) for task in tasks]
    grids = [Grid("Scores ± standard error", ["system", *headings], scores, notes=_notes(tasks))]
    differences = []
    for label, task in zip(headings, tasks, strict=True):
        for number, pair in enumerate(task.pairs):
            compared = [f"{pair.result}: {pair.system}", f"{pair.minus_result}: {pair.minus_system}"]
            change = difference_text(pair.difference, task.metric)
            test = pair.difference.test or "–"
            differences.append(["" if number else label, *compared, change, p_text(pair.difference), test])
    if differences:
        grids.append(Grid("Differences", ["task", "system", "minus", "difference", "p", "test"], differences, words=3))
    return Section(suite_title(suite), grids=grids, plots=plots)


def _notes(tasks: list[SharedTask]) -> list[str]:
    """Each note once, with the tasks that it is about."""
    about: dict[str, list[str]] = {}
    for task in tasks:
        for note in task.notes:
            about.setdefault(note, []).append(f"{task.task} {task.metric}")
    return [f"{', '.join(names)}: {note}." for note, names in about.items()]


def _merged(found: SideBySide) -> Results:
    """All systems as those of one result, with the shared tasks, for plots."""
    systems, scores = [], {}
    for label, one in found.results.items():
        for system in one.systems:
            name = f"{label}: {system.name}"
            systems.append(replace(system, name=name))
            held = [task.scores.get(label, {}).get(system.name) for task in found.tasks]
            scores[name] = SystemScores([score for score in held if score is not None])
    return Results(" and ".join(found.results), systems, scores)


def _limit(one: Results) -> str:
    return "" if one.limit is None else f", {limit_text(one.limit)} items of each task"
