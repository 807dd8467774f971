"""`linearize bench`: what it measures, what it says, and what it refuses."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from linearize.sources.source import find_source, load_model
from tests.made import LANDMARKS
from tests.model.recorded import Recorder
from tests.tables import some

QUICK = ("--steps", "2", "--repeats", "2", "--prefill-up-to", "64")


@pytest.mark.parametrize("onednn", some([False, True], [True]))
def test_model_and_teacher_take_turns_at_every_length(outcome, converted, tmp_path, monkeypatch, onednn):
    """And once more the teacher with the products of the model, where these are not torch's own."""
    monkeypatch.setattr("linearize.benchmark.bench.onednn_is_faster", lambda: onednn)
    report = tmp_path / "report"
    status, text, words = outcome(
        "bench", converted, "--lengths", "32,64,1k", "--batches", "1,3", *QUICK, "--int8", "--json", "-o", report
    )
    assert status == 0 and "decode at 1,024 tokens, batch 3" in words
    facts = json.loads(text)
    places = {(row["kind"], row["system"], row["batch"], row["tokens"]) for row in facts["rows"]}
    systems, batches = ("teacher", *["teacher-onednn"] * onednn, "model", "int8"), (1, 3)
    read = {("prefill", s, b, n) for s in systems for b in batches for n in (32, 64)}
    assert places == read | {("decode", s, b, n) for s in systems for b in batches for n in (32, 64, 1024)}
    for row in facts["rows"]:
        assert len(row["seconds"]) == 2 and row["tokens_per_second"] > 0 and row["cache_bytes"] > 0
        assert row["kind"] == "prefill" or (row["step_bytes"] > row["cache_bytes"] and row["roof_share"] > 0)
    decoded = {(r["system"], r["batch"], r["tokens"]): r for r in facts["rows"] if r["kind"] == "decode"}
    assert decoded["model", 1, 32]["cache_bytes"] == decoded["model", 1, 1024]["cache_bytes"]
    assert decoded["teacher", 3, 1024]["cache_bytes"] == 3 * 32 * decoded["teacher", 1, 32]["cache_bytes"]
    assert facts["weights_bytes"]["int8"] < facts["weights_bytes"]["model"]
    assert set(facts["ahead_from"]) == {"model", "int8"}
    assert json.loads((report / "bench.json").read_text()) == facts
    plots = sorted(path.name for path in report.glob("*.svg"))
    assert plots == [
        "decode-cache-bytes.svg", "decode-tokens-per-second.svg", "overview.svg", "prefill-tokens-per-second.svg",
    ]  # fmt: skip
    page = (report / "report.md").read_text()
    assert "## Writing" in page and "## Reading" in page and "model, batch 3: reads faster than the teacher" in page
    assert "The table scrolls sideways" in (report / "report.html").read_text()
    again = ("bench", converted, "--lengths", "32", *QUICK, "-o", report)
    assert outcome(*again)[0] == 1  # it exists
    assert outcome(*again, "--overwrite")[0] == 0


