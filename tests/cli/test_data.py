"""`linearize data preview`: the rows that training will read, on stdout, and words on stderr."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from linearize.data.load import load_data, reserved_tokens
from linearize.recipe import load_recipe

STAGE = "{{objective: sft, data: {{source: {0}, held_out: {1}}}, length: {2}, batch_tokens: {2}}}"


@pytest.fixture
def asked(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A recipe of two stages on one file, and its model."""
    monkeypatch.chdir(tmp_path)
    records = [{"instruction": f"Name fox {n}.", "output": f"It is fox {n}, of the wood."} for n in range(60)]
    Path("foxes.jsonl").write_text("\n".join(map(json.dumps, records)))
    stages = f"stages=[{STAGE.format('foxes.jsonl', 2, 64)}, {STAGE.format('foxes.jsonl', 4, 128)}]"
    return ["window-gla", "--set", f"model={tiny_folder}", "--set", stages]


def test_rows_are_those_of_training(asked, outcome, tiny_folder):
    status, text, words = outcome("data", "preview", *asked, "--json", "--rows", 3)
    assert status == 0
    shown = json.loads(text)
    assert [one["stage"] for one in shown] == [1, 2] and [len(one["rows"]) for one in shown] == [3, 3]
    assert "stage 2: data: foxes.jsonl: " in words and "instructions (instruction, output)" in words
    settings, tokenizer = load_recipe("window-gla", asked[-1:]), AutoTokenizer.from_pretrained(tiny_folder)
    for stage, one in zip(settings.stages, shown, strict=True):
        options = {"length": stage.length, "seed": 0, "reserved": reserved_tokens(settings.stages)}
        train = load_data(stage.data, tokenizer=tokenizer, teacher=None, **options).train
        for name in ("input_ids", "labels", "position_ids"):
            assert [row[name] for row in one["rows"]] == getattr(train, name)[:3].tolist()
        for row in one["rows"]:
            parts = [segment["tokens"] for segment in row["segments"]]
            assert sum(parts) == stage.length and row["position_ids"].count(0) == len(parts)
            pieces = [piece for segment in row["segments"] for piece in segment["pieces"]]
            assert sum(piece["tokens"] for piece in pieces if piece["loss"]) == row["tokens_with_loss"]
            # Only the answers carry loss, with their end.
            assert all("fox" not in p["text"] or "Name fox" not in p["text"] for p in pieces if p["loss"])


def test_what_carries_loss_is_marked(asked, outcome):
    status, text, _ = outcome("data", "preview", *asked, "--stage", 2, "--rows", 1)
    assert status == 0
    assert text.startswith("=== stage 2, sft: row 1 of foxes.jsonl, ") and text.count("===") == 2
    assert "--- tokens 0 to " in text and "Response:\n⟦It is fox " in text and "⟧\n" in text
    assert ", positions 0 to " in text


def test_what_cannot_be_shown_is_told(asked, outcome):
    status, text, words = outcome("data", "preview", *asked[:3])
    assert (status, text) == (1, "") and "self is written by the teacher when the stage begins" in words
    assert words.splitlines()[-1].startswith("error: window-gla: all its text is written by a model when training")
    assert "so there is no stage 3 to show" in outcome("data", "preview", *asked, "--stage", 3)[2]
    assert "the recipe names no model" in outcome("data", "preview", "window-gla")[2]
