"""`linearize export`: write a checkpoint as a folder that is fit to be shared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from linearize.hub.export import export as write_export
from linearize.jobs.checks import check_dtype, check_numbers, quiet, size_in_bytes
from linearize.runtime.files import check_free
from linearize.sources.source import find_source

if TYPE_CHECKING:
    from collections.abc import Callable

    from linearize.hub.export import Exported


def export(
    folder: str | Path,
    output: str | Path,
    *,
    name: str | None = None,
    base: str | None = None,
    licence: str | None = None,
    report: str | Path | None = None,
    dtype: str = "auto",
    weights: str | None = None,
    outliers: float | None = None,
    text: str | None = None,
    tokens: int = 8192,
    shard_size: str = "5GB",
    overwrite: bool = False,
    say: Callable[[str], None] = quiet,
) -> Exported:
    """Writes a checkpoint as a folder that is fit to be shared: shards, carried code, a card with what was measured.

    Args:
        folder: what `convert`, `finetune` or `run` wrote.
        output: the folder to write.
        name: of the model on its card; the folder's, if left out.
        base: the Hub id of the base model, where that came from a file or a folder.
        licence: of the base model; read from it, if left out.
        report: the folder that `linearize eval --report` or `run` wrote; found by itself where `run` made `folder`.
        dtype: of the weights: `auto`, `float32`, `bfloat16` or `float16`.
        weights: `int8` or `int4`, for linear layers of integers; what that costs is measured, and said on the card.
        outliers: share of a layer's inputs that keep their weights then; 1/64 if left out.
        text: what that is measured on: a file, a data set of the Hub, or `self`, which the model writes. If left out,
            the rows that fine-tuning held out, or `self` where there are none.
        tokens: of the text; half of them are read to choose what is kept, the others measure.
        shard_size: the most that one file of weights holds.
        overwrite: replace the output if it exists.
        say: gets lines for the person at the terminal.

    Raises:
        ModelError: `folder` is no converted checkpoint.
        OutputError: the output cannot be written.
        DataError: `report` has no results, or those of another checkpoint; `weights` is unknown; or the text cannot be
            read, or is too short.
    """
    check_dtype(dtype)
    check_numbers(2, tokens=tokens)
    check_numbers(0, 1, outliers=outliers)
    shard_bytes = size_in_bytes("shard_size", shard_size)
    check_free(Path(output), overwrite=overwrite)
    return write_export(
        find_source(str(folder)),
        Path(output),
        name=name,
        base=base,
        licence=licence,
        report=None if report is None else Path(report),
        dtype=dtype,
        weights=weights,
        outliers=outliers,
        text=text,
        tokens=tokens,
        shard_size=shard_bytes,
        overwrite=overwrite,
        say=say,
    )
