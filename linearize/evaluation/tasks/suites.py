"""The suites of tasks by name, and the tasks in them; a suite's module is imported when its tasks are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from linearize.errors import DataError, hint_for
from linearize.evaluation.tasks.names import GENERATION, LENGTH, RECALL, TEACHERLESS, TWICE
from linearize.evaluation.tasks.tasks import available_tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from linearize.evaluation.runner import Loader
    from linearize.evaluation.tasks.task import Task

HELD_OUT = "held_out"
"""The task of scoring the rows that fine-tuning kept apart, which lie in the checkpoint's folder."""


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
    """

    data: Path | None = None
    lengths: Sequence[int] = ()
    samples: int | None = None
    seed: int = 0
    teacher: Loader | None = None


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
    def build(_: Any, names: Sequence[str], options: SuiteOptions) -> Sequence[Task]:
        from linearize.evaluation.tasks.harness import lm_eval_tasks  # lm-eval takes seconds to import

        return lm_eval_tasks(names, options.data)

    return Suite(available_tasks(suite), build)


def _recall() -> Suite:
    def build(tokenizer: Any, names: Sequence[str], options: SuiteOptions) -> Sequence[Task]:
        from linearize.evaluation.tasks.recall import recall_tasks

        return recall_tasks(tokenizer, names, data=options.data, seed=options.seed, **_swept(options))

    return Suite(RECALL, build, [name + TWICE for name in RECALL])


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


def choose_tasks(tasks: Sequence[str], suites: Sequence[str] = ()) -> dict[str, list[str]]:
    """By suite the names of the tasks that are asked for, each once: those of whole suites, then single ones.

    Args:
        tasks: names of any suite's tasks; `held_out`, which belongs to no suite, is passed over.
        suites: names of `SUITES`.

    Raises:
        DataError: a name that is not there, with the nearest ones.
    """
    chosen: dict[str, dict[str, None]] = {}
    for name in suites:
        if name not in SUITES:
            raise DataError(f"no suite called '{name}': {hint_for(name, SUITES)}")
        chosen[name] = dict.fromkeys(SUITES[name]().names)
    owners: dict[str, str] = {}
    for name in tasks:
        if name == HELD_OUT:
            continue
        for suite in SUITES if name not in owners else ():
            looked_up = SUITES[suite]()
            owners |= dict.fromkeys([*looked_up.names, *looked_up.more], suite)
            if name in owners:
                break
        if name not in owners:
            raise DataError(f"no task called '{name}': {hint_for(name, [*owners, HELD_OUT])}")
        chosen.setdefault(owners[name], {})[name] = None
    return {suite: list(names) for suite, names in chosen.items()}


def build_suites(chosen: Mapping[str, Sequence[str]], tokenizer: Any, options: SuiteOptions) -> list[Task]:
    """The tasks that `choose_tasks` named.

    Raises:
        DataError: data that cannot be read, or options that do not fit a task.
    """
    return [task for suite, names in chosen.items() for task in SUITES[suite]().build(tokenizer, names, options)]
