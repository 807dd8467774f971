"""The commands as a user meets them: good input, bad input, and what is left behind."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from linearize.checkpoint.provenance import checkpoint_digest
from linearize.cli.app import COMMANDS
from linearize.recipe import load_recipe
from linearize.sources.source import find_source
from tests.conftest import random_llama


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))


GLA = ("-r", "window-gla")
NO_DATA = "stages.0.data.source=no.txt"
SMALL = (
    "mixer.window=16", "stages.0.data.tokens=512", "stages.0.data.held_out=2", "stages.0.length=64",
    "stages.0.batch_tokens=128",
)  # fmt: skip


def settings(*more: str) -> list[str]:
    return [word for change in (*SMALL, *more) for word in ("--set", change)]


def test_inspect_tells_the_same_to_people_and_programs(outcome, tiny_folder):
    status, text, _ = outcome("inspect", tiny_folder)
    assert status == 0 and "131,072" in text and "window 64, 4 sinks, 1,035 landmarks, no recurrence" in text
    # In the default there is no state, and the cache has the checkpoint's dtype.
    assert "teacher's cache (float32)" in text and "state in float32" not in text
    assert "state in float32" in outcome("inspect", tiny_folder, "-r", "window-gla")[1]
    status, text, _ = outcome("inspect", tiny_folder, "--set", "mixer.window=128", "--json")
    facts = json.loads(text)
    assert status == 0 and facts["mixers"][0]["window"] == 128
    assert facts["state_bytes"] == sum(facts["state_parts"].values())
    assert [line["tokens"] for line in facts["lengths"]] == [1_024, 8_192, 131_072, 1_048_576]
    line = facts["lengths"][1]
    width = facts["key_value_heads"] * (facts["key_width"] + facts["value_width"])
    assert line["teacher_bytes"] == 8_192 * facts["layers"] * width * 4
    assert line["converted_bytes"] == facts["state_bytes"]


def test_inspect_tells_which_kernels_run(outcome, tiny_folder, monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", "torch")
    _, text, _ = outcome("inspect", tiny_folder)
    assert "kernels   cpu: torch (LINEARIZE_KERNELS=torch)" in text
    facts = json.loads(outcome("inspect", tiny_folder, "--json")[1])
    assert facts["kernels"]["cpu"]["step"] == {"kernels": "torch", "why": "LINEARIZE_KERNELS=torch"}
    monkeypatch.setenv("LINEARIZE_KERNELS", "cuda")
    status, text, errors = outcome("inspect", tiny_folder)
    assert status == 1 and not text
    assert errors == (
        "error: LINEARIZE_KERNELS=cuda: there is no such choice; take reference, torch, triton, fla, native, or leave "
        "it out\n"
    )


def test_inspect_compares_all_recurrences(outcome, tiny_folder):
    status, text, _ = outcome("inspect", tiny_folder, "--recurrence", "all")
    assert status == 0 and "gated_deltanet" in text and "131,072 tokens" in text
    facts = json.loads(outcome("inspect", tiny_folder, "--recurrence", "all", "--json")[1])
    rows = {row["name"]: row for row in facts["recurrences"]}
    assert list(rows)[:2] == ["none", "gla"] and len(rows) == 17
    for name in ("none", "kda", "rg_lru"):
        one = json.loads(outcome("inspect", tiny_folder, "--recurrence", name, "--json")[1])
        assert one["mixers"][0]["recurrence"] == name
        assert rows[name] == {key: one[key] for key in rows[name] if key != "name"} | {"name": name}
        assert [line["teacher_flops"] for line in one["lengths"]][:3] == [line["flops"] for line in facts["teacher"]]
    queries, width, layers = facts["query_heads"], facts["key_width"] + facts["value_width"], facts["layers"]
    assert facts["teacher"][1]["flops"] == 2 * layers * queries * width * 8_192
    assert rows["none"]["flops"] == 2 * layers * queries * width * (64 + 4) < rows["gla"]["flops"]
    assert rows["none"]["state_parts"].get("state", 0) == 0


def test_inspect_tells_what_does_not_fit_and_what_grows(outcome, tiny_folder):
    changes = ("--set", "mixer.mix=softmax", "--set", "mixer.keep.every=2", "--recurrence", "all")
    status, text, _ = outcome("inspect", tiny_folder, *changes)
    assert status == 0 and "kda does not fit: mixer: mix: softmax needs a recurrence with a normaliser" in text
    assert "keeps     softmax, which adds " in text and "FLOPs per token of context to each row" in text
    rows = json.loads(outcome("inspect", tiny_folder, *changes, "--json")[1])["recurrences"]
    refused = {row["name"] for row in rows if "refused" in row}
    assert refused == {"mlstm", "rwkv7", "gated_deltanet", "kda", "gateloop", "rg_lru", "mingru"}
    kept = next(row for row in rows if row["name"] == "gla")
    assert kept["growth_flops_per_token"] > 0 and kept["growth_bytes_per_token"] > 0


def test_recipes_are_listed_with_what_they_cost_a_model(outcome, tiny_folder):
    status, text, _ = outcome("recipes", "ls", "--model", tiny_folder)
    assert status == 0
    line = next(line for line in text.splitlines() if line.startswith("kda "))
    assert re.search(r" kB  +[0-9.]+ k FLOPs  +KDA: ", line)
    assert text.splitlines()[0].split("  ")[0] == "RECIPE" and "MEMORY OF A SEQUENCE" in text.splitlines()[0]
    rows = {row["name"]: row for row in json.loads(outcome("recipes", "ls", "--model", tiny_folder, "--json")[1])}
    facts = json.loads(outcome("inspect", tiny_folder, "-r", "liger-gsa", "--json")[1])
    assert rows["liger-gsa"]["state_parts"] == facts["state_parts"] and rows["liger-gsa"]["flops"] == facts["flops"]


def test_inspect_of_a_converted_model_shows_its_own_mixer(outcome, converted):
    _, text, _ = outcome("inspect", converted, "--json")
    facts = json.loads(text)
    assert facts["converted"] and facts["mixers"][0]["window"] == 16


def test_convert_dry_run_writes_nothing(outcome, tiny_folder, tmp_path):
    status, text, _ = outcome("convert", tiny_folder, "-o", tmp_path / "out", "-r", "window-gla", "--dry-run", "--json")
    assert status == 0 and json.loads(text)["written"] is False
    assert not (tmp_path / "out").exists()


def test_convert_refuses_then_overwrites(outcome, tiny_folder, converted):
    before = (converted / "config.json").read_text()
    status, _, error = outcome("convert", tiny_folder, "-o", converted)
    assert status == 1 and "--overwrite" in error and (converted / "config.json").read_text() == before
    assert (
        outcome("convert", tiny_folder, "-o", converted, "--overwrite", "-r", "window-gla", "--set", "mixer.window=16")[
            0
        ]
        == 0
    )
    status, _, error = outcome("convert", tiny_folder, "-o", tiny_folder, "--overwrite")
    assert status == 1 and "will not be overwritten" in error and not (tiny_folder / "linearize.json").exists()


def test_a_converted_model_is_no_teacher(outcome, converted, tmp_path):
    own = shutil.copytree(converted, tmp_path / "own")
    made = json.loads((own / "linearize.json").read_text())
    (own / "linearize.json").write_text(json.dumps({**made, "base": {**made["base"], "model": str(converted)}}))
    status, _, error = outcome("eval", own, "--tasks", "passkey", "--baseline", "teacher")
    assert status == 1 and "converted, where the teacher of" in error


def test_generate_streams_text_and_reports_memory(outcome, converted):
    status, text, words = outcome("generate", converted, "Once upon a time", "-n", "20")
    assert status == 0 and text.strip() and "constant" in words and "tok/s" in words
    status, again, _ = outcome("generate", converted, "Once upon a time", "-n", "20", "--json")
    facts = json.loads(again)
    assert facts["text"].strip() == text.strip() and facts["new_tokens"] == 20 and facts["memory_is_constant"]
    longer = json.loads(outcome("generate", converted, "Once upon a time " * 50, "-n", "2", "--json")[1])
    assert longer["memory_bytes"] == facts["memory_bytes"]


def test_generate_with_a_plain_model_and_sampling(outcome, tiny_folder):
    arguments = ("generate", tiny_folder, "Once", "-n", "8", "--temperature", "1", "--seed", "3", "--json")
    first, second = (json.loads(outcome(*arguments)[1]) for _ in range(2))
    assert first["text"] == second["text"] and not first["memory_is_constant"]


def test_generate_tells_which_of_a_checkpoints_settings_it_does_not_follow(outcome, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | {"no_repeat_ngram_size": 3}))
    status, _, err = outcome("generate", tmp_path / "m", "Once", "-n", 2)
    assert status == 0
    assert "warning: the checkpoint's generation settings no_repeat_ngram_size are not applied" in err.splitlines()


def test_generate_saves_and_loads_a_state(outcome, converted, tmp_path):
    state = tmp_path / "a.state"
    whole = json.loads(outcome("generate", converted, "Once upon a time", "-n", "30", "--json")[1])
    status, text, words = outcome("generate", converted, "Once upon a time", "-n", "0", "--save-state", state)
    assert status == 0 and text == "" and f"state of {whole['prompt_tokens']} tokens" in words, words
    size = state.stat().st_size
    arguments = ("generate", converted, "--load-state", state, "--save-state", state, "-n", "15", "--json")
    parts = [json.loads(outcome(*arguments)[1]) for _ in range(2)]
    assert "".join(part["text"] for part in parts).replace(" ", "") == whole["text"].replace(" ", "")
    saved = {"file": str(state), "tokens": whole["prompt_tokens"] + 30, "bytes": size}
    assert parts[1]["saved_state"] == saved and state.stat().st_size == size
    assert parts[1]["loaded_state"]["tokens"] == whole["prompt_tokens"] + 15
    assert parts[1]["memory_bytes"] == whole["memory_bytes"] < size

    one, two = "Once upon a time", "there was a dog."
    outcome("generate", converted, one, "-n", "0", "--save-state", state)
    status, text, words = outcome("generate", converted, two, "-n", "5", "--load-state", state)
    assert status == 0 and text.strip() and f"tokens loaded: {state}" in words
    status, _, error = outcome("generate", converted, two, "-n", "0")
    assert status == 2 and "--save-state" in error
    status, _, error = outcome("generate", converted)
    assert status == 2 and "give a PROMPT" in error
    status, _, error = outcome("generate", converted, two, "--load-state", converted / "model.safetensors")
    assert status == 1 and "is not a state" in error


def test_finetune_eval_and_run_end_to_end(outcome, tiny_folder, converted, tmp_path):
    status, text, words = outcome(
        "finetune", "window-gla", "-o", tmp_path / "tuned", *settings(f"model={converted}"), "--json"
    )
    assert status == 0, words
    assert json.loads(text)["stages"][0]["tokens"] == 512
    assert {path.name for path in tmp_path.iterdir()} == {"tuned", "cache"}
    status, text, words = outcome("eval", tmp_path / "tuned", "--baseline", "window", "--json")
    assert status == 0, words
    report = json.loads(text)
    assert report["systems"] == ["teacher", "window", "window_bytes", "no_recurrence", "model"]
    divergence = next(row for row in report["metrics"] if row["metric"] == "kl")["values"]
    assert divergence["teacher"]["value"] < 1e-6 < divergence["window"]["value"]

    defaults = load_recipe("window-gla").evaluate.baselines
    assert defaults == ["teacher", "window_bytes", "no_recurrence"]
    chosen = settings(f"model={tiny_folder}", f"evaluate.baselines=[window,{','.join(defaults)}]")
    status, text, words = outcome("run", "window-gla", "-o", tmp_path / "run", *chosen, "--json")
    assert status == 0, words
    systems = ["teacher", "window", "window_bytes", "no_recurrence", "converted", "finetuned"]
    assert (
        json.loads(text)["systems"] == systems and f"evaluating finetuned ({len(systems)} of {len(systems)})" in words
    )
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "converted", "finetuned", "report.json", "report.md", "report.html", "results.json", "memory.svg",
    }  # fmt: skip
    told = json.loads((tmp_path / "run" / "results.json").read_text())
    sizes = {system["name"]: system["state_bytes"] for system in told["systems"]}
    assert sizes["teacher"] == 0 < sizes["window"] < sizes["window_bytes"] <= sizes["converted"]
    assert sizes["converted"] == sizes["finetuned"] == sizes["no_recurrence"]
    marks = {system["name"]: system["checkpoint"] for system in told["systems"] if system["dtype"]}
    assert marks == {
        name: checkpoint_digest(find_source(str(tmp_path / "run" / name))) for name in ("converted", "finetuned")
    }
    assert len({*marks.values()} - {None}) == 2
    assert {task["suite"] for task in told["tasks"]} == {"held-out"}
    rows = {
        row["metric"]: row["values"] for row in json.loads((tmp_path / "run" / "report.json").read_text())["metrics"]
    }
    losses = {name: cell["value"] for name, cell in rows["loss"].items()}
    assert losses["converted"] == pytest.approx(losses["window"], rel=1e-5)
    assert losses["no_recurrence"] != losses["finetuned"] != losses["converted"]
    assert "With its recurrence off" in (tmp_path / "run" / "report.md").read_text()


def test_a_prompt_without_tokens_is_told(outcome, tmp_path):
    status, _, error = outcome("generate", random_llama(tmp_path), "")  # its tokenizer adds no token of its own
    assert status == 1 and "prompt is empty" in error


def test_help_is_quick_to_import_and_has_examples():
    """In one process, so a single command that loads torch shows in all after it."""
    code = (
        "import sys; from linearize.cli.app import COMMANDS, run\n"
        "for name in COMMANDS: run([name, '--help']); print(sorted({'torch', 'transformers'} & {*sys.modules}), '\\f')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command, page in zip(COMMANDS, done.stdout.split("\f"), strict=False):
        assert page.strip().endswith("[]"), command
        assert f"linearize {command}" in page.split("Examples:")[1]


BEFORE_TORCH = """
import sys
from linearize.cli.app import run
from linearize.evaluation.tasks import index