@pytest.mark.parametrize(("number", "exit_status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_was_measured_is_kept_when_it_is_stopped(
    outcome, converted, tmp_path, monkeypatch, request, number, exit_status
):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts without one
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr("linearize.benchmark.bench.prefill", lambda *_, **__: os.kill(os.getpid(), number))
    report = tmp_path / "report"
    status, text, words = outcome("bench", converted, "--lengths", "32,64", *QUICK, "-o", report)
    assert status == exit_status and "writing" in text and f"by {number.name}" in text
    assert words.splitlines()[-1] == f"interrupted: what was measured is in {report / 'report.html'}"
    facts = json.loads((report / "bench.json").read_text())
    assert {(row["kind"], row["tokens"]) for row in facts["rows"]} == {("decode", 32), ("decode", 64)}
    assert f"by {number.name}" in (report / "report.md").read_text()
    monkeypatch.setattr("linearize.benchmark.bench.decode", lambda *_, **__: os.kill(os.getpid(), number))
    other = tmp_path / "other"
    status, text, _ = outcome("bench", converted, "--lengths", "32", *QUICK, "-o", other)
    assert status == exit_status and not text and not other.exists()  # nothing was measured


def test_a_pretrained_model_and_a_configuration_are_converted_in_memory(outcome, tiny_folder):
    status, text, _ = outcome(
        "bench", tiny_folder, "--lengths", "32", *QUICK, "--layers", "1", "--set", "mixer.window=8"
    )
    assert status == 0 and "1 of its" in text and "window 8" in text and "x teacher" in text
    status, text, _ = outcome(
        "bench", "--config", "smollm2-135m", "--layers", "1", "--lengths", "16", "--against", "none",
        "--recipe", "gated_deltanet", *QUICK, "--json",
    )  # fmt: skip
    facts = json.loads(text)
    assert status == 0 and facts["weights"] == "random" and facts["layers"] == 1 and facts["layers_of_the_whole"] == 30
    assert {row["system"] for row in facts["rows"]} == {"model"} and facts["ahead_from"] == {}


def test_landmarks_have_a_pace_as_well(outcome, tiny_folder):
    few = ("--recipe", LANDMARKS, "--set", "mixer.landmarks=16", "--set", "mixer.window=16")
    status, text, words = outcome("bench", tiny_folder, *few, "--lengths", "64,128", *QUICK, "--json")
    assert status == 0, words
    facts = json.loads(text)
    held = {row["cache_bytes"] for row in facts["rows"] if (row["system"], row["kind"]) == ("model", "decode")}
    assert len(held) == 1 and facts["mixers"][0]["landmarks"] == 16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give a MODEL"),
        (("--config", "lama-3-8b"), "did you mean llama-3-8b?"),
        (("--config", "smollm2-135m", "--layers", "31"), "give 1 to 30"),
        (("--config", "smollm2-135m", "--lengths", "8q"), "expected a number"),
        (("--config", "smollm2-135m", "--against", "me"), "expected teacher or none"),
        (("--config", "smollm2-135m", "--train", "2k,8q"), "--train 8q: expected a number"),
        (("--config", "smollm2-135m", "--train", "1"), "expected numbers from 2 on"),
    ],
)
def test_a_wrong_command_line_is_one_line(outcome, arguments, said):
    status, _, words = outcome("bench", *arguments)
    assert status != 0 and said in words and len(words.splitlines()) == 1


def test_the_teacher_takes_part_a_second_time_as_one_graph(outcome, converted, monkeypatch):
    monkeypatch.setattr("linearize.benchmark.bench.GRAPHED", ("cpu",))
    monkeypatch.setattr("linearize.benchmark.bench.onednn_is_faster", lambda: False)
    status, text, _ = outcome("bench", converted, "--lengths", "32,64", *QUICK, "--json")
    facts = json.loads(text)
    decoded = {(r["system"], r["tokens"]): r for r in facts["rows"] if r["kind"] == "decode"}
    assert status == 0 and decoded["teacher-graph", 64]["cache_bytes"] == decoded["teacher", 64]["cache_bytes"]
    assert {r["system"] for r in facts["rows"] if r["kind"] == "prefill"} == {"teacher", "model"}


@torch.no_grad()
def test_the_graph_of_the_teacher_is_its_step_and_can_be_recorded(tiny_folder):
    """It reads all keys of a filled cache, the new one in the place of the last."""
    from linearize.benchmark.subjects import full_cache

    teacher = load_model(find_source(str(tiny_folder)), dtype="float32")
    teacher.get_input_embeddings()._forward_pre_hooks.clear()  # its check of ids runs on a CPU alone
    ids = torch.arange(5, 45)[None]
    whole = teacher(ids, use_cache=True)
    cache = full_cache(teacher(ids[:, :39], use_cache=True).past_key_values)
    for layer in cache.layers:  # room for the last one
        layer.keys, layer.values = (torch.cat([x, x[:, :, :1]], 2) for x in (layer.keys, layer.values))
    out: list[torch.Tensor] = []
    positions = torch.tensor([[39]])
    replay = Recorder()(
        lambda: out.append(teacher(ids[:, 39:], position_ids=positions, past_key_values=cache, use_cache=True).logits)
    )
    replay()
    torch.testing.assert_close(out[-1][:, -1], whole.logits[:, -1], rtol=0, atol=1e-4)


