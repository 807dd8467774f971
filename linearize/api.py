"""The commands as functions, with the same names and options; `linearize.verify` is `linearize verify`.

Everything public is imported from `linearize` itself, which loads this module when one of the functions is first used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from linearize.conversion.source import find_source, load_config, load_model, load_tokenizer
from linearize.errors import ModelError
from linearize.verification import Verification
from linearize.verification import verify as _verify

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from linearize.hub.export import Exported
    from linearize.hub.push import Parcel
    from linearize.hub.upload import Upload


def _quiet(_: str) -> None:
    """Says nothing."""


def verify(
    model: str | Path,
    *,
    tokens: int | None = None,
    steps: int = 4096,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    tick: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Proves on a converted model that it is one function, however it is called; `failed` names what fails.

    Args:
        model: a folder, or a Hub id.
        tokens: length of the rows of random tokens; None for four of the widest window, at least 256.
        steps: single decode steps of the drift check.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        tick: called with a check's name, the steps it has done, and how many there are.

    Raises:
        ModelError: the model cannot be read, or was not converted.
        VerificationError: `tokens` do not fill a window and its sinks.
    """
    source = find_source(str(model), trust_remote_code=trust_remote_code)
    if load_config(source).model_type != "linearized":
        raise ModelError(
            f"{source.name}: is not a converted model; convert it first: linearize convert {model} -o converted"
        )
    special = load_tokenizer(source).all_special_ids
    loaded: Any = load_model(source, dtype=dtype)
    return _verify(loaded, source, dtype=dtype, special=special, tokens=tokens, steps=steps, tick=tick)


def export(
    folder: str | Path,
    output: str | Path,
    *,
    name: str | None = None,
    base: str | None = None,
    licence: str | None = None,
    report: str | Path | None = None,
    dtype: str = "auto",
    shard_size: str = "5GB",
    overwrite: bool = False,
    say: Callable[[str], None] = _quiet,
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
        shard_size: the most that one file of weights holds.
        overwrite: replace the output if it exists.
        say: gets lines for the person at the terminal.

    Raises:
        ModelError: `folder` is no converted checkpoint.
        OutputError: the output cannot be written.
        DataError: `report` has no results.
    """
    from linearize.hub.export import export as _export

    return _export(
        find_source(str(folder)),
        Path(output),
        name=name,
        base=base,
        licence=licence,
        report=None if report is None else Path(report),
        dtype=dtype,
        shard_size=shard_size,
        overwrite=overwrite,
        say=say,
    )


def push(
    repo: str,
    folder: str | Path,
    *,
    public: bool = False,
    force: bool = False,
    message: str | None = None,
    steps: int = 256,
    confirm: Callable[[Parcel, str, bool], None] = lambda *_: None,
    tick: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] = _quiet,
) -> Upload:
    """Puts a checkpoint on the Hub in one commit, after it was verified.

    Args:
        repo: OWNER/NAME; who is logged in is the owner, if left out.
        folder: a checkpoint that is fit to be shared; `export` writes one.
        public: make the repository public; it is private otherwise.
        force: push though checks fail, or the folder has paths of this machine or rows of the training data.
        message: of the commit.
        steps: of the drift check of `verify`.
        confirm: called with what would be pushed, where, and whether that is private; raises to stop.
        tick: see `verify`.
        say: gets lines for the person at the terminal.

    Raises:
        HubError: the folder is not to be pushed, or the Hub does not do as asked.
    """
    from linearize.hub.push import push as _push

    return _push(
        Path(folder),
        repo,
        failed=lambda: verify(folder, steps=steps, tick=tick).failed,
        public=public,
        force=force,
        message=message,
        confirm=confirm,
        say=say,
    )
