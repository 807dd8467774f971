"""What training takes is told before it starts, as the kernel counts it afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config

from linearize.data.rows import read_data
from linearize.recipe import dump_recipe, load_recipe
from linearize.sources.source import find_source, load_tokenizer
from linearize.training.memory import CARDS, ENGINES, memory_rows, training_memory

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
# Name -> configuration, its sizes, sentences of a document, and what differs in the recipe.
MEASURED = {
    "llama": (LlamaConfig, {"num_hidden_layers": 4, "num_key_value_heads": 4}, 6, ["stages.0.data.tokens=2048"]),
    "qwen2": (
        Qwen2Config,
        {"num_hidden_layers": 6, "num_key_value_heads": 2},
        3000,
        ["stages.0.data.tokens=2048", "stages.0.objective=sft"],
    ),
    "mistral": (
        MistralConfig,
        {"num_hidden_layers": 4, "num_key_value_heads": 8, "sliding_window": None},
        3000,
        ["stages.0.data.tokens=4096", "stages.0.gradient_checkpointing=true", "stages.0.train=full"],
    ),
}


def recipe_of(*changes: str):
    return load_recipe("window-gla", [
        "stages.0.data.held_out=0", "stages.0.length=256", "stages.0.batch_tokens=2048", "stages.0.micro_batch=4",
        "stages.0.save_every=9", *changes,
    ])  # fmt: skip


def written(folder: Path, name: str, tokenizer_folder: Path):
    """The recipe of a model of `MEASURED`, which it writes."""
    kind, sizes, sentences, changes = MEASURED[name]
    target, text = folder / name, folder / f"{name}.jsonl"
    AutoModelForCausalLM.from_config(kind(**WIDTHS, **sizes), dtype=torch.float32).save_pretrained(target)
    load_tokenizer(find_source(str(tokenizer_folder))).save_pretrained(target)
    document = json.dumps({"text": "There were seven cats and a dog. They ran. " * sentences})
    text.write_text(f"{document}\n" * (3000 // sentences))
    return recipe_of(f"model={target}", f"stages.0.data.source={text}", *changes)


@pytest.mark.check
def test_the_formula_is_what_the_kernel_counts(tiny_folder, tmp_path):
    settings = [written(tmp_path, name, tiny_folder) for name in MEASURED]
    first = settings[0].stages[0].data.source
    settings.insert(0, recipe_of(f"model={tiny_folder}", f"stages.0.data.source={first}", "stages.0.data.tokens=2048"))
    recipes = [tmp_path / f"{number}.yaml" for number in range(len(settings))]
    for recipe, one in zip(recipes, settings, strict=True):
        recipe.write_text(dump_recipe(one))
    # The C library is to give back at once what is freed, or the figure would be its own habit and not what is used.
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "LINEARIZE_CACHE": str(tmp_path / "cache")}
    environment = {**os.environ, **path, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.measure_memory", *map(str, recipes)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, recipe, one, measured in zip(MEASURED, recipes[1:], settings[1:], json.loads(done.stdout), strict=True):
        (stage,) = one.stages
        positions = read_data(Path(f"{recipe}.work") / "stage-0.rows.safetensors").train.position_ids
        assert ((positions == 0).sum(1) > 1).any() == (name == "llama")  # packed documents, and rows of one
        fullest = positions[(positions == 0).sum(1).argsort(descending=True)[: stage.micro_batch]]
        memory = training_memory(AutoConfig.from_pretrained(one.model), one, stage, position_ids=fullest)["single"]
        print(f"{name}: formula {memory.total / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
        assert memory.total == pytest.approx(measured, rel=0.1), name


@pytest.fixture(scope="module")
def config():
    return LlamaConfig(**{**WIDTHS, "hidden_size": 64, "intermediate_size": 96}, num_hidden_layers=3)


def test_longer_rows_lie_on_the_line_of_two_shorter_ones(config, monkeypatch):
    changes = ["stages.0.length=512", "stages.0.batch_tokens=4096", "stages.0.micro_batch=2"]
    recipe = recipe_of(*changes)
    exact = training_memory(config, recipe, recipe.stages[0])["single"]
    monkeypatch.setattr("linearize.training.memory._COUNTED", 256)
    assert training_memory(config, recipe, recipe.stages[0])["single"].total == pytest.approx(exact.total, rel=0.01)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_more_layers_lie_on_the_line_of_fewer(config, monkeypatch, checkpointing):
    deep = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 7})
    recipe = recipe_of(f"stages.0.gradient_checkpointing={checkpointing}")
    told = training_memory(deep, recipe, recipe.stages[0])["single"]
    monkeypatch.setattr("linearize.training.memory._FEW_LAYERS", (8, 9))
    assert training_memory(deep, recipe, recipe.stages[0])["single"].total == pytest.approx(told.total, rel=1e-3)


def test_what_each_part_is(config):
    def told(*changes: str, dtype="float32"):
        recipe = recipe_of(f"dtype={dtype}", *changes)
        return training_memory(config, recipe, recipe.stages[0], processes=4)

    adapters, half = told(), told(dtype="bfloat16")
    assert tuple(adapters) == ENGINES
    single, full = adapters["single"], told("stages.0.train=full", "stages.0.objective=sft")["single"]
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert single.teacher == 4 * parameters and full.teacher == 0
    assert single.weights == 4 * parameters and single.trained == single.gradients == single.optimizer / 2
    assert full.weights == 0 and full.trained == full.gradients == full.optimizer / 2 > 4 * parameters
    assert half["single"].teacher == 2 * parameters and half["single"].gradients == single.gradients
    assert told("stages.0.gradient_checkpointing=true")["single"].activations < 0.5 * single.activations
    assert told("stages.0.teacher_at=cpu")["single"].teacher < 0.5 * single.teacher
    on_disk = told("stages.0.teacher_at=disk", "stages.0.top_k=8")["single"]
    assert on_disk.teacher == 0 and on_disk.logits < single.logits
    assert told("stages.0.objective=align")["single"].logits == 0
    ddp, sharded = adapters["ddp"], adapters["fsdp2"]
    assert ddp.total == single.total + single.gradients
    assert sharded.weights == -(-single.weights // 4) and sharded.optimizer == -(-single.optimizer // 4)
    assert 0 < sharded.gathered < single.weights + single.teacher
    mixed = told("stages.0.train=full", "stages.0.objective=sft", "stages.0.optimizer=adafactor")["single"]
    assert mixed.optimizer < 0.1 * full.optimizer


def test_what_fits(config):
    recipe = recipe_of()
    small = training_memory(config, recipe, recipe.stages[0])["single"]
    assert all(small.fits()[card] for card in CARDS)
    config = LlamaConfig(**{**WIDTHS, "hidden_size": 8192, "intermediate_size": 28672}, num_hidden_layers=2)
    recipe = recipe_of("stages.0.train=full", "stages.0.gradient_checkpointing=true")
    engines = training_memory(config, recipe, recipe.stages[0])
    assert engines["single"].fits() == {16: False, 24: False, 48: True, 80: True, 141: True}
    rows = {row[0]: row[1:] for row in memory_rows(engines)}
    assert rows["fits (GB)"][0] == "48, 80, 141" and len(rows["total"]) == len(ENGINES)


def test_what_depends_on_the_data_is_not_told():
    config = MixtralConfig(**{**WIDTHS, "hidden_size": 64, "intermediate_size": 96}, num_hidden_layers=2)
    recipe = recipe_of()
    memory = training_memory(config, recipe, recipe.stages[0])["single"]
    assert memory.weights > 0 and memory.facts()["total"] is None
    assert set(memory.fits().values()) == {None}
    assert memory_rows({"single": memory})[-1] == ["fits (GB)", "unknown"]
