"""A calibration whose weights are in files is the one in memory, and holds no more than a block."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, initialization

from linearize.calibration.blocks import Blocks
from linearize.calibration.reading import read_by_block
from linearize.calibration.weights import FileWeights, Weights
from linearize.conversion.swap import convert_model
from linearize.data.load import TrainingData
from linearize.errors import ModelError
from linearize.jobs import convert as module
from linearize.jobs.convert import convert_into, open_files
from linearize.probe.damage import read
from linearize.probe.needles import Needle
from linearize.recipe import load_recipe
from linearize.sources.source import find_source, load_model, load_tokenizer
from tests.calibration.test_calibrate import SHORT, drawn
from tests.conftest import random_llama
from tests.model.test_families import build
from tests.tables import some

FAMILIES = [
    "llama", "llama, tied embeddings", "mixtral", "gemma2", "gemma3_text", "gpt2", "falcon, multi-query", "gpt_neox",
    "cohere2", "phi3", "stablelm, all options",
]  # fmt: skip
LITTLE = "calibrate={tokens: 216, length: 72, held_out: 2, steps: 4, source: drawn}"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return random_llama(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def drawn_texts(monkeypatch):
    """Drawn tokens in the place of a text, which random models of few tokens have no words for."""
    rows = drawn(2, 2)
    needles = [Needle(ids.tolist(), range(4, 6), range(68, 70)) for ids in rows.input_ids]
    text = TrainingData(drawn(0, 3), drawn(1, 2), "drawn tokens", 5, 0.0)
    monkeypatch.setattr(module, "calibration_text", lambda *_, **__: text)
    monkeypatch.setattr(module, "deciding_needles", lambda *_: needles)
    return rows, needles


def saved(model, folder, tokenizer_folder):
    load_tokenizer(find_source(str(tokenizer_folder))).save_pretrained(folder)
    model.save_pretrained(folder, max_shard_size=30_000)
    return find_source(str(folder))


def both_ways(source, recipe, target):
    """The folders of the checkpoints through memory and from file to file, after comparing them."""
    for way, teacher in (("memory", load_model(source, dtype=recipe.dtype)), ("files", None)):
        (target / way).mkdir(parents=True)
        start = convert_into(source, recipe, target / way, teacher=teacher, shard_bytes=20_000)
        assert (start.model.device.type == "meta") == (way == "files")
    expected, found = (weights(target / way) for way in ("memory", "files"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    figures = [json.loads((target / way / "calibration.json").read_text()) for way in ("memory", "files")]
    for one in figures:
        del one["seconds"]
    assert figures[0] == figures[1]
    names = [
        {path.name for path in (target / way).iterdir() if "model" not in path.name} for way in ("memory", "files")
    ]
    assert names[0] == names[1]
    return target / "memory", target / "files"


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def in_memory(model, index):
    """Whether any parameter of block `index`, or of what belongs to no block, has data."""
    family = model.attention_layers[0].family
    blocks = [block for block, _ in family.attention_modules(model)]
    inside = {id(x) for block in blocks for x in block.parameters()}
    chosen = model.parameters() if index is None else blocks[index].parameters()
    return any(x.device.type != "meta" for x in chosen if index is not None or id(x) not in inside)


@pytest.fixture
def one_at_a_time(monkeypatch):
    """Asserts at every step that one block is in memory, or what is outside of blocks, and nothing else; counts."""
    steps = {"blocks": 0, "outside": 0}
    run, outside = Blocks.run, FileWeights.outside

    def checked_run(self, layer, hidden, call, **given):
        held = [index for index in range(len(self)) if in_memory(self.model, index)]
        assert held == [layer] and not in_memory(self.model, None)
        steps["blocks"] += 1
        return run(self, layer, hidden, call, **given)

    @contextmanager
    def checked_outside(self):
        with outside(self):
            count = len(self.model.attention_layers)
            assert in_memory(self.model, None) and not any(in_memory(self.model, index) for index in range(count))
            steps["outside"] += 1
            yield

    monkeypatch.setattr(FileWeights, "outside", checked_outside)
    return steps, lambda: monkeypatch.setattr(Blocks, "run", checked_run)


@pytest.mark.parametrize("row", some(FAMILIES, ["llama, tied embeddings", "gemma3_text", "gpt2"]))
def test_every_family(row, tokenizer_folder, drawn_texts, tmp_path):
    source = saved(copy.deepcopy(build(row)), tmp_path / "base", tokenizer_folder)
    both_ways(source, load_recipe("train", ["mixer.window=8", LITTLE]), tmp_path)


@pytest.mark.parametrize(
    "change", some(["dtype=bfloat16", "mixer.keep.layers=[0]", "calibrate.ridge=false"], ["mixer.keep.layers=[0]"])
)
def test_other_recipes(change, tokenizer_folder, drawn_texts, tmp_path):
    source = saved(copy.deepcopy(build("llama")), tmp_path / "base", tokenizer_folder)
    both_ways(source, load_recipe("train", ["mixer.window=8", LITTLE, change]), tmp_path)


@pytest.mark.check
def test_a_trained_model_keeps_what_helps_and_holds_one_block(tiny_folder, data_folder, one_at_a_time, tmp_path):
    recipe = load_recipe(
        "train", ["mixer.window=16", SHORT, f"calibrate.source={data_folder / 'books' / 'tinyshakespeare.txt'}"]
    )
    steps, check = one_at_a_time
    _, files = both_ways(find_source(str(tiny_folder)), recipe, tmp_path)
    figures = json.loads((files / "calibration.json").read_text())
    assert any(one["kept"] for one in figures["ingredients"])
    mixed = [x for name, x in weights(files).items() if name.endswith("mix_weight")]
    assert mixed and any(bool(x.any()) for x in mixed)
    check()
    (tmp_path / "again").mkdir()
    steps.update(blocks=0, outside=0)
    convert_into(find_source(str(tiny_folder)), recipe, tmp_path / "again")
    assert steps["blocks"] > 100 and steps["outside"] > 5
    again, expected = weights(tmp_path / "again"), weights(files)
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("row", ["gemma3_text", "gpt2", "cohere2"])
def test_blocks_one_by_one_read_what_the_model_reads(row, drawn_texts):
    model = convert_model(copy.deepcopy(build(row)), load_recipe("window-gla", ["mixer.window=8"]).mixer)
    rows, needles = drawn_texts
    expected, found = read(model, rows, needles), read_by_block(Blocks(Weights(model)), rows, needles)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.recall, expected.recall, rtol=1e-5, atol=1e-5)


def test_a_block_is_as_converted_but_for_what_is_chosen(tokenizer_folder, tmp_path):
    """In memory and from files alike."""
    recipe = load_recipe("train", ["mixer.window=8"])
    source = saved(copy.deepcopy(build("llama")), tmp_path / "base", tokenizer_folder)
    streamer = open_files(source, recipe, shard_bytes=10**9, say=lambda line: None)
    for weights_at in (Weights(convert_model(copy.deepcopy(build("llama")), recipe.mixer)),
                       FileWeights(streamer, tmp_path)):  # fmt: skip
        attention = weights_at.model.attention_layers[1]

        def values(attention=attention):
            return attention.mixer.mix_weight.detach().clone(), attention.o_proj.weight.detach().clone()

        with weights_at.block(1):
            before = values()
            with torch.no_grad():
                attention.mixer.mix_weight.fill_(2.0)
                attention.o_proj.weight.fill_(3.0)
            weights_at.keep("mixer", 1)
            weights_at.keep("output", 1)
        for chosen in ([], ["mixer"], ["output"], ["mixer", "output"], []):
            weights_at.chosen[:] = chosen
            with weights_at.block(1):
                mix, output = values()
            assert torch.equal(mix, torch.full_like(mix, 2.0) if "mixer" in chosen else before[0])
            assert torch.equal(output, torch.full_like(output, 3.0) if "output" in chosen else before[1])


def test_weights_that_are_no_numbers_are_refused_before_anything_is_fitted(tokenizer_folder, drawn_texts, tmp_path):
    source = saved(copy.deepcopy(build("llama")), tmp_path / "base", tokenizer_folder)
    file = next(file for file in (tmp_path / "base").glob("*.safetensors") if "model.norm.weight" in load_file(file))
    held = load_file(file)
    held["model.norm.weight"][0] = float("nan")
    save_file(held, file, {"format": "pt"})
    (tmp_path / "out").mkdir()
    told = []
    with pytest.raises(ModelError, match=r"model\.norm\.weight has values that are not finite"):
        convert_into(source, load_recipe("train", ["mixer.window=8", LITTLE]), tmp_path / "out", say=told.append)
    assert all("tokenizer" in line for line in told) and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("change", "reason"),
    [("calibrate.source=self", "it writes the text that it is calibrated on"),
     ("mixer.keep={budget: 50%}", "which layers keep or see more is measured on the whole model")],
)  # fmt: skip
def test_what_needs_the_whole_model_says_so(change, reason, tiny_folder, tmp_path, monkeypatch):
    told = []

    def stop(*_, **__):
        raise ModelError("in memory")

    monkeypatch.setattr(module, "load_model", stop)
    with pytest.raises(ModelError, match="in memory"):
        convert_into(find_source(str(tiny_folder)), load_recipe("train", [LITTLE, change]), tmp_path, say=told.append)
    assert len(told) == 1 and reason in told[0]


_MEASURED = """
import json, resource, sys
from pathlib import Path
from linearize.jobs.convert import convert_into
from linearize.sources.source import find_source
from linearize.recipe import load_recipe
folder, limit = Path(sys.argv[1]), int(sys.argv[2])

