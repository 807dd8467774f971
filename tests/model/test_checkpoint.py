"""Converted checkpoints: what is in them, and that they load with and without the package."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_imports

from linearize.calibration.start import convert
from linearize.conversion.convert import convert_model, state_nbytes
from linearize.conversion.output import sha256
from linearize.conversion.source import find_source, load_model, teacher_of
from linearize.hub.carry import AUTO_MAP, carried_files
from linearize.model import LayerMemory, LinearizedConfig, LinearizedForCausalLM, cache_nbytes
from linearize.recipe import load_recipe

_WITHOUT_PACKAGE = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("linearize", "linearize_kernels", "triton", "fla"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(float(model(torch.arange(5, 105)[None]).logits.double().sum()))
print(model.generate(torch.arange(5, 105)[None], max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 100:].tolist())
"""


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert(find_source(str(tiny_folder)), load_recipe("default", ["mixer.window=16"]), folder)
    return folder


def test_holds_everything_that_the_contract_names(checkpoint, tiny_folder):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["model_type"] == "linearized"
    assert config["text_config"]["model_type"] == "llama"
    assert config["auto_map"] == AUTO_MAP
    assert [m["window"] for m in config["mixers"]] == [16]
    assert "rope_parameters" not in config  # the base model's attributes stay inside
    provenance = json.loads((checkpoint / "linearize.json").read_text())
    assert provenance["base"]["model"] == str(tiny_folder.resolve())
    assert {"linearize", "torch", "transformers"} <= provenance["versions"].keys()
    named = {path.name for path in checkpoint.iterdir()} - {"linearize.json"}
    assert provenance["files"].keys() == named
    assert all(sha256(checkpoint / name) == digest for name, digest in provenance["files"].items())
    assert {"README.md", "recipe.yaml", "tokenizer.json", "model.safetensors"} <= named
    assert load_recipe(str(checkpoint / "recipe.yaml")).mixer.window == 16


def test_names_are_the_base_models_and_a_few_more(checkpoint, tiny_folder):
    base, converted = (set(load_file(folder / "model.safetensors")) for folder in (tiny_folder, checkpoint))
    tied = {"lm_head.weight", "model.embed_tokens.weight"}  # written once, under either name
    assert base - tied <= converted
    assert converted - base - tied
    assert all(".self_attn.mixer." in name for name in converted - base - tied)


def test_loads_with_the_package(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert isinstance(model, LinearizedForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(checkpoint), LinearizedConfig)
    assert teacher_of(find_source(str(checkpoint))).kind == "folder"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    result = model(**tokenizer("Once upon a time", return_tensors="pt"), use_cache=True)
    assert all(isinstance(layer, LayerMemory) for layer in result.past_key_values.layers)
    assert cache_nbytes(result.past_key_values) == state_nbytes(model)


@pytest.mark.parametrize("kind", ["default", "landmarks"])
def test_loads_without_the_package(checkpoint, tiny_folder, kind, tmp_path, monkeypatch):
    if kind == "landmarks":
        checkpoint = tmp_path / "landmarks"
        checkpoint.mkdir()
        changes = ["mixer.window=16", "mixer.landmarks=24", "mixer.landmarks_by=null"]
        convert(find_source(str(tiny_folder)), load_recipe("landmarks", changes), checkpoint)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_PACKAGE, str(checkpoint)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    prompt = torch.arange(5, 105)[None]
    total, tokens = done.stdout.strip().splitlines()[-2:]
    assert float(total) == pytest.approx(float(model(prompt).logits.double().sum()), rel=1e-6)
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 100:].tolist()
    assert json.loads(tokens) == expected


def test_a_reloaded_model_can_be_saved_again(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_random_weights_from_a_configuration(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, LinearizedForCausalLM)
    mixer = model.model.layers[0].self_attn.mixer
    assert bool((mixer.mix_weight == 0).all()) and bool((mixer.recurrence.gate_bias == 5).all())


def test_what_a_checkpoint_lacks_starts_as_in_a_conversion(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    names = [name for name, _ in model.named_parameters() if ".layers.0." in name and ".mixer." in name]
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k not in names}, tmp_path / "model.safetensors", {"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(names) == 3
    for name in names:
        assert torch.equal(again.get_parameter(name), model.get_parameter(name)), name


def test_own_parameters_stay_float32_in_half_precision(tiny_folder, tmp_path):
    source = find_source(str(tiny_folder))
    model = convert_model(load_model(source, dtype="bfloat16"), load_recipe("default").mixer)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for built in (model, again):
        mixer = built.model.layers[0].self_attn.mixer
        assert mixer.mix_weight.dtype == mixer.recurrence.gate_bias.dtype == torch.float32
        assert built.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


def test_carried_files_import_only_each_other_torch_and_transformers(tmp_path):
    """And packages whose absence they handle: transformers refuses files that import anything else."""
    files = carried_files()
    assert {f"{value.split('.')[0]}.py" for value in AUTO_MAP.values()} <= files.keys()
    for name, source in files.items():
        (tmp_path / name).write_text(source, encoding="utf-8")
        needed = set(get_imports(tmp_path / name))
        assert needed <= {"torch", "transformers", *sys.stdlib_module_names}, (name, needed)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                missing = {imported.name for imported in node.names} - _names(files[f"{node.module}.py"])
                assert not missing, (name, node.module, missing)


def _names(source: str) -> set[str]:
    """What a module defines or imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names
