"""Weights that go from file to file are those that go through memory."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, initialization

import linearize
from linearize.errors import ModelError
from linearize.jobs.convert import convert_into
from linearize.recipe import load_recipe
from linearize.runtime.files import sha256
from linearize.sources.source import find_source, load_model, load_tokenizer
from tests.model.test_families import ROWS, build
from tests.tables import some


def weights(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        found.update(load_file(file))
    return found


def both_ways(folder, target, *changes, teacher=None, shard_bytes=20_000, **options):
    """The files' names, of the checkpoint through memory and from file to file, after comparing all but their names."""
    recipe = load_recipe("window-gla", ["mixer.window=12", *changes])
    source, told = find_source(str(folder)), []
    tokenizer = load_tokenizer(source)
    for way, given in (("memory", load_model(source, dtype=recipe.dtype)), ("files", None)):
        (target / way).mkdir(parents=True)
        convert_into(
            source, recipe, target / way, teacher=given, tokenizer=tokenizer, shard_bytes=shard_bytes,
            say=told.append, **options,
        )  # fmt: skip
    expected, found = weights(target / "memory"), weights(target / "files")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    for name in ("config.json", "generation_config.json"):
        assert (target / "files" / name).read_text() == (target / "memory" / name).read_text()
    named = re.compile(r'(?:^# |from_pretrained\("|linearize eval )(?:files|memory)', re.MULTILINE)  # the folder's name
    cards = {named.sub("", (target / way / "README.md").read_text()) for way in ("files", "memory")}
    assert len(cards) == 1
    files = json.loads((target / "files" / "linearize.json").read_text())["files"]
    assert files == {name: sha256(target / "files" / name) for name in files}
    return sorted(path.name for path in (target / "files").glob("*.safetensors")), told


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    from tests.conftest import random_llama

    return random_llama(tmp_path_factory.mktemp("tokenizer"))


def saved(model, folder, tokenizer_folder, **options):
    load_tokenizer(find_source(str(tokenizer_folder))).save_pretrained(folder)
    model.save_pretrained(folder, **options)
    return folder


LAID_OUT_APART = (
    "llama",
    "llama, tied embeddings",
    "gpt2",
    "phi3",
    "mixtral",
    "falcon, grouped",
    "gemma2, untied embeddings",
)


@pytest.mark.parametrize("row", some(list(ROWS), LAID_OUT_APART))
def test_every_family(row, tokenizer_folder, tmp_path):
    folder = saved(build(row), tmp_path / "base", tokenizer_folder, max_shard_size=30_000)
    files, told = both_ways(folder, tmp_path)
    assert all("LongRoPE" in line for line in told)
    assert len(files) > 1


@pytest.mark.parametrize("row", ["llama", "llama, tied embeddings", "mixtral"])
def test_another_dtype(row, tokenizer_folder, tmp_path):
    folder = saved(build(row), tmp_path / "base", tokenizer_folder)
    files, _ = both_ways(folder, tmp_path, "dtype=bfloat16", shard_bytes=10**9, workers=2)
    assert files == ["model.safetensors"]
    found = weights(tmp_path / "files")
    assert found["model.norm.weight"].dtype == torch.bfloat16
    assert found["model.layers.0.self_attn.mixer.mix_weight"].dtype == torch.float32


@pytest.mark.parametrize("tied", ["equal", "unequal", "head alone", "without a prefix"])
def test_tied_weights_whatever_the_files_say(tied, tokenizer_folder, tmp_path):
    folder = saved(copy.deepcopy(build("llama, tied embeddings")), tmp_path / "base", tokenizer_folder)
    held = weights(folder)
    embedding = held["model.embed_tokens.weight"]
    if tied == "without a prefix":
        held = {name.removeprefix("model."): tensor for name, tensor in held.items()}
    else:
        held["lm_head.weight"] = embedding.clone() if tied != "unequal" else embedding + 1
    if tied == "head alone":
        del held["model.embed_tokens.weight"]
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as old checkpoints have it
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    _, told = both_ways(folder, tmp_path)
    assert not told
    assert ("lm_head.weight" in weights(tmp_path / "files")) == (tied == "unequal")


def test_in_python_the_model_that_comes_back_has_its_weights(tiny_folder, tmp_path):
    converted = linearize.convert(tiny_folder, tmp_path / "out", "window-gla", overrides=["mixer.window=16"])
    ids = torch.arange(5, 45)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(converted(ids).logits, again(ids).logits)


