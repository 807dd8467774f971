"""The tables in the READMEs are what the committed figures say."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest

import evals.start.__main__ as start
from evals.faults.__main__ import table as faults_table
from evals.fuzz.__main__ import table as fuzz_table
from evals.picture import bytes_per_token, facts, picture, site_table
from evals.picture import table as results_table
from evals.recovery.telling import markdown as recovery_table
from evals.smollm2.__main__ import table
from evals.speed.figure import figure
from evals.speed.landmarks import FIGURES as landmarks_figures
from evals.speed.landmarks import table as landmarks_table
from linearize.evaluation.results.comparison import FIVE
from linearize.evaluation.results.results import read_results
from linearize.recipe import load_recipe
from linearize.report.formatting import readable_bytes

ROOT = Path(__file__).resolve().parents[2]


def test_what_smollm2_loses():
    readme = (ROOT / "evals" / "README.md").read_text(encoding="utf-8")
    assert table() in readme
    ours, teachers = (
        [
            item
            for score in read_results(ROOT / "evals" / "smollm2" / folder).scores[system].tasks
            if score.task in FIVE
            for item in score.items
        ]
        for folder, system in (("default", "model"), ("window-gla", "teacher"))
    )
    equal, asked = sum(a == b for a, b in zip(ours, teachers, strict=True)), len(ours)
    assert f"answers {equal} of the {asked} short items as the teacher does" in readme
    results = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    assert f"the default ({asked - equal} of {asked} answers differ)" in results


def test_what_each_start_brings():
    readme = (ROOT / "evals" / "README.md").read_text(encoding="utf-8")
    for name in ("figures.json", "calibrated.json", "long.json", "trained.json"):
        file = start.FIGURES.with_name(name)
        assert start.table(json.loads(file.read_text(encoding="utf-8"))) in readme


def test_what_landmarks_find_untrained():
    said = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    rows = json.loads(start.FIGURES.read_text(encoding="utf-8"))["rows"]
    exact, first = rows["landmarks-exact"]["systems"], next(iter(rows.values()))["systems"]

    def above(system: str) -> str:
        pretrained, found = (one["scores"]["perplexity"]["value"] for one in (first["teacher"], exact[system]))
        return f"{(found / pretrained - 1) * 100:.1f} % above"

    def needles(system: str) -> int:
        scores = [exact[system]["scores"][f"{task} 2048"] for task in start.NEEDLES]
        return round(sum(score["value"] * score["n"] for score in scores))

    assert f"is {above('model')} its perplexity" in said and f"is {above('window_bytes')} it" in said
    assert needles("model") == 20 and "finds all of 20 needles in 2,048 tokens" in said
    assert f"and finds {needles('window_bytes')} (" in said


def test_what_comes_back_for_how_many_tokens():
    folder = ROOT / "evals" / "recovery"
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert recovery_table(found) in readme
    more = json.loads((folder / "bfloat16.json").read_text(encoding="utf-8"))
    assert recovery_table(more) in readme
    earlier = json.loads((folder / "float32.json").read_text(encoding="utf-8"))["cells"][-1]["figures"]
    for one in (earlier["model"], earlier["no_recurrence"]):
        assert f"{one['kl'][0]:.4f}" in readme and f"{one['perplexity'][0]:.2f}" in readme
    # Better than its own start, and at the same tokens than the recipes of others.
    figures = {(cell["system"], cell["budget"]): cell["figures"]["model"] for cell in found["cells"]}
    for name in ("perplexity", "kl", "loss"):
        assert figures["ours", 200_000][name][0] < figures["ours", 0][name][0]
        trained = [figures[system, 200_000][name][0] for system in ("ours", "lolcats", "liger")]
        assert trained == sorted(trained)
    said = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    said = said[said.index("With 0.2M tokens on a CPU") : said.index("([evals/recovery]")]
    shown = [figures[cell]["perplexity"][0] for cell in (("ours", 200_000), ("lolcats", 200_000), ("landmarks", 0))]
    for value in (*shown, found["cells"][-1]["figures"]["teacher"]["perplexity"][0]):
        assert f"{value:.2f}" in said
    assert f"{figures['liger', 200_000]['perplexity'][0]:.1e}" in said
    longer = [cell["figures"]["model"]["perplexity"][0] for cell in more["cells"] if cell["system"] == "ours"]
    assert f"({longer[0]:.2f} with 0.4M, {longer[1]:.2f} with 2M)" in said
    last = more["cells"][-1]["figures"]
    window, off, teacher = (last[name]["perplexity"][0] for name in ("window", "no_recurrence", "teacher"))
    assert f"{(window - longer[1]) / (window - teacher):.0%}".replace("%", " %") + " of the way. Five times" in readme
    assert (
        f"of the {window - longer[1]:.2f} that it is better than the window the state brings {off - longer[1]:.2f}"
        in readme
    )


def test_how_fast_it_is_on_a_cpu():
    readme = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (writing after|reading|training on) ([\d,]+) tokens \|(.*)\|$", readme, re.MULTILINE)
    kinds = {"writing after": "decode", "reading": "prefill", "training on": "train"}
    shown = {
        (kinds[kind], int(tokens.replace(",", "")), system): float(cell.replace(",", ""))
        for kind, tokens, cells in rows
        for system, cell in zip(("teacher", "teacher-onednn", "model", "int8"), cells.split("|"), strict=True)
        if cell.strip() != "–"  # integers are not trained
    }
    figures = json.loads((ROOT / "evals" / "speed" / "smollm2-cpu.json").read_text(encoding="utf-8"))
    measured = {
        (row["kind"], row["tokens"], row["system"]): round(
            row["tokens_per_second"], 1 if row["tokens_per_second"] < 100 else 0
        )
        for row in figures["rows"]
    }
    assert shown == measured


def test_what_training_with_landmarks_costs():
    notes = (ROOT / "evals" / "speed" / "NOTES.md").read_text(encoding="utf-8")
    assert landmarks_table(json.loads(landmarks_figures.read_text(encoding="utf-8"))) in notes


@pytest.mark.parametrize(
    ("name", "draw"),
    [("speed", figure), ("picture", partial(picture, wide=True)), ("picture-narrow", picture)],
)
def test_the_figures_are_what_was_measured(name, draw):
    drawn = (ROOT / "docs" / f"{name}.svg").read_text(encoding="utf-8")
    # Texts alone, because places depend on the version of matplotlib.
    described, texts = (re.findall(rf"<{tag}[^>]*>([^<]*)<", draw()) for tag in ("desc", "text"))
    assert described == re.findall(r"<desc>([^<]*)<", drawn) and "teacher: " in described[0]
    assert texts == re.findall(r"<text[^>]*>([^<]*)<", drawn)


def test_the_results_of_the_readme_are_what_was_measured():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results_table() in readme and all(fact in " ".join(readme.split()) for fact in facts())
    assert len(readme.split()) <= 1000
    assert site_table() in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert facts()[0].removesuffix(", where").removeprefix("in ") in load_recipe("default").measured


def test_what_the_demo_found():
    found = json.loads((ROOT / "evals" / "demo" / "demo.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    titles = {"window": f"window of {found['window']} tokens"}
    for name, one in found["systems"].items():
        cells = [titles.get(name, name), readable_bytes(one["memory_bytes"]), f"{sum(one['right'])} of 4"]
        assert f"| {' | '.join([*cells, format(one['perplexity'], '.2f')])} |" in readme


def test_the_sentences_of_the_readme_are_what_was_measured():
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

    def figures(file: str) -> dict:
        return json.loads((ROOT / "evals" / file).read_text(encoding="utf-8"))

    slots, demo = figures("slots/smollm2.json"), figures("demo/demo.json")

    def needles(length: int, system: str) -> tuple[int, int]:
        texts = slots["values"][f"niah_single_2 {length}"][system].values()
        return round(sum(texts)), len(texts)

    found, asked = needles(2048, "default@1035")
    cache = readable_bytes(2048 * bytes_per_token(slots))
    assert f"finds {found} of {asked} facts hidden in 2,048 tokens" in said
    assert f"its own 16-bit cache has {cache} there" in said
    (found, asked), (teachers, same) = needles(8192, "default@1035"), needles(8192, "teacher")
    assert asked == same and f"In 8,192 tokens the default finds {found} of {asked}, the teacher {teachers}." in said

    assert f"({sum(demo['seconds'].values()) / 60:.1f} minutes on two cores)" in said
    assert f"memory at {demo['tokens']:,} tokens" in said and len(demo["questions"]) == 4

    trained = figures("start/trained.json")["rows"]
    before, after, teacher = (
        f"{trained[row]['systems'][system]['scores']['perplexity']['value']:.2f}"
        for row, system in (("calibrated", "model"), ("calibrated-trained", "model"), ("calibrated", "teacher"))
    )
    assert f"improves perplexity from {before} to {after}; the teacher has {teacher}" in said

    (ours, teachers), (later, theirs) = (
        (f"{row['per_core_second']['slots']:.1f}", f"{row['per_core_second']['teacher, oneDNN']:.1f}")
        for tokens in (2048, 32768)
        for row in figures("speed/recipes.json")["rows"]
        if row["kind"] == "write" and row["tokens"] == tokens
    )
    assert (
        f"{ours} tokens per core-second at 2,048 tokens (teacher {teachers}) and {later} at 32,768 (teacher {theirs})"
        in said
    )

    mixer = load_recipe("default").mixer
    assert f"window ({mixer.window})" in said and f"slots ({mixer.landmarks:,} a head on average)" in said
    assert f"the first {mixer.sinks} tokens" in said


def test_what_the_probe_says_of_it():
    readme = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    kept = (ROOT / "evals" / "smollm2" / "probe" / "keep.yaml").read_text(encoding="utf-8")
    layers = re.search(r"layers: \[(\d+), (\d+), (\d+)\]$", kept, re.MULTILINE)
    falls = re.search(r"All windowed: .*answers −(\S+)\. All but these: .*answers −(\S+) \(", kept)
    assert layers is not None and falls is not None
    before, after = (f"{float(fall):.2f}" for fall in falls.groups())
    said = " ".join(readme.split())
    assert "keeping layers {}, {} and {}, a tenth of the cache".format(*layers.groups()) in said
    assert f"from {before} to {after} nats per token" in said


def test_what_the_fuzzers_found():
    assert fuzz_table() in (ROOT / "evals" / "fuzz" / "README.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "evals" / "fuzz" / "fuzz.json").read_text(encoding="utf-8"))["rows"]
    assert sum(row["crashes"] + row["hangs"] + row["leaks"] for row in rows) == 0


def test_what_planted_faults_cost():
    assert faults_table() in (ROOT / "evals" / "faults" / "README.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "evals" / "faults" / "faults.json").read_text(encoding="utf-8"))["rows"]
    assert sum(row["lost"] for row in rows) == 0
