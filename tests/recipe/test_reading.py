"""Recipes from text, files, names and `--set`; every error one line, with its place and what was meant."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.errors import RecipeError
from linearize.recipe import Recipe, dump_recipe, load_recipe, parse_recipe, recipe_path, shipped_recipes
from linearize.recipe.document import parse_document, write_document

STAGE = "stages:\n- objective: distill\n  data: {source: self}\n"


def error_of(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "x.yaml", overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250
    return message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixer:\n  windw: 3\n", "x.yaml:2: mixer.windw: unknown key; did you mean 'window'?"),
        ("seed: 1\nmixer:\n  window: abc\n", "x.yaml:3: mixer.window: expected an integer >= 1, got 'abc'"),
        ("mixer:\n  window: true", "x.yaml:2: mixer.window: expected an integer >= 1, got true"),
        ("mixer:\n  window: 0\n  sinks: -1", "x.yaml:2: mixer.window: expected an integer >= 1, got 0 (+1 more;"),
        ("lora: {dropout: 1}", "x.yaml:1: lora.dropout: expected a number >= 0 and < 1, got 1"),
        ("lora: {targets: []}", "x.yaml:1: lora.targets: expected a non-empty list of text, got []"),
        ("mixer: {gate: {divisor: .nan}}", "x.yaml:1: mixer.gate.divisor: expected a number > 0, got nan"),
        ("mixer: {normalize: yes}", "x.yaml:1: mixer.normalize: expected true or false, got 'yes'"),
        (
            "mixer: {mix: learnd}",
            "x.yaml:1: mixer.mix: expected one of 'fixed', 'learned', 'softmax', got 'learnd'; did you mean 'learned'?",
        ),
        ("window: 3", "x.yaml:1: window: unknown key; did you mean 'mixer.window'?"),
        ("lr: 3", "x.yaml:1: lr: unknown key; did you mean 'stages.0.lr'?"),
        ("learning_rate: 3", "x.yaml:1: learning_rate: unknown key; did you mean 'stages.0.lr'?"),
        (
            "mixer:\n  lora: {rank: 3}\n",
            "x.yaml:2: mixer.lora: unknown key here; lora is a key of the recipe itself, not of mixer",
        ),
        ("lora: {r: 3}", "x.yaml:1: lora.r: unknown key; did you mean 'lora.rank'?"),
        ("dtype: fp16", "got 'fp16'; did you mean 'float16'?"),
        ("mixer:\n", "x.yaml:1: mixer: expected a mapping, got null"),
        ("calibrate: {tokens: 0}", "x.yaml:1: calibrate.tokens: expected an integer >= 1, got 0"),
        ("mixer: {keep: {budget: lots}}", "expected a share of the teacher's cache or bytes, such as 10% or 2MB"),
        ("mixer: {windows: {-1: 5}}", "mixer.windows: expected layers counted from 0, got -1"),
        ("mixer:\n  reach: 64", "x.yaml:2: mixer.reach: gone; use mixer.landmarks_by or mixer.keep.budget"),
        (
            "mixer: {memory_dtype: int4}",
            "mixer.memory_dtype: int4 stores landmarks alone in 4 bits, and there are none",
        ),
        ("mixer: {landmarks: -3}", "mixer.landmarks: expected an integer >= 0, got -3"),
        (
            "mixer: {landmark_layers: {-1: 3}}",
            "mixer.landmark_layers: expected layers counted from 0, each with a number of landmarks",
        ),
        ("mixer: {keep: {layers: [-1]}}", "mixer.keep.layers: expected layers and heads counted from 0, got -1"),
        ("mixer: {keep: {heads: {1: [-2]}}}", "mixer.keep.heads: expected layers and heads counted from 0, got -2"),
        ("mixer: {keep: {every: 1}}", "x.yaml:1: mixer.keep.every: expected an integer >= 2 or null, got 1"),
        ("mixer: {keep: {layers: 3}}", "mixer.keep.layers: expected a list of integers, got 3"),
        ("mixer: {keep: {heads: [1]}}", "mixer.keep.heads: expected a mapping, got [1]"),
        ("stages:\n- data: {source: self}", "x.yaml:2: stages.0.objective: missing key; expected one of"),
        (STAGE + "  length: 1000", "stages.0.batch_tokens: expected a multiple of length (1000), got 8192"),
        ("seed: 1\nseed: 2", "x.yaml:2: seed: key given twice (first on line 1)"),
        ("a: &x 1", "x.yaml:1: anchors and aliases are not allowed"),
        ("a: 1\nb: *x", "x.yaml:2: anchors and aliases are not allowed"),
        ("a: !!python/object/apply:os.getcwd []", "x.yaml:1: tags (!...) are not allowed"),
        ("? [a]\n: 3", "x.yaml:1: a key must be plain text"),
        ("a: b: c", "x.yaml:1: not valid YAML"),
        ("seed: 1\n---\nseed: 2", "x.yaml:2: not valid YAML"),
        ("seed: 1\nmodel: '\x07'", "x.yaml:2: a control character is not allowed"),
        ("", "x.yaml: expected a mapping of recipe keys, got an empty document"),
        ("[1]", "x.yaml: expected a mapping of recipe keys, got [1]"),
        ("seed: " + "[" * 5000, "x.yaml: nested too deeply"),
        ("seed: " + "9" * 5000, "x.yaml:1: seed: expected an integer >= 0 and < 4294967296, got '999"),
    ],
)
def test_errors_in_a_recipe(text: str, message: str) -> None:
    assert message in error_of(text)


def test_a_recipe_of_landmarks_without_any_is_one_error_with_a_way_out() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("default", ["mixer.landmarks=0"])
    assert str(caught.value) == (
        "--set mixer.landmarks=0: this recipe keeps tokens in landmarks and needs 1 or more; "
        "for none take another recipe, such as --recipe window-gla"
    )
    load_recipe("window-gla", ["mixer.landmarks=0"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mixer.windw=3", "--set mixer.windw=3: unknown key; did you mean 'mixer.window'?"),
        ("mixer.window=abc", "--set mixer.window=abc: expected an integer >= 1, got 'abc'"),
        ("mixer={windw: 3}", "--set mixer={windw: 3}: mixer.windw: unknown key; did you mean 'window'?"),
        ("mixer.reach=64", "--set mixer.reach=64: gone; use mixer.landmarks_by or mixer.keep.budget"),
        ("lr=3", "--set lr=3: unknown key; did you mean 'stages.0.lr'?"),
        ("mixer.window", "--set mixer.window: expected key=value"),
        ("=3", "--set =3: expected key=value"),
        ("stages.1.lr=3", "--set stages.1.lr=3: stages: no item 1; the list has 1 item, counted from 0"),
        ("stages.x.lr=3", "--set stages.x.lr=3: stages: no item 'x'"),
        ("mixer.window.x=3", "--set mixer.window.x=3: mixer.window has no keys of its own"),
        ("stages.0.objective.sft=1", "stages.0.objective has no keys of its own"),
        ("mixer.gate.bias=[", "--set mixer.gate.bias=[: not valid YAML"),
        ("seed=*a", "--set seed=*a: anchors and aliases are not allowed"),
        ("a\nb\x1b=3", "--set a b =3: unknown key"),
    ],
)
def test_errors_in_an_override(override: str, message: str) -> None:
    assert message in error_of(STAGE, override)


def test_overrides_change_single_keys() -> None:
    recipe = parse_recipe(
        STAGE + "lora: null\n",
        "x.yaml",
        ["stages.0.lr=1e-4", "mixer.gate.bias=3", "lora.rank=16", "evaluate.tasks=[piqa]", "mixer.window=32"],
    )
    assert recipe.stages[0].lr == 1e-4
    assert recipe.mixer.gate.bias == 3.0
    assert recipe.mixer.window == 32
    assert recipe.lora is not None
    assert recipe.lora.rank == 16
    assert recipe.evaluate.tasks == ["piqa"]


def test_a_recipe_saved_by_version_0_1_0_still_reads() -> None:
    recipe = parse_recipe("mixer: {window: 8, windows: {0: 2, 1: 14}, reach: null}", "x.yaml")
    assert recipe.mixer.windows == {0: 2, 1: 14} and recipe == parse_recipe(dump_recipe(recipe), "x.yaml")


def test_an_override_can_mend_a_wrong_key() -> None:
    assert parse_recipe("mixer: {window: abc}", "x.yaml", ["mixer.window=8"]).mixer.window == 8


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.0e-3", 1e-3),
        ("2_000_000", 2_000_000),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("-.inf", float("-inf")),
        ("017", 17),
        ("12:30", "12:30"),
        ("yes", "yes"),
        ("2020-01-01", "2020-01-01"),
        ("1e", "1e"),
        ("'1'", "1"),
        ("TRUE", True),
        ("~", None),
        ("", None),
    ],
)
def test_plain_values(text: str, value: object) -> None:
    read = parse_document(f"a: {text}\n").value["a"]
    assert read == value
    assert type(read) is type(value)


plain: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(plain)
def test_written_values_read_back(value: object) -> None:
    assert repr(parse_document(write_document(value)).value) == repr(value)


@pytest.mark.parametrize(
    "text", ["1e-3", "null", "yes", "2_0", "a: b", "# c", " x ", "line\nbreak", "'", "é\u2028…", ""]
)
def test_awkward_text_survives_a_dump(text: str) -> None:
    recipe = Recipe(description=text)
    assert parse_recipe(dump_recipe(recipe), "x.yaml") == recipe


def test_a_mapping_without_a_space_after_its_colon_is_told() -> None:
    with pytest.raises(RecipeError, match="write 0: 9, with a space after the colon"):
        load_recipe("window-gla", ["mixer.landmark_layers={0:9}"])


def test_every_shipped_recipe_is_valid_described_and_round_trips() -> None:
    recipes = shipped_recipes()
    assert [recipe.name for recipe in recipes][:4] == ["default", "small", "train", "liger-gla"]
    for shipped in recipes:
        recipe = load_recipe(shipped.name)
        assert shipped.description == recipe.description != ""
        assert parse_recipe(dump_recipe(recipe), "x.yaml") == recipe
        assert recipe_path(shipped.name) == shipped.path


def test_a_file_is_read_and_named_in_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_bytes(b"\xef\xbb\xbfseed: 3\r\n")
    assert load_recipe("mine.yaml").seed == 3
    Path("mine.yaml").write_text("seed: 3\nsed: 4\n")
    with pytest.raises(RecipeError, match=r"^mine.yaml:2: sed: unknown key; did you mean 'seed'\?$"):
        load_recipe("mine.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 1\0", "contains NUL bytes"),
        (b"seed: 1\nmodel: \xff", "x.yaml:2: not UTF-8 text"),
        (b"#" * 1_000_001, "larger than 1000 kB"),
    ],
)
def test_files_that_are_not_recipes(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(file))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "ligr-gla",
            "unknown recipe 'ligr-gla'; did you mean 'liger-gla' or 'liger-gla-h'? run 'linearize recipes ls'",
        ),
        ("no/liger-gla.yml", "no/liger-gla.yml: no such file; did you mean 'liger-gla' or 'liger-gla-h'?"),
        ("zzz", "unknown recipe 'zzz'; run 'linearize recipes ls'"),
        (os.devnull, "not a regular file"),
        ("x" * 5000, "cannot be read"),
    ],
)
def test_names_that_are_no_recipe(name: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert message in str(caught.value)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a folder, not a recipe"):
        load_recipe(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match="a model, not a recipe; name a recipe first, and --set model="):
        load_recipe(str(tmp_path))


def test_a_stage_may_be_named_in_brackets() -> None:
    recipe = load_recipe("window-gla", ["stages[0].lr=5e-4"])
    assert recipe == load_recipe("window-gla", ["stages.0.lr=5e-4"])
    assert recipe.stages[0].lr == 5e-4
