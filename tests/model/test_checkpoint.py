"""Converted checkpoints: what is in them, and that they load with and without the package."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import linearize
from linearize.checkpoint.carry import AUTO_MAP
from linearize.checkpoint.provenance import teacher_of
from linearize.checkpoint.sizes import state_nbytes
from linearize.conversion.swap import convert_model
from linearize.errors import ModelError
from linearize.hub.contents import shared_files
from linearize.jobs.convert import convert_into
from linearize.model import LayerMemory, LinearizedConfig, LinearizedForCausalLM, cache_nbytes
from linearize.recipe import load_recipe
from linearize.runtime.files import sha256, staged_folder
from linearize.sources.source import find_source, load_model
from tests.forked import run_forked
from tests.made import LANDMARKS

_BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("linearize", "linearize_kernels", "triton", "fla"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
"""
_WITHOUT_PACKAGE = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(float(model(torch.arange(5, 105)[None]).logits.double().sum()))
print(model.generate(torch.arange(5, 105)[None], max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 100:].tolist())
"""
_TOKENIZER = """
from transformers import AutoTokenizer, PreTrainedTokenizerFast
for tokenizer in (
    AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False),
    PreTrainedTokenizerFast.from_pretrained(sys.argv[1]),
):
    print(tokenizer("Once upon a time").input_ids)
assert not any("transformers_modules" in name for name in sys.modules)
"""
_ADAPTER = """
from peft import AutoPeftModelForCausalLM
import torch
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model.base_model.model).__module__)
print(float(model(torch.arange(5, 105)[None]).logits.double().sum()))
"""
_PIPELINE = """
from transformers import pipeline
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
for _ in range(2):
    writer = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
