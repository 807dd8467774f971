"""Several systems on the same items: the teacher, the training-free baseline, the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from linearize.conversion.convert import check_convertible, mixers_for, window_baseline
from linearize.conversion.source import Source, load_config, load_model, load_tokenizer, teacher_of
from linearize.errors import DataError
from linearize.evaluation.heldout import score_rows
from linearize.evaluation.report import SystemScores
from linearize.model.modeling import family_of
from linearize.recipe import MixerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from linearize.evaluation.heldout import Rows

HELD_OUT = "held_out"
"""The task of scoring the rows that fine-tuning kept apart, which lie in the checkpoint's folder."""
BASELINES = ("teacher", "window")

Loader = Callable[[], "PreTrainedModel"]


def evaluate(
    source: Source,
    tasks: Sequence[str],
    *,
    baselines: Sequence[str] = (),
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, SystemScores]:
    """Scores `source` and its baselines.

    Args:
        source: a converted checkpoint, or any other model, which then is its own teacher.
        tasks: names of `available_tasks`, and `held_out`; empty for `default_tasks(source)`.
        baselines: `teacher` and `window` (the teacher, with the model's window and sinks and nothing beyond).

    Raises:
        DataError: an unknown task or baseline, or data that cannot be read.
        ModelError: a model that cannot be read.
    """
    for baseline in baselines:
        if baseline not in BASELINES:
            raise DataError(f"unknown baseline {baseline!r}; there are: {', '.join(BASELINES)}")
    tasks = list(tasks) or default_tasks(source)
    rows = held_out_rows(source) if HELD_OUT in tasks else None
    _check_tasks(tasks, data)
    teacher = teacher_of(source) if source.is_converted else source
    systems: dict[str, Loader] = {}
    if "teacher" in baselines and source.is_converted:
        systems["teacher"] = lambda: load_model(teacher, dtype=dtype)
    if "window" in baselines:
        config = load_config(source)
        check_convertible(load_config(teacher), teacher)
        mixers = config.mixers if source.is_converted else _default_mixers(config)
        systems["window"] = lambda: window_baseline(load_model(teacher, dtype=dtype), mixers)
    systems["model" if source.is_converted else "teacher"] = lambda: load_model(source, dtype=dtype)
    reference = load_model(teacher, dtype=dtype) if rows is not None else None
    return score_systems(
        systems,
        load_tokenizer(source),
        tasks,
        rows=rows,
        teacher=reference,
        data=data,
        limit=limit,
        batch_size=batch_size,
        say=say,
    )


def score_systems(
    systems: Mapping[str, Loader],
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    rows: Rows | Mapping[str, Any] | None,
    teacher: PreTrainedModel | None,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, SystemScores]:
    """Scores systems one after the other, so that one of them is in memory at a time (and `teacher`).

    Args:
        systems: name -> how to load it.
        rows: held-out rows, or None to leave them out.
        teacher: what the divergence on the rows is measured against.
    """
    names = [task for task in tasks if task != HELD_OUT]
    scores = {}
    for system, load in systems.items():
        say(f"evaluating {system}")
        model = load()
        held_out = score_rows(model, rows, teacher=teacher, batch_size=min(batch_size, 4)) if rows is not None else None
        results = []
        if names:
            from linearize.evaluation.harness import run_tasks  # lm-eval takes seconds to import

            results = run_tasks(model, tokenizer, names, data=data, limit=limit, batch_size=batch_size)
        scores[system] = SystemScores(results, held_out)
        del model
    return scores


def default_tasks(source: Source) -> list[str]:
    """What is measured if nobody says: the held-out rows where there are some, otherwise every task."""
    if source.kind == "folder" and (Path(source.reference) / f"{HELD_OUT}.safetensors").is_file():
        return [HELD_OUT]
    from linearize.evaluation.tasks import available_tasks

    return list(available_tasks())


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


def _check_tasks(tasks: Sequence[str], data: Path | None) -> None:
    """Finds a wrong name, or missing data, before any model is loaded."""
    names = [task for task in tasks if task != HELD_OUT]
    if names:
        from linearize.evaluation.tasks import build_tasks

        build_tasks(names, data)


def _default_mixers(config: Any) -> list[dict[str, Any]]:
    return [asdict(mixer) for mixer in mixers_for(MixerSpec(), family_of(config).layers(config))]
