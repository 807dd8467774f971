"""The names of lm-eval's tasks, groups and tags.

lm-eval reads some 15,000 YAML files to know its names, which takes 5 to 30 seconds. They are kept in the cache folder,
one file for each installed lm-eval.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from linearize.errors import DataError, OutputError
from linearize.runtime.files import staged_file
from linearize.runtime.folders import cache_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_VERSION = 1  # of the file's form


class Entry(NamedTuple):
    """One name.

    Attributes:
        kind: `task`, `group` (several tasks with a figure of their own), `tag` (several tasks) or `py_task`.
        path: its YAML file; None for a tag.
        members: the tasks of a tag.
    """

    kind: str
    path: str | None
    members: tuple[str, ...] = ()


def lm_eval_names(include: Path | None = None) -> dict[str, Entry]:
    """Every name that lm-eval knows, from the cache where it is there.

    Args:
        include: a folder of further YAML files. Its names take precedence, as they do in lm-eval.

    Raises:
        DataError: the folder is not there.
    """
    names = _read()
    if names is None:
        names = _scan(defaults=True)
        _keep(names)
    return {**names, **(included_names(include) if include is not None else {})}


def included_names(include: Path) -> dict[str, Entry]:
    """The names in a folder of YAML files.

    Raises:
        DataError: the folder is not there, or has no task.
    """
    if not include.is_dir():
        raise DataError(f"--include-path {include}: no such folder; give one with lm-eval's YAML files")
    names = _scan(defaults=False, include=include)
    if not names:
        raise DataError(f"--include-path {include}: no YAML file there names a task, group or tag")
    return names


def task_manager(include: Path | None, metadata: Mapping[str, Any]) -> Any:
    """lm-eval's TaskManager for these names, made without reading its folder again.

    Args:
        include: as `lm_eval_names` takes it.
        metadata: arguments of tasks that make their own documents, e.g. RULER's tokenizer and lengths.
    """
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry as Indexed
    from lm_eval.tasks._index import Kind

    manager = TaskManager(include_defaults=False, metadata=dict(metadata))
    for name, entry in lm_eval_names(include).items():
        path = None if entry.path is None else Path(entry.path)
        manager.task_index[name] = Indexed(name, Kind[entry.kind.upper()], path, tags=set(entry.members))
    return manager


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval warns of every model that is handed over in memory, of local data sets and of names that come twice."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _scan(*, defaults: bool, include: Path | None = None) -> dict[str, Entry]:
    from lm_eval.tasks import TaskManager

    with quiet():
        manager = TaskManager(include_path=None if include is None else str(include), include_defaults=defaults)
    return {
        name: Entry(
            entry.kind.name.lower(),
            None if entry.yaml_path is None else str(Path(entry.yaml_path).resolve()),
            tuple(sorted(entry.tags)) if entry.kind.name == "TAG" else (),
        )
        for name, entry in manager.task_index.items()
    }


def _file() -> Path:
    found = find_spec("lm_eval")
    folder = "" if found is None else str(found.origin)
    key = hashlib.sha256(json.dumps([_VERSION, version("lm-eval"), folder]).encode()).hexdigest()[:32]
    return cache_folder() / "task-names" / f"{key}.json"


def _read() -> dict[str, Entry] | None:
    try:
        document = json.loads(_file().read_text(encoding="utf-8"))
        return {name: Entry(kind, path, tuple(members)) for name, (kind, path, members) in document.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _keep(names: Mapping[str, Entry]) -> None:
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(path) as staging:
            staging.write_text(json.dumps(names), encoding="utf-8")
    except (OSError, OutputError):
        return  # the next call reads lm-eval's folder again
