"""`linearize eval` as a user meets it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from linearize.checkpoint.provenance import checkpoint_digest
from linearize.sources.source import find_source


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINEARIZE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def questions(data_folder: Path) -> int:
    return len((data_folder / "piqa" / "piqa.validation.jsonl").read_text(encoding="utf-8").splitlines())


@pytest.mark.check
def test_suites_tasks_baselines_and_report(outcome, converted, data_folder, tmp_path):
    arguments = (
        "eval", converted, "--suite", "recall", "--tasks", "piqa,wikitext2", 
        "--limit", "2", "--seed", "4", "--lengths", "352", "--samples", "1", "--data", data_folder, "--report",
        tmp_path / "report", "--json",
    )  # fmt: skip
    status, text, words = outcome(*arguments)
    assert status == 0, words
    found = json.loads(text)
    assert found["systems"] == ["teacher", "window_bytes", "no_recurrence", "model"]
    assert (found["limit"], found["seed"]) == (2, 4)
    assert found["items"]["piqa"] == {"n": 2, "of": questions(data_folder)}
    assert {"piqa", "wikitext2", "passkey"} <= set(found["items"])
    values = next(row for row in found["metrics"] if row["task"] == "wikitext2")["values"]
    assert values["no_recurrence"]["value"] == pytest.approx(values["model"]["value"], rel=1e-5)  # as converted
    assert values["teacher"]["value"] != pytest.approx(values["model"]["value"], rel=1e-3)
    document = json.loads((tmp_path / "report" / "results.json").read_text())
    described = {one["name"]: one for one in document["systems"]}
    assert described["teacher"]["state_bytes"] == 0 < described["model"]["state_bytes"]
    digest = checkpoint_digest(find_source(str(converted)))  # of the model itself alone, not of it with a branch off
    marks = {name: (one["checkpoint"], one["dtype"]) for name, one in described.items()}
    assert marks.pop("model") == (digest, "float32")
    assert marks == dict.fromkeys(("teacher", "window_bytes", "no_recurrence"), (None, None))
    assert digest is not None
    assert document["command"].startswith("linearize")
    assert (tmp_path / "report" / "report.html").is_file()

    # Everything is kept now: the same again without loading a model, and scored again only where that is asked for.
    stored = Path(os.environ["LINEARIZE_CACHE"], "evaluation")
    before = sum(path.stat().st_size for path in stored.rglob("*.jsonl"))
    assert json.loads(outcome(*arguments)[1]) == found
    assert sum(path.stat().st_size for path in stored.rglob("*.jsonl")) == before
    status, text, _ = outcome(*arguments, "--fresh")
    assert status == 0 and json.loads(text)["metrics"] == found["metrics"]
    assert sum(path.stat().st_size for path in stored.rglob("*.jsonl")) > before


def test_people_are_told_which_items(outcome, tiny_folder, data_folder):
    status, text, words = outcome("eval", tiny_folder, "--tasks", "piqa", "--limit", "3", "--data", data_folder)
    assert status == 0 and "piqa" in text
    assert f"items drawn with seed 0: 3 of {questions(data_folder):,} in piqa" in words


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--suite", "recal"], 1, "no suite called 'recal': did you mean recall?"),
        (["--tasks", "piqqa"], 1, "no task called 'piqqa': did you mean piqa"),
        (["--suite", "core", "--baseline", "no_window"], 1, "is not converted"),
        (["--tasks", " ,"], 2, "--tasks ' ,': names nothing"),
        (["--suite", "recall", "--lengths", "12k"], 2, "--lengths 12k: expected numbers of tokens"),
        (["--suite", "core", "--limit", "0"], 2, "--limit"),
    ],
)
def test_bad_arguments(outcome, tiny_folder, arguments, status, told):
    found, text, words = outcome("eval", tiny_folder, *arguments)
    assert (found, text) == (status, "")
    assert told in " ".join(words.split())


def test_weights_that_are_not_finite(outcome, tiny_folder, data_folder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "broken")
    status, text, words = outcome("eval", tmp_path / "broken", "--tasks", "piqa", "--limit", "2", "--data", data_folder)
    assert (status, text) == (1, "")
    assert "model.norm.weight has values that are not finite" in words
