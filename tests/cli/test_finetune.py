"""`linearize finetune`: what --launch does to a dry run, and which recipe --resume goes on with, also of `run`."""

from __future__ import annotations

import json
import os
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest

import linearize
from linearize.errors import OutputError
from linearize.training import metrics
from tests.conftest import random_llama

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "stories.txt"
    text.write_text("\n\n".join(f"There were {n} small cats and a dog." for n in range(99)))
    changes = (
        f"model={random_llama(tmp_path / 'tiny')}", "mixer.window=8", f"stages.0.data.source={text}",
        "stages.0.data.tokens=512", "stages.0.data.held_out=0", "stages.0.length=32", "stages.0.batch_tokens=128",
        "stages.0.objective=sft", "stages.0.save_every=1",
    )  # fmt: skip
    return [part for change in changes for part in ("--set", change)]


def test_a_dry_run_starts_no_processes_and_counts_with_those_that_would_be(outcome, settings, tmp_path, monkeypatch):
    def told(*options: str) -> list[str]:
        status, text, words = outcome("finetune", "window-gla", "--dry-run", *settings, *options)
        assert status == 0 and words == ""
        return re.findall(r"each GPU, of (\d+) but for single", text)

    assert told() == ["8"]
    assert told("--launch", "2") == ["2"]
    assert told("--launch", "2", "--gpus", "4") == ["4"]
    (tmp_path / "accelerate.yaml").write_text("num_processes: 3\n")
    assert told("--accelerate-config", str(tmp_path / "accelerate.yaml")) == ["3"]
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun has it
    assert told() == ["2"]
    monkeypatch.setenv("RANK", "1")
    assert told() == []


def test_float16_is_refused_before_it_is_counted(outcome, settings):
    status, text, words = outcome("finetune", "window-gla", "--dry-run", *settings, "--set", "dtype=float16")
    assert (status, text) == (1, "") and words.startswith("error: dtype: float16") and "bfloat16" in words


@pytest.fixture
def interrupted(outcome, monkeypatch: pytest.MonkeyPatch):
    """Runs a command line until its second step of training."""
    given = metrics.append_json_line

    def append(path: Path, record: dict[str, Any]) -> None:
        given(path, record)
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def call(*arguments: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "append_json_line", append)
            assert outcome(*arguments)[0] == 143

    return call


def test_resume_goes_on_with_the_recipe_of_the_run(outcome, settings, tmp_path, interrupted):
    out = tmp_path / "out"
    interrupted("finetune", "window-gla", "-o", out, *settings)
    resume = ("finetune", "window-gla", "-o", out, "--resume")
    status, text, words = outcome(*resume, "--set", "stages.0.lr=0.5", "--set", "seed=3")
    assert (status, text) == (1, "") and words.count("\n") == 1
    assert "out.training/recipe.yaml: --resume goes on with this recipe, and --set changes seed, stages.0.lr" in words
    for named in ({"model": "elsewhere"}, {"teacher": "elsewhere"}):
        with pytest.raises(OutputError, match=f"unfinished run has {next(iter(named))}"):
            linearize.finetune("window-gla", out, resume=True, **named)
    assert "unfinished run has teacher None, not elsewhere" in outcome(*resume, "--teacher", "elsewhere")[2]
    status, text, words = outcome(*resume, *settings[:2])  # what is repeated has to be what it was
    assert (status, text) == (0, f"{out}\n")
    (line,) = [line for line in words.splitlines() if line.startswith("resuming with the run's own recipe")]
    assert line.endswith(
        "; window-gla differs from it in mixer.window, stages.0.batch_tokens, stages.0.data.held_out, "
        "stages.0.data.source, stages.0.data.tokens and 3 more"
    )
    assert "going on from checkpoint-2" in words and not (tmp_path / "out.training").exists()
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    # Once more there is nothing to do.
    for launch in ((), ("--launch", "2")):
        assert outcome(*resume, *launch) == (
            0, f"{out}\n", f"{out}: this run is finished, so there is nothing to resume\n",
        )  # fmt: skip
    stages = json.loads(outcome(*resume, "--json")[1])["stages"]
    assert stages[0]["steps"] == 4
    told: list[str] = []
    result = linearize.finetune("window-gla", out, resume=True, say=told.append)
    assert result.stages == stages and result.model.config.name_or_path == str(out)
    assert told == [f"{out}: this run is finished, so there is nothing to resume"]
    # A converted folder is no finished run.
    status, _, words = outcome("finetune", "window-gla", "-o", tmp_path / "tiny", "--resume", *settings)
    assert status == 1


def test_run_resumes_without_its_recipe_and_changes(outcome, settings, tmp_path, interrupted):
    out, held_out = tmp_path / "out", ("--set", "stages.0.data.held_out=2")
    status, _, words = outcome("run", "-o", out)
    assert status == 2 and "name a RECIPE, or pass --resume" in words
    status, _, words = outcome("run", "-o", out, "--resume")
    assert status == 1 and f"{out}.training: no unfinished run to resume" in words
    interrupted("run", "window-gla", "-o", out, *settings, *held_out)
    status, _, words = outcome("run", "-o", out, "--resume", "--set", "seed=3")
    assert status == 1 and "--resume goes on with this recipe, and --set changes seed in it" in words
    status, text, words = outcome("run", "-o", out, "--resume", "--json")
    assert status == 0 and "going on from checkpoint-2" in words and "differs from it" not in words, words
    assert json.loads(text)["stages"][0]["steps"] == 4
    assert "window: 8" in (out / "finetuned" / "recipe.yaml").read_text()
    assert not (tmp_path / "out.training").exists()
