"""One task object of lm-eval: the prompts and requests of its documents, one by one."""

from __future__ import annotations

import json
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
from lm_eval.api.samplers import FirstNSampler

from linearize.evaluation.tasks.tasks import FEWSHOT_SEED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from linearize.evaluation.tasks.lm import LinearizeLM


class Prompting(NamedTuple):
    """Form of the prompts.

    Attributes:
        chat: render prompts by the tokenizer's chat template, with solved examples as turns.
        system: a system message, or with no chat template a text before every prompt.
    """

    chat: bool = False
    system: str | None = None


class Leaf:
    """One task object of lm-eval, and its documents.

    Args:
        name: of the task, or of the group of its documents.
        task: with its number of solved examples and their seed.
    """

    def __init__(self, name: str, task: Any) -> None:
        self.name, self.task = name, task
        # lm-eval maps `process_docs` over the documents whenever `eval_docs` is read.
        self.documents = task.task_docs if hasattr(task, "task_docs") else list(task.eval_docs)
        self.shots = task.config.num_fewshot or 0
        self._contexts: list[Any] = []

    def content(self) -> str:
        """All that prompts and metrics are made of, as text: settings, documents, and those of solved examples."""
        examples = list(self.task.fewshot_docs()) if self.shots else []
        parts = [self.name, _config(self.task), list(self.documents), examples]
        return json.dumps(parts, sort_keys=True, default=_named)

    def requests(self, at: int, lm: LinearizeLM, prompting: Prompting) -> list[Any]:
        """The requests of lm-eval's `build_all_requests` for one document."""
        document, template = self.documents[at], lm.apply_chat_template if prompting.chat else None
        built = self.task.construct_requests(
            doc=document,
            ctx=self._context(at, template, prompting),
            metadata=(self.task.config.task, at, self.task.config.repeats),
            apply_chat_template=prompting.chat,
            chat_template=template,
        )
        return built if isinstance(built, list) else [built]

    def filter(self, requests: list[Any]) -> None:
        """Applies the task's filters to the responses of these requests."""
        self.task._instances = requests
        self.task.apply_filters()
        self.task._instances = None

    def results(self, at: int, responses: list[Any]) -> dict[str, Any]:
        """The task's metrics of one document."""
        with _seeded(FEWSHOT_SEED + at):
            found: dict[str, Any] = self.task.process_results(self.documents[at], responses)
        return found

    def _context(self, at: int, template: Any, prompting: Prompting) -> Any:
        if not self.shots or isinstance(getattr(self.task, "sampler", None), FirstNSampler):
            return self._made(at, template, prompting)
        # One generator draws the examples of one document after the other.
        while len(self._contexts) <= at:
            self._contexts.append(self._made(len(self._contexts), template, prompting))
        return self._contexts[at]

    def _made(self, at: int, template: Any, prompting: Prompting) -> Any:
        document = self.documents[at]
        return self.task.fewshot_context(
            document,
            num_fewshot=self.shots,
            system_instruction=prompting.system,
            apply_chat_template=prompting.chat,
            fewshot_as_multiturn=True,
            chat_template=template,
            gen_prefix=self.task.doc_to_prefix(document),
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's and NumPy's generators start anew inside, because a task's checks may draw from them: IFEval's replaces
    a letter to count that is none, such as `#`, by one at random."""
    before, before_numpy = random.getstate(), numpy.random.get_state()
    random.seed(seed)
    numpy.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
        numpy.random.set_state(before_numpy)


def _config(task: Any) -> dict[str, Any]:
    """A task's settings, without the places of its files."""
    config = dict(task.dump_config())
    metadata = config.get("metadata")
    if isinstance(metadata, dict):
        config["metadata"] = {
            key: value for key, value in metadata.items() if key not in ("config_source", "pretrained")
        }
    return config


def _named(value: Any) -> str:
    """A function by its name: its address changes from process to process."""
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else str(value)