def test_what_does_not_fit_is_left_out_with_what_would(outcome, converted, monkeypatch):
    monkeypatch.setattr("linearize.benchmark.running.free_bytes", lambda _: 1_000_000)
    status, text, _ = outcome("bench", converted, "--lengths", "32,1M", "--prefill-up-to", "0", *QUICK[:4])
    assert status == 0 and "no room" in text and "tokens would fit" in text
    monkeypatch.setattr("linearize.benchmark.bench.free_bytes", lambda _: 3_000_000_000)
    status, _, words = outcome("bench", "--config", "llama-3.2-1b")
    assert status == 1 and "--layers 6 would fit" in words


@pytest.mark.parametrize("onednn", some([False, True], [True]))
@pytest.mark.check
def test_a_step_of_lora_is_timed_where_it_is_asked_for(outcome, converted, tmp_path, monkeypatch, onednn):
    """Of the model and of each teacher that is a model of its own, not of a graph or of integers."""
    monkeypatch.setattr("linearize.benchmark.bench.onednn_is_faster", lambda: onednn)
    monkeypatch.setattr("linearize.benchmark.bench.GRAPHED", ("cpu",))
    report = tmp_path / "report"
    quick = ("--lengths", "32", *QUICK[:4], "--prefill-up-to", "0", "--int8")
    status, text, words = outcome(
        "bench", converted, *quick, "--train", "24,48", "--batches", "1,2", "--json", "-o", report
    )
    assert status == 0 and "train at 48 tokens, batch 2" in words
    facts = json.loads(text)
    rows = [row for row in facts["rows"] if row["kind"] == "train"]
    systems = ("teacher", *["teacher-onednn"] * onednn, "model")
    assert [(r["batch"], r["tokens"], r["system"]) for r in rows] == [
        (batch, tokens, system) for batch in (1, 2) for tokens in (24, 48) for system in systems
    ]
    for row in rows:
        assert len(row["seconds"]) == 2 and row["peak_bytes"] > facts["weights_bytes"][row["system"]]
        middle = sum(row["seconds"]) / 2
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * row["tokens"] / middle)
    assert set(facts["ahead_from"]["model"]["train"]) == {"1", "2"} and "train" not in facts["ahead_from"]["int8"]
    assert (report / "train-tokens-per-second.svg").is_file()
    status, text, _ = outcome("bench", converted, *quick[:-1], "--train", "24")
    assert status == 0 and "training" in text and "model, batch 1: trains faster than the teacher" in text


@pytest.mark.parametrize("whose", ["teacher", "model"])
def test_a_step_is_the_objective_s_and_leaves_the_subject_as_it_is(converted, tiny_folder, whose):
    from linearize.benchmark.subjects import Subject
    from linearize.benchmark.training import Step, default_recipe, random_rows

    model = load_model(find_source(str({"teacher": tiny_folder, "model": converted}[whose])), dtype="float32")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    subject = Subject.of(whose, model)
    rows = random_rows(subject.base.vocab_size, 2, 48)
    assert rows.input_ids.shape == (2, 48) and rows.position_ids[1].tolist() == list(range(48))
    step = Step(subject, default_recipe(2, 48), rows)
    trained = {name: p for name, p in step.student.named_parameters() if p.requires_grad}
    assert {name.split(".")[-4] for name in trained if ".lora_A." in name} == {"q_proj", "k_proj", "v_proj"}
    assert any(".mixer." in name for name in trained) == (whose == "model")
    assert step.student.training and not model.training

    logits = step.student(**step.inputs, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.input_ids[:, 1:].flatten())
    want = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    seen: dict[str, torch.Tensor] = {}

    def look(*_: object) -> None:
        seen.update({name: p.grad.clone() for name, p in trained.items()})

    hook = step.optimizer.register_step_pre_hook(look)
    start = {name: p.detach().clone() for name, p in trained.items()}
    assert step() == 48
    for name, gradient in want.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-6)
    hook.remove()
    assert all(p.grad is None for p in step.student.parameters())
    step()  # what adapters start with of zeros takes the gradient from the other half in the first one
    assert [name for name, p in trained.items() if torch.equal(p, start[name])] == []

    assert {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])} == set()
    frozen = {p.data_ptr() for p in step.student.parameters() if not p.requires_grad}
    assert frozen == {p.data_ptr() for name, p in model.named_parameters() if ".mixer." not in name}  # held once


