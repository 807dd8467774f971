"""Tasks of lm-eval by name: those of our suites from shipped definitions, all others from lm-eval's own files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.api.group import Group

from linearize.errors import DataError
from linearize.evaluation.tasks.harness import Average, LmEvalTask, metric_name
from linearize.evaluation.tasks.index import included_names, quiet, task_manager
from linearize.evaluation.tasks.leaf import Prompting
from linearize.evaluation.tasks.suites import BENCHMARKS
from linearize.evaluation.tasks.tasks import FEWSHOT_SEED, build_tasks, task_definitions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from linearize.evaluation.tasks.suites import SuiteOptions

# lm-eval's name of a shipped task, where it has another one.
_STOCK = {"lambada": "lambada_openai", "wikitext2": "wikitext"}


def suite_tasks(names: Sequence[str], tokenizer: Any, options: SuiteOptions) -> list[LmEvalTask]:
    """Tasks by name.

    A shipped name stands for lm-eval's own task, with documents from the Hub, if it is to have solved examples and the
    shipped definition has no split for them.

    Raises:
        DataError: an unknown task, data that cannot be read, or a missing chat template.
    """
    if options.chat and getattr(tokenizer, "chat_template", None) is None:
        raise DataError("--apply-chat-template: the model's tokenizer has no chat template; leave the option out")
    prompting = Prompting(options.chat, options.system)
    definitions = task_definitions()
    own = [name for name in names if name in definitions and not _included(name, options)]
    if options.num_fewshot and options.data is None:
        own = [name for name in own if definitions[name].config.get("fewshot_split") is not None]
    others = [name for name in names if name not in own]
    tasks = lm_eval_tasks(own, options.data, options.num_fewshot, prompting=prompting) if own else []
    return [*tasks, *(_stock_tasks(others, tokenizer, options, prompting) if others else [])]


def lm_eval_tasks(
    names: Sequence[str], data: Path | None = None, shots: int | None = None, **options: Any
) -> list[LmEvalTask]:
    """Tasks of shipped definitions, in that order.

    Args:
        names: of `linearize.evaluation.tasks.tasks.available_tasks`.
        data: the folder with the tasks' files; None reads them from the Hub.
        shots: solved examples before each question; None for the task's own number.
        options: of `LmEvalTask`.

    Raises:
        DataError: an unknown task, or data that cannot be read.
    """
    with quiet():
        built = build_tasks(names, data, shots)
    tasks = []
    for name, groups in built.items():
        one = task_definitions()[name]
        leaves = {group or name: task for group, task in groups.items()}
        tasks.append(LmEvalTask(name, leaves, suite=one.suite, headline=one.headline, label=one.group, **options))
    return tasks


def _included(name: str, options: SuiteOptions) -> bool:
    return options.include is not None and name in included_names(options.include)


def _stock_tasks(
    names: Sequence[str], tokenizer: Any, options: SuiteOptions, prompting: Prompting
) -> Iterator[LmEvalTask]:
    metadata: dict[str, Any] = {"pretrained": tokenizer.name_or_path}
    if options.lengths:
        metadata["max_seq_lengths"] = list(options.lengths)
    with quiet():
        manager = task_manager(options.include, metadata)
        for name in names:
            for found in _load(manager, name if name in manager.task_index else _STOCK.get(name, name)):
                yield from _tasks(found, options, prompting)


def _load(manager: Any, name: str) -> list[Any]:
    """The task or the group of that name, or the tasks of a tag.

    Raises:
        DataError: its documents cannot be loaded, or a package that it needs is not installed.
    """
    try:
        loaded = manager.load([name])
    except ModuleNotFoundError as error:
        raise DataError(
            f"task {name}: needs the Python package {error.name}, which is not installed: pip install {error.name}"
        ) from error
    except Exception as error:  # tasks bring code of their own, and with it errors of any kind
        told = " ".join(str(error).split())[:300]
        raise DataError(
            f"task {name}: cannot be loaded ({type(error).__name__}: {told}); its documents come from the Hub: check "
            "the network, or name a YAML task on local files with --include-path DIR"
        ) from error
    groups = loaded.get("groups") or {}
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _tasks(found: Any, options: SuiteOptions, prompting: Prompting) -> Iterator[LmEvalTask]:
    """A task; a group with figures of its own as one; any other group's members."""
    if not isinstance(found, Group):
        yield LmEvalTask(
            found.task_name, {found.task_name: _ready(found, options)}, suite=BENCHMARKS, prompting=prompting
        )
        return
    if not found.has_aggregation:
        for member in found:
            yield from _tasks(member, options, prompting)
        return
    averages = []
    for one in found.aggregate_metric_list or []:
        filters = one.filter_list
        for metric in [one.metric] if filters is None else [metric_name(one.metric, name) for name in filters]:
            averages.append(Average(metric, one.weight_by_size, any_filter=filters is None))
    leaves = {task.task_name: _ready(task, options) for task in found.get_all_tasks()}
    yield LmEvalTask(found.name, leaves, suite=BENCHMARKS, averages=averages, prompting=prompting)


def _ready(task: Any, options: SuiteOptions) -> Any:
    """The task with the chosen number of solved examples; as in lm-eval, a task that sets 0 keeps it.

    Raises:
        DataError: the task needs images or sound, or runs the code that a model writes.
    """
    name = task.task_name
    if getattr(task, "MULTIMODAL", False):
        raise DataError(f"task {name}: asks about images or sound, which a language model cannot read; leave it out")
    if getattr(task, "UNSAFE_CODE", False) and not options.unsafe_code:
        raise DataError(f"task {name}: runs the code that the model writes; allow it with --confirm-run-unsafe-code")
    if options.num_fewshot is not None and task.config.num_fewshot != 0:
        task.set_config(key="num_fewshot", value=options.num_fewshot)
    elif task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return task
