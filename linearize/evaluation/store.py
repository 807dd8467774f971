"""A cache of the results of single items: no item is scored twice, and an interrupted run goes on.

A folder of JSON lines, one file for each model and task. Lines are only ever added, each in one write with its chunk,
so two processes can share a folder; a line that was torn by a kill is not read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from linearize import __version__
from linearize.errors import OutputError
from linearize.evaluation.baselines import branches_off
from linearize.evaluation.tasks.task import Item
from linearize.runtime import cache
from linearize.runtime.folders import cache_folder
from linearize.sources.fingerprint import fingerprint, tokenizer_fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_VERSION = 3  # of the keys: raise it whenever the same model and tokenizer would get others
_OF_THE_FILE = {"transformers_version", "_from_model_config"}  # entries of generation_config.json that set nothing
_DIGITS = 32  # of a SHA-256 in a file's name: enough that no two are ever equal


class Store:
    """Results of items by model and task.

    Args:
        folder: the cache; made when the first result is written. None is `evaluation` in the cache folder.
        fresh: read nothing that is there, and only add.
    """

    def __init__(self, folder: Path | None = None, *, fresh: bool = False) -> None:
        self.folder, self.fresh = folder or cache_folder() / "evaluation", fresh
        self._limited = folder is None
        if self._limited:
            cache.limit()  # a limit that is no size is refused before any work
        self._held: dict[Path, object | None] = {}

    def read(self, model: str, task: str) -> dict[int, Item]:
        """The results of a model on a task, by item.

        Args:
            model: its `model_key`.
            task: its `Task.digest`.
        """
        if self.fresh:
            return {}
        found = {}
        path = self._file(model, task)
        if path.parent.is_dir():
            self._hold(path.parent)
        for line in _lines(path):
            if isinstance(line.get("item"), int) and isinstance(line.get("value"), float):
                found[line["item"]] = Item(line["value"], tuple(line.get("curve", ())), line.get("metrics", {}))
        return found

    def write(self, model: str, task: str, items: Mapping[int, Item]) -> None:
        """Adds results.

        Raises:
            OutputError: the folder cannot be written.
        """
        path = self._file(model, task)
        self._hold(path.parent)
        lines = []
        for index, item in items.items():
            line: dict[str, Any] = {"item": index, "value": float(item.value)}
            if item.curve:
                line["curve"] = list(item.curve)
            if item.metrics:
                line["metrics"] = dict(item.metrics)
            lines.append(line)
        _append(path, lines)
        if self._limited:
            cache.make_room(path.parent)

    def _hold(self, folder: Path) -> None:
        """Keeps a model's results in the cache while this object lives."""
        if self._limited and folder not in self._held:
            self._held[folder] = cache.hold(folder)

    def model_of(self, stamp: str) -> str | None:
        """The `model_key` of the files that have this stamp, where they were loaded before."""
        keys = [line["model"] for line in _lines(self.folder / "models.jsonl") if line.get("stamp") == stamp]
        return keys[-1] if keys else None

    def remember(self, stamp: str, model: str) -> None:
        """Keeps the key of the model in the files that have this stamp."""
        if self.model_of(stamp) != model:
            _append(self.folder / "models.jsonl", [{"stamp": stamp, "model": model}])

    def _file(self, model: str, task: str) -> Path:
        return self.folder / model[:_DIGITS] / f"{task[:_DIGITS]}.jsonl"


def model_key(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over all that a result depends on besides the task: configuration, weights, dtype, tokenizer, branches
    that are off, the settings of generation, and this package's version."""
    generation = getattr(model, "generation_config", None)  # its penalties and end tokens apply in lm-eval's tasks
    settings = {} if generation is None else generation.to_diff_dict()
    written = {name: value for name, value in settings.items() if name not in _OF_THE_FILE}
    parts = [_VERSION, __version__, fingerprint(model), tokenizer_fingerprint(tokenizer), branches_off(model), written]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def whole_stamp(stamp: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A loader's stamp with what else `model_key` depends on."""
    parts = [_VERSION, __version__, stamp, tokenizer_fingerprint(tokenizer)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # torn
            continue
        if isinstance(record, dict):
            yield record


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    # It starts a line of its own, in case the last one is torn.
    data = ("\n" + "".join(json.dumps(record) + "\n" for record in records)).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)
    except OSError as error:
        way = "set LINEARIZE_CACHE"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            way = f"free some space, or {way}; the same command goes on after those that are kept"
        raise OutputError(f"{path.parent}: results cannot be kept there: {error.strerror or error}; {way}") from error
