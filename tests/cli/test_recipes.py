"""`linearize recipes`: data on stdout, one-line errors, files left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from linearize.cli.app import run
from linearize.cli.console import print_json
from linearize.recipe import load_recipe, parse_recipe, recipe_path, shipped_recipes


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_ls(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "ls"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["RECIPE", "DESCRIPTION"]
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert run(["recipes", "ls", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed] == names
    assert names[:4] == ["default", "small", "train", "liger-gla"]
    assert all(row["description"] for row in listed)


def test_show_prints_the_resolved_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "show", "default", "--set", "mixer.window=128"]) == 0
    expected = load_recipe("default", ["mixer.window=128"])
    assert parse_recipe(capsys.readouterr().out, "stdout") == expected
    assert run(["recipes", "show", "default", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mixer"]["window"] == 64


def test_cp_copies_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    for destination, written in ((None, "train.yaml"), ("mine.yaml", "mine.yaml"), ("folder", "folder/train.yaml")):
        arguments = ["recipes", "cp", "train", *([destination] if destination else [])]
        assert run(arguments) == 0
        assert capsys.readouterr().out == f"{written}\n"
        assert Path(written).read_bytes() == recipe_path("train").read_bytes()
        Path(written).write_text("seed: 1\n")
        assert run(arguments) == 1
        assert capsys.readouterr().err.startswith(f"error: {written}: exists already")
        assert Path(written).read_text() == "seed: 1\n"


def test_cp_into_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "cp", "train", "no/such/x.yaml"]) == 1
    assert capsys.readouterr().err == "error: no/such/x.yaml: there is no folder no/such; make it first\n"


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.yaml").write_text("seed: 1\nmixer:\n  windw: 3\n")
    assert run(["recipes", "check", "x.yaml"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: x.yaml:3: mixer.windw: unknown key; did you mean 'window'?\n"
    assert captured.out == ""
    Path("x.yaml").write_text("lora: null\nstages:\n- objective: {distill: 0.9, sft: 0.1}\n  data: {source: a.txt}\n")
    assert run(["recipes", "check", "x.yaml", "--set", "mixer.sinks=2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("ok: x.yaml: ")
    assert "window 64 + 2 sinks" in said
    assert "0.9 distill + 0.1 sft on a.txt, all tokens" in said


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), 1.0, (float("inf"),)]})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.0, [None]]}


def test_check_shows_every_error(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.yaml").write_text("mixer: {windw: 3}\nseed: one\n")
    assert run(["recipes", "check", "x.yaml"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in lines] == ["mixer.windw", "seed"]
    assert run(["recipes", "check", "x.yaml", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["errors"]) == 2


def test_the_schema_knows_every_key_of_the_shipped_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)

    def check(value: object, kind: dict[str, Any]) -> None:
        kinds = [kind, *kind.get("anyOf", [])]
        kinds += [schema["$defs"][one["$ref"].rsplit("/", 1)[1]] for one in kinds if "$ref" in one]
        if isinstance(value, dict) and any("properties" in one for one in kinds):
            properties = next(one["properties"] for one in kinds if "properties" in one)
            for key, part in value.items():
                check(part, properties[key])
        if isinstance(value, list):
            items = next((one["items"] for one in kinds if "items" in one), {})
            for part in value:
                check(part, items)

    for recipe in shipped_recipes():
        check(yaml.safe_load(recipe.path.read_text(encoding="utf-8")), schema)
