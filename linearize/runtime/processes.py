"""One training or evaluation in several processes, one to a GPU: each has its share of a step's rows, or of the items,
and the whole model or a part of it.

What an optimizer step sees is what the recipe says, whatever the number of processes, so losses are those of one. The
first process writes and speaks; the others compute.
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

import yaml

from linearize.errors import LinearizeError
from linearize.runtime.interruption import Postponed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from torch import nn

T = TypeVar("T")

_ASKED_FOR = "LINEARIZE_PROCESSES"  # as accelerate's configuration has it

_PATIENCE = (1.0, 5.0)
"""Seconds after one process failed in which the others may end by themselves, and then upon SIGTERM, before SIGKILL."""

_LONGEST_WAIT = timedelta(days=7)  # while the first process alone fetches data or writes text


def count() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Index of this process."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """True in the process that writes files and prints."""
    return rank() == 0


def join() -> bool:
    """Meets the other processes, and takes the GPU of this one.

    Returns:
        whether accelerate's configuration wants the model split (FSDP2).

    Raises:
        LinearizeError: they were started for an engine that is not supported.
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
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # `sharding.shard` does it, on CPUs as well
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
    """The largest of what the processes give, the same in all of them."""
    if count() == 1:
        return number
    import torch
    from accelerate import PartialState

    of_all = torch.tensor(number, device=PartialState().device)
    torch.distributed.all_reduce(of_all, torch.distributed.ReduceOp.MAX)
    return int(of_all)


def everyones(mine: T) -> list[T]:
    """The values of all processes, in order of their index."""
    if count() == 1:
        return [mine]
    import torch

    gathered: list[Any] = [None] * count()
    torch.distributed.all_gather_object(gathered, mine)
    return gathered


def from_the_first(find: Callable[[], T]) -> T:
    """Calls `find` in the first process alone and returns its result in all of them; the others wait for it.

    Raises:
        LinearizeError: `find` raised it, in the first, which alone prints it.
        SystemExit: the same, in the others.
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
    """Ends the process group, once all processes are here and nothing is shared any more. Its threads are joined: an
    interpreter that ends while one runs may be aborted, and its exit status is 134 then.
    """
    if count() > 1:
        import torch

        if torch.distributed.is_initialized():
            wait()
            torch.distributed.destroy_process_group()


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
    """The first process runs the block alone, then the others do; what it left on disk they find there."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


@contextlib.contextmanager
def in_turns() -> Iterator[None]:
    """The processes of a machine run the block one after another, so that its memory is needed once."""
    turn, of = (
        int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    )
    for _ in range(turn):
        wait()
    yield
    for _ in range(of - turn):
        wait()


def mean_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages over the processes what each has found, where no wrapper does."""
    if count() > 1:
        import torch

        for parameter in parameters:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= count()


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Runs `linearize` with `arguments` in so many processes on this machine, and returns the first one's exit status,
    or that of the one that failed.

    One that fails ends the others. SIGINT and SIGTERM are passed on, so that they end their step and save.
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
            started.append(subprocess.Popen(command, env=environment))  # noqa: S603 - this very command again
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
        # A collective whose other side is gone may hang, and training only notes a SIGTERM until its step ends.
        for seconds, stop in zip(_PATIENCE, (subprocess.Popen.terminate, subprocess.Popen.kill), strict=True):
            until = time.monotonic() + seconds
            while time.monotonic() < until and None in [process.poll() for process in started]:
                time.sleep(0.05)
            for process in started:
                stop(process)  # a no-op for those that have ended


def launch_with(configuration: Path, arguments: Sequence[str]) -> int:
    """The same by `accelerate launch`, from its configuration file: on each of several machines.

    Raises:
        LinearizeError: the file cannot be read.
    """
    environment = dict(os.environ)
    # Where accelerate cannot start as many it starts one, and says nothing.
    if (asked := asked_for(configuration)) is not None:
        environment[_ASKED_FOR] = str(asked)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration), "-m"]
    command += ["linearize", *arguments]
    return subprocess.run(command, env=environment, check=False).returncode  # noqa: S603 - this very command again


def asked_for(configuration: Path) -> int | None:
    """The number of processes in accelerate's configuration file, on all machines together; None where it names none.

    Raises:
        LinearizeError: the file cannot be read.
    """
    try:
        settings = yaml.safe_load(configuration.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise LinearizeError(f"{configuration}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(settings, dict):
        raise LinearizeError(f"{configuration}: is no configuration of accelerate; `accelerate config` writes one")
    number = settings.get("num_processes")
    return number if isinstance(number, int) and number > 0 else None
