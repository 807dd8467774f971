"""Progress of an evaluation: one line that is overwritten on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

# Seconds between two lines.
ON_TERMINALS = 0.2
ELSEWHERE = 60.0


class ProgressLine:
    """Items done, rate and time left of the task at hand, on stderr; see `runner.Progress`.

    Args:
        stream: the output; None is stderr.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self._at: tuple[str, str] | None = None
        self._started, self._first, self._told = 0.0, 0, 0.0
        self._width = 0

    def __call__(self, system: str, task: str, done: int, total: int) -> None:
        now = time.monotonic()
        if (system, task) != self._at:
            self._at, self._started, self._first = (system, task), now, done
            self._told = now  # the first line tells a rate already
            return
        terminal = self.stream.isatty()
        if now - self._told >= (ON_TERMINALS if terminal else ELSEWHERE):
            self._told = now
            self._say(self._line(now, done, total), terminal)
        if done == total:
            self.clear()

    def clear(self) -> None:
        """Remove the line."""
        if self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self.stream.flush()
            self._width = 0

    def _line(self, now: float, done: int, total: int) -> str:
        system, task = self._at or ("", "")
        rate = (done - self._first) / max(now - self._started, 1e-9)
        words = f"{system} {task}: {done:,} of {total:,} items"
        if rate > 0:
            pace = f"{rate:.1f} a second" if rate >= 1 else f"{1 / rate:.1f} s each"
            words += f", {pace}, {duration((total - done) / rate)} left"
        return words

    def _say(self, words: str, terminal: bool) -> None:
        if terminal:
            self.stream.write("\r" + words.ljust(self._width))
            self._width = len(words)
        else:
            self.stream.write(words + "\n")
        self.stream.flush()


def duration(seconds: float) -> str:
    """`95.0` as `1 min 35 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
