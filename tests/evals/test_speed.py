"""The scripts that measure speed: every line of the GPU's runs on a CPU, and its bars say what they should."""

from __future__ import annotations

import json
import re

import pytest

from evals.speed import __main__ as cpu
from evals.speed import gpu, landmarks, products


@pytest.mark.check
def test_the_script_for_gpus_runs(monkeypatch, capsys):
    def small(config: str, *_: object, **__: object):
        return measured("smollm2-135m", (16, 32), (1, 2), read=16, train=(16, 32), layers=1, repeats=1, steps=2)

    measured = gpu.measured
    monkeypatch.setattr(gpu, "measured", small)
    monkeypatch.setattr("linearize.runtime.memory._COPIED", {"cpu": 1 << 20})
    monkeypatch.setattr("sys.argv", ["gpu", "--dry-run"])
    gpu.main()
    table = capsys.readouterr().out
    assert "share of the copy's bandwidth, least, batch 2 | >= 0.80 |" in table
    assert "training at 16 tokens, model / teacher, batch 1 | >= 1.00 |" in table
    assert "training ahead of the teacher from, batch 1 | <= 4096 |" in table and "batch 2 | <= 4096" not in table
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit):
        gpu.main()


def test_bars_are_of_the_worst_row():
    def row(tokens: int, pace: float, share: float, peak: int) -> dict[str, object]:
        place = {"kind": "decode", "system": "model", "batch": 16, "tokens": tokens}
        return {**place, "tokens_per_second": pace, "roof_share": share, "peak_bytes": peak}

    rows = [row(1024, 1600.0, 0.9, 100), row(2048, 1600.0, 0.7, 102), row(4096, 1280.0, 0.8, 101)]
    facts = {"rows": rows, "ahead_from": {"model": {"decode": {"16": None}}}}
    seen = {bar["what"].partition(",")[0]: bar["seen"] for bar in gpu.bars(facts)}
    assert seen["share of the copy's bandwidth"] == 0.7
    assert seen["time per token"] == pytest.approx(0.25)
    assert seen["ahead of the teacher from"] is None
    assert [bar["seen"] for bar in gpu.bars(facts) if "largest" in bar["what"]] == pytest.approx([0.02])


def test_training_is_to_be_level_at_first_and_ahead_from_the_next_length_on():
    def row(system: str, tokens: int, pace: float) -> dict[str, object]:
        return {"kind": "train", "system": system, "batch": 1, "tokens": tokens, "tokens_per_second": pace}

    rows = [row("teacher", 2048, 10.0), row("model", 2048, 9.0), row("teacher", 4096, 8.0), row("model", 4096, 9.0)]
    facts = {"rows": rows, "ahead_from": {"model": {"train": {"1": 4096}}}}
    level, ahead = gpu.training_bars(facts, 1)
    assert level["seen"] == pytest.approx(0.9) and ahead["seen"] == 4096
    assert gpu.training_bars(facts, 16) == []


def test_the_bars_of_a_cpu_are_of_what_was_measured():
    def row(kind: str, system: str, tokens: int, pace: float) -> dict[str, object]:
        return {"kind": kind, "system": system, "tokens": tokens, "tokens_per_second": pace}

    rows = [row("train", "teacher", 2048, 4.0), row("train", "model", 2048, 6.0), row("decode", "model", 512, 1.0)]
    long = {"cache_bytes": [100, 101], "resident_bytes": [100, 101]}
    bars = {bar["what"]: bar for bar in cpu.bars({"rows": rows, "long_text": long})}
    trained = bars.pop("train at 2048: model / teacher")
    assert trained["seen"] == pytest.approx(1.5) and trained["asked"] == ">= 1.0"
    assert len(bars) == 2  # nothing of what was not measured; memory alone


def test_products_are_measured_and_committed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["products", "--short"])
    monkeypatch.setattr(products, "SECONDS", 0.0)
    monkeypatch.setattr(products, "APART", 2**20)
    products.main()
    made = capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["products", "--table"])
    products.main()
    kept = capsys.readouterr().out
    columns, known = ({*text.splitlines()[0].split("|")} for text in (made, kept))
    assert columns <= known and len(columns) > 4  # a processor may lack a contender
    assert kept.count("\n") - 2 == 2 * len(products.LAYERS) * len(products.ROWS)
    notes = (products.FIGURES.parent / "NOTES.md").read_text(encoding="utf-8")
    for row in json.loads(products.FIGURES.read_text(encoding="utf-8"))["rows"]:
        found = re.search(rf"^\| {row['layer']}, [\d,]+ x [\d,]+ \| {row['rows']} \|(.*)\|$", notes, re.MULTILINE)
        if row["threads"] == 2 and found:
            heads = ("float32", "float32, oneDNN", "bfloat16", "int8", "int8 in pairs")
            told = [int(cell.replace(",", "")) for cell in found[1].split("|")]
            assert told == [round(row["microseconds"][head]) for head in heads]


def test_the_script_for_landmarks_in_training_runs(tmp_path):
    landmarks.measure(((200, 40, "float32"),), tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    case = found["cases"][0]
    assert all(case[name]["seconds"] > 0 for name in landmarks.WAYS.values())
    assert case["merges"]["kept_bytes"] > case["trained"]["kept_bytes"] > case["teacher"]["kept_bytes"] > 0
    assert len(landmarks.table(found).splitlines()) == 3
