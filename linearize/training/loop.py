"""The training loop of one stage.

    for each step:
        take this process's share of the step's rows
        count the tokens that carry loss, in all processes together
        for each micro-batch:  loss = sum over its tokens / that count;  backward
        stop, or skip the step, if the loss or the gradient is not finite
        clip;  update at the step's learning rate
        log;  score held-out rows;  write a checkpoint

The loss and the gradient of a step do not depend on how its rows are split into micro-batches and processes.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from linearize.data.rows import NO_LOSS
from linearize.errors import DataError, LinearizeError, ModelError, is_out_of_memory
from linearize.evaluation.tasks.hidden import logits_at
from linearize.runtime import processes
from linearize.runtime.interruption import Interrupted, Postponed
from linearize.training.adapters import base_of
from linearize.training.align import Alignment
from linearize.training.checkpoints import Progress, load_training, newest, save_training
from linearize.training.objective import Counted, TopK, counted, token_losses, top_k_of
from linearize.training.optimizers import rate_at, stage_optimizer
from linearize.training.sharding import is_sharded
from linearize.training.soundness import first_unsound, gradient_norm, unsound_gradients
from linearize.training.steps import Batch, Steps
from linearize.training.teachers import KeptLogits, logits_of
from linearize.training.windows import WindowDropout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from linearize.data.rows import Rows, TrainingData
    from linearize.recipe import Stage
    from linearize.training.trackers import Trackers


class StageLoop:
    """Trains one stage of a recipe.

    Args:
        model: the student; parameters that require gradients are trained, and only they are saved in checkpoints.
        teacher: needed by the objectives `distill`, which also takes its stored logits on the rows, and `align`.
        folder: of the stage's checkpoints.
        log: called in each step with its figures.
        say: called with lines for the user.

    Attributes:
        progress: steps done and skipped, and the best held-out loss; kept in checkpoints.

    Raises:
        DataError: the stage keeps its best weights or has patience, and no held-out token carries loss.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: PreTrainedModel | KeptLogits | None,
        stage: Stage,
        data: TrainingData,
        folder: Path,
        seed: int,
        log: Callable[[dict[str, Any]], None],
        say: Callable[[str], None] = lambda _: None,
        trackers: Trackers | None = None,
    ) -> None:
        self.model, self.teacher, self.stage, self.data = model, teacher, stage, data
        self.folder, self.seed, self.log, self.say, self.trackers = folder, seed, log, say, trackers
        self.steps, self.progress, self.micro_batch = Steps(stage, len(data.train), seed), Progress(), stage.micro_batch
        scored = bool((data.held_out.labels[:, 1:] != NO_LOSS).any())
        if not scored and (stage.keep == "best" or stage.patience is not None):
            raise DataError("keep: best and patience: no held-out token carries loss; raise data.held_out")
        self.eval_every = self.steps.eval_every(len(data.held_out) if scored else 0)
        inner: Any = model
        student = base_of(model)
        self.windows = WindowDropout(student, stage.hide_window)
        self.alignment = None
        if isinstance(teacher, PreTrainedModel) and "align" in stage.weights:
            self.alignment = Alignment(student, teacher, stage.length, checkpointing=stage.gradient_checkpointing)
        elif stage.gradient_checkpointing:
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        elif student.is_gradient_checkpointing:
            inner.gradient_checkpointing_disable()  # an earlier stage had enabled it
        # A layer whose window is hidden, or a mixer without a recurrence to ask, leaves parameters unused.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[unused],
            log_with=list(trackers.names) if trackers else None, project_dir=trackers.folder if trackers else None,
        )  # fmt: skip
        # `align` runs the layers one by one, so no wrapper sees a forward pass; FSDP2 has split the model already.
        wrapped = processes.count() > 1 and self.alignment is None and not is_sharded(model)
        self.network = self.accelerator.prepare_model(model) if wrapped else model
        self.optimizer = stage_optimizer(model, stage)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]

    def train(self, resume: Path | None = None) -> None:
        """Train to the end of the stage, from the checkpoint `resume` if it is given.

        SIGINT and SIGTERM take effect after the current step, and a checkpoint is written first.

        Raises:
            Interrupted: a signal was received.
            LinearizeError: a loss or gradient is not finite, memory does not hold one row, or the disk is full.
        """
        set_seed(self.seed)
        if resume is not None:
            self.progress = load_training(resume, self.model, self.optimizer)
        began, first, training = time.monotonic(), self.progress.step, 0.0
        with Postponed(together=processes.count() > 1) as signals, self.windows, self._tracked():
            while not self.is_done:
                started = time.monotonic()
                figures = self.train_step()
                self.progress.step += 1
                training += time.monotonic() - started
                figures |= self._held_out()
                figures |= self._speed(first, training, time.monotonic() - began)
                self.log(figures)
                self.accelerator.log({f"train/{k}": v for k, v in figures.items()}, step=self.progress.step)
                stopped = processes.most(signals.signum or 0)  # all processes stop after the same step
                is_best = self.progress.best_step == self.progress.step
                if stopped or self.is_done or is_best or self.progress.step % self.steps.save_every == 0:
                    save_training(self.folder, self.model, self.optimizer, self.progress, done=self.is_done)
                if stopped:
                    step = f"step {self.progress.step} of {self.steps.total}"
                    told = f"{signal.Signals(stopped).name} after {step}, which is saved; go on with --resume"
                    raise Interrupted(stopped, told if processes.is_first() else "")
        self.optimizer.zero_grad()

    @property
    def is_done(self) -> bool:
        """True after the last step, or once held-out loss has not improved for `patience` evaluations."""
        patience = self.stage.patience
        return self.progress.step >= self.steps.total or (patience is not None and self.progress.worse >= patience)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its figures."""
        self.model.train()
        parts, losses = self._backward()
        if self.alignment is not None:
            processes.mean_gradients(p for p in self.model.parameters() if p.requires_grad)
        loss, norm = self._loss_of(losses), gradient_norm(self.model)
        lr = [peak * self._rate() for peak in self.peaks]
        if problem := self._problem(parts, losses, loss, norm):
            self._skip(problem)
            loss, norm = self._loss_of([one.nan_to_num(0, 0, 0) for one in losses]), torch.zeros_like(norm)
        else:
            if self.stage.clip:
                torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.stage.clip, norm)
            for group, rate in zip(self.optimizer.param_groups, lr, strict=True):
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        step = self.progress.step + 1
        figures = {"step": step, "steps": self.steps.total, "loss": float(loss), "grad_norm": float(norm), "lr": lr[0]}
        return {**figures, "skipped": self.progress.skipped} if self.stage.skip_bad_batches else figures

    def micro_loss(self, batch: Batch) -> Tensor:
        """The sum of the losses of a micro-batch: over its tokens, or over its rows under `align`."""
        self.windows.draw()
        if self.alignment is not None:
            return torch.where(batch.real, self._aligned(batch), 0).sum()
        at = counted(batch.labels)
        logits = self._forward(self.network, batch, at)
        teacher = self._teacher_on(batch, at) if "distill" in self.stage.weights else None
        return token_losses(logits, at.targets, teacher, self.stage.weights, self.stage.temperature)

    def _backward(self) -> tuple[list[Batch], list[Tensor]]:
        """Gradients of a step, and the losses of its micro-batches.

        If memory does not hold a micro-batch, its size is halved from here on, and the step begins again, because the
        progress of a failed backward pass is unknown.
        """
        counted = self._counted()
        batch = self._batch(*self.steps.share_of(self.progress.step))
        while True:
            parts, losses = batch.split(self.micro_batch), list[Tensor]()
            try:
                for part in parts:
                    # DDP averages gradients over processes once a step, in the last backward pass.
                    waits = self.network is not self.model and part is not parts[-1]
                    with self.accelerator.no_sync(self.network) if waits else contextlib.nullcontext():
                        loss = self.micro_loss(part) / counted * processes.count()
                        self.accelerator.backward(loss)
                    losses.append(loss.detach())
                return parts, losses
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(len(parts[0].rows), error)
            # Not in the handler, because the traceback still references the tensors.
            self.optimizer.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _loss_of(self, losses: Sequence[Tensor]) -> Tensor:
        """The loss of a step, the same in all processes, from this process's micro-batches."""
        return self.accelerator.reduce(torch.stack(list(losses)).sum(), "mean")  # type: ignore[no-any-return]

    def _forward(self, model: nn.Module, batch: Batch, at: Counted) -> Tensor:
        """The student's logits `[N, V]` at N positions, by `model` or what wraps it."""
        given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        return logits_at(base_of(self.model), at.rows, at.columns, through=model, **given)

    def _aligned(self, batch: Batch) -> Tensor:
        """`[B]`: the losses of the rows under `align`."""
        assert self.alignment is not None  # noqa: S101 - for the type checker; the callers have looked
        beyond = self.progress.step < math.ceil(self.stage.beyond * self.steps.total)
        return self.alignment.losses(batch.input_ids, batch.position_ids, beyond=beyond)

    def _counted(self) -> int:
        """The divisor of a step's loss: tokens with loss in all processes together, or rows under `align`."""
        rows = self.steps.rows_of(self.progress.step)
        if self.alignment is not None:
            return len(rows)
        return max(1, int((self.data.train.labels[rows][:, 1:] != NO_LOSS).sum()))

    def _batch(self, rows: Tensor, real: Tensor, data: Rows | None = None) -> Batch:
        data = data or self.data.train
        labels = data.labels[rows].masked_fill(~real[:, None], NO_LOSS)
        tensors = rows, real, data.input_ids[rows], labels, data.position_ids[rows]
        return Batch(*(x.to(self.accelerator.device) for x in tensors))

    def _teacher_on(self, batch: Batch, at: Counted) -> Tensor | TopK | None:
        """The teacher's logits `[N, V]`, or its most likely tokens, at the same positions."""
        if self.teacher is None:
            return None
        if isinstance(self.teacher, KeptLogits):
            # A repeated row has no positions with loss, so its logits are left out.
            rows = batch.rows[batch.real] if bool(batch.real.any()) else batch.rows
            return self.teacher.of(rows, batch.labels.device)
        with torch.no_grad():
            logits = logits_of(self.teacher, batch.input_ids, batch.position_ids, at)
            return logits if self.stage.top_k is None else top_k_of(logits, self.stage.top_k, self.stage.temperature)

    def _rate(self) -> float:
        """The step's share of the peak learning rates."""
        stage, steps = self.stage, self.steps.total
        return rate_at(self.progress.step, schedule=stage.schedule, steps=steps, warmup=stage.warmup)

    def _problem(self, parts: Sequence[Batch], losses: Sequence[Tensor], loss: Tensor, norm: Tensor) -> str | None:
        """A sentence about values that are not finite, the same in all processes; None if there are none."""
        step, found = self.progress.step + 1, ""
        if not bool(torch.isfinite(loss)):
            bad = next((n for n, one in enumerate(losses) if not bool(torch.isfinite(one))), None)
            part = parts[processes.most(bad or 0)]  # a split model's forward pass needs all processes

            def again() -> Tensor:
                aligns = self.alignment is not None
                return self._aligned(part) if aligns else self._forward(self.model, part, counted(part.labels))

            where = first_unsound(self.model, again)
            if bad is not None:
                found = f"the loss became {float(losses[bad])} at step {step}, first in {where}"
        elif not bool(torch.isfinite(norm)):
            found = f"the gradient became {float(norm)} at step {step}, in {unsound_gradients(self.model)}"
        else:
            return None
        overflow = f"the loss became {float(loss)} at step {step}, as the sum of its rows"
        return next(filter(None, processes.everyones(found)), overflow)

    def _skip(self, problem: str) -> None:
        """Count a skipped step.

        Raises:
            LinearizeError: `skip_bad_batches` steps were skipped before.
        """
        skipped, most = self.progress.skipped, self.stage.skip_bad_batches
        if skipped >= most:
            good = newest(self.folder)
            kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            before = f" ({skipped} such steps were skipped before)" if skipped else ""
            advice = "lower lr or mixer_lr, or let skip_bad_batches skip some such steps"
            raise LinearizeError(f"{problem}{before}; {kept}; {advice}")
        self.progress.skipped += 1
        self.say(f"step {self.progress.step + 1} was skipped ({self.progress.skipped} of at most {most})")

    def _halve(self, rows: int, error: Exception) -> None:
        """Halve the micro-batch, after `rows` rows did not fit."""
        if processes.count() > 1:  # the other processes wait for gradients that were not computed
            raise ModelError("out of memory in one of several processes; lower the stage's micro_batch") from error
        if rows == 1:
            raise ModelError(
                "out of memory with one row at a time; lower the stage's length, or set gradient_checkpointing: true"
            ) from error
        self.micro_batch = rows // 2
        passes = math.ceil(self.steps.per_step / self.micro_batch)
        self.say(
            f"out of memory: from here on {self.micro_batch} rows at a time and {passes} passes to an optimizer step, "
            f"which stays the same; micro_batch: {self.micro_batch} would spare the attempt"
        )

    def _held_out(self) -> dict[str, float]:
        """Losses on held-out rows, if they are due after this step."""
        every, step = self.eval_every, self.progress.step
        if not every or (step % every and step < self.steps.total):
            return {}
        figures = self.evaluate()
        self.progress.note(figures["held_out_loss"], keeps=self.stage.keep == "best")
        return figures

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Losses on the held-out rows, in nats per token.

        Returns:
            `held_out_loss`, the cross-entropy; with a loaded teacher `held_out_kl`, KL(teacher || student); and
            `held_out_objective`, which compares with the training loss, if these two make up the stage's objective.
        """
        held_out, count = self.data.held_out, processes.count()
        teacher = self.teacher if isinstance(self.teacher, PreTrainedModel) else None
        places = torch.arange(math.ceil(len(held_out) / count) * count)[processes.rank() :: count]
        batch = self._batch(places.clamp(max=len(held_out) - 1), places < len(held_out), held_out)
        sums = torch.zeros(3, dtype=torch.float64, device=batch.labels.device)
        # `align` computes no logits, so its micro-batch may be too large for them.
        size = 1 if self.alignment is not None else self.micro_batch
        self.model.eval()
        with self.windows.shown():
            for part in batch.split(size):
                at = counted(part.labels)
                logits = self._forward(self.model, part, at)
                sums[0] += len(at.targets)
                sums[1] += token_losses(logits, at.targets, None, {"sft": 1.0})
                if teacher is not None:
                    told = logits_of(teacher, part.input_ids, part.position_ids, at)
                    sums[2] += token_losses(logits, at.targets, told, {"distill": 1.0})
        tokens, loss, kl = self.accelerator.reduce(sums, "sum").tolist()
        figures = {"held_out_loss": loss / tokens, **({"held_out_kl": kl / tokens} if teacher is not None else {})}
        terms = {"sft": figures["held_out_loss"], "distill": figures.get("held_out_kl")}
        weighted = [(weight, terms.get(name)) for name, weight in self.stage.weights.items()]
        if self.stage.temperature == 1 and all(term is not None for _, term in weighted):
            figures["held_out_objective"] = sum(weight * (term or 0.0) for weight, term in weighted)
        return figures

    def _speed(self, first: int, training: float, passed: float) -> dict[str, float]:
        """Tokens and time; `training` is the seconds in `train_step` since step `first`, `passed` all of them."""
        tokens = self.steps.tokens_after(self.progress.step)
        done, left = self.progress.step - first, 0 if self.is_done else self.steps.total - self.progress.step
        speed = (tokens - self.steps.tokens_after(first)) / max(training, 1e-9)
        return {"tokens": tokens, "tokens_per_second": speed, "seconds": passed, "seconds_left": passed / done * left}

    @contextlib.contextmanager
    def _tracked(self) -> Iterator[None]:
        if self.trackers is not None:
            self.trackers.start(self.accelerator)
        try:
            yield
        finally:
            for tracker in self.accelerator.trackers:  # `end_training` would destroy the process group as well
                tracker.finish()
