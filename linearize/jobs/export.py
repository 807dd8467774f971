"""`linearize export`: write a checkpoint as a folder for sharing."""

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
    """Write a checkpoint as a folder for sharing: shards, the model's code, and a model card with measurements.

    Args:
        folder: a checkpoint of `convert`, `finetune` or `run`.
        output: the folder to write.
        name: the model's name on its card; default: the folder's name.
        base: the Hub id of the base model, if that was loaded from a file or a folder.
        licence: the licence of the base model; default: read from the base model.
        report: the folder that `linearize eval --report` or `run` wrote; found automatically if `run` wrote `folder`.
        dtype: the dtype of the weights: `auto`, `float32`, `bfloat16` or `float16`.
        weights: `int8` or `int4` quantizes the linear layers; the card states the measured loss.
        outliers: the share of a layer's inputs that is then not quantized; default: 1/64.
        text: the text of that measurement: a file, a data set of the Hub, or `self`, which the model generates.
            Default: the rows that fine-tuning held out, or `self` if there are none.
        tokens: the length of the text; one half chooses the inputs to keep, the other half measures.
        shard_size: the maximum size of a file of weights.
        overwrite: replace the output if it exists.
        say: called with each progress line.

    Raises:
        ModelError: `folder` is not a converted checkpoint.
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
