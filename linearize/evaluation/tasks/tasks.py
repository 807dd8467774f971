"""The benchmark tasks: lm-eval's own definitions, on documents from local files or from the Hub.

`evals/tasks/NAME.yaml` names lm-eval's file of a task, the metric to report, and in its `local:` section the file of a
data folder with the same documents, because lm-eval's own loading reads them from the Hub. lm-eval itself is imported
only when tasks are built, so listing them stays fast.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from linearize.errors import DataError, hint_for
from linearize.runtime.folders import shipped_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

FEWSHOT_SEED = 1234
"""lm-eval's default, of solved examples and of sampled answers. A task without a seed refuses to run."""


@dataclass(frozen=True)
class LocalFile:
    """Place of a task's documents in a data folder.

    Attributes:
        path: the file, relative to the data folder.
        reader: the name of the function in `_READERS` that turns the file into records.
        fields: for every field of a document the record's key that holds it.
        fewshot_path: the file of the documents that solved examples are taken from, for tasks with examples.
    """

    path: str
    reader: str
    fields: Mapping[str, str]
    fewshot_path: str | None = None


@dataclass(frozen=True)
class TaskDefinition:
    """One task file: lm-eval's definition, the metric to report, and its local form.

    Attributes:
        headline: the metric that papers report for it.
        file: lm-eval's YAML file, below its folder of tasks.
        changes: keys that replace those of lm-eval's file.
        suite: `core`, or a suite of its own.
        group: the field by which documents are kept apart, each group with its own solved examples; empty for none.
    """

    name: str
    about: str
    headline: str
    file: str
    changes: Mapping[str, Any]
    local: LocalFile
    suite: str = "core"
    group: str = ""

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """lm-eval's configuration, with the splits alone that are read. Reading it imports lm-eval.

        Raises:
            DataError: the installed lm-eval has no such file.
        """
        from lm_eval.tasks._yaml_loader import load_yaml

        found = find_spec("lm_eval.tasks")
        assert found is not None and found.origin is not None  # noqa: S101 - it has just been imported
        try:
            config: dict[str, Any] = load_yaml(Path(found.origin).parent / self.file)
        except OSError as error:
            raise DataError(
                f"task {self.name}: the installed lm-eval has no {self.file}; install another version"
            ) from error
        config |= {"task": self.name, **self.changes}
        # lm-eval scores the test split where a task has one.
        unread = {"training_split", "validation_split"} if config.get("test_split") else {"training_split"}
        return {key: value for key, value in config.items() if key not in (*unread, "tag")}

    @property
    def splits(self) -> list[str]:
        """The split that is scored, and that of solved examples if there is one."""
        scored = self.config.get("test_split") or self.config["validation_split"]
        return [one for one in (scored, self.config.get("fewshot_split")) if one is not None]


@cache
def task_definitions() -> dict[str, TaskDefinition]:
    """Every shipped task by name, in the order of the names."""
    definitions = {}
    for path in sorted(shipped_folder("tasks").glob("*.yaml")):
        one = yaml.safe_load(path.read_text(encoding="utf-8"))
        local = one["local"]
        definitions[one["task"]] = TaskDefinition(
            name=one["task"],
            about=one["about"],
            headline=one["headline"],
            file=one["lm_eval"],
            changes=one.get("changes", {}),
            local=LocalFile(local["file"], local.get("reader", "jsonl"), local["fields"], local.get("fewshot_file")),
            suite=one.get("suite", "core"),
            group=local.get("group", ""),
        )
    return definitions


def available_tasks(suite: str | None = None) -> dict[str, str]:
    """Task name -> a description of one line; of one suite, or of all."""
    return {name: one.about for name, one in task_definitions().items() if suite in (None, one.suite)}


def build_tasks(names: Sequence[str], data: Path | None, shots: int | None = None) -> dict[str, dict[str, Any]]:
    """lm-eval's task objects: by task, by group of its documents (`""` where a task has no groups).

    Args:
        names: of `available_tasks`; a repeated name counts once.
        data: the folder to read the documents from (nothing touches the network then), or None for the Hub.
        shots: solved examples before each question; None for the task's own number.

    Raises:
        DataError: an unknown task, a missing or broken file, or a Hub that cannot be reached.
    """
    chosen = [_definition(name) for name in dict.fromkeys(names)]
    if not chosen:
        raise DataError(f"no tasks given: choose from {', '.join(task_definitions())}")
    if shots and (without := [task.name for task in chosen if task.local.fewshot_path is None]):
        raise DataError(
            f"task {without[0]}: {shots} solved examples were asked for, and its local form has none; leave out "
            "--data, and lm-eval's own task reads them from the Hub"
        )
    # All the documents first, so that a missing file is reported before seconds of importing and building.
    documents = [_from_hub(task) if data is None else _from_folder(task, data) for task in chosen]
    return {
        task.name: _groups(task, dict(zip(task.splits, read, strict=True)), data is not None, shots)
        for task, read in zip(chosen, documents, strict=True)
    }


