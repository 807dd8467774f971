"""The benchmark tasks: lm-eval's own definitions, read from local files or from the Hub.

`evals/tasks/NAME.yaml` holds a task in lm-eval's form, and a `local:` section that names the file of a data folder
with the same documents, because lm-eval's own loading reads them from the Hub. lm-eval itself is imported only when
tasks are built, so listing them stays fast.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import yaml

from linearize.errors import DataError, hint_for
from linearize.runtime.folders import shipped_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

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
    """One task file: lm-eval's configuration, the metric to report, and its local form.

    Attributes:
        headline: the metric that papers report for it.
        suite: `core`, or a suite of its own.
        group: the field by which documents are kept apart, each group with its own solved examples; empty for none.
    """

    name: str
    about: str
    headline: str
    config: Mapping[str, Any]
    local: LocalFile
    suite: str = "core"
    group: str = ""

    @property
    def split(self) -> str:
        """The split that is scored, chosen as lm-eval does: the test split where the task has one."""
        return str(self.config.get("test_split") or self.config["validation_split"])


class _FunctionName(str):
    """A dotted name under lm-eval's `!function` tag, imported when the task is built."""


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda _, node: _FunctionName(node.value))


@cache
def task_definitions() -> dict[str, TaskDefinition]:
    """Every shipped task by name, in the order of the names."""
    definitions = {}
    for path in sorted(shipped_folder("tasks").glob("*.yaml")):
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader with one tag more)
        local = config.pop("local")
        definitions[config["task"]] = TaskDefinition(
            name=config["task"],
            about=config["metadata"]["about"],
            headline=config["metadata"]["headline"],
            config=config,
            local=LocalFile(local["file"], local.get("reader", "jsonl"), local["fields"], local.get("fewshot_file")),
            suite=config["metadata"].get("suite", "core"),
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
    if shots and (without := [task.name for task in chosen if task.config.get("fewshot_split") is None]):
        raise DataError(
            f"task {without[0]}: {shots} solved examples were asked for, and its local form has none; leave out "
            "--data, and lm-eval's own task reads them from the Hub"
        )
    # All the documents first, so that a missing file is reported before seconds of importing and building.
    documents = [_from_hub(task) if data is None else _from_folder(task, data) for task in chosen]
    return {
        task.name: _groups(task, splits, data is not None, shots)
        for task, splits in zip(chosen, documents, strict=True)
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

    config = {
        key: _imported(value) if isinstance(value, _FunctionName) else value for key, value in task.config.items()
    }
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


def _imported(dotted: str) -> Any:
    module, _, function = dotted.rpartition(".")
    return getattr(importlib.import_module(module), function)


def _from_hub(task: TaskDefinition) -> dict[str, Any]:
    import datasets

    path = task.config["dataset_path"]
    try:
        return {
            split: datasets.load_dataset(path, task.config.get("dataset_name"), split=split)
            for split in (task.split, task.config.get("fewshot_split"))
            if split is not None
        }
    except (OSError, ValueError) as error:
        raise DataError(
            f"task {task.name}: cannot load {path} from the Hub ({type(error).__name__}): "
            f"check the network, or give a folder that holds {task.local.path} with --data DIR"
        ) from error


def _from_folder(task: TaskDefinition, data: Path) -> dict[str, Any]:
    if not data.is_dir():
        raise DataError(f"no data folder {data}: give --data DIR a folder that holds {task.local.path}")
    splits = {task.split: _from_file(task, data, task.local.path)}
    if task.local.fewshot_path is not None:
        splits[str(task.config["fewshot_split"])] = _from_file(task, data, task.local.fewshot_path)
    return splits


def _from_file(task: TaskDefinition, data: Path, name: str) -> Any:
    import datasets

    path = data / name
    if not path.is_file():
        raise DataError(
            f"task {task.name} needs {name}, which is not in {data}: "
            f"put it there, or leave out --data to read {task.config['dataset_path']} from the Hub"
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
