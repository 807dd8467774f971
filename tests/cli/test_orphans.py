"""Models whose base is gone, or that name none: scored and trained alone, beside a teacher where one is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.cli.app import run
from tests.conftest import random_llama

SHORT = [
    "--set", "stages.0.data.tokens=512", "--set", "stages.0.data.held_out=2", "--set", "stages.0.length=64",
    "--set", "stages.0.batch_tokens=128",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINEARIZE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretrained model, where it is now."""
    return random_llama(tmp_path_factory.mktemp("moved") / "base")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("\n\n".join(f"There were {n} small cats and a dog. They ran home." for n in range(300)))
    return path


@pytest.fixture(scope="module")
def moved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted from a folder that is no longer there."""
    folder = tmp_path_factory.mktemp("orphans")
    before = shutil.copytree(base, folder / "before")
    assert (
        run(["convert", str(before), "-o", str(folder / "moved"), "-r", "window-gla", "--set", "mixer.window=16"]) == 0
    )
    shutil.rmtree(before)
    return folder / "moved"


@pytest.fixture(scope="module")
def unnamed(moved: Path) -> Path:
    """Exported without the name of its base."""
    assert run(["export", str(moved), str(moved.parent / "unnamed"), "--license", "mit"]) == 0
    return moved.parent / "unnamed"


@pytest.fixture(params=["moved", pytest.param("unnamed", marks=pytest.mark.check)])
def orphan(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions in the form of PIQA."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "piqa").mkdir()
    rows = [{"goal": f"do {n}", "sol1": "take it", "sol2": "leave it", "label": n} for n in (0, 1)]
    (folder / "piqa" / "piqa.validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_is_scored_alone(outcome, orphan, data):
    status, text, words = outcome("eval", orphan, "--tasks", "piqa", "--data", data, "--json")
    assert status == 0, words
    assert json.loads(text)["systems"] == ["no_recurrence", "model"]
    assert "no teacher, so no baselines made of it" in words and "--teacher ID|FOLDER" in words


def test_all_is_what_needs_no_teacher(outcome, orphan, data):
    status, text, words = outcome("eval", orphan, "--tasks", "piqa", "--data", data, "--json", "--baseline", "all")
    assert status == 0, words
    assert json.loads(text)["systems"] == ["no_recurrence", "no_window", "neither", "model"]


@pytest.mark.parametrize("name", ["teacher", "window", "window_bytes"])
def test_a_baseline_that_was_asked_for_is_refused_or_made_of_the_named_teacher(outcome, orphan, base, data, name):
    arguments = ("eval", orphan, "--tasks", "piqa", "--data", data, "--json", "--baseline", f"none,{name}")
    status, text, words = outcome(*arguments)
    assert (status, text) == (1, "")
    assert words.splitlines()[-1] == (
        f"error: baseline {name}: needs the teacher of {orphan.name}; name it with --teacher ID|FOLDER"
    )
    status, text, words = outcome(*arguments, "--teacher", base)
    assert status == 0, words
    assert json.loads(text)["systems"] == [name, "model"] and "no teacher" not in words


def test_tasks_that_compare_with_the_teacher_are_refused(outcome, unnamed):
    status, _, words = outcome("eval", unnamed, "--tasks", "agreement,repetition")
    assert status == 1
    told = "error: agreement: compared with the teacher; name it with --teacher ID|FOLDER, or take --tasks repetition"
    assert words.splitlines()[-1].startswith(told)


def test_no_other_model_is_taken_for_the_teacher(outcome, unnamed, moved, base, data, tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    arguments = ("eval", unnamed, "--tasks", "piqa", "--data", data, "--teacher")
    for named, told in {
        tmp_path: "unnamed was not converted from it (num_hidden_layers is 3, not 2); name another with --teacher",
        moved: "moved: is a converted model; name the pretrained one with --teacher",
        tmp_path / "none": "none: no such folder or file",
    }.items():
        status, _, words = outcome(*arguments, named)
        assert status == 1 and told in words
    status, _, words = outcome("eval", base, "--tasks", "piqa", "--data", data, "--teacher", base)
    assert status == 1 and "is not converted, so it is its own teacher; leave --teacher out" in words


def test_is_trained_alone_and_scored_on_what_it_held_out(outcome, orphan, base, text, tmp_path):
    arguments = ("finetune", "window-gla", "-o", tmp_path / "tuned", "--set", f"model={orphan}", *SHORT)
    arguments += ("--set", f"stages.0.data.source={text}")
    status, _, words = outcome(*arguments, "--set", "stages.0.objective=sft")
    assert status == 0, words
    assert json.loads((tmp_path / "tuned" / "linearize.json").read_text())["base"]["name"] == "before"

    # Its held-out rows need no teacher either; the divergence from it does.
    status, printed, words = outcome("eval", tmp_path / "tuned", "--json")
    assert status == 0 and "no teacher" in words
    metrics = {row["metric"] for row in json.loads(printed)["metrics"]}
    assert "kl" not in metrics
    status, printed, words = outcome("eval", tmp_path / "tuned", "--json", "--teacher", base)
    assert status == 0 and {row["metric"] for row in json.loads(printed)["metrics"]} > metrics


@pytest.mark.parametrize("change", ["stages.0.objective=distill", "stages.0.data.source=self"])
def test_stages_that_use_a_teacher_need_one(outcome, orphan, base, text, tmp_path, change):
    arguments = ["finetune", "window-gla", "-o", tmp_path / "tuned", "--set", f"model={orphan}", *SHORT]
    arguments += ["--set", f"stages.0.data.source={text}", "--set", "stages.0.objective=sft", "--set", change]
    status, _, words = outcome(*arguments)
    assert status == 1 and words.splitlines()[-1].endswith("; name the teacher with --teacher ID|FOLDER")
    status, _, words = outcome(*arguments, "--teacher", base)
    assert status == 0, words


def test_a_model_is_not_its_own_teacher(outcome, moved, text, tmp_path):
    arguments = ("finetune", "window-gla", "-o", tmp_path / "out", "--set", f"model={moved}", "--teacher", moved)
    status, _, words = outcome(*arguments, "--set", f"stages.0.data.source={text}", *SHORT)
    assert status == 1 and "is the model itself" in words
    assert not (tmp_path / "out").exists()


def test_a_base_that_the_hub_no_longer_has(outcome, moved, text, tmp_path):
    """Only loading it shows that it is gone, which is after all names were read."""
    arguments = ("finetune", "window-gla", "-o", tmp_path / "tuned", "--set", f"model={moved}", *SHORT)
    arguments += ("--set", f"stages.0.data.source={text}", "--set", "stages.0.objective=sft")
    assert outcome(*arguments)[0] == 0
    path = tmp_path / "tuned" / "linearize.json"
    made = json.loads(path.read_text())
    path.write_text(json.dumps({**made, "base": {"kind": "hub", "name": "acme/gone", "model": "acme/gone"}}))
    status, _, words = outcome("eval", tmp_path / "tuned", "--json")
    assert status == 0 and "no teacher, so no baselines made of it and no divergence from it: acme/gone" in words
    status, _, words = outcome("eval", tmp_path / "tuned", "--baseline", "teacher")
    assert status == 1 and words.splitlines()[-1].startswith("error: acme/gone: ")


@pytest.mark.check
def test_other_commands_need_none(outcome, orphan, tmp_path):
    commands = [
        ("inspect", orphan),
        ("verify", orphan, "--steps", "8"),
        ("generate", orphan, "There were", "-n", "2"),
        ("bench", orphan, "--lengths", "64", "--repeats", "1"),
        ("export", orphan, tmp_path / "out", "--weights", "int8", "--tokens", "1024"),
    ]
    for command in commands:
        status, _, words = outcome(*command)
        assert status == 0, (command[0], words)
    status, _, words = outcome("run", "window-gla", "-o", tmp_path / "run", "--set", f"model={orphan}")
    assert status == 1 and "is converted already; use `linearize finetune` and `linearize eval`" in words
