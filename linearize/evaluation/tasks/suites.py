"""The suites of tasks by name, and the tasks in them; a suite's module is imported when its tasks are built."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from linearize.errors import DataError, hint_for
from linearize.evaluation.tasks.index import included_names, lm_eval_names
from linearize.evaluation.tasks.names import (
    GENERATION,
    HELD_OUT,
    LENGTH,
    MORE_RECALL,
    RECALL,
    TEACHERLESS,
    TWICE,
)
from linearize.evaluation.tasks.tasks import available_tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from linearize.evaluation.runner import Loader
    from linearize.evaluation.tasks.task import Task

BENCHMARKS = "benchmarks"
"""The suite of lm-eval's tasks that are in none of ours."""


@dataclass(frozen=True)
class SuiteOptions:
    """Options that tasks are built from, besides the tokenizer.

    Attributes:
        data: the folder of the tasks' files; None reads from the Hub where a task can.
        lengths: of the texts in tokens, for tasks that sweep them; empty for the suite's own. Tasks that read along one
            text read the longest.
        samples: items of each kind, for tasks that make their items; None for the suite's own.
        seed: of what is drawn at random in such tasks.
        teacher: loads the pretrained model, for tasks that compare with it.
        include: a folder of lm-eval YAML files with tasks of one's own.
        num_fewshot: solved examples before each question of lm-eval's tasks; None for each task's own number.
        chat: put prompts of lm-eval's tasks into the tokenizer's chat template.
        system: a system message for these prompts.
        unsafe_code: run tasks that run the code a model writes.
    """

    data: Path | None = None
    lengths: Sequence[int] = ()
    samples: int | None = None
    seed: int = 0
    teacher: Loader | None = None
    include: Path | None = None
    num_fewshot: int | None = None
    chat: bool = False
    system: str | None = None
    unsafe_code: bool = False


@dataclass(frozen=True)
class Suite:
    """A suite of tasks.

    Attributes:
        names: task -> a description of one line, in the order to show.
        build: the tasks of some names, given tokenizer, names and options.
        more: names of variants that the suite as a whole leaves out.
    """

    names: Mapping[str, str]
    build: Callable[[Any, Sequence[str], SuiteOptions], Sequence[Task]]
    more: Sequence[str] = ()


def _lm_eval(suite: str) -> Suite:
    def build(tokenizer: Any, names: Sequence[str], options: SuiteOptions) -> Sequence[Task]:
        from linearize.evaluation.tasks.loading import suite_tasks  # lm-eval takes seconds to import

        return suite_tasks(names, tokenizer, options)

    return Suite(available_tasks(suite), build)


def _recall() -> Suite:
    def build(tokenizer: Any, names: Sequence[str], options: SuiteOptions) -> Sequence[Task]:
        from linearize.evaluation.tasks.recall import recall_tasks

        return recall_tasks(tokenizer, names, data=options.data, seed=options.seed, **_swept(options))

    return Suite(RECALL, build, [*MORE_RECALL, *(name + TWICE for name in (*RECALL, *MORE_RECALL))])


def _generation() -> Suite:
    def build(tokenizer: Any, names: Sequence[str], options: SuiteOptions) -> Sequence[Task]:
        from linearize.evaluation.tasks.generation_suite import generation_tasks

        if options.teacher is None and (compared := [name for name in names if name not in TEACHERLESS]):
            raise DataError(
                f"{', '.join(compared)}: compared with the teacher; name it with --teacher ID|FOLDER, or take "
                f"--tasks {','.join(TEACHERLESS)}"
            )
        made = {} if options.samples is None else {"samples": options.samples}
        return generation_tasks(tokenizer, names, teacher=options.teacher, data=options.data, seed=options.seed, **made)

    return Suite(GENERATION, build)


def _length() -> Suite:
    def build(tokenizer: Any, names: Sequence[str], options: SuiteOptions) -> Sequence[Task]:
        from linearize.evaluation.tasks.length import length_tasks

        made = {} if options.samples is None else {"documents": options.samples}
        longest = max(options.lengths, default=None)
        return length_tasks(tokenizer, names, data=options.data, length=longest, seed=options.seed, **made)

    return Suite(LENGTH, build)


