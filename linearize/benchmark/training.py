"""Time LoRA steps of the converted model and of the teacher, on copies that share the frozen weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from linearize.benchmark.running import Run, in_turns, peak_bytes, refusal, told
from linearize.benchmark.subjects import Subject, sharing
from linearize.data.rows import Document, Rows, pack
from linearize.errors import is_out_of_memory
from linearize.evaluation.tasks.hidden import logits_at
from linearize.recipe import Recipe, Stage, load_recipe
from linearize.runtime.memory import PeakMemory
from linearize.training.adapters import add_adapters, base_of, choose_trained, is_own_parameter
from linearize.training.memory import training_memory
from linearize.training.objective import counted, token_losses
from linearize.training.optimizers import stage_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def train(
    subjects: Sequence[Subject], batch: int, tokens: int, *, repeats: int, say: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """A row for each subject: tokens per second of optimizer steps on `batch` packed rows of `tokens` each."""
    recipe = default_recipe(batch, tokens)
    documents = random_rows(subjects[0].base.vocab_size, batch, tokens)
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Any]] = {}
    reason = _refusal(subjects, recipe)
    for subject in subjects:
        row: dict[str, Any] = {"kind": "train", "system": subject.name, "batch": batch, "tokens": tokens}
        rows[subject.name] = row
        if reason is not None:
            row["skipped"] = reason
            continue
        with PeakMemory(subject.model.device) as peak:
            step = _warm(subject, recipe, documents)
        if step is None:
            # Here, because the traceback that referred to the allocated tensors is gone by now.
            torch.cuda.empty_cache()
            row["skipped"] = "a step ran out of memory; take fewer --layers, a smaller --batches or a shorter --train"
            continue
        row["peak_bytes"], runs[subject.name] = peak_bytes(subject, peak), step
    in_turns(runs, rows, repeats, batch)
    say(told(rows, tokens, batch))
    return list(rows.values())


class Step(Run):
    """An optimizer step as in `finetune` under `objective: sft`: forward, cross-entropy over all positions, backward,
    optimizer step, and clearing of the gradients.

    The subject does not change: adapters are added to a copy of its modules, which shares the frozen weights and copies
    the mixers' parameters.
    """

    def __init__(self, subject: Subject, recipe: Recipe, rows: Rows) -> None:
        self.subject, self.stage, device = subject, recipe.stages[0], subject.model.device
        self.student = add_adapters(sharing(subject.model, apart=is_own_parameter), recipe.lora).train()
        choose_trained(self.student, self.stage.train)
        self.optimizer = stage_optimizer(self.student, self.stage)
        self.inputs = {"input_ids": rows.input_ids.to(device), "position_ids": rows.position_ids.to(device)}
        self.at = counted(rows.labels.to(device))

    @torch.enable_grad()
    def __call__(self) -> int:
        self._loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.inputs["input_ids"].shape[1]

    def _loss(self) -> torch.Tensor:
        # A local variable: kept during the backward pass, the logits would be the largest tensor of the step.
        model, at = base_of(self.student), self.at
        logits = logits_at(model, at.rows, at.columns, through=self.student, **self.inputs, use_cache=False)
        return token_losses(logits, at.targets, None, self.stage.weights) / len(at.targets)


def random_rows(vocabulary: int, batch: int, tokens: int) -> Rows:
    """Packed rows of random tokens, one document each. One document per row is the most expensive case for attention,
    and lets the teacher use its causal kernel; several would need a mask."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
    return pack([Document(ids, torch.ones_like(ids)) for ids in drawn], tokens)


def default_recipe(batch: int, tokens: int) -> Recipe:
    """The adapters and optimizer of the recipe `window-gla`, with cross-entropy as the only objective."""
    recipe = load_recipe("window-gla")
    size = {"length": tokens, "micro_batch": batch, "batch_tokens": batch * tokens}
    stage: Stage = recipe.stages[0].model_copy(update={"objective": "sft", **size})
    return recipe.model_copy(update={"stages": [stage]})


def _warm(subject: Subject, recipe: Recipe, rows: Rows) -> Step | None:
    """A step after one warm-up call; None if memory was too small."""
    try:
        step = Step(subject, recipe, rows)
        step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    return step


@torch.enable_grad()  # `training_memory` runs a backward pass
def _refusal(subjects: Sequence[Subject], recipe: Recipe) -> str | None:
    """The reason to skip a length, by the memory of a training step of the converted model, weights aside.

    Only on a CPU, because the system would kill the process; on a GPU the allocator raises an error. None if the memory
    of the model cannot be computed.
    """
    subject = next(subject for subject in subjects if subject.converted)
    if subject.model.device.type != "cpu":
        return None
    stage, dtype = recipe.stages[0], str(subject.model.dtype).removeprefix("torch.")
    recipe = recipe.model_copy(update={"dtype": dtype})
    takes = training_memory(subject.model.config, recipe, stage, processes=1)["single"]
    if takes.total is None:
        return None
    return refusal("a step", takes.total - takes.weights, subject.model.device, stage.length)
