"""Fine-tuning a tiny model: it learns, it resumes exactly, and the result is merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from linearize.conversion.swap import convert_model
from linearize.data.load import load_data
from linearize.data.rows import read_data
from linearize.errors import LinearizeError, OutputError, RecipeError
from linearize.jobs.result import write_result
from linearize.jobs.stages import run_stages
from linearize.model.attention import LinearizedAttention
from linearize.recipe import LoraSpec, MixerSpec, Recipe, load_recipe
from linearize.runtime.files import staged_folder
from linearize.training import metrics as module
from linearize.training.adapters import add_adapters, choose_trained, is_adapter, is_own_parameter
from linearize.training.metrics import append_json_line
from linearize.training.workfolder import is_resumable, work_folder
from tests.tables import some


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text(
        "\n\n".join(f"Once upon a time there were {n} small cats and a dog. They ran home." for n in range(900))
    )
    return path


def recipe(tiny: Path, text: Path, *more: str) -> Recipe:
    changes = [
        f"model={tiny}", "mixer.window=16", f"stages.0.data.source={text}", "stages.0.data.tokens=1536",
        "stages.0.data.held_out=2", "stages.0.length=64", "stages.0.batch_tokens=128", "stages.0.save_every=4",
    ]  # fmt: skip
    return load_recipe("window-gla", [*changes, *more])


def trained(recipe: Recipe, work: Path, **options) -> dict[str, torch.Tensor]:
    work.mkdir(exist_ok=True)
    model = run_stages(recipe, work, say=lambda _: None, **options).model
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def learns_and_merges(student: Any, ids: torch.Tensor, *, lr: float, atol: float) -> Any:
    """One step lowers the loss, and the merged model answers as the student with its adapters did."""
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=lr)
    before = student(ids, labels=ids).loss
    before.backward()
    optimizer.step()
    after = student(ids, labels=ids)
    assert after.loss < before
    merged = student.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(ids).logits, after.logits, rtol=0, atol=atol)
    return merged


def losses(work: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (work / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "objective", some(["sft", "distill", "{distill: 0.9, sft: 0.1}"], ["{distill: 0.9, sft: 0.1}"])
)
def test_the_loss_falls_and_only_what_should_changes(tiny_folder, text, tmp_path, objective):
    settings = recipe(tiny_folder, text, f"stages.0.objective={objective}", "stages.0.epochs=2")
    after = trained(settings, tmp_path / "work")
    found = losses(tmp_path / "work")
    assert len(found) == 24
    assert sum(found[-6:]) < 0.98 * sum(found[:6])
    before = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.split(".")[-2] in ("q_proj", "k_proj", "v_proj") for name in changed)
    assert any(bool(after[name].any()) for name in after if name.endswith("mix_weight"))
    assert not any("lora" in name for name in after)


def test_aligned_layers_answer_more_like_the_teachers(tiny_folder, text, tmp_path):
    more = ["stages.0.objective=align", "stages.0.epochs=3", "stages.0.schedule=constant", "mixer.feature_map=learned"]
    after = trained(recipe(tiny_folder, text, *more), tmp_path / "work")
    found = losses(tmp_path / "work")
    beyond, whole = found[:18], found[18:]
    assert len(found) == 36 and sum(beyond[-4:]) < 0.9 * sum(beyond[:4])
    assert sum(whole[-4:]) < 0.98 * sum(whole[:4])
    assert any(bool(after[name].any()) for name in after if name.endswith("mix_weight"))


@pytest.mark.parametrize("objective", some(["align", "{distill: 0.5, sft: 0.5}"], ["{distill: 0.5, sft: 0.5}"]))
def test_a_step_is_the_same_however_its_rows_are_split(tiny_folder, text, tmp_path, objective):
    """Seven rows, four to a step: the second step of an epoch has three."""
    changes = ("stages.0.data.tokens=448", "stages.0.batch_tokens=256", "stages.0.epochs=2")
    found = []
    for size in (4, 2, 1):
        work = tmp_path / str(size)
        more = (f"stages.0.objective={objective}", f"stages.0.micro_batch={size}")
        trained(recipe(tiny_folder, text, *changes, *more), work)
        found.append([json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()])
    assert [len(lines) for lines in found] == [4, 4, 4]
    for key in ("loss", "grad_norm"):
        whole, *parts = (torch.tensor([line[key] for line in lines]) for lines in found)
        for part in parts:
            torch.testing.assert_close(part, whole, rtol=1e-5, atol=0)


INTERRUPTED = {
    "distill": [],
    "align": ["stages.0.objective=align"],
    "hidden windows, a teacher on disk": [
        "stages.0.hide_window=0.5", "stages.0.top_k=8", "stages.0.teacher_at=disk", "stages.0.schedule=wsd",
    ],
    "all weights in bfloat16": [
        "stages.0.train=full", "dtype=bfloat16", "stages.0.lr=1e-4", "stages.0.optimizer=adafactor",
    ],
    "a mixture, in its second epoch": [
        "stages.0.data={{mix: [{{source: {text}, weight: 2}}, {{source: recall}}], tokens: 640, held_out: 1}}",
        "stages.0.epochs=2", "lora.kind=pissa",
    ],
}  # fmt: skip


_MOST = ["distill", "hidden windows, a teacher on disk", "a mixture, in its second epoch"]


@pytest.mark.parametrize("kind", some(list(INTERRUPTED), _MOST))
def test_an_interrupted_run_goes_on_bit_for_bit(tiny_folder, text, tmp_path, monkeypatch, kind):
    settings = recipe(tiny_folder, text, *(change.format(text=text) for change in INTERRUPTED[kind]))
    whole = trained(settings, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def stop(path, record):
        if record["step"] == 6:
            raise Interrupted
        append_json_line(path, record)

    with monkeypatch.context() as patch:
        patch.setattr(module, "append_json_line", stop)
        with pytest.raises(Interrupted):
            trained(settings, tmp_path / "cut")
    assert [p.name for p in (tmp_path / "cut" / "stage-0").iterdir()] == ["checkpoint-4"]
    text.write_text("what has become of the file does not matter")
    resumed = trained(settings, tmp_path / "cut", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.check
def test_gradient_checkpointing_computes_twice_and_changes_nothing(tiny_folder, text, tmp_path, monkeypatch, train):
    calls, forward = [], LinearizedAttention.forward

    def counted(self, *args, **keywords):
        calls[-1] += torch.is_grad_enabled()  # the check of the merge is not training
        return forward(self, *args, **keywords)

    monkeypatch.setattr(LinearizedAttention, "forward", counted)
    more = [f"stages.0.train={train}", "stages.0.lr=1e-4", "stages.0.data.tokens=512", "stages.0.hide_window=0.5"]
    states = []
    for checkpointing in ("false", "true"):
        calls.append(0)
        settings = recipe(tiny_folder, text, *more, f"stages.0.gradient_checkpointing={checkpointing}")
        states.append(trained(settings, tmp_path / checkpointing))
    assert calls[1] == 2 * calls[0] > 0
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    metrics = [json.loads(line) for line in (tmp_path / "true" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in metrics)


def test_every_step_trains_and_tokens_are_those_that_were_read(tiny_folder, text, tmp_path):
    # Three rows of 64 tokens, two to a step: a whole step and half of one, twice; then a stage of one step.
    settings = recipe(tiny_folder, text, "stages.0.data.tokens=192", "stages.0.epochs=2", "stages.0.save_every=1")
    once = settings.stages[0].model_copy(update={"epochs": 1.0, "batch_tokens": 1024})
    settings = settings.model_copy(update={"stages": [settings.stages[0], once]})
    (tmp_path / "work").mkdir()
    result = run_stages(settings, tmp_path / "work", say=lambda _: None)
    assert [(stage["steps"], stage["tokens"]) for stage in result.stages] == [(4, 384), (1, 192)]
    metrics = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in metrics] == [128, 192, 320, 384, 192]
    assert all(row["lr"] > 0 for row in metrics)
    alone = trained(settings.model_copy(update={"stages": [once]}), tmp_path / "alone")
    assert any(bool(tensor.any()) for name, tensor in alone.items() if name.endswith("mix_weight"))


@pytest.mark.parametrize("schedule", some(["constant", "linear", "cosine", "wsd"], ["linear", "wsd"]))
def test_a_stage_of_one_step_trains(tiny_folder, text, tmp_path, schedule):
    changes = ("stages.0.data.tokens=128", f"stages.0.schedule={schedule}", "stages.0.save_every=1")
    after = trained(recipe(tiny_folder, text, *changes), tmp_path / "work")
    (row,) = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    assert row["lr"] > 0
    assert any(bool(tensor.any()) for name, tensor in after.items() if name.endswith("mix_weight"))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.5]), ("cosine", [0.5, 1, 1, 0.5])],
)
@pytest.mark.check
def test_a_warm_up_begins_above_nothing(tiny_folder, text, tmp_path, schedule, rates):
    changes = ("stages.0.data.tokens=512", "stages.0.warmup=0.5", f"stages.0.schedule={schedule}", "stages.0.lr=1e-3")
    trained(recipe(tiny_folder, text, *changes), tmp_path / "work")
    rows = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] * 1000 for row in rows] == pytest.approx(rates)


def test_two_stages_and_the_written_result(tiny_folder, text, tmp_path):
    settings = recipe(tiny_folder, text)
    settings = settings.model_copy(update={"stages": [settings.stages[0], settings.stages[0]]})
    with work_folder(tmp_path / "out", settings, resume=False) as work:
        result = run_stages(settings, work, say=lambda _: None)
        with staged_folder(tmp_path / "out") as folder:
            write_result(folder, result, work, "out")
    assert not work.exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"metrics.jsonl", "held_out.safetensors", "linearize.json", "model.safetensors"} <= written
    assert len(json.loads((tmp_path / "out" / "linearize.json").read_text())["stages"]) == 2
    # What was fine-tuned can be fine-tuned again, from its own weights and with the first teacher.
    again = settings.model_copy(update={"model": str(tmp_path / "out"), "stages": settings.stages[:1]})
    (tmp_path / "work").mkdir()
    assert len(run_stages(again, tmp_path / "work", say=lambda _: None).stages) == 3


@pytest.mark.check
def test_a_second_run_reads_other_text_than_the_first(tiny_folder, text, tmp_path):
    """Of the same seed, where the text is made as it is needed."""
    own = ("stages.0.data.source=self", "stages.0.data.tokens=512", "stages.0.data.held_out=1")
    settings, first = recipe(tiny_folder, text, *own), tmp_path / "first"
    read, models = [], [str(tiny_folder), str(first), str(first)]
    for number, model in enumerate(models):
        work = tmp_path / f"work-{number}"
        work.mkdir()
        settings = settings.model_copy(update={"model": model})
        result = run_stages(settings, work, say=lambda _: None)
        read.append(read_data(work / "stage-0.rows.safetensors").train.input_ids)
        if not number:
            with staged_folder(first) as folder:
                write_result(folder, result, work, "first")
    assert len(result.stages) == 2
    spec = settings.stages[0]
    tokenizer, teacher = result.tokenizer, AutoModelForCausalLM.from_pretrained(tiny_folder)
    options = {"tokenizer": tokenizer, "length": spec.length, "teacher": lambda: teacher}
    assert torch.equal(read[0], load_data(spec.data, seed=settings.seed, **options).train.input_ids)
    assert torch.equal(read[1], read[2]) and not {*map(tuple, read[0].tolist())} & {*map(tuple, read[1].tolist())}
    # And its second stage a third one.
    (tmp_path / "two").mkdir()
    run_stages(settings.model_copy(update={"stages": [spec, spec]}), tmp_path / "two", say=lambda _: None)
    third = load_data(spec.data, seed=settings.seed, draw=2, **options)
    assert torch.equal(read_data(tmp_path / "two" / "stage-1.rows.safetensors").train.input_ids, third.train.input_ids)


def test_without_lora_only_the_layers_own_parameters_change(tiny_folder, text, tmp_path):
    after = trained(recipe(tiny_folder, text, "lora=null"), tmp_path / "work")
    before = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(bool(after[name].any()) for name in after if name.endswith("mix_weight"))


@pytest.mark.parametrize("objective", ["distill", "align"])
@pytest.mark.check
def test_a_teacher_elsewhere_teaches_the_same(tiny_folder, text, tmp_path, objective):
    short = [f"stages.0.objective={objective}", "stages.0.data.tokens=256"]
    here = trained(recipe(tiny_folder, text, *short), tmp_path / "here")
    away = trained(recipe(tiny_folder, text, *short, "stages.0.teacher_at=cpu"), tmp_path / "away")
    assert all(torch.equal(here[name], away[name]) for name in here)


def test_a_run_that_ends_in_its_second_stage_goes_on_there(tiny_folder, text, tmp_path, monkeypatch):
    common = {"length": 64, "batch_tokens": 128, "save_every": 2}
    stages = [
        {"objective": "align", "train": "mixer", "data": {"source": str(text), "tokens": 512, "held_out": 1}, **common},
        {"objective": "distill", "data": {"source": "student", "tokens": 640, "held_out": 1}, **common},
    ]
    settings = recipe(tiny_folder, text, f"stages={json.dumps(stages)}")
    whole = trained(settings, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def stop(path, record):
        if (record["stage"], record["step"]) == (1, 3):
            raise Interrupted
        append_json_line(path, record)

    with monkeypatch.context() as patch:
        patch.setattr(module, "append_json_line", stop)
        with pytest.raises(Interrupted):
            trained(settings, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cache")  # the text is the run's own
    shutil.copytree(tmp_path / "cut", tmp_path / "damaged")
    resumed = trained(settings, tmp_path / "cut", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (tmp_path / "cache" / "self-text").exists()
    # Without its last checkpoint the first stage is not over: an older one is gone on from, not taken for it.
    for damaged in (tmp_path / "damaged" / "stage-0" / "checkpoint-4").iterdir():
        damaged.write_bytes(damaged.read_bytes()[:-1])
    said = []
    again = run_stages(settings, tmp_path / "damaged", say=said.append, resume=True).model.state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert any("stage 1: its last checkpoint is damaged" in line for line in said)
    assert not any("done before" in line for line in said)


@pytest.mark.parametrize("train", ["mixer", "full"])
def test_a_stage_trains_what_it_names(tiny_folder, text, tmp_path, train):
    after = trained(recipe(tiny_folder, text, f"stages.0.train={train}", "stages.0.lr=1e-4"), tmp_path / "work")
    before = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == (set(before) if train == "full" else set())
    assert any(bool(after[name].any()) for name in after if name.endswith("mix_weight"))


@pytest.mark.parametrize("kind", ["rslora", "dora", "pissa", "miss"])
def test_adapters_of_every_kind_start_as_the_model_train_and_merge(tiny_folder, kind):
    torch.manual_seed(0)
    model = convert_model(AutoModelForCausalLM.from_pretrained(tiny_folder), MixerSpec(window=8))
    ids = torch.randint(5, 97, (2, 40))
    given = model(ids).logits.detach()
    student = add_adapters(model, LoraSpec(kind=kind, rank=4))
    torch.testing.assert_close(student(ids).logits, given, rtol=0, atol=1e-4)
    choose_trained(student, "lora")
    names = {name for name, p in student.named_parameters() if p.requires_grad}
    assert any(is_adapter(name) for name in names)
    assert all(is_adapter(name) or is_own_parameter(name) for name in names)
    learns_and_merges(student, ids, lr=0.02, atol=1e-4)


def test_adapters_that_do_not_fit_are_told():
    config = AutoConfig.for_model("gpt2", vocab_size=97, hidden_size=48, num_hidden_layers=1, num_attention_heads=6)
    model = convert_model(AutoModelForCausalLM.from_config(config), MixerSpec(window=8))
    with pytest.raises(RecipeError, match="lora: miss does not fit this model") as refused:
        add_adapters(model, LoraSpec(kind="miss"))
    assert "\n" not in str(refused.value)


def test_nothing_to_train_and_wrong_targets_are_told(tiny_folder, text, tmp_path):
    with pytest.raises(RecipeError, match=r"nothing to train: .* add a lora section .*, or set train to full"):
        trained(recipe(tiny_folder, text, "lora=null", "mixer.recurrence=none"), tmp_path / "work")
    with pytest.raises(RecipeError, match="no module 'query'"):
        trained(recipe(tiny_folder, text, "lora.targets=[query]"), tmp_path / "work")


@pytest.mark.parametrize(
    ("model_type", "targets", "adapted", "missing"),
    [
        ("phi3", ["q", "k", "v", "o", "up"], ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj"], "fc1"),
        ("gpt2", ["q", "k", "v", "o"], ["attn.c_attn", "attn.c_proj"], "gate"),
        ("falcon", ["k", "down"], ["self_attention.query_key_value", "mlp.dense_4h_to_h"], "gate"),
    ],
)
def test_adapters_on_fused_projections_attach_train_and_merge(model_type, targets, adapted, missing):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **ends))
    model = convert_model(teacher.eval(), Recipe().mixer.model_copy(update={"window": 8}))
    with pytest.raises(RecipeError, match=f"no module '{missing}'") as refused:
        add_adapters(model, LoraSpec(targets=[missing]))
    assert "\n" not in str(refused.value)
    student = add_adapters(model, LoraSpec(targets=targets))
    found = {name.split(".lora_A")[0] for name, _ in student.named_parameters() if "lora_A" in name}
    assert len(found) == 2 * len(adapted) and all(name.endswith(tuple(adapted)) for name in found)
    ids = torch.randint(97, (2, 40))
    merged = learns_and_merges(student, ids, lr=1.0, atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_a_loss_that_is_not_finite_stops_the_run(tiny_folder, text, tmp_path):
    with pytest.raises(LinearizeError, match="the loss became nan"):
        trained(recipe(tiny_folder, text, "stages.0.lr=1e30", "stages.0.clip=0"), tmp_path / "work")


def test_work_folders_of_other_runs_are_left_alone(tiny_folder, text, tmp_path):
    settings = recipe(tiny_folder, text)
    with pytest.raises(OutputError, match="no unfinished run"), work_folder(tmp_path / "out", settings, resume=True):
        pass
    with pytest.raises(RuntimeError), work_folder(tmp_path / "out", settings, resume=False) as work:
        (work / "stage-0" / "checkpoint-4").mkdir(parents=True)
        raise RuntimeError
    with pytest.raises(OutputError, match="--resume"), work_folder(tmp_path / "out", settings, resume=False):
        pass
    assert is_resumable(tmp_path / "out", settings)
    other = settings.model_copy(update={"seed": 9})
    with pytest.raises(OutputError, match="another recipe"), work_folder(tmp_path / "out", other, resume=True):
        pass
    assert not is_resumable(tmp_path / "out", other)
    kept = work / "recipe.yaml"
    kept.write_text(kept.read_text().replace("  window: ", "  reach: null\n  window: ", 1))  # as version 0.1.0 wrote it
    assert is_resumable(tmp_path / "out", settings)
    shutil.rmtree(work)
    with pytest.raises(RuntimeError), work_folder(tmp_path / "out", settings, resume=False):
        raise RuntimeError
    assert not work.exists()  # nothing to resume, so nothing is left
