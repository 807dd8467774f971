"""The errors that a user can cause. Each message is one line: what is wrong, where, and what to do next.

All deliberate errors of the package derive from `LinearizeError`; the command line prints the text and exits with 1.
"""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class LinearizeError(Exception):
    """Base of every expected error; its text is a single line meant for the user."""


class ModelError(LinearizeError):
    """A model cannot be found, read, or converted."""


class RecipeError(LinearizeError):
    """A recipe, or a `--set` on top of it, is not valid.

    Attributes:
        every: a line for each error of the recipe, if it has several.
    """

    def __init__(self, message: str, *, every: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.every = list(every)


class DataError(LinearizeError):
    """Training or evaluation data cannot be found or read."""


class OutputError(LinearizeError):
    """A result cannot be written where the user asked for it."""


class StateError(LinearizeError):
    """A saved state cannot be read, or does not belong to the model at hand."""


class VerificationError(LinearizeError):
    """A model cannot be verified with these arguments, or it did not pass."""


class HubError(LinearizeError):
    """The Hub cannot be reached or refuses a request, or an upload has content that must not be published."""


def counted(number: int, one: str, more: str) -> str:
    """The number with its noun: `1 entry`, `1,200 entries`."""
    return f"{number:,} {one if number == 1 else more}"


def hint_for(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """The end of an error about an unknown name: `did you mean A or B?` with up to `most` close names, or all names."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=most)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(choices)}"


def check_numbers(least: float, most: float = math.inf, **numbers: float | None) -> None:
    """Refuse NaN, infinities and numbers outside [`least`, `most`]; None passes.

    Raises:
        DataError: with the name of the first such number.
    """
    for name, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise DataError(f"{name} {number}: expected a finite number")
        if number is not None and not least <= number <= most:
            raise DataError(f"{name} {number}: expected {least} " + ("or more" if most == math.inf else f"to {most}"))


SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
"""Short names of dtypes, for suggestions."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """True if the error or one of its causes is a failed allocation. On a CPU torch raises a plain RuntimeError, which
    is recognised by its text; torch is not imported here."""
    while error is not None:
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
            return True
        text = str(error).lower()
        if isinstance(error, RuntimeError) and any(part in text for part in _NO_MEMORY):
            return True
        error = error.__cause__
    return False


_NO_MEMORY = ("allocate memory", "not enough memory", "out of memory", "invalid buffer size")
