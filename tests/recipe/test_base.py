"""Recipes that build on others: what they take over, and whose line an error names."""

from __future__ import annotations

from pathlib import Path

import pytest

from linearize.errors import RecipeError
from linearize.recipe import dump_recipe, load_recipe, parse_recipe


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(file: str, text: str) -> str:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text)
    return file


def error_of(file: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sections_are_laid_over_the_base_key_by_key() -> None:
    base = load_recipe("window-gla")
    recipe = parse_recipe("base: window-gla\nmixer: {sinks: 2, gate: {bias: 3}}\nlora: null\nseed: 7\n", "x.yaml")
    assert recipe.mixer.gate == base.mixer.gate.model_copy(update={"bias": 3.0})
    assert recipe.mixer == base.mixer.model_copy(update={"sinks": 2, "gate": recipe.mixer.gate})
    assert (recipe.lora, recipe.seed, recipe.stages) == (None, 7, base.stages)
    assert recipe.description == ""


def test_lists_and_mappings_with_keys_of_their_own_are_replaced() -> None:
    write(
        "a.yaml", "mixer: {keep: {layers: [0], heads: {0: [1]}}}\nstages:\n- {objective: sft, data: {source: a.txt}}\n"
    )
    write("b.yaml", "base: a.yaml\nmixer: {keep: {heads: {3: [2]}}}\nstages: []\n")
    recipe = load_recipe("b.yaml")
    assert (recipe.mixer.keep.layers, recipe.mixer.keep.heads, recipe.stages) == ([0], {3: [2]}, [])


def test_bases_of_bases_are_found_beside_the_file_that_names_them() -> None:
    write("in/a.yaml", "base: ../b.yaml\nseed: 1\n")
    write("b.yaml", "base: in/c.yaml\nmixer: {window: 32}\nseed: 2\n")
    write("in/c.yaml", "base: liger-gla\nmixer: {window: 16, sinks: 1}\nmodel: some/model\n")
    recipe = load_recipe("in/a.yaml", ["mixer.sinks=3"])
    assert (recipe.seed, recipe.model) == (1, "some/model")
    assert (recipe.mixer.window, recipe.mixer.sinks, recipe.mixer.mix) == (32, 3, "fixed")
    assert "base:" not in dump_recipe(recipe)
    assert parse_recipe(dump_recipe(recipe), "x.yaml") == recipe


def test_a_file_may_have_the_name_of_its_shipped_base() -> None:
    write("window-gla.yaml", "base: window-gla\nseed: 4\n")
    assert load_recipe("window-gla.yaml").seed == 4


@pytest.mark.parametrize(
    ("base", "own", "message"),
    [
        ("mixer: {window: 0}", "", "a.yaml:1: mixer.window: expected an integer >= 1, got 0"),
        ("mixer:\n  windw: 3", "mixer: {sinks: 1}", "a.yaml:2: mixer.windw: unknown key; did you mean 'window'?"),
        ("mixer: {window: 0}", "mixer: {window: -1}", "b.yaml:2: mixer.window: expected an integer >= 1, got -1"),
        ("mixer: 3", "", "a.yaml:1: mixer: expected a mapping, got 3"),
        ("stages: [{}, {}, {}]", "stages:\n- {}", "b.yaml:3: stages.0.objective: missing key"),
        ("a: [", "", "a.yaml:1: not valid YAML"),
        ("", "", "a.yaml: expected a mapping of recipe keys, got an empty document"),
        ("base: b.yaml", "", "a.yaml:1: base: b.yaml builds on this recipe in turn; name another base"),
        ("base: a.yaml", "", "a.yaml:1: base: a.yaml builds on this recipe in turn; name another base"),
        ("base: liger", "", "a.yaml:1: base: unknown recipe 'liger'; did you mean"),
        ("base: nowhere/c.yaml", "", "a.yaml:1: base: nowhere/c.yaml: no such file"),
        ("base: [default]", "", "a.yaml:1: base: expected a recipe's name or file, got ['default']"),
        ("bas: default", "", "a.yaml:1: bas: unknown key; did you mean 'base'?"),
    ],
)
def test_errors_name_the_file_and_line_they_come_from(base: str, own: str, message: str) -> None:
    write("a.yaml", base)
    assert error_of(write("b.yaml", f"base: a.yaml\n{own}")).startswith(message)


def test_a_base_is_not_set_on_the_command_line() -> None:
    write("a.yaml", "seed: 1\n")
    told = "--set base=default: a base is not set on top of a recipe; name that recipe itself"
    assert error_of("a.yaml", "base=default") == told
