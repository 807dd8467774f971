"""Fine-tuning a tiny model: it learns, it resumes exactly, and the result is merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from linearize.conversion.convert import convert_model
from linearize.conversion.output import staged_folder
from linearize.errors import LinearizeError, OutputError, RecipeError
from linearize.recipe import LoraSpec, Recipe, load_recipe
from linearize.training import finetune as module
from linearize.training import trainer as trainer_module
from linearize.training.finetune import finetune, is_resumable, work_folder, write_result
from linearize.training.objective import token_losses


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
    return load_recipe("default", [*changes, *more])


def trained(recipe: Recipe, work: Path, **options) -> dict[str, torch.Tensor]:
    work.mkdir(exist_ok=True)
    model = finetune(recipe, work, say=lambda _: None, **options).model
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def losses(work: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (work / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", ["sft", "distill", "{distill: 0.9, sft: 0.1}"])
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


def test_an_interrupted_run_goes_on_bit_for_bit(tiny_folder, text, tmp_path, monkeypatch):
    settings = recipe(tiny_folder, text)
    whole = trained(settings, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def stop(path, record):
        if record["step"] == 6:
            raise Interrupted
        trainer_module.append_json_line(path, record)

    with monkeypatch.context() as patch:
        patch.setattr(module, "append_json_line", stop)
        with pytest.raises(Interrupted):
            trained(settings, tmp_path / "cut")
    assert [p.name for p in (tmp_path / "cut" / "stage-0").iterdir()] == ["checkpoint-4"]
    resumed = trained(settings, tmp_path / "cut", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_two_stages_and_the_written_result(tiny_folder, text, tmp_path):
    settings = recipe(tiny_folder, text)
    settings = settings.model_copy(update={"stages": [settings.stages[0], settings.stages[0]]})
    with work_folder(tmp_path / "out", settings, resume=False) as work:
        result = finetune(settings, work, say=lambda _: None)
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
    assert len(finetune(again, tmp_path / "work", say=lambda _: None).stages) == 3


def test_without_lora_only_the_layers_own_parameters_change(tiny_folder, text, tmp_path):
    after = trained(recipe(tiny_folder, text, "lora=null"), tmp_path / "work")
    before = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(bool(after[name].any()) for name in after if name.endswith("mix_weight"))


def test_nothing_to_train_and_wrong_targets_are_told(tiny_folder, text, tmp_path):
    with pytest.raises(RecipeError, match="nothing to train"):
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
        module.add_adapters(model, LoraSpec(targets=[missing]))
    assert "\n" not in str(refused.value)
    student = module.add_adapters(model, LoraSpec(targets=targets))
    found = {name.split(".lora_A")[0] for name, _ in student.named_parameters() if "lora_A" in name}
    assert len(found) == 2 * len(adapted) and all(name.endswith(tuple(adapted)) for name in found)
    ids = torch.randint(97, (2, 40))
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1.0)
    before = student(ids, labels=ids).loss
    before.backward()
    optimizer.step()
    after = student(ids, labels=ids)
    assert after.loss < before
    merged = student.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(ids).logits, after.logits, rtol=0, atol=1e-5)
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
    shutil.rmtree(work)
    with pytest.raises(RuntimeError), work_folder(tmp_path / "out", settings, resume=False):
        raise RuntimeError
    assert not work.exists()  # nothing to resume, so nothing is left


def test_objectives_against_their_definitions():
    student, teacher = (torch.randn(2, 9, 31, dtype=torch.float64).requires_grad_() for _ in range(2))
    labels = torch.randint(0, 31, (2, 9))
    labels[0, 3:5] = -100
    expected = {"sft": 0.0, "distill": 0.0}
    for row in range(2):
        for t in range(8):
            if labels[row, t + 1] != -100:
                p, q = (teacher[row, t] / 2).softmax(-1), (student[row, t] / 2).softmax(-1)
                expected["distill"] += 4 * float((p * (p / q).log()).sum())
                expected["sft"] -= float(student[row, t].softmax(-1)[labels[row, t + 1]].log())
    for name, value in expected.items():
        found = token_losses(student, labels, teacher, {name: 1.0}, temperature=2.0)
        assert float(found) == pytest.approx(value, rel=1e-5)
    torch.autograd.gradcheck(
        lambda s: token_losses(s, labels, teacher, {"sft": 0.25, "distill": 0.5}, temperature=2.0), student
    )
    both = token_losses(student, labels, teacher, {"sft": 0.25, "distill": 0.5}, temperature=2.0)
    assert float(both) == pytest.approx(0.25 * expected["sft"] + 0.5 * expected["distill"], rel=1e-5)
