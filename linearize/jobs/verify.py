"""`linearize verify`: load a converted model and run every check on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linearize.errors import ModelError
from linearize.jobs.checks import check_dtype, check_numbers
from linearize.sources.source import find_source, has_tokenizer, load_config, load_model, load_tokenizer
from linearize.verification import verify as run_checks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from linearize.verification import Verification


def verify(
    model: str | Path,
    *,
    tokens: int | None = None,
    steps: int | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    tick: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Check that a converted model computes one function, however it is called; `failed` names the failed checks.

    Args:
        model: the model to check.
        tokens: the length of the rows of random tokens; None means three of the widest window, at least 192.
        steps: single decode steps of the drift check; None means the length of two rows.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        trust_remote_code: run Python code from the model's repository.
        tick: called with a check's name, the number of steps done, and the total.

    Raises:
        ModelError: the model cannot be read, or was not converted.
        VerificationError: `tokens` do not fill a window and its sinks.
    """
    check_dtype(dtype)
    check_numbers(1, tokens=tokens, steps=steps)
    source = find_source(str(model), trust_remote_code=trust_remote_code)
    if load_config(source).model_type != "linearized":
        raise ModelError(
            f"{source.name}: is not a converted model; convert it first: linearize convert {model} -o converted"
        )
    special = load_tokenizer(source).all_special_ids if has_tokenizer(source) else ()
    loaded: Any = load_model(source, dtype=dtype)
    return run_checks(loaded, source, dtype=dtype, special=special, tokens=tokens, steps=steps, tick=tick)
