"""transformers' Trainer for runs that meet trouble: whole checkpoints, signals, bad batches, too little memory."""

from __future__ import annotations

import shutil
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback

from linearize.errors import LinearizeError, ModelError, is_out_of_memory
from linearize.runtime import processes
from linearize.runtime.files import telling
from linearize.runtime.interruption import Interrupted, Postponed
from linearize.training.checkpoints import checkpoints, manifest, newest, seal
from linearize.training.soundness import NotFinite, first_unsound, gradient_norm, unsound_gradients

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

_KEPT_CHECKPOINTS = 2


class GuardedTrainer(Trainer):
    """A Trainer whose losses are sums over rows, divided by what counts in the whole optimizer step.

    Args:
        may_skip: optimizer steps that may be passed over because a loss or gradient in them is not finite.
        say: told what a person should know.

    Attributes:
        skipped: how many were; kept in checkpoints.
    """

    def __init__(
        self, *args: Any, may_skip: int = 0, say: Callable[[str], None] = lambda _: None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.may_skip, self.say = may_skip, say
        self.skipped = 0
        self._rows = self.args.per_device_train_batch_size
        self._of_step: list[dict[str, Any]] = []
        self._bad = False

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As the Trainer's; after SIGINT or SIGTERM the step is finished and saved first.

        Raises:
            Interrupted: a signal asked for it.
            LinearizeError: a loss or gradient that is not finite, too little memory, or a full disk.
        """
        if resume_from_checkpoint is not None:
            self.skipped = int((manifest(Path(resume_from_checkpoint)) or {}).get("skipped", 0))
        with Postponed(together=processes.count() > 1) as signals:
            self.add_callback(stopper := _Stopper(signals))
            try:
                done = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            finally:
                self.remove_callback(stopper)
        if signals.signum is not None:
            name = signal.Signals(signals.signum).name
            step = f"step {self.state.global_step} of {self.state.max_steps}"
            told = f"{name} after {step}, which is saved; go on with --resume"
            raise Interrupted(signals.signum, told if processes.is_first() else "")
        return done

    def checked(self, loss: Tensor) -> Tensor:
        """The loss, if it is finite, here and in all other processes.

        Raises:
            NotFinite: it is not; `training_step` sees to that.
        """
        sound = bool(torch.isfinite(loss))
        if processes.most(int(not sound)):
            raise NotFinite("the loss of another process is no number" if sound else f"the loss became {loss.item()}")
        return loss

    def run_again(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """The forward pass that `compute_loss` made of these inputs, for the sake of who watches it."""
        model(**inputs, use_cache=False)

    def share_gradients(self) -> None:
        """Called with the gradients of a whole step, where a loss does not go through what shares them out."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch, in as many parts as memory wants.

        Where it does not hold the rows, their number is halved, from here on, and the optimizer step begins again: how
        far the failed backward pass got cannot be told.
        """
        self._of_step.append(inputs)
        again = False
        while True:
            try:
                for earlier in self._of_step[:-1] if again else ():
                    self._in_parts(model, earlier, num_items_in_batch)
                return self._in_parts(model, inputs, num_items_in_batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if processes.count() > 1:  # the others are waiting for gradients of rows that were not computed
                    raise ModelError(
                        "out of memory in one of several processes; lower the stage's micro_batch"
                    ) from error
                self._halve(error)
            # Not in the handler, where the traceback still holds what did not fit.
            model.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            again = True

    def _in_parts(self, model: nn.Module, inputs: dict[str, Any], counted: Any) -> Tensor:
        rows = len(next(iter(inputs.values())))
        total = torch.zeros((), device=self.args.device)
        for start in range(0, rows, self._rows):
            part = {name: value[start : start + self._rows] for name, value in inputs.items()}
            try:
                total = total + super().training_step(model, part, counted)
            except NotFinite as error:
                given = self._prepare_inputs(part)
                inner = self.accelerator.unwrap_model(model)
                where = first_unsound(inner, partial(self.run_again, inner, given))
                self._pass_over(f"{error} at step {self.state.global_step + 1}, first in {where}")
        return total

    def _halve(self, error: Exception) -> None:
        if self._rows == 1:
            raise ModelError(
                "out of memory with one row at a time; lower the stage's length, or set gradient_checkpointing: true"
            ) from error
        self._rows //= 2
        steps = self.args.train_batch_size // self._rows * self.args.gradient_accumulation_steps
        self.say(
            f"out of memory: from here on {self._rows} rows at a time and {steps} passes to an optimizer step, which "
            f"stays the same; micro_batch: {self._rows} would spare the attempt"
        )

    def _pass_over(self, what: str) -> None:
        """Notes that this optimizer step is to be passed over.

        Raises:
            LinearizeError: as many were as may be.
        """
        if self.skipped < self.may_skip or self._bad:
            self._bad = True
            return
        good = newest(Path(self.args.output_dir))
        kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        before = f" ({self.skipped} such steps were passed over before)" if self.skipped else ""
        raise LinearizeError(
            f"{what}{before}; {kept}; lower lr or mixer_lr, or let skip_bad_batches pass over some such steps"
        )

    def _sound_norm(self, model: nn.Module) -> Tensor:
        """The norm of the gradients; of a step to be passed over none are left, and an optimizer changes nothing."""
        inner = self.accelerator.unwrap_model(model)
        self.share_gradients()
        norm = gradient_norm(model)
        if not self._bad and not bool(torch.isfinite(norm)):
            self._pass_over(
                f"the gradient became {float(norm)} at step {self.state.global_step + 1}, in {unsound_gradients(inner)}"
            )
        if self._bad:
            model.zero_grad(set_to_none=True)
            self.skipped += 1
            norm = torch.zeros_like(norm)
            self.say(f"step {self.state.global_step + 1} was passed over ({self.skipped} of at most {self.may_skip})")
        self._bad = False
        self._of_step.clear()
        return norm

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = self._sound_norm(model)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._sound_norm(model) if grad_norm is None else grad_norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with the steps that were passed over."""
        super().log({**logs, "skipped": self.skipped} if self.may_skip else logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Whole or not at all: written under another name, listed, synced, then renamed."""
        final = Path(self.args.output_dir)
        staging = final / ".partial"
        if processes.is_first():
            shutil.rmtree(staging, ignore_errors=True)
        processes.wait()
        self.args.output_dir = str(staging)
        good = newest(final)
        kept = f"go on from {good.name} with --resume" if good else "there is no earlier checkpoint"
        try:
            with telling(final, f"the checkpoint after step {self.state.global_step} is lost; {kept}"):
                try:
                    super()._save_checkpoint(model, trial)
                finally:
                    self.args.output_dir = str(final)
                processes.wait()  # each has written its random numbers
                for checkpoint in staging.iterdir() if processes.is_first() else ():
                    seal(checkpoint, final / checkpoint.name, skipped=self.skipped)
        finally:
            if processes.is_first():
                shutil.rmtree(staging, ignore_errors=True)
        for old in checkpoints(final)[:-_KEPT_CHECKPOINTS] if processes.is_first() else ():
            shutil.rmtree(old, ignore_errors=True)
        processes.wait()


class _Stopper(TrainerCallback):
    """Saves and stops after the step in which a signal came."""

    def __init__(self, signals: Postponed) -> None:
        self.signals = signals

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        signum = processes.most(self.signals.signum or 0)  # all of them stop after the same step
        if signum:
            self.signals.signum = signum
            control.should_save = control.should_training_stop = True
        return control
