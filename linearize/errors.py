"""The errors that a user can cause, each one line: what is wrong, where, and what to do next.

Everything the package raises on purpose derives from `LinearizeError`; the command line prints its text and exits 1.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class LinearizeError(Exception):
    """Base of every expected error; its text is a single line meant for the user."""


class ModelError(LinearizeError):
    """A model cannot be found, read, or converted."""


class RecipeError(LinearizeError):
    """A recipe, or a `--set` on top of it, is not valid."""


class DataError(LinearizeError):
    """Training or evaluation data cannot be found or read."""


class OutputError(LinearizeError):
    """A result cannot be written where the user asked for it."""


class StateError(LinearizeError):
    """A saved state cannot be read, or does not belong to the model at hand."""


class VerificationError(LinearizeError):
    """A model cannot be verified as asked, or it did not pass."""


class HubError(LinearizeError):
    """The Hub cannot be reached, or does not do as asked; or what should go there should not."""


def counted(number: int, one: str, more: str) -> str:
    """The number with the words for it: `1 entry`, `1,200 entries`."""
    return f"{number:,} {one if number == 1 else more}"


def hint_for(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """Ends an error about an unknown name: `did you mean A or B?` with up to `most` close names, or else all names."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=most)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(choices)}"


def is_out_of_memory(error: BaseException | None) -> bool:
    """True if an allocation failed, by the error or by its cause. On a CPU torch raises a plain RuntimeError, and torch
    is not imported here."""
    while error is not None:
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
            return True
        text = str(error).lower()
        if isinstance(error, RuntimeError) and any(part in text for part in _NO_MEMORY):
            return True
        error = error.__cause__
    return False


_NO_MEMORY = ("allocate memory", "not enough memory", "out of memory", "invalid buffer size")