index._read = dict  # none of lm-eval's names, which take half a minute to read
for line in sys.stdin.read().splitlines():
    status = run(line.split("|"))
    loaded = sorted({"torch", "transformers"} & set(sys.modules))
    print(status, *loaded)
"""


def test_a_recipe_its_changes_and_the_output_are_checked_before_torch_is_loaded(tmp_path):
    """In one process, so a single command that loads torch shows in all after it."""
    taken = write(tmp_path / "taken" / "notes.txt", "mine").parent
    below_a_file = taken / "notes.txt" / "out"
    commands = [
        (["convert", "m", "-o", "out", "-r", "landmark"], "unknown recipe 'landmark'"),
        (["convert", "m", "-o", "out", "--set", "mixer.windw=3"], "did you mean 'mixer.window'"),
        (["convert", "m", "-o", taken], "exists and is not empty"),
        (["convert", "m", "-o", below_a_file], "is a file, and not a folder"),
        (["run", "landmark", "-o", "out"], "unknown recipe 'landmark'"),
        (["run", "window-gla", "-o", taken], "exists and is not empty"),
        (["finetune", "landmark", "-o", "out"], "unknown recipe 'landmark'"),
        (["finetune", "landmark", "-o", "out", "--launch", "2"], "unknown recipe 'landmark'"),
        (["finetune", "window-gla", "-o", taken], "exists and is not empty"),
        (["finetune", "default", "-o", "out"], "has no stages"),
        (["inspect", "m", "-r", "landmark"], "unknown recipe 'landmark'"),
        (["inspect", "m", "--recurrence", "kdaa"], "did you mean 'kda'"),
        (["probe", "m", "--set", "mixer.windw=3"], "did you mean 'mixer.window'"),
        (["probe", "m", "-o", below_a_file], "is a file, and not a folder"),
        (["bench", "m", "-r", "landmark"], "unknown recipe 'landmark'"),
        (["bench", "m", "-o", taken], "exists and is not empty"),
        (["demo", "-o", taken], "exists and is not empty"),
        (["export", "m", taken], "exists and is not empty"),
        (["eval", "m", "--suite", "recal"], "no suite called 'recal'"),
        (["eval", "m", "--tasks", "misspelt"], "no task called 'misspelt'"),
        (["eval", "m", "--tasks", "passkee,piqa"], "did you mean passkey"),
        (["run", "-o", "out", "--resume"], "no unfinished run to resume; name a recipe"),
        (["eval", "m", "--report", below_a_file], "is a file, and not a folder"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", BEFORE_TORCH], capture_output=True, text=True, check=True, cwd=tmp_path,
        input="\n".join("|".join(map(str, command)) for command, _ in commands),
    )  # fmt: skip
    assert done.stdout.splitlines() == ["1"] * len(commands), done.stderr
    for (command, told), line in zip(commands, done.stderr.splitlines(), strict=True):
        assert told in line, command


def test_a_folder_that_is_closed_is_told_before_any_work(tmp_path, monkeypatch, outcome):
    monkeypatch.setattr("linearize.runtime.files.os.access", lambda path, mode: False)
    status, _, error = outcome("convert", "m", "-o", tmp_path / "a" / "b")
    assert status == 1 and f"the folder {tmp_path} is closed to you" in error


@pytest.mark.parametrize("recipe", ["default", "small"])
def test_a_context_as_short_as_what_is_read_exactly_is_refused_at_once(outcome, tmp_path, monkeypatch, recipe):
    folder = random_llama(tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    monkeypatch.setattr("linearize.jobs.convert.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    commands = [["convert", folder, "-o", tmp_path / "out", "-r", recipe], ["run", recipe, "-o", tmp_path / "out"]]
    stage = "stages=[{objective: sft, length: 64, data: {source: self, tokens: 640}}]"
    commands.append(["finetune", recipe, "-o", tmp_path / "out", "--set", stage])
    for command in commands:
        model = () if command[0] == "convert" else ("--set", f"model={folder}")
        for more in ((), ("--dry-run",)) if command[0] != "run" else ((),):
            status, text, error = outcome(*command, *model, *more)
            assert (status, text) == (1, ""), command
            (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
            assert "of a text exactly, and this model's context is 256 tokens: lower mixer.landmarks" in line
    status, text, words = outcome("inspect", folder, "-r", recipe)
    assert (status, words) == (0, f"`linearize convert` refuses this: {line.removeprefix('error: ')}\n") and text
    if recipe != "default":  # in whose place `--recurrence` takes window-gla
        assert outcome("inspect", folder, "-r", recipe, "--recurrence", "all")[2] == words
    # Landmarks that leave something of the context to answer are converted.
    small = ("--set", "mixer.landmarks=32", "--set", "mixer.window=16", "--dry-run")
    assert outcome(*commands[0], *small)[0] == 0
    assert outcome("inspect", folder, "-r", recipe, *small[:-1])[2] == ""


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.check
def test_help_breaks_lines_at_the_width_of_the_terminal(width):
    """A paragraph's lines are full: the first word of the next would not have fitted."""
    environment = {**os.environ, "COLUMNS": str(width), "TERMINAL_WIDTH": str(width)}
    code = (
        "import sys; from linearize.cli.app import COMMANDS, run\n"
        "for name in COMMANDS: print('\\f'); run([name, '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    pages = done.stdout.split("\f")[1:]
    assert len(pages) == len(COMMANDS)
    for page in pages:
        about = [line.strip() for line in page.split("╭", 1)[0].splitlines()]
        for line, following in itertools.pairwise(about):
            if line and following:
                assert len(f" {line} {following.split()[0]}") > width - 2, (line, following)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def config(folder: Path, **values: object) -> Path:
    write(folder / "config.json", json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda t, _: ["convert", t / "nowhere", "-o", t / "out"], "no such folder or file"),
        (lambda t, _: ["inspect", t / "x.gguf"], "no such folder or file"),
        (lambda t, m: ["convert", f"{m}x", "-o", t / "out"], "did you mean"),
        (lambda t, _: ["convert", t, "-o", t / "out"], "no config.json"),
        (lambda t, _: ["inspect", write(t / "a.gguf", "GGUF")], "cut off"),
        (lambda t, _: ["convert", write(t / "a.gguf", b"nothing"), "-o", t / "out"], "not a GGUF file"),
        (lambda t, m: ["convert", m, "-o", t / "out", "--set", "mixer.keep.layers=[9]"], "there is no layer 9"),
        (lambda t, m: ["inspect", m, "--set", "mixer.keep.heads={0: [9]}"], "there is no key/value head 9"),
        (lambda t, m: ["inspect", m, "--recurrence", "all", "--set", "mixer.keep.layers=[9]"], "there is no layer 9"),
        (lambda t, m: ["inspect", m, "--recurrence", "kdaa"], "did you mean 'kda'"),
        (lambda t, _: ["recipes", "ls", "--model", t / "nowhere"], "no such folder or file"),
        (lambda t, m: ["convert", m, "-o", t / "out", "--set", "mixer.keep.layers=[0, 1]"], "nothing is left"),
        (lambda t, _: ["convert", config(t / "m", model_type="t5"), "-o", t / "out"], "encoder-decoder"),
        (lambda t, _: ["convert", config(t / "m", model_type="mamba"), "-o", t / "out"], "has linear layers already"),
        (lambda t, _: ["inspect", config(t / "m", model_type="nonsense")], "cannot be read"),
        (lambda t, _: ["convert", config(t / "m", model_type="llama"), "-o", t / "out", *GLA], "has no weights"),
        (lambda t, _: ["inspect", write(t / "m" / "config.json", "{").parent], "cannot be read"),
        (lambda t, _: ["inspect", "owner/nothing-of-this-name"], "Hub"),
        (lambda t, m: ["convert", m, "-o", t / "out", "--set", "mixer.windw=3"], "did you mean 'mixer.window'"),
        (lambda t, m: ["convert", m, "-o", t / "out", "--set", "mixer.window"], "--set"),
        (lambda t, m: ["convert", m, "-o", t / "out", "--set", "mixer.window=wide"], "mixer.window"),
        (lambda t, m: ["convert", m, "-o", t / "out", "-r", "defualt"], "did you mean 'default'"),
        (lambda t, m: ["convert", m, "-o", t / "out", "-r", write(t / "r.yaml", "mixer: {windw: 3}")], "r.yaml:1"),
        (lambda t, m: ["convert", m, "-o", write(t / "file", "x") / "out"], "cannot be written"),
        (lambda t, m: ["convert", m, "-o", write(t / "out", "x")], "is a file"),
        (lambda t, _: ["finetune", "window-gla", "-o", t / "out"], "names no model"),
        (lambda t, m: ["finetune", "train", "-o", t / "out", "--resume", "--set", f"model={m}"], "no unfinished run"),
        (lambda t, m: ["finetune", "window-gla", "-o", t / "out", *settings(f"model={m}", NO_DATA)], "no.txt"),
        (lambda t, m: ["run", "window-gla", "-o", t / "out"], "names no model"),
        (lambda t, m: ["eval", m, "--tasks", "piqqa"], "piqa"),
        (lambda t, m: ["eval", m, "--tasks", "piqa", "--data", t], "piqa.validation.jsonl"),
        (lambda t, m: ["eval", m, "--tasks", "held_out"], "no held-out rows"),
        (lambda t, m: ["eval", m, "--baseline", "teecher"], "unknown baseline"),
        (lambda t, m: ["generate", t / "nowhere", "x"], "no such folder or file"),
        (lambda t, m: ["generate", m, "x", "--load-state", t / "a.state"], "a.state: no such file"),
        (lambda t, m: ["generate", m, "x", "--load-state", write(t / "a.state", "x" * 99)], "not a state"),
        (lambda t, m: ["generate", m, "x", "--save-state", t / "none" / "a.state"], "there is no folder"),
        (lambda t, m: ["generate", m, "x", "--save-state", write(t / "notes", "mine")], "will not be overwritten"),
        (lambda t, m: ["generate", m, "x", "--save-state", t / "a.state"], "is not a converted model"),
        (lambda t, m: ["generate", m, "x", "-n", "0", "--save-state", t / "a.state"], "is not a converted model"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(outcome, tiny_folder, tmp_path, make, told):
    arguments = make(tmp_path, tiny_folder)
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    status, text, error = outcome(*arguments)
    assert status == 1
    assert text == ""
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and error.rstrip().endswith(lines[0]), error
    assert told in lines[0], lines[0]
    assert "unexpected" not in lines[0]
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before


@pytest.mark.check
def test_the_demo_on_a_tiny_model(outcome, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("linearize.jobs.demo.LENGTHS", (32, 64))
    monkeypatch.setattr("linearize.jobs.demo._ROW", 128)
    monkeypatch.setattr("linearize.jobs.demo.packaged_model", lambda: tiny_folder)
    quick = ("mixer.window=16", "mixer.landmarks=48", "mixer.landmark_score=novelty", "mixer.landmarks_by=null")
    changes = [word for change in quick for word in ("--set", change)]
    status, text, words = outcome("demo", "-o", tmp_path / "demo", *changes)
    assert status == 0, words
    assert words.endswith(f"next: linearize chat {tmp_path / 'demo' / 'converted'}\n") and "questions" in text
    found = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert list(found["systems"]) == ["teacher", "window", "converted"]
    assert found["systems"]["window"]["memory_bytes"] <= found["systems"]["converted"]["memory_bytes"]
    assert all(len(one["right"]) == 4 for one in found["systems"].values())
    assert "Four questions" in (tmp_path / "demo" / "report.md").read_text()
