"""Several systems on the same items: the teacher, baselines that cost no training, the model itself and parts of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file

from linearize.checkpoint.provenance import checkpoint_digest
from linearize.conversion.swap import check_convertible, coding_of, mixers_for, window_baseline, window_sections
from linearize.errors import DataError, ModelError, hint_for
from linearize.evaluation.baselines import (
    BRANCHES_OFF,
    alone,
    equal_bytes,
    memory_bytes,
    silence,
    teacher_beside,
)
from linearize.evaluation.heldout import HeldOut, row_scores
from linearize.evaluation.results.results import HELDOUT, Results, SystemInfo, SystemScores
from linearize.evaluation.runner import Loader, StampedLoader, nbytes_to_keep, run
from linearize.evaluation.tasks.names import HELD_OUT
from linearize.evaluation.tasks.suites import SuiteOptions, build_suites, choose_tasks
from linearize.families import family_of
from linearize.recipe import MixerSpec
from linearize.runtime import processes
from linearize.runtime.files import check_space
from linearize.sources.source import DTYPES, Source, load_config, load_model, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from linearize.evaluation.heldout import Rows
    from linearize.evaluation.runner import Progress
    from linearize.evaluation.store import Store
    from linearize.evaluation.tasks.task import Task

BASELINES = {
    "teacher": "the pretrained model",
    "window": "the teacher with the model's window and sinks alone",
    "window_bytes": "the teacher with a window as wide as the model's whole memory has room for",
    "no_recurrence": "the model with its recurrence off",
    "no_window": "the model with its window and sinks off",
    "neither": "the model with its recurrence, window and sinks off",
}
"""Baselines by name."""
_OF_TEACHER = BASELINES.keys() - BRANCHES_OFF
ALL, NONE = "all", "none"
DEFAULTS = ("teacher", "window_bytes", "no_recurrence")
"""Baselines that a converted model is always scored beside, as far as it has them; `none` leaves them out."""


@dataclass(frozen=True)
class System:
    """A model to score: its description and its loader."""

    info: SystemInfo
    load: Loader


def evaluate(
    source: Source,
    tasks: Sequence[str] = (),
    *,
    suites: Sequence[str] = (),
    baselines: Sequence[str] = (),
    teacher: str | None = None,
    options: SuiteOptions | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    store: Store | None = None,
    report: Path | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
    command: str = "",
) -> Results:
    """Scores `source` and its baselines.

    Without its teacher a converted checkpoint is scored alone, and `say` reports it; only a baseline or a task that
    needs the teacher is refused then.

    Args:
        source: a converted checkpoint, or any other model, which then is its own teacher.
        tasks: names of any suite's tasks, and `held_out`; with no suites either, `default_tasks(source)`.
        suites: names of `SUITES`: all their tasks.
        baselines: of `BASELINES`, beside `DEFAULTS`; `all` for those that the model has, `none` for no defaults.
        teacher: a Hub id, a folder or a GGUF file; None is the model that `source` was converted from.
        options: settings of the tasks; its seed also draws the items under a limit.
        limit: score so many items of each task, or below 1 such a share of them, drawn at random.
        store: the cache of results; None caches nothing.
        report: the folder that a report is to be written to later; it only has to have room.

    Raises:
        DataError: an unknown suite, task or baseline, or data that cannot be read.
        ModelError: a model that cannot be read, or gives results that are not finite; or `teacher` is not the one that
            `source` was converted from.
        OutputError: a disk has no room for the results or the report.
    """
    options = options or SuiteOptions()
    if not tasks and not suites:
        tasks = default_tasks(source)
    pretrained = teacher_beside(source, teacher, say)
    if pretrained is not None and teacher is None and source.is_converted and not _asks_for_teacher(baselines):
        try:
            load_config(pretrained)
        except ModelError as error:
            say(alone(error))
            pretrained = None
    beside_it = with_defaults(source, pretrained, baselines)
    systems = find_systems(source, pretrained, beside_it, dtype)
    if len(systems) > 1 and NONE not in baselines:
        say(
            f"scoring {len(systems)} models: {', '.join(system.info.name for system in systems)}; each takes about as "
            "long, and --baseline none scores the model alone"
        )
    rows = held_out_rows(source) if HELD_OUT in tasks else None
    # Without the teacher: two evaluations are of the same rows whatever they were compared with.
    digests = {} if rows is None else {HELDOUT: HeldOut(rows, None).digest}
    # Names first, then data, then models, so that an error is reported before anything takes time.
    chosen = choose_tasks(tasks, suites, options.include)
    tokenizer = load_tokenizer(source)
    # One copy for all that compare with the teacher, and then for the teacher's own scores.
    reference = None if pretrained is None else cache(partial(load_model, pretrained, dtype=_reference_dtype(dtype)))
    if options.teacher is None and reference is not None:
        options = replace(options, teacher=reference)
    with processes.first_goes_ahead():  # what it fetches, the others find
        built = build_suites(chosen, tokenizer, options)
    loaders = {system.info.name: system.load for system in systems}
    if reference is not None and source.is_converted and "teacher" in loaders:
        loaders["teacher"] = _held_or_loaded(reference, loaders["teacher"])
    processes.from_the_first(
        partial(_check_room, loaders, tokenizer, built, limit=limit, seed=options.seed, store=store, report=report)
    )
    beside = None
    if rows is not None and reference is not None:
        try:
            beside = reference()
        except ModelError as error:
            if teacher is not None or loaders.keys() & _OF_TEACHER:
                raise
            say(alone(error))
    scores = score_systems(
        loaders,
        tokenizer,
        built,
        rows=rows,
        teacher=beside,
        limit=limit,
        seed=options.seed,
        batch_size=batch_size,
        store=store,
        progress=progress,
        say=say,
    )
    return Results(
        model=source.name,
        systems=[system.info for system in systems],
        scores=scores,
        command=command,
        limit=limit,
        digests={**digests, **{task.name: task.digest for task in built}},
    )


def _check_room(
    loaders: Mapping[str, Loader],
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    limit: float | None,
    seed: int,
    store: Store | None,
    report: Path | None,
) -> None:
    """Refuses disks that clearly have no room, before a model is loaded. What is kept already takes none."""
    if report is not None:
        check_space(report, nbytes_to_keep(loaders, tasks, tokenizer, limit=limit, seed=seed))
    if store is not None:
        new = nbytes_to_keep(loaders, tasks, tokenizer, limit=limit, seed=seed, store=store)
        if new:
            check_space(store.folder, new)


def score_systems(
    systems: Mapping[str, Loader],
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    rows: Rows | Mapping[str, Any] | None,
    teacher: PreTrainedModel | None,
    limit: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    store: Store | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, SystemScores]:
    """Scores systems one after the other, so that one of them is in memory at a time (and `teacher`).

    Args:
        systems: name -> how to load it.
        rows: held-out rows, or None to leave them out.
        teacher: the reference of the divergence on the rows.
        limit, seed, store, progress: as `runner.run` takes them.
    """
    scores = {}
    if rows is not None:
        tasks = [HeldOut(rows, teacher), *tasks]
    for number, (name, load) in enumerate(systems.items(), start=1):
        say(f"evaluating {name} ({number} of {len(systems)})")
        results = []
        if tasks:
            results = run(
                {name: load},
                tasks,
                tokenizer,
                limit=limit,
                seed=seed,
                batch_size=batch_size,
                store=store,
                progress=progress,
            )[name]
        held_out = [one for one in results if one.task == HELD_OUT]
        others = [one for one in results if one.task != HELD_OUT]
        scores[name] = SystemScores(others, row_scores(held_out) if held_out else None)
    return scores


def default_tasks(source: Source) -> list[str]:
    """Default tasks: the held-out rows if there are some, otherwise the core suite."""
    if source.kind == "folder" and (Path(source.reference) / f"{HELD_OUT}.safetensors").is_file():
        return [HELD_OUT]
    from linearize.evaluation.tasks.tasks import available_tasks

    return list(available_tasks("core"))


def held_out_rows(source: Source) -> dict[str, Any]:
    """The rows that fine-tuning kept apart.

    Raises:
        DataError: the folder has none.
    """
    path = Path(source.reference) / f"{HELD_OUT}.safetensors"
    if source.kind != "folder" or not path.is_file():
        raise DataError(f"{source.name}: has no held-out rows; only what `linearize finetune` wrote has them")
    rows: dict[str, Any] = load_file(path)
    return rows


def _asks_for_teacher(baselines: Sequence[str]) -> bool:
    return bool(_OF_TEACHER & set(baselines))


def with_defaults(source: Source, teacher: Source | None, baselines: Sequence[str]) -> list[str]:
    """The named baselines, and `DEFAULTS` as far as the model has them."""
    named = [name for name in baselines if name != NONE]
    if NONE in baselines or not source.is_converted:
        return named
    return [*(name for name in DEFAULTS if _has(name, source, teacher)), *named]


def _has(name: str, source: Source, teacher: Source | None) -> bool:
    """True if a model has a baseline. Without a recurrence the model itself would be the one without it."""
    if name in _OF_TEACHER:
        return teacher is not None
    if not source.is_converted or "recurrence" not in BRANCHES_OFF[name]:
        return source.is_converted
    return any(mixer.get("recurrence") != "none" for mixer in load_config(source).mixers)


def find_systems(source: Source, teacher: Source | None, baselines: Sequence[str], dtype: str = "auto") -> list[System]:
    """The baselines in the order of `BASELINES`, and the model last.

    Args:
        teacher: None where it is gone; `all` leaves out the baselines that are made of it.

    Raises:
        DataError: an unknown baseline, or one that needs a converted model or a teacher where there is none.
        ModelError: a model that cannot be read or converted.
    """
    for name in baselines:
        if name not in BASELINES and name != ALL:
            raise DataError(f"unknown baseline {name!r}; {hint_for(name, [*BASELINES, ALL, NONE], most=1)}")
        if name in BRANCHES_OFF and not source.is_converted:
            raise DataError(f"baseline {name}: {source.name} is not converted, so it has no branches to turn off")
        if name in _OF_TEACHER and teacher is None:
            raise DataError(f"baseline {name}: needs the teacher of {source.name}; name it with --teacher ID|FOLDER")

    wanted = [name for name in BASELINES if name in baselines or (ALL in baselines and _has(name, source, teacher))]
    maker = _Maker(source, teacher, dtype)
    # A model that is not converted is the teacher itself.
    found = [maker.system(name) for name in wanted if name != "teacher" or source.is_converted]
    return [*found, maker.system("model" if source.is_converted else "teacher")]


class _Maker:
    """Makes the systems of one model."""

    def __init__(self, source: Source, teacher: Source | None, dtype: str) -> None:
        self.source, self.dtype = source, dtype
        self._teacher = teacher
        self.config = load_config(source)
        self.base = self.config.text_config if source.is_converted else self.config
        self.mixers: list[dict[str, Any]] = self.config.mixers if source.is_converted else []

    @property
    def teacher(self) -> Source:
        assert self._teacher is not None  # noqa: S101 - find_systems makes no system of a teacher that is gone
        return self._teacher

    def system(self, name: str) -> System:
        if name == "teacher":
            return self._whole(name, BASELINES[name], self.teacher, [])
        if name == "model":
            return self._whole(name, self.source.name, self.source, self.mixers)
        if name in BRANCHES_OFF:
            off = BRANCHES_OFF[name]
            load = self._stamped(lambda: silence(cast("Any", self._load(self.source)), off), self.source, name)
            return System(self._info(name, BASELINES[name], self.mixers), load)
        check_convertible(self.base, self.teacher)
        mixers = self.mixers or _default_mixers(self.base)
        if name == "window_bytes":
            mixers = equal_bytes(self.base, mixers, self._held())
        bare = window_sections(mixers)
        widths = sorted({m["window"] for m in mixers if m["window"] is not None})
        about = f"{BASELINES[name]}: {' to '.join(dict.fromkeys((str(widths[0]), str(widths[-1]))))} tokens"
        load = self._stamped(
            # Never in int8, even if the model that is scored is the teacher itself.
            lambda: window_baseline(load_model(self.teacher, dtype=_reference_dtype(self.dtype)), mixers, self._coding),
            self.teacher,
            [bare, _files(self.source)] if self._codes else bare,
        )
        return System(self._info(name, about, bare), load)

    @property
    def _codes(self) -> bool:
        return any(mixer["memory_dtype"] != "auto" for mixer in self.mixers)

    @cached_property
    def _coding(self) -> dict[str, Tensor]:
        """The model's scale and shift of keys, read once for both windows."""
        return coding_of(self._load(self.source)) if self._codes else {}

    def _whole(self, name: str, about: str, source: Source, mixers: list[dict[str, Any]]) -> System:
        info = self._info(name, about, mixers)
        if source == self.source:
            dtype = str(self._held()).removeprefix("torch.") if self.dtype == "auto" else self.dtype
            info = replace(info, checkpoint=checkpoint_digest(source) if source.is_converted else None, dtype=dtype)
        return System(info, self._stamped(lambda: self._load(source), source, None))

    def _load(self, source: Source) -> PreTrainedModel:
        return load_model(source, dtype=self.dtype if source == self.source else _reference_dtype(self.dtype))

    def _stamped(self, load: Loader, source: Source, variant: Any) -> StampedLoader:
        files = _files(source)
        if files is None:
            return StampedLoader(load, None)
        stamp = json.dumps([files, self.dtype, variant], sort_keys=True)
        return StampedLoader(load, hashlib.sha256(stamp.encode()).hexdigest())

    def _held(self) -> torch.dtype:
        """The dtype of keys and values."""
        if self.dtype in DTYPES:
            return DTYPES[self.dtype]
        found = torch.float32 if self.source.kind == "gguf" else self.config.dtype
        return found if isinstance(found, torch.dtype) else torch.float32

    def _info(self, name: str, about: str, mixers: list[dict[str, Any]]) -> SystemInfo:
        return describe(name, about, self.base, mixers, self._held())