def test_what_cannot_go_from_file_to_file_says_so_and_goes_through_memory(tokenizer_folder, tmp_path):
    folder = saved(copy.deepcopy(build("llama")), tmp_path / "base", tokenizer_folder)
    held = weights(folder)
    held["model.norm.weight"] = held["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    _, told = both_ways(folder, tmp_path)
    assert told == [
        "base: converted in memory, not file by file: model.norm.weight is stored as F8_E4M3, whose values are "
        "taken as they are"
    ]
    del held["model.norm.weight"]
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    shutil.rmtree(tmp_path / "files")
    (tmp_path / "files").mkdir()
    with pytest.raises(ModelError, match=r"1 weight is not there, model\.norm\.weight among them"):
        convert_into(find_source(str(folder)), load_recipe("window-gla"), tmp_path / "files", say=told.append)
    assert any(line.endswith("its files lack 1 weight, model.norm.weight among them") for line in told)


def scaled(name):
    """Stores projections as float8 with a scale of that name each, as several quantizers do."""

    def change(held):
        for key in [key for key in held if "_proj." in key]:
            held[key] = held[key].to(torch.float8_e4m3fn)
            held[f"{key}{name}"] = torch.ones(1)

    return change


def biased(held):
    for key in [key for key in held if "_proj." in key]:
        held[key.replace("weight", "bias")] = torch.ones(held[key].shape[0])


def as_classifier(held):
    del held["lm_head.weight"]
    held["score.weight"] = torch.ones(3, 48)


def as_adapted(held):
    """As `save_pretrained` of a peft model's own modules leaves it."""
    for key in list(held):
        layer = key.replace("_proj.weight", "_proj.base_layer.weight")
        held[f"base_model.model.{layer}"] = held.pop(key)
    held["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(2, 48)


def with_adapters(held):
    held["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 48)


def as_compiled(held):
    for key in list(held):
        held[f"_orig_mod.{key}"] = held.pop(key)


MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}


@pytest.mark.parametrize(
    ("change", "settings", "told"),
    [
        (scaled("_scale_inv"), {}, r"14 weights have no place .*\.down_proj\.weight_scale_inv, .*are quantized"),
        (scaled("_scale"), {"quantization_config": MODELOPT}, r"14 weights have no place .*weight_scale, .*quantized"),
        (biased, {}, r"14 weights have no place .*0\.mlp\.down_proj\.bias, .*config\.json announces none"),
        (
            as_classifier,
            {"tie_word_embeddings": True},
            r"1 weight has no place .*\(score\.weight\): it is a classifier",
        ),
        (as_adapted, {}, r"no place .*\(base_model\.model\..*: adapters of peft .* merge them first \(model\.merge"),
        (with_adapters, {}, r"1 weight has no place .*lora_A\.weight\): adapters of peft .* and save that model$"),
        (as_compiled, {}, r"no place .*\(_orig_mod\..*: it was saved within torch\.compile; save model\._orig_mod"),
    ],
    ids=["scales", "an unknown quantizer", "biases", "a classifier", "peft", "adapters beside", "torch.compile"],
)
@pytest.mark.parametrize("way", ["files", "memory"])
def test_weights_that_the_model_does_not_take_are_refused_by_name(
    change, settings, told, way, tokenizer_folder, tmp_path
):
    folder = saved(copy.deepcopy(build("llama")), tmp_path / "base", tokenizer_folder)
    held = weights(folder)
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    source = find_source(str(folder))
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=told) as refused:
        load_model(source) if way == "memory" else convert_into(source, load_recipe("window-gla"), tmp_path / "out")
    assert "\n" not in str(refused.value)


def test_a_converted_model_refuses_weights_that_it_does_not_take(tiny_folder, tmp_path):
    linearize.convert(tiny_folder, tmp_path / "out", "window-gla")
    held = weights(tmp_path / "out")
    held["model.layers.0.self_attn.mixer.unknown"] = torch.ones(2)
    save_file(held, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weight has no place .*mixer\.unknown"):
        load_model(find_source(str(tmp_path / "out")))


def test_buffers_that_are_computed_may_be_in_the_files(tokenizer_folder, tmp_path):
    folder = saved(build("gpt2"), tmp_path / "base", tokenizer_folder)
    held = weights(folder)
    held |= {
        f"transformer.h.{n}.attn.{name}": torch.ones(1, 1, 4, 4) for n in (0, 1) for name in ("bias", "masked_bias")
    }
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    _, told = both_ways(folder, tmp_path)
    assert not told


def test_rotary_tables_may_be_in_the_files(tokenizer_folder, tmp_path):
    folder = saved(build("llama"), tmp_path / "base", tokenizer_folder)
    held = weights(folder)
    for name in ("inv_freq", "cos_cached", "sin_cached"):
        held[f"model.layers.0.self_attn.rotary_emb.{name}"] = torch.ones(4)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    _, told = both_ways(folder, tmp_path / "out")
    assert not told


_MEASURED = """
import json, resource, sys, time
from pathlib import Path
import linearize
from linearize.jobs.convert import convert_into
from linearize.sources.source import find_source, load_tokenizer
from linearize.recipe import load_recipe
folder, small, big, limit = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

def data():  # what RLIMIT_DATA counts, in bytes
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def run(name):
    (folder / ("out-" + name)).mkdir()
    options = {"shard_bytes": int(sys.argv[5])}
    convert_into(find_source(str(folder / name)), load_recipe("window-gla"), folder / ("out-" + name), **options)

run(small)  # what modules and libraries take is there from now on
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before, held = peak(), data()
resource.setrlimit(resource.RLIMIT_DATA, (held + limit,) * 2)
run(big)
print(json.dumps({"peak": peak() - before}))
"""


@pytest.mark.check
def test_a_checkpoint_larger_than_the_memory(tokenizer_folder, tmp_path):
    """A dozen shards in 1.2 shards of memory: resident as well as allocated, which a limit holds."""
    shard = 40_000_000
    config = copy.deepcopy(build("llama").config)
    for name, layers, width in (("small", 1, 48), ("big", 12, 896)):
        config.num_hidden_layers, config.hidden_size, config.intermediate_size = layers, width, 3 * width
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, width // 4
        torch.manual_seed(0)
        with initialization.no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.uniform_()
        saved(model, tmp_path / name, tokenizer_folder, max_shard_size=shard)
    files = sorted((tmp_path / "big").glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    assert len(files) >= 9 and sum(sizes) > 8 * shard and max(sizes) <= 1.01 * shard
    limit = int(1.2 * max(sizes))
    command = [sys.executable, "-c", _MEASURED, str(tmp_path), "small", "big", str(limit), str(shard)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak"] < limit, (done.stdout, limit)
    expected, found = weights(tmp_path / "big"), weights(tmp_path / "out-big")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert len(list((tmp_path / "out-big").glob("*.safetensors"))) >= 9