def _swept(options: SuiteOptions) -> dict[str, Any]:
    """The user's lengths and samples; a suite has its own defaults."""
    said: dict[str, Any] = {"lengths": options.lengths} if options.lengths else {}
    return said if options.samples is None else {**said, "samples": options.samples}


SUITES: dict[str, Callable[[], Suite]] = {
    "core": lambda: _lm_eval("core"),
    "mmlu": lambda: _lm_eval("mmlu"),
    "recall": _recall,
    "generation": _generation,
    "length": _length,
}
"""Suite -> a function that looks it up."""


def choose_tasks(tasks: Sequence[str], suites: Sequence[str] = (), include: Path | None = None) -> dict[str, list[str]]:
    """By suite the names of the chosen tasks, each once: those of whole suites, then single ones.

    lm-eval's names are read where a name is not one of ours, or `include` may have it.

    Args:
        tasks: names of any suite's tasks, or of lm-eval's tasks, groups and tags, or patterns of the latter (`mmlu_*`);
            `held_out`, which belongs to no suite, is passed over.
        suites: names of `SUITES`.
        include: a folder of further lm-eval YAML files; its names take precedence.

    Raises:
        DataError: a name that is not there, with the nearest ones.
    """
    chosen: dict[str, dict[str, None]] = {}
    for name in suites:
        if name not in SUITES:
            raise DataError(f"no suite called '{name}': {hint_for(name, SUITES)}")
        chosen[name] = dict.fromkeys(SUITES[name]().names)
    owners = own_tasks()
    if include is not None and any(name != HELD_OUT for name in tasks):
        owners |= dict.fromkeys(included_names(include), BENCHMARKS)
    for name in tasks:
        if name == HELD_OUT:
            continue
        if name in owners:
            chosen.setdefault(owners[name], {})[name] = None
            continue
        known = lm_eval_names(include)
        found = fnmatch.filter(known, name)
        if not found:
            near = difflib.get_close_matches(name, dict.fromkeys([*owners, HELD_OUT, *SUITES, *known]), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`linearize eval --list` has their names"
            raise DataError(f"no task called '{name}': {hint}")
        chosen.setdefault(BENCHMARKS, {}).update(dict.fromkeys(found))
    return {suite: list(names) for suite, names in chosen.items()}


def own_tasks() -> dict[str, str]:
    """Task -> suite, for the tasks of all our suites."""
    looked_up = {suite: look_up() for suite, look_up in SUITES.items()}
    return {name: suite for suite, one in looked_up.items() for name in (*one.names, *one.more)}


def list_tasks(pattern: str = "", include: Path | None = None) -> list[tuple[str, str, str]]:
    """(name, kind, a line about it) of every suite and task, ours first, then lm-eval's.

    Args:
        pattern: part of a name, or a pattern such as `mmlu_*`; empty for all.
        include: as `choose_tasks` takes it.
    """
    found = {HELD_OUT: ("task", "the rows that fine-tuning held out")}
    for suite, look_up in SUITES.items():
        one = look_up()
        found.setdefault(suite, ("suite", ", ".join(one.names)))
        found |= {name: ("task", about) for name, about in one.names.items()}
        found |= dict.fromkeys(one.more, ("task", f"of the suite {suite}"))
    for name, entry in lm_eval_names(include).items():
        about = f"{len(entry.members):,} tasks" if entry.kind == "tag" else ""
        found.setdefault(name, (entry.kind.removeprefix("py_"), about))
    wanted = fnmatch.filter(found, pattern if set(pattern) & set("*?[") else f"*{pattern}*")
    return [(name, *found[name]) for name in wanted]


def build_suites(chosen: Mapping[str, Sequence[str]], tokenizer: Any, options: SuiteOptions) -> list[Task]:
    """The tasks that `choose_tasks` named; of those with one name, e.g. by way of a tag, the first.

    Raises:
        DataError: data that cannot be read, or options that do not fit a task.
    """
    tasks: dict[str, Task] = {}
    for suite, names in chosen.items():
        one = _lm_eval(suite) if suite == BENCHMARKS else SUITES[suite]()
        for task in one.build(tokenizer, names, options):
            tasks.setdefault(task.name, task)
    return list(tasks.values())
