"""Handle SIGINT and SIGTERM: a command unwinds and removes partial output; training finishes its step and saves
first."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal interrupted the process. A BaseException like KeyboardInterrupt, so `except Exception` does not catch
    it.

    Args:
        told: a one-line message for the user.
    """

    def __init__(self, signum: int, told: str = "") -> None:
        super().__init__(told)
        self.signum = signum

    @property
    def status(self) -> int:
        """The conventional exit status: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


@contextmanager
def unwinding() -> Iterator[None]:
    """SIGTERM raises `Interrupted` in the block, as SIGINT raises KeyboardInterrupt, so staged output is removed.

    A second SIGTERM during the cleanup is ignored. The previous handlers are restored afterwards. Outside the main
    thread the block is a no-op, because only the main thread may set handlers.
    """

    def stop(signum: int, _: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Interrupted(signum)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Postponed:
    """A context that records the first SIGINT or SIGTERM in `signum`; a second one takes effect immediately.

    Args:
        together: this is one of several processes. A terminal and the launcher can both signal each process, so signals
            within one second count as one.
    """

    def __init__(self, *, together: bool = False) -> None:
        self.signum: int | None = None
        self._wait, self._noted = 1.0 if together else 0.0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Postponed:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # Signals that the parent process ignored (nohup) stay ignored.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, _: Any) -> None:
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._noted = signum, now
        elif now - self._noted >= self._wait:
            raise Interrupted(signum)
