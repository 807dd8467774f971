"""`linearize export`: what is in the folder, what its card says, and that it loads where there is little else."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from linearize.api import export
from linearize.checkpoint.provenance import checkpoint_digest, teacher_of
from linearize.errors import DataError, ModelError
from linearize.evaluation.results.report import write_report
from linearize.hub.contents import local_things
from linearize.hub.licence import front_matter, licence_of
from linearize.hub.push import pack
from linearize.jobs.convert import convert_into
from linearize.model import LinearizedForCausalLM
from linearize.quantization.rounding import WEIGHTS
from linearize.recipe import dump_recipe, load_recipe
from linearize.runtime.files import sha256
from linearize.sources.source import Source, find_source
from tests.evaluation.results_kit import results
from tests.hub.clean import LOAD, SAYS_ALONE, clean_site, run_python, says
from tests.hub.local_hub import TOKEN

IDS = torch.arange(5, 105)[None]
pytestmark = pytest.mark.usefixtures("_no_gradients")


@pytest.fixture
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def tuned(converted, tmp_path):
    """As fine-tuning leaves it."""
    folder = shutil.copytree(converted, tmp_path / "run" / "finetuned")
    provenance = json.loads((folder / "linearize.json").read_text())
    provenance["stages"] = [
        {"objective": "1 sft", "data": "/data/private/notes.txt", "tokens": 512, "length": 64, "steps": 4}
    ]
    provenance["start"] = {"calibration": ["512 tokens of /data/private/notes.txt, in rows of 64"]}
    (folder / "linearize.json").write_text(json.dumps(provenance))
    (folder / "calibration.json").write_text('{"source": "/data/private/notes.txt"}')
    (folder / "calibration.md").write_text("# Calibration\n\n512 tokens of /data/private/notes.txt, in rows\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    (folder / "held_out.safetensors").write_bytes(b"private")
    (tmp_path / "run" / "results.json").write_text(json.dumps(results().to_json()))
    return folder


def test_a_folder_that_can_be_shared(tuned, tmp_path, tiny_folder):
    assert local_things(tuned)
    out = tmp_path / "out"
    done = export(tuned, out, base="acme/tiny", licence="apache-2.0", shard_size="300KB")
    assert done.findings == local_things(out) == pack(out).findings == []
    assert done.files == {path.name: path.stat().st_size for path in out.iterdir()}
    assert "held_out.safetensors" not in done.files and "metrics.jsonl" in done.files
    shards = sorted(name for name in done.files if name.endswith(".safetensors"))
    assert len(shards) > 1 and sum(done.files[name] > 1.2e6 for name in shards) == 0
    same = AutoModelForCausalLM.from_pretrained(out), AutoModelForCausalLM.from_pretrained(tuned)
    assert torch.equal(same[0](IDS).logits, same[1](IDS).logits)
    assert not any("lora" in name for shard in shards for name in load_file(out / shard))

    provenance = json.loads((out / "linearize.json").read_text())
    assert provenance["files"] == {name: sha256(out / name) for name in done.files if name != "linearize.json"}
    assert provenance["base"]["model"] == "acme/tiny" and provenance["base"]["read_from"] == tiny_folder.name
    assert provenance["stages"][0]["data"] == "notes.txt"
    assert provenance["start"] == {"calibration": ["512 tokens of notes.txt, in rows of 64"]}
    assert (out / "calibration.md").read_text() == "# Calibration\n\n512 tokens of notes.txt, in rows\n"
    assert json.loads((out / "calibration.json").read_text()) == {"source": "notes.txt"}
    assert {"versions", "exported", "seed"} <= provenance.keys()
    recipe = load_recipe(str(out / "recipe.yaml"))
    assert recipe.model == "acme/tiny" and recipe.mixer.window == 16


def test_the_card_says_what_was_measured(tuned, tmp_path):
    done = export(tuned, tmp_path / "out", name="me/smol", base="acme/tiny", licence="apache-2.0")
    card = (tmp_path / "out" / "README.md").read_text()
    matter = front_matter(card)
    assert (matter["base_model"], matter["license"], matter["library_name"]) == (
        "acme/tiny",
        "apache-2.0",
        "transformers",
    )
    assert 'from_pretrained("me/smol")' in card and "Trained: 1 sft, 512 tokens of notes.txt." in card
    report = results().to_json()
    assert done.measured is not None and done.measured.name == "results.json"
    for system in report["systems"]:  # the baselines beside it
        assert f" {system['name']} |" in card
    value = report["tasks"][0]["systems"]["teacher"]["value"]
    assert f"{100 * value:.1f}" in card or f"{value:.4f}" in card or f"{value:.2f}" in card
    assert "### What was kept, and what was lost" in card and "mixer:\n  recurrence: gla" in card
    assert str(tmp_path) not in card and "private" not in card

    bare = export(tuned.parent / "finetuned", tmp_path / "bare", report=tuned.parent)
    assert bare.measured == tuned.parent
    alone = shutil.copytree(tuned, tmp_path / "alone")
    assert export(alone, tmp_path / "more").measured is None
    assert "Nothing that is written here." in (tmp_path / "more" / "README.md").read_text()


def marked(source, dtype="float32"):
    """Results that say which checkpoint their system `model` is."""
    found = results()
    digest = checkpoint_digest(find_source(str(source)))
    found.systems[2] = replace(found.systems[2], checkpoint=digest, dtype=dtype)
    return found


@pytest.fixture
def other(converted, tiny_folder, tmp_path):
    """Another checkpoint of the same base model."""
    (tmp_path / "other").mkdir()
    recipe = load_recipe("window-gla", ["mixer.window=8", f"model={tiny_folder}"])
    convert_into(find_source(str(tiny_folder)), recipe, tmp_path / "other")
    return tmp_path / "other"


def test_figures_of_another_model_do_not_come_onto_the_card(tuned, other, tmp_path, outcome):
    assert len({checkpoint_digest(find_source(str(folder))) for folder in (tuned, other)}) == 2
    wrong = tmp_path / "wrong"
    write_report(marked(other), wrong)
    status, _, words = outcome("export", tuned, tmp_path / "out", "--report", wrong)
    assert status == 1 and words.count("\n") == 1 and not (tmp_path / "out").exists()
    assert f"{wrong}: its figures are of another checkpoint ('tuned'), not of {tuned}; evaluate this one: " in words
    plain = results()  # of a model that was not converted
    plain.systems[0] = replace(plain.systems[0], dtype="float32")
    write_report(plain, wrong)
    with pytest.raises(DataError, match="of another checkpoint"):
        export(tuned, tmp_path / "out", report=wrong)
    # One that is found is passed over.
    write_report(marked(other), tuned.parent)
    heard = []
    assert export(tuned, tmp_path / "out", say=heard.append).measured is None
    assert "Nothing that is written here." in (tmp_path / "out" / "README.md").read_text()
    assert not any("checkpoint" in line for line in heard)


def test_the_card_says_which_system_the_model_is_and_in_which_dtype(tuned, tmp_path):
    (tuned / "README.md").write_text("# Edited\n")  # it is the same checkpoint still
    write_report(marked(tuned), tmp_path / "report")
    heard, told = [], {}
    for dtype in ("auto", "bfloat16"):
        export(tuned, tmp_path / dtype, report=tmp_path / "report", dtype=dtype, say=heard.append)
        told[dtype] = (tmp_path / dtype / "README.md").read_text()
        assert "In the tables this model is **model**.\n" in told[dtype]
        assert "does not say which checkpoint" not in told[dtype] + "".join(heard)
    differs = "It was scored in float32, and its weights are bfloat16 here, so its own figures may differ.\n"
    assert differs in told["bfloat16"] and "figures may differ" not in told["auto"]
    found = marked(tuned)  # named as in no other report, beside a system `model`
    found.systems[1] = replace(found.systems[2], name="window")
    found.systems[2] = replace(found.systems[2], checkpoint=None)
    write_report(found, tmp_path / "report")
    export(tuned, tmp_path / "again", report=tmp_path / "report")
    assert "In the tables this model is **window**.\n" in (tmp_path / "again" / "README.md").read_text()


def test_a_report_of_an_earlier_version_is_shown_with_a_word(tuned, tmp_path, outcome):
    document = results().to_json()
    for system in document["systems"]:
        del system["checkpoint"], system["dtype"]
    (tmp_path / "run" / "results.json").write_text(json.dumps(document))
    _, _, words = outcome("export", tuned, tmp_path / "out")
    assert "results.json: does not say which checkpoint it is of; see that it is finetuned\n" in words
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The report does not say which checkpoint it is of, nor in which dtype that was scored.\n" in card


def test_no_path_is_left_on_the_card(tuned, tmp_path):
    texts = {"source": "/srv/team secret/a.jsonl", "field": "text"}
    command = [
        "linearize", "eval", "/data/team secret/m", "--set", "stages.0.data={source: /srv/secret/x.jsonl}",
        "--set", "data.mix=[{source: /srv/team secret/y.jsonl, weight: 2}, {source: me/texts}]",
        "--set=teacher='/srv/it''s secret/t'", "--report", "~/secret/r", "-o/srv/secret/o", "me/smol",
    ]  # fmt: skip
    report = results(command=shlex.join(command))
    (tmp_path / "run" / "results.json").write_text(json.dumps(report.to_json()))
    recipe = load_recipe("window-gla", ["mixer.window=16", f"stages.0.data={json.dumps(texts)}"])
    (tuned / "recipe.yaml").write_text(dump_recipe(recipe))
    (tuned / "metrics.jsonl").write_text('{"data": "/srv/team secret/a.jsonl", "loss": 2.50}\n{"loss": 2.50}\ntorn')
    provenance = json.loads((tuned / "linearize.json").read_text())
    provenance["stages"][0]["data"] = "50% /srv/team secret/a.jsonl + 50% me/texts"
    (tuned / "linearize.json").write_text(json.dumps(provenance))
    assert export(tuned, tmp_path / "out", base="acme/tiny").findings == []
    card = (tmp_path / "out" / "README.md").read_text()
    assert "command: " not in card
    assert "source: a.jsonl" in card and "tokens of 50% a.jsonl + 50% me/texts" in card
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == '{"data": "a.jsonl", "loss": 2.5}\n{"loss": 2.50}\ntorn'
    for file in ("README.md", "recipe.yaml", "linearize.json", "metrics.jsonl"):
        assert "secret" not in (tmp_path / "out" / file).read_text(), file


def test_a_base_model_that_nobody_else_can_find_is_not_named(tuned, tmp_path, tiny_folder):
    done = export(tuned, tmp_path / "out")
    assert done.base is None and not done.findings
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in front_matter(card) and tiny_folder.name in card
    with pytest.raises(ModelError, match="does not name the base model; name the teacher with --teacher"):
        teacher_of(find_source(str(tmp_path / "out")))


def test_half_the_bytes(tuned, tmp_path):
    export(tuned, tmp_path / "out", dtype="bfloat16")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {w.dtype for name, w in weights.items() if ".mixer." not in name} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.check
def test_it_loads_with_torch_and_transformers_alone(tuned, tmp_path):
    export(tuned, tmp_path / "out", shard_size="1MB")
    home = tmp_path / "home"
    home.mkdir()
    printed = run_python(home, LOAD, tmp_path / "out", site=clean_site(tmp_path / "site"), HF_HUB_OFFLINE="1")
    model = AutoModelForCausalLM.from_pretrained(tuned)
    total, tokens = printed.splitlines()
    assert float(total) == pytest.approx(float(model(IDS).logits.double().sum()), rel=1e-6)
    assert (
        json.loads(tokens) == model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 100:].tolist()
    )


@pytest.fixture
def _one_thread():
    """As in a process with OMP_NUM_THREADS=1: sums are in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("kind", list(itertools.product(WEIGHTS, ("float32", "bfloat16"))))