def _definition(name: str) -> TaskDefinition:
    known = task_definitions()
    if name in known:
        return known[name]
    raise DataError(f"no task called '{name}': {hint_for(name, known)}")


def _groups(task: TaskDefinition, splits: dict[str, Any], is_local: bool, shots: int | None) -> dict[str, Any]:
    if not task.group:
        return {"": _build(task, splits, is_local, shots)}
    members: dict[str, dict[str, list[int]]] = {}
    for split, documents in splits.items():
        for index, group in enumerate(documents[task.group]):
            members.setdefault(group, {name: [] for name in splits})[split].append(index)
    built = {}
    for group, indices in members.items():
        if missing := [split for split, chosen in indices.items() if not chosen]:
            raise DataError(f"task {task.name}: {task.group} {group} has no documents in the {missing[0]} split")
        part = {split: documents.select(indices[split]) for split, documents in splits.items()}
        built[group] = _build(task, part, is_local, shots)
    return built


def _build(task: TaskDefinition, splits: dict[str, Any], is_local: bool, shots: int | None) -> Any:
    from lm_eval.api.task import ConfigurableTask

    config = dict(task.config)
    if shots is not None:
        config["num_fewshot"] = shots
    if is_local:
        # The local files hold documents as `process_docs` leaves them.
        config.pop("process_docs", None)

    def custom_dataset(**_: object) -> dict[str, Any]:
        return splits

    built = ConfigurableTask(config={"num_fewshot": 0, **config, "custom_dataset": custom_dataset})
    built.set_fewshot_seed(FEWSHOT_SEED)
    return built


def _from_hub(task: TaskDefinition) -> list[Any]:
    import datasets

    path = task.config["dataset_path"]
    try:
        return [datasets.load_dataset(path, task.config.get("dataset_name"), split=split) for split in task.splits]
    except (OSError, ValueError) as error:
        raise DataError(
            f"task {task.name}: cannot load {path} from the Hub ({type(error).__name__}): "
            f"check the network, or give a folder that holds {task.local.path} with --data DIR"
        ) from error


def _from_folder(task: TaskDefinition, data: Path) -> list[Any]:
    if not data.is_dir():
        raise DataError(f"no data folder {data}: give --data DIR a folder that holds {task.local.path}")
    return [_from_file(task, data, name) for name in (task.local.path, task.local.fewshot_path) if name is not None]


def _from_file(task: TaskDefinition, data: Path, name: str) -> Any:
    import datasets

    path = data / name
    if not path.is_file():
        raise DataError(
            f"task {task.name} needs {name}, which is not in {data}: "
            "put it there, or leave out --data to read the task's documents from the Hub"
        )
    rows = []
    try:
        for line, record in _READERS[task.local.reader](path):
            missing = [key for key in task.local.fields.values() if key not in record]
            if missing:
                raise DataError(f"{path}, line {line}: no field '{missing[0]}', which task {task.name} needs")
            rows.append({field: record[key] for field, key in task.local.fields.items()})
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} for task {task.name}: {error}") from error
    if not rows:
        raise DataError(f"{path} is empty: task {task.name} needs its documents there")
    return datasets.Dataset.from_list(rows)


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, record) of each line that is not blank."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error.msg}): mend or replace the file") from error
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number}: not a JSON object: mend or replace the file")
            yield number, record


def _wikitext_pages(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(first line, {"page": text}) of each page, cut as EleutherAI/wikitext_document_level cuts them.

    A page starts at a line like ` = Title = `; headings inside a page have two or more `=` on each side. What comes
    before the first title counts as a page only when it is not blank.
    """
    start, page = 1, list[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        # Two-`=` headings are glued first, so that they no longer look like a title.
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            if "".join(page).strip():
                yield start, {"page": "\n".join(page)}
            start, page = number, []
        page.append(line)
    if "".join(page).strip():
        yield start, {"page": "\n".join(page)}


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Mapping[str, Any]]]]] = {
    "jsonl": _jsonl,
    "wikitext_pages": _wikitext_pages,
}
