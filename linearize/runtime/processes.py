"""Run one training or evaluation in several processes, one per GPU. Each process has a share of a step's rows, or of
the items, and all or a part of the model.

The rows of an optimizer step do not depend on the number of processes, so losses equal those of a single process. Only
the first process writes files and prints.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from linearize.errors import LinearizeError
from linearize.runtime.interruption import Postponed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from torch import nn

T = TypeVar("T")

_ASKED_FOR = "LINEARIZE_PROCESSES"  # set by accelerate's configuration

_PATIENCE = (1.0, 5.0)
"""After one process has failed: seconds until the others get SIGTERM, and then until SIGKILL."""

_LONGEST_WAIT = timedelta(days=7)  # the others wait while the first process downloads data or writes text


def count() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Index of this process."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """True in the process that writes files and prints."""
    return rank() == 0


def seconds_between_lines() -> float:
    """The time between two lines of progress: short on a terminal, long in a log."""
    return 5.0 if sys.stderr.isatty() else 60.0


def join() -> bool:
    """Join the process group, and select this process's GPU.

    Returns:
        True if accelerate's configuration shards the model (FSDP2).

    Raises:
        LinearizeError: the configuration uses an unsupported engine.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise LinearizeError("DeepSpeed is not supported; take FSDP with fsdp_version: 2, which splits the same things")
    splits = _is_set("ACCELERATE_USE_FSDP")
    if splits and os.environ.get("FSDP_VERSION", "1") != "2":
        raise LinearizeError("FSDP 1 is not supported; set fsdp_version: 2 in accelerate's configuration")
    if (asked := int(os.environ.get(_ASKED_FOR, count()))) != count():
        raise LinearizeError(
            f"accelerate's configuration asks for {asked} processes, but it starts several on CPUs by MPI alone, which "
            f"is not supported: pass --launch {asked} instead of the file, or on several machines use torchrun"
        )
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # `sharding.shard` shards the model, on CPUs too
    if count() > 1:
        import torch
        from accelerate import PartialState

        met = PartialState(cpu=not torch.cuda.is_available(), timeout=_LONGEST_WAIT).num_processes
        if met != count():
            raise LinearizeError(f"{count()} processes were started, but {met} can work together on this device")
    return splits


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")


def most(number: int) -> int:
    """The maximum of `number` over all processes."""
    if count() == 1:
        return number
    import torch
    from accelerate import PartialState

    of_all = torch.tensor(number, device=PartialState().device)
    torch.distributed.all_reduce(of_all, torch.distributed.ReduceOp.MAX)
    return int(of_all)


def everyones(mine: T) -> list[T]:
    """All-gather: the values of all processes, by rank."""
    if count() == 1:
        return [mine]
    import torch

    gathered: list[Any] = [None] * count()
    torch.distributed.all_gather_object(gathered, mine)
    return gathered


def from_the_first(find: Callable[[], T]) -> T:
    """Call `find` only in the first process and broadcast its result; the other processes wait.

    Raises:
        LinearizeError: in the first process, if `find` raised it; only this process prints it.
        SystemExit: in the other processes, if `find` raised in the first.
    """
    if count() == 1:
        return find()
    found, problem = None, None
    if is_first():
        try:
            found = find()
        except LinearizeError as error:
            problem = error
    found, failed = everyones((found, problem is not None))[0]
    if failed:
        raise problem or SystemExit(1)
    return cast("T", found)


def leave() -> None:
    """Destroy the process group after a barrier. This joins its threads, because an interpreter that exits while one
    runs may abort with exit status 134.
    """
    if count() > 1:
        import torch

        if torch.distributed.is_initialized():
            wait()
            torch.distributed.destroy_process_group()


def wait() -> None:
    """A barrier for all processes."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
    """Run the block in the first process alone, then in the others, which find its files on disk."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


@contextlib.contextmanager
def in_turns() -> Iterator[None]:
    """Run the block in one process of a machine after another, so only one needs the block's memory at a time."""
    turn, of = (
        int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    )
    for _ in range(turn):
        wait()
    yield
    for _ in range(of - turn):
        wait()


def mean_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over processes, for parameters without a wrapper that does so."""
    if count() > 1:
        import torch

        for parameter in parameters:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= count()


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `linearize` with `arguments` in `processes` processes on this machine. Returns the exit status of the first
    process, or of the one that failed.

    If one fails, the others are stopped. SIGINT and SIGTERM are forwarded, so each process finishes its step and saves.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(processes):
            environment = {
                **os.environ,
                "WORLD_SIZE": str(processes),
                "RANK": str(number),
                "LOCAL_RANK": str(number),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
            command = [sys.executable, "-m", "linearize", *arguments]
            started.append(subprocess.Popen(command, env=environment))  # noqa: S603 - the current command
        with Postponed() as signals:
            passed_on = False
            while True:
                ended = [process.poll() for process in started]
                failed = [code for code in ended if code]
                if failed and not (passed_on and None in ended):
                    return 128 - failed[0] if failed[0] < 0 else failed[0]
                if all(code == 0 for code in ended):
                    return 0
                if signals.signum is not None and not passed_on:
                    passed_on = True
                    for process in started:
                        process.send_signal(signals.signum)
                time.sleep(0.1)
    finally:
        # A collective without its peer may hang, and training defers a SIGTERM to the end of its step.
        for seconds, stop in zip(_PATIENCE, (subprocess.Popen.terminate, subprocess.Popen.kill), strict=True):
            until = time.monotonic() + seconds
            while time.monotonic() < until and None in [process.poll() for process in started]:
                time.sleep(0.05)
            for process in started:
                stop(process)  # a no-op for processes that have ended


def launch_with(configuration: Path, arguments: Sequence[str]) -> int:
    """The same with `accelerate launch` and its configuration file, on each of several machines.

    Raises:
        LinearizeError: the file cannot be read.
    """
    environment = dict(os.environ)
    # If accelerate cannot start the requested number of processes, it silently starts one.
    if (asked := asked_for(configuration)) is not None:
        environment[_ASKED_FOR] = str(asked)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration), "-m"]
    command += ["linearize", *arguments]
    return subprocess.run(command, env=environment, check=False).returncode  # noqa: S603 - the current command


def asked_for(configuration: Path) -> int | None:
    """The total number of processes in accelerate's configuration file, over all machines; None if it is not set.

    Raises:
        LinearizeError: the file cannot be read.
    """
    import yaml  # lazy, because every command imports this module

    try:
        settings = yaml.safe_load(configuration.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise LinearizeError(f"{configuration}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(settings, dict):
        raise LinearizeError(f"{configuration}: is no configuration of accelerate; `accelerate config` writes one")
    number = settings.get("num_processes")
    return number if isinstance(number, int) and number > 0 else None