@pytest.mark.check
def test_a_step_without_room_is_left_out(outcome, converted, monkeypatch):
    asked = ("bench", converted, "--lengths", "32", *QUICK, "--train", "32,64")
    monkeypatch.setattr("linearize.benchmark.running.free_bytes", lambda _: 300_000)
    status, text, _ = outcome(*asked)
    assert status == 0 and "model at 64 tokens, batch 1: a step needs about" in text and "no room" in text

    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.undo()
    monkeypatch.setattr("linearize.benchmark.training.token_losses", full)
    status, text, _ = outcome(*asked)
    assert status == 0 and "teacher at 32 tokens, batch 1: a step ran out of memory; take fewer --layers" in text
    monkeypatch.setattr("linearize.benchmark.training.token_losses", lambda *_: 1 / 0)
    assert outcome(*asked)[0] != 0  # no other error is taken for that


def test_integers_are_not_trained(outcome, converted, tmp_path):
    from linearize import api

    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"Once upon a time there was tree {n}." for n in range(400)), encoding="utf-8")
    api.export(converted, tmp_path / "int8", weights="int8", text=str(text), tokens=1024)
    status, _, words = outcome("bench", tmp_path / "int8", "--lengths", "32", *QUICK, "--train", "32", "--quiet")
    assert status == 1 and "its weights are integers" in words and len(words.splitlines()) == 1


def test_the_models_compared_are_the_model_and_its_teacher(converted, tiny_folder):
    from linearize.benchmark.subjects import Subject, converted_from, teacher_beside
    from linearize.recipe import load_recipe

    model, teacher = load_model(find_source(str(converted))), load_model(find_source(str(tiny_folder)))
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        want = teacher(ids).logits
        torch.testing.assert_close(teacher_beside(model)(ids).logits, want)
        again = converted_from(teacher, load_recipe("window-gla", ["mixer.window=16"]).mixer)
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
        torch.testing.assert_close(teacher(ids).logits, want)  # it was left as it was
    subject = Subject.of("model", model)
    with torch.inference_mode():
        cache = subject.filled_cache(2, 300)
        assert cache.layers[0].counts.tolist() == [300, 300] and cache.layers[0].uniform == 300
        step = model(torch.zeros(2, 1, dtype=torch.long), past_key_values=cache)
    assert step.logits.isfinite().all() and cache.layers[0].counts.tolist() == [301, 301]


def test_from_where_on_the_model_is_ahead():
    from linearize.benchmark.running import ahead_from

    def rows(**speeds: tuple[float, ...]) -> list[dict[str, object]]:
        return [
            {"kind": "decode", "batch": 1, "tokens": 10**i, "system": name, "tokens_per_second": speed}
            for name, all_speeds in speeds.items()
            for i, speed in enumerate(all_speeds)
        ]

    assert ahead_from(rows(teacher=(9, 5, 9, 1), model=(1, 6, 6, 6)), "decode", 1) == 1000
    assert ahead_from(rows(teacher=(9, 5, 2), model=(1, 6, 6)), "decode", 1) == 10
    assert ahead_from(rows(teacher=(9, 9), model=(1, 8)), "decode", 1) is None
    short = rows(teacher=(9,), model=(1, 8))
    assert ahead_from([*short, {"kind": "decode", "batch": 1, "tokens": 10, "system": "teacher", "skipped": "-"}],
                      "decode", 1) == 10  # fmt: skip
    assert ahead_from(rows(model=(1, 8)), "decode", 1) is None