@pytest.mark.check
def test_integers_say_the_same_with_torch_and_transformers_alone(tuned, tmp_path, kind):
    """To the last bit, in one forward, token by token (on a CPU torch's int8 kernel in bfloat16) and written."""
    weights, dtype = kind
    (tuned / "held_out.safetensors").unlink()
    out, said, home = tmp_path / "out", tmp_path / "said.safetensors", tmp_path / "home"
    done = export(tuned, out, shard_size="1MB", weights=weights, dtype=dtype, text="self", tokens=1024)
    home.mkdir()
    printed = run_python(home, SAYS_ALONE, out, said, site=clean_site(tmp_path / "site"), HF_HUB_OFFLINE="1")
    assert int(printed) == done.cost["layers"] > 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, LinearizedForCausalLM) and model.dtype == getattr(torch, dtype)
    alone, expected = load_file(said), says(model)
    assert bool(alone["whole"].isfinite().all()) and float(alone["whole"].std()) > 0
    assert {name: torch.equal(alone[name], tensor) for name, tensor in expected.items()} == dict.fromkeys(alone, True)


def test_the_licence_is_the_base_models(hub, tuned, tmp_path):
    card = "---\nlicense: other\nlicense_name: acme\nlicense_link: LICENSE\n---\n# A model\n"
    other = {"license": "other", "license_name": "acme", "license_link": "LICENSE"}
    (tmp_path / "README.md").write_text(card)
    hub.create("acme/tiny", private=False).head.files["README.md"] = card.encode()
    folder, there = Source(str(tmp_path), "folder"), Source("acme/tiny", "hub")
    assert licence_of([folder]) == licence_of([there]) == other
    assert licence_of([Source(str(tmp_path / "gone"), "folder"), Source("acme/none", "hub")]) == {}
    done = export(tuned, tmp_path / "out", base="acme/tiny")
    matter = front_matter((tmp_path / "out" / "README.md").read_text())
    assert done.licence == other and other.items() <= matter.items()
    assert TOKEN not in str(matter)


@pytest.mark.real
def test_the_licence_in_a_gguf_file(smollm2_gguf):
    assert licence_of([Source(str(smollm2_gguf), "gguf")]) == {"license": "apache-2.0"}


def test_the_command(tuned, tmp_path, outcome, tiny_folder):
    status, out, words = outcome("export", tuned, tmp_path / "out", "--name", "me/smol")
    assert (status, out) == (0, f"{tmp_path / 'out'}\n"), words
    assert "the base model's licence is not known; --license ID" in words
    assert words.splitlines()[-1] == f"next: linearize push me/smol {tmp_path / 'out'}"
    status, out, words = outcome("export", tuned, tmp_path / "out", "--json")
    assert status == 1 and "--overwrite" in words and not out
    facts = json.loads(outcome("export", tuned, tmp_path / "out", "--json", "--overwrite", "--license", "mit")[1])
    assert facts["licence"] == {"license": "mit"} and facts["files"]["config.json"] > 0
    status, _, words = outcome("export", tiny_folder, tmp_path / "no")
    assert status == 1 and "is not a converted folder" in words and not (tmp_path / "no").exists()
