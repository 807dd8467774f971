"""`linearize probe` as a user meets it: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, T5Config

SMALL = ("--tokens", "896", "--length", "448", "--set", "mixer.window=24")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINEARIZE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "story.txt"
    file.write_text("\n\n".join(f"Once upon a time there was a cat. It saw {n} dogs and ran away." for n in range(200)))
    return file


def test_it_writes_a_report_and_a_recipe(outcome, tiny_folder, tmp_path, text):
    target = tmp_path / "probe"
    arguments = ("probe", tiny_folder, *SMALL, "--text", text, "--budget", "50%", "--context", "4096")
    status, table, words = outcome(*arguments, "-o", target)
    assert status == 0 and "passes over text and needles, about" in words
    facts = json.loads((target / "probe.json").read_text())
    assert facts["window"] == 24 and facts["text"]["queries"] > 0 and facts["needles"] == 2
    heads = [head for layer in facts["layers"] for head in layer["heads"]]
    assert all(head["window"] + head["sinks"] + head["beyond"] == pytest.approx(1, abs=1e-4) for head in heads)
    parts = facts["damage"]["parts"]
    assert [part["layer"] for part in parts] == sorted(
        range(len(facts["layers"])), key=lambda i: -next(p for p in parts if p["layer"] == i)["total"]["value"]
    )
    page = (target / "report.html").read_text()
    assert "</html>" in page and page.count("<svg") == 3 and "probe.svg" in (target / "report.md").read_text()
    assert (target / "probe.svg").read_text().startswith("<svg")
    kept = facts["keep"]
    if kept["mixer"]:  # damage that stands out is not a matter of course in a model that was not trained
        recipe = (target / "keep.yaml").read_text()
        assert table.endswith(recipe) and kept["bytes"] <= kept["budget_bytes"]
        plan = outcome("inspect", tiny_folder, "--recipe", target / "keep.yaml", "--json")[1]
        growth = json.loads(plan)["growth_bytes_per_token"]
        assert growth * 4096 == kept["bytes"]
        assert (
            json.loads(outcome("inspect", tiny_folder, "--set", kept["set"], "--json")[1])["softmax_layers"]
            == (json.loads(plan)["softmax_layers"])
        )
    status, again, _ = outcome(*arguments, "-o", target, "--overwrite", "--json")
    again = json.loads(again)
    assert status == 0 and again["damage"] == facts["damage"] and again["layers"] == facts["layers"]
    assert outcome(*arguments, "-o", target)[0] == 1


def test_the_teacher_writes_the_text_and_heads_are_told_apart(outcome, tiny_folder, tmp_path):
    status, table, words = outcome("probe", tiny_folder, *SMALL, "--damage", "heads")
    assert status == 0 and "key/value head" in table and "self text" in words
    status, found, _ = outcome("probe", tiny_folder, *SMALL, "--damage", "none", "--json")
    assert status == 0
    facts = json.loads(found)
    assert (
        facts["damage"] is None and facts["keep"] is None and facts["text"]["source"] == "text written by the teacher"
    )
    scores = [head["retrieval"] for layer in facts["layers"] for head in layer["heads"]]
    assert all(0 <= score <= 1 for score in scores) and max(scores) > 0


def test_what_cannot_be_probed_is_told_in_one_line(outcome, tiny_folder, converted, tmp_path, text):
    T5Config().save_pretrained(tmp_path / "t5")
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    single = tmp_path / "single.txt"
    sentences = "It was a cat. " * 100
    tokens = len(AutoTokenizer.from_pretrained(tiny_folder)(sentences).input_ids)
    single.write_text("It was a cat. " * (600 * 100 // tokens))
    jokes = tmp_path / "jokes.jsonl"
    jokes.write_text('{"text": "No."}\n' * 900)
    wrong = [
        ((tmp_path / "t5",), "encoder-decoder"),
        ((converted,), "is a converted model already; probe its base model"),
        ((tiny_folder, *SMALL, "--text", short), "are too few for a row of 448 tokens: lower the length"),
        ((tiny_folder, *SMALL, "--text", single), "a single row of 448 tokens"),
        ((tiny_folder, *SMALL, "--text", jokes), "no document of the text has more than 28 tokens"),
        ((tiny_folder, *SMALL, "--text", tmp_path / "none.txt"), "none.txt"),
        ((tiny_folder, *SMALL, "--text", text, "--budget", "10B"), "a budget of 10 B keeps nothing: at "),
        ((tiny_folder, *SMALL, "--budget", "much"), "such as 10% or 2MB"),
        ((tiny_folder, "--length", "64", "--text", text), "nothing beyond a window of 64 and 4 sinks: raise --length"),
        ((tiny_folder, "--length", "80", "--text", text), "a length of 80 tokens"),
    ]
    for arguments, said in wrong:
        status, out, error = outcome("probe", *arguments, "-o", tmp_path / "out")
        assert status == 1 and out == "" and said in error.splitlines()[-1], (arguments, error)
        assert error.splitlines()[-1].startswith("error: ")
        assert not (tmp_path / "out").exists()
    status, _, error = outcome("probe", tiny_folder, "--damage", "all")
    assert status == 2 and "expected layers, heads or none" in error
