"""Adapters: which weights they may be on, what of a model they reach, and that merging them changes nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from transformers import AutoConfig, AutoModelForCausalLM

from linearize.conversion.swap import convert_model
from linearize.data.rows import Document, Rows, pack
from linearize.errors import ModelError, RecipeError
from linearize.jobs.result import write_result
from linearize.jobs.stages import run_stages
from linearize.recipe import LoraSpec, MixerSpec, Recipe, load_recipe
from linearize.runtime.files import staged_folder
from linearize.training.adapters import add_adapters, choose_trained, merged
from linearize.training.workfolder import work_folder
from tests.conftest import random_llama
from tests.model import test_families as families

KINDS = ("lora", "rslora", "dora", "pissa", "miss")
SIZES = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


def student_of(model_type: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **ENDS, **options)
    return convert_model(AutoModelForCausalLM.from_config(config).eval(), MixerSpec(window=8))


def rows() -> Rows:
    ids = torch.randint(2, 97, (48,), generator=torch.Generator().manual_seed(0))
    return pack([Document(ids, torch.ones_like(ids))], 48)


def train(student: Any, steps: int = 3) -> None:
    choose_trained(student, "lora")
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    ids = rows().input_ids
    for _ in range(steps):
        optimizer.zero_grad()
        student(ids, labels=ids).loss.backward()
        optimizer.step()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(rows().input_ids).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("model_type", "target", "other"),
    [
        ("llama", "lm_head", "embed_tokens.weight"),
        ("llama", "embed_tokens", "lm_head.weight"),
        ("gemma2", "lm_head", "embed_tokens.weight"),
        ("gpt2", "lm_head", "wte.weight"),
        ("gpt2", "wte", "lm_head.weight"),
    ],
)
def test_a_weight_that_two_modules_share_is_refused(kind, model_type, target, other):
    model = student_of(model_type, tie_word_embeddings=True)
    with pytest.raises(RecipeError, match=rf"{target!r} shares its weight with \S*{other}, .* train: full") as refused:
        add_adapters(model, LoraSpec(kind=kind, targets=["q", target]))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untied_head_is_trained_and_merged(kind):
    student = add_adapters(
        student_of("llama", tie_word_embeddings=False), LoraSpec(kind=kind, targets=["q", "lm_head"])
    )
    train(student)
    before = logits(student.eval())
    torch.testing.assert_close(logits(merged(student, rows(), "kept")), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ("llama, biases", "miss"), ("gpt2", "rslora"), ("phi3", "dora"), ("gemma2", "pissa"), ("mixtral", "lora"),
        ("gpt_neox", "dora"),
    ],
)  # fmt: skip
def test_a_sound_merge_is_within_the_rounding_of_the_weights(row, kind, dtype):
    torch.manual_seed(0)
    model = convert_model(copy.deepcopy(families.build(row)).to(dtype), MixerSpec(window=8))
    student = add_adapters(model, LoraSpec(kind=kind, rank=4, alpha=32))
    train(student)
    assert not any("lora" in name for name, _ in merged(student, rows(), "kept").named_parameters())


def test_an_adapter_that_is_merged_into_a_shared_weight_is_found():
    """By the check of the merge alone."""
    model = student_of("llama", tie_word_embeddings=True)
    student = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    train(student)
    with pytest.raises(ModelError, match=r"merging adapters changed the model: .* kept has the adapters") as refused:
        merged(student, rows(), "kept")
    assert "\n" not in str(refused.value)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "stories.txt"
    text.write_text("\n\n".join(f"There were {n} small cats and a dog." for n in range(99)))
    return load_recipe("window-gla", [
        f"model={random_llama(tmp_path / 'tiny')}", "mixer.window=8", f"stages.0.data.source={text}",
        "stages.0.data.tokens=512", "stages.0.data.held_out=0", "stages.0.length=32", "stages.0.batch_tokens=128",
        "stages.0.objective=sft",
    ])  # fmt: skip


@pytest.mark.parametrize("fault", [1.25, float("nan")])
def test_a_fault_of_the_merge_is_an_error_and_the_adapters_are_kept(recipe, tmp_path, monkeypatch, fault):
    """And --resume writes the model once the fault is gone, without training again."""
    delta, out = Linear.get_delta_weight, tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Linear, "get_delta_weight", lambda self, adapter: fault * delta(self, adapter))
        with (
            pytest.raises(ModelError, match=r"out\.training has") as refused,
            work_folder(out, recipe, resume=False) as work,
        ):
            run_stages(recipe, work, say=lambda _: None)
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "out.training").glob("stage-0/checkpoint-4/trained.safetensors")) and not out.exists()
    said: list[str] = []
    with work_folder(out, recipe, resume=True) as work:
        run_stages(recipe, work, say=said.append, resume=True)
    assert any("checkpoint-4" in line for line in said)


def test_fused_experts_and_layers_without_a_target_are_said():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    sizes = {"shared_expert_intermediate_size": 32, "intermediate_size": 64, "num_key_value_heads": 4}
    model = student_of("qwen2_moe", **experts, **sizes)
    said: list[str] = []
    add_adapters(copy.deepcopy(model), LoraSpec(), said.append)
    assert not said  # nothing of the experts is asked for
    add_adapters(copy.deepcopy(model), LoraSpec(targets=["q", "gate", "down"]), said.append)
    assert said == [
        "lora: adapts gate (mlp.shared_expert.gate_proj) in 2 of 2 layers; down (mlp.shared_expert.down_proj) in 2 of "
        "2 layers. The fused experts (mlp.experts.down_proj, mlp.experts.gate_up_proj) are not adapted; train: full "
        "trains them"
    ]
    with pytest.raises(RecipeError, match=r"no module 'c_fc' .*; its experts \(mlp\.experts\.down_proj, .* are fused"):
        add_adapters(copy.deepcopy(model), LoraSpec(targets=["c_fc"]))
    has = r"those that do are q, k, v, o, gate, up, down, shared_expert_gate; its experts \(.*\) are fused, and"
    for target in ("experts", "mlp.gate", "input_layernorm"):  # a fused tensor, a router, a norm
        with pytest.raises(RecipeError, match=rf"no module '{target}' \({target}\) that takes adapters; {has}"):
            add_adapters(copy.deepcopy(model), LoraSpec(targets=[target]))
    said.clear()
    dense_second = student_of("qwen2_moe", **experts, **sizes, mlp_only_layers=[1])
    add_adapters(copy.deepcopy(dense_second), LoraSpec(targets=["up"]), said.append)
    assert said[0].startswith("lora: adapts up (mlp.shared_expert.up_proj, mlp.up_proj) in 2 of 2 layers. The fused")
    said.clear()
    add_adapters(dense_second, LoraSpec(targets=["shared_expert.up_proj"]), said.append)
    assert said[0] == "lora: shared_expert.up_proj (mlp.shared_expert.up_proj) in 1 of 2 layers only"


def test_float16_is_not_trained_in(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"float16 .* take bfloat16"):
        run_stages(recipe.model_copy(update={"dtype": "float16"}), tmp_path, say=lambda _: None)
    half = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float16)
    half.save_pretrained(recipe.model)
    said: list[str] = []
    out = tmp_path / "out"
    with work_folder(out, recipe, resume=False) as work:
        result = run_stages(recipe, work, say=said.append)
        with staged_folder(out) as folder:
            write_result(folder, result, work, "out")
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert sum("its weights are float16" in line and "float32" in line and "bfloat16" in line for line in said) == 1
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    kept = result.model.state_dict()
    assert all(torch.equal(kept[name], x.float()) for name, x in half.state_dict().items() if "mlp" in name)
    # Other dtypes are as they were, and nothing is said of them.
    said.clear()
    with work_folder(tmp_path / "again", recipe, resume=False) as work:
        run_stages(recipe.model_copy(update={"dtype": "bfloat16"}), work, say=said.append)
    assert not any("are float16" in line for line in said)