def status(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

def run(name):
    (folder / ("out-" + name)).mkdir()
    changes = ["mixer.window=8", "calibrate={tokens: 384, length: 96, held_out: 2, steps: 2}", sys.argv[3]]
    convert_into(find_source(str(folder / name)), load_recipe("train", changes), folder / ("out-" + name))

run("small")  # what modules and libraries take is there from now on
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before = status("VmHWM")
resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + limit,) * 2)
run("big")
print(json.dumps({"peak": status("VmHWM") - before}))
"""


@pytest.mark.check
def test_a_model_larger_than_the_memory_is_calibrated(tokenizer_folder, tmp_path):
    """Ten blocks in the memory of three: resident as well as allocated, which a limit holds."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{number} {'the sea and the land ' * 40}" for number in range(40)), encoding="utf-8")
    config = copy.deepcopy(build("llama").config)
    config.vocab_size = 257
    for name, layers, width in (("small", 1, 48), ("big", 10, 512)):
        config.num_hidden_layers, config.hidden_size, config.intermediate_size = layers, width, 16 * width
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 2, width // 8
        torch.manual_seed(0)
        with initialization.no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
        for own, parameter in model.named_parameters():
            parameter.data.normal_(1.0 if "norm" in own else 0.0, 0.02)
        load_tokenizer(find_source(str(tokenizer_folder))).save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / name, max_shard_size=60_000_000)
    block = sum(x.nbytes for x in model.model.layers[0].parameters())
    whole = sum(x.nbytes for x in model.parameters())
    limit = 3 * block
    assert whole > 3 * limit
    del model
    command = [sys.executable, "-c", _MEASURED, str(tmp_path), str(limit), f"calibrate.source={text}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak"] < limit, (done.stdout, limit)
    figures = json.loads((tmp_path / "out-big" / "calibration.json").read_text())
    assert len(figures["layers"]) == 10
