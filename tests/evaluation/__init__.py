"""Tests of the evaluation package; those that need real data skip themselves where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def data_folder() -> Path:
    """The folder of test data: $LINEARIZE_TEST_DATA, else `shared/data` beside the repository."""
    chosen = os.environ.get("LINEARIZE_TEST_DATA")
    folder = Path(chosen) if chosen else Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}: set LINEARIZE_TEST_DATA")
    return folder


def tiny_model_folder() -> Path:
    """A whole, tiny, really trained Llama."""
    return data_folder() / "models" / "tinystories-656k"
