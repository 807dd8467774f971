"""Trackers that a recipe names get what metrics.jsonl gets; one that is not installed is told before any work."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.utils import LoggerType

from linearize.errors import RecipeError
from linearize.jobs.stages import run_stages
from linearize.recipe import load_recipe
from linearize.training.workfolder import work_folder

# Enough of either package for accelerate; what it is told is kept.
_FAKE = """
told = []
class Run:
    def log(self, figures, **options): told.append(("log", figures))
    def finish(self): told.append(("finish",))
def init(**options):
    told.append(("init", options.get("project"), options.get("name")))
    return Run()
"""


@pytest.fixture
def settings(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Once upon a time there were {n} small cats and a dog." for n in range(200)))
    changes = [
        f"model={tiny_folder}", "mixer.window=16", f"stages.0.data.source={text}", "stages.0.data.tokens=512",
        "stages.0.data.held_out=2", "stages.0.length=64", "stages.0.batch_tokens=128",
    ]  # fmt: skip
    return lambda *names: load_recipe("window-gla", [*changes, f"report_to=[{', '.join(names)}]"])


def lines(work: Path) -> list[dict]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def test_what_is_not_installed_is_told_in_a_line(settings, tmp_path):
    missing = next(name for name in ("trackio", "wandb", "tensorboard") if find_spec(name) is None)
    with (
        pytest.raises(RecipeError, match=f"^report_to: {missing} is not installed; pip install {missing}, or take it"),
        work_folder(tmp_path / "tuned", settings(missing), resume=False) as work,
    ):
        run_stages(settings(missing), work, say=lambda _: None)
    with pytest.raises(RecipeError, match="report_to"):
        settings("mlflow")


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_every_step(settings, tmp_path, monkeypatch, name):
    package = tmp_path / "packages" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(_FAKE)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType(name)])
    monkeypatch.syspath_prepend(str(package.parent))
    importlib.invalidate_caches()
    for module in [one for one in sys.modules if one.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, importlib.import_module(name))
    told = sys.modules[name].told
    with work_folder(tmp_path / "tuned", settings(name), resume=False) as work:
        run_stages(settings(name), work, say=lambda _: None)
        written = lines(work)
    assert ("init", "linearize", "tuned, stage 1") in told and told[-1] == ("finish",)
    losses = [one[1]["train/loss"] for one in told if one[0] == "log"]
    assert losses == [line["loss"] for line in written] and len(losses) == 4


def test_tensorboard_gets_every_step(settings, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with work_folder(tmp_path / "tuned", settings("tensorboard"), resume=False) as work:
        run_stages(settings("tensorboard"), work, say=lambda _: None)
        written = lines(work)
    found = EventAccumulator(str(tmp_path / "tuned.runs" / "stage-1")).Reload().Scalars("train/loss")
    assert [event.value for event in found] == pytest.approx([line["loss"] for line in written])