print(writer("Once upon", max_new_tokens=2, do_sample=False, return_full_text=True)[0]["generated_text"][:9])
"""


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert_into(find_source(str(tiny_folder)), load_recipe("window-gla", ["mixer.window=16"]), folder)
    return folder


def test_files_in_subfolders_are_named_too(tiny_folder, tmp_path):
    """transformers writes a tokenizer's second chat template into one."""
    teacher, target = tmp_path / "teacher", tmp_path / "target"
    shutil.copytree(tiny_folder, teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(teacher)
    target.mkdir()
    convert_into(find_source(str(teacher)), load_recipe("window-gla", ["mixer.window=16"]), target)
    files = json.loads((target / "linearize.json").read_text())["files"]
    template = "additional_chat_templates/tool_use.jinja"
    assert files[template] == sha256(target / template)
    assert {*files, "linearize.json"} == set(shared_files(target))


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
        convert_into(find_source(str(tiny_folder)), load_recipe(LANDMARKS, changes), checkpoint)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    total, tokens = without_package(_WITHOUT_PACKAGE, checkpoint).stdout.strip().splitlines()[-2:]
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    prompt = torch.arange(5, 105)[None]
    assert float(total) == pytest.approx(float(model(prompt).logits.double().sum()), rel=1e-6)
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 100:].tolist()
    assert json.loads(tokens) == expected


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_coded_memory_from_before_keys_were_scaled(bits, tiny_folder, tmp_path):
    changes = ["mixer.window=16", "mixer.landmarks=24", "mixer.landmarks_by=null", f"mixer.memory_dtype={bits}"]
    recipe = load_recipe("default", [*changes, "mixer.landmark_score=novelty"])
    convert_into(find_source(str(tiny_folder)), recipe, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    scales = [name for name in tensors if name.endswith(("key_scale", "key_shift"))]
    save_file({name: x for name, x in tensors.items() if name not in scales}, file, {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"no \S+key_scale, .* an earlier version .* convert .* again, .* edited, .* back to auto$"
    ):
        load_model(find_source(str(tmp_path)))
    save_file({name: x for name, x in tensors.items() if name != scales[0]}, file, {"format": "pt"})
    with pytest.raises(ModelError, match="1 weight is not there"):  # that file is damaged
        load_model(find_source(str(tmp_path)))


def without_package(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs `code` where the package cannot be imported, and nobody answers a question."""
    done = run_forked(_BLOCKED + code, folder)
    assert done.returncode == 0, done.stderr
    return done


def test_a_tokenizer_runs_no_code(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    done = without_package(_TOKENIZER, checkpoint)
    ids = AutoTokenizer.from_pretrained(checkpoint)("Once upon a time").input_ids
    assert done.stdout == f"{ids}\n{ids}\n"  # and no question
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    # transformers 4 looks the class up before the model's configuration, and has none of this name.
    assert settings["tokenizer_class"] != "TokenizersBackend"


def test_the_card_names_the_folder_and_its_code_runs(tiny_folder, checkpoint, tmp_path, monkeypatch):
    with staged_folder(tmp_path / "my-model") as folder:
        convert_into(find_source(str(tiny_folder)), load_recipe("window-gla", ["mixer.window=16"]), folder)
    assert "\n# my-model\n" in (tmp_path / "my-model" / "README.md").read_text()
    card = (checkpoint / "README.md").read_text()
    assert f"\n# {checkpoint.name}\n" in card
    monkeypatch.chdir(checkpoint.parent)
    exec(card.partition("```python")[2].partition("```")[0], found := {})  # noqa: S102
    assert found["tokenizer"]("Once").input_ids and found["model"].name_or_path == checkpoint.name


def test_an_adapter_finds_the_model_that_it_was_trained_on(checkpoint, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.name_or_path == str(checkpoint)
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    adapted = get_peft_model(model, settings)
    ids = torch.arange(5, 105)[None]
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(ids, labels=ids).loss.backward()
    optimizer.step()
    adapted.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        checkpoint
    )
    expected = adapted.eval()(ids).logits
    assert not torch.equal(expected, AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits)
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        again = auto.from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(again(ids).logits, expected), auto
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    module, total = without_package(_ADAPTER, tmp_path / "adapter").stdout.splitlines()[-2:]
    assert module.startswith("transformers_modules.")
    assert float(total) == pytest.approx(float(expected.double().sum()), rel=1e-6)


def test_a_fresh_conversion_has_not_the_name_of_its_teacher(tiny_folder, tmp_path):
    """An adapter that names the pretrained model would load onto that."""
    model = convert_model(load_model(find_source(str(tiny_folder))), load_recipe("window-gla").mixer)
    assert not model.name_or_path
    written = linearize.convert(tiny_folder, tmp_path / "out", "window-gla", overrides=["mixer.window=16"])
    assert written.name_or_path == written.config.name_or_path == str(tmp_path / "out")


def test_a_pipeline_knows_the_class(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    done = without_package(_PIPELINE, checkpoint)
    assert done.stdout.strip() == "Once upon" and "not supported" not in done.stderr
    with capture_logs() as told:
        writer = pipeline("text-generation", model=str(checkpoint))
        pipeline("text-generation", model=writer.model, tokenizer=writer.tokenizer)
    assert told == []
    # The table of names is one of transformers' own, and its other readers still find their classes.
    classes = MODEL_FOR_CAUSAL_LM_MAPPING.values()  # before the keys: it imports models, and fla registers its own then
    kept = list(MODEL_FOR_CAUSAL_LM_MAPPING.keys())
    assert LinearizedConfig in kept and len(classes) == len(kept)


def test_label_smoothing_of_a_trainer_shifts_labels(tiny_folder, tmp_path):
    """`Trainer` knows by the class's name that labels are the next tokens."""
    source = find_source(str(tiny_folder))
    teacher = load_model(source)
    model = convert_model(load_model(source), load_recipe("window-gla", ["mixer.window=256"]).mixer)
    settings = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to=[])
    ids = torch.arange(5, 105)[None]
    given = {"input_ids": ids, "labels": ids}
    ours, theirs = (Trainer(one, settings).compute_loss(one, dict(given)).item() for one in (model, teacher))
    assert ours == pytest.approx(theirs, rel=1e-5)


@contextmanager
def capture_logs():
    """What transformers says of at least a warning's weight."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)


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
    model = convert_model(load_model(source, dtype="bfloat16"), load_recipe("window-gla").mixer)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for built in (model, again):
        mixer = built.model.layers[0].self_attn.mixer
        assert mixer.mix_weight.dtype == mixer.recurrence.gate_bias.dtype == torch.float32
        assert built.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
