"""Time LoRA steps of the converted model and of the teacher, on copies that share the frozen weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from linearize.benchmark.running import Run, in_turns, peak_bytes, refusal, told
from linearize.benchmark.subjects import Subject, sharing
from linearize.data.rows import NO_LOSS, Document, Rows, pack
from linearize.errors import is_out_of_memory
from linearize.recipe import Recipe, Stage, load_recipe
from linearize.runtime.memory import PeakMemory
from linearize.training.adapters import add_adapters, choose_trained, is_own_parameter
from linearize.training.memory import training_memory
from linearize.training.objective import token_losses
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
            # Where it ran out, the traceback that held what had been allocated is gone by now.
            torch.cuda.empty_cache()
            row["skipped"] = "a step ran out of memory; take fewer --layers, a smaller --batches or a shorter --train"
            continue
        row["peak_bytes"], runs[subject.name] = peak_bytes(subject, peak), step
    in_turns(runs, rows, repeats, batch)
    say(told(rows, tokens, batch))
    return list(rows.values())


class Step(Run):
    """An optimizer step as `finetune` makes it under `objective: sft`: forward, cross-entropy over all positions,
    backward, the optimizer, and gradients cleared.

    The subject stays as it is: adapters are put on a copy of its modules, which shares what is frozen and has
    parameters of the layer, which are trained too, of its own.
    """

    def __init__(self, subject: Subject, recipe: Recipe, rows: Rows) -> None:
        self.subject, self.stage, device = subject, recipe.stages[0], subject.model.device
        self.student = add_adapters(sharing(subject.model, apart=is_own_parameter), recipe.lora).train()
        choose_trained(self.student, self.stage.train)
        self.optimizer = stage_optimizer(self.student, self.stage)
        self.inputs = {"input_ids": rows.input_ids.to(device), "position_ids": rows.position_ids.to(device)}
        self.labels = rows.labels.to(device)
        self.counted = int((rows.labels[:, 1:] != NO_LOSS).sum())

    @torch.enable_grad()
    def __call__(self) -> int:
        self._loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.labels.shape[1]

    def _loss(self) -> torch.Tensor:
        # The logits end here: held during the backward pass they would be the largest tensor of the step.
        logits = self.student(**self.inputs, use_cache=False).logits
        return token_losses(logits, self.labels, None, self.stage.weights) / self.counted


def random_rows(vocabulary: int, batch: int, tokens: int) -> Rows:
    """Packed rows of random tokens. Each is one document, the longest past that attention can have in it, which the
    teacher reads by its causal kernel: several to a row would need a mask."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
    return pack([Document(ids, torch.ones_like(ids)) for ids in drawn], tokens)


def default_recipe(batch: int, tokens: int) -> Recipe:
    """The default recipe's adapters and optimizer, under cross-entropy alone."""
    recipe = load_recipe("default")
    size = {"length": tokens, "micro_batch": batch, "batch_tokens": batch * tokens}
    stage: Stage = recipe.stages[0].model_copy(update={"objective": "sft", **size})
    return recipe.model_copy(update={"stages": [stage]})


def _warm(subject: Subject, recipe: Recipe, rows: Rows) -> Step | None:
    """A step that was made once, or None where memory did not hold it."""
    try:
        step = Step(subject, recipe, rows)
        step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    return step


@torch.enable_grad()  # it is counted by a backward pass
def _refusal(subjects: Sequence[Subject], recipe: Recipe) -> str | None:
    """Why no subject makes a step of that length, by what a step of the converted model takes beside the weights.

    On a CPU the system would end the process; on a GPU the allocator says so itself. Nothing is told of models that
    cannot be counted.
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
