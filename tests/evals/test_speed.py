"""The scripts that measure speed: every line of the GPU's runs on a CPU, and its bars say what they should."""

from __future__ import annotations

import pytest

from evals.speed import gpu


def test_the_script_for_gpus_runs(monkeypatch, capsys):
    def small(config: str, *_: object, **__: object):
        return measured("smollm2-135m", (16, 32), (1, 2), read=16, layers=1, repeats=1, steps=2)

    measured = gpu.measured
    monkeypatch.setattr(gpu, "measured", small)
    monkeypatch.setattr("linearize.benchmark.memory._COPIED", {"cpu": 1 << 20})
    monkeypatch.setattr("sys.argv", ["gpu", "--dry-run"])
    gpu.main()
    table = capsys.readouterr().out
    assert "share of the copy's bandwidth, least, batch 2 | >= 0.80 |" in table
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
