"""A model's name that is nearly one of a file or folder here is told so."""

from __future__ import annotations

import pytest

from linearize.errors import ModelError
from linearize.sources.source import find_source, load_config


@pytest.mark.parametrize(
    ("given", "meant"), [("model.ggf", "model.gguf"), ("convertd", "converted"), ("./modle", "model")]
)
def test_did_you_mean(tmp_path, monkeypatch, given, meant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / meant).mkdir()
    with pytest.raises(ModelError, match=rf"; did you mean {meant}\?$"):
        load_config(find_source(given))
    with pytest.raises(ModelError) as told:
        load_config(find_source("something-else"))
    assert "did you mean" not in str(told.value)
