"""Adapters on frozen weights in 4 bits: what is written has them whole."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from linearize.errors import ModelError, RecipeError
from linearize.jobs.stages import run_stages
from linearize.recipe import load_recipe
from linearize.sources.source import find_source, load_model, load_tokenizer
from linearize.training.memory import training_memory
from tests.conftest import random_llama

CONFIG = LlamaConfig(
    vocab_size=257, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model wide enough for blocks of 64 weights, and a text."""
    path = tmp_path_factory.mktemp("wide")
    load_tokenizer(find_source(str(random_llama(path / "tiny")))).save_pretrained(path)
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).save_pretrained(path)
    (path / "text.txt").write_text("\n\n".join(f"There were {n} small cats and a dog." for n in range(99)))
    return path


def recipe_of(folder, *changes: str):
    return load_recipe("window-gla", [
        f"model={folder}", "mixer.window=8", f"stages.0.data.source={folder / 'text.txt'}", "stages.0.data.tokens=512",
        "stages.0.data.held_out=0", "stages.0.length=32", "stages.0.batch_tokens=128", "stages.0.objective=sft",
        "lora.four_bit=true", *changes,
    ])  # fmt: skip


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is there")
def test_without_bitsandbytes_it_is_one_line(folder, tmp_path):
    with pytest.raises(ModelError, match="needs bitsandbytes; pip install bitsandbytes, or set it to false"):
        run_stages(recipe_of(folder), tmp_path, say=lambda _: None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("stages.0.train=full", "full does not go with lora.four_bit; take lora"),
        ("stages.0.objective=align", "align does not go with lora.four_bit"),
        ("lora.kind=pissa", "pissa changes the weights that four_bit freezes"),
    ],
)
def test_what_does_not_go_with_it_is_told(folder, tmp_path, change, told):
    with pytest.raises(RecipeError, match=told):
        run_stages(recipe_of(folder, change), tmp_path, say=lambda _: None)


def test_the_memory_that_it_saves_is_told():
    half, whole = (
        training_memory(CONFIG, recipe, recipe.stages[0])["single"]
        for recipe in (recipe_of(Path("x"), f"lora.four_bit={told}") for told in ("true", "false"))
    )
    layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 256
    assert whole.weights - half.weights == pytest.approx(2 * layer * (4 - 0.516), rel=1e-3)
    assert half.gathered == 4 * 128 * 256 and half.trained == whole.trained


def test_adapters_learn_on_four_bits_and_what_is_written_is_whole(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    frozen = load_model(find_source(str(folder)), four_bit=True)
    assert frozen.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    assert frozen.lm_head.weight.dtype == torch.float32
    result = run_stages(recipe_of(folder), tmp_path, say=lambda _: None)
    assert getattr(result.model.config, "quantization_config", None) is None
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in result.model.state_dict().items():
        if ".mixer." not in name:
            adapted = any(f".{target}_proj." in name for target in "qkv")
            assert torch.equal(tensor, weights[name]) != adapted, name