def _held_or_loaded(reference: Any, load: Any) -> StampedLoader:
    """`load`, but the model that the cached function `reference` has already loaded where it has."""
    return StampedLoader(lambda: reference() if reference.cache_info().currsize else load(), load.stamp)


def _reference_dtype(dtype: str) -> str:
    """Dtype of the systems that others are compared with; it is never int8, so that the difference includes the cost of
    int8."""
    return "auto" if dtype == "int8" else dtype


def describe(name: str, about: str, base: Any, mixers: Sequence[Any], dtype: torch.dtype) -> SystemInfo:
    """A system with the bytes that it remembers a sequence in.

    Args:
        base: the pretrained model's configuration.
        mixers: its mixer sections; none for the pretrained model itself.
        dtype: of keys and values.
    """
    try:
        layers = memory_bytes(base, mixers, dtype)
    except ValueError:  # an architecture of which we do not know how it remembers
        return SystemInfo(name, about)
    return SystemInfo(name, about, sum(layer[0] for layer in layers), sum(layer[1] for layer in layers))


def _files(source: Source) -> list[Any] | None:
    """Names, sizes and times of a model's files; they show, without reading them, if the files have changed."""
    path = Path(source.reference)
    if source.kind == "hub":
        commit = getattr(load_config(source), "_commit_hash", None)
        return None if commit is None else [source.reference, commit]
    files = [path] if source.kind == "gguf" else sorted(file for file in path.iterdir() if file.is_file())
    return [[str(file), (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]


def _default_mixers(config: Any) -> list[dict[str, Any]]:
    return [asdict(mixer) for mixer in mixers_for(MixerSpec(), family_of(config).layers(config))]
