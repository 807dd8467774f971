"""The text that comes with the package: whole rows of one work, kinds in turn, held-out text apart, and no network."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from linearize.data.builtin import builtin_rows, works
from linearize.data.load import load_data, reserved_tokens
from linearize.errors import DataError
from linearize.recipe import DataSpec, load_recipe
from tests.conftest import random_llama

LENGTH = 256


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a byte, so that no text is changed."""
    return AutoTokenizer.from_pretrained(random_llama(tmp_path_factory.mktemp("bytes")))


def load(tokenizer, **keys):
    options = {"length": LENGTH, "seed": 0, "teacher": None} | {k: keys.pop(k) for k in ("length", "seed") if k in keys}
    reserved = keys.pop("reserved", {})
    purpose = keys.pop("purpose", "")
    spec = DataSpec(source="builtin", **keys)
    return load_data(spec, tokenizer=tokenizer, reserved=reserved, purpose=purpose, **options)


def test_rows_are_continuous_text_of_all_works_in_turn(tokenizer):
    data = load(tokenizer, tokens=12 * LENGTH, held_out=6)
    assert torch.equal(data.train.position_ids, torch.arange(LENGTH).expand(12, -1)) and len(data.held_out) == 6

    def owners(rows):
        # A cut between two bytes of a character is no text.
        told = [tokenizer.decode(row, skip_special_tokens=True).strip("\ufffd") for row in rows.input_ids]
        return sorted(next(name for name, text in works().items() if row in text) for row in told)

    for rows in (data.held_out, data.train[:6], data.train[6:]):
        assert owners(rows) == sorted(works())
    again, other = load(tokenizer, tokens=LENGTH, held_out=6), load(tokenizer, tokens=LENGTH, held_out=6, seed=1)
    assert torch.equal(again.held_out.input_ids, data.held_out.input_ids)
    assert not torch.equal(other.held_out.input_ids, data.held_out.input_ids)


def test_nothing_is_both_held_out_and_read(tokenizer):
    settings = load_recipe(
        "window-gla",
        ["stages=[{objective: sft, length: 192, batch_tokens: 192, data: {source: builtin, held_out: 7}}, "
         "{objective: sft, length: 64, batch_tokens: 64, data: {source: builtin, held_out: 2}}]"],
    )  # fmt: skip
    reserved = reserved_tokens(settings.stages)
    stage = load(tokenizer, length=192, held_out=7, tokens=1200, reserved=reserved)
    fitted = load(tokenizer, length=320, held_out=3, tokens=4000, reserved=reserved, purpose="calibrate")
    short = load(tokenizer, length=64, held_out=2, tokens=4000, reserved=reserved)

    def pairs(rows):
        return {tuple(row[at : at + 12].tolist()) for row in rows.input_ids for at in range(1, len(row) - 12)}

    judged = pairs(stage.held_out)
    for rows in (stage.train, fitted.train, fitted.held_out, short.train):
        assert len(judged & pairs(rows)) <= 0.01 * len(judged)
    assert len(pairs(fitted.held_out) & pairs(fitted.train)) <= 0.01 * len(judged)


def test_its_end_is_told(tokenizer):
    with pytest.raises(DataError, match=r"the built-in text: 0 tokens .* are too few"):
        load(tokenizer, length=10**6, held_out=0)
    row = next(builtin_rows(tokenizer, 2, seed=0))
    assert len(row.ids) == 2
