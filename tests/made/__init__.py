"""Data sets and a trained model that the tests bring along.

The data sets are made up (`text.py`, `data.py`) under the public ones' paths and in their formats. `tiny/` holds a
Llama of two layers that `train.py` trained on such text; its weights are stored in float16. Where LINEARIZE_TEST_DATA
names a folder with the public data sets, these are taken instead.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_TINY = Path(__file__).resolve().parent / "tiny"
LANDMARKS = str(ROOT / "evals" / "start" / "landmarks.yaml")
LANDMARKS_EXACT = str(ROOT / "evals" / "start" / "landmarks-exact.yaml")
"""Recipes with slots beside a recurrence, and with slots alone, that are chosen without a fit to text."""
_BESIDE = ROOT.parent / "shared" / "data"


@cache
def _own() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="linearize-tests-")


def _named() -> Path | None:
    named = os.environ.get("LINEARIZE_TEST_DATA")
    return Path(named) if named and Path(named).is_dir() else None


def public_folder() -> Path | None:
    """The public data sets: where LINEARIZE_TEST_DATA says, else in `../shared/data`; None where they are not there."""
    folder = Path(os.environ.get("LINEARIZE_TEST_DATA") or _BESIDE)
    return folder if folder.is_dir() else None


@cache
def data_folder() -> Path:
    """The public data sets that LINEARIZE_TEST_DATA names, otherwise made-up ones."""
    from tests.made.data import write_data

    if (named := _named()) is not None:
        return named
    folder = write_data(Path(_own().name) / "data")
    (folder / "models").mkdir()
    (folder / "models" / "tinystories-656k").symlink_to(tiny_folder())
    return folder


@cache
def tiny_folder() -> Path:
    """A tiny trained Llama with a tokenizer of words, in float32: the public one where LINEARIZE_TEST_DATA has it."""
    from safetensors.torch import load_file, save_file

    public = _named()
    if public is not None and (public / "models" / "tinystories-656k").is_dir():
        return public / "models" / "tinystories-656k"
    folder = Path(_own().name) / "tiny"
    shutil.copytree(_TINY, folder)
    weights = {name: tensor.float() for name, tensor in load_file(_TINY / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
