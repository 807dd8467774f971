"""Results of an evaluation as data: write and read `results.json`.

The document, schema `linearize.results/1`::

    {
      "schema": "linearize.results/1",
      "model": the evaluated model, as the user named it,
      "command": the command line, "date": ISO 8601, "versions": {package: version},
      "limit": items per task (below 1: a share of them), or null for all of them,
      "systems": [
        {"name", "description", "state_bytes", "growth_bytes_per_token", "checkpoint", "dtype"}, ...
      ],
      "tasks": [
        {
          "task", "suite", "metric", "higher_is_better", "axis", "digest",
          "systems": {name: {"value", "stderr", "n", "total", "seed", "items", "tags", "curves"}, ...}
        }, ...
      ]
    }

`systems` are in the order to show. `state_bytes` and `growth_bytes_per_token` are the memory of one sequence, constant
and per token, or null. `checkpoint` is the digest of a system that is a whole converted checkpoint, `dtype` the dtype
of its scoring; both are null where not recorded, and left out by earlier versions. `TaskScore` explains a task's keys;
`digest` is null where it is not known, and a system that was not scored on a task is left out of it. Held-out rows are
tasks like any other, of the suite `held-out`: `loss`, `perplexity`, `kl` and `agreement`, with a row's counted tokens
as its tag `tokens`. `items` is empty where an item has no number of its own (a pair of texts under BLEU). Numbers are
finite. The file that `write_report` leaves has a further key, `comparisons`, which
follows from the rest and is not read back. Readers ignore keys they do not know.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from linearize.errors import DataError
from linearize.evaluation.results.document import SCHEMA, Document, check_document
from linearize.evaluation.tasks.task import TaskScore

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from linearize.evaluation.heldout import RowScores

FILE_NAME = "results.json"
# The suite, and the task, of the rows that fine-tuning held out.
HELDOUT = "held-out"
_PACKAGES = ("linearize", "torch", "transformers", "lm-eval")


@dataclass(frozen=True)
class SystemScores:
    """Scores of one system: benchmark tasks, held-out rows, or both."""

    tasks: Sequence[TaskScore] = ()
    rows: RowScores | None = None

    def all_tasks(self) -> list[TaskScore]:
        """The tasks, and the held-out rows as further ones of the suite `held-out`."""
        return [*self.tasks, *_row_tasks(self.rows)]


@dataclass(frozen=True)
class SystemInfo:
    """Description of a system.

    Attributes:
        name: as in `Results.scores`; `teacher` and `window` are the two that others are measured by.
        description: a few words for people.
        state_bytes: memory of one sequence that does not depend on its length; None where it is not known.
        growth_bytes_per_token: memory of each token on top; a transformer's cache.
        checkpoint: which converted checkpoint it is, see `checkpoint_digest`; None of any other system.
        dtype: what that, or a pretrained model that was evaluated itself, was scored in; None where it is not recorded.
    """

    name: str
    description: str = ""
    state_bytes: int | None = None
    growth_bytes_per_token: int | None = None
    checkpoint: str | None = None
    dtype: str | None = None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass
class Results:
    """Results of an evaluation, with all facts that a report needs.

    Attributes:
        model: the evaluated model, as the user named it.
        systems: in the order to show.
        scores: by system's name.
        command: the command line.
        date: ISO 8601; now, if left out.
        versions: by package; those installed, if left out.
        limit: items per task, below 1 a share of them; None for all of them.
        digests: by task's name its `Task.digest`: results of two evaluations pair up only where these are equal.
    """

    model: str
    systems: list[SystemInfo]
    scores: dict[str, SystemScores]
    command: str = ""
    date: str = field(default_factory=_now)
    versions: dict[str, str] = field(default_factory=_versions)
    limit: float | None = None
    digests: dict[str, str] = field(default_factory=dict)

    def tasks(self) -> dict[tuple[str, str], dict[str, TaskScore]]:
        """By task and metric, in the order first met: by system its score."""
        found: dict[tuple[str, str], dict[str, TaskScore]] = {}
        for system in self.systems:
            for score in self.scores.get(system.name, SystemScores()).all_tasks():
                found.setdefault((score.task, score.metric), {})[system.name] = score
        return found

    def to_json(self) -> dict[str, Any]:
        """The document, see the module.

        Raises:
            DataError: a number that is not finite, or lists that do not belong together.
        """
        document = {
            "schema": SCHEMA,
            "model": self.model,
            "command": self.command,
            "date": self.date,
            "versions": self.versions,
            "limit": self.limit,
            "systems": [asdict(system) for system in self.systems],
            "tasks": [self._task(scores) for scores in self.tasks().values()],
        }
        check_document(document, "the results")
        return document

    def _task(self, scores: dict[str, TaskScore]) -> dict[str, Any]:
        first = next(iter(scores.values()))
        return {
            "task": first.task,
            "suite": first.suite,
            "metric": first.metric,
            "higher_is_better": first.higher_is_better,
            "axis": list(first.axis),
            "digest": self.digests.get(first.task),
            "systems": {
                name: {
                    "value": score.value,
                    "stderr": score.stderr,
                    "n": score.n,
                    "total": score.total,
                    "seed": score.seed,
                    "items": score.items,
                    "tags": score.tags,
                    "curves": [list(curve) for curve in score.curves],
                }
                for name, score in scores.items()
            },
        }

    @classmethod
    def from_json(cls, document: Any, where: str = "the results") -> Results:
        """The results that a document tells.

        Args:
            where: the document's name in errors, e.g. its file.

        Raises:
            DataError: it is no such document, or of a newer schema.
        """
        checked = check_document(document, where)
        scores = {system.name: SystemScores(_of_system(checked, system.name)) for system in checked.systems}
        return cls(
            model=checked.model,
            systems=[SystemInfo(**system.model_dump()) for system in checked.systems],
            scores=scores,
            command=checked.command,
            date=checked.date,
            versions=checked.versions,
            limit=checked.limit,
            digests={task.task: task.digest for task in checked.tasks if task.digest is not None},
        )


def read_results(path: Path) -> Results:
    """Reads `results.json`, given the file or the folder that `write_report` left.

    Raises:
        DataError: there is no such file, or it is not such a document.
    """
    path = path / FILE_NAME if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give a report's folder or its {FILE_NAME}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{path}: not a results file: nested too deeply") from None
    except ValueError:
        raise DataError(f"{path}: not a results file: a number of thousands of digits") from None
    return Results.from_json(document, str(path))


def _row_tasks(rows: RowScores | None) -> list[TaskScore]:
    if rows is None:
        return []
    of_rows = [{"tokens": count} for count in rows.tokens.tolist()]
    if rows.drawn is not None:
        of_rows = [{**tags, "item": index} for tags, index in zip(of_rows, rows.drawn, strict=True)]

    def task(
        metric: str, value: float, stderr: float | None, items: Any, weigh: bool = False, up: bool = False
    ) -> TaskScore:
        tags = [{**tags, "weight": tags["tokens"]} if weigh else tags for tags in of_rows]
        values = items.tolist()
        return TaskScore(HELDOUT, metric, value, stderr, up, values, HELDOUT, tags, total=rows.total, seed=rows.seed)

    loss = rows.mean_loss
    # The perplexity's error is not given: the loss has one, of which it is the exponential.
    found = [
        task("loss", loss.mean, loss.stderr, rows.loss),
        task("perplexity", rows.perplexity, None, rows.loss, weigh=True),
    ]
    for metric, estimate, items in (("kl", rows.mean_kl, rows.kl), ("agreement", rows.mean_agreement, rows.agreement)):
        if estimate is not None:
            found.append(task(metric, estimate.mean, estimate.stderr, items, up=metric == "agreement"))
    return found


def _of_system(document: Document, name: str) -> list[TaskScore]:
    return [
        TaskScore(
            task=task.task,
            metric=task.metric,
            value=score.value,
            stderr=score.stderr,
            higher_is_better=task.higher_is_better,
            items=score.items,
            suite=task.suite,
            tags=score.tags,
            curves=[tuple(curve) for curve in score.curves],
            axis=task.axis,
            total=score.total,
            seed=score.seed,
            count=0 if score.items else score.n,
        )
        for task in document.tasks
        if (score := task.systems.get(name)) is not None
    ]
