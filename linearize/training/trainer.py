"""transformers' Trainer with a teacher, two learning rates, whole checkpoints and a line of progress."""

from __future__ import annotations

import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from linearize.data.rows import NO_LOSS
from linearize.errors import LinearizeError, RecipeError
from linearize.runtime import processes
from linearize.sources.documents import documents_apart
from linearize.training.adapters import base_of, is_own_parameter
from linearize.training.align import Alignment
from linearize.training.guarded import GuardedTrainer
from linearize.training.objective import TopK, counted_positions, token_losses, top_k_of
from linearize.training.optimizers import build_optimizer, rate_at
from linearize.training.sharding import is_sharded, part_like, split_state, whole, whole_state
from linearize.training.teachers import KeptLogits
from linearize.training.windows import WindowDropout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from linearize.data.rows import Rows
    from linearize.recipe import Stage

_TRAINED = "trained.safetensors"


class RowDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Packed rows, one to an item; `real` is False for a repeated row, see `StageTrainer.get_batch_samples`."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rows = self.rows
        return {
            "input_ids": rows.input_ids[index],
            "labels": rows.labels[index],
            "position_ids": rows.position_ids[index],
            "row": torch.tensor(index),
            "real": torch.tensor(True),
        }


class StageTrainer(GuardedTrainer):
    """Trains one stage of a recipe.

    Args:
        model: the student; parameters that require gradients are trained, and only they are saved in checkpoints.
        teacher: wanted by the objectives `distill`, which also takes what it said to `rows`, and `align`.
        stage: the recipe's stage.
        rows: what to train on.
        folder: where checkpoints go.
        log: called after every optimizer step with its figures.
        say: told what a person should know.
        reporting: what the Trainer is told of trackers, see `tracker_arguments`; none, if left out.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: PreTrainedModel | KeptLogits | None,
        stage: Stage,
        rows: Rows,
        folder: Path,
        seed: int,
        log: Callable[[dict[str, Any]], None],
        say: Callable[[str], None] = lambda _: None,
        reporting: Mapping[str, Any] | None = None,
    ) -> None:
        self.stage, self.teacher, self.rows = stage, teacher, len(rows)
        inner: Any = model
        student = base_of(model)
        self.windows = WindowDropout(student, stage.hide_window)
        self.alignment = None
        if isinstance(teacher, PreTrainedModel) and "align" in stage.weights:
            self.alignment = Alignment(student, teacher, stage.length, checkpointing=stage.gradient_checkpointing)
        elif stage.gradient_checkpointing:
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        elif student.is_gradient_checkpointing:
            inner.gradient_checkpointing_disable()  # an earlier stage's
        super().__init__(
            model=model,
            args=stage_arguments(stage, len(rows), folder, seed, reporting),
            train_dataset=RowDataset(rows),
            callbacks=[_Reporter(stage, len(rows), log), self.windows],
            may_skip=stage.skip_bad_batches,
            say=say,
        )
        # transformers prints its own log lines through this one.
        from transformers.trainer_callback import PrinterCallback

        self.remove_callback(PrinterCallback)
        # The loss below is a sum divided by the tokens of the whole optimizer step: nothing is to be divided again.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        self.windows.draw()
        labels, rows, real = (inputs.pop(name) for name in ("labels", "row", "real"))
        if self.alignment is not None:
            losses = torch.where(real, self._aligned(inputs), 0)
            return self.checked(losses.sum() / self._rows_of_step() * processes.count())
        outputs = model(**inputs, use_cache=False)
        teacher = self._teacher_on(inputs, labels, rows) if "distill" in self.stage.weights else None
        total = token_losses(outputs.logits, labels, teacher, self.stage.weights, self.stage.temperature)
        counted = num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != NO_LOSS).sum()
        loss = total / torch.as_tensor(counted).clamp_min(1)
        if num_items_in_batch is not None:
            loss = loss * processes.count()  # it counts the tokens of all processes, whose gradients are averaged
        loss = self.checked(loss)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """As the Trainer's. In the last step of an epoch accelerate repeats rows until all processes have equally many
        (`even_batches`); those carry no loss, so that the step is that of one process."""
        first = self.state.global_step % _epoch_steps(self.stage, self.rows) * self.args.gradient_accumulation_steps
        return super().get_batch_samples(self._marked(epoch_iterator, first), num_batches, device)

    def _marked(self, batches: Iterator[dict[str, Tensor]], first: int) -> Iterator[dict[str, Tensor]]:
        """This process's batches of an epoch from number `first` on. Batches go to the processes in turns, and repeated
        rows come after all others."""
        size = self.args.per_device_train_batch_size
        for number, batch in enumerate(batches, first):
            labels = batch["labels"]
            start = (number * processes.count() + processes.rank()) * size
            real = torch.arange(start, start + len(labels), device=labels.device) < self.rows
            yield {**batch, "labels": labels.masked_fill(~real[:, None], NO_LOSS), "real": real}

    def _rows_of_step(self) -> int:
        """Rows of the current optimizer step, in all processes together."""
        before, after = (tokens_after(self.stage, self.rows, self.state.global_step + n) for n in (0, 1))
        return (after - before) // self.stage.length

    def run_again(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        if self.alignment is not None:
            self._aligned(inputs)
        else:
            super().run_again(model, {name: inputs[name] for name in ("input_ids", "position_ids")})

    def _aligned(self, inputs: dict[str, Any]) -> Tensor:
        assert self.alignment is not None  # noqa: S101 - the callers have looked
        beyond = self.state.global_step < math.ceil(self.stage.beyond * self.state.max_steps)
        return self.alignment.losses(inputs["input_ids"], inputs["position_ids"], beyond=beyond)

    def _teacher_on(self, inputs: dict[str, Any], labels: Tensor, rows: Tensor) -> Tensor | TopK | None:
        """The teacher's outputs on the same rows."""
        if self.teacher is None:
            return None
        if isinstance(self.teacher, KeptLogits):
            return self.teacher.of(rows, labels.device)
        with torch.no_grad():
            apart = documents_apart(self.teacher, inputs["position_ids"])
            logits: Tensor = self.teacher(**inputs, **apart, use_cache=False).logits
            if self.stage.top_k is None:
                return logits
            return top_k_of(logits.flatten(0, 1)[counted_positions(labels)], self.stage.top_k, self.stage.temperature)

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        self.optimizer: torch.optim.Optimizer | None
        if self.optimizer is None:
            self.optimizer = stage_optimizer(self.model, self.stage)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        self.lr_scheduler: Any
        if self.lr_scheduler is None:
            rate = partial(rate_at, schedule=self.stage.schedule, steps=num_training_steps, warmup=self.stage.warmup)
            self.lr_scheduler = LambdaLR(optimizer or self.create_optimizer(), rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def share_gradients(self) -> None:
        if self.alignment is not None:  # its layers run one by one, without the wrapper that averages gradients
            processes.mean_gradients(p for p in self.model.parameters() if p.requires_grad)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what is trained; all processes have to be here, and the first one writes."""
        save_trained(self.accelerator.unwrap_model(self.model), Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(model or self.model, Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None  # noqa: S101 - for the type checker
        state = whole_state(self.optimizer.state_dict())
        if processes.is_first():
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not is_sharded(self.model) or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None  # noqa: S101 - for the type checker
        kept, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        self.optimizer.load_state_dict(split_state(kept, self.optimizer))
        self.lr_scheduler.load_state_dict(schedule)


def stage_optimizer(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """The optimizer that a stage names, over the parameters of `model` that require gradients."""
    own: list[nn.Parameter] = []
    pretrained: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (own if is_own_parameter(name) else pretrained).append(parameter)
    return build_optimizer(stage, pretrained, own)


def stage_arguments(
    stage: Stage, rows: int, folder: Path, seed: int, reporting: Mapping[str, Any] | None = None
) -> TrainingArguments:
    """The Trainer's arguments for a stage over so many rows.

    Raises:
        RecipeError: the rows of a step cannot be shared out among the processes.
    """
    rows_per_step = _rows_per_step(stage)
    if rows_per_step % processes.count():
        raise RecipeError(
            f"batch_tokens / length is {rows_per_step} rows a step, which {processes.count()} processes cannot share "
            "evenly; start as many as divide them"
        )
    rows_per_step //= processes.count()
    micro = math.gcd(stage.micro_batch, rows_per_step)
    steps = total_steps(stage, rows)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows_per_step // micro,
        max_steps=steps,
        learning_rate=stage.lr,
        max_grad_norm=stage.clip,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=stage.save_every or max(1, math.ceil(steps / 10)),
        **(reporting or {"report_to": []}),
        use_cpu=not torch.cuda.is_available(),  # or several processes without a GPU would not meet
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
    )
    # With several GPUs in sight the Trainer would split batches by threads (DataParallel), teacher and all.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def total_steps(stage: Stage, rows: int) -> int:
    """Optimizer steps of a stage over so many rows; the last step of an epoch may not be full, and counts."""
    whole, part = divmod(stage.epochs, 1)
    return max(1, round(whole) * _epoch_steps(stage, rows) + math.ceil(round(part * rows, 6) / _rows_per_step(stage)))


def tokens_after(stage: Stage, rows: int, steps: int) -> int:
    """Tokens of the rows that were read in so many steps, over and over where there are several epochs."""
    epochs, rest = divmod(steps, _epoch_steps(stage, rows))
    return (epochs * rows + min(rest * _rows_per_step(stage), rows)) * stage.length


def _epoch_steps(stage: Stage, rows: int) -> int:
    return math.ceil(rows / _rows_per_step(stage))


def _rows_per_step(stage: Stage) -> int:
    return stage.batch_tokens // stage.length


def whole_trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are being trained, whole and on the CPU; all processes have to be here."""
    return {n: whole(p.detach()).cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}


def set_trained(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Gives the parameters that are being trained other values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(part_like(values[name], parameter))


def save_trained(model: nn.Module, folder: Path) -> None:
    """Writes the parameters that are being trained; all processes have to be here, and the first one writes."""
    trained = whole_trained(model)
    if processes.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained, folder / _TRAINED)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Reads back what `save_trained` wrote.

    Raises:
        LinearizeError: the checkpoint does not fit the model.
    """
    saved = load_file(folder / _TRAINED)
    trained = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    if {n: x.shape for n, x in saved.items()} != trained:
        raise LinearizeError(f"{folder}: the checkpoint is of another recipe; start again without --resume")
    set_trained(model, saved)


class _Reporter(TrainerCallback):
    """Collects the figures of each step and hands them on."""

    def __init__(self, stage: Stage, rows: int, log: Callable[[dict[str, Any]], None]) -> None:
        self.stage, self.rows, self.log = stage, rows, log
        self.started, self.first_step = time.monotonic(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        seconds = time.monotonic() - self.started
        done = state.global_step - self.first_step
        tokens, before = (tokens_after(self.stage, self.rows, step) for step in (state.global_step, self.first_step))
        speed = (tokens - before) / seconds if seconds > 0 else 0.0
        self.log(
            {
                "step": state.global_step,
                "steps": state.max_steps,
                "loss": logs["loss"],
                "grad_norm": float(logs.get("grad_norm", math.nan)),
                "lr": logs.get("learning_rate"),
                "tokens": tokens,
                "tokens_per_second": speed,
                "seconds": seconds,
                **({"skipped": logs["skipped"]} if "skipped" in logs else {}),
                "seconds_left": seconds / max(done, 1) * (state.max_steps - state.global_step),
            }
        )


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """One more line of a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


class ProgressLine:
    """One line that is rewritten on a terminal, and now and then a line of its own where it is not one."""

    def __init__(self, every_seconds: float = 20.0) -> None:
        self.terminal, self.every, self.last = sys.stderr.isatty(), every_seconds, -math.inf

    def show(self, text: str, *, final: bool = False) -> None:
        """Shows `text`; `final` ends the line."""
        now = time.monotonic()
        if self.terminal:
            sys.stderr.write(f"\r\x1b[2K{text}" + ("\n" if final else ""))
        elif final or now - self.last >= self.every:
            self.last = now
            sys.stderr.write(text + "\n")
        sys.stderr.flush()
